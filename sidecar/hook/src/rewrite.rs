//! The domain rewrite: each synchronised disk becomes a network disk that our sidecar serves over NBD.
//!
//! Purpose: a pure function from (domain XML, synchronised disks) to (domain XML, report), called for every `OnDefineDomain`.
//!
//! Invariants:
//! - I1: bytes outside the rewritten disks' `type`, `<source>`, `<driver>` attributes and `<alias>` (and an added marker) are the
//!   input's, in order.
//! - I2: idempotent: what comes back from an earlier call, whole or stripped to KubeVirt's own schema, gives the same disks.
//! - I3: all or nothing: either every synchronised volume is rewritten, or the call fails and names the volume. A VM must never run
//!   with one of its synchronised disks written behind our back.
//!
//! It does not touch the network, files or the VMI, and does not decide whether the VM may start (`engine.rs`).

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::disk::{Disk, LeftReason, SERVED_ALIAS_PREFIX};
use crate::marker::{self, MarkerOutcome};
use crate::tree::{Document, Edits, Element, XmlError};

/// Smallest reconnect delay in seconds. Kubelet's restart back-off and QEMU's growing reconnect pauses add up to a paused VM by
/// the second crash with 30 s.
pub const RECONNECT_SECONDS_MIN: u32 = 120;
/// Longest path of a unix socket in bytes (`sun_path` without its terminating zero).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Longest volume name in bytes (a DNS label, as Kubernetes requires).
pub const VOLUME_BYTES_MAX: usize = 63;

/// A volume that this sidecar serves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SyncedDisk {
    /// The VMI's volume name.
    pub volume: String,
    /// NBD export name.
    pub export: String,
    /// The NBD socket as QEMU's container sees it: absolute, at most [`SOCKET_PATH_BYTES_MAX`] bytes, the same at both sites, free
    /// of namespaces and of VMI UIDs (KubeVirt replaces those in a migrated domain).
    pub socket: String,
}

/// How to rewrite, apart from the disks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RewriteOptions {
    /// Seconds for which QEMU keeps requests while the sidecar is away; at least [`RECONNECT_SECONDS_MIN`].
    pub reconnect_seconds: u32,
    /// Path of the marker disk's file as QEMU sees it; `None` (in Kubernetes always) for no marker.
    pub marker: Option<String>,
    /// Volumes that the VMI calls hotplugged.
    pub hotplugged: BTreeSet<String>,
}

impl Default for RewriteOptions {
    fn default() -> Self {
        RewriteOptions { reconnect_seconds: RECONNECT_SECONDS_MIN, marker: None, hotplugged: BTreeSet::new() }
    }
}

/// Why a domain could not be rewritten. The texts reach users as events of the VMI.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RewriteError {
    /// The XML itself.
    #[error("the domain XML of this VM cannot be read: {0}")]
    Xml(#[from] XmlError),
    /// The root element is not `<domain>`.
    #[error("expected a <domain>, found <{0}>")]
    NotADomain(String),
    /// A synchronised volume's disk must not be rewritten.
    #[error(
        "volume {volume} is to be synchronised, but cannot be: {reason}. Remove it from the SyncPair or change the disk"
    )]
    CannotServe {
        /// The volume.
        volume: String,
        /// Why.
        reason: LeftReason,
    },
    /// A synchronised volume has no disk.
    #[error(
        "volume {0} is to be synchronised, but this VM has no disk for it. Remove it from the SyncPair or add the disk"
    )]
    Missing(String),
    /// Two disks name the same volume.
    #[error("two disks of this VM name the volume {0}")]
    TwoDisks(String),
    /// A setting of ours is wrong.
    #[error("{field} is {found}, expected {expected}")]
    Setting {
        /// Which setting.
        field: String,
        /// What it is.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// The marker is needed, but the SATA controller is full.
    #[error("the VM needs a local marker disk to be migrated, but all 6 ports of its SATA controller are in use")]
    NoMarkerUnit,
}

/// One disk that is served by us now.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServedDisk {
    /// The volume.
    pub volume: String,
    /// The guest's device name as libvirt knows it (`vda`).
    pub target: Option<String>,
    /// It had been rewritten by an earlier call.
    pub again: bool,
}

/// One disk that was left as it is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LeftDisk {
    /// The volume, if the disk is one.
    pub volume: Option<String>,
    /// The guest's device name as libvirt knows it.
    pub target: Option<String>,
    /// Why.
    #[serde(flatten)]
    pub reason: LeftReason,
}

