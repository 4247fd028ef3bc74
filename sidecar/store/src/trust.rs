//! Trust: proof at a start that nobody wrote to the disks since we last looked, and what follows when there is none.
//!
//! Invariants: I1 (what may be dirty counts as dirty), I9 (a full comparison always has a reason in words). The order is
//! *read the record → look at the disks → decide → record the new start durably → serve*: a crash anywhere leaves a
//! record that says "serving", which never proves anything but the disks' identity.
//!
//! Reading, looking and recording are small functions over files; [`decide`] is pure and total. Nothing here compares
//! a disk with the replica, and nothing asks the peer: its echo comes in as a fact.

mod decision;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{Advice, fadvise};
use watari_core::geometry::DiskIndex;
use watari_core::regions::trust::{
    self as format, DiskProof, FileStamp, Phase, RangeDigest, TrustRecord, TrustRefused,
};
use watari_core::regions::{PairId, Region, RegionLayout};

use crate::whole_file;
pub use decision::{FullCompareReason, Heard, LogFact, MapFact, Marks, StartFacts, StartState, TrustFact, decide};

/// Name of the record in the metadata folder.
pub const TRUST_NAME: &str = "trust";
/// Bytes read at once when a range is digested.
const READ_BYTES: usize = 256 << 10;

/// Why there is no usable record.
#[derive(Debug, thiserror::Error)]
pub enum TrustUnusable {
    #[error("there is no trust record: this is a first start with this folder, or the folder was lost")]
    Missing,
    #[error("the trust record cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Refused(#[from] TrustRefused),
}

