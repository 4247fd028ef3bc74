//! The first page of a map file: whose map it is, and the few facts that must survive the worker but not the node.
//!
//! The part that identifies (magic to sizes) is written once, before the file gets its name, and proves itself by a
//! CRC32. Everything after it is single words that change one at a time, so a kill between two stores leaves nothing
//! torn.

use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use watari_core::limits::{DISK_BYTES_MAX, DISKS_MAX};
use watari_core::regions::PairId;

/// Bytes of the identifying words, and of the page that holds all words.
pub(super) const HEADER_WORDS: usize = 512;
pub(super) const HEADER_BYTES: usize = HEADER_WORDS * 8;
const MAGIC: u64 = u64::from_le_bytes(*b"WATARIMM");
/// Version of the layout. The file never outlives a boot, but a new worker may meet the file of an old one.
pub const MAP_VERSION: u64 = 1;

// Identifying words.
const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 1;
const AT_PAIR: usize = 2;
const AT_BOOT: usize = 4;
const AT_LEAF_BYTES: usize = 6;
const AT_DISKS: usize = 7;
const AT_SIZES: usize = 8;
const AT_CRC: usize = AT_SIZES + DISKS_MAX;
// Words that change.
const AT_UNTRACKED: usize = 128;
const AT_START: usize = 129;
const AT_START_NEXT: usize = 130;
const AT_SESSION: usize = 131;

/// A boot of the machine: memory of another one is gone, whatever a file says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BootId(pub [u8; 16]);

impl BootId {
    /// Of the running kernel.
    pub fn current() -> io::Result<BootId> {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
        let value = u128::from_str_radix(&digits, 16).map_err(io::Error::other)?;
        Ok(BootId(value.to_be_bytes()))
    }
}

/// Whose map a file must be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MapIdentity {
    pub pair: PairId,
    pub boot: BootId,
    /// Sizes of the disks in bytes.
    pub sizes: Vec<u64>,
}

/// Why an existing file is not the map that is wanted. The reading is the same for all: there is no usable fine map.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapRefused {
    #[error("there is no map file: this is a first start here, or the memory of the last one is gone")]
    Missing,
    #[error("the map file has {found} bytes instead of {expected}")]
    Length { found: u64, expected: u64 },
    #[error("the map file does not begin with its magic")]
    Magic,
    #[error("the map file has layout version {found}, this build has {MAP_VERSION}")]
    Version { found: u64 },
    #[error("the header of the map file fails its checksum")]
    Checksum,
    #[error("the map file belongs to pair {found}, not to {expected}")]
    Pair { found: PairId, expected: PairId },
    #[error("the map file is of another boot of this node")]
    Boot,
    #[error("the map file is for disks of {found:?} bytes, the pair has {expected:?}")]
    Sizes { found: Vec<u64>, expected: Vec<u64> },
    #[error("the map file belongs to another user")]
    Owner,
    #[error("the map file was laid out for another page size")]
    Leaf,
}

fn two_words(bytes: [u8; 16]) -> [u64; 2] {
    let half = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    [half(0), half(8)]
}

fn sixteen_bytes(words: [u64; 2]) -> [u8; 16] {
    std::array::from_fn(|i| words[i / 8].to_le_bytes()[i % 8])
}

fn crc(words: &[u64]) -> u64 {
    let mut hasher = crc32fast::Hasher::new();
    words.iter().for_each(|w| hasher.update(&w.to_le_bytes()));
    u64::from(hasher.finalize())
}

/// The identifying words of a new file.
pub(super) fn encode(identity: &MapIdentity, leaf_bytes: usize) -> [u64; AT_CRC + 1] {
    let mut words = [0; AT_CRC + 1];
    words[AT_MAGIC] = MAGIC;
    words[AT_VERSION] = MAP_VERSION;
    words[AT_PAIR..AT_PAIR + 2].copy_from_slice(&two_words(identity.pair.0));
    words[AT_BOOT..AT_BOOT + 2].copy_from_slice(&two_words(identity.boot.0));
    words[AT_LEAF_BYTES] = leaf_bytes as u64;
    words[AT_DISKS] = identity.sizes.len() as u64;
    words[AT_SIZES..AT_SIZES + identity.sizes.len()].copy_from_slice(&identity.sizes);
    words[AT_CRC] = crc(&words[..AT_CRC]);
    words
}

/// Read the header of `file` and check everything that does not need the length: (identity, bytes of a leaf).
pub(super) fn decode(mut file: &File) -> Result<(MapIdentity, usize), MapRefused> {
    let mut bytes = [0; HEADER_BYTES];
    let found = file.metadata().map_or(0, |m| m.len());
    file.read_exact(&mut bytes).map_err(|_| MapRefused::Length { found, expected: HEADER_BYTES as u64 })?;
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at * 8 + i]));
    if word(AT_MAGIC) != MAGIC {
        return Err(MapRefused::Magic);
    }
    if word(AT_VERSION) != MAP_VERSION {
        return Err(MapRefused::Version { found: word(AT_VERSION) });
    }
    let words: Vec<u64> = (0..AT_CRC).map(word).collect();
    if crc(&words) != word(AT_CRC) {
        return Err(MapRefused::Checksum);
    }
    let disks = (words[AT_DISKS] as usize).min(DISKS_MAX);
    let sizes = words[AT_SIZES..AT_SIZES + disks].to_vec();
    if sizes.iter().any(|&s| s == 0 || s > DISK_BYTES_MAX) {
        return Err(MapRefused::Checksum);
    }
    let identity = MapIdentity {
        pair: PairId(sixteen_bytes([words[AT_PAIR], words[AT_PAIR + 1]])),
        boot: BootId(sixteen_bytes([words[AT_BOOT], words[AT_BOOT + 1]])),
        sizes,
    };
    Ok((identity, words[AT_LEAF_BYTES] as usize))
}

/// The changing words of a header. All methods may be called from any thread and, by the supervisor, from another process.
#[derive(Clone, Copy)]
pub struct Facts<'a>(pub(super) &'a [AtomicU64]);

impl Facts<'_> {
    /// The pair is `Untracked`: every block counts as dirty until this is left.
    pub fn untracked(&self) -> bool {
        self.0[AT_UNTRACKED].load(SeqCst) != 0
    }

    /// Enter or leave `Untracked`. Entered before the first unlogged write (I1).
    pub fn set_untracked(&self, untracked: bool) {
        self.0[AT_UNTRACKED].store(u64::from(untracked), SeqCst);
    }

    /// Whether this map belongs to the start named by the trust record. A map that slept through a start elsewhere
    /// (the VM ran on another node and came back) does not.
    pub fn belongs_to_start(&self, start_id: u64) -> bool {
        self.0[AT_START].load(SeqCst) == start_id || self.0[AT_START_NEXT].load(SeqCst) == start_id
    }

    /// A start is about to be recorded durably. Called before the record is written, so that a kill between the two
    /// leaves a map that belongs to both the old record and the new one.
    pub fn begin_start(&self, start_id: u64) {
        self.0[AT_START_NEXT].store(start_id, SeqCst);
    }

    /// The start is recorded durably: the map belongs to it alone.
    pub fn confirm_start(&self, start_id: u64) {
        self.0[AT_START].store(start_id, SeqCst);
        self.0[AT_START_NEXT].store(start_id, SeqCst);
    }

    /// The last session of the worker.
    pub fn session(&self) -> u64 {
        self.0[AT_SESSION].load(SeqCst)
    }

    pub fn set_session(&self, session: u64) {
        self.0[AT_SESSION].store(session, SeqCst);
    }
}
