//! From blocks on a disk to frames for the stream: read, claim, find zeroes, compare, compress.
//!
//! Invariants: **I3** what goes into a frame of a generation is the content as of its cut: read first, then claimed on
//! the frozen bit, or taken from the preserve store; **I1** staged marks are set before frozen ones are cleared.
//! Runs on the reader threads; it does not decide what is read when.

use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use watari_core::{
    frame::{FrameError, FrameHeader, FrameId, content_digest},
    front::Errno,
    geometry::{BLOCK_BYTES, Block, DiskIndex, Extent, Sequence, Session},
    limits,
    primary::Read,
};
use watari_nbd::local::LocalFile;

use super::tracking::{Effort, Shared};

/// A frame on its way: header and payload as sent.
#[derive(Clone, Debug)]
pub struct OutFrame {
    pub header: FrameHeader,
    pub payload: Bytes,
}

/// Why a read became no frames.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("reading {disk:?} at block {block} failed: {errno:?}")]
    Disk { disk: DiskIndex, block: u64, errno: Errno },
    /// Content of the cut is not to be had any more: the generation must be given up.
    #[error("content of the cut was lost")]
    Lost,
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// Which blocks the peer already has: its digests (16 bytes each, per block), asked for beforehand.
pub type PeerDigests = std::collections::HashMap<Block, [u8; 16]>;

/// What a frame is built for.
#[derive(Clone, Copy, Debug)]
pub struct Naming {
    pub epoch: u64,
    pub session: Session,
    /// zstd level; `None`: always raw.
    pub level: Option<i32>,
}

/// One block's content at hand.
struct Piece {
    block: Block,
    content: Vec<u8>,
}

/// Read frozen extents of cut `cut`.
pub fn frozen(
    shared: &Shared,
    file: &LocalFile,
    read: &Read,
    cut: u64,
    naming: Naming,
    digests: &PeerDigests,
) -> Result<Vec<OutFrame>, BuildError> {
    let mut builder = Builder::new(&shared.effort, read.disk, read.sequence, naming, digests);
    for extent in &read.extents {
        let last = Block(extent.end().0 - 1);
        while shared.tracker.writes_before_cut(cut, read.disk, extent.start, last) {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        let content = read_extent(file, read.disk, *extent)?;
        shared.tracker.stage(read.disk, *extent);
        for (i, block) in (extent.start.0..extent.end().0).map(Block).enumerate() {
            let at = i * BLOCK_BYTES as usize;
            if shared.tracker.claim_frozen(read.disk, block) {
                builder.push(block, &content[at..at + BLOCK_BYTES as usize]);
            } else if let Some(kept) = shared.preserve.take(read.disk, block) {
                builder.push(block, &kept);
            } else if shared.tracker.generation_open() {
                return Err(BuildError::Lost);
            }
            // Else the generation was given up meanwhile: the block is dirty again and comes another time.
        }
    }
    builder.finish()
}

/// Build frames from preserved blocks, of one disk, up to a frame's worth.
pub fn preserved(shared: &Shared, sequence: Sequence, naming: Naming) -> Result<Vec<OutFrame>, BuildError> {
    let blocks = shared.preserve.take_some((limits::FRAME_BYTES_MAX / BLOCK_BYTES) as usize);
    let Some(disk) = blocks.first().map(|(d, ..)| *d) else { return Ok(Vec::new()) };
    let digests = PeerDigests::new();
    let mut builder = Builder::new(&shared.effort, disk, sequence, naming, &digests);
    for (_, block, content) in &blocks {
        shared.tracker.stage(disk, Extent { start: *block, blocks: 1 });
        builder.push(*block, content);
    }
    builder.finish()
}

/// Read extents whose marks were taken from `current`; what was overwritten meanwhile is left out (it is marked again).
pub fn current(
    shared: &Shared,
    file: &LocalFile,
    read: &Read,
    naming: Naming,
    digests: &PeerDigests,
) -> Result<Vec<OutFrame>, BuildError> {
    let mut builder = Builder::new(&shared.effort, read.disk, read.sequence, naming, digests);
    for extent in &read.extents {
        let content = read_extent(file, read.disk, *extent)?;
        for (i, block) in (extent.start.0..extent.end().0).map(Block).enumerate() {
            if !shared.tracker.overwritten(read.disk, block) {
                let at = i * BLOCK_BYTES as usize;
                builder.push(block, &content[at..at + BLOCK_BYTES as usize]);
            }
        }
    }
    builder.finish()
}

/// Read whole blocks; beyond the end of the disk is zero.
pub fn read_extent(file: &LocalFile, disk: DiskIndex, extent: Extent) -> Result<Vec<u8>, BuildError> {
    let mut content = vec![0; extent.bytes() as usize];
    let n = (file.size_bytes() - extent.start.offset()).min(extent.bytes()) as usize;
    file.read_at(extent.start.offset(), &mut content[..n]).map_err(|errno| BuildError::Disk {
        disk,
        block: extent.start.0,
        errno,
    })?;
    Ok(content)
}

/// The digest by which a block is compared with the peer's: the first half of its content digest.
pub fn block_digest(disk: DiskIndex, block: Block, content: &[u8]) -> [u8; 16] {
    extent_digest(disk, Extent { start: block, blocks: 1 }, content)
}

/// The same of several blocks in a row.
pub fn extent_digest(disk: DiskIndex, extent: Extent, content: &[u8]) -> [u8; 16] {
    let whole = content_digest(disk, &[extent], content);
    let mut half = [0; 16];
    half.copy_from_slice(&whole[..16]);
    half
}

struct Builder<'a> {
    effort: &'a Effort,
    disk: DiskIndex,
    sequence: Sequence,
    naming: Naming,
    digests: &'a PeerDigests,
    data: Vec<Piece>,
    zero: Vec<Block>,
    same: Vec<Piece>,
}

