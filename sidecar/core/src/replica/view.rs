//! Reading a kept generation while application goes on.
//!
//! A [`View`] is an immutable stack of layers over the image: deltas that are committed but not applied, or undo that leads back from
//! the image. The first layer that has a block decides. Views are cheap to clone and may be read on any thread with read-only
//! handles of folder and images.
//!
//! The rule that makes this safe without a lock: the engine raises a shared counter *before* it writes the first byte of
//! a generation into the image, and before it removes a file that a view may read. A reader checks [`View::is_current`] *after* its read;
//! if the counter moved, what it read (or the error it got) counts for nothing and it asks the engine for a fresh view.

use crate::{
    frame::{Decompress, Encoding},
    geometry::{BLOCK_BYTES, DiskIndex, Generation},
    replica::{
        Images, ReplicaError,
        delta::{DeltaMap, Supply},
        journal::{FrameKey, StoredFrame},
        undo::{UndoIndex, data_offset},
    },
    storage::Storage,
};
use alloc::{sync::Arc, vec::Vec};
use core::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// One step between a generation and the image.
#[derive(Clone, Debug)]
pub enum Layer {
    Delta(Arc<DeltaMap>),
    Undo(Arc<UndoIndex>),
}

/// The content of one generation, as layers over the image.
#[derive(Clone, Debug)]
pub struct View {
    /// `None`: the image before any commit.
    pub generation: Option<Generation>,
    layers: Arc<[Layer]>,
    disk_bytes: Arc<[u64]>,
    stamp: u64,
    stamps: Arc<AtomicU64>,
}

/// Keeps the last decoded frame, so that small reads of one compressed frame decode it once.
#[derive(Debug, Default)]
pub struct ViewCache {
    frame: Option<(FrameKey, u64, Vec<u8>)>,
}

/// Where a run of blocks comes from.
enum Origin<'a> {
    Zero,
    /// A journaled frame, and the index of the run's first block within its content.
    Frame(&'a StoredFrame, u64),
    /// An undo file and the index of the run's first data block.
    Undo(&'a UndoIndex, u64),
    Image,
}

impl View {
    pub(crate) fn new(
        generation: Option<Generation>,
        layers: Vec<Layer>,
        disk_bytes: &[u64],
        stamps: &Arc<AtomicU64>,
    ) -> View {
        let stamp = stamps.load(Ordering::SeqCst);
        View { generation, layers: layers.into(), disk_bytes: disk_bytes.into(), stamp, stamps: stamps.clone() }
    }

    /// False once the engine has begun something that this view does not know of. Ask after each read.
    pub fn is_current(&self) -> bool {
        self.stamps.load(Ordering::SeqCst) == self.stamp
    }

    /// Size of a disk in bytes.
    pub fn disk_bytes(&self, disk: DiskIndex) -> Option<u64> {
        self.disk_bytes.get(usize::from(disk.0)).copied()
    }

    /// Fill `buf` from byte `offset` of a disk; the range must lie inside the disk.
    #[allow(clippy::too_many_arguments)]
    pub fn read<M: Storage, D: Images>(
        &self,
        meta: &M,
        images: &D,
        decompress: &dyn Decompress,
        cache: &mut ViewCache,
        disk: DiskIndex,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), ReplicaError> {
        let end = offset.saturating_add(buf.len() as u64);
        if self.disk_bytes(disk).is_none_or(|bytes| end > bytes) {
            return Err(ReplicaError::OutOfRange { disk: disk.0, block: end.div_ceil(BLOCK_BYTES) });
        }
        if buf.is_empty() {
            return Ok(());
        }
        let blocks = offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES);
        resolve(&self.layers, disk, blocks, &mut |run, origin| {
            // The part of the run that was asked for, in bytes of the disk.
            let from = (run.start * BLOCK_BYTES).max(offset);
            let to = (run.end * BLOCK_BYTES).min(end);
            let skip = from - run.start * BLOCK_BYTES;
            let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
            match origin {
                Origin::Zero => part.fill(0),
                Origin::Image => images.read(disk, from, part).map_err(ReplicaError::Image)?,
                Origin::Undo(index, at) => {
                    let name = &index.info.name;
                    super::read_exact(meta, name, data_offset(at) + skip, part)?;
                }
                Origin::Frame(frame, at) => {
                    read_frame(meta, decompress, cache, frame, at * BLOCK_BYTES + skip, part)?;
                }
            }
            Ok(())
        })
    }
}

/// Copy part of a frame's content. Raw payloads are read in place; compressed ones are decoded once and cached.
fn read_frame<M: Storage>(
    meta: &M,
    decompress: &dyn Decompress,
    cache: &mut ViewCache,
    frame: &StoredFrame,
    offset: u64,
    part: &mut [u8],
) -> Result<(), ReplicaError> {
    if frame.header.encoding == Encoding::Raw {
        return frame.read_raw(meta, offset, part);
    }
    let (key, crc) = (frame.key(), u64::from(frame.header.crc32));
    if cache.frame.as_ref().is_none_or(|(cached, checksum, _)| (*cached, *checksum) != (key, crc)) {
        cache.frame = Some((key, crc, frame.content(meta, decompress)?));
    }
    let (.., content) = cache.frame.as_ref().expect("filled above");
    part.copy_from_slice(&content[offset as usize..offset as usize + part.len()]);
    Ok(())
}

/// Call `each` for runs that together are `blocks`, in order within each layer.
fn resolve<'a>(
    layers: &'a [Layer],
    disk: DiskIndex,
    blocks: Range<u64>,
    each: &mut dyn FnMut(Range<u64>, Origin<'a>) -> Result<(), ReplicaError>,
) -> Result<(), ReplicaError> {
    let Some((first, below)) = layers.split_first() else {
        return each(blocks, Origin::Image);
    };
    let mut at = blocks.start;
    let mut step = |from: u64, to: u64, origin: Option<Origin<'a>>| {
        let (from, to) = (from.max(blocks.start), to.min(blocks.end));
        if at < from {
            resolve(below, disk, at..from, each)?;
        }
        at = to;
        match origin {
            Some(origin) => each(from..to, origin),
            None => resolve(below, disk, from..to, each),
        }
    };
    match first {
        Layer::Delta(delta) => {
            for piece in delta.touching(disk, blocks.start, blocks.end) {
                let skip = blocks.start.saturating_sub(piece.start);
                let origin = match piece.supply {
                    Supply::Zero => Some(Origin::Zero),
                    Supply::Keep => None,
                    Supply::Data => {
                        let frame = &delta.frames[piece.frame as usize].frame;
                        Some(Origin::Frame(frame, u64::from(piece.at) + skip))
                    }
                };
                step(piece.start, piece.end(), origin)?;
            }
        }
        Layer::Undo(index) => {
            for entry in index.touching(disk.0, blocks.start, blocks.end) {
                let skip = blocks.start.saturating_sub(entry.start);
                let origin = if entry.zero { Origin::Zero } else { Origin::Undo(index, entry.at + skip) };
                step(entry.start, entry.end(), Some(origin))?;
            }
        }
    }
    if at < blocks.end {
        resolve(below, disk, at..blocks.end, each)?;
    }
    Ok(())
}
