//! What one `<disk>` of a domain is, and whether it may be served by us.
//!
//! Purpose: read a disk element into plain facts ([`Disk`]), find which volume it is, and name the reason when it must be left
//! alone ([`LeftReason`]).
//!
//! Invariants:
//! - I1: a disk is identified by its alias and its `type`, never by its source: `ua-<volume>` on a `file` or `block` disk is
//!   the volume as KubeVirt wrote it, `ua-watari-<volume>` on a `network` disk is one that we rewrote before. So a volume that is
//!   itself called `watari-x` is never taken for `x`.
//! - I2: every disk gets exactly one verdict, and every verdict but one has a reason in words.
//!
//! It changes nothing; `rewrite.rs` does.

use serde::Serialize;

use crate::tree::{Document, Element};

/// Prefix of user-defined aliases in libvirt; KubeVirt puts it before the volume's name (`api/schema.go`, `UserAliasPrefix`).
pub const ALIAS_PREFIX: &str = "ua-";
/// Prefix of the alias of a disk that we serve. KubeVirt looks for `<volume>` in `status.migratedVolumes` and would fail with
/// "no path set" on a network disk (`live-migration-source.go:1241`); it does not find `watari-<volume>`.
pub const SERVED_ALIAS_PREFIX: &str = "ua-watari-";
/// Alias of the marker disk (`marker.rs`): not [`SERVED_ALIAS_PREFIX`], so that it is no volume's alias either.
pub const MARKER_ALIAS: &str = "ua-watarimarker";
/// Where KubeVirt puts hotplugged volumes. Such disks are attached and detached behind the hook's back
/// (`virtwrap/manager.go:1541`), so a rewritten one could not be unplugged.
const HOTPLUG_FOLDER: &str = "/var/run/kubevirt/hotplug-disks/";

/// Why a disk was left as it is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, thiserror::Error)]
#[serde(tag = "reason", rename_all = "camelCase")]
pub enum LeftReason {
    /// Not a volume of this pair.
    #[error("it is not synchronised")]
    NotSynced,
    /// No user alias, so it is no volume of the VMI.
    #[error("it has no alias that names a volume")]
    NoVolume,
    /// Our own marker disk.
    #[error("it is the marker disk")]
    Marker,
    /// A CD-ROM drive.
    #[error("it is a CD-ROM")]
    Cdrom,
    /// A floppy drive.
    #[error("it is a floppy")]
    Floppy,
    /// SCSI pass-through: the guest's SCSI commands go to the device itself and have no NBD form.
    #[error("it is a LUN, which passes SCSI commands through")]
    Lun,
    /// `<readonly/>`.
    #[error("it is read-only")]
    ReadOnly,
    /// `<shareable/>`: another VM may write to it without our seeing it.
    #[error("it is shareable with other VMs")]
    Shareable,
    /// `<transient/>`: its writes are meant to be thrown away.
    #[error("it is transient")]
    Transient,
    /// Attached while the VM runs; such a disk never passes the hook at that time.
    #[error("it is hotplugged")]
    Hotplugged,
    /// KubeVirt's changed block tracking keeps a qcow2 overlay over the volume.
    #[error("changed block tracking (backup) is on for it")]
    ChangedBlockTracking,
    /// The image format is not `raw`.
    #[error("its format is {format}, not raw")]
    Format {
        /// libvirt's driver type.
        format: String,
    },
    /// An overlay over other images.
    #[error("it has a backing image")]
    BackingChain,
    /// Encrypted by QEMU.
    #[error("it is encrypted by QEMU")]
    Encrypted,
    /// A network disk that we did not make.
    #[error("it is a network disk ({protocol}) of someone else")]
    ForeignNetwork {
        /// Its protocol.
        protocol: String,
    },
    /// A disk type other than file, block and network.
    #[error("its type is {kind}")]
    OtherType {
        /// libvirt's disk type.
        kind: String,
    },
    /// A disk device other than disk, cdrom, floppy and lun.
    #[error("its device is {device}")]
    OtherDevice {
        /// libvirt's disk device.
        device: String,
    },
    /// An element that libvirt allows once is there several times.
    #[error("it has more than one <{element}>")]
    Repeated {
        /// Which.
        element: String,
    },
}

