//! The marker: a 1 MiB local disk that lets libvirt migrate a domain whose every other disk is ours.
//!
//! libvirt refuses a migration over a unix socket with storage flags but without any disk to copy ("NBD URI must be supplied
//! when migration URI uses UNIX transport method"). In Kubernetes our VMI webhook adds an emptyDisk to the VMI, because an injected
//! disk breaks in-cluster migrations; the marker is for use without Kubernetes and is off unless configured.
//!
//! Invariants:
//! - I1: a domain that has a copyable disk, or the marker already, never gets another one.
//! - I2: no new controller: the marker sits on the SATA controller of the machine, at unit 5 or the highest free one.

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};

use serde::Serialize;

use crate::disk::{Disk, MARKER_ALIAS};
use crate::tree::{Document, Element};

/// Size of the marker file in bytes, the same at both sites. QEMU refuses less than 4096; 1 MiB is what was tried.
pub const MARKER_BYTES: u64 = 1 << 20;
/// The marker's device name. libvirt derives an address from it only when none is given.
const MARKER_TARGET: &str = "sdzz";
/// Ports of an AHCI controller.
const SATA_UNITS: u32 = 6;

/// What became of the marker in one call.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum MarkerOutcome {
    /// Not configured.
    Off,
    /// Another disk is copied by libvirt, or none of ours is in the domain.
    NotNeeded,
    /// It was there from an earlier call.
    Present,
    /// It was added by this call.
    Added,
}

/// Does a domain with these disks need the marker? Pure; see the module for why.
///
/// `served` counts the disks that we serve; `copyable` those that libvirt would copy; `present` says that the marker is there.
pub fn needs_marker(served: usize, copyable: usize, present: bool) -> bool {
    served > 0 && copyable == 0 && !present
}

pub(crate) fn is_marker(disk: &Disk<'_>) -> bool {
    disk.alias.as_deref() == Some(MARKER_ALIAS)
}

/// The marker's element, for a domain with these disks; `None` when the first SATA controller is full.
pub(crate) fn marker_xml(document: &Document<'_>, disks: &[Disk<'_>], path: &str) -> Option<String> {
    let taken: BTreeSet<u32> = disks.iter().filter_map(|d| sata_unit(document, d)).collect();
    let unit = (0..SATA_UNITS).rev().find(|unit| !taken.contains(unit))?;
    let path = quick_xml::escape::escape(path);
    Some(format!(
        "<disk type=\"file\" device=\"disk\"><driver name=\"qemu\" type=\"raw\" cache=\"writethrough\"/>\
         <source file=\"{path}\"/><target dev=\"{MARKER_TARGET}\" bus=\"sata\"/><alias name=\"{MARKER_ALIAS}\"/>\
         <address type=\"drive\" controller=\"0\" bus=\"0\" target=\"0\" unit=\"{unit}\"/></disk>"
    ))
}

/// The unit of the first SATA controller that a disk has or will get. Without an address libvirt derives it from the
/// device name (`virDomainDiskDefAssignAddress`: sda is unit 0 of controller 0).
fn sata_unit(document: &Document<'_>, disk: &Disk<'_>) -> Option<u32> {
    if disk.target_bus.as_deref() != Some("sata") {
        return None;
    }
    let address = document.children(disk.element, "address").next();
    let number = |e: &Element, name| document.value(e, name).and_then(|v| v.parse::<u32>().ok());
    if let Some(address) = address
        && let Some(unit) = number(address, "unit")
    {
        return (number(address, "controller").unwrap_or(0) == 0).then_some(unit);
    }
    let letters = disk.target_dev.as_deref()?.strip_prefix("sd")?;
    let mut bytes = letters.bytes();
    match (bytes.next(), bytes.next()) {
        (Some(letter), None) if letter.is_ascii_lowercase() => {
            Some(u32::from(letter - b'a')).filter(|u| *u < SATA_UNITS)
        }
        _ => None,
    }
}

/// Make sure that the marker file exists with its size and that QEMU's user can open it. Both sites need it.
///
/// Errors: whatever the file system says; a file of another size is refused rather than changed.
pub fn ensure_marker_file(path: &Path) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o666).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let found = File::open(path)?.metadata()?.len();
            if found != MARKER_BYTES && found != 0 {
                let text = format!("{} has {found} bytes, the marker has {MARKER_BYTES}", path.display());
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            OpenOptions::new().write(true).open(path)?
        }
        Err(e) => return Err(e),
    };
    file.set_len(MARKER_BYTES)?;
    // The process's umask may have taken away what QEMU, another user, needs.
    let mut permissions = file.metadata()?.permissions();
    if permissions.mode() & 0o666 != 0o666 {
        permissions.set_mode(0o666);
        file.set_permissions(permissions)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_marker_is_needed_only_where_a_served_disk_is_alone() {
        assert!(needs_marker(1, 0, false));
        assert!(!needs_marker(0, 0, false), "nothing of ours: libvirt's business");
        assert!(!needs_marker(1, 1, false));
        assert!(!needs_marker(1, 0, true));
    }

    fn unit_given(disks: &str) -> Option<String> {
        let xml = format!("<devices>{disks}</devices>");
        let document = Document::parse(xml.as_bytes()).expect("well-formed");
        let disks: Vec<_> = document.children(&document.root, "disk").map(|d| Disk::read(&document, d)).collect();
        let marker = marker_xml(&document, &disks, "/m")?;
        Some(marker.split("unit=\"").nth(1).expect("has a unit")[..1].to_owned())
    }

    #[test]
    fn the_marker_takes_unit_5_or_the_highest_that_is_free_by_address_and_by_name() {
        let named = |dev: &str| format!("<disk><target bus='sata' dev='{dev}'/></disk>");
        assert_eq!(unit_given("").as_deref(), Some("5"));
        assert_eq!(unit_given(&named("sdf")).as_deref(), Some("4"));
        let addressed = "<disk><target bus='sata' dev='sda'/><address controller='0' unit='5'/></disk>";
        assert_eq!(unit_given(addressed).as_deref(), Some("4"));
        assert_eq!(unit_given("<disk><target bus='scsi' dev='sdf'/></disk>").as_deref(), Some("5"));
        let all: String = ["sda", "sdb", "sdc", "sdd", "sde", "sdf"].iter().map(|d| named(d)).collect();
        assert_eq!(unit_given(&all), None);
    }

    #[test]
    fn the_marker_file_is_made_once_and_a_file_of_another_size_is_refused() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("nested/marker.img");
        ensure_marker_file(&path).expect("made");
        ensure_marker_file(&path).expect("found");
        let metadata = path.metadata().expect("there");
        assert_eq!((metadata.len(), metadata.permissions().mode() & 0o777), (MARKER_BYTES, 0o666));
        std::fs::write(&path, b"someone's data").expect("written");
        assert!(ensure_marker_file(&path).is_err());
        assert_eq!(std::fs::read(&path).expect("read"), b"someone's data");
    }
}
