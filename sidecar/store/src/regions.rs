//! The region log: which regions may be dirty, durable before the first write to a clean region (invariant I1).
//!
//! Invariant I8: a guest write waits for the metadata folder at most [`LOG_WAIT`], once; then the pair is `Untracked`
//! (everything counts as dirty), which is entered in memory that survives the worker before the waiting write returns.
//! Invariant I5 is the caller's: it forgets regions only after a commit durable at the target and an fdatasync here.
//!
//! Three bitmaps, one bit per region:
//! `intent` (what the log shall hold), `durable` (what it holds whatever happens), `logged` (what a writer may rely on,
//! read without a lock). Under the lock always `logged ⊆ intent ∩ durable`.
//!
//! **Forgetting never races with a write.** [`RegionLog::forget`] first clears the `logged` bit, then asks whether the
//! region is free of marks and writes in flight, and only then clears `intent`; the sector is written later. A writer
//! that asks [`RegionLog::is_logged`] after the clearing sees it and logs again; one that asked before has either marked
//! already (the question finds the mark), or the caller holds the admission gate closed so that there is no such
//! writer. With marks made by SeqCst operations *before* the question no gate is needed: one of the two sees the other.
//!
//! It does not know what the marks are, and it does not decide what a log means at a start (see `trust`).

mod medium;
mod writer;

use std::collections::BTreeSet;
use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use watari_core::geometry::{Block, DiskIndex};
use watari_core::regions::log::SECTOR_WORDS;
use watari_core::regions::{RegionLayout, RegionSet};

use crate::maps::MapMemory;
pub use medium::{FileMedium, LOG_NAME, LogUnusable, RegionMedium, read_log};
use writer::Writer;

/// Longest wait of a guest write for the log: half of what a guest calls a hung disk at its most impatient, and a
/// hundred times what a healthy folder needs.
pub const LOG_WAIT: Duration = Duration::from_secs(1);
/// Forgotten regions are written after this long at the latest, so that many of them share one sync.
pub const FORGET_DELAY: Duration = Duration::from_secs(5);
/// Time between two heartbeats in the log: one small sync that shows, after the loss of a node, until when the log worked.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);
/// Regions logged ahead of a writer that walks upwards (64 MiB): one sync per 64 MiB instead of one per region.
pub const LOOK_AHEAD: usize = 16;
/// Regions per call of [`RegionLog::forget`]: bounds how long the caller's gate stays closed (some 100 µs).
pub const FORGET_REGIONS_MAX: usize = 256;

/// May the write go on, and on what terms?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "in Untracked everything counts as dirty"]
pub enum Logged {
    /// Its regions are durably in the log.
    Logged,
    /// The pair is `Untracked`; the write goes on unlogged.
    Untracked,
}

/// Why the pair is `Untracked`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum UntrackedReason {
    /// The log hung, failed, or could not be begun. The marks in memory are complete.
    Log(String),
    /// There was no memory for a mark: the marks are not complete.
    MapMemory(String),
}

/// What the caller knows when it leaves `Untracked`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MarksProof {
    /// Every write was marked all the time, only not logged.
    WereKept,
    /// Every block was marked, or compared by digest with the replica, after memory was there again.
    Rebuilt,
}

/// Why `Untracked` cannot be left.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LeaveError {
    #[error("the pair is not Untracked")]
    NotUntracked,
    #[error("marks are missing since there was no memory for them: compare or mark every block first")]
    MarksIncomplete,
    #[error("no thread for the region log: {0}")]
    Thread(String),
}

/// Where `Untracked` is entered so that it survives the worker. Called with a lock held: must not block, and must be
/// entered when `enter` returns. May pass the news on (status, peer) without waiting.
pub trait UntrackedSink: Send + Sync {
    fn enter(&self, reason: &UntrackedReason);
    fn leave(&self);
}

impl UntrackedSink for MapMemory {
    fn enter(&self, _reason: &UntrackedReason) {
        self.facts().set_untracked(true);
    }
    fn leave(&self) {
        self.facts().set_untracked(false);
    }
}