/// The facts of one disk element.
#[derive(Clone, Debug)]
pub(crate) struct Disk<'e> {
    pub element: &'e Element,
    /// `file` (libvirt's default), `block`, `network`, …
    pub kind: String,
    /// `disk` (libvirt's default), `cdrom`, `floppy`, `lun`.
    pub device: String,
    pub alias: Option<String>,
    /// The target's device name and bus, for reports and for the marker.
    pub target_dev: Option<String>,
    pub target_bus: Option<String>,
    pub driver: Option<&'e Element>,
    pub source: Option<&'e Element>,
    pub alias_element: Option<&'e Element>,
}

impl<'e> Disk<'e> {
    pub fn read(document: &Document<'_>, element: &'e Element) -> Self {
        let first = |name: &str| document.children(element, name).next();
        let value = |of: Option<&Element>, name: &str| of.and_then(|e| document.value(e, name));
        // KubeVirt's structs write an attribute that was missing as an empty one.
        let given = |name: &str, default: &str| match document.value(element, name) {
            Some(value) if !value.is_empty() => value,
            _ => default.to_owned(),
        };
        let target = first("target");
        let alias_element = first("alias");
        Disk {
            element,
            kind: given("type", "file"),
            device: given("device", "disk"),
            alias: value(alias_element, "name"),
            target_dev: value(target, "dev"),
            target_bus: value(target, "bus"),
            driver: first("driver"),
            source: first("source"),
            alias_element,
        }
    }

    /// The volume that this disk is (I1).
    pub fn volume(&self) -> Option<&str> {
        let alias = self.alias.as_deref()?;
        if alias == MARKER_ALIAS {
            return None;
        }
        if self.kind == "network"
            && let Some(volume) = alias.strip_prefix(SERVED_ALIAS_PREFIX)
        {
            return Some(volume);
        }
        alias.strip_prefix(ALIAS_PREFIX)
    }

    /// Is this a disk that we rewrote in an earlier call, possibly with what KubeVirt's schema loses missing?
    fn was_ours(&self, document: &Document<'_>) -> bool {
        let ours = self.alias.as_deref().is_some_and(|a| a.starts_with(SERVED_ALIAS_PREFIX));
        self.kind == "network" && ours && self.protocol(document).as_deref() == Some("nbd")
    }

    fn protocol(&self, document: &Document<'_>) -> Option<String> {
        document.value(self.source?, "protocol")
    }

    fn has(&self, document: &Document<'_>, name: &str) -> bool {
        document.children(self.element, name).next().is_some()
    }

    fn source_has(&self, document: &Document<'_>, name: &str) -> bool {
        self.source.is_some_and(|s| document.children(s, name).next().is_some())
    }

    /// Why this disk must not be served by us, whoever asks for it; `None` if it may.
    pub fn obstacle(&self, document: &Document<'_>) -> Option<LeftReason> {
        for element in ["source", "driver", "alias", "target"] {
            if document.children(self.element, element).count() > 1 {
                return Some(LeftReason::Repeated { element: element.into() });
            }
        }
        match self.device.as_str() {
            "disk" => {}
            "cdrom" => return Some(LeftReason::Cdrom),
            "floppy" => return Some(LeftReason::Floppy),
            "lun" => return Some(LeftReason::Lun),
            other => return Some(LeftReason::OtherDevice { device: other.into() }),
        }
        for (element, reason) in [
            ("readonly", LeftReason::ReadOnly),
            ("shareable", LeftReason::Shareable),
            ("transient", LeftReason::Transient),
            ("encryption", LeftReason::Encrypted),
        ] {
            if self.has(document, element) {
                return Some(reason);
            }
        }
        for (element, reason) in [
            ("dataStore", LeftReason::ChangedBlockTracking),
            ("encryption", LeftReason::Encrypted),
            ("reservations", LeftReason::Lun),
        ] {
            if self.source_has(document, element) {
                return Some(reason);
            }
        }
        self.obstacle_of_kind(document).or_else(|| self.obstacle_of_format(document))
    }

    fn obstacle_of_kind(&self, document: &Document<'_>) -> Option<LeftReason> {
        match self.kind.as_str() {
            "file" | "block" => {
                let path = |name| self.source.and_then(|s| document.value(s, name)).unwrap_or_default();
                let hotplugged = [path("file"), path("dev")].iter().any(|p| p.starts_with(HOTPLUG_FOLDER));
                hotplugged.then_some(LeftReason::Hotplugged)
            }
            "network" if self.was_ours(document) => None,
            "network" => Some(LeftReason::ForeignNetwork {
                protocol: self.protocol(document).unwrap_or_else(|| "no protocol".into()),
            }),
            other => Some(LeftReason::OtherType { kind: other.into() }),
        }
    }

