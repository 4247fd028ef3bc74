//! Properties of the rewrite over arbitrary bytes and over generated domains.

mod common;

use proptest::prelude::*;

use common::{synced, with_marker};
use watari_hook::lossy::lossy;
use watari_hook::{MARKER_ALIAS, RewriteOptions, rewrite};

/// One generated disk: its text, and what the rewrite must not touch in it, in order.
#[derive(Clone, Debug)]
struct GeneratedDisk {
    volume: &'static str,
    text: String,
    kept: Vec<String>,
}

fn quoted(value: &str, single: bool) -> String {
    let escaped = value.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;").replace('\'', "&apos;");
    if single { format!("'{escaped}'") } else { format!("\"{escaped}\"") }
}

/// White space, comments, processing instructions and foreign elements that may stand between a disk's children.
fn filler() -> impl Strategy<Value = String> {
    prop::sample::select(vec![
        "",
        "\n\t\t",
        "<!-- <source file='/no'/> </disk> -->",
        "<?pi <alias name='ua-root'/> ?>",
        "<![CDATA[</disk><disk>]]>",
        "<q:x xmlns:q='urn:q'><source file='/no'/><alias name=\"ua-root\"/></q:x>",
        "<capacity>1073741824</capacity>",
        "<boot order='1'/>",
        "<serial>ä &amp; ö</serial>",
        "<address type='pci' domain='0x0000' bus='0x07' slot='0x00' function='0x0'></address>",
        "<iotune><read_bytes_sec>0</read_bytes_sec></iotune>",
    ])
    .prop_map(str::to_owned)
}

fn element(name: &'static str, attributes: String, content: String, short: bool) -> String {
    if short && content.is_empty() {
        format!("<{name}{attributes}/>")
    } else {
        format!("<{name}{attributes}>{content}</{name} >")
    }
}

prop_compose! {
    fn driver()(cache in prop::option::of("(none|writethrough|writeback)"), io in prop::option::of("(native|threads)"),
                policy in prop::option::of("(stop|report|ignore)"), read_policy in prop::option::of("(stop|ignore)"),
                iothreads in any::<bool>(), single in any::<bool>(), short in any::<bool>(), queues in prop::option::of(1u8..9))
               -> (String, String) {
        let iothread_list = if iothreads { "<iothreads><iothread id='1'/></iothreads>" } else { "" };
        let mut attributes = String::from(" name='qemu'\n type=\"raw\"");
        for (name, value) in [("cache", cache), ("io", io), ("error_policy", policy), ("rerror_policy", read_policy),
                              ("queues", queues.map(|q| q.to_string()))] {
            if let Some(value) = value {
                attributes.push_str(&format!(" {name} = {}", quoted(&value, single)));
            }
        }
        (element("driver", attributes, iothread_list.into(), short), iothread_list.to_owned())
    }
}

prop_compose! {
    fn disk(volume: &'static str, dev: &'static str)
           (driver in prop::option::of(driver()), path in "/[a-zA-Z0-9<&'\"äé /]{0,12}", block in any::<bool>(),
            order in Just([0usize, 1, 2, 3]).prop_shuffle(), fillers in prop::array::uniform5(filler()),
            single in any::<bool>(), short in any::<bool>(), type_given in any::<bool>()) -> GeneratedDisk {
        let (source_name, kind) = if block && type_given { ("dev", "block") } else { ("file", "file") };
        let source = element("source", format!(" {source_name}={}", quoted(&path, single)), String::new(), short);
        let alias = element("alias", format!(" name={}", quoted(&format!("ua-{volume}"), single)), String::new(), short);
        let target = element("target", format!(" dev={} bus='virtio'", quoted(dev, single)), String::new(), short);
        let iothreads = driver.as_ref().map(|(_, inner)| inner.clone()).unwrap_or_default();
        let parts = [driver.map(|(d, _)| d).unwrap_or_default(), source, alias, target.clone()];
        let kind = if type_given { format!(" type={}", quoted(kind, single)) } else { String::new() };
        let mut text = format!("<disk\n {kind} device='disk' >");
        let mut kept = Vec::new();
        for (n, part) in order.into_iter().enumerate() {
            text.push_str(&fillers[n]);
            kept.push(fillers[n].clone());
            text.push_str(&parts[part]);
            match part {
                0 => kept.push(iothreads.clone()),
                3 => kept.push(target.clone()),
                _ => {}
            }
        }
        text.push_str(&fillers[4]);
        kept.push(fillers[4].clone());
        text.push_str("</disk>");
        GeneratedDisk { volume, text, kept }
    }
}

/// A domain: the disks, and the text around them.
#[derive(Clone, Debug)]
struct Domain {
    disks: Vec<GeneratedDisk>,
    around: Vec<String>,
}

impl Domain {
    fn text(&self) -> String {
        let mut out = self.around[0].clone();
        for (disk, after) in self.disks.iter().zip(&self.around[1..]) {
            out.push_str(&disk.text);
            out.push_str(after);
        }
        out
    }
}

prop_compose! {
    fn domain()(disks in (disk("root", "vda"), disk("data", "vdb"), disk("other", "vdc")),
                between in prop::array::uniform2(filler()), count in 1usize..4) -> Domain {
        let disks: Vec<_> = [disks.0, disks.1, disks.2].into_iter().take(count).collect();
        let head = "<?xml version='1.0'?>\n<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>ä</name>\
            <metadata><d xmlns='urn:d'><disk type='file'><alias name='ua-root'/></disk></d></metadata><devices>";
        let tail = "<controller type='usb'/></devices><qemu:commandline><qemu:arg value='a&quot;b'/></qemu:commandline></domain>\n";
        let mut around: Vec<String> = vec![format!("{head}{}", between[0])];
        around.extend((1..disks.len()).map(|_| between[1].clone()));
        around.push(tail.into());
        Domain { disks, around }
    }
}

