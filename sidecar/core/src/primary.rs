//! The source's generations: what to do next, and what must not be forgotten yet (design §3.2).
//!
//! Invariants: **I4** a commit list is exact: each block is supplied by the newest frame that carries it, once; **I5** frozen
//! and staged marks are dropped only after a durable commit at the target *and* an fdatasync here issued after the
//! cut; **I8** every buffer is bounded by [`Window`] and [`Limits`], and the guest is never asked to wait.
//!
//! Sans-I/O: the shell calls [`Primary::poll`] and performs the [`Step`] it gets, then reports back
//! (`frames_built`, `durable`, `committed`, …). Ordering rules that make later-frame-wins true:
//! sequences are handed out when a read *begins*; a block is in at most one read; a cut is made only while no read is
//! outstanding. It does not read disks, compress, or know about sockets; the tracker holds the marks.

use alloc::{collections::BTreeMap, vec::Vec};

use crate::{
    frame::{FrameHeader, FrameKind},
    geometry::{Block, DiskIndex, Extent, Generation, GenerationNumber, Sequence, Session},
    limits,
    replica::list::{CommitList, Entry, exclude},
    tracker::{Maps, Tracker},
};

mod meeting;
mod window;

pub use window::Window;

/// Sequences reserved for one read: it may become a data, a zero and a same frame.
pub const SEQUENCES_PER_READ: u64 = 3;

/// What may change while running. Times in milliseconds, sizes in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Time between cuts.
    pub interval_millis: u64,
    /// Memory and spill for preserved content: a generation that would need more is given up.
    pub preserve_bytes: u64,
    pub paused: bool,
}

/// How generations follow each other.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Pace {
    /// One per interval.
    Interval,
    /// One after the other: a move is being prepared (design §3.5, *Converging*).
    Generations,
    /// The target's QEMU is there, the seal may come at any moment: what is written is staged at once, and a cut is made
    /// only now and then. So the seal seldom waits for a generation that is on its way, and little is left to apply.
    Staging,
}

/// A frame that was sent and is not committed yet.
#[derive(Clone, Debug)]
struct Book {
    disk: DiskIndex,
    extents: Vec<Extent>,
    crc32: u32,
    digest: [u8; 32],
    wire_bytes: u64,
    durable: bool,
    /// It asserts what the target has; one that was refused would be refused again.
    same: bool,
}

/// What the source is at.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// No generation is open.
    Idle,
    /// The cut is made, frames of it are read and sent.
    Open { generation: Generation, cut: u64, cut_at_millis: u64, total_blocks: u64 },
    /// Everything is sent; the commit list goes (or went) out.
    Committing { generation: Generation, cut_at_millis: u64, list_sent: bool },
    /// Durable at the target; waiting for our own fdatasync before marks are dropped.
    Forgetting { generation: Generation, cut_at_millis: u64, syncing: bool },
}

/// What the shell shall do now.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Call [`Tracker::cut`], note the time, then [`Primary::cut_made`].
    Cut { generation: Generation },
    /// Read frozen extents, claim them, build frames, then [`Primary::frames_built`].
    ReadFrozen { read: Read, cut: u64 },
    /// Take preserved blocks out of the preserve store and build frames from them.
    SendPreserved { read: Read },
    /// [`Tracker::take_current`] has been called for these; read, drop what was overwritten, build frames.
    ReadCurrent { read: Read },
    /// This frame is not at the target although it was sent; its payload is still held by the shell: send it again.
    Resend(Sequence),
    /// Send this commit list.
    Commit { list: CommitList, cut_at_millis: u64 },
    /// fdatasync all disks, then [`Primary::forget`] with this generation.
    SyncDisks { generation: Generation },
    /// Nothing to do before this time (or before an event).
    Wait { until_millis: u64 },
}

/// One read on its way.
#[derive(Clone, Debug, PartialEq)]
pub struct Read {
    pub disk: DiskIndex,
    pub extents: Vec<Extent>,
    /// The first of [`SEQUENCES_PER_READ`] sequences.
    pub sequence: Sequence,
}

