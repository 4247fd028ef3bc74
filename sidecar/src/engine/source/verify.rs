//! Continuous verification: does the replica hold what this disk holds, where nobody wrote (design §3.2)?
//!
//! A pass walks over all disks at a low rate. Each step asks the peer for digests of some runs of blocks, reads the same
//! runs here, and believes the comparison only where no mark stood before and after it and no generation was committed
//! meanwhile: then the blocks did not change here, and the replica's newest committed content of them is what was sent.
//! What differs is sent again and reported: a disk that loses writes it acknowledged is found this way, and by nothing else.
//!
//! Invariant: **I9** the report says how far the pass is, when the whole was last proved identical, and what differed.
//! It repairs the replica only; a disk of this side that lies cannot be told from one that is right.

use watari_core::{
    geometry::{Block, DiskIndex, Extent, Generation, blocks_for},
    primary::Phase,
};

use super::{digests::DigestBook, readers::Job, *};
use crate::engine::{build, clock::unix_millis};

/// Blocks per digest (256 KiB): one digest of 16 bytes for so much, and a run that differs is looked at block by block.
pub(super) const RUN_BLOCKS: u32 = 64;

/// Where a pass is, and what passes found.
#[derive(Clone, Debug, Default)]
pub struct Verification {
    at: (u16, u64),
    began_unix_millis: u64,
    asked: bool,
    /// Blocks looked at in this pass, also those that were skipped because they were being written.
    pub done_blocks: u64,
    /// When the last complete pass began that found no difference; 0: none yet.
    pub proved_unix_millis: u64,
    /// Blocks that differed, since this worker started and in this pass.
    pub differed: u64,
    differed_in_pass: u64,
}

/// Some runs of one disk, to be compared.
#[derive(Clone, Debug, PartialEq)]
pub struct Check {
    pub disk: DiskIndex,
    pub first: u64,
    pub blocks: u64,
    /// The base when it was asked for.
    pub base: Generation,
}

/// What came of it: blocks that differ, or nothing where the peer did not answer.
pub type Checked = Option<Vec<Extent>>;

impl Source {
    /// Begin the next step of the pass, of at most `bytes`; only while nothing else is going on.
    pub fn verify(&mut self, bytes: u64) {
        let quiet =
            matches!(self.primary.phase(), Phase::Idle) && self.compare.is_empty() && !self.primary.converging();
        if bytes == 0 || self.verification.asked || self.link.is_none() || !quiet || self.shared.untracked() {
            return;
        }
        if self.primary.base() == Generation::default() || self.primary.limits.paused || !self.peer_full.is_empty() {
            return;
        }
        let v = &mut self.verification;
        if v.at == (0, 0) {
            (v.began_unix_millis, v.done_blocks, v.differed_in_pass) = (unix_millis(), 0, 0);
        }
        let disk = DiskIndex(v.at.0);
        let whole = blocks_for(self.disks[usize::from(disk.0)].local().file().size_bytes());
        let blocks = (bytes.div_ceil(BLOCK_BYTES)).clamp(u64::from(RUN_BLOCKS), 1 << 16).min(whole - v.at.1);
        let check = Check { disk, first: v.at.1, blocks, base: self.primary.base() };
        v.asked = true;
        self.readers.push(Job::Verify(check), self.naming());
    }

    /// A step is done.
    pub fn verified(&mut self, check: &Check, checked: Checked) {
        self.verification.asked = false;
        let committed_meanwhile = check.base != self.primary.base() || !matches!(self.primary.phase(), Phase::Idle);
        let Some(differing) = checked.filter(|_| !committed_meanwhile) else { return };
        let mut blocks = 0;
        for e in &differing {
            let last = Block(e.end().0 - 1);
            if !self.shared.tracker.any_mark(check.disk, e.start, last) {
                blocks += u64::from(e.blocks);
                self.must_compare(check.disk, e.start.0, u64::from(e.blocks));
            }
        }
        let whole = blocks_for(self.disks[usize::from(check.disk.0)].local().file().size_bytes());
        let v = &mut self.verification;
        if blocks > 0 {
            tracing::error!(disk = check.disk.0, blocks, "the replica differs where nobody wrote: it is sent again");
        }
        v.differed += blocks;
        v.differed_in_pass += blocks;
        v.done_blocks += check.blocks;
        v.at.1 += check.blocks;
        if v.at.1 >= whole {
            v.at = (v.at.0 + 1, 0);
        }
        if usize::from(v.at.0) >= self.disks.len() {
            v.at = (0, 0);
            if v.differed_in_pass == 0 {
                v.proved_unix_millis = v.began_unix_millis;
            }
        }
    }
}

/// Compare the runs of one step; on a reader thread.
pub(super) fn run(shared: &Shared, disks: &[GateDisk], digests: &DigestBook, check: &Check) -> Checked {
    let disk = check.disk;
    let clean = |e: &Extent| !shared.tracker.any_mark(disk, e.start, Block(e.end().0 - 1));
    let end = check.first + check.blocks;
    let runs = (check.first..end)
        .step_by(RUN_BLOCKS as usize)
        .map(|at| Extent { start: Block(at), blocks: u64::from(RUN_BLOCKS).min(end - at) as u32 });
    let runs: Vec<Extent> = runs.filter(clean).collect();
    let suspects = differing(disks, digests, disk, &runs, RUN_BLOCKS)?;
    let blocks: Vec<Extent> = suspects.into_iter().filter(clean).collect();
    let found = differing(disks, digests, disk, &blocks, 1)?;
    Some(found.into_iter().filter(clean).collect())
}

/// The parts of these extents, `granularity` blocks each, that are not the same at the peer. `None`: it did not answer.
fn differing(
    disks: &[GateDisk],
    digests: &DigestBook,
    disk: DiskIndex,
    extents: &[Extent],
    granularity: u32,
) -> Checked {
    let mut out = Vec::new();
    if extents.is_empty() {
        return Some(out);
    }
    let file = disks[usize::from(disk.0)].local().file();
    for (part, theirs) in digests.ask_parts(disk, extents, granularity)? {
        let content = build::read_extent(file, disk, part).ok()?;
        if build::extent_digest(disk, part, &content) != theirs {
            out.push(part);
        }
    }
    Some(out)
}
