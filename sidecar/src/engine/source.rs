//! Source duty: what the active side does beside serving the guest. Drives [`Primary`]; reads and frame building run on
//! reader threads; commits, acknowledgements and the books are the core's.
//!
//! Invariants: **I5** marks and regions are forgotten only in [`Source::disks_synced`]; **I8** nothing here is waited for
//! by the guest. It does not decide roles and owns no connection: the brain brings both.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use watari_core::{
    geometry::{BLOCK_BYTES, Block, DiskIndex, Extent, Generation, GenerationNumber, Sequence, Session, blocks_for},
    handover::Message,
    primary::{Limits, Phase, Primary, Read, Step},
    replica::list::Entry,
};
use watari_wire::replication::{
    CommitPart, CommitResult, Hello, SequenceRange, Superseded, TargetState, commit_result::Outcome,
    control_message::Body,
};

use super::{
    build::{BuildError, Naming, OutFrame},
    convert,
    event::{ControlSender, Event},
    gate::GateDisk,
    stream::{DataPool, Post, message},
    tracking::Shared,
};

mod compare;
mod digests;
mod readers;
mod verify;

use compare::Compare;
use digests::DigestBook;
use readers::{Job, Readers};
pub use verify::{Check, Checked, Verification};

/// Most reads handed out and not yet built, beside the window.
const READS_MAX: usize = 12;
/// Entries of a commit list per message: 5000 × 54 bytes and their bitmaps stay far below a message's limit.
const ENTRIES_PER_PART: usize = 5000;
/// Least room at the target for what remains at a handover, bytes.
const RESERVE_BYTES_MIN: u64 = 256 << 20;
/// Time between two looks for overtaken frames, milliseconds: each walks over all books.
const SUPERSEDE_MILLIS: u64 = 2000;
/// Time between two looks for regions that nobody writes to any more, while nothing is committed.
const SWEEP_PAUSE: Duration = Duration::from_secs(30);

/// Why a first or full synchronisation is needed, in words for people (I9).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FullCompare(pub String);

/// Room at the target, bytes.
#[derive(Clone, Copy, Debug)]
struct PeerRoom {
    bytes: u64,
    journal_limit_bytes: u64,
}

/// See the module's header.
pub struct Source {
    pub primary: Primary,
    shared: Arc<Shared>,
    disks: Arc<Vec<GateDisk>>,
    readers: Readers,
    pub digests: Arc<DigestBook>,
    post: Post,
    /// Frames that are not durable at the peer yet, to be sent again as they are.
    kept: HashMap<Sequence, OutFrame>,
    /// Blocks to be compared by digest before they are sent.
    compare: Compare,
    /// Reads that were handed out.
    outstanding: HashMap<Sequence, Read>,
    link: Option<(ControlSender, DataPool)>,
    reads: usize,
    known_site: Option<bytes::Bytes>,
    /// Generations whose lists this session sent since the last one that was forgotten: one of them may be committed at the
    /// peer without our having heard. Any other came from somebody else.
    listed: Vec<Generation>,
    /// Generations given up, as last looked at.
    given_up: u64,
    /// Generations that somebody waits for, with the number they want committed.
    remainder_told: Option<Generation>,
    next_supersede_millis: u64,
    pub level: Option<i32>,
    epoch: u64,
    session: Session,
    pub full_compare: Option<FullCompare>,
    /// Wake-up that `poll` asked for.
    pub wait_until_millis: u64,
    pub peer_full: String,
    /// What the target can still take, as it said last.
    peer_room: Option<PeerRoom>,
    pub verification: Verification,
    /// When the region log was last looked through; `None` before the first commit of this worker.
    swept: Option<Instant>,
}

/// What the source begins from.
pub struct Begin {
    pub limits: Limits,
    pub epoch: u64,
    pub session: Session,
    pub base: Generation,
    pub next_number: GenerationNumber,
    pub numbers_reserved: GenerationNumber,
    pub level: Option<i32>,
}

/// What the brain must do after a step of the source.
#[derive(Debug, PartialEq)]
pub enum Asked {
    Nothing,
    /// Reserve generation numbers durably, then call [`Source::reserved`].
    Numbers,
    /// Sealed: everything is committed or on its way as this generation.
    Remainder(Generation),
}