/// For status and metrics.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RegionReport {
    pub regions: usize,
    pub logged: usize,
    pub untracked: Option<UntrackedReason>,
    /// The log has failed but no write has needed it since.
    pub failed: Option<String>,
    /// Last durable heartbeat: to be told to the peer together with [`RegionReport::log_id`].
    pub heartbeat: u64,
    pub log_id: u64,
    pub syncs: u64,
    /// Longest that a write waited for the log.
    pub longest_wait: Duration,
}

struct State {
    intent: Vec<u64>,
    durable: Vec<u64>,
    /// Sectors that somebody waits for, and sectors that only forget.
    urgent: BTreeSet<usize>,
    lazy: BTreeSet<usize>,
    forget_at: Option<Instant>,
    writing: bool,
    /// The current writer; 0 is none.
    writer: u64,
    stopping: bool,
    failed: Option<String>,
    untracked: Option<UntrackedReason>,
    log_id: u64,
    heartbeat: u64,
    next_beat: Instant,
    syncs: u64,
    longest_wait: Duration,
    /// Where the next sweep for cold regions begins.
    sweep_word: usize,
}

impl State {
    fn sector_words(sector: usize, words: usize) -> Range<usize> {
        sector * SECTOR_WORDS..((sector + 1) * SECTOR_WORDS).min(words)
    }
    fn has(words: &[u64], number: usize) -> bool {
        words[number / 64] & (1 << (number % 64)) != 0
    }
}

struct Shared {
    layout: RegionLayout,
    logged: Vec<AtomicU64>,
    /// Regions written to since the last sweep: hot ones stay logged.
    touched: Vec<AtomicU64>,
    untracked: AtomicBool,
    state: Mutex<State>,
    /// Something became durable, failed, or the pair went Untracked.
    settled: Condvar,
    /// There is something for the writer.
    work: Condvar,
    sink: Arc<dyn UntrackedSink>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The lock guards single assignments; a panic ends the process anyway (panic = abort).
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, on: &Condvar, state: MutexGuard<'a, State>, most: Duration) -> MutexGuard<'a, State> {
        on.wait_timeout(state, most).unwrap_or_else(PoisonError::into_inner).0
    }

    fn enter_untracked(&self, state: &mut State, reason: UntrackedReason) {
        match (&state.untracked, &reason) {
            (None, _) | (Some(UntrackedReason::Log(_)), UntrackedReason::MapMemory(_)) => {}
            _ => return,
        }
        self.sink.enter(&reason);
        state.untracked = Some(reason);
        self.untracked.store(true, SeqCst);
        self.settled.notify_all();
        self.work.notify_all();
    }
}

/// Run `work`, which may hang on the metadata folder, in a thread of its own for at most `limit`; `None` when it did not
/// come back in time (the thread ends when the folder answers). For beginnings: reading the log and the trust record,
/// [`FileMedium::create`] and `trust::begin_start` under a QEMU that waits for its restarted worker.
pub fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (done, result) = std::sync::mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name("metadata-folder".into())
        .spawn(move || {
            // Nobody waits any more when this fails.
            let _ = done.send(work());
        })
        .ok()?;
    result.recv_timeout(limit).ok()
}

/// The region log of one pair. All methods may be called from any thread.
pub struct RegionLog {
    shared: Arc<Shared>,
}

impl RegionLog {
    /// Begin on a complete, durable log (made by [`FileMedium::create`]) that holds `regions` and has identity `log_id`.
    pub fn start(
        medium: Box<dyn RegionMedium>,
        log_id: u64,
        layout: RegionLayout,
        regions: &RegionSet,
        sink: Arc<dyn UntrackedSink>,
    ) -> Result<RegionLog, LeaveError> {
        let log = Self::without_log(layout, sink);
        log.attach(&mut log.shared.lock(), medium, log_id, regions.words())?;
        Ok(log)
    }