impl<'a> Builder<'a> {
    fn new(effort: &'a Effort, disk: DiskIndex, sequence: Sequence, naming: Naming, digests: &'a PeerDigests) -> Self {
        Builder { effort, disk, sequence, naming, digests, data: Vec::new(), zero: Vec::new(), same: Vec::new() }
    }

    fn push(&mut self, block: Block, content: &[u8]) {
        if self.digests.get(&block).is_some_and(|d| *d == block_digest(self.disk, block, content)) {
            self.same.push(Piece { block, content: content.to_vec() });
        } else if content.iter().all(|b| *b == 0) {
            self.zero.push(block);
        } else {
            self.data.push(Piece { block, content: content.to_vec() });
        }
    }

    fn id(&self, nth: u64) -> FrameId {
        FrameId { epoch: self.naming.epoch, session: self.naming.session, sequence: Sequence(self.sequence.0 + nth) }
    }

    /// At most one frame of each kind (the sequences of a read).
    fn finish(mut self) -> Result<Vec<OutFrame>, BuildError> {
        let mut out = Vec::new();
        self.data.sort_unstable_by_key(|p| p.block);
        self.same.sort_unstable_by_key(|p| p.block);
        self.zero.sort_unstable();
        if !self.data.is_empty() {
            let extents = extents_of(self.data.iter().map(|p| p.block));
            let content = joined(&self.data);
            let began = thread_cpu_nanos();
            let compressed = self.naming.level.and_then(|level| compress(&content, level));
            if let Some(payload) = &compressed {
                // Only what was compressed says anything about the level.
                self.effort.content_bytes.fetch_add(content.len() as u64, Relaxed);
                self.effort.payload_bytes.fetch_add(payload.len() as u64, Relaxed);
                self.effort.nanos.fetch_add(thread_cpu_nanos().saturating_sub(began), Relaxed);
            }
            let header = FrameHeader::data(self.id(0), self.disk, extents, &content, compressed.as_deref())?;
            out.push(OutFrame { header, payload: compressed.unwrap_or(content).into() });
        }
        if !self.zero.is_empty() {
            let extents = extents_of(self.zero.iter().copied());
            let header = FrameHeader::zero(self.id(1), self.disk, extents)?;
            out.push(OutFrame { header, payload: Bytes::new() });
        }
        if !self.same.is_empty() {
            let extents = extents_of(self.same.iter().map(|p| p.block));
            let content = joined(&self.same);
            let digest = content_digest(self.disk, &extents, &content);
            let header = FrameHeader::same(self.id(2), self.disk, extents, digest)?;
            out.push(OutFrame { header, payload: Bytes::new() });
        }
        Ok(out)
    }
}

