//! Inputs of many shapes against checked-in outputs and reports.
//!
//! After a wanted change run with `WATARI_WRITE_EXPECTED=1` and read the diff of `tests/expected`.

mod common;

use std::fs;

use common::{FIXTURES, fixture, options, synced, tests_folder};
use watari_hook::lossy::lossy;
use watari_hook::{
    LeftReason, MarkerOutcome, RewriteError, RewriteOptions, RewriteReport, Rewritten, disks_to_copy, rewrite,
};

fn run(name: &str) -> Rewritten {
    let (_, volumes, marker) = FIXTURES.iter().find(|(n, ..)| *n == name).expect("a listed fixture");
    rewrite(fixture(name).as_bytes(), &synced(volumes), &options(*marker)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn error(name: &str, volumes: &[&str]) -> RewriteError {
    let result = rewrite(fixture(name).as_bytes(), &synced(volumes), &RewriteOptions::default());
    result.expect_err("a refusal")
}

#[test]
fn every_fixture_becomes_exactly_the_expected_domain_and_report() {
    let folder = tests_folder().join("expected");
    let mut wrong = Vec::new();
    for (name, ..) in FIXTURES {
        let Rewritten { xml, report } = run(name);
        let report = serde_json::to_string_pretty(&report).expect("serialisable") + "\n";
        for (file, got) in [(format!("{name}.xml"), xml), (format!("{name}.json"), report)] {
            let path = folder.join(&file);
            if std::env::var_os("WATARI_WRITE_EXPECTED").is_some() {
                fs::write(&path, &got).expect("written");
            }
            if fs::read_to_string(&path).ok().as_deref() != Some(got.as_str()) {
                wrong.push(file);
            }
        }
    }
    assert!(wrong.is_empty(), "different from tests/expected: {wrong:?}");
}

#[test]
fn every_file_in_the_fixture_folder_is_used() {
    let entries = fs::read_dir(tests_folder().join("fixtures")).expect("readable");
    let mut files: Vec<_> = entries.map(|e| e.expect("entry").file_name().into_string().expect("text")).collect();
    files.sort();
    let mut listed: Vec<_> = FIXTURES.iter().map(|(n, ..)| format!("{n}.xml")).collect();
    listed.sort();
    assert_eq!(files, listed);
}

#[test]
fn a_second_rewrite_of_a_fixture_changes_no_byte() {
    for (name, volumes, marker) in FIXTURES {
        let once = run(name).xml;
        let twice = rewrite(once.as_bytes(), &synced(volumes), &options(marker)).expect("still rewritable");
        assert_eq!(once, twice.xml, "{name}");
        assert!(twice.report.served.iter().all(|s| s.again), "{name}");
    }
}

#[test]
fn three_calls_with_kubevirts_losses_in_between_end_in_the_first_calls_disks() {
    for (name, volumes, marker) in FIXTURES {
        // What reaches the hook has been through KubeVirt's schema already.
        let first_input = lossy(fixture(name).as_bytes()).expect("well-formed");
        let call = |xml: &str| rewrite(xml.as_bytes(), &synced(volumes), &options(marker)).expect("rewritable");
        let first = call(&first_input);
        let second_input = lossy(first.xml.as_bytes()).expect("well-formed");
        assert!(!second_input.contains("transport"), "{name}: the loss is real");
        let third = call(&lossy(call(&second_input).xml.as_bytes()).expect("well-formed"));
        assert_eq!(canonical(&first.xml), canonical(&third.xml), "{name}");
    }
}

/// The domain without the order of attributes, of children and without white space: libvirt's meaning.
fn canonical(xml: &str) -> String {
    // Through the schema once more, our own parts kept apart, since the schema loses them.
    let ours: Vec<&str> = xml
        .split("<source protocol=\"nbd\"")
        .skip(1)
        .map(|s| s.split("</source>").next().expect("an end"))
        .chain(xml.matches("rerror_policy=\"stop\""))
        .collect();
    format!("{}\n{ours:#?}", lossy(xml.as_bytes()).expect("well-formed"))
}

#[test]
fn the_marker_is_added_only_where_it_is_configured_and_no_other_disk_is_copied() {
    let marker = |name| run(name).report.marker;
    assert_eq!(marker("alone_needs_marker"), MarkerOutcome::Added);
    assert_eq!(marker("scsi_block"), MarkerOutcome::Added);
    assert_eq!(marker("virtio_cloudinit_disk"), MarkerOutcome::NotNeeded);
    assert_eq!(marker("sata_cloudinit_cdrom"), MarkerOutcome::Off, "alone, but in Kubernetes the webhook does it");
    let again = rewrite(run("scsi_block").xml.as_bytes(), &synced(&["data"]), &options(true)).expect("rewritable");
    assert_eq!(again.report.marker, MarkerOutcome::Present);
}

#[test]
fn libvirt_is_told_to_copy_what_is_local_and_writable_and_nothing_of_ours() {
    for (name, expected) in [
        ("two_disks_of_four", &["vdc", "vdd"][..]),
        ("scsi_block", &["sdzz"]),
        ("sata_cloudinit_cdrom", &[]),
        ("virtio_cloudinit_disk", &["vdb"]),
    ] {
        assert_eq!(disks_to_copy(run(name).xml.as_bytes()).expect("a domain"), expected, "{name}");
    }
    let before = disks_to_copy(fixture("sata_cloudinit_cdrom").as_bytes()).expect("a domain");
    assert_eq!(before, ["sdb"], "without us KubeVirt copies the whole disk");
}

#[test]
fn a_volume_that_must_be_synchronised_but_cannot_be_is_named_with_the_reason() {
    for (volume, reason) in [
        ("lun", LeftReason::Lun),
        ("shared", LeftReason::Shareable),
        ("fixed", LeftReason::ReadOnly),
        ("plugged", LeftReason::Hotplugged),
        ("tracked", LeftReason::ChangedBlockTracking),
        ("ceph", LeftReason::ForeignNetwork { protocol: "rbd".into() }),
        ("cloudinit", LeftReason::Cdrom),
    ] {
        let found = error("left_alone", &["root", volume]);
        assert_eq!(found, RewriteError::CannotServe { volume: volume.into(), reason });
        assert!(found.to_string().contains(volume), "{found}");
    }
    assert_eq!(error("left_alone", &["root", "absent"]), RewriteError::Missing("absent".into()));
}

#[test]
fn a_volume_that_the_vmi_calls_hotplugged_is_refused_wherever_its_path_lies() {
    let options = RewriteOptions { hotplugged: ["root".to_owned()].into(), ..RewriteOptions::default() };
    let found = rewrite(fixture("virtio_cloudinit_disk").as_bytes(), &synced(&["root"]), &options);
    let expected = RewriteError::CannotServe { volume: "root".into(), reason: LeftReason::Hotplugged };
    assert_eq!(found, Err(expected));
}

#[test]
fn a_volume_called_watari_x_is_never_taken_for_the_volume_x() {
    let disk = |dev: &str, vol: &str| {
        format!(
            "<disk type='file'><source file='/{vol}'/><target dev='{dev}' bus='virtio'/><alias name='ua-{vol}'/></disk>"
        )
    };
    let xml = format!("<domain><devices>{}{}</devices></domain>", disk("vda", "x"), disk("vdb", "watari-x"));
    let call = |xml: &str, volumes: &[&str]| rewrite(xml.as_bytes(), &synced(volumes), &RewriteOptions::default());
    let target = |report: &RewriteReport, volume: &str| {
        report.served.iter().find(|s| s.volume == volume).expect("served").target.clone().expect("a target")
    };
    let mut now = xml.clone();
    for _ in 0..3 {
        let Rewritten { xml, report } = call(&now, &["watari-x", "x"]).expect("rewritable");
        assert_eq!(target(&report, "x"), "vda");
        assert_eq!(target(&report, "watari-x"), "vdb");
        now = lossy(xml.as_bytes()).expect("well-formed");
    }
    // Only x is synchronised and its disk is missing: the foreign disk is not taken instead.
    let alone = format!("<domain><devices>{}</devices></domain>", disk("vdb", "watari-x"));
    assert_eq!(call(&alone, &["x"]), Err(RewriteError::Missing("x".into())));
}

#[test]
fn two_disks_with_one_volumes_name_are_refused() {
    let disk = "<disk><source file='/a'/><alias name='ua-root'/></disk>";
    let xml = format!("<domain><devices>{disk}{disk}</devices></domain>");
    let found = rewrite(xml.as_bytes(), &synced(&["root"]), &RewriteOptions::default());
    assert_eq!(found, Err(RewriteError::TwoDisks("root".into())));
}

#[test]
fn settings_out_of_range_are_refused_with_field_found_and_expected() {
    let xml = fixture("virtio_cloudinit_disk");
    let refused = |change: &dyn Fn(&mut watari_hook::SyncedDisk, &mut RewriteOptions)| {
        let (mut disks, mut options) = (synced(&["root"]), RewriteOptions::default());
        change(&mut disks[0], &mut options);
        rewrite(xml.as_bytes(), &disks, &options).expect_err("a refusal").to_string()
    };
    for (text, parts) in [
        (refused(&|_, o| o.reconnect_seconds = 119), ["reconnect delay", "119", "120"]),
        (refused(&|_, o| o.marker = Some("m".into())), ["marker path", "\"m\"", "absolute"]),
        (refused(&|d, _| d.volume = "a/b".into()), ["volume name", "a/b", "letters"]),
        (refused(&|d, _| d.socket = "relative".into()), ["NBD socket of volume root", "relative", "absolute"]),
        (refused(&|d, _| d.socket = format!("/{}", "x".repeat(107))), ["NBD socket of volume root", "xxx", "107"]),
        (refused(&|d, _| d.export = "a\nb".into()), ["export name of volume root", "a\\nb", "printable"]),
    ] {
        assert!(parts.iter().all(|p| text.contains(p)), "{text}");
    }
}