/// What a call did, disk by disk in document order.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RewriteReport {
    /// Served by us.
    pub served: Vec<ServedDisk>,
    /// Left alone.
    pub left: Vec<LeftDisk>,
    /// How many of the domain's disks libvirt itself copies in a live migration; with none and no marker a migration is refused.
    pub copyable: usize,
    /// The marker disk.
    pub marker: MarkerOutcome,
}

/// A rewritten domain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rewritten {
    /// The whole document.
    pub xml: String,
    /// What was done.
    pub report: RewriteReport,
}

/// Rewrite `xml` so that every one of `synced` is served by us.
///
/// Errors: see [`RewriteError`]; nothing is half-done. Source: kubevirt.md §2.4 (the form that libvirt and QEMU accept).
pub fn rewrite(xml: &[u8], synced: &[SyncedDisk], options: &RewriteOptions) -> Result<Rewritten, RewriteError> {
    let wanted = check_settings(synced, options)?;
    let document = domain_document(xml)?;
    let disks = domain_disks(&document);

    let mut edits = Edits::default();
    let mut report = RewriteReport { served: Vec::new(), left: Vec::new(), copyable: 0, marker: MarkerOutcome::Off };
    for disk in &disks {
        match judge(&document, disk, &wanted, options)? {
            Ok(synced) => {
                if report.served.iter().any(|s| s.volume == synced.volume) {
                    return Err(RewriteError::TwoDisks(synced.volume.clone()));
                }
                rewrite_disk(&document, disk, synced, options, &mut edits);
                report.served.push(ServedDisk {
                    volume: synced.volume.clone(),
                    target: disk.target_dev.clone(),
                    again: disk.kind == "network",
                });
            }
            Err(reason) => {
                report.copyable += usize::from(reason != LeftReason::Marker && disk.is_copyable(&document));
                report.left.push(LeftDisk {
                    volume: disk.volume().map(str::to_owned),
                    target: disk.target_dev.clone(),
                    reason,
                });
            }
        }
    }
    if let Some(missing) = synced.iter().find(|s| !report.served.iter().any(|d| d.volume == s.volume)) {
        return Err(RewriteError::Missing(missing.volume.clone()));
    }
    report.marker = add_marker(&document, &disks, &report, options, &mut edits)?;
    Ok(Rewritten { xml: edits.apply(document.text())?, report })
}

/// Target names (`sda`) of the disks that a live migration of this domain has libvirt copy, as virt-launcher lists them
/// (`getDiskTargetsForMigration`, `live-migration-source.go:260`). With an empty list it names neither disks nor an NBD URI, and libvirt
/// refuses a migration with storage flags.
///
/// Errors: the XML is no domain.
pub fn disks_to_copy(xml: &[u8]) -> Result<Vec<String>, RewriteError> {
    let document = domain_document(xml)?;
    let disks = domain_disks(&document);
    Ok(disks.into_iter().filter(|d| d.is_copyable(&document)).filter_map(|d| d.target_dev).collect())
}

fn domain_document(xml: &[u8]) -> Result<Document<'_>, RewriteError> {
    let document = Document::parse(xml)?;
    match document.name(&document.root) {
        "domain" => Ok(document),
        other => Err(RewriteError::NotADomain(other.to_owned())),
    }
}

/// All disks, in document order. libvirt looks below every `<devices>` of the root and nowhere else.
fn domain_disks<'e>(document: &'e Document<'_>) -> Vec<Disk<'e>> {
    let devices = document.children(&document.root, "devices");
    let elements = devices.flat_map(|devices| document.children(devices, "disk"));
    elements.map(|element| Disk::read(document, element)).collect()
}

/// Serve it, or leave it for a reason; an error if it must be served and cannot be.
fn judge<'s>(
    document: &Document<'_>,
    disk: &Disk<'_>,
    wanted: &BTreeMap<&str, &'s SyncedDisk>,
    options: &RewriteOptions,
) -> Result<Result<&'s SyncedDisk, LeftReason>, RewriteError> {
    if marker::is_marker(disk) {
        return Ok(Err(LeftReason::Marker));
    }
    let hotplugged = |volume: &str| options.hotplugged.contains(volume).then_some(LeftReason::Hotplugged);
    let Some(volume) = disk.volume() else {
        return Ok(Err(disk.obstacle(document).unwrap_or(LeftReason::NoVolume)));
    };
    let obstacle = disk.obstacle(document).or_else(|| hotplugged(volume));
    match (wanted.get(volume), obstacle) {
        (Some(synced), None) => Ok(Ok(synced)),
        (Some(_), Some(reason)) => Err(RewriteError::CannotServe { volume: volume.to_owned(), reason }),
        (None, obstacle) => Ok(Err(obstacle.unwrap_or(LeftReason::NotSynced))),
    }
}

