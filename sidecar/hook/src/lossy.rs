//! A model of what KubeVirt forgets between two `OnDefineDomain` calls of one boot.
//!
//! After each call virt-launcher parses our XML into its own structs (`pkg/virt-launcher/virtwrap/api/schema.go`) and marshals those as
//! the next call's input (`util/libvirt_helper.go:144-163`): elements and attributes that the structs lack are gone, fields without
//! `omitempty` appear empty, the order is the structs', comments and namespaced extensions vanish.
//!
//! Exact for `<disk>`, which is what we rewrite. Elsewhere it keeps the children that KubeVirt's structs know of `<domain>` and
//! `<devices>`, whole. It is for tests that play virt-launcher; the sidecar never calls it.

use crate::tree::{Document, Element, XmlError};

/// What one struct of KubeVirt's schema keeps.
struct Shape {
    /// Attribute names, and whether the attribute is written even when it is empty.
    attributes: &'static [(&'static str, bool)],
    /// Child elements in the struct's order, and whether the child is written even when it is missing.
    children: &'static [(&'static str, &'static Shape, bool)],
    /// Has a `chardata` field or is a plain value.
    text: bool,
    /// Not modelled: keep whatever is inside, but for comments and namespaces.
    anything: bool,
}

const fn shape(
    attributes: &'static [(&'static str, bool)],
    children: &'static [(&'static str, &'static Shape, bool)],
) -> Shape {
    Shape { attributes, children, text: false, anything: false }
}

static ANYTHING: Shape = Shape { attributes: &[], children: &[], text: true, anything: true };
static VALUE: Shape = Shape { attributes: &[], children: &[], text: true, anything: false };
static EMPTY: Shape = shape(&[], &[]);

static HOST: Shape = shape(&[("name", true), ("port", false)], &[]);
static FORMAT: Shape = shape(&[("type", true)], &[]);
static RESERVATION_SOURCE: Shape = shape(&[("type", true), ("path", false), ("mode", false)], &[]);
static RESERVATIONS: Shape = shape(&[("managed", false)], &[("source", &RESERVATION_SOURCE, false)]);
static SLICE: Shape = shape(&[("type", true), ("offset", true), ("size", true)], &[]);
static SLICES: Shape = shape(&[], &[("slice", &SLICE, false)]);
static DATA_STORE: Shape = shape(&[("type", false)], &[("format", &FORMAT, false), ("source", &SOURCE, false)]);
static SOURCE: Shape = shape(
    &[("dev", false), ("file", false), ("startupPolicy", false), ("protocol", false), ("name", false)],
    &[
        ("host", &HOST, false),
        ("reservations", &RESERVATIONS, false),
        ("slices", &SLICES, false),
        ("dataStore", &DATA_STORE, false),
    ],
);
static TARGET: Shape = shape(&[("bus", false), ("dev", false), ("tray", false)], &[]);
static IOTHREAD: Shape = shape(&[("id", true)], &[]);
static IOTHREADS: Shape = shape(&[], &[("iothread", &IOTHREAD, false)]);
static DRIVER: Shape = shape(
    &[
        ("cache", false),
        ("error_policy", false),
        ("io", false),
        ("name", true),
        ("type", true),
        ("iothread", false),
        ("queues", false),
        ("discard", false),
        ("iommu", false),
    ],
    &[("iothreads", &IOTHREADS, false)],
);
static SECRET: Shape = shape(&[("type", true), ("usage", false), ("uuid", false)], &[]);
static AUTH: Shape = shape(&[("username", true)], &[("secret", &SECRET, false)]);
static ALIAS: Shape = shape(&[("name", true)], &[]);
static BACKING_STORE: Shape = shape(&[("type", false)], &[("format", &FORMAT, false), ("source", &SOURCE, false)]);
static BOOT: Shape = shape(&[("order", true)], &[]);
static ADDRESS: Shape = shape(
    &[
        ("type", true),
        ("domain", false),
        ("bus", false),
        ("slot", false),
        ("function", false),
        ("controller", false),
        ("target", false),
        ("unit", false),
        ("uuid", false),
        ("device", false),
        ("cssid", false),
        ("ssid", false),
        ("devno", false),
    ],
    &[],
);
static BLOCK_IO: Shape =
    shape(&[("logical_block_size", false), ("physical_block_size", false), ("discard_granularity", false)], &[]);
