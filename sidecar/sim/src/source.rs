//! The source's duty, as `sidecar/src/engine/{source,build}.rs` does it: polls, reads that go on step by step beside the
//! guest's writes, frames, books, what must be compared, and what is forgotten when.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use watari_core::{
    geometry::{Block, DiskIndex, Extent, Generation, Sequence, Session, blocks_for},
    handover::Event,
    primary::{Limits, Phase, Primary, Read, Step},
    record::RoleRecord,
    replica::images::image_name,
    storage::Storage,
    tracker::Tracker,
};

use crate::{
    ctx::Ctx,
    net::{Body, Hello, OutFrame, Verdict, WireId},
    node::{REGION_BLOCKS, Region, SharedMaps, regions_of},
    process::Process,
    readers::{Job, Kind},
    verify::Verification,
};

/// Where the marks of a starting source come from.
#[derive(Clone, Debug)]
pub enum Baseline {
    Marks,
    Compare(BTreeSet<Region>),
    /// Nothing can be believed, for this reason.
    Everything(&'static str),
}

/// See the module's header.
pub struct Source {
    pub primary: Primary,
    pub kept: BTreeMap<Sequence, OutFrame>,
    pub compare: BTreeSet<(u16, u64)>,
    pub wire: Option<WireId>,
    /// The peer's folder at the last contact of this session.
    pub known_site: Option<watari_core::record::Id>,
    /// Generations whose lists were sent since the last one that was forgotten: one of them may be committed at the peer
    /// without our having heard.
    pub listed: BTreeSet<Generation>,
    /// Generations given up so far, as last looked at.
    pub given_up: u64,
    pub jobs: Vec<Job>,
    /// Syncs that are done and whose end is not known yet; the disks may be written to meanwhile.
    pub syncing: VecDeque<Generation>,
    pub remainder_told: Option<Generation>,
    pub next_ask: u64,
    pub epoch: u64,
    pub session: Session,
    /// Peer is full, in its words.
    pub peer_full: bool,
    pub verification: Verification,
}

impl Source {
    pub fn new(ctx: &Ctx, record: &RoleRecord, session: Session, base: Option<Generation>) -> Source {
        let limits = Limits {
            interval_millis: ctx.setup.interval_millis,
            preserve_bytes: ctx.setup.preserve_bytes,
            paused: false,
        };
        let base = base.unwrap_or(record.base);
        let (epoch, reserved) = (record.epoch.counter, record.numbers_reserved);
        Source {
            primary: Primary::new(limits, epoch, session, base, reserved, reserved),
            kept: BTreeMap::new(),
            compare: BTreeSet::new(),
            wire: None,
            known_site: None,
            listed: BTreeSet::new(),
            given_up: 0,
            jobs: Vec::new(),
            syncing: VecDeque::new(),
            remainder_told: None,
            next_ask: 0,
            epoch,
            session,
            peer_full: false,
            verification: Verification::default(),
        }
    }

    pub fn raise_epoch(&mut self, tracker: &Tracker<SharedMaps>, epoch: u64) {
        if epoch != self.epoch {
            self.epoch = epoch;
            self.primary.raise_epoch(tracker, epoch);
            // Frames of the old epoch are of no use to the target.
            self.kept.clear();
            self.jobs.iter_mut().for_each(|j| j.outdated = true);
        }
    }

    pub fn busy(&self) -> bool {
        !self.jobs.is_empty() || !self.syncing.is_empty()
    }
}

impl Process {
    fn blocks(&self, ctx: &Ctx, disk: DiskIndex) -> u64 {
        blocks_for(ctx.setup.sizes[usize::from(disk.0)])
    }

    pub fn must_compare(&mut self, disk: DiskIndex, first: u64, blocks: u64) {
        self.tracker.mark(disk, Extent::new(first, blocks as u32));
        if let Some(source) = &mut self.source {
            source.compare.extend((first..first + blocks).map(|b| (disk.0, b)));
        }
    }

    pub fn compare_everything(&mut self, ctx: &mut Ctx, why: &str) {
        ctx.cov.hit(format!("full compare: {why}"));
        for disk in self.tracker.disk_indices() {
            self.must_compare(disk, 0, self.blocks(ctx, disk));
        }
    }

