//! The target's duty, as `sidecar/src/engine/target.rs` does it: frames into the journal, lists, commits, application,
//! retention. Every answer that promises something is remembered by the truth, every committed generation is compared
//! with it byte by byte.

use watari_core::{
    frame::Frame,
    geometry::{DiskIndex, Extent, Generation, Sequence, Session},
    replica::{
        CommitAnswer, Entry, ErrorClass, JournalLimits, Mark, Options, Policy, Progress, ReplicaError, ReplicaStore,
        StorageImages, ViewCache,
    },
    storage::{
        Storage,
        sim::{SimMedium, SimStorage},
    },
};

use crate::{
    content::{Disks, Words, words_of},
    ctx::Ctx,
    net::{Body, OutFrame, Verdict},
};

/// Name of the folder that the replica lives in.
pub const FOLDER: &str = "replica";
/// A commit list may overtake its frames: so long they are waited for, in milliseconds.
const FRAMES_WAIT_MILLIS: u64 = 200;
/// Pause after "no room", in milliseconds.
const FULL_PAUSE_MILLIS: u64 = 50;

pub type Store = ReplicaStore<SimStorage, StorageImages<SimStorage>>;

struct Waiting {
    generation: Generation,
    parent: Generation,
    entries: Vec<Entry>,
    root: [u8; 32],
    since: u64,
}

/// See the module's header.
pub struct Target {
    site: usize,
    pub store: Store,
    waiting: Option<Waiting>,
    unsynced: bool,
    session: u64,
    full_until: Option<u64>,
    full: bool,
    told_full: bool,
    more_to_apply: bool,
}

fn options(ctx: &Ctx) -> Options {
    let limits = JournalLimits { segment_bytes_max: 40 << 10, journal_bytes_max: ctx.setup.journal_bytes };
    Options {
        journal: limits,
        policy: Policy { keep_last: ctx.setup.keep_last, keep_seconds: ctx.setup.keep_seconds, thin: Vec::new() },
        ..Options::default()
    }
}

impl Target {
    fn new(site: usize, store: Store) -> Target {
        Target {
            site,
            store,
            waiting: None,
            unsynced: false,
            session: 0,
            full_until: None,
            full: false,
            told_full: false,
            more_to_apply: true,
        }
    }

    /// Remove the replica's files; the images stay.
    pub fn remove(medium: &SimMedium) {
        let mut folder = medium.folder(FOLDER);
        for name in folder.list().unwrap_or_default() {
            let _ = folder.remove(&name);
        }
        let _ = folder.sync_folder();
    }

    fn create(ctx: &mut Ctx, medium: &SimMedium, images: &SimStorage, virgin: bool) -> Result<Store, ReplicaError> {
        Self::remove(medium);
        let images = StorageImages { storage: images.clone() };
        let (identity, sizes) = (ctx.id(), ctx.setup.sizes.clone());
        Store::create(medium.folder(FOLDER), images, Box::new(Words), options(ctx), identity, &sizes, virgin)
    }

    pub fn open_or_create(
        ctx: &mut Ctx,
        site: usize,
        medium: &SimMedium,
        images: &SimStorage,
    ) -> Result<Target, ReplicaError> {
        let seam = StorageImages { storage: images.clone() };
        match Store::open(medium.folder(FOLDER), seam, Box::new(Words), options(ctx))? {
            Some(store) => Ok(Target::new(site, store)),
            None => {
                let content = crate::content::read_all(images, &ctx.setup.sizes);
                let virgin = content.is_ok_and(|disks| disks.iter().flatten().all(|w| *w == 0));
                Ok(Target::new(site, Self::create(ctx, medium, images, virgin)?))
            }
        }
    }

    /// The former source's disks become a replica that is at `generation`.
    pub fn adopt(
        ctx: &mut Ctx,
        site: usize,
        medium: &SimMedium,
        images: &SimStorage,
        generation: Generation,
        floor: u64,
    ) -> Result<Target, ReplicaError> {
        let mut store = Self::create(ctx, medium, images, false)?;
        store.adopt(Mark { generation, root: [0; 32], committed_at_seconds: ctx.clock(site) / 1000 })?;
        store.raise_floor(floor)?;
        Ok(Target::new(site, store))
    }

    pub fn committed(&self) -> Generation {
        self.store.manifest().newest.map(|m| m.generation).unwrap_or_default()
    }

    pub fn applied(&self) -> Generation {
        self.store.manifest().applied.map(|m| m.generation).unwrap_or_default()
    }

    pub fn is_virgin(&self) -> bool {
        self.store.manifest().virgin && !self.store.manifest().direct_started
    }

    pub fn full(&self) -> bool {
        self.full
    }