    /// Begin `Untracked`: there is no log now (the folder hangs or fails at a worker's restart, and the guest must go on).
    pub fn start_untracked(layout: RegionLayout, reason: UntrackedReason, sink: Arc<dyn UntrackedSink>) -> RegionLog {
        let log = Self::without_log(layout, sink);
        log.enter_untracked(reason);
        log
    }

    fn without_log(layout: RegionLayout, sink: Arc<dyn UntrackedSink>) -> RegionLog {
        let words = layout.words();
        let atomics = || (0..words).map(|_| AtomicU64::new(0)).collect();
        let state = State {
            intent: vec![0; words],
            durable: vec![0; words],
            urgent: BTreeSet::new(),
            lazy: BTreeSet::new(),
            forget_at: None,
            writing: false,
            writer: 0,
            stopping: false,
            failed: None,
            untracked: None,
            log_id: 0,
            heartbeat: 0,
            next_beat: Instant::now() + HEARTBEAT_INTERVAL,
            syncs: 0,
            longest_wait: Duration::ZERO,
            sweep_word: 0,
        };
        RegionLog {
            shared: Arc::new(Shared {
                layout,
                logged: atomics(),
                touched: atomics(),
                untracked: AtomicBool::new(false),
                state: Mutex::new(state),
                settled: Condvar::new(),
                work: Condvar::new(),
                sink,
            }),
        }
    }

    /// Put a complete log under this state and start its writer; an older writer, which may hang, is left behind.
    fn attach(
        &self,
        state: &mut State,
        medium: Box<dyn RegionMedium>,
        log_id: u64,
        words: &[u64],
    ) -> Result<(), LeaveError> {
        let number = state.writer + 1;
        let writer = Writer { shared: Arc::clone(&self.shared), medium, log_id, number };
        std::thread::Builder::new()
            .name("region-log".into())
            .spawn(move || writer.run())
            .map_err(|e| LeaveError::Thread(e.to_string()))?;
        // The new thread waits for the lock that we hold; it finds the state complete.
        state.writer = number;
        state.intent.copy_from_slice(words);
        state.durable.copy_from_slice(words);
        state.urgent.clear();
        state.lazy.clear();
        state.forget_at = None;
        state.writing = false;
        state.failed = None;
        state.log_id = log_id;
        state.heartbeat = 0;
        state.next_beat = Instant::now() + HEARTBEAT_INTERVAL;
        for (logged, word) in self.shared.logged.iter().zip(words) {
            logged.store(*word, SeqCst);
        }
        Ok(())
    }

    /// Whether a write to the blocks `first..=last` may go on now: its regions are logged, or the pair is `Untracked`.
    /// On every guest write: a few loads of memory, never a wait.
    #[inline]
    pub fn is_logged(&self, disk: DiskIndex, first: Block, last: Block) -> bool {
        let shared = &*self.shared;
        let all = shared.layout.numbers(disk, first, last).all(|number| {
            let (word, bit) = (number / 64, 1 << (number % 64));
            if shared.touched[word].load(Relaxed) & bit == 0 {
                shared.touched[word].fetch_or(bit, Relaxed);
            }
            // SeqCst for the forgetting protocol (see the module's header); a plain load on x86-64.
            shared.logged[word].load(SeqCst) & bit != 0
        });
        all || shared.untracked.load(Acquire)
    }

    /// Make the regions of the blocks `first..=last` durable in the log, waiting for at most [`LOG_WAIT`].
    ///
    /// # Panics
    /// If the blocks do not lie on the disk.
    #[inline]
    pub fn ensure_logged(&self, disk: DiskIndex, first: Block, last: Block) -> Logged {
        if !self.is_logged(disk, first, last) {
            return self.log_and_wait(self.shared.layout.numbers(disk, first, last), disk);
        }
        if self.shared.untracked.load(Acquire) { Logged::Untracked } else { Logged::Logged }
    }