    pub fn take_baseline(&mut self, ctx: &mut Ctx, baseline: Baseline) {
        let regions = match baseline {
            Baseline::Marks => return,
            Baseline::Everything(why) => return self.compare_everything(ctx, why),
            Baseline::Compare(regions) => regions,
        };
        for (disk, region) in regions {
            let (disk, first) = (DiskIndex(disk), region * REGION_BLOCKS);
            let blocks = REGION_BLOCKS.min(self.blocks(ctx, disk) - first);
            self.must_compare(disk, first, blocks);
        }
    }

    /// Read whole blocks; beyond the end of the disk is zero. `None`: the power is off.
    pub fn read_blocks(&self, ctx: &Ctx, disk: DiskIndex, extent: Extent) -> Option<Vec<u8>> {
        let mut content = vec![0; extent.bytes() as usize];
        let inside = (ctx.setup.sizes[usize::from(disk.0)] - extent.start.offset()).min(extent.bytes()) as usize;
        self.images.read(&image_name(disk), extent.start.offset(), &mut content[..inside]).ok()?;
        Some(content)
    }

    /// The peer's images are empty and never had a commit: what is not zero here must cross.
    fn mark_allocated(&mut self, ctx: &Ctx) {
        for disk in self.tracker.disk_indices() {
            for block in 0..self.blocks(ctx, disk) {
                let content = self.read_blocks(ctx, disk, Extent::new(block, 1)).unwrap_or_default();
                if content.iter().any(|b| *b != 0) {
                    self.tracker.mark(disk, Extent::new(block, 1));
                }
            }
        }
    }

    pub fn source_link_up(&mut self, ctx: &mut Ctx, hello: &Hello, same_history: bool) {
        let Some(source) = &mut self.source else { return };
        let base = source.primary.base();
        let ours = hello.session == source.session.0;
        let known = source.known_site.replace(hello.site) == Some(hello.site);
        let held = |s: Sequence| hello.staged.iter().any(|(a, b)| *a <= s && s <= *b);
        let held: Option<&dyn Fn(Sequence) -> bool> = if ours { Some(&held) } else { None };
        let kept = &source.kept;
        source.primary.link_up(ctx.clock(self.index), &self.tracker, held, hello.committed, &|s| kept.contains_key(&s));
        let awaited = matches!(source.primary.phase(), Phase::Committing { generation, .. } | Phase::Forgetting { generation, .. } if *generation == hello.committed);
        source.remainder_told = None;
        source.wire = self.link.map(|l| l.wire);
        // Only what we offered in this session may be there without a comparison: the same folder may have been active
        // by itself meanwhile.
        if known && (hello.committed == base || awaited || source.listed.contains(&hello.committed)) {
            if hello.committed != base && !awaited {
                ctx.cov.hit("rebase: a commit whose word was lost");
                source.primary.rebase(hello.committed);
            }
        } else if hello.virgin {
            source.compare.clear();
            self.mark_allocated(ctx);
        } else if !same_history {
            self.compare_everything(ctx, "no common history");
        } else if hello.committed.number < base.number && !awaited {
            self.compare_everything(ctx, "the peer's folder is behind");
        } else if hello.committed != base && !awaited {
            ctx.cov.hit("rebase: a commit whose word was lost");
            source.primary.rebase(hello.committed);
        }
    }

    pub fn source_link_down(&mut self) {
        if let Some(source) = &mut self.source {
            source.primary.link_down();
            source.verification.forget();
            source.wire = None;
        }
    }

    pub fn source_message(&mut self, ctx: &mut Ctx, body: Body) {
        let Some(source) = &mut self.source else { return };
        match body {
            Body::Verdict { generation, verdict } => match verdict {
                Verdict::Committed => source.primary.committed(ctx.clock(self.index), generation),
                Verdict::Lacks(missing) => {
                    let kept = &source.kept;
                    source.primary.lacks(&self.tracker, generation, &missing, &|s| kept.contains_key(&s));
                }
                Verdict::Conflict(text) => {
                    ctx.note(|| format!("    conflict: {text}"));
                    self.abandon();
                    self.compare_everything(ctx, "the target refused a commit");
                }
            },
            Body::Durable { session, sequences } if session == source.session.0 => {
                sequences.iter().for_each(|s| source.primary.durable(ctx.clock(self.index), *s, *s));
                let primary = &source.primary;
                source.kept.retain(|s, _| primary.needs_payload(*s));
            }
            // Of a former session of ours.
            Body::Durable { .. } => {}
            Body::Digests { id, digests } => {
                source.verification.answered(id, &digests);
                for job in &mut source.jobs {
                    if let Some((_, extent)) = job.asked.filter(|(asked, _)| *asked == id) {
                        let blocks = (extent.start.0..extent.end().0).map(Block);
                        job.peer.extend(blocks.zip(digests.iter().copied()));
                        job.asked = None;
                    }
                }
            }
            Body::Full(full) => {
                source.peer_full = full;
                source.primary.block(full);
            }
            _ => {}
        }
    }