impl Source {
    pub fn new(begin: Begin, shared: Arc<Shared>, disks: Arc<Vec<GateDisk>>, post: Post) -> Self {
        let Begin { limits, epoch, session, base, next_number, numbers_reserved, level } = begin;
        let digests: Arc<DigestBook> = Arc::default();
        let readers = Readers::start(&shared, &disks, &digests, &post);
        Source {
            primary: Primary::new(limits, epoch, session, base, next_number, numbers_reserved),
            shared,
            disks,
            readers,
            digests,
            post,
            kept: HashMap::new(),
            compare: Compare::default(),
            outstanding: HashMap::new(),
            link: None,
            reads: 0,
            known_site: None,
            listed: Vec::new(),
            given_up: 0,
            remainder_told: None,
            next_supersede_millis: 0,
            level,
            epoch,
            session,
            full_compare: None,
            wait_until_millis: 0,
            peer_full: String::new(),
            peer_room: None,
            verification: Verification::default(),
            swept: None,
        }
    }

    fn naming(&self) -> Naming {
        Naming { epoch: self.epoch, session: self.session, level: self.level }
    }

    pub fn session(&self) -> Session {
        self.session
    }

    /// Everything may differ: mark it all and compare by digest before sending.
    pub fn compare_everything(&mut self, why: &str) {
        for disk in self.shared.tracker.disk_indices() {
            let blocks = blocks_for(self.disks[usize::from(disk.0)].local().file().size_bytes());
            self.must_compare(disk, 0, blocks);
        }
        self.full_compare = Some(FullCompare(why.to_owned()));
    }

    /// These blocks may differ.
    pub fn must_compare(&mut self, disk: DiskIndex, first: u64, blocks: u64) {
        self.mark_blocks(disk, first, blocks);
        self.compare.set(disk, first, blocks);
    }

    fn mark_blocks(&self, disk: DiskIndex, first: u64, blocks: u64) {
        let (mut at, end) = (first, first + blocks);
        while at < end {
            let n = (end - at).min(1 << 15);
            if self.shared.tracker.maps().ensure_range(disk, Block(at), Block(at + n - 1)).is_err() {
                self.shared.give_up.store(true, SeqCst);
                self.shared.tracker.maps().facts().set_untracked(true);
                return;
            }
            self.shared.tracker.mark(disk, Extent::new(at, n as u32));
            at += n;
        }
    }

    /// The peer has empty images that never had a commit: only what is allocated here needs to cross.
    fn mark_allocated(&mut self) {
        for disk in self.shared.tracker.disk_indices() {
            let file = self.disks[usize::from(disk.0)].local().file();
            let (mut offset, size) = (0, file.size_bytes());
            while offset < size {
                let runs = file.allocation(offset, size - offset).unwrap_or_default();
                if runs.is_empty() {
                    // Cannot say: all of the rest.
                    self.mark_blocks(disk, offset / BLOCK_BYTES, blocks_for(size) - offset / BLOCK_BYTES);
                    break;
                }
                for run in runs {
                    if !run.hole {
                        let (first, end) = (offset / BLOCK_BYTES, blocks_for(offset + run.length));
                        self.mark_blocks(disk, first, end - first);
                    }
                    offset += run.length;
                }
            }
        }
    }

