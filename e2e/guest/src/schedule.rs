//! Which block each operation touches: a function of the run alone, so that nobody needs a log of it.
//!
//! The working set (the same range of blocks on each of the group's disks) is dealt out to the streams; each stream is
//! written by one thread, one operation at a time. Operation `s` of a stream falls into cycle `(s - 1) / slots`; within a
//! cycle every slot is visited exactly once in an order that looks random and differs from cycle to cycle (a small
//! Feistel network), so writes are distinct blocks until the whole working set was written.
//!
//! Because a stream's operations are acknowledged in order and spread over all disks, an image of all disks that was
//! taken at one point in time holds, per stream, exactly the first K operations for some K. That is what makes a torn
//! consistency group visible (invariant I2) without any record of the guest's.

use serde::{Deserialize, Serialize};

use crate::block::{BLOCK_BYTES, mix};

/// Rounds of the Feistel network: enough to look random, few enough to cost nothing under emulation.
const ROUNDS: u64 = 4;

/// Everything that a run's schedule depends on. Stored in each block.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Layout {
    pub run: u64,
    /// Seconds since 1970 at the guest's boot.
    pub born: u64,
    /// First block of the working set on every disk.
    pub base: u64,
    /// Working set in blocks per disk.
    pub blocks: u64,
    pub disks: u16,
    pub streams: u16,
    /// Share of a block that does not compress, 0 to 100.
    pub random_percent: u8,
    /// Share of operations that write zeroes instead of data, 0 to 100.
    pub zero_percent: u8,
    /// Bytes by which every block lies beyond its 4 KiB boundary: a multiple of 512 below 4096. With it each write
    /// touches two tracked blocks in part.
    pub shift: u16,
}

/// A block of a group: which disk, and its index there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub disk: u32,
    pub block: u64,
}

/// One operation of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Operation {
    pub slot: u64,
    pub place: Place,
    /// Leaves zeroes instead of a stamped block.
    pub zero: bool,
    /// Of those, is a discard tried first? (A WRITE ZEROES request follows unless the disk then reads as zeroes.)
    pub discard: bool,
}

impl Layout {
    /// Is this a layout that a guest could have chosen? Decoded ones are checked before they are followed.
    pub fn plausible(&self) -> bool {
        self.disks > 0 && self.streams > 0 && (u64::from(self.streams)..1 << 32).contains(&self.blocks)
    }

    /// Slots of each stream: every stream has its rows, and a row is the same block on all disks (a remainder of fewer
    /// rows than streams stays unused).
    pub fn slots(&self) -> u64 {
        self.blocks / u64::from(self.streams) * u64::from(self.disks)
    }

    /// Byte offset of a block on its disk.
    pub fn offset(&self, block: u64) -> u64 {
        block * BLOCK_BYTES as u64 + u64::from(self.shift)
    }

    /// Where a slot of a stream lies.
    pub fn place(&self, stream: u32, slot: u64) -> Place {
        let disks = u64::from(self.disks);
        let row = slot / disks * u64::from(self.streams) + u64::from(stream);
        Place { disk: (slot % disks) as u32, block: self.base + row }
    }

    /// The stream and slot that own a place, if the working set covers it.
    pub fn owner(&self, place: Place) -> Option<(u32, u64)> {
        let row = place.block.checked_sub(self.base).filter(|&row| row < self.blocks)?;
        if place.disk >= u32::from(self.disks) {
            return None;
        }
        let (stream, turn) = (row % u64::from(self.streams), row / u64::from(self.streams));
        let slot = turn * u64::from(self.disks) + u64::from(place.disk);
        (slot < self.slots()).then_some((stream as u32, slot))
    }

    /// Operation `sequence` (from 1) of a stream.
    pub fn operation(&self, stream: u32, sequence: u64) -> Operation {
        assert!(sequence > 0, "sequences start at 1");
        let slots = self.slots();
        let cycle = (sequence - 1) / slots;
        let key = mix(self.run ^ mix(u64::from(stream) << 48 ^ cycle));
        let slot = permute(key, slots, (sequence - 1) % slots);
        let dice = mix(self.run ^ mix(sequence ^ u64::from(stream) << 56));
        let zero = dice % 100 < u64::from(self.zero_percent);
        Operation { slot, place: self.place(stream, slot), zero, discard: zero && dice >> 63 == 1 && self.shift == 0 }
    }

    /// For each slot of a stream, the newest operation up to and including `acknowledged` that touched it; 0 for none.
    pub fn newest(&self, stream: u32, acknowledged: u64) -> Vec<u64> {
        let slots = self.slots();
        let mut newest = vec![0; slots as usize];
        // Each cycle visits every slot once, so the last two cycles decide.
        let first = (acknowledged.saturating_sub(1) / slots).saturating_sub(1) * slots + 1;
        for sequence in first..=acknowledged {
            newest[self.operation(stream, sequence).slot as usize] = sequence;
        }
        newest
    }
}

/// A permutation of `0..n`, chosen by `key`.
fn permute(key: u64, n: u64, index: u64) -> u64 {
    debug_assert!(index < n);
    let half = (64 - (n - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1u64 << half) - 1;
    let mut value = index;
    loop {
        let (mut left, mut right) = (value >> half, value & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (mix(key ^ (round << 56) ^ right) & mask));
        }
        value = left << half | right;
        // The network permutes a power of four; walking on until the value is in range keeps it a permutation of 0..n.
        if value < n {
            return value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(blocks: u64, disks: u16, streams: u16) -> Layout {
        Layout { run: 42, born: 0, base: 10, blocks, disks, streams, random_percent: 100, zero_percent: 10, shift: 0 }
    }

    #[test]
    fn a_cycle_visits_every_slot_once_whatever_the_size() {
        for n in [1, 2, 3, 5, 16, 17, 1000] {
            let mut seen: Vec<u64> = (0..n).map(|index| permute(9, n, index)).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn places_and_owners_are_inverse_to_each_other() {
        let layout = layout(101, 3, 2);
        for stream in 0..2 {
            for slot in 0..layout.slots() {
                assert_eq!(layout.owner(layout.place(stream, slot)), Some((stream, slot)));
            }
        }
        assert_eq!(layout.owner(Place { disk: 0, block: 9 }), None);
        assert_eq!(layout.owner(Place { disk: 3, block: 20 }), None);
    }

    #[test]
    fn newest_is_what_replaying_every_operation_leaves() {
        let layout = layout(7, 2, 2);
        for acknowledged in 0..60 {
            let mut replayed = vec![0; layout.slots() as usize];
            for sequence in 1..=acknowledged {
                replayed[layout.operation(1, sequence).slot as usize] = sequence;
            }
            assert_eq!(layout.newest(1, acknowledged), replayed, "after {acknowledged}");
        }
    }
}
