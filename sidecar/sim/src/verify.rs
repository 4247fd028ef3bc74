//! Continuous verification, as `sidecar/src/engine/source/verify.rs`: digests of blocks that nobody writes are compared with
//! the peer's, a stretch at a time; what differs is sent again. Where nobody lies and no hand but ours writes, it must
//! never find anything; a target that lies is found by it alone.

use watari_core::{
    geometry::{Block, DiskIndex, Extent, Generation, blocks_for},
    primary::Phase,
};

use crate::{ctx::Ctx, net::Body, process::Process, readers::block_digest};

/// Blocks of one step.
const STEP_BLOCKS: u64 = 24;
/// Ids of verification's questions; readers count from 1.
const FIRST_ID: u64 = 1 << 40;

#[derive(Clone, Debug)]
enum Stage {
    Asked,
    Answered(Vec<[u8; 16]>),
    Read(Vec<[u8; 16]>, Vec<u8>),
}

#[derive(Clone, Debug)]
struct Check {
    id: u64,
    disk: DiskIndex,
    extent: Extent,
    /// The base when it was asked for, and the blocks that were clean then.
    base: Generation,
    clean: Vec<bool>,
    stage: Stage,
}

/// Where a pass is, and what passes found.
#[derive(Clone, Debug, Default)]
pub struct Verification {
    at: (usize, u64),
    asked: u64,
    check: Option<Check>,
    differed_in_pass: u64,
    /// Complete passes that found no difference.
    pub clean_passes: u64,
}

impl Verification {
    pub fn answered(&mut self, id: u64, digests: &[[u8; 16]]) {
        if let Some(check) = self.check.as_mut().filter(|c| c.id == id) {
            check.stage = Stage::Answered(digests.to_vec());
        }
    }

    /// The link is new or gone.
    pub fn forget(&mut self) {
        self.check = None;
    }
}

impl Process {
    fn clean_blocks(&self, disk: DiskIndex, extent: Extent) -> Vec<bool> {
        (extent.start.0..extent.end().0).map(|b| !self.tracker.any_mark(disk, Block(b), Block(b))).collect()
    }

    fn may_verify(&self) -> bool {
        let Some(source) = &self.source else { return false };
        let quiet = *source.primary.phase() == Phase::Idle && source.compare.is_empty() && !source.primary.converging();
        quiet && source.wire.is_some() && source.primary.base() != Generation::default() && !self.counts_as_untracked()
    }

    /// One step of the pass that is under way; `false`: nothing to do now.
    pub fn verify_step(&mut self, ctx: &mut Ctx) -> bool {
        let Some(check) = self.source.as_mut().and_then(|s| s.verification.check.take()) else {
            return self.may_verify() && self.ask_digests(ctx);
        };
        let Check { disk, extent, ref stage, .. } = check;
        let stage = match stage {
            Stage::Asked => Stage::Asked,
            Stage::Answered(theirs) => match self.read_blocks(ctx, disk, extent) {
                Some(content) => Stage::Read(theirs.clone(), content),
                None => return true,
            },
            Stage::Read(theirs, content) => {
                self.compare_digests(ctx, &check, theirs, content);
                return true;
            }
        };
        let waits = matches!(stage, Stage::Asked);
        if let Some(source) = &mut self.source {
            source.verification.check = Some(Check { stage, ..check });
        }
        !waits
    }

    fn ask_digests(&mut self, ctx: &mut Ctx) -> bool {
        let Some(source) = &mut self.source else { return false };
        let v = &mut source.verification;
        let (disk, first) = (DiskIndex(v.at.0 as u16), v.at.1);
        let extent = Extent::new(first, STEP_BLOCKS.min(blocks_for(ctx.setup.sizes[v.at.0]) - first) as u32);
        v.asked += 1;
        let (id, base) = (FIRST_ID + v.asked, source.primary.base());
        let clean = self.clean_blocks(disk, extent);
        if let Some(source) = &mut self.source {
            source.verification.check = Some(Check { id, disk, extent, base, clean, stage: Stage::Asked });
        }
        self.send(ctx, Body::DigestAsk { id, disk, extent });
        true
    }

    fn compare_digests(&mut self, ctx: &mut Ctx, check: &Check, theirs: &[[u8; 16]], content: &[u8]) {
        let still = self.clean_blocks(check.disk, check.extent);
        let Some(source) = &mut self.source else { return };
        if check.base != source.primary.base() || *source.primary.phase() != Phase::Idle {
            return;
        }
        let mut differing = Vec::new();
        for (i, content) in content.chunks_exact(4096).enumerate() {
            let block = Block(check.extent.start.0 + i as u64);
            let same = theirs.get(i).is_none_or(|d| *d == block_digest(check.disk, block, content));
            if check.clean[i] && still[i] && !same {
                differing.push(block);
            }
        }
        let v = &mut source.verification;
        v.differed_in_pass += differing.len() as u64;
        v.at.1 += u64::from(check.extent.blocks);
        if v.at.1 >= blocks_for(ctx.setup.sizes[v.at.0]) {
            v.at = (v.at.0 + 1, 0);
        }
        if v.at.0 >= ctx.setup.sizes.len() {
            v.at = (0, 0);
            v.clean_passes += u64::from(std::mem::take(&mut v.differed_in_pass) == 0);
            ctx.cov.hit("verification: a pass");
        }
        for block in differing {
            assert!(
                ctx.truth.distrusted[1 - self.index],
                "verification finds that disk {} block {} differs, and nobody lies",
                check.disk.0,
                block.0
            );
            ctx.cov.hit(match ctx.setup.trouble.liar {
                Some(crate::ctx::Liar::Syncs) => "verification finds a disk that lies",
                Some(crate::ctx::Liar::ForeignHand) | None => "verification finds a foreign hand in the replica",
            });
            self.must_compare(check.disk, block.0, 1);
        }
    }
}