/// Why a record could not be written.
#[derive(Debug, thiserror::Error)]
pub enum TrustWriteError {
    /// The folder belongs to a newer build or to another pair: it is not touched.
    #[error("the folder is left as it is: {0}")]
    NotOurs(TrustRefused),
    /// The metadata folder or a disk failed.
    #[error("the trust record cannot be written: {0}")]
    Io(#[from] io::Error),
}

/// Read the record of the pair from its metadata folder.
pub fn read_record(folder: &Path, pair: PairId) -> Result<TrustRecord, TrustUnusable> {
    let file = match File::open(folder.join(TRUST_NAME)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(TrustUnusable::Missing),
        other => other?,
    };
    let mut bytes = Vec::new();
    // One byte more than any record has, so that a longer file is seen to be none.
    file.take(format::TRUST_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    Ok(format::decode(&bytes, pair)?)
}

fn write_record(folder: &Path, record: &TrustRecord) -> io::Result<()> {
    whole_file::replace(folder, TRUST_NAME, &format::encode(record))
}

/// Record a start durably, before the first guest request is served: the counter is raised above the last record and
/// above `starts_floor` (the peer's echo, 0 if none), and the last proof is void. `previous` is what
/// [`read_record`] gave; `start_id` is random.
///
/// A worker that restarts under a connected QEMU has a second, not more, to spend here: call it from a thread and go
/// `Untracked` when it does not return.
pub fn begin_start(
    folder: &Path,
    pair: PairId,
    previous: &Result<TrustRecord, TrustUnusable>,
    starts_floor: u64,
    start_id: u64,
    session: u64,
    disks: &[&File],
) -> Result<TrustRecord, TrustWriteError> {
    let starts = match previous {
        Ok(record) => record.starts,
        Err(TrustUnusable::Refused(e @ (TrustRefused::NewerVersion { .. } | TrustRefused::Pair { .. }))) => {
            return Err(TrustWriteError::NotOurs(e.clone()));
        }
        Err(_) => 0,
    };
    let disks = disks.iter().map(|disk| look(disk)).collect::<io::Result<_>>()?;
    let record = TrustRecord {
        pair,
        starts: starts.max(starts_floor) + 1,
        start_id,
        session,
        phase: Phase::Serving,
        untracked: false,
        disks,
    };
    write_record(folder, &record)?;
    Ok(record)
}

/// Record a clean stop durably: after the last guest write, with every disk synced here. `current` is what
/// [`begin_start`] gave; `last_dirty` the regions written last, newest first; `seed` is random and draws the sample.
/// Reads up to about 150 MiB per disk, most of it from the page cache.
pub fn record_clean_stop(
    folder: &Path,
    current: &TrustRecord,
    layout: &RegionLayout,
    disks: &[&File],
    last_dirty: &[Region],
    seed: u64,
    untracked: bool,
) -> Result<TrustRecord, TrustWriteError> {
    let mut proofs = Vec::with_capacity(disks.len());
    for (index, disk) in disks.iter().enumerate() {
        disk.sync_data()?;
        let mut proof = look(disk)?;
        for (offset, length) in format::proof_ranges(layout, DiskIndex(index as u16), proof.size, last_dirty, seed) {
            proof.ranges.push(RangeDigest { offset, length, blake3: digest(disk, offset, length)? });
        }
        // Reading does not change these times; a writer that should not be there would.
        if look(disk)?.file != proof.file {
            return Err(io::Error::other(format!("disk {index} changed while its proof was taken")).into());
        }
        proofs.push(proof);
    }
    let record = TrustRecord { phase: Phase::CleanStop, untracked, disks: proofs, ..current.clone() };
    write_record(folder, &record)?;
    Ok(record)
}

/// Whether the disks are as the record says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    Trusted,
    /// In words, with what was found and what was recorded.
    Untrusted(String),
}

/// Look at the disks: after a clean stop for proof that nobody wrote, after an unclean one for their identity only.
/// An I/O error of a disk is an `Untrusted`, too: it will be met again by whoever serves the disk.
pub fn check(record: &TrustRecord, disks: &[&File]) -> Verdict {
    if record.disks.len() != disks.len() {
        let text = format!("the record is of {} disks, the VM has {}", record.disks.len(), disks.len());
        return Verdict::Untrusted(text);
    }
    for (index, (proof, disk)) in record.disks.iter().zip(disks).enumerate() {
        let checked = match record.phase {
            Phase::CleanStop => check_unwritten(proof, disk),
            Phase::Serving => look(disk).map(|found| check_identity(proof, &found)),
        };
        match checked {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => return Verdict::Untrusted(format!("disk {index}: {reason}")),
            Err(e) => return Verdict::Untrusted(format!("disk {index} cannot be looked at: {e}")),
        }
    }
    Verdict::Trusted
}

fn check_identity(proof: &DiskProof, found: &DiskProof) -> Result<(), String> {
    match (proof.file, found.file) {
        (Some(then), Some(now)) if then.inode != now.inode => {
            Err(format!("it is another file (inode {} instead of {})", now.inode, then.inode))
        }
        (None, Some(_)) | (Some(_), None) => Err("a file took the place of a block device, or the reverse".into()),
        _ if found.size < proof.size => Err(format!("it shrank from {} to {} bytes", proof.size, found.size)),
        _ => Ok(()),
    }
}

fn check_unwritten(proof: &DiskProof, disk: &File) -> io::Result<Result<(), String>> {
    let found = look(disk)?;
    if let Err(reason) = check_identity(proof, &found) {
        return Ok(Err(reason));
    }
    if let (Some(then), Some(now)) = (proof.file, found.file) {
        if then == now && found.size == proof.size {
            return Ok(Ok(()));
        }
        // Growing a file before a start is normal (KubeVirt does it) and changes both times. A relabelling by the
        // kubelet changes the change time alone. Either leaves the content to be proved as on a block device.
        if then.mtime_ns != now.mtime_ns && found.size == proof.size {
            return Ok(Err("it was written to since the clean stop (its modification time changed)".into()));
        }
    }
    // What this node has cached may be older than what another one wrote. Advice only: it may be ignored.
    let _ = fadvise(disk, 0, None, Advice::DontNeed);
    for range in &proof.ranges {
        if digest(disk, range.offset, range.length)? != range.blake3 {
            let end = range.offset + u64::from(range.length);
            return Ok(Err(format!("its content changed since the clean stop, in bytes {} to {end}", range.offset)));
        }
    }
    if proof.ranges.is_empty() {
        return Ok(Err("the record holds no digest of it".into()));
    }
    Ok(Ok(()))
}

/// A disk as it is now, without content.
fn look(disk: &File) -> io::Result<DiskProof> {
    let meta = disk.metadata()?;
    if meta.file_type().is_block_device() {
        let size = rustix::fs::seek(disk, rustix::fs::SeekFrom::End(0))?;
        return Ok(DiskProof { size, file: None, ranges: Vec::new() });
    }
    let ns = |seconds: i64, ns: i64| seconds.saturating_mul(1_000_000_000).saturating_add(ns);
    let stamp = FileStamp {
        inode: meta.ino(),
        mtime_ns: ns(meta.mtime(), meta.mtime_nsec()),
        ctime_ns: ns(meta.ctime(), meta.ctime_nsec()),
    };
    Ok(DiskProof { size: meta.len(), file: Some(stamp), ranges: Vec::new() })
}

fn digest(disk: &File, offset: u64, length: u32) -> io::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut buf = vec![0; READ_BYTES.min(length as usize)];
    let (mut at, end) = (offset, offset + u64::from(length));
    while at < end {
        let part = &mut buf[..READ_BYTES.min((end - at) as usize)];
        disk.read_exact_at(part, at)?;
        hasher.update(part);
        at += part.len() as u64;
    }
    Ok(hasher.finalize().into())
}