    /// What this side holds under a generation.
    pub fn content(&mut self, ctx: &Ctx, generation: Generation) -> Result<Disks, ReplicaError> {
        let view = self.store.view(Some(generation))?;
        let mut cache = ViewCache::default();
        let mut disks = Vec::new();
        for (disk, size) in ctx.setup.sizes.iter().enumerate() {
            let mut bytes = vec![0; *size as usize];
            self.store.read_view(&view, &mut cache, DiskIndex(disk as u16), 0, &mut bytes)?;
            disks.push(words_of(&bytes));
        }
        Ok(disks)
    }

    /// After a start: what was acknowledged as committed is here (I4).
    pub fn check_promises(&self, ctx: &mut Ctx) {
        if let Some(promised) = ctx.truth.promised[self.site] {
            let found = self.committed();
            assert!(
                found >= promised,
                "I4: {promised} was acknowledged as committed, {found} is the newest after a start"
            );
        }
    }

    /// Every kept generation is what it was when it was committed.
    pub fn check_kept(&mut self, ctx: &mut Ctx) {
        if self.store.poisoned().is_some() {
            return;
        }
        for mark in self.store.kept() {
            // Adopted marks of a side that was fenced do not promise anything.
            if ctx.truth.generations.contains_key(&mark.generation)
                && let Ok(found) = self.content(ctx, mark.generation)
            {
                ctx.truth.check_generation(self.site, mark.generation, &found, "a kept generation");
                ctx.cov.hit("checked a kept generation");
            }
        }
    }

    pub fn begin_session(&mut self, ctx: &mut Ctx, session: u64, epoch: u64) {
        self.waiting = None;
        self.session = session;
        let outcome = self
            .store
            .set_session(Session(session))
            .and_then(|()| if self.store.manifest().floor < epoch { self.store.raise_floor(epoch) } else { Ok(()) });
        self.note(ctx, outcome.map_err(|e| e.to_string()));
    }

    /// Whose frames count here.
    pub fn session(&self) -> u64 {
        self.session
    }

    pub fn staged(&mut self, session: u64) -> Vec<(Sequence, Sequence)> {
        if self.store.sync_staged().is_err() {
            return Vec::new();
        }
        let staged = self.store.staged();
        staged.iter().filter(|s| s.session.0 == session).flat_map(|s| s.ranges.iter().copied()).collect()
    }

    fn room(&mut self) {
        (self.full, self.full_until) = (false, None);
    }

    pub fn note(&mut self, ctx: &mut Ctx, outcome: Result<(), String>) {
        if let Err(error) = outcome {
            ctx.cov.hit("target: an operation was refused");
            ctx.note(|| format!("    target: {error}"));
        }
    }

    fn error(&mut self, ctx: &mut Ctx, error: &ReplicaError) {
        let small = matches!(error, ReplicaError::JournalTooSmall { .. });
        if error.class() == ErrorClass::Retry || small {
            ctx.cov.hit("target: full");
            self.full = true;
            self.full_until = Some(ctx.now + FULL_PAUSE_MILLIS);
        }
        self.note(ctx, Err(error.to_string()));
    }

    pub fn has_room(&self, ctx: &Ctx) -> bool {
        self.full_until.is_none_or(|t| ctx.now >= t)
    }

    /// A frame; `false`: offer it again later.
    pub fn frame(&mut self, ctx: &mut Ctx, frame: &OutFrame) -> bool {
        if !self.has_room(ctx) {
            return false;
        }
        let checked = match Frame::check(frame.header.clone(), &frame.payload, &Words) {
            Ok(checked) => checked,
            Err(error) => panic!("a frame that nobody damaged is refused: {error}"),
        };
        match self.store.stage(&checked) {
            Ok(()) => {
                self.unsynced = true;
                self.room();
                true
            }
            Err(ReplicaError::ApplyFirst) => {
                self.more_to_apply = true;
                false
            }
            Err(error) => {
                ctx.cov.hit(format!("frame refused: {}", refusal(&error)));
                self.error(ctx, &error);
                error.class() != ErrorClass::Retry && !matches!(error, ReplicaError::JournalTooSmall { .. })
            }
        }
    }

    pub fn list(&mut self, ctx: &Ctx, generation: Generation, parent: Generation, entries: Vec<Entry>, root: [u8; 32]) {
        self.waiting = Some(Waiting { generation, parent, entries, root, since: ctx.now });
    }

