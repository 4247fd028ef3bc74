//! The bytes of the region log: a header, two heartbeat sectors, and one bit per region in sectors that each prove
//! themselves.
//!
//! Invariant I1 rests on this reading: a sector that does not prove itself (torn, bad, of another log, missing) makes
//! *all* its regions count as dirty, never clean. Only a header that does not prove itself makes the log useless.
//! The header is written once, before the file gets its name; the other sectors are overwritten in place.

use super::{PairId, RegionLayout, RegionSet, get_u32, get_u64};
use crate::limits::DISKS_MAX;
use alloc::vec::Vec;

/// Bytes of a sector: what a disk writes as a whole or not at all, at worst.
pub const SECTOR_BYTES: usize = 512;
/// Bytes of the header: two sectors, room for the sizes of [`DISKS_MAX`] disks.
pub const HEADER_BYTES: usize = 1024;
/// First sector after the header: two heartbeat sectors, used alternately.
pub const HEARTBEAT_SECTOR: u32 = 2;
/// First sector of region bits.
pub const MAP_SECTOR: u32 = 4;
/// Words of 64 regions in one sector: 512 bytes less 16 of CRC, index and log identity.
pub const SECTOR_WORDS: usize = 62;
/// Version of the format; a newer one is refused and never written to.
pub const LOG_VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"WATARIRL";
const HEADER_CRC_AT: usize = HEADER_BYTES - 4;
const HEADER_SIZES_AT: usize = 64;

/// What the header says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogHeader {
    pub pair: PairId,
    /// Random, new for each log file: sectors of an older log are not taken for this one's.
    pub log_id: u64,
    /// The session of the source that began this log.
    pub session: u64,
    /// Disk sizes in bytes.
    pub sizes: Vec<u64>,
}

/// Why a region log cannot be used. Its reading is a full comparison with this text as the reason.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LogRefused {
    #[error("the region log has {0} bytes and not even a header")]
    Short(usize),
    #[error("the region log does not begin with its magic")]
    Magic,
    #[error("the region log has format version {found}, this build reads up to {LOG_VERSION}")]
    NewerVersion { found: u32 },
    #[error("the header of the region log fails its checksum")]
    Checksum,
    #[error("the region log belongs to pair {found}, not to {expected}")]
    Pair { found: PairId, expected: PairId },
    #[error("the region log is for disks of {found:?} bytes, the pair has {expected:?}")]
    Sizes { found: Vec<u64>, expected: Vec<u64> },
}

/// What was read from a log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recovered {
    pub log_id: u64,
    pub session: u64,
    /// Regions that may be dirty: their bit is set, or their sector did not prove itself.
    pub dirty: RegionSet,
    /// Sectors of region bits that did not prove themselves.
    pub bad_sectors: u32,
    /// The highest heartbeat that may have been written; `None` if no heartbeat sector proves itself.
    pub heartbeat: Option<u64>,
}

/// Sectors of region bits that a layout needs.
pub fn map_sectors(layout: &RegionLayout) -> usize {
    layout.words().div_ceil(SECTOR_WORDS)
}

/// Bytes of the whole file.
pub fn file_bytes(layout: &RegionLayout) -> usize {
    (MAP_SECTOR as usize + map_sectors(layout)) * SECTOR_BYTES
}

/// Byte offset of a sector.
pub fn sector_offset(index: u32) -> u64 {
    u64::from(index) * SECTOR_BYTES as u64
}