    #[cold]
    fn log_and_wait(&self, numbers: RangeInclusive<usize>, disk: DiskIndex) -> Logged {
        let shared = &*self.shared;
        let begin = Instant::now();
        let mut state = shared.lock();
        self.want_ahead(&mut state, &numbers, disk);
        let result = loop {
            if state.untracked.is_some() {
                break Logged::Untracked;
            }
            if self.want(&mut state, numbers.clone()) {
                break Logged::Logged;
            }
            let waited = begin.elapsed();
            if let Some(reason) = state.failed.clone() {
                shared.enter_untracked(&mut state, UntrackedReason::Log(reason));
            } else if waited >= LOG_WAIT {
                let reason = format!("the metadata folder did not make the region log durable within {LOG_WAIT:?}");
                shared.enter_untracked(&mut state, UntrackedReason::Log(reason));
            } else {
                shared.work.notify_all();
                state = shared.wait(&shared.settled, state, LOG_WAIT - waited);
            }
        };
        state.longest_wait = state.longest_wait.max(begin.elapsed());
        result
    }

    /// Ask for these regions; `true` when all are durable, and then also logged.
    fn want(&self, state: &mut State, numbers: RangeInclusive<usize>) -> bool {
        let mut all = true;
        for number in numbers {
            let (word, bit) = (number / 64, 1u64 << (number % 64));
            if state.intent[word] & bit == 0 {
                state.intent[word] |= bit;
                if state.durable[word] & bit == 0 {
                    state.urgent.insert(word / SECTOR_WORDS);
                }
            }
            if state.durable[word] & bit != 0 {
                self.shared.logged[word].fetch_or(bit, SeqCst);
            } else {
                all = false;
            }
        }
        all
    }

    /// A writer that walks upwards will need the next regions soon: let them share this sync.
    fn want_ahead(&self, state: &mut State, numbers: &RangeInclusive<usize>, disk: DiskIndex) {
        let layout = &self.shared.layout;
        let follows = numbers
            .start()
            .checked_sub(1)
            .is_some_and(|before| layout.region(before).disk == disk && State::has(&state.durable, before));
        if follows && state.untracked.is_none() {
            let end = (numbers.end() + 1 + LOOK_AHEAD).min(layout.regions());
            let ahead = (numbers.end() + 1..end).take_while(|&n| layout.region(n).disk == disk).last();
            if let Some(last) = ahead {
                self.want(state, numbers.end() + 1..=last);
            }
        }
    }

    /// Go `Untracked`, e.g. because there is no memory for marks. Entered in the sink when this returns. Sticky.
    pub fn enter_untracked(&self, reason: UntrackedReason) {
        self.shared.enter_untracked(&mut self.shared.lock(), reason);
    }

    pub fn is_untracked(&self) -> bool {
        self.shared.untracked.load(Acquire)
    }

    /// Leave `Untracked` by a complete new log: `medium` durably holds *every* region ([`RegionSet::all`]) under the
    /// identity `log_id`. So a write that was let through unlogged a moment ago is in it too. The caller then proves
    /// regions clean, by digest or commit, and forgets them.
    pub fn leave_untracked(
        &self,
        medium: Box<dyn RegionMedium>,
        log_id: u64,
        marks: MarksProof,
    ) -> Result<(), LeaveError> {
        let mut state = self.shared.lock();
        match (&state.untracked, marks) {
            (None, _) => return Err(LeaveError::NotUntracked),
            (Some(UntrackedReason::MapMemory(_)), MarksProof::WereKept) => return Err(LeaveError::MarksIncomplete),
            _ => {}
        }
        let all = RegionSet::all(&self.shared.layout);
        self.attach(&mut state, medium, log_id, all.words())?;
        state.untracked = None;
        self.shared.untracked.store(false, SeqCst);
        self.shared.sink.leave();
        Ok(())
    }

    /// Logged regions that no write touched since they were last looked at here: candidates for [`RegionLog::forget`],
    /// at most [`FORGET_REGIONS_MAX`]. Goes round over all regions from call to call; `true` when it came round.
    pub fn sweep(&self) -> (Vec<usize>, bool) {
        let shared = &*self.shared;
        let mut state = shared.lock();
        let mut cold = Vec::new();
        while state.sweep_word < shared.logged.len() {
            let word = state.sweep_word;
            let mut rest = shared.logged[word].load(SeqCst) & !shared.touched[word].load(Relaxed);
            if cold.len() + rest.count_ones() as usize > FORGET_REGIONS_MAX {
                return (cold, false);
            }
            shared.touched[word].store(0, Relaxed);
            while rest != 0 {
                cold.push(word * 64 + rest.trailing_zeros() as usize);
                rest &= rest - 1;
            }
            state.sweep_word += 1;
        }
        state.sweep_word = 0;
        (cold, true)
    }

