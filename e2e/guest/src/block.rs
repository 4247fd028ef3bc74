//! The self-describing block: 4 KiB that say where they belong, who wrote them and as which operation.
//!
//! ```text
//!      0  8  magic "WTRBLK01"
//!      8  8  check: mixes all header words below; also the seed of the payload
//!     16  8  run            random, one per boot of the guest and group of disks
//!     24  8  born           seconds since 1970 at the guest's boot (orders the runs found on one image)
//!     32  8  sequence       operation of its stream, from 1
//!     40  8  block          index on its disk
//!     48  4  disk   52  4  stream
//!     56  8  base           first block of the working set on every disk
//!     64  8  blocks         working set, blocks per disk
//!     72  2  disks  74  2  streams  76  1  random_percent  77  1  zero_percent  78  2  shift  80  48  zero
//!    128  3968  payload: words drawn from `check`
//! ```
//!
//! The payload follows from the header, so a reader regenerates it and compares every byte: a block that mixes two writes
//! cannot pass. Little-endian throughout.
//!
//! Does not decide whether a block is the *right* one; that is [`crate::check`].

use crate::schedule::Layout;

/// Bytes in one block: the unit of tracking (design: 4 KiB) and of one write of the workload.
pub const BLOCK_BYTES: usize = 4096;
const HEADER_BYTES: usize = 128;
/// The first eight bytes of every stamped block.
pub const MAGIC: u64 = u64::from_le_bytes(*b"WTRBLK01");
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Where a block lies and which write it holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    pub layout: Layout,
    pub stream: u32,
    /// The operation of the stream that wrote the block, from 1.
    pub sequence: u64,
    pub disk: u32,
    /// Index of the block on its disk (byte offset / 4096).
    pub block: u64,
}

/// What 4 KiB turned out to hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    Zero,
    /// Every byte is as the stamp says. Whether it belongs here is for the caller to decide.
    Stamped(Stamp),
    /// Begins like one of our blocks but header or payload disagree with it: two writes mixed, or bits flipped.
    Torn,
    /// Not ours at all.
    Unknown,
}

/// A fast, well mixing function of 64 bits (the finaliser of splitmix64).
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn header_check(bytes: &[u8]) -> u64 {
    (16..HEADER_BYTES).step_by(8).fold(MAGIC, |sum, at| mix(sum.wrapping_add(GOLDEN) ^ word(bytes, at)))
}

/// The payload's word `index`; the first `random_percent` of the words are incompressible, the rest repeat one value
/// that still differs from write to write.
fn payload_word(seed: u64, index: u64, random_words: u64) -> u64 {
    if index < random_words { mix(seed.wrapping_add((index + 1).wrapping_mul(GOLDEN))) } else { seed }
}

fn random_words(layout: &Layout) -> u64 {
    ((BLOCK_BYTES - HEADER_BYTES) / 8) as u64 * u64::from(layout.random_percent.min(100)) / 100
}

impl Stamp {
    /// Writes the block's 4096 bytes into `out`.
    pub fn fill(&self, out: &mut [u8]) {
        assert_eq!(out.len(), BLOCK_BYTES, "a block is 4 KiB");
        out[..HEADER_BYTES].fill(0);
        let layout = &self.layout;
        out[..8].copy_from_slice(&MAGIC.to_le_bytes());
        for (at, value) in [
            (16, layout.run),
            (24, layout.born),
            (32, self.sequence),
            (40, self.block),
            (48, u64::from(self.disk) | u64::from(self.stream) << 32),
            (56, layout.base),
            (64, layout.blocks),
        ] {
            out[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        out[72..74].copy_from_slice(&layout.disks.to_le_bytes());
        out[74..76].copy_from_slice(&layout.streams.to_le_bytes());
        out[76] = layout.random_percent;
        out[77] = layout.zero_percent;
        out[78..80].copy_from_slice(&layout.shift.to_le_bytes());
        let seed = header_check(out);
        out[8..16].copy_from_slice(&seed.to_le_bytes());
        let random = random_words(layout);
        for (index, chunk) in out[HEADER_BYTES..].chunks_exact_mut(8).enumerate() {
            chunk.copy_from_slice(&payload_word(seed, index as u64, random).to_le_bytes());
        }
    }

    /// Reads 4096 bytes back. Never panics, whatever they hold.
    pub fn read(bytes: &[u8]) -> Content {
        assert_eq!(bytes.len(), BLOCK_BYTES, "a block is 4 KiB");
        if word(bytes, 0) != MAGIC {
            return match bytes.iter().all(|&b| b == 0) {
                true => Content::Zero,
                // The tail of one of our blocks under a foreign head cannot be recognised; the caller counts it as torn
                // or foreign by what the place should hold.
                false => Content::Unknown,
            };
        }
        let seed = header_check(bytes);
        if word(bytes, 8) != seed {
            return Content::Torn;
        }
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let layout = Layout {
            run: word(bytes, 16),
            born: word(bytes, 24),
            base: word(bytes, 56),
            blocks: word(bytes, 64),
            disks: half(72),
            streams: half(74),
            random_percent: bytes[76],
            zero_percent: bytes[77],
            shift: half(78),
        };
        let random = random_words(&layout);
        let whole = bytes[HEADER_BYTES..]
            .chunks_exact(8)
            .enumerate()
            .all(|(index, chunk)| word(chunk, 0) == payload_word(seed, index as u64, random));
        if !whole {
            return Content::Torn;
        }
        let place = word(bytes, 48);
        Content::Stamped(Stamp {
            layout,
            stream: (place >> 32) as u32,
            sequence: word(bytes, 32),
            disk: place as u32,
            block: word(bytes, 40),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(sequence: u64) -> Stamp {
        let layout = Layout {
            run: 7,
            born: 9,
            base: 16,
            blocks: 100,
            disks: 2,
            streams: 2,
            random_percent: 50,
            zero_percent: 5,
            shift: 0,
        };
        Stamp { layout, stream: 1, sequence, disk: 1, block: 77 }
    }

    #[test]
    fn a_block_reads_back_as_it_was_stamped() {
        let mut bytes = vec![0xaa; BLOCK_BYTES];
        stamp(3).fill(&mut bytes);
        assert_eq!(Stamp::read(&bytes), Content::Stamped(stamp(3)));
    }

    #[test]
    fn a_block_mixed_from_two_writes_is_torn_at_every_sector_boundary() {
        let (mut old, mut new) = (vec![0; BLOCK_BYTES], vec![0; BLOCK_BYTES]);
        stamp(3).fill(&mut old);
        stamp(4).fill(&mut new);
        for cut in (512..BLOCK_BYTES).step_by(512) {
            let mixed: Vec<u8> = new[..cut].iter().chain(&old[cut..]).copied().collect();
            assert_eq!(Stamp::read(&mixed), Content::Torn, "cut at {cut}");
        }
    }

    #[test]
    fn any_flipped_byte_is_noticed() {
        let mut bytes = vec![0; BLOCK_BYTES];
        stamp(5).fill(&mut bytes);
        for at in 0..BLOCK_BYTES {
            bytes[at] ^= 0x10;
            assert!(!matches!(Stamp::read(&bytes), Content::Stamped(_)), "byte {at}");
            bytes[at] ^= 0x10;
        }
    }
}
