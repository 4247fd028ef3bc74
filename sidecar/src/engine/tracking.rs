//! What is wrapped around every guest request: mark before write (I1), preserve before overwrite (I3).
//!
//! The fast path is a few atomic operations on the submitting thread. What may wait for a local disk (a cold region's
//! log entry, old content to be read) goes to the pool. A guest write never waits for the peer (I8); a write that
//! slipped past the gate while the side was sealing waits here for the verdict, at most [`HOLD`].

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use watari_core::{
    front::{Errno, Op, Request},
    geometry::{BLOCK_BYTES, Block, DiskIndex, covering},
    tracker::{Admission, Ticket, Tracker},
};
use watari_nbd::local::{Around, LocalFile, Prologue};
use watari_store::{
    maps::MapMemory,
    regions::{Logged, RegionLog, UntrackedReason},
};

use super::{
    latency::GuestLatency,
    preserve::{Full, PreserveStore},
};
use crate::config::HOLD;

/// Pause between two looks at a write that was admitted before the cut and must finish first.
const OLDER_WRITE_POLL: Duration = Duration::from_micros(100);

/// What compression did since it was last looked at.
#[derive(Default)]
pub struct Effort {
    pub content_bytes: AtomicU64,
    pub payload_bytes: AtomicU64,
    pub nanos: AtomicU64,
}

/// Everything that the guest's threads, the sender and the role thread share about tracking.
pub struct Shared {
    pub tracker: Tracker<MapMemory>,
    pub regions: RegionLog,
    pub preserve: PreserveStore,
    /// Old content of the open generation is lost or has no room: the source gives the generation up.
    pub give_up: AtomicBool,
    /// The worker runs without tracking (after repeated crashes).
    pub pass_through: bool,
    /// After the loss of a node: the peer has not yet said whether the region log can be believed. Counts as untracked.
    pub unproven: AtomicBool,
    /// Microseconds that each guest write is slowed down by, so that a move with a deadline converges.
    pub slow_down_micros: AtomicU64,
    /// Guest bytes written since the start of the worker.
    pub written_bytes: AtomicU64,
    /// How long the guest's reads and writes take.
    pub latency: GuestLatency,
    /// What compressing costs.
    pub effort: Effort,
    /// Wakes the source when something is dirty that was not, or a generation must be given up.
    pub wake: Box<dyn Fn() + Send + Sync>,
}

impl Shared {
    /// The pair counts as untracked: marks may be missing.
    pub fn untracked(&self) -> bool {
        // The flag of the map stands while it is unproven, too.
        self.pass_through || self.tracker.maps().facts().untracked()
    }

    fn lose_tracking(&self) {
        self.regions.enter_untracked(UntrackedReason::MapMemory("no memory for a mark".into()));
        self.give_up.store(true, SeqCst);
        (self.wake)();
    }
}

/// What a request carries from its prologue to its epilogue.
pub struct Passage {
    /// `None`: not a write, or not tracked.
    ticket: Option<Ticket>,
    /// Set if this request is timed.
    began: Option<Instant>,
}

/// The wrapper of one disk.
pub struct Tracking {
    pub disk: DiskIndex,
    pub shared: Arc<Shared>,
}

fn writes(request: &Request) -> Option<(Block, Block)> {
    match request.op {
        Op::Write | Op::Discard | Op::WriteZeroes { .. } => covering(request.offset, request.length),
        Op::Read | Op::Flush | Op::Cache => None,
    }
}

impl Around for Tracking {
    type Ticket = Passage;