    fn abandon(&mut self) {
        if let Some(source) = &mut self.source {
            source.primary.abandon(&self.tracker);
            self.preserve.clear();
        }
    }

    /// One thing that the source does next; `false`: nothing.
    pub fn source_step(&mut self, ctx: &mut Ctx) -> bool {
        if self.source.is_none() {
            return false;
        }
        let Some(source) = &mut self.source else { return false };
        let given_up = source.primary.counters.given_up;
        if std::mem::replace(&mut source.given_up, given_up) != given_up {
            // Also when the primary gave it up by itself: old content must not meet the next cut.
            self.preserve.clear();
        }
        if std::mem::take(&mut self.give_up) {
            ctx.cov.hit("a generation is given up");
            self.abandon();
            return true;
        }
        if self.counts_as_untracked() {
            return false;
        }
        let preserved = self.preserve.len() as u64;
        let Some(source) = &mut self.source else { return false };
        let step = source.primary.poll(ctx.clock(self.index), &self.tracker, preserved);
        ctx.note(|| match &step {
            Step::Commit { .. } => format!("    site {} Commit", self.index),
            step => format!("    site {} {step:?}", self.index),
        });
        let new = |kind, read: Read, compare: bool| Job {
            kind,
            ask: if compare { read.extents.clone() } else { Vec::new() },
            read,
            asked: None,
            peer: BTreeMap::new(),
            next: 0,
            content: None,
            pieces: Vec::new(),
            failed: false,
            outdated: false,
            done: false,
        };
        let compare = &source.compare;
        let needs = |read: &Read| {
            let blocks = |e: &Extent| (e.start.0..e.end().0).any(|b| compare.contains(&(read.disk.0, b)));
            read.extents.iter().any(blocks)
        };
        match step {
            Step::Cut { generation } => self.cut(ctx, generation),
            Step::ReadFrozen { read, cut } => {
                ctx.cov.hit("read frozen");
                let compare = needs(&read);
                source.jobs.push(new(Kind::Frozen { cut }, read, compare));
            }
            Step::ReadCurrent { read } => {
                ctx.cov.hit("read early");
                let compare = needs(&read);
                source.jobs.push(new(Kind::Current, read, compare));
            }
            Step::SendPreserved { read } => {
                ctx.cov.hit("send preserved");
                source.jobs.push(new(Kind::Preserved, read, false));
            }
            Step::Resend(sequence) => {
                ctx.cov.hit("resend");
                if let (Some(frame), Some(wire)) = (source.kept.get(&sequence), source.wire) {
                    ctx.net.send_frame(wire, ctx.rng.below(8) as usize, frame.clone());
                }
            }
            Step::Commit { list, .. } => {
                if list.entries.iter().any(|e| !e.excluded.is_empty()) {
                    ctx.cov.hit("a commit list excludes blocks");
                }
                source.listed.insert(list.generation);
                let (generation, parent, entries, root) = (list.generation, list.parent, list.entries, list.root);
                self.send(ctx, Body::List { generation, parent, entries, root });
            }
            Step::SyncDisks { generation } => {
                source.syncing.push_back(generation);
                self.dead |= !self.sync_disks(ctx);
            }
            Step::Wait { until_millis } => {
                let now = ctx.clock(self.index);
                let idle = *source.primary.phase() == Phase::Idle && until_millis != u64::MAX;
                let late = idle && until_millis > now + source.primary.limits.interval_millis;
                assert!(!late, "I8: the next cut waits until {until_millis}, now is {now}");
                return self.after_pump(ctx);
            }
        }
        true
    }