    pub fn try_commit(&mut self, ctx: &mut Ctx) -> Option<Body> {
        let waiting = self.waiting.take()?;
        if let Err(error) = self.store.sync_staged() {
            self.error(ctx, &error);
            self.waiting = Some(waiting);
            return None;
        }
        let generation = waiting.generation;
        let answer = self
            .store
            .begin_commit(generation, waiting.parent, ctx.clock(self.site) / 1000)
            .and_then(|()| self.store.append_entries(&waiting.entries))
            .and_then(|()| self.store.finish_commit(waiting.root));
        let verdict = match answer {
            Ok(CommitAnswer::Committed) => {
                let found = self.content(ctx, generation).expect("what was committed just now can be read");
                ctx.truth.check_generation(self.site, generation, &found, "a commit");
                ctx.cov.hit("commit");
                self.promise(ctx, generation)
            }
            Ok(CommitAnswer::AlreadyCommitted) => {
                ctx.cov.hit("commit repeated");
                self.promise(ctx, generation)
            }
            Ok(CommitAnswer::Lacks(missing)) => {
                if ctx.now < waiting.since + FRAMES_WAIT_MILLIS {
                    self.waiting = Some(waiting);
                    return None;
                }
                ctx.cov.hit("commit lacks frames");
                Verdict::Lacks(missing)
            }
            Ok(CommitAnswer::Conflict { newest }) => Verdict::Conflict(format!("{newest:?}")),
            Err(error) if error.class() == ErrorClass::Retry => {
                self.error(ctx, &error);
                self.waiting = Some(waiting);
                return None;
            }
            Err(ReplicaError::BadList(what)) => panic!("I4: a list that nobody damaged is wrong: {what}"),
            Err(error) => {
                self.error(ctx, &error);
                Verdict::Conflict(error.to_string())
            }
        };
        Some(Body::Verdict { generation, verdict })
    }

    fn promise(&mut self, ctx: &mut Ctx, generation: Generation) -> Verdict {
        self.more_to_apply = true;
        ctx.truth.promised[self.site] = Some(generation);
        Verdict::Committed
    }

    pub fn sync(&mut self, ctx: &mut Ctx) -> Option<Body> {
        if !std::mem::take(&mut self.unsynced) {
            return None;
        }
        match self.store.sync_staged() {
            Ok(keys) if keys.is_empty() => None,
            Ok(keys) => {
                let session = keys[0].session.0;
                Some(Body::Durable { session, sequences: keys.iter().map(|k| k.sequence).collect() })
            }
            Err(error) => {
                self.error(ctx, &error);
                self.unsynced = true;
                None
            }
        }
    }

    /// Apply a little; `true`: something was done.
    pub fn work(&mut self, ctx: &mut Ctx) -> bool {
        if !self.more_to_apply || !self.has_room(ctx) || self.store.poisoned().is_some() {
            return false;
        }
        let budget = (1 + ctx.rng.below(6)) * 4096;
        match self.store.apply_step(budget) {
            Ok(Progress::Idle) => self.more_to_apply = false,
            Ok(Progress::Working { phase, .. }) => ctx.cov.hit(format!("apply: {phase:?}")),
            Ok(Progress::Applied(_)) => {
                ctx.cov.hit("applied");
                self.room();
            }
            Ok(Progress::RolledBack(_)) => ctx.cov.hit("rolled back"),
            Err(error) => self.error(ctx, &error),
        }
        true
    }

    pub fn retain(&mut self, ctx: &mut Ctx) -> bool {
        match self.store.retain(ctx.clock(self.site) / 1000) {
            Ok(retained) if retained.removed.is_empty() => false,
            Ok(_) => {
                ctx.cov.hit("retention removes a generation");
                true
            }
            Err(error) => {
                self.error(ctx, &error);
                false
            }
        }
    }

    pub fn digests(&mut self, disk: DiskIndex, extent: Extent) -> Option<Vec<[u8; 16]>> {
        let one = |block: u64| {
            let digest = self.store.blocks_digest(disk, &[Extent::new(block, 1)]).ok()?;
            digest[..16].try_into().ok()
        };
        (extent.start.0..extent.end().0).map(one).collect()
    }

    /// Said when it changed.
    pub fn news(&mut self, now: u64) -> Option<Body> {
        // The source sends nothing while we are full, so nothing will show that there is room again: after a pause it is
        // believed, and the next want of room says otherwise.
        if self.full_until.is_some_and(|t| now >= t) {
            self.room();
        }
        (self.full != std::mem::replace(&mut self.told_full, self.full)).then_some(Body::Full(self.full))
    }
}

fn refusal(error: &ReplicaError) -> &'static str {
    match error {
        ReplicaError::BelowFloor { .. } => "below the floor",
        ReplicaError::AboveFloor { .. } => "above the floor",
        ReplicaError::OtherSession { .. } => "other session",
        ReplicaError::NotSame(_) => "not the same",
        ReplicaError::FrameConflict(_) => "conflict",
        ReplicaError::Full { .. } => "full",
        ReplicaError::JournalTooSmall { .. } => "journal too small",
        ReplicaError::RollingBack => "rolling back",
        ReplicaError::Poisoned(_) => "poisoned",
        _ => "other",
    }
}