    fn before(&self, request: &Request) -> Prologue<Passage> {
        let shared = &*self.shared;
        let began = if matches!(request.op, Op::Read | Op::Write) { shared.latency.begin() } else { None };
        let Some((first, last)) = writes(request) else { return Prologue::Go(Passage { ticket: None, began }) };
        if shared.pass_through {
            return Prologue::Go(Passage { ticket: None, began });
        }
        if shared.slow_down_micros.load(Relaxed) > 0 {
            return Prologue::Blocking;
        }
        if shared.tracker.maps().ensure_range(self.disk, first, last).is_err() {
            return Prologue::Blocking;
        }
        match shared.tracker.begin(self.disk, first, last, || shared.regions.is_logged(self.disk, first, last)) {
            Admission::Go(ticket) => {
                if ticket.generation_open && !shared.tracker.frozen_in(self.disk, first, last).is_empty() {
                    // The mark stays; the slow path takes a slot of its own before it preserves and writes.
                    shared.tracker.finish(ticket);
                    return Prologue::Blocking;
                }
                shared.written_bytes.fetch_add(request.length, Relaxed);
                Prologue::Go(Passage { ticket: Some(ticket), began })
            }
            Admission::NotLogged | Admission::Sealed => Prologue::Blocking,
        }
    }

    fn before_blocking(&self, request: &Request, file: &LocalFile) -> Result<Passage, Errno> {
        let shared = &*self.shared;
        let timed = shared.latency.begin();
        let passage = |ticket| Ok(Passage { ticket, began: timed });
        let Some((first, last)) = writes(request) else { return passage(None) };
        let slow = shared.slow_down_micros.load(Relaxed);
        if slow > 0 {
            thread::sleep(Duration::from_micros(slow));
        }
        shared.written_bytes.fetch_add(request.length, Relaxed);
        let began = Instant::now();
        loop {
            if shared.tracker.maps().ensure_range(self.disk, first, last).is_err() {
                shared.lose_tracking();
                return passage(None);
            }
            let untracked = match shared.regions.ensure_logged(self.disk, first, last) {
                Logged::Logged => false,
                Logged::Untracked => true,
            };
            if untracked && !shared.give_up.swap(true, SeqCst) {
                (shared.wake)();
            }
            let logged = || shared.regions.is_logged(self.disk, first, last);
            match shared.tracker.begin(self.disk, first, last, logged) {
                Admission::Go(ticket) => {
                    if ticket.generation_open {
                        self.preserve(&ticket, file);
                    }
                    return passage(Some(ticket));
                }
                // Forgotten between the two looks: log it again.
                Admission::NotLogged => {}
                Admission::Sealed => {
                    if began.elapsed() > HOLD {
                        return Err(Errno::Io);
                    }
                    thread::sleep(Duration::from_millis(5));
                }
            }
        }
    }

    fn after(&self, _: &Request, passage: Passage, result: Result<(), Errno>) -> Result<(), Errno> {
        if let Some(ticket) = passage.ticket {
            self.shared.tracker.finish(ticket);
        }
        self.shared.latency.end(passage.began);
        result
    }
}

impl Tracking {
    /// Keep the old content of the frozen blocks that this write will overwrite. Where that is impossible the
    /// generation is lost, never the write.
    fn preserve(&self, ticket: &Ticket, file: &LocalFile) {
        let shared = &*self.shared;
        let mut content = vec![0; BLOCK_BYTES as usize];
        for extent in shared.tracker.frozen_in(self.disk, ticket.first, ticket.last) {
            for block in (extent.start.0..extent.end().0).map(Block) {
                // A write from before the cut may still be changing it; it is on its way to the disk and will finish.
                while shared.tracker.writes_before_cut(ticket.cut, self.disk, block, block) {
                    thread::sleep(OLDER_WRITE_POLL);
                }
                let kept = read_block(file, block, &mut content).map_err(|_| Full).and_then(|()| {
                    let claim = || shared.tracker.claim_for(ticket, block);
                    shared.preserve.keep(self.disk, block, &content, claim)
                });
                if kept.is_err() {
                    shared.give_up.store(true, SeqCst);
                    (shared.wake)();
                    return;
                }
            }
        }
    }
}

/// Read one block; the last block of a disk that is not a multiple of 4 KiB is padded with zeroes.
pub fn read_block(file: &LocalFile, block: Block, content: &mut [u8]) -> Result<(), Errno> {
    let n = (file.size_bytes() - block.offset()).min(BLOCK_BYTES) as usize;
    content[n..].fill(0);
    file.read_at(block.offset(), &mut content[..n])
}