    fn cut(&mut self, ctx: &mut Ctx, generation: Generation) {
        ctx.cov.hit("cut");
        let in_flight = self.writes_in_flight();
        if !in_flight.is_empty() {
            ctx.cov.hit("cut with writes in flight");
        }
        ctx.truth.cut(self.index, generation, &in_flight);
        let Some(source) = &mut self.source else { return };
        let cut = self.tracker.cut();
        source.primary.cut_made(ctx.clock(self.index), &self.tracker, generation, cut);
    }

    fn after_pump(&mut self, ctx: &mut Ctx) -> bool {
        let Some(source) = &mut self.source else { return false };
        if ctx.rng.one_in(8) && *source.primary.phase() == Phase::Idle {
            let gone = source.primary.superseded(&self.tracker);
            if !gone.is_empty() {
                source.kept.retain(|s, _| !gone.contains(s));
                let session = source.session.0;
                self.send(ctx, Body::Superseded(session, gone));
                return true;
            }
        }
        if source.primary.wants_numbers() {
            self.reserve_numbers(ctx);
            return true;
        }
        let dirty = self.tracker.current_blocks() + self.tracker.frozen_blocks() + self.preserve.len() as u64;
        if self.tracker.is_sealed()
            && self.tracker.writes_in_flight() == 0
            && let Some(generation) = source.primary.remainder(dirty)
            && source.remainder_told != Some(generation)
        {
            source.remainder_told = Some(generation);
            self.granted = true;
            self.apply(ctx, Event::RemainderSent { generation });
            return true;
        }
        false
    }

    /// The end of the fdatasync that follows a commit, if one is under way.
    pub fn source_sync(&mut self, ctx: &mut Ctx) -> bool {
        let Some(generation) = self.source.as_mut().and_then(|s| s.syncing.pop_front()) else { return false };
        if !self.source.as_ref().is_some_and(|s| s.primary.awaits_sync(generation)) {
            ctx.cov.hit("a sync ends whose commit is gone");
            return true;
        }
        // Durable before anything of it is forgotten: a source that starts anew must know a target's folder that is older.
        let action = self.site.amend(|r| r.base = generation);
        self.perform(ctx, vec![action]);
        let Some(source) = self.source.as_mut().filter(|_| !self.dead) else { return true };
        source.primary.forget(&self.tracker, generation);
        source.listed.clear();
        source.kept.clear();
        // Regions that were not written since the last sweep and have no mark go from the log.
        let cold: Vec<Region> = self.logged.iter().filter(|r| !self.hot.contains(r)).copied().collect();
        self.hot.clear();
        for (disk, region) in cold {
            let last = (region * REGION_BLOCKS + REGION_BLOCKS).min(self.blocks(ctx, DiskIndex(disk))) - 1;
            if !self.tracker.any_mark(DiskIndex(disk), Block(region * REGION_BLOCKS), Block(last)) {
                ctx.cov.hit("a region is forgotten");
                self.logged.remove(&(disk, region));
                self.region_log.borrow_mut().remove(&(disk, region));
            }
        }
        self.tell_baseline(ctx);
        true
    }

    /// A complete new log, and a comparison of everything (engine/brain/pace.rs).
    pub fn leave_untracked(&mut self, ctx: &mut Ctx) {
        for disk in self.tracker.disk_indices() {
            let last = Block(self.blocks(ctx, disk) - 1);
            let all: Vec<Region> = regions_of(disk, Block(0), last).collect();
            self.region_log.borrow_mut().extend(all.iter().copied());
            self.hot.extend(all.iter().copied());
            self.logged.extend(all);
        }
        self.untracked.set(false);
        self.compare_everything(ctx, "changes were not logged for a while");
    }

    /// The log names these regions durably, or the pair is `Untracked` before the write goes on (I8).
    pub fn log_regions(&mut self, ctx: &mut Ctx, disk: DiskIndex, first: Block, last: Block) {
        if self.log_broken {
            ctx.cov.hit("the pair becomes Untracked");
            self.untracked.set(true);
            self.give_up = true;
            return;
        }
        ctx.cov.hit("a region is logged before its first write");
        let regions: Vec<Region> = regions_of(disk, first, last).collect();
        self.region_log.borrow_mut().extend(regions.iter().copied());
        self.hot.extend(regions.iter().copied());
        self.logged.extend(regions);
    }
}
