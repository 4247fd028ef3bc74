//! The bytes of the trust record: what must still be true of each disk at the next start if nobody wrote in between.
//!
//! Written whole under a new name and renamed, so it is never torn by us; a BLAKE3 over everything finds every other
//! damage. What the record means is decided in `watari-store::trust`.

use super::{PairId, Region, RegionLayout, get_u32, get_u64};
use crate::geometry::DiskIndex;
use crate::limits::DISKS_MAX;
use crate::regions::REGION_BYTES;
use alloc::collections::BTreeSet;
use alloc::vec::Vec;

/// Version of the format; a newer one is refused and never written to.
pub const TRUST_VERSION: u32 = 1;
/// Last dirty regions whose content is proved per disk: 32 of 4 MiB, which are mostly still in the page cache at a stop
/// and are read back in under a second at a start.
pub const PROVED_REGIONS_MAX: usize = 32;
/// Sampled pieces per disk: 256 of 64 KiB are 16 MiB of reads. A foreign writer that changed one thousandth of the
/// pieces of a disk escapes them with a probability of 77 %, one that changed a hundredth with 8 %; file systems touch
/// far more, and their superblocks lie in the pieces that are always taken.
pub const SAMPLE_PIECES: u64 = 256;
/// Bytes of a sampled piece.
pub const PIECE_BYTES: u64 = 64 << 10;
/// Always proved: this much at the begin of the disk (partition table and the first superblock of the common layouts).
pub const HEAD_BYTES: u64 = REGION_BYTES;
/// Always proved: this much at the end of the disk (backup partition table, RAID and LVM metadata).
pub const TAIL_BYTES: u64 = 1 << 20;

const MAGIC: [u8; 8] = *b"WATARITR";
const FIXED_BYTES: usize = 96;
const DISK_BYTES: usize = 64;
const RANGE_BYTES: usize = 48;
const DIGEST_BYTES: usize = 32;
const RANGES_MAX: usize = PROVED_REGIONS_MAX + SAMPLE_PIECES as usize + 2;
/// Largest record in bytes: bounds what a reader takes from the folder.
pub const TRUST_BYTES_MAX: usize = FIXED_BYTES + DISKS_MAX * (DISK_BYTES + RANGES_MAX * RANGE_BYTES) + DIGEST_BYTES;

/// What the last writer of the record was about to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Serving, or about to: the disks may have changed since.
    Serving,
    /// Stopped cleanly: the disks are as recorded.
    CleanStop,
}

/// A file's identity and times. The device number is left out: it changes from mount to mount.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FileStamp {
    pub inode: u64,
    /// Nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Nanoseconds since 1970.
    pub ctime_ns: i64,
}

/// The digest of one byte range of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RangeDigest {
    pub offset: u64,
    pub length: u32,
    pub blake3: [u8; 32],
}

/// What is recorded of one disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskProof {
    /// Bytes of the image file or device when the record was written.
    pub size: u64,
    /// Of an image file; `None` for a block device.
    pub file: Option<FileStamp>,
    /// Empty in the phase [`Phase::Serving`].
    pub ranges: Vec<RangeDigest>,
}

/// The record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TrustRecord {
    pub pair: PairId,
    /// Raised durably at each start before serving. The peer echoes it: a folder behind the echo is an old copy.
    pub starts: u64,
    /// Random, new at each start; the mapped memory carries the same one, so that a map of an earlier start is refused.
    pub start_id: u64,
    pub session: u64,
    pub phase: Phase,
    /// The pair was `Untracked` when the record was written.
    pub untracked: bool,
    /// Regions that the log held at a clean stop may hold changes that the target lacks.
    pub disks: Vec<DiskProof>,
}

/// Why a trust record cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TrustRefused {
    #[error("the trust record has {0} bytes, which no record has")]
    Length(usize),
    #[error("the trust record does not begin with its magic")]
    Magic,
    #[error("the trust record has format version {found}, this build reads up to {TRUST_VERSION}")]
    NewerVersion { found: u32 },
    #[error("the trust record fails its checksum")]
    Checksum,
    #[error("the trust record contradicts itself")]
    Malformed,
    #[error("the trust record belongs to pair {found}, not to {expected}")]
    Pair { found: PairId, expected: PairId },
}

