//! Reader threads of the source, as `sidecar/src/engine/build.rs`: a read asks for digests, waits for older writes, reads,
//! claims and becomes frames, one step at a time beside the guest's writes.

use std::collections::BTreeMap;

use watari_core::{
    frame::{FrameHeader, FrameId, content_digest},
    geometry::{BLOCK_BYTES, Block, DiskIndex, Extent, Sequence},
    primary::Read,
};

use crate::{
    content::Words,
    ctx::Ctx,
    net::{Body, OutFrame},
    process::Process,
};

#[derive(Clone, Debug)]
pub enum Kind {
    Frozen { cut: u64 },
    Current,
    Preserved,
}

/// One read that a reader thread works on.
#[derive(Clone, Debug)]
pub struct Job {
    pub kind: Kind,
    pub read: Read,
    /// Extents whose digests are still to be asked for.
    pub ask: Vec<Extent>,
    pub asked: Option<(u64, Extent)>,
    pub peer: BTreeMap<Block, [u8; 16]>,
    pub next: usize,
    pub content: Option<Vec<u8>>,
    pub pieces: Vec<(Block, Vec<u8>)>,
    pub failed: bool,
    /// Begun under an epoch that is over.
    pub outdated: bool,
    pub done: bool,
}

pub fn block_digest(disk: DiskIndex, block: Block, content: &[u8]) -> [u8; 16] {
    let whole = content_digest(disk, &[Extent { start: block, blocks: 1 }], content);
    whole[..16].try_into().unwrap_or_default()
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

impl Process {
    pub fn source_jobs(&self) -> usize {
        self.source.as_ref().map_or(0, |s| s.jobs.len())
    }

    /// One step of one reader; `false`: it waits.
    pub fn job_step(&mut self, ctx: &mut Ctx, which: usize) -> bool {
        let Some(mut job) = self.source.as_mut().filter(|s| which < s.jobs.len()).map(|s| s.jobs.swap_remove(which))
        else {
            return false;
        };
        let did = self.work(ctx, &mut job);
        if !job.done {
            if let Some(source) = &mut self.source {
                source.jobs.push(job);
            }
            return did;
        }
        self.built(ctx, job);
        true
    }

    fn work(&mut self, ctx: &mut Ctx, job: &mut Job) -> bool {
        let wire = self.source.as_ref().and_then(|s| s.wire);
        if job.asked.is_some() {
            if wire.is_some() && !ctx.rng.one_in(40) {
                return false;
            }
            // The link is gone, or the peer is too slow: content instead of digests.
            job.asked = None;
        }
        if wire.is_some()
            && let Some(extent) = job.ask.pop()
        {
            let id = self.source.as_mut().map_or(0, |s| {
                s.next_ask += 1;
                s.next_ask
            });
            job.asked = Some((id, extent));
            self.send(ctx, Body::DigestAsk { id, disk: job.read.disk, extent });
            return true;
        }
        job.ask.clear();
        let disk = job.read.disk;
        if matches!(job.kind, Kind::Preserved) {
            self.take_preserved(job);
            return true;
        }
        let Some(extent) = job.read.extents.get(job.next).copied() else {
            job.done = true;
            return true;
        };
        let Some(content) = job.content.take() else {
            let last = Block(extent.end().0 - 1);
            if let Kind::Frozen { cut } = job.kind
                && self.tracker.writes_before_cut(cut, disk, extent.start, last)
            {
                return false;
            }
            job.content = self.read_blocks(ctx, disk, extent);
            if job.content.is_none() {
                (job.failed, job.done) = (true, true);
            }
            return true;
        };
        self.claim(ctx, job, extent, &content);
        job.next += 1;
        job.done |= job.next == job.read.extents.len();
        true
    }

    fn claim(&mut self, ctx: &mut Ctx, job: &mut Job, extent: Extent, content: &[u8]) {
        let disk = job.read.disk;
        if matches!(job.kind, Kind::Frozen { .. }) {
            self.tracker.stage(disk, extent);
        }
        for (i, block) in (extent.start.0..extent.end().0).map(Block).enumerate() {
            let at = i * BLOCK_BYTES as usize;
            let here = &content[at..at + BLOCK_BYTES as usize];
            if matches!(job.kind, Kind::Current) {
                if !self.tracker.overwritten(disk, block) {
                    job.pieces.push((block, here.to_vec()));
                } else {
                    ctx.cov.hit("early read: overwritten meanwhile");
                }
            } else if self.tracker.claim_frozen(disk, block) {
                job.pieces.push((block, here.to_vec()));
            } else if let Some(kept) = self.preserve.remove(&(disk.0, block.0)) {
                ctx.cov.hit("frozen read: the guest was first, its preserved content is taken");
                job.pieces.push((block, kept));
            }
            // Else its preserved content is on its way already, or the generation was given up and it is dirty again.
        }
    }

    fn take_preserved(&mut self, job: &mut Job) {
        job.done = true;
        let Some((disk, _)) = self.preserve.keys().next().copied() else { return };
        job.read.disk = DiskIndex(disk);
        let keys: Vec<_> = self.preserve.keys().filter(|(d, _)| *d == disk).take(256).copied().collect();
        for key in keys {
            if let Some(content) = self.preserve.remove(&key) {
                self.tracker.stage(DiskIndex(disk), Extent::new(key.1, 1));
                job.pieces.push((Block(key.1), content));
            }
        }
    }

    /// A read has become frames (or failed): enter them into the books and send them.
    fn built(&mut self, ctx: &mut Ctx, mut job: Job) {
        let Some(source) = &mut self.source else { return };
        if job.failed || job.outdated {
            // What was claimed for this cut was not sent: it is dirty, and the cut has lost its content.
            let claimed = job.pieces.iter().map(|(block, _)| Extent { start: *block, blocks: 1 });
            let early = matches!(job.kind, Kind::Current);
            let again: Vec<Extent> = if early { job.read.extents.clone() } else { claimed.collect() };
            again.iter().for_each(|e| self.tracker.mark(job.read.disk, *e));
            self.give_up |= !early && !again.is_empty();
            source.primary.frames_built(ctx.clock(self.index), job.read.sequence, &[]);
            return;
        }
        job.pieces.sort_unstable_by_key(|(b, _)| *b);
        let (epoch, session, disk) = (source.epoch, source.session, job.read.disk);
        let id = |nth| FrameId { epoch, session, sequence: Sequence(job.read.sequence.0 + nth) };
        let (mut data, mut zero, mut same) = (Vec::new(), Vec::new(), Vec::new());
        for (block, content) in &job.pieces {
            if job.peer.get(block).is_some_and(|d| *d == block_digest(disk, *block, content)) {
                same.push((*block, content));
            } else if content.iter().all(|b| *b == 0) {
                zero.push(*block);
            } else {
                data.push((*block, content));
            }
        }
        let joined =
            |pieces: &[(Block, &Vec<u8>)]| pieces.iter().map(|(_, c)| c.as_slice()).collect::<Vec<_>>().concat();
        let mut frames = Vec::new();
        if !data.is_empty() {
            let content = joined(&data);
            let short = (!ctx.rng.one_in(3)).then(|| Words::compress(&content));
            let extents = extents_of(data.iter().map(|(b, _)| *b));
            let header = FrameHeader::data(id(0), disk, extents, &content, short.as_deref()).expect("a frame of ours");
            frames.push(OutFrame { header, payload: short.unwrap_or(content) });
        }
        if !zero.is_empty() {
            let header = FrameHeader::zero(id(1), disk, extents_of(zero.into_iter())).expect("a frame of ours");
            ctx.cov.hit("a zero frame");
            frames.push(OutFrame { header, payload: Vec::new() });
        }
        if !same.is_empty() {
            let extents = extents_of(same.iter().map(|(b, _)| *b));
            let digest = content_digest(disk, &extents, &joined(&same));
            let header = FrameHeader::same(id(2), disk, extents, digest).expect("a frame of ours");
            ctx.cov.hit("a same frame");
            frames.push(OutFrame { header, payload: Vec::new() });
        }
        ctx.note(|| {
            let all: Vec<String> = frames
                .iter()
                .map(|f| format!("{} {:?} {:?}", f.header.sequence.0, f.header.kind, f.header.extents))
                .collect();
            format!("    frames: {}", all.join("; "))
        });
        for e in &job.read.extents {
            source.compare.retain(|(d, b)| *d != disk.0 || !(e.start.0..e.end().0).contains(b));
        }
        let headers: Vec<_> = frames.iter().map(|f| f.header.clone()).collect();
        source.primary.frames_built(ctx.clock(self.index), job.read.sequence, &headers);
        for frame in frames {
            if let Some(wire) = source.wire {
                ctx.net.send_frame(wire, ctx.rng.below(8) as usize, frame.clone());
            }
            source.kept.insert(frame.header.sequence, frame);
        }
    }
}