/// Progress for reports; nothing is decided from it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counters {
    pub committed: u64,
    pub given_up: u64,
    pub content_bytes: u64,
    pub wire_bytes: u64,
    pub resent_bytes: u64,
    pub durable_bytes: u64,
    pub frames: u64,
}

/// See the module's header.
pub struct Primary {
    pub limits: Limits,
    session: Session,
    epoch: u64,
    next_sequence: u64,
    next_number: u64,
    /// Numbers below this are durably reserved.
    numbers_reserved: u64,
    base: Generation,
    base_cut_millis: u64,
    phase: Phase,
    books: BTreeMap<u64, Book>,
    sent_at: BTreeMap<u64, u64>,
    resend: Vec<Sequence>,
    /// Wire bytes of books that are not durable.
    unacked_bytes: u64,
    linked: bool,
    /// The target takes no frames now (full): nothing new is sent.
    blocked: bool,
    reads: BTreeMap<u64, u64>,
    next_cut_millis: u64,
    demanded: bool,
    pace: Pace,
    sealing: bool,
    /// Early staging is under way: position of the pass.
    pass: Option<(DiskIndex, Block)>,
    /// While staging goes on between cuts: when the next pass begins.
    next_pass_millis: u64,
    /// The current early pass is finished and the next thing is a cut.
    pass_done: bool,
    cursor: (DiskIndex, Block),
    pub window: Window,
    pub counters: Counters,
}

impl Primary {
    /// `base`: the newest generation known to be at the peer; `next_number`: never used before, of which numbers up to
    /// `numbers_reserved` are reserved durably.
    pub fn new(
        limits: Limits,
        epoch: u64,
        session: Session,
        base: Generation,
        next_number: GenerationNumber,
        numbers_reserved: GenerationNumber,
    ) -> Self {
        Primary {
            limits,
            session,
            epoch,
            next_sequence: 1,
            next_number: next_number.0.max(base.number.0 + 1),
            numbers_reserved: numbers_reserved.0,
            base,
            base_cut_millis: 0,
            phase: Phase::Idle,
            books: BTreeMap::new(),
            sent_at: BTreeMap::new(),
            resend: Vec::new(),
            unacked_bytes: 0,
            linked: false,
            blocked: false,
            reads: BTreeMap::new(),
            next_cut_millis: 0,
            demanded: false,
            pace: Pace::Interval,
            sealing: false,
            pass: None,
            next_pass_millis: 0,
            pass_done: false,
            cursor: (DiskIndex(0), Block(0)),
            window: Window::new(),
            counters: Counters::default(),
        }
    }

    pub fn session(&self) -> Session {
        self.session
    }
    pub fn base(&self) -> Generation {
        self.base
    }
    pub fn base_cut_millis(&self) -> u64 {
        self.base_cut_millis
    }
    pub fn phase(&self) -> &Phase {
        &self.phase
    }
    pub fn linked(&self) -> bool {
        self.linked
    }
    pub fn converging(&self) -> bool {
        self.pace != Pace::Interval
    }

    /// A generation is needed now, whatever the interval says.
    pub fn demand_cut(&mut self) {
        self.demanded = true;
    }

    /// From now on generations follow each other at this pace.
    pub fn converge(&mut self, pace: Pace) {
        self.pace = pace;
    }

    /// The guest is gone for good at this epoch (sealed): the next cut is the last and takes everything.
    pub fn seal(&mut self, on: bool) {
        self.sealing = on;
        if on {
            self.demanded = true;
            self.pass = None;
        }
    }

    /// Sealed, and everything up to this generation is committed or its commit list is on its way.
    pub fn remainder(&self, dirty_blocks: u64) -> Option<Generation> {
        if !self.sealing || self.demanded || !self.linked {
            return None;
        }
        match &self.phase {
            Phase::Committing { generation, list_sent: true, .. } | Phase::Forgetting { generation, .. }
                if dirty_blocks == 0 =>
            {
                Some(*generation)
            }
            Phase::Idle if dirty_blocks == 0 && self.books.is_empty() => Some(self.base),
            Phase::Idle | Phase::Open { .. } | Phase::Committing { .. } | Phase::Forgetting { .. } => None,
        }
    }