static DISK: Shape = shape(
    &[("device", true), ("snapshot", false), ("type", true), ("model", false)],
    &[
        ("source", &SOURCE, true),
        ("target", &TARGET, true),
        ("serial", &VALUE, false),
        ("driver", &DRIVER, false),
        ("readonly", &EMPTY, false),
        ("auth", &AUTH, false),
        ("alias", &ALIAS, false),
        ("backingStore", &BACKING_STORE, false),
        ("boot", &BOOT, false),
        ("address", &ADDRESS, false),
        ("blockio", &BLOCK_IO, false),
        ("filesystemOverhead", &VALUE, false),
        ("capacity", &VALUE, false),
        ("expandDisksEnabled", &VALUE, false),
        ("shareable", &EMPTY, false),
    ],
);
static DEVICES: Shape = shape(
    &[],
    &[
        ("emulator", &VALUE, false),
        ("interface", &ANYTHING, false),
        ("channel", &ANYTHING, false),
        ("hostdev", &ANYTHING, false),
        ("panic", &ANYTHING, false),
        ("controller", &ANYTHING, false),
        ("video", &ANYTHING, false),
        ("graphics", &ANYTHING, false),
        ("memballoon", &ANYTHING, false),
        ("disk", &DISK, false),
        ("input", &ANYTHING, false),
        ("serial", &ANYTHING, false),
        ("console", &ANYTHING, false),
        ("watchdog", &ANYTHING, false),
        ("rng", &ANYTHING, false),
        ("filesystem", &ANYTHING, false),
        ("redirdev", &ANYTHING, false),
        ("sound", &ANYTHING, false),
        ("tpm", &ANYTHING, false),
        ("vsock", &ANYTHING, false),
        ("memory", &ANYTHING, false),
    ],
);
static DOMAIN: Shape = shape(
    &[("type", true)],
    &[
        ("name", &VALUE, true),
        ("uuid", &VALUE, false),
        ("memory", &ANYTHING, false),
        ("currentMemory", &ANYTHING, false),
        ("maxMemory", &ANYTHING, false),
        ("memoryBacking", &ANYTHING, false),
        ("os", &ANYTHING, false),
        ("sysinfo", &ANYTHING, false),
        ("devices", &DEVICES, true),
        ("clock", &ANYTHING, false),
        ("resource", &ANYTHING, false),
        ("metadata", &ANYTHING, false),
        ("features", &ANYTHING, false),
        ("cpu", &ANYTHING, false),
        ("vcpu", &ANYTHING, false),
        ("vcpus", &ANYTHING, false),
        ("cputune", &ANYTHING, false),
        ("numatune", &ANYTHING, false),
        ("iothreads", &VALUE, false),
        ("launchSecurity", &ANYTHING, false),
    ],
);

/// The domain as KubeVirt would hand it to the next call.
///
/// Errors: the XML is not well-formed.
pub fn lossy(xml: &[u8]) -> Result<String, XmlError> {
    let document = Document::parse(xml)?;
    let mut out = String::with_capacity(xml.len());
    write(&document, Some(&document.root), "domain", &DOMAIN, 0, &mut out);
    Ok(out)
}

