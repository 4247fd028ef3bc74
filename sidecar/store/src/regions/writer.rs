//! The thread that writes the region log: the only one that waits for the metadata folder.
//!
//! It takes everything that is due at once (group commit): writes the sectors, syncs once, and only then calls their
//! regions durable. While a sector is being written, only what the old *and* the new sector hold counts as durable,
//! since a crash may leave either. A failure is final for this log (no sync is ever tried again).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Instant;

use watari_core::regions::log::{self, SECTOR_WORDS};

use super::medium::RegionMedium;
use super::{HEARTBEAT_INTERVAL, Shared, State};

/// One round of work.
struct Round {
    /// Map sectors (0 is the first of region bits) with the words to write.
    sectors: Vec<(usize, Vec<u64>)>,
    heartbeat: Option<u64>,
}

pub(super) struct Writer {
    pub(super) shared: Arc<Shared>,
    pub(super) medium: Box<dyn RegionMedium>,
    pub(super) log_id: u64,
    /// This writer's number; another one in the state means that this one was replaced while it hung.
    pub(super) number: u64,
}

impl Writer {
    pub(super) fn run(mut self) {
        while let Some(round) = self.next_round() {
            let written = self.write(&round);
            let mut state = self.shared.lock();
            if state.writer != self.number {
                return;
            }
            match written {
                Ok(()) => self.settle(&mut state, &round),
                Err(e) => {
                    state.failed = Some(format!("the region log cannot be written: {e}"));
                    state.writing = false;
                }
            }
            self.shared.settled.notify_all();
        }
    }

    /// Wait for work. `None`: the log is stopped, was replaced, or the pair is `Untracked`.
    fn next_round(&mut self) -> Option<Round> {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        loop {
            if state.writer != self.number {
                return None;
            }
            if state.untracked.is_some() {
                // Outside the lock: this medium may hang.
                drop(state);
                self.medium.invalidate();
                return None;
            }
            let now = Instant::now();
            if state.failed.is_some() {
                // Nothing more to write; stay to invalidate the log if the pair goes Untracked.
                if state.stopping {
                    return None;
                }
                state = shared.wait(&shared.work, state, HEARTBEAT_INTERVAL);
                continue;
            }
            let beat_due = state.next_beat <= now;
            let forget_due = state.forget_at.is_some_and(|at| at <= now);
            if !state.urgent.is_empty() || beat_due || forget_due || (state.stopping && !state.lazy.is_empty()) {
                return Some(Self::take(&mut state, beat_due.then_some(now)));
            }
            if state.stopping {
                return None;
            }
            let next = state.forget_at.map_or(state.next_beat, |at| at.min(state.next_beat));
            state = shared.wait(&shared.work, state, next.saturating_duration_since(now));
        }
    }

    /// Take all that waits, also what is not yet due: it shares the sync.
    fn take(state: &mut State, beat: Option<Instant>) -> Round {
        let mut due: BTreeSet<usize> = std::mem::take(&mut state.urgent);
        due.append(&mut state.lazy);
        state.forget_at = None;
        state.writing = true;
        let sectors = due.into_iter().map(|sector| {
            let range = State::sector_words(sector, state.intent.len());
            let words = state.intent[range.clone()].to_vec();
            for (durable, new) in state.durable[range].iter_mut().zip(&words) {
                *durable &= new;
            }
            (sector, words)
        });
        let sectors = sectors.collect();
        let heartbeat = beat.map(|now| {
            state.next_beat = now + HEARTBEAT_INTERVAL;
            state.heartbeat + 1
        });
        Round { sectors, heartbeat }
    }

    fn write(&mut self, round: &Round) -> std::io::Result<()> {
        // Neighbouring sectors go in one write.
        let mut runs: Vec<(u32, Vec<u8>)> = Vec::new();
        let mut next = None;
        for (sector, words) in &round.sectors {
            let index = log::MAP_SECTOR + *sector as u32;
            let bytes = log::encode_sector(index, self.log_id, words);
            match runs.last_mut() {
                Some((_, run)) if next == Some(index) => run.extend_from_slice(&bytes),
                _ => runs.push((index, bytes.to_vec())),
            }
            next = Some(index + 1);
        }
        for (index, bytes) in &runs {
            self.medium.write_at(log::sector_offset(*index), bytes)?;
        }
        if let Some(n) = round.heartbeat {
            let (index, bytes) = log::encode_heartbeat(self.log_id, n);
            self.medium.write_at(log::sector_offset(index), &bytes)?;
        }
        self.medium.sync()
    }

    fn settle(&self, state: &mut State, round: &Round) {
        state.writing = false;
        state.syncs += 1;
        if let Some(n) = round.heartbeat {
            state.heartbeat = n;
        }
        for (sector, words) in &round.sectors {
            let begin = sector * SECTOR_WORDS;
            for (at, &word) in words.iter().enumerate() {
                state.durable[begin + at] = word;
                // What was forgotten meanwhile stays unlogged.
                let logged = word & state.intent[begin + at];
                self.shared.logged[begin + at].fetch_or(logged, SeqCst);
            }
        }
    }
}