    /// A link stands and its peer takes our frames.
    pub fn link_up(&mut self, now: u64, hello: &Hello, control: ControlSender, data: DataPool, same_history: bool) {
        let committed = convert::generation(hello.committed.unwrap_or_default());
        let base = self.primary.base();
        let (shared, kept) = (self.shared.clone(), &self.kept);
        let ours = hello.session == self.session.0;
        // The same folder as at the last contact of this session: what it has is in our books, the rest is marked.
        let known = self.known_site.as_ref() == Some(&hello.site);
        self.known_site = Some(hello.site.clone());
        let staged = &hello.staged;
        let held = |s: Sequence| staged.iter().any(|r| r.first <= s.0 && s.0 <= r.last);
        let held: Option<&dyn Fn(Sequence) -> bool> = if ours { Some(&held) } else { None };
        self.primary.link_up(now, &shared.tracker, held, committed, &|s| kept.contains_key(&s));
        let awaited = matches!(self.primary.phase(), Phase::Committing { generation, .. } | Phase::Forgetting { generation, .. } if *generation == committed);
        if known && (committed == base || awaited || self.listed.contains(&committed)) {
            if committed != base && !awaited {
                self.primary.rebase(committed);
            }
        } else if hello.virgin {
            // Nothing is there, whatever we sent before: only what is allocated here needs to cross.
            self.primary.rebase(committed);
            self.compare.clear();
            self.mark_allocated();
            if base != Generation::default() {
                self.full_compare = Some(FullCompare("the peer's replica is new and empty".into()));
            }
        } else if !same_history {
            self.primary.rebase(committed);
            self.compare_everything("the two sites share no common history");
        } else if committed.number < base.number && !awaited {
            self.primary.rebase(committed);
            self.compare_everything("the peer's folder is behind what it had committed: restored from an old copy?");
        } else if committed != base && !awaited {
            // It committed and the word of it was lost with our former worker: our marks cover more, never less.
            self.primary.rebase(committed);
        }
        self.digests.link(Some(control.clone()));
        self.remainder_told = None;
        self.link = Some((control, data));
    }

    pub fn link_down(&mut self) {
        self.primary.link_down();
        self.digests.link(None);
        self.link = None;
        self.peer_room = None;
    }

    pub fn linked(&self) -> bool {
        self.link.is_some()
    }

    pub fn send(&self, body: Body) {
        if let Some((control, _)) = &self.link {
            // A closed link is reported by itself.
            let _ = control.send(message(body));
        }
    }

    pub fn send_handover(&self, m: &Message) {
        self.send(Body::Handover(convert::handover(m)));
    }

    /// The target said how it is.
    pub fn target_state(&mut self, state: &TargetState) {
        self.peer_full.clone_from(&state.full);
        self.primary.block(!state.full.is_empty());
        let journal = state.journal_limit_bytes.saturating_sub(state.journal_bytes);
        let bytes = journal.min(state.free_bytes).min(state.images_free_bytes);
        self.peer_room = Some(PeerRoom { bytes, journal_limit_bytes: state.journal_limit_bytes });
    }

    /// Why the target has too little room for a handover now: it must be able to take twice what is dirty, at least
    /// [`RESERVE_BYTES_MIN`] or half of its journal, and never more than the disks and what names their blocks could need
    /// (design §3.5, 1). `None`: it has, or has not said.
    pub fn reserve_missing(&self) -> Option<String> {
        let room = self.peer_room?;
        let tracker = &self.shared.tracker;
        let dirty = tracker.current_blocks() + tracker.frozen_blocks() + self.shared.preserve.blocks();
        let whole: u64 = self.disks.iter().map(|d| d.local().file().size_bytes()).sum();
        let least = RESERVE_BYTES_MIN.min(room.journal_limit_bytes / 2);
        let needed = (2 * dirty * BLOCK_BYTES).max(least).min(whole + whole / 16);
        (room.bytes < needed).then(|| {
            format!("the target has room for {} bytes, a handover needs {needed} (twice what is dirty)", room.bytes)
        })
    }

    pub fn reserved(&mut self, until: GenerationNumber) {
        self.primary.numbers_reserved(until);
    }

    /// A read became frames.
    pub fn built(&mut self, now: u64, read: Sequence, frames: Result<Vec<OutFrame>, BuildError>) {
        self.reads -= 1;
        let outstanding = self.outstanding.remove(&read);
        match frames {
            // Built under an epoch that is over: the target takes none of it.
            Ok(frames) if frames.iter().any(|f| f.header.epoch != self.epoch) => {
                self.primary.frames_built(now, read, &[]);
                for frame in frames {
                    for e in &frame.header.extents {
                        self.shared.tracker.mark(frame.header.disk, *e);
                        self.shared.tracker.unstage(frame.header.disk, *e);
                    }
                }
            }
            Ok(frames) => {
                if let Some(read) = outstanding {
                    self.compare.done(&read);
                }
                let headers: Vec<_> = frames.iter().map(|f| f.header.clone()).collect();
                self.primary.frames_built(now, read, &headers);
                for frame in frames {
                    if let Some((_, data)) = &self.link {
                        data.send(&frame);
                    }
                    self.kept.insert(frame.header.sequence, frame);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "a read for the peer failed");
                self.primary.frames_built(now, read, &[]);
            }
        }
    }