    /// The preserve store is full, or content of the cut was lost: no consistent point can be made of this cut.
    pub fn abandon<M: Maps>(&mut self, tracker: &Tracker<M>) {
        if matches!(self.phase, Phase::Open { .. } | Phase::Committing { .. }) {
            tracker.give_up();
            self.counters.given_up += 1;
            self.phase = Phase::Idle;
            self.demanded = true;
            self.pass = None;
            // Stage early first: the next cut then has less to preserve.
            self.pass_done = false;
        }
    }

    // ---- what the shell reports

    pub fn cut_made<M: Maps>(&mut self, now: u64, tracker: &Tracker<M>, generation: Generation, cut: u64) {
        assert_eq!(self.phase, Phase::Idle, "a cut begins a generation");
        self.next_number = generation.number.0 + 1;
        self.demanded = false;
        self.pass = None;
        self.pass_done = false;
        self.cursor = (DiskIndex(0), Block(0));
        self.next_cut_millis = now + self.limits.interval_millis;
        self.phase = Phase::Open { generation, cut, cut_at_millis: now, total_blocks: tracker.frozen_blocks() };
    }

    /// A read became these frames (none, if everything was overwritten meanwhile). Their staged marks are set.
    pub fn frames_built(&mut self, now: u64, read: Sequence, frames: &[FrameHeader]) {
        self.reads.remove(&read.0);
        for f in frames {
            let wire_bytes = u64::from(f.payload_bytes) + limits::FRAME_OVERHEAD_BYTES;
            self.counters.content_bytes += f.content_bytes;
            self.counters.wire_bytes += wire_bytes;
            self.counters.frames += 1;
            self.unacked_bytes += wire_bytes;
            let book = Book {
                disk: f.disk,
                extents: f.extents.clone(),
                crc32: f.crc32,
                digest: f.digest,
                wire_bytes,
                durable: false,
                same: f.kind == FrameKind::Same,
            };
            self.books.insert(f.sequence.0, book);
            self.sent_at.insert(f.sequence.0, now);
        }
    }

    /// The target holds these durably.
    pub fn durable(&mut self, now: u64, first: Sequence, last: Sequence) {
        let mut bytes = 0;
        let mut delay = None;
        for s in self.books.range(first.0..=last.0).map(|(s, _)| *s).collect::<Vec<_>>() {
            bytes += self.mark_durable(s);
            // A clock that was set back meanwhile says nothing.
            if let Some(took) = self.sent_at.remove(&s).and_then(|at| now.checked_sub(at)) {
                delay = Some(delay.map_or(took, |d: u64| d.min(took)));
            }
        }
        self.counters.durable_bytes += bytes;
        if bytes > 0 {
            let limited = self.bytes_in_flight() + bytes > self.window.bytes() / 2;
            self.window.delivered(now, bytes, delay, limited);
        }
    }

    fn mark_durable(&mut self, sequence: u64) -> u64 {
        match self.books.get_mut(&sequence) {
            Some(b) if !b.durable => {
                b.durable = true;
                self.unacked_bytes -= b.wire_bytes;
                b.wire_bytes
            }
            _ => 0,
        }
    }

    /// Whether a frame needs to be kept in memory for sending it again.
    pub fn needs_payload(&self, sequence: Sequence) -> bool {
        self.books.get(&sequence.0).is_some_and(|b| !b.durable)
    }

    /// The target committed `generation` durably.
    pub fn committed(&mut self, _now: u64, generation: Generation) {
        if let Phase::Committing { generation: g, cut_at_millis, .. } = self.phase
            && g == generation
        {
            self.phase = Phase::Forgetting { generation, cut_at_millis, syncing: false };
            return;
        }
        // The answer for a generation that was given up while its list was under way: the next list must follow it.
        // What it held stays marked, so nothing is forgotten.
        if generation.number > self.base.number && !matches!(self.phase, Phase::Forgetting { .. }) {
            self.base = generation;
            if let Phase::Committing { list_sent, .. } = &mut self.phase {
                *list_sent = false;
            }
        }
    }