    fn obstacle_of_format(&self, document: &Document<'_>) -> Option<LeftReason> {
        let format = self.driver.and_then(|d| document.value(d, "type"));
        if let Some(format) = format
            && format != "raw"
        {
            return Some(LeftReason::Format { format });
        }
        let chained =
            document.children(self.element, "backingStore").any(|b| document.children(b, "source").next().is_some());
        chained.then_some(LeftReason::BackingChain)
    }

    /// Would libvirt copy this disk in a live migration with KubeVirt's list of disks? (`getDiskTargetsForMigration`,
    /// `live-migration-source.go:260`: file or block, no CD-ROM, not read-only. A shareable one is not counted on.)
    pub fn is_copyable(&self, document: &Document<'_>) -> bool {
        matches!(self.kind.as_str(), "file" | "block")
            && matches!(self.device.as_str(), "disk")
            && self.source.is_some_and(|s| document.value(s, "file").or(document.value(s, "dev")).is_some())
            && !self.has(document, "readonly")
            && !self.has(document, "shareable")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(xml: &str) -> (Option<String>, Option<LeftReason>) {
        let document = Document::parse(xml.as_bytes()).expect("well-formed");
        let disk = Disk::read(&document, &document.root);
        (disk.volume().map(str::to_owned), disk.obstacle(&document))
    }

    #[test]
    fn a_disk_is_identified_by_alias_and_type_never_by_its_source() {
        for (xml, volume) in [
            ("<disk type='file'><source file='/x/root/disk.img'/><alias name='ua-data'/></disk>", Some("data")),
            (
                "<disk type='network'><source protocol='nbd' name='root'/><alias name='ua-watari-data'/></disk>",
                Some("data"),
            ),
            ("<disk type='file'><source file='/y'/><alias name='ua-watari-data'/></disk>", Some("watari-data")),
            ("<disk type='file'><source file='/y'/><alias name='ua-watarimarker'/></disk>", None),
            ("<disk type='file'><source file='/x/root/disk.img'/><alias name='virtio-disk0'/></disk>", None),
            ("<disk type='file'><source file='/x/root/disk.img'/></disk>", None),
        ] {
            assert_eq!(facts(xml).0.as_deref(), volume, "{xml}");
        }
    }

    #[test]
    fn every_shape_that_must_stay_has_its_own_reason() {
        for (attributes, content, reason) in [
            ("type='file' device='cdrom'", "", LeftReason::Cdrom),
            ("type='file' device='floppy'", "", LeftReason::Floppy),
            ("type='block' device='lun'", "<source dev='/dev/x'/>", LeftReason::Lun),
            ("type='file'", "<source file='/a'/><readonly/>", LeftReason::ReadOnly),
            ("type='file'", "<source file='/a'/><shareable/>", LeftReason::Shareable),
            ("type='file'", "<source file='/a'/><transient/>", LeftReason::Transient),
            ("type='file'", "<source file='/a'><encryption format='luks'/></source>", LeftReason::Encrypted),
            ("type='file'", "<source file='/var/run/kubevirt/hotplug-disks/v.img'/>", LeftReason::Hotplugged),
            ("type='block'", "<source dev='/var/run/kubevirt/hotplug-disks/v'/>", LeftReason::Hotplugged),
            (
                "type='file'",
                "<driver type='qcow2'/><source file='/a'><dataStore type='file'/></source>",
                LeftReason::ChangedBlockTracking,
            ),
            ("type='file'", "<driver type='qcow2'/><source file='/a'/>", LeftReason::Format { format: "qcow2".into() }),
            ("type='file'", "<backingStore><source file='/b'/></backingStore>", LeftReason::BackingChain),
            ("type='network'", "<source protocol='rbd'/>", LeftReason::ForeignNetwork { protocol: "rbd".into() }),
            ("type='network'", "<source protocol='nbd'/>", LeftReason::ForeignNetwork { protocol: "nbd".into() }),
            ("type='vhostuser'", "<source/>", LeftReason::OtherType { kind: "vhostuser".into() }),
            (
                "type='file'",
                "<source file='/a'/><source file='/b'/>",
                LeftReason::Repeated { element: "source".into() },
            ),
        ] {
            let xml = format!("<disk {attributes}>{content}<alias name='ua-v'/></disk>");
            assert_eq!(facts(&xml).1, Some(reason), "{xml}");
        }
        assert_eq!(facts("<disk><driver type='raw'/><source file='/a'/><alias name='ua-v'/></disk>").1, None);
    }
}