/// Encode the record.
///
/// # Panics
/// With more than [`DISKS_MAX`] disks or more ranges of a disk than [`proof_ranges`] gives.
pub fn encode(record: &TrustRecord) -> Vec<u8> {
    assert!(record.disks.len() <= DISKS_MAX);
    let mut out = Vec::with_capacity(FIXED_BYTES + record.disks.len() * DISK_BYTES + DIGEST_BYTES);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&TRUST_VERSION.to_le_bytes());
    out.extend_from_slice(&(record.disks.len() as u32).to_le_bytes());
    out.extend_from_slice(&record.pair.0);
    for field in [record.starts, record.start_id, record.session] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    out.extend_from_slice(&u32::from(record.phase == Phase::CleanStop).to_le_bytes());
    out.extend_from_slice(&u32::from(record.untracked).to_le_bytes());
    out.resize(FIXED_BYTES, 0);
    for disk in &record.disks {
        assert!(disk.ranges.len() <= RANGES_MAX);
        let begin = out.len();
        let stamp = disk.file.unwrap_or_default();
        out.extend_from_slice(&u32::from(disk.file.is_some()).to_le_bytes());
        out.extend_from_slice(&(disk.ranges.len() as u32).to_le_bytes());
        for field in [disk.size, stamp.inode, stamp.mtime_ns as u64, stamp.ctime_ns as u64] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.resize(begin + DISK_BYTES, 0);
        for range in &disk.ranges {
            out.extend_from_slice(&range.offset.to_le_bytes());
            out.extend_from_slice(&range.length.to_le_bytes());
            out.extend_from_slice(&[0; 4]);
            out.extend_from_slice(&range.blake3);
        }
    }
    let digest = blake3::hash(&out);
    out.extend_from_slice(digest.as_bytes());
    out
}

/// Read a record of the pair `pair`.
pub fn decode(bytes: &[u8], pair: PairId) -> Result<TrustRecord, TrustRefused> {
    if bytes.len() < FIXED_BYTES + DIGEST_BYTES || bytes.len() > TRUST_BYTES_MAX {
        return Err(TrustRefused::Length(bytes.len()));
    }
    if bytes[..8] != MAGIC {
        return Err(TrustRefused::Magic);
    }
    // From here on the bytes are what some writer of this or a later version meant.
    let (body, digest) = bytes.split_at(bytes.len() - DIGEST_BYTES);
    if blake3::hash(body).as_bytes() != digest {
        return Err(TrustRefused::Checksum);
    }
    let version = get_u32(body, 8);
    if version > TRUST_VERSION {
        return Err(TrustRefused::NewerVersion { found: version });
    }
    let mut found = PairId::default();
    found.0.copy_from_slice(&body[16..32]);
    if found != pair {
        return Err(TrustRefused::Pair { found, expected: pair });
    }
    let mut disks = Vec::new();
    let mut rest = &body[FIXED_BYTES..];
    for _ in 0..get_u32(body, 12).min(DISKS_MAX as u32) {
        let (disk, after) = decode_disk(rest).ok_or(TrustRefused::Malformed)?;
        disks.push(disk);
        rest = after;
    }
    if !rest.is_empty() {
        return Err(TrustRefused::Malformed);
    }
    Ok(TrustRecord {
        pair,
        starts: get_u64(body, 32),
        start_id: get_u64(body, 40),
        session: get_u64(body, 48),
        phase: if get_u32(body, 56) == 1 { Phase::CleanStop } else { Phase::Serving },
        untracked: get_u32(body, 60) != 0,
        disks,
    })
}

fn decode_disk(bytes: &[u8]) -> Option<(DiskProof, &[u8])> {
    let head = bytes.get(..DISK_BYTES)?;
    let count = get_u32(head, 4) as usize;
    if count > RANGES_MAX {
        return None;
    }
    let (ranges, rest) = bytes[DISK_BYTES..].split_at_checked(count * RANGE_BYTES)?;
    let stamp =
        FileStamp { inode: get_u64(head, 16), mtime_ns: get_u64(head, 24) as i64, ctime_ns: get_u64(head, 32) as i64 };
    let ranges = ranges.chunks_exact(RANGE_BYTES).map(|range| {
        let mut digest = [0; 32];
        digest.copy_from_slice(&range[16..48]);
        RangeDigest { offset: get_u64(range, 0), length: get_u32(range, 8), blake3: digest }
    });
    let file = (get_u32(head, 0) == 1).then_some(stamp);
    Some((DiskProof { size: get_u64(head, 8), file, ranges: ranges.collect() }, rest))
}

/// The byte ranges of one disk that a clean stop proves: its head and tail, the last dirty regions (`last_dirty`, newest
/// first; at most [`PROVED_REGIONS_MAX`] of this disk are taken), and a sample drawn from `seed`. `size` is the disk's
/// size in bytes. Sorted, without duplicates; ranges may overlap.
pub fn proof_ranges(
    layout: &RegionLayout,
    disk: DiskIndex,
    size: u64,
    last_dirty: &[Region],
    seed: u64,
) -> Vec<(u64, u32)> {
    let mut ranges = BTreeSet::new();
    let mut take = |offset: u64, length: u64| {
        let end = offset.saturating_add(length).min(size);
        if offset < end {
            ranges.insert((offset, (end - offset) as u32));
        }
    };
    take(0, HEAD_BYTES);
    take(size.saturating_sub(TAIL_BYTES), TAIL_BYTES);
    debug_assert!(usize::from(disk.0) < layout.sizes().len());
    for region in last_dirty.iter().filter(|r| r.disk == disk).take(PROVED_REGIONS_MAX) {
        take(region.index.saturating_mul(REGION_BYTES), REGION_BYTES);
    }
    let pieces = size.div_ceil(PIECE_BYTES).max(1);
    let mut state = seed ^ (u64::from(disk.0) << 48);
    for _ in 0..SAMPLE_PIECES.min(pieces) {
        take((splitmix64(&mut state) % pieces) * PIECE_BYTES, PIECE_BYTES);
    }
    ranges.into_iter().collect()
}