fn rewrite_disk(
    document: &Document<'_>,
    disk: &Disk<'_>,
    synced: &SyncedDisk,
    options: &RewriteOptions,
    edits: &mut Edits,
) {
    edits.set_attribute(document, disk.element, "type", "network");

    let source = source_xml(synced, options);
    let content = disk.element.open.end;
    match disk.source {
        Some(element) => edits.replace(element.whole.clone(), source),
        None => edits.replace(content..content, source),
    }
    match disk.driver {
        Some(driver) => {
            edits.set_attribute(document, driver, "error_policy", "stop");
            edits.set_attribute(document, driver, "rerror_policy", "stop");
            // An AIO mode belongs to files; with io="native" and no direct cache libvirt refuses the disk.
            edits.remove_attribute(document, driver, "io");
        }
        None => edits.replace(
            content..content,
            "<driver name=\"qemu\" type=\"raw\" error_policy=\"stop\" rerror_policy=\"stop\"/>",
        ),
    }
    let alias = disk.alias_element.expect("a disk with a volume has an alias");
    edits.set_attribute(document, alias, "name", &format!("{SERVED_ALIAS_PREFIX}{}", synced.volume));
}

/// The source of a served disk, always in this form, so that repeated rewrites are byte-identical.
fn source_xml(synced: &SyncedDisk, options: &RewriteOptions) -> String {
    let escape = |s: &str| quick_xml::escape::escape(s.to_owned()).into_owned();
    format!(
        "<source protocol=\"nbd\" name=\"{}\"><host transport=\"unix\" socket=\"{}\"/><reconnect delay=\"{}\"/></source>",
        escape(&synced.export),
        escape(&synced.socket),
        options.reconnect_seconds,
    )
}

fn add_marker(
    document: &Document<'_>,
    disks: &[Disk<'_>],
    report: &RewriteReport,
    options: &RewriteOptions,
    edits: &mut Edits,
) -> Result<MarkerOutcome, RewriteError> {
    let present = disks.iter().any(marker::is_marker);
    let Some(path) = &options.marker else {
        return Ok(MarkerOutcome::Off);
    };
    if present {
        return Ok(MarkerOutcome::Present);
    }
    if !marker::needs_marker(report.served.len(), report.copyable, present) {
        return Ok(MarkerOutcome::NotNeeded);
    }
    let xml = marker::marker_xml(document, disks, path).ok_or(RewriteError::NoMarkerUnit)?;
    let last: &Element = disks.last().expect("a served disk is there").element;
    edits.replace(last.whole.end..last.whole.end, xml);
    Ok(MarkerOutcome::Added)
}

/// Check what came from configuration; gives the disks by volume.
fn check_settings<'s>(
    synced: &'s [SyncedDisk],
    options: &RewriteOptions,
) -> Result<BTreeMap<&'s str, &'s SyncedDisk>, RewriteError> {
    let wrong = |field: String, found: &str, expected: &str| {
        Err(RewriteError::Setting { field, found: format!("{found:?}"), expected: expected.to_owned() })
    };
    if options.reconnect_seconds < RECONNECT_SECONDS_MIN {
        let found = options.reconnect_seconds.to_string();
        return wrong("reconnect delay".into(), &found, &format!("at least {RECONNECT_SECONDS_MIN} seconds"));
    }
    let plain = |s: &str| s.bytes().all(|b| (0x20..0x7f).contains(&b));
    if let Some(path) = &options.marker
        && !(path.starts_with('/') && plain(path))
    {
        return wrong("marker path".into(), path, "an absolute path in printable ASCII");
    }
    let mut wanted = BTreeMap::new();
    for disk in synced {
        let SyncedDisk { volume, export, socket } = disk;
        // libvirt's aliases know no more than these; Kubernetes allows fewer.
        let letters = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        if volume.is_empty() || volume.len() > VOLUME_BYTES_MAX || !volume.bytes().all(letters) {
            return wrong("volume name".into(), volume, "1 to 63 letters, digits, '-' or '_'");
        }
        if export.is_empty() || !plain(export) {
            return wrong(format!("export name of volume {volume}"), export, "printable ASCII, not empty");
        }
        if !socket.starts_with('/') || socket.len() > SOCKET_PATH_BYTES_MAX || !plain(socket) {
            let expected = format!("an absolute path of at most {SOCKET_PATH_BYTES_MAX} bytes in printable ASCII");
            return wrong(format!("NBD socket of volume {volume}"), socket, &expected);
        }
        if wanted.insert(volume.as_str(), disk).is_some() {
            return wrong("volume list".into(), volume, "each volume once");
        }
    }
    Ok(wanted)
}