    /// The target lacks these frames of the list.
    pub fn lacks<M: Maps>(
        &mut self,
        tracker: &Tracker<M>,
        generation: Generation,
        missing: &[Sequence],
        kept_payload: &dyn Fn(Sequence) -> bool,
    ) {
        let Phase::Committing { generation: g, cut_at_millis, .. } = self.phase else { return };
        if g != generation {
            return;
        }
        self.phase = Phase::Committing { generation, cut_at_millis, list_sent: false };
        let (again, gone): (Vec<Sequence>, Vec<Sequence>) = missing.iter().partition(|s| {
            let may_repeat = self.books.get(&s.0).is_some_and(|b| !b.durable && !b.same);
            may_repeat && kept_payload(**s)
        });
        self.resend.extend(again);
        self.lose(tracker, &gone.iter().map(|s| s.0).collect::<Vec<_>>());
    }

    /// Whether marks wait for exactly the sync of this generation. One that began for another generation says nothing:
    /// what the present one holds may have been written after it.
    pub fn awaits_sync(&self, of: Generation) -> bool {
        matches!(self.phase, Phase::Forgetting { generation, .. } if generation == of)
    }

    /// The disks were synced after the [`Step::SyncDisks`] of this generation (I5): drop the marks. `false`: nothing waits for
    /// that sync any more, and nothing was forgotten.
    pub fn forget<M: Maps>(&mut self, tracker: &Tracker<M>, of: Generation) -> bool {
        let Phase::Forgetting { generation, cut_at_millis, .. } = self.phase else { return false };
        if generation != of {
            return false;
        }
        for book in core::mem::take(&mut self.books).into_values() {
            for e in &book.extents {
                tracker.unstage(book.disk, *e);
            }
        }
        self.sent_at.clear();
        self.resend.clear();
        self.unacked_bytes = 0;
        self.base = generation;
        self.base_cut_millis = cut_at_millis;
        self.counters.committed += 1;
        self.phase = Phase::Idle;
        true
    }

    /// The record now reserves numbers below `until`.
    pub fn numbers_reserved(&mut self, until: GenerationNumber) {
        self.numbers_reserved = until.0;
    }

    /// The next cut would need a number that is not reserved yet.
    pub fn wants_numbers(&self) -> bool {
        self.next_number >= self.numbers_reserved
    }

    pub fn next_number(&self) -> GenerationNumber {
        GenerationNumber(self.next_number)
    }

    pub fn bytes_in_flight(&self) -> u64 {
        self.unacked_bytes + self.reads.values().sum::<u64>()
    }

    /// Bytes of the open generation (or the early staging) that are sent and not yet durable, for progress.
    pub fn books_bytes(&self) -> u64 {
        self.books.values().map(|b| b.extents.iter().map(|e| e.bytes()).sum::<u64>()).sum()
    }

    // ---- what to do next

    /// `preserved_blocks`: blocks in the preserve store that have not been sent.
    pub fn poll<M: Maps>(&mut self, now: u64, tracker: &Tracker<M>, preserved_blocks: u64) -> Step {
        if !self.linked || self.blocked || self.limits.paused && !self.sealing {
            return Step::Wait { until_millis: u64::MAX };
        }
        if let Some(sequence) = self.resend.pop()
            && let Some(book) = self.books.get(&sequence.0)
        {
            self.counters.resent_bytes += book.wire_bytes;
            self.sent_at.insert(sequence.0, now);
            return Step::Resend(sequence);
        }
        let room = self.bytes_in_flight() + limits::FRAME_BYTES_MAX / 4 <= self.window.bytes();
        match self.phase.clone() {
            Phase::Idle => self.poll_idle(now, tracker, room),
            Phase::Open { generation, cut, cut_at_millis, .. } => {
                if room {
                    if preserved_blocks * crate::geometry::BLOCK_BYTES > self.limits.preserve_bytes / 2 {
                        return self.send_preserved();
                    }
                    if let Some(step) = self.read_frozen(tracker, cut) {
                        return step;
                    }
                    if preserved_blocks > 0 {
                        return self.send_preserved();
                    }
                }
                if self.reads.is_empty() && tracker.frozen_blocks() == 0 && preserved_blocks == 0 {
                    tracker.close_generation();
                    self.phase = Phase::Committing { generation, cut_at_millis, list_sent: false };
                    return self.poll(now, tracker, preserved_blocks);
                }
                Step::Wait { until_millis: u64::MAX }
            }
            Phase::Committing { generation, cut_at_millis, list_sent } => {
                if list_sent || !self.resend.is_empty() {
                    return Step::Wait { until_millis: u64::MAX };
                }
                self.phase = Phase::Committing { generation, cut_at_millis, list_sent: true };
                Step::Commit { list: self.list(generation), cut_at_millis }
            }
            Phase::Forgetting { generation, cut_at_millis, syncing } => {
                if syncing {
                    return Step::Wait { until_millis: u64::MAX };
                }
                self.phase = Phase::Forgetting { generation, cut_at_millis, syncing: true };
                Step::SyncDisks { generation }
            }
        }
    }