    /// Forget those of `numbers` (at most [`FORGET_REGIONS_MAX`]) for which `clean(disk, first, last)` says that no block
    /// has a mark or a write in flight; returns how many. `clean` must only look at memory. The file follows later, in
    /// the background. See the module's header for what makes this safe against concurrent writes, and I5 for when a
    /// mark may be gone: durable at the target, and an fdatasync here.
    pub fn forget(&self, numbers: &[usize], clean: impl Fn(DiskIndex, Block, Block) -> bool) -> usize {
        let shared = &*self.shared;
        let mut state = shared.lock();
        if state.untracked.is_some() || state.failed.is_some() {
            return 0;
        }
        let mut forgotten = 0;
        for &number in numbers.iter().take(FORGET_REGIONS_MAX) {
            let (word, bit) = (number / 64, 1 << (number % 64));
            if !State::has(&state.intent, number) || !State::has(&state.durable, number) {
                continue;
            }
            shared.logged[word].fetch_and(!bit, SeqCst);
            let region = shared.layout.region(number);
            let blocks = region.blocks();
            let end =
                blocks.end.min(watari_core::geometry::blocks_for(shared.layout.sizes()[usize::from(region.disk.0)]));
            if clean(region.disk, Block(blocks.start), Block(end - 1)) {
                state.intent[word] &= !bit;
                state.lazy.insert(word / SECTOR_WORDS);
                forgotten += 1;
            } else {
                shared.logged[word].fetch_or(bit, SeqCst);
            }
        }
        if forgotten > 0 && state.forget_at.is_none() {
            state.forget_at = Some(Instant::now() + FORGET_DELAY);
            shared.work.notify_all();
        }
        forgotten
    }

    /// The regions that the log shall hold now; all of them when `Untracked`.
    pub fn regions(&self) -> RegionSet {
        let state = self.shared.lock();
        match state.untracked {
            Some(_) => RegionSet::all(&self.shared.layout),
            None => RegionSet::from_words(&self.shared.layout, state.intent.clone()),
        }
    }

    pub fn layout(&self) -> &RegionLayout {
        &self.shared.layout
    }

    pub fn report(&self) -> RegionReport {
        let state = self.shared.lock();
        RegionReport {
            regions: self.shared.layout.regions(),
            logged: self.shared.logged.iter().map(|w| w.load(SeqCst).count_ones() as usize).sum(),
            untracked: state.untracked.clone(),
            failed: state.failed.clone(),
            heartbeat: state.heartbeat,
            log_id: state.log_id,
            syncs: state.syncs,
            longest_wait: state.longest_wait,
        }
    }

    /// Write what was forgotten and stop the writer, waiting for at most [`LOG_WAIT`]; `false` when it did not manage
    /// (then the log holds more than it must, which is safe). No write may follow.
    pub fn close(self) -> bool {
        let begin = Instant::now();
        let mut state = self.shared.lock();
        state.stopping = true;
        self.shared.work.notify_all();
        loop {
            if state.failed.is_some() || state.untracked.is_some() {
                return false;
            }
            if state.lazy.is_empty() && state.urgent.is_empty() && !state.writing {
                return true;
            }
            let waited = begin.elapsed();
            if waited >= LOG_WAIT {
                return false;
            }
            state = self.shared.wait(&self.shared.settled, state, LOG_WAIT - waited);
        }
    }
}

impl Drop for RegionLog {
    fn drop(&mut self) {
        // Lets the writer end; a hung one ends when its medium comes back.
        self.shared.lock().stopping = true;
        self.shared.work.notify_all();
    }
}