    pub fn durable(&mut self, now: u64, session: u64, ranges: &[(u64, u64)]) {
        if session != self.session.0 {
            return;
        }
        for (first, last) in ranges {
            self.primary.durable(now, Sequence(*first), Sequence(*last));
        }
        let primary = &self.primary;
        self.kept.retain(|s, _| primary.needs_payload(*s));
    }

    pub fn commit_result(&mut self, now: u64, result: &CommitResult) {
        let generation = convert::generation(result.generation.unwrap_or_default());
        match result.outcome() {
            Outcome::Committed => self.primary.committed(now, generation),
            Outcome::Lacks => {
                let missing: Vec<Sequence> = result.lacks.iter().flat_map(|r| r.first..=r.last).map(Sequence).collect();
                let kept = &self.kept;
                self.primary.lacks(&self.shared.tracker, generation, &missing, &|s| kept.contains_key(&s));
            }
            Outcome::Conflict | Outcome::Unknown => {
                tracing::error!(text = result.text, "the target refuses the commit: everything will be compared");
                self.give_up();
                self.compare_everything("the target refused a commit as conflicting");
            }
            Outcome::Full => self.peer_full.clone_from(&result.text),
        }
    }

    /// After the fdatasync that follows this generation's commit: marks and cold regions are forgotten (I5).
    pub fn disks_synced(&mut self, generation: Generation) {
        if !self.primary.forget(&self.shared.tracker, generation) {
            return;
        }
        self.listed.clear();
        self.kept.clear();
        if self.compare.is_empty() {
            self.full_compare = None;
        }
        self.swept = Some(Instant::now());
        self.sweep();
    }

    /// The same without a commit, for a guest that stopped writing. Not before a first commit of this worker: a start may
    /// have regions in the log that no mark speaks of yet.
    pub fn forget_cold_regions(&mut self, now: Instant) {
        let due = self.swept.is_some_and(|swept| now.duration_since(swept) >= SWEEP_PAUSE);
        if due && !self.shared.untracked() && matches!(self.primary.phase(), Phase::Idle) {
            self.swept = Some(now);
            self.sweep();
        }
    }

    /// Forget regions without a mark that nobody wrote to since the last look. A mark goes only after an fdatasync that
    /// followed its commit, so that where none is left everything is durable (I5).
    fn sweep(&self) {
        let tracker = &self.shared.tracker;
        let (cold, _) = self.shared.regions.sweep();
        if !cold.is_empty() {
            // With the gate closed no write is between its look at the log and its mark.
            tracker.with_gate_closed(|| {
                self.shared.regions.forget(&cold, |disk, first, last| !tracker.any_mark(disk, first, last))
            });
        }
    }

    /// This side serves on under another epoch.
    pub fn raise_epoch(&mut self, epoch: u64) {
        if epoch != self.epoch {
            self.epoch = epoch;
            self.primary.raise_epoch(&self.shared.tracker, epoch);
            self.kept.clear();
        }
    }

    pub fn give_up(&mut self) {
        self.primary.abandon(&self.shared.tracker);
        self.shared.preserve.clear();
    }