/// Encode the header.
///
/// # Panics
/// With more than [`DISKS_MAX`] disks ([`RegionLayout`] refuses them).
pub fn encode_header(header: &LogHeader) -> [u8; HEADER_BYTES] {
    assert!(header.sizes.len() <= DISKS_MAX);
    let mut out = [0; HEADER_BYTES];
    out[..8].copy_from_slice(&MAGIC);
    out[8..12].copy_from_slice(&LOG_VERSION.to_le_bytes());
    out[12..16].copy_from_slice(&(header.sizes.len() as u32).to_le_bytes());
    out[16..32].copy_from_slice(&header.pair.0);
    out[32..40].copy_from_slice(&header.log_id.to_le_bytes());
    out[40..48].copy_from_slice(&header.session.to_le_bytes());
    for (disk, size) in header.sizes.iter().enumerate() {
        out[HEADER_SIZES_AT + disk * 8..][..8].copy_from_slice(&size.to_le_bytes());
    }
    let crc = crc32fast::hash(&out[..HEADER_CRC_AT]);
    out[HEADER_CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Encode one sector: CRC32 of all that follows it, its index, the log's identity, its words.
///
/// # Panics
/// With more than [`SECTOR_WORDS`] words.
pub fn encode_sector(index: u32, log_id: u64, words: &[u64]) -> [u8; SECTOR_BYTES] {
    assert!(words.len() <= SECTOR_WORDS);
    let mut out = [0; SECTOR_BYTES];
    out[4..8].copy_from_slice(&index.to_le_bytes());
    out[8..16].copy_from_slice(&log_id.to_le_bytes());
    for (at, word) in words.iter().enumerate() {
        out[16 + at * 8..][..8].copy_from_slice(&word.to_le_bytes());
    }
    let crc = crc32fast::hash(&out[4..]);
    out[..4].copy_from_slice(&crc.to_le_bytes());
    out
}

/// The sector and the bytes for heartbeat `n`.
pub fn encode_heartbeat(log_id: u64, n: u64) -> (u32, [u8; SECTOR_BYTES]) {
    let index = HEARTBEAT_SECTOR + (n % 2) as u32;
    (index, encode_sector(index, log_id, &[n]))
}

/// A whole new log file with the given regions set and heartbeat 0 in both places.
pub fn encode_file(header: &LogHeader, layout: &RegionLayout, regions: &RegionSet) -> Vec<u8> {
    let mut out = Vec::with_capacity(file_bytes(layout));
    out.extend_from_slice(&encode_header(header));
    for index in HEARTBEAT_SECTOR..MAP_SECTOR {
        out.extend_from_slice(&encode_sector(index, header.log_id, &[0]));
    }
    for (at, words) in regions.words().chunks(SECTOR_WORDS).enumerate() {
        out.extend_from_slice(&encode_sector(MAP_SECTOR + at as u32, header.log_id, words));
    }
    out
}

/// A sector as it was read: nothing in it is believed until [`UnverifiedSector::verify`].
struct UnverifiedSector<'a>(&'a [u8]);

impl UnverifiedSector<'_> {
    fn verify(&self, index: u32, log_id: u64) -> Option<impl Iterator<Item = u64> + '_> {
        let bytes = self.0;
        let proven = bytes.len() == SECTOR_BYTES
            && get_u32(bytes, 0) == crc32fast::hash(&bytes[4..])
            && get_u32(bytes, 4) == index
            && get_u64(bytes, 8) == log_id;
        proven.then(|| (0..SECTOR_WORDS).map(|at| get_u64(bytes, 16 + at * 8)))
    }
}

fn sector(file: &[u8], index: u32) -> UnverifiedSector<'_> {
    let from = index as usize * SECTOR_BYTES;
    UnverifiedSector(file.get(from..from + SECTOR_BYTES).unwrap_or(&[]))
}

/// Read and check the header alone.
pub fn decode_header(file: &[u8]) -> Result<LogHeader, LogRefused> {
    let Some(bytes) = file.get(..HEADER_BYTES) else { return Err(LogRefused::Short(file.len())) };
    if bytes[..8] != MAGIC {
        return Err(LogRefused::Magic);
    }
    // The place of version and checksum is the same in every version, so that a newer log is called newer, not broken.
    if get_u32(bytes, HEADER_CRC_AT) != crc32fast::hash(&bytes[..HEADER_CRC_AT]) {
        return Err(LogRefused::Checksum);
    }
    let version = get_u32(bytes, 8);
    if version > LOG_VERSION {
        return Err(LogRefused::NewerVersion { found: version });
    }
    let disks = (get_u32(bytes, 12) as usize).min(DISKS_MAX);
    let mut pair = PairId::default();
    pair.0.copy_from_slice(&bytes[16..32]);
    Ok(LogHeader {
        pair,
        log_id: get_u64(bytes, 32),
        session: get_u64(bytes, 40),
        sizes: (0..disks).map(|disk| get_u64(bytes, HEADER_SIZES_AT + disk * 8)).collect(),
    })
}