    fn poll_idle<M: Maps>(&mut self, now: u64, tracker: &Tracker<M>, room: bool) -> Step {
        // The clock was set back: nothing may wait for the time that it showed.
        self.next_cut_millis = self.next_cut_millis.min(now + self.limits.interval_millis);
        self.next_pass_millis = self.next_pass_millis.min(now + limits::CONVERGING_PAUSE_MILLIS);
        let dirty_bytes = tracker.current_blocks() * crate::geometry::BLOCK_BYTES;
        let clean = dirty_bytes == 0 && self.books.is_empty() && self.reads.is_empty();
        if self.sealing && clean {
            // Everything the guest ever wrote is in the base: that is the remainder.
            self.demanded = false;
            return Step::Wait { until_millis: u64::MAX };
        }
        if clean
            && !self.demanded
            && now >= self.next_cut_millis
            && self.base != Generation::default()
            && !writing(tracker)
        {
            // Nothing was written: the base *is* this point in time. An empty generation would only push real ones out
            // of the target's history.
            self.base_cut_millis = now;
            self.next_cut_millis = now + self.limits.interval_millis;
        }
        let made_at = self.next_cut_millis.saturating_sub(self.limits.interval_millis);
        let until = match self.pace {
            _ if clean => self.next_cut_millis,
            Pace::Interval => self.next_cut_millis,
            Pace::Generations => self.next_cut_millis.min(made_at + limits::CONVERGING_PAUSE_MILLIS),
            Pace::Staging => self.next_cut_millis.min(made_at + limits::STAGING_CUT_MILLIS),
        };
        if !self.demanded && !self.sealing && now < until {
            if self.pace == Pace::Staging
                && room
                && now >= self.next_pass_millis
                && let Some(step) = self.stage_on(now, tracker)
            {
                return step;
            }
            // Something may become dirty meanwhile; while converging that is looked for again soon.
            let soon = if self.converging() { now + limits::CONVERGING_PAUSE_MILLIS } else { u64::MAX };
            return Step::Wait { until_millis: until.min(soon) };
        }
        // Much to send: stage a first pass before the cut, so that little is left to preserve during the generation.
        let early = !self.sealing && !self.pass_done && dirty_bytes > self.limits.preserve_bytes / 2;
        if early {
            if !room {
                return Step::Wait { until_millis: u64::MAX };
            }
            if let Some(step) = self.read_current(tracker) {
                return step;
            }
            self.pass_done = true;
        }
        if !self.reads.is_empty() || self.wants_numbers() {
            return Step::Wait { until_millis: u64::MAX };
        }
        Step::Cut { generation: Generation { number: GenerationNumber(self.next_number), epoch: self.epoch } }
    }

    /// One read of the pass that is under way, or the first of a new one. A block that is written again and again goes
    /// once per pass, and passes keep a pause.
    fn stage_on<M: Maps>(&mut self, now: u64, tracker: &Tracker<M>) -> Option<Step> {
        let step = self.read_current(tracker);
        if step.is_none() {
            self.next_pass_millis = now + limits::CONVERGING_PAUSE_MILLIS;
        }
        step
    }

    fn frame_blocks(&self) -> u64 {
        // A quarter of the window, so that several frames are under way and a cut costs little.
        let bytes = (self.window.bytes() / 4).clamp(limits::FRAME_BYTES_MAX / 8, limits::FRAME_BYTES_MAX);
        bytes / crate::geometry::BLOCK_BYTES
    }

