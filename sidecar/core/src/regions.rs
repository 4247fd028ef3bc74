//! Regions: the coarse, durable unit in which the source remembers what may be dirty, and the bytes that it keeps.
//!
//! A region is [`REGION_BYTES`] of one disk. The region log ([`log`]) holds one bit per region and is durable before the
//! first write to a clean region (invariant I1); the trust record ([`trust`]) holds what must still be true of the disks
//! at the next start if nobody wrote in between. Both are described byte by byte in `FORMAT.md`.
//!
//! This module is the pure part: numbering and codecs. It reads no file and no clock; the shells are
//! `watari-store::{regions, trust}`.

pub mod log;
pub mod trust;

use crate::geometry::{BLOCK_BYTES, Block, DiskIndex};
use crate::limits::{DISK_BYTES_MAX, DISKS_MAX};
use alloc::vec::Vec;
use core::fmt;
use core::ops::{Range, RangeInclusive};

/// Bytes in one region: 4 MiB. Smaller ones make more first writes wait for a sync (a sequential writer crosses one
/// border per region); larger ones make more data be compared after an unclean stop (whole regions are compared). At
/// 4 MiB a log for 1 TiB has 33 KiB, and one thousand hot regions are compared in seconds.
pub const REGION_BYTES: u64 = 4 << 20;
/// Blocks in one region.
pub const REGION_BLOCKS: u64 = REGION_BYTES / BLOCK_BYTES;

/// The identity of a pair, the same at both sites: every durable or shared thing of the source carries it, so that a
/// folder or a map of another VM is refused instead of believed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PairId(pub [u8; 16]);

impl fmt::Display for PairId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for PairId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PairId({self})")
    }
}

/// One region of one disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Region {
    pub disk: DiskIndex,
    /// Byte offset / [`REGION_BYTES`].
    pub index: u64,
}

impl Region {
    /// The blocks of the region, not cut at the end of the disk.
    pub fn blocks(self) -> Range<u64> {
        self.index * REGION_BLOCKS..(self.index + 1) * REGION_BLOCKS
    }
}

/// Why a list of disk sizes cannot be numbered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LayoutError {
    /// No disk, or more than [`DISKS_MAX`].
    #[error("a pair has 1 to {DISKS_MAX} disks, not {0}")]
    DiskCount(usize),
    /// An empty disk, or one larger than [`DISK_BYTES_MAX`].
    #[error("disk {disk} has {bytes} bytes; 1 to {DISK_BYTES_MAX} are possible")]
    DiskSize { disk: u16, bytes: u64 },
}

/// Numbers the regions of all disks of a pair in one row (disk by disk), which is the order of the bits in the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RegionLayout {
    sizes: Vec<u64>,
    /// Number of the first region of each disk, and one more entry: the total.
    first: Vec<usize>,
}

impl RegionLayout {
    /// `sizes` are the disks' sizes in bytes, in the order of their [`DiskIndex`].
    pub fn new(sizes: &[u64]) -> Result<RegionLayout, LayoutError> {
        if sizes.is_empty() || sizes.len() > DISKS_MAX {
            return Err(LayoutError::DiskCount(sizes.len()));
        }
        let mut first = Vec::with_capacity(sizes.len() + 1);
        let mut next = 0usize;
        for (disk, &bytes) in sizes.iter().enumerate() {
            if bytes == 0 || bytes > DISK_BYTES_MAX {
                return Err(LayoutError::DiskSize { disk: disk as u16, bytes });
            }
            first.push(next);
            // At most 4 Mi regions per disk and 64 disks: far from any overflow.
            next += bytes.div_ceil(REGION_BYTES) as usize;
        }
        first.push(next);
        Ok(RegionLayout { sizes: sizes.into(), first })
    }

    /// Sizes of the disks in bytes.
    pub fn sizes(&self) -> &[u64] {
        &self.sizes
    }

    /// Regions of all disks together.
    pub fn regions(&self) -> usize {
        self.first[self.sizes.len()]
    }

    /// Words of 64 regions each that hold all regions.
    pub fn words(&self) -> usize {
        self.regions().div_ceil(64)
    }

    /// The numbers of the regions that the blocks `first..=last` of `disk` touch. On every guest write: no division.
    ///
    /// # Panics
    /// If the disk does not exist or the blocks lie beyond its end (the front end has checked the request).
    #[inline]
    pub fn numbers(&self, disk: DiskIndex, first: Block, last: Block) -> RangeInclusive<usize> {
        let base = self.first[usize::from(disk.0)];
        let (from, to) = (base + (first.0 / REGION_BLOCKS) as usize, base + (last.0 / REGION_BLOCKS) as usize);
        assert!(from <= to && to < self.first[usize::from(disk.0) + 1], "blocks beyond the end of the disk");
        from..=to
    }

    /// The number of a region.
    pub fn number(&self, region: Region) -> usize {
        let block = Block(region.index * REGION_BLOCKS);
        *self.numbers(region.disk, block, block).start()
    }

