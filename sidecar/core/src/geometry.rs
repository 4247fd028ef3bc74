//! Blocks, disks, extents, generations and epochs: the numbers everything else is written in.
//!
//! Newtypes keep an index from being used as a count and a block from being used as a byte. On disk and on the wire all
//! of them are little-endian `u64`/`u32`, never `usize`.

use core::fmt;

/// Bytes in one block, the unit of tracking (design: 4 KiB).
pub const BLOCK_BYTES: u64 = 4096;

/// Which disk of the VM: an index into the pair's disk list, the same at both sites.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DiskIndex(pub u16);

/// A block's index on its disk (byte offset / [`BLOCK_BYTES`]).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Block(pub u64);

impl Block {
    /// Byte offset of the block's first byte.
    pub fn offset(self) -> u64 {
        self.0 * BLOCK_BYTES
    }
}

/// A run of consecutive blocks of one disk: `[start, start + blocks)`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Extent {
    pub start: Block,
    /// Length in blocks, at least 1.
    pub blocks: u32,
}

impl Extent {
    pub fn new(start: u64, blocks: u32) -> Self {
        Extent { start: Block(start), blocks }
    }
    /// One past the last block.
    pub fn end(self) -> Block {
        Block(self.start.0 + u64::from(self.blocks))
    }
    pub fn bytes(self) -> u64 {
        u64::from(self.blocks) * BLOCK_BYTES
    }
}

/// Blocks needed to hold `bytes` (the last one may be partial).
pub fn blocks_for(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES)
}

/// The blocks that the byte range `[offset, offset + bytes)` touches. `None` for an empty range.
pub fn covering(offset: u64, bytes: u64) -> Option<(Block, Block)> {
    if bytes == 0 {
        return None;
    }
    Some((Block(offset / BLOCK_BYTES), Block((offset + bytes - 1) / BLOCK_BYTES)))
}

/// 128 random bits that name one activation of one side, so that two sides that raised the same counter apart from
/// each other can be told apart (`Diverged`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ActivationId(pub [u8; 16]);

impl fmt::Debug for ActivationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for b in &self.0[..4] {
            write!(f, "{b:02x}")?;
        }
        Ok(())
    }
}

/// Who may write. Raised at every change of the active side; lower epochs are refused everywhere (invariant I6).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Epoch {
    pub counter: u64,
    pub activation: ActivationId,
}

/// The number of a generation; numbers are never used twice within a pair.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct GenerationNumber(pub u64);

/// A numbered point in time of all disks of the VM together: (epoch counter, number). Ordered by number: numbers go on
/// across epochs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Generation {
    pub number: GenerationNumber,
    pub epoch: u64,
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.number.0)
    }
}

/// One life of a source worker towards its target; staging of another session is not trusted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Session(pub u64);

/// A frame's number within its session, from 1 on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Sequence(pub u64);