    fn begin_read(&mut self, disk: DiskIndex, extents: Vec<Extent>) -> Read {
        let sequence = Sequence(self.next_sequence);
        self.next_sequence += SEQUENCES_PER_READ;
        let bytes = extents.iter().map(|e| e.bytes()).sum();
        self.reads.insert(sequence.0, bytes);
        Read { disk, extents, sequence }
    }

    fn send_preserved(&mut self) -> Step {
        let read = self.begin_read(DiskIndex(0), Vec::new());
        self.reads.insert(read.sequence.0, limits::FRAME_BYTES_MAX);
        Step::SendPreserved { read }
    }

    fn read_frozen<M: Maps>(&mut self, tracker: &Tracker<M>, cut: u64) -> Option<Step> {
        let (from, blocks) = (self.cursor, self.frame_blocks());
        let found = next_extents(tracker, from, blocks, Tracker::frozen_from);
        match found {
            Some((disk, extents)) => {
                self.cursor = (disk, after(&extents));
                Some(Step::ReadFrozen { read: self.begin_read(disk, extents), cut })
            }
            None => {
                // Blocks whose read failed or that came back are found by another round, once the reads are in.
                if self.reads.is_empty() && tracker.frozen_blocks() > 0 {
                    self.cursor = (DiskIndex(0), Block(0));
                }
                None
            }
        }
    }

    fn read_current<M: Maps>(&mut self, tracker: &Tracker<M>) -> Option<Step> {
        let mut from = self.pass.unwrap_or((DiskIndex(0), Block(0)));
        loop {
            let Some((disk, extents)) = next_extents(tracker, from, self.frame_blocks(), Tracker::current_from) else {
                self.pass = None;
                return None;
            };
            from = (disk, after(&extents));
            self.pass = Some(from);
            let taken = tracker.take_current(disk, &extents);
            if !taken.is_empty() {
                return Some(Step::ReadCurrent { read: self.begin_read(disk, taken) });
            }
        }
    }

    /// The exact list (I4): every frame in the books, each block from the newest frame that has it.
    fn list(&self, generation: Generation) -> CommitList {
        let mut seen: BTreeMap<(DiskIndex, u64), u64> = BTreeMap::new();
        let mut entries = Vec::with_capacity(self.books.len());
        for (s, book) in self.books.iter().rev() {
            let mut excluded = Vec::new();
            let (mut index, mut all) = (0, true);
            for e in &book.extents {
                for b in e.start.0..e.end().0 {
                    let word = seen.entry((book.disk, b / 64)).or_insert(0);
                    if *word >> (b % 64) & 1 == 1 {
                        exclude(&mut excluded, index);
                    } else {
                        *word |= 1 << (b % 64);
                        all = false;
                    }
                    index += 1;
                }
            }
            // A frame of which nothing counts is left out; the target reclaims it.
            if !all {
                let (session, sequence) = (self.session, Sequence(*s));
                entries.push(Entry { session, sequence, crc32: book.crc32, digest: book.digest, excluded });
            }
        }
        entries.reverse();
        CommitList::new(generation, self.base, entries)
    }
}

/// A write is between its admission and the disk. (Its mark came first; this also covers one that was admitted just now.)
fn writing<M: Maps>(tracker: &Tracker<M>) -> bool {
    tracker.writes_in_flight() > 0 || tracker.current_blocks() > 0
}

fn after(extents: &[Extent]) -> Block {
    extents.last().map_or(Block(0), |e| e.end())
}

fn next_extents<M: Maps>(
    tracker: &Tracker<M>,
    from: (DiskIndex, Block),
    blocks: u64,
    scan: impl Fn(&Tracker<M>, DiskIndex, Block, u64) -> Vec<Extent>,
) -> Option<(DiskIndex, Vec<Extent>)> {
    for disk in tracker.disk_indices().skip(usize::from(from.0.0)) {
        let start = if disk == from.0 { from.1 } else { Block(0) };
        let extents = scan(tracker, disk, start, blocks);
        if !extents.is_empty() {
            return Some((disk, extents));
        }
    }
    None
}

#[cfg(test)]
#[path = "primary_tests.rs"]
mod tests;