    /// The region with a number.
    ///
    /// # Panics
    /// If there is none.
    pub fn region(&self, number: usize) -> Region {
        assert!(number < self.regions(), "region number {number} of {}", self.regions());
        let disk = self.first.partition_point(|&f| f <= number) - 1;
        Region { disk: DiskIndex(disk as u16), index: (number - self.first[disk]) as u64 }
    }
}

/// A set of regions, by their number in a [`RegionLayout`].
#[derive(Clone, PartialEq, Eq, Default)]
pub struct RegionSet {
    words: Vec<u64>,
}

impl RegionSet {
    /// No region of `layout`.
    pub fn none(layout: &RegionLayout) -> RegionSet {
        RegionSet { words: alloc::vec![0; layout.words()] }
    }

    /// Every region of `layout`.
    pub fn all(layout: &RegionLayout) -> RegionSet {
        let mut set = RegionSet { words: alloc::vec![u64::MAX; layout.words()] };
        set.trim(layout);
        set
    }

    /// From words as the log holds them; bits beyond the last region are dropped.
    pub fn from_words(layout: &RegionLayout, mut words: Vec<u64>) -> RegionSet {
        words.resize(layout.words(), 0);
        let mut set = RegionSet { words };
        set.trim(layout);
        set
    }

    fn trim(&mut self, layout: &RegionLayout) {
        let used = layout.regions() % 64;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }

    pub fn insert(&mut self, number: usize) {
        self.words[number / 64] |= 1 << (number % 64);
    }

    pub fn contains(&self, number: usize) -> bool {
        self.words.get(number / 64).is_some_and(|w| w & (1 << (number % 64)) != 0)
    }

    pub fn len(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&w| w == 0)
    }

    /// The numbers in the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.words.iter().enumerate().flat_map(|(at, &word)| {
            let mut rest = word;
            core::iter::from_fn(move || {
                (rest != 0).then(|| {
                    let bit = rest.trailing_zeros() as usize;
                    rest &= rest - 1;
                    at * 64 + bit
                })
            })
        })
    }

    /// The words of the set, 64 regions each, lowest number in the lowest bit.
    pub fn words(&self) -> &[u64] {
        &self.words
    }
}

impl fmt::Debug for RegionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RegionSet({} regions)", self.len())
    }
}

/// Little-endian fields of a fixed buffer. Callers have checked the length; offsets are constants of the format.
pub(crate) fn get_u32(bytes: &[u8], at: usize) -> u32 {
    let mut b = [0; 4];
    b.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(b)
}

pub(crate) fn get_u64(bytes: &[u8], at: usize) -> u64 {
    let mut b = [0; 8];
    b.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_numbered_disk_by_disk_and_back() {
        let layout = RegionLayout::new(&[REGION_BYTES * 3 + 1, 4096, REGION_BYTES * 70]).expect("layout");
        assert_eq!(layout.regions(), 4 + 1 + 70);
        for number in 0..layout.regions() {
            assert_eq!(layout.number(layout.region(number)), number);
        }
        assert_eq!(layout.region(4), Region { disk: DiskIndex(1), index: 0 });
        assert_eq!(layout.numbers(DiskIndex(2), Block(1023), Block(1024)), 5..=6);
    }

    #[test]
    #[should_panic(expected = "beyond the end")]
    fn a_block_of_the_next_disk_is_not_this_disks_region() {
        let layout = RegionLayout::new(&[REGION_BYTES, REGION_BYTES]).expect("layout");
        layout.numbers(DiskIndex(0), Block(0), Block(REGION_BLOCKS));
    }

    #[test]
    fn sizes_outside_the_limits_are_refused() {
        assert_eq!(RegionLayout::new(&[]), Err(LayoutError::DiskCount(0)));
        assert_eq!(RegionLayout::new(&[1; 65]), Err(LayoutError::DiskCount(65)));
        assert_eq!(RegionLayout::new(&[1, 0]), Err(LayoutError::DiskSize { disk: 1, bytes: 0 }));
        assert!(RegionLayout::new(&[DISK_BYTES_MAX + 1]).is_err());
        assert!(RegionLayout::new(&[DISK_BYTES_MAX; 64]).is_ok());
    }

    #[test]
    fn a_set_holds_exactly_the_regions_of_its_layout() {
        let layout = RegionLayout::new(&[REGION_BYTES * 130]).expect("layout");
        assert_eq!(RegionSet::all(&layout).len(), 130);
        let mut set = RegionSet::none(&layout);
        assert!(set.is_empty());
        for n in [0, 63, 64, 129] {
            set.insert(n);
        }
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 63, 64, 129]);
        assert!(set.contains(64) && !set.contains(65) && !set.contains(100_000));
        assert_eq!(RegionSet::from_words(&layout, alloc::vec![u64::MAX; 9]).len(), 130);
    }
}