/// Vigna's SplitMix64: enough for a sample that nobody games, the seed being random and new at each stop.
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    fn sample() -> TrustRecord {
        TrustRecord {
            pair: PairId([3; 16]),
            starts: 4,
            start_id: 5,
            session: 6,
            phase: Phase::CleanStop,
            untracked: false,
            disks: vec![
                DiskProof {
                    size: 8192,
                    file: Some(FileStamp { inode: 9, mtime_ns: -1, ctime_ns: i64::MAX }),
                    ranges: vec![RangeDigest { offset: 4096, length: 4096, blake3: [1; 32] }],
                },
                DiskProof { size: 1 << 40, file: None, ranges: vec![] },
            ],
        }
    }

    #[test]
    fn a_record_reads_back_as_it_was_written() {
        for (phase, untracked) in [(Phase::CleanStop, true), (Phase::Serving, false)] {
            let record = TrustRecord { phase, untracked, ..sample() };
            assert_eq!(decode(&encode(&record), record.pair), Ok(record));
        }
    }

    #[test]
    fn the_bytes_of_version_1_do_not_change() {
        let bytes = encode(&sample());
        assert_eq!(bytes.len(), 96 + 2 * 64 + 48 + 32);
        assert_eq!(crc32fast::hash(&bytes), VERSION_1_CRC);
    }
    const VERSION_1_CRC: u32 = 1_684_737_153;

    #[test]
    fn foreign_newer_and_damaged_records_are_refused_with_the_reason() {
        let bytes = encode(&sample());
        let pair = sample().pair;
        assert_eq!(decode(&bytes[..100], pair), Err(TrustRefused::Length(100)));
        assert!(matches!(decode(&bytes, PairId([0; 16])), Err(TrustRefused::Pair { .. })));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            let refused = decode(&damaged, pair).expect_err("damage is found");
            assert!(matches!(refused, TrustRefused::Checksum | TrustRefused::Magic), "byte {at}: {refused}");
        }
        let reseal = |edit: fn(&mut Vec<u8>)| {
            let mut body = bytes[..bytes.len() - 32].to_vec();
            edit(&mut body);
            let digest = blake3::hash(&body);
            body.extend_from_slice(digest.as_bytes());
            decode(&body, pair).expect_err("refused")
        };
        assert_eq!(reseal(|body| body[8] = 2), TrustRefused::NewerVersion { found: 2 });
        assert_eq!(reseal(|body| body.extend([0; 3])), TrustRefused::Malformed);
        assert_eq!(reseal(|body| body[12] = 3), TrustRefused::Malformed);
        assert_eq!(reseal(|body| body[100] = 200), TrustRefused::Malformed);
    }

    #[test]
    fn a_proof_covers_head_tail_last_regions_and_a_repeatable_sample() {
        let size = 64 << 30;
        let layout = RegionLayout::new(&[size, size]).expect("layout");
        let dirty: Vec<Region> =
            (0..100).map(|n| Region { disk: DiskIndex((n % 2) as u16), index: 1000 + n }).collect();
        let ranges = proof_ranges(&layout, DiskIndex(1), size, &dirty, 42);
        assert_eq!(ranges, proof_ranges(&layout, DiskIndex(1), size, &dirty, 42));
        assert_ne!(ranges, proof_ranges(&layout, DiskIndex(1), size, &dirty, 43));
        assert!(ranges.contains(&(0, HEAD_BYTES as u32)));
        assert!(ranges.contains(&(size - TAIL_BYTES, TAIL_BYTES as u32)));
        assert!(ranges.contains(&(1001 * REGION_BYTES, REGION_BYTES as u32)), "newest first, disk 1");
        assert!(!ranges.contains(&(1000 * REGION_BYTES, REGION_BYTES as u32)), "a region of disk 0");
        assert!(!ranges.contains(&(1099 * REGION_BYTES, REGION_BYTES as u32)), "only the newest 32");
        assert!(ranges.len() <= RANGES_MAX && ranges.len() > 280);
    }

    proptest! {
        #[test]
        fn ranges_stay_on_the_disk_and_in_their_bound(size in 1u64..1 << 34, seed: u64, at in 0u64..5000) {
            let layout = RegionLayout::new(&[size]).expect("layout");
            let dirty = [Region { disk: DiskIndex(0), index: at }];
            let ranges = proof_ranges(&layout, DiskIndex(0), size, &dirty, seed);
            prop_assert!(!ranges.is_empty() && ranges.len() <= RANGES_MAX);
            prop_assert!(ranges.iter().all(|&(o, l)| l > 0 && o + u64::from(l) <= size));
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let _ = decode(&bytes, PairId::default());
            let mut with_magic = MAGIC.to_vec();
            with_magic.extend(bytes);
            let digest = blake3::hash(&with_magic);
            with_magic.extend_from_slice(digest.as_bytes());
            let _ = decode(&with_magic, PairId::default());
        }
    }
}
