//! What a committed generation changes: its frames, and the blocks each of them supplies, sorted by place.
//!
//! Built once when a list is committed (or read back), then immutable, so that readers on other threads share it. It
//! refuses a list in which two frames supply the same block: each block has exactly one supplier (I4).

use crate::{
    frame::FrameKind,
    geometry::{Block, DiskIndex},
    replica::{journal::StoredFrame, list::excludes},
};
use alloc::{boxed::Box, sync::Arc, vec::Vec};

/// What a piece says of its blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Supply {
    /// Content in the journal.
    Data,
    Zero,
    /// The image (or the parent) already holds the right content.
    Keep,
}

/// A run of blocks that one frame supplies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    pub start: u64,
    pub blocks: u32,
    /// Index into [`DeltaMap::frames`].
    pub frame: u32,
    /// Index of the first block within the frame's content.
    pub at: u32,
    pub disk: u16,
    pub supply: Supply,
}

impl Piece {
    pub fn end(&self) -> u64 {
        self.start + u64::from(self.blocks)
    }
    fn key(&self) -> (u16, u64) {
        (self.disk, self.start)
    }
}

/// A frame of a generation with its exclusions.
#[derive(Clone, Debug)]
pub struct DeltaFrame {
    pub frame: Arc<StoredFrame>,
    pub excluded: Box<[u8]>,
}

/// Two frames of a list supply the same block.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("block {block:?} of disk {disk:?} is supplied twice")]
pub struct Overlap {
    pub disk: DiskIndex,
    pub block: Block,
}

/// The changes of one generation.
#[derive(Clone, Debug, Default)]
pub struct DeltaMap {
    pub frames: Vec<DeltaFrame>,
    /// Sorted by (disk, start), without overlaps.
    pub pieces: Vec<Piece>,
}

impl DeltaMap {
    /// Add the un-excluded blocks of a frame; call [`DeltaMap::seal`] after the last.
    pub fn add(&mut self, frame: Arc<StoredFrame>, excluded: Vec<u8>) {
        let index = self.frames.len() as u32;
        let pieces = &mut self.pieces;
        for_runs(&frame, &excluded, |disk, start, blocks, at, supply| {
            pieces.push(Piece { start, blocks, frame: index, at, disk, supply });
        });
        self.frames.push(DeltaFrame { frame, excluded: excluded.into() });
    }

    /// Sort and check that no block has two suppliers. With `rest`, the sizes of the disks in blocks, every block that no
    /// frame supplies becomes zero.
    pub fn seal(mut self, rest: Option<&[u64]>) -> Result<DeltaMap, Overlap> {
        self.pieces.sort_unstable_by_key(Piece::key);
        for pair in self.pieces.windows(2) {
            if pair[0].disk == pair[1].disk && pair[0].end() > pair[1].start {
                return Err(Overlap { disk: DiskIndex(pair[1].disk), block: Block(pair[1].start) });
            }
        }
        if let Some(disk_blocks) = rest {
            let gaps = self.gaps(disk_blocks);
            self.pieces.extend(gaps);
            self.pieces.sort_unstable_by_key(Piece::key);
        }
        Ok(self)
    }

    /// Zero pieces for all blocks between the pieces.
    fn gaps(&self, disk_blocks: &[u64]) -> Vec<Piece> {
        let mut gaps = Vec::new();
        for (disk, blocks) in (0u16..).zip(disk_blocks) {
            let from = self.pieces.partition_point(|piece| piece.disk < disk);
            let to = self.pieces.partition_point(|piece| piece.disk <= disk);
            let mut at = 0;
            let ends = self.pieces[from..to].iter().map(|piece| (piece.start, piece.end()));
            for (start, end) in ends.chain([(*blocks, *blocks)]) {
                while at < start {
                    let run = (start - at).min(u64::from(u32::MAX)) as u32;
                    gaps.push(Piece { start: at, blocks: run, frame: u32::MAX, at: 0, disk, supply: Supply::Zero });
                    at += u64::from(run);
                }
                at = end;
            }
        }
        gaps
    }

    /// Pieces that touch `[start, end)` of a disk, in order.
    pub fn touching(&self, disk: DiskIndex, start: u64, end: u64) -> impl Iterator<Item = &Piece> {
        let from = self.pieces.partition_point(|piece| (piece.disk, piece.end()) <= (disk.0, start));
        self.pieces[from..].iter().take_while(move |piece| piece.disk == disk.0 && piece.start < end)
    }
}

/// Call `each(disk, start block, blocks, index within the frame, supply)` for every run of blocks that the frame supplies.
pub fn for_runs(frame: &StoredFrame, excluded: &[u8], mut each: impl FnMut(u16, u64, u32, u32, Supply)) {
    let header = &frame.header;
    let supply = match (header.kind, frame.in_image) {
        (FrameKind::Same, _) | (_, true) => Supply::Keep,
        (FrameKind::Data, false) => Supply::Data,
        (FrameKind::Zero, false) => Supply::Zero,
    };
    let mut index = 0u64;
    for extent in &header.extents {
        if excluded.is_empty() {
            each(header.disk.0, extent.start.0, extent.blocks, index as u32, supply);
            index += u64::from(extent.blocks);
            continue;
        }
        let mut run: Option<(u64, u32, u64)> = None;
        for block in extent.start.0..extent.end().0 {
            if excludes(excluded, index) {
                if let Some((start, blocks, at)) = run.take() {
                    each(header.disk.0, start, blocks, at as u32, supply);
                }
            } else {
                let (_, blocks, _) = run.get_or_insert((block, 0, index));
                *blocks += 1;
            }
            index += 1;
        }
        if let Some((start, blocks, at)) = run {
            each(header.disk.0, start, blocks, at as u32, supply);
        }
    }
}