/// The blocks' content, one after the other. By slices: byte by byte this was a fifth of a synchronisation's processor time.
fn joined(pieces: &[Piece]) -> Vec<u8> {
    let mut content = Vec::with_capacity(pieces.iter().map(|p| p.content.len()).sum());
    pieces.iter().for_each(|p| content.extend_from_slice(&p.content));
    content
}

fn extents_of(blocks: impl Iterator<Item = Block>) -> Vec<Extent> {
    let mut out: Vec<Extent> = Vec::new();
    for block in blocks {
        match out.last_mut() {
            Some(e) if e.end() == block => e.blocks += 1,
            _ => out.push(Extent { start: block, blocks: 1 }),
        }
    }
    out
}

/// Processor time of this thread: what compressing costs, not how long it waited for its turn on a busy node (by the
/// clock on the wall a busy node looks like one whose compression is slow, and the level falls to the lowest).
fn thread_cpu_nanos() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// zstd, if it saves at least a sixteenth; a quick look at a sample spares incompressible content the whole attempt.
fn compress(content: &[u8], level: i32) -> Option<Vec<u8>> {
    let worth = |from: usize, to: usize| to + from / 16 < from;
    if content.len() > 8 * SAMPLE_BYTES {
        let middle = content.len() / 2;
        let sample = &content[middle..middle + SAMPLE_BYTES];
        if !worth(SAMPLE_BYTES, zstd::bulk::compress(sample, -5).ok()?.len()) {
            let head = &content[..SAMPLE_BYTES];
            if !worth(SAMPLE_BYTES, zstd::bulk::compress(head, -5).ok()?.len()) {
                return None;
            }
        }
    }
    let out = zstd::bulk::compress(content, level).ok()?;
    worth(content.len(), out.len()).then_some(out)
}

const SAMPLE_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    fn build(blocks: &[(u64, u8)], digests: &PeerDigests) -> Vec<OutFrame> {
        let naming = Naming { epoch: 1, session: Session(7), level: Some(-1) };
        let effort = Effort::default();
        let mut b = Builder::new(&effort, DiskIndex(0), Sequence(10), naming, digests);
        for (n, fill) in blocks {
            b.push(Block(*n), &[*fill; 4096]);
        }
        b.finish().unwrap()
    }

    #[test]
    fn content_zeroes_and_what_the_peer_has_become_a_frame_each() {
        let digests = PeerDigests::from([
            (Block(5), block_digest(DiskIndex(0), Block(5), &[3; 4096])),
            (Block(6), block_digest(DiskIndex(0), Block(6), &[9; 4096])),
        ]);
        let frames = build(&[(1, 1), (2, 0), (3, 2), (5, 3), (6, 4)], &digests);
        let kinds: Vec<_> = frames.iter().map(|f| (f.header.kind, f.header.blocks(), f.header.sequence.0)).collect();
        use watari_core::frame::FrameKind::{Data, Same, Zero};
        assert_eq!(kinds, [(Data, 3, 10), (Zero, 1, 11), (Same, 1, 12)]);
        assert!(frames[0].payload.len() < 1000, "constant content compresses");
    }

    #[test]
    fn incompressible_content_goes_raw() {
        let mut x = 1u64;
        let noise: Vec<u8> = (0..1 << 17)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x as u8
            })
            .collect();
        assert_eq!(compress(&noise, 1), None);
    }
}