/// Where each of `parts` is found in `text`, each after the one before; panics if one is missing.
fn in_order(text: &str, parts: &[String]) {
    let mut at = 0;
    for part in parts {
        let found = text[at..].find(part.as_str());
        assert!(found.is_some(), "{part:?} is missing after byte {at} of {text}");
        at += found.unwrap_or_default() + part.len();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = rewrite(&bytes, &synced(&["root"]), &with_marker());
        let _ = lossy(&bytes);
    }

    #[test]
    fn arbitrary_markup_never_panics(
        parts in prop::collection::vec(prop::sample::select(vec![
            "<domain>", "</domain>", "<devices>", "</devices>", "<disk type='file'>", "<disk", " type=", "'", "\"", "</disk>",
            "<alias name='ua-root'/>", "<source file='/a'/>", "<driver io='x'/>", "<!--", "-->", "<![CDATA[", "]]>", "<?", "?>",
            "&lt;", "&", "<", ">", "/", " ", "=", "ä", "\u{feff}", "<!DOCTYPE x>", "x",
        ]), 0..40)
    ) {
        let text = parts.concat();
        if let Ok(done) = rewrite(text.as_bytes(), &synced(&["root"]), &with_marker()) {
            prop_assert!(rewrite(done.xml.as_bytes(), &synced(&["root"]), &with_marker()).is_ok());
        }
    }

    #[test]
    fn a_domain_damaged_at_one_byte_never_panics(domain in domain(), at in any::<prop::sample::Index>(), with in any::<u8>()) {
        let mut bytes = domain.text().into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = with;
        let _ = rewrite(&bytes, &synced(&["root"]), &with_marker());
    }

    #[test]
    fn everything_around_the_synchronised_disks_is_byte_identical(domain in domain()) {
        let volumes: Vec<_> = domain.disks.iter().map(|d| d.volume).filter(|v| *v != "other").collect();
        let done = rewrite(domain.text().as_bytes(), &synced(&volumes), &RewriteOptions::default()).expect("rewritable");
        // Take the output apart along the known surroundings; what is left over are the disks.
        let mut rest = done.xml.as_str();
        rest = rest.strip_prefix(domain.around[0].as_str()).expect("the head");
        for (n, disk) in domain.disks.iter().enumerate() {
            let after = &domain.around[n + 1];
            if disk.volume == "other" {
                rest = rest.strip_prefix(disk.text.as_str()).expect("a disk that is not ours, unchanged");
            } else {
                let last_kept = disk.text.rfind("</disk>").expect("an end");
                prop_assert_eq!(&disk.text[last_kept..], "</disk>");
                // The next disk begins, or the tail, after this disk's own end: the surroundings hold no "</disk>" of their own
                // except in fillers, so look for the whole text that must follow.
                let next = domain.disks.get(n + 1);
                let follow = format!("</disk>{after}{}", if next.is_some() { "<disk\n " } else { "" });
                let end = rest.find(&follow).expect("what follows the disk") + "</disk>".len();
                in_order(&rest[..end], &disk.kept);
                rest = &rest[end..];
            }
            rest = rest.strip_prefix(after.as_str()).expect("the text after the disk");
        }
        prop_assert_eq!(rest, "");
    }

    #[test]
    fn rewriting_twice_is_rewriting_once(domain in domain(), marker in any::<bool>()) {
        let volumes: Vec<_> = domain.disks.iter().map(|d| d.volume).collect();
        let options = if marker { with_marker() } else { RewriteOptions::default() };
        let once = rewrite(domain.text().as_bytes(), &synced(&volumes), &options).expect("rewritable").xml;
        let twice = rewrite(once.as_bytes(), &synced(&volumes), &options).expect("rewritable").xml;
        prop_assert_eq!(&once, &twice);
        prop_assert_eq!(once.matches(MARKER_ALIAS).count(), usize::from(marker));
    }

    #[test]
    fn losing_what_kubevirts_schema_loses_changes_nothing_in_the_end(domain in domain()) {
        let volumes: Vec<_> = domain.disks.iter().map(|d| d.volume).filter(|v| *v != "other").collect();
        let call = |xml: &str| rewrite(xml.as_bytes(), &synced(&volumes), &RewriteOptions::default()).expect("rewritable");
        let first = call(&domain.text()).xml;
        let again = call(&lossy(first.as_bytes()).expect("well-formed")).xml;
        // Equal in meaning: the same after the schema, and the same sources and policies, which the schema would hide.
        prop_assert_eq!(lossy(first.as_bytes()).expect("well-formed"), lossy(again.as_bytes()).expect("well-formed"));
        let ours = |xml: &str| -> Vec<String> {
            xml.split("<source protocol=\"nbd\"").skip(1).map(|s| s.split("</source>").next().expect("an end").to_owned()).collect()
        };
        prop_assert_eq!(ours(&first).len(), volumes.len());
        prop_assert_eq!(ours(&first), ours(&again));
        let stops = |xml: &str| (xml.matches("rerror_policy=\"stop\"").count() + xml.matches("rerror_policy = \"stop\"").count()
            + xml.matches("rerror_policy = 'stop'").count()).min(volumes.len());
        prop_assert_eq!(stops(&again), volumes.len());
        // The only AIO modes left are those of disks that are not ours.
        let foreign = domain.disks.iter().filter(|d| d.volume == "other" && d.text.contains(" io = ")).count();
        prop_assert_eq!(again.matches(" io=").count(), foreign);
    }
}