/// Read a log file for the pair `pair` with the disks of `layout`. The work is bounded by the layout, whatever the
/// length of `file`.
pub fn decode_file(file: &[u8], pair: PairId, layout: &RegionLayout) -> Result<Recovered, LogRefused> {
    let header = decode_header(file)?;
    if header.pair != pair {
        return Err(LogRefused::Pair { found: header.pair, expected: pair });
    }
    if header.sizes != layout.sizes() {
        return Err(LogRefused::Sizes { found: header.sizes, expected: layout.sizes().into() });
    }
    let mut bad_sectors = 0;
    let mut words = Vec::with_capacity(layout.words() + SECTOR_WORDS);
    for at in 0..map_sectors(layout) {
        let index = MAP_SECTOR + at as u32;
        match sector(file, index).verify(index, header.log_id) {
            Some(bits) => words.extend(bits),
            None => {
                bad_sectors += 1;
                words.extend([u64::MAX; SECTOR_WORDS]);
            }
        }
    }
    let beat = |index: u32| sector(file, index).verify(index, header.log_id).and_then(|mut words| words.next());
    let heartbeat = match (beat(HEARTBEAT_SECTOR), beat(HEARTBEAT_SECTOR + 1)) {
        (Some(a), Some(b)) => Some(a.max(b)),
        // The torn one was the one being written: the number after the whole one.
        (Some(n), None) | (None, Some(n)) => Some(n.saturating_add(1)),
        (None, None) => None,
    };
    let dirty = RegionSet::from_words(layout, words);
    Ok(Recovered { log_id: header.log_id, session: header.session, dirty, bad_sectors, heartbeat })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::regions::REGION_BYTES;
    use proptest::prelude::*;

    fn sample() -> (LogHeader, RegionLayout, RegionSet, Vec<u8>) {
        let layout = RegionLayout::new(&[REGION_BYTES * 5000, REGION_BYTES * 3]).expect("layout");
        let header = LogHeader { pair: PairId([7; 16]), log_id: 0xabcd, session: 9, sizes: layout.sizes().into() };
        let mut set = RegionSet::none(&layout);
        [1, 64, 3967, 3968, 5002].into_iter().for_each(|n| set.insert(n));
        let file = encode_file(&header, &layout, &set);
        (header, layout, set, file)
    }

    #[test]
    fn a_log_reads_back_as_it_was_written() {
        let (header, layout, set, file) = sample();
        assert_eq!(file.len(), file_bytes(&layout));
        assert_eq!(decode_header(&file), Ok(header.clone()));
        let read = decode_file(&file, header.pair, &layout).expect("valid");
        assert_eq!(read, Recovered { log_id: 0xabcd, session: 9, dirty: set, bad_sectors: 0, heartbeat: Some(0) });
    }

    #[test]
    fn the_bytes_of_version_1_do_not_change() {
        let layout = RegionLayout::new(&[REGION_BYTES * 70]).expect("layout");
        let header = LogHeader { pair: PairId([1; 16]), log_id: 2, session: 3, sizes: layout.sizes().into() };
        let mut set = RegionSet::none(&layout);
        set.insert(69);
        let file = encode_file(&header, &layout, &set);
        assert_eq!(file.len(), 2560);
        assert_eq!(crc32fast::hash(&file), VERSION_1_CRC);
        assert_eq!(&file[2048 + 4..2048 + 8], &4u32.to_le_bytes());
        assert_eq!(file[2048 + 16 + 8], 1 << 5);
    }
    const VERSION_1_CRC: u32 = 3_176_865_513;

    #[test]
    fn a_torn_sector_makes_all_its_regions_dirty_and_no_others() {
        let (header, layout, _, mut file) = sample();
        file[MAP_SECTOR as usize * SECTOR_BYTES + 300] ^= 1;
        let read = decode_file(&file, header.pair, &layout).expect("valid");
        assert_eq!(read.bad_sectors, 1);
        assert!((0..3968).all(|n| read.dirty.contains(n)));
        assert_eq!(read.dirty.len(), 3968 + 2);
    }

    #[test]
    fn a_sector_of_an_older_log_or_of_another_place_is_not_believed() {
        let (header, layout, _, file) = sample();
        for forged in [encode_sector(MAP_SECTOR, 1, &[]), encode_sector(MAP_SECTOR + 1, header.log_id, &[])] {
            let mut file = file.clone();
            file[MAP_SECTOR as usize * SECTOR_BYTES..][..SECTOR_BYTES].copy_from_slice(&forged);
            assert_eq!(decode_file(&file, header.pair, &layout).expect("valid").bad_sectors, 1);
        }
    }

    #[test]
    fn a_truncated_log_is_dirty_where_it_ends() {
        let (header, layout, _, file) = sample();
        let read = decode_file(&file[..file.len() - 1], header.pair, &layout).expect("valid");
        assert_eq!(read.bad_sectors, 1);
        assert!(read.dirty.contains(5000) && !read.dirty.contains(0));
    }

    #[test]
    fn a_torn_heartbeat_counts_as_written() {
        let (header, layout, _, mut file) = sample();
        for (n, read_as) in [(1, 1), (2, 2), (3, 3)] {
            let (index, bytes) = encode_heartbeat(header.log_id, n);
            file[index as usize * SECTOR_BYTES..][..SECTOR_BYTES].copy_from_slice(&bytes);
            let read = decode_file(&file, header.pair, &layout).expect("valid");
            assert_eq!(read.heartbeat, Some(read_as));
        }
        file[(HEARTBEAT_SECTOR as usize) * SECTOR_BYTES + 20] ^= 1;
        assert_eq!(decode_file(&file, header.pair, &layout).expect("valid").heartbeat, Some(4));
        file[(HEARTBEAT_SECTOR as usize + 1) * SECTOR_BYTES + 20] ^= 1;
        assert_eq!(decode_file(&file, header.pair, &layout).expect("valid").heartbeat, None);
    }

    #[test]
    fn a_foreign_newer_broken_or_resized_log_is_refused_with_the_reason() {
        let (header, layout, _, file) = sample();
        let read = |file: &[u8]| decode_file(file, header.pair, &layout).expect_err("refused");
        assert_eq!(read(&file[..1023]), LogRefused::Short(1023));
        let mut other = file.clone();
        other[0] ^= 1;
        assert_eq!(read(&other), LogRefused::Magic);
        let mut other = file.clone();
        other[45] ^= 1;
        assert_eq!(read(&other), LogRefused::Checksum);
        let mut newer = file.clone();
        newer[8] = 2;
        let crc = crc32fast::hash(&newer[..HEADER_CRC_AT]);
        newer[HEADER_CRC_AT..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(read(&newer), LogRefused::NewerVersion { found: 2 });
        assert!(matches!(decode_file(&file, PairId([8; 16]), &layout), Err(LogRefused::Pair { .. })));
        let grown = RegionLayout::new(&[REGION_BYTES * 5001, REGION_BYTES * 3]).expect("layout");
        assert!(matches!(decode_file(&file, header.pair, &grown), Err(LogRefused::Sizes { .. })));
    }

    proptest! {
        #[test]
        fn damage_anywhere_never_makes_a_dirty_region_clean(
            damage in proptest::collection::vec((0usize..4096, any::<u8>()), 1..8), cut in 0usize..5000,
        ) {
            let (header, layout, set, mut file) = sample();
            file.truncate(cut);
            for (at, byte) in damage {
                if let Some(b) = file.get_mut(at) { *b = byte; }
            }
            if let Ok(read) = decode_file(&file, header.pair, &layout) {
                prop_assert!(set.iter().all(|n| read.dirty.contains(n)));
            }
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let (header, layout, _, _) = sample();
            let _ = decode_file(&bytes, header.pair, &layout);
        }
    }
}