/// Write one element in the manner of Go's `xml.MarshalIndent`.
fn write(
    document: &Document<'_>,
    element: Option<&Element>,
    name: &str,
    shape: &'static Shape,
    depth: usize,
    out: &mut String,
) {
    let indent = |out: &mut String, depth: usize| {
        if !out.is_empty() {
            out.push('\n');
        }
        out.extend(std::iter::repeat_n('\t', depth));
    };
    indent(out, depth);
    out.push('<');
    out.push_str(name);
    for (attribute, value) in attributes(document, element, shape) {
        out.push_str(&format!(" {attribute}=\"{}\"", quick_xml::escape::escape(&value)));
    }
    out.push('>');
    let mut nested = false;
    for (child, child_name, child_shape) in children(document, element, shape) {
        nested = true;
        write(document, child, child_name, child_shape, depth + 1, out);
    }
    if nested {
        indent(out, depth);
    } else if let Some(element) = element
        && shape.text
    {
        let text = document.slice(&(element.open.end..element.close.start.max(element.open.end)));
        // A leaf of KubeVirt's holds plain text; a comment or CDATA section in it is not modelled and dropped.
        if !text.contains('<') {
            out.push_str(text);
        }
    }
    out.push_str(&format!("</{name}>"));
}

fn attributes(document: &Document<'_>, element: Option<&Element>, shape: &'static Shape) -> Vec<(String, String)> {
    if shape.anything {
        let all = element.iter().flat_map(|e| &e.attributes).map(|a| document.slice(&a.name));
        // `xmlns` itself carries KubeVirt's metadata; prefixed names match no field of Go's.
        return all
            .filter(|name| !name.contains(':'))
            .filter_map(|name| Some((name.to_owned(), document.value(element?, name)?)))
            .collect();
    }
    let value = |name| element.and_then(|e| document.value(e, name)).unwrap_or_default();
    let kept = shape.attributes.iter().map(|(name, always)| (name, value(name), always));
    kept.filter(|(_, value, always)| **always || !value.is_empty()).map(|(n, v, _)| ((*n).to_owned(), v)).collect()
}

type Child<'d, 'e> = (Option<&'e Element>, &'d str, &'static Shape);

fn children<'d, 'e>(
    document: &Document<'d>,
    element: Option<&'e Element>,
    shape: &'static Shape,
) -> Vec<Child<'d, 'e>> {
    let present = element.map(|e| e.children.as_slice()).unwrap_or_default();
    if shape.anything {
        let plain = present.iter().map(|c| (Some(c), document.name(c), &ANYTHING));
        return plain.filter(|(_, name, _)| !name.contains(':')).collect();
    }
    let mut kept: Vec<Child<'d, 'e>> = Vec::new();
    for (name, child_shape, always) in shape.children {
        let before = kept.len();
        kept.extend(present.iter().filter(|c| document.name(c) == *name).map(|c| (Some(c), *name, *child_shape)));
        if *always && kept.len() == before {
            kept.push((None, name, child_shape));
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_served_disk_loses_its_socket_its_reconnect_delay_and_its_read_error_policy() {
        let ours = "<domain type='qemu' xmlns:qemu='q'><name>v</name><devices><!-- c -->\
            <disk type='network' device='disk'><driver name='qemu' type='raw' detect_zeroes='unmap' error_policy='stop' \
            rerror_policy='stop' queues='2'/><source protocol='nbd' name='root'><host transport='unix' socket='/s'/>\
            <reconnect delay='120'/></source><target dev='vda' bus='virtio'/><alias name='ua-watari-root'/></disk></devices>\
            <qemu:commandline><qemu:arg value='-x'/></qemu:commandline></domain>";
        let expected = "<domain type=\"qemu\">\n\t<name>v</name>\n\t<devices>\n\t\t<disk device=\"disk\" type=\"network\">\n\t\t\t\
            <source protocol=\"nbd\" name=\"root\">\n\t\t\t\t<host name=\"\"></host>\n\t\t\t</source>\n\t\t\t\
            <target bus=\"virtio\" dev=\"vda\"></target>\n\t\t\t\
            <driver error_policy=\"stop\" name=\"qemu\" type=\"raw\" queues=\"2\"></driver>\n\t\t\t\
            <alias name=\"ua-watari-root\"></alias>\n\t\t</disk>\n\t</devices>\n</domain>";
        assert_eq!(lossy(ours.as_bytes()).expect("well-formed"), expected);
    }
}