    /// Do everything that can be done now.
    pub fn pump(&mut self, now: u64) -> Asked {
        if self.shared.give_up.swap(false, SeqCst) {
            tracing::info!("the open generation is given up; what was sent stays useful");
            self.give_up();
        }
        if self.shared.untracked() {
            self.wait_until_millis = u64::MAX;
            return Asked::Nothing;
        }
        loop {
            if self.shared.preserve.lost() {
                self.give_up();
            }
            // The core gives a generation up by itself, too (a link that came back, a lost frame, a new epoch): what was
            // preserved for it belongs to no other.
            if self.given_up != self.primary.counters.given_up {
                self.given_up = self.primary.counters.given_up;
                self.shared.preserve.clear();
            }
            let preserved = self.shared.preserve.blocks();
            if self.reads >= READS_MAX
                && !matches!(self.primary.phase(), Phase::Committing { .. } | Phase::Forgetting { .. })
            {
                break;
            }
            match self.primary.poll(now, &self.shared.tracker, preserved) {
                Step::Cut { generation } => {
                    let cut = self.shared.tracker.cut();
                    self.primary.cut_made(now, &self.shared.tracker, generation, cut);
                    tracing::debug!(%generation, blocks = self.shared.tracker.frozen_blocks(), "cut");
                }
                Step::ReadFrozen { read, cut } => {
                    let compare = self.compare.any(&read);
                    self.push(Job::Frozen { read, cut, compare });
                }
                Step::ReadCurrent { read } => {
                    let compare = self.compare.any(&read);
                    self.push(Job::Current { read, compare });
                }
                Step::SendPreserved { read } => self.push(Job::Preserved { read }),
                Step::Resend(sequence) => {
                    if let (Some(frame), Some((_, data))) = (self.kept.get(&sequence), &self.link) {
                        data.send(frame);
                    }
                }
                Step::Commit { list, cut_at_millis } => {
                    self.listed.push(list.generation);
                    self.send_list(&list.generation, &list.parent, &list.entries, list.root, cut_at_millis);
                }
                Step::SyncDisks { generation } => self.sync_disks(generation),
                Step::Wait { until_millis } => {
                    self.wait_until_millis = until_millis;
                    break;
                }
            }
        }
        self.tell_superseded(now);
        if self.primary.wants_numbers() {
            return Asked::Numbers;
        }
        let dirty =
            self.shared.tracker.current_blocks() + self.shared.tracker.frozen_blocks() + self.shared.preserve.blocks();
        if self.shared.tracker.is_sealed()
            && self.shared.tracker.writes_in_flight() == 0
            && let Some(generation) = self.primary.remainder(dirty)
            && self.remainder_told != Some(generation)
        {
            self.remainder_told = Some(generation);
            return Asked::Remainder(generation);
        }
        Asked::Nothing
    }

    /// While staging goes on without a commit, frames that were overtaken are named, so that the target's journal can
    /// take newer ones in their place.
    fn tell_superseded(&mut self, now: u64) {
        if now < self.next_supersede_millis || *self.primary.phase() != Phase::Idle {
            return;
        }
        self.next_supersede_millis = now + SUPERSEDE_MILLIS;
        let gone = self.primary.superseded(&self.shared.tracker);
        if !gone.is_empty() {
            self.kept.retain(|s, _| !gone.contains(s));
            let ranges = gone.iter().map(|s| SequenceRange { first: s.0, last: s.0 }).collect();
            self.send(Body::Superseded(Superseded { session: self.session.0, ranges }));
        }
    }

    fn push(&mut self, job: Job) {
        self.reads += 1;
        if let Job::Frozen { read, compare: true, .. } | Job::Current { read, compare: true } = &job {
            self.outstanding.insert(read.sequence, read.clone());
        }
        self.readers.push(job, self.naming());
    }

    fn send_list(&self, generation: &Generation, parent: &Generation, entries: &[Entry], root: [u8; 32], cut_at: u64) {
        let chunks: Vec<&[Entry]> =
            if entries.is_empty() { vec![&[]] } else { entries.chunks(ENTRIES_PER_PART).collect() };
        let count = chunks.len();
        for (i, chunk) in chunks.into_iter().enumerate() {
            let mut bytes = Vec::new();
            chunk.iter().for_each(|e| e.encode(&mut bytes));
            let last = i + 1 == count;
            self.send(Body::CommitPart(CommitPart {
                generation: Some(convert::wire_generation(*generation)),
                parent: Some(convert::wire_generation(*parent)),
                entries: bytes.into(),
                last,
                root: if last { root.to_vec().into() } else { bytes::Bytes::new() },
                cut_unix_millis: cut_at,
            }));
        }
    }

    fn sync_disks(&self, generation: Generation) {
        let (disks, post) = (self.disks.clone(), self.post.clone());
        let work = move || {
            let result = disks.iter().try_for_each(|d| d.local().file().flush());
            post(Event::DisksSynced(generation, result.map_err(|e| format!("{e:?}"))));
        };
        if let Err(error) = thread::Builder::new().name("sync".into()).spawn(work) {
            (self.post)(Event::DisksSynced(generation, Err(error.to_string())));
        }
    }
}
