//! The source's books when a connection comes or goes: what the peer holds counts, what was lost is sent or read again.

use super::*;

impl Primary {
    /// The peer was met. `held`: which of this session's frames it has durably (`None`: it has nothing of this
    /// session); `committed`: its newest generation.
    pub fn link_up<M: Maps>(
        &mut self,
        now: u64,
        tracker: &Tracker<M>,
        held: Option<&dyn Fn(Sequence) -> bool>,
        committed: Generation,
        kept_payload: &dyn Fn(Sequence) -> bool,
    ) {
        self.linked = true;
        self.resend.clear();
        // A peer that is full says so again on this link.
        self.blocked = false;
        self.follow(tracker, committed);
        match self.phase {
            // The answer to our commit was lost.
            Phase::Committing { generation, .. } if committed == generation => self.committed(now, generation),
            Phase::Committing { generation, cut_at_millis, .. } => {
                self.phase = Phase::Committing { generation, cut_at_millis, list_sent: false };
            }
            Phase::Idle | Phase::Open { .. } | Phase::Forgetting { .. } => {}
        }
        if matches!(self.phase, Phase::Forgetting { .. }) {
            return;
        }
        let lost: Vec<u64> =
            self.books.keys().copied().filter(|s| !held.is_some_and(|held| held(Sequence(*s)))).collect();
        let (again, gone): (Vec<u64>, Vec<u64>) = lost.into_iter().partition(|s| kept_payload(Sequence(*s)));
        for s in self.books.keys().copied().collect::<Vec<_>>() {
            if !again.contains(&s) && !gone.contains(&s) {
                self.mark_durable(s);
            }
        }
        self.resend = again.into_iter().map(Sequence).collect();
        self.lose(tracker, &gone);
    }

    /// What the peer has committed is what the next list must follow, whether we heard of that commit or the peer's
    /// folder is another one than before (the shell then compares). An open generation that follows something else
    /// can never commit.
    pub(super) fn follow<M: Maps>(&mut self, tracker: &Tracker<M>, committed: Generation) {
        match self.phase {
            Phase::Committing { generation, .. } | Phase::Forgetting { generation, .. } if generation == committed => {
                return;
            }
            Phase::Idle | Phase::Open { .. } | Phase::Committing { .. } if committed == self.base => return,
            Phase::Idle => {}
            Phase::Open { .. } | Phase::Committing { .. } => self.abandon(tracker),
            Phase::Forgetting { .. } => {
                // The commit that we were told of is not there any more: nothing of it may be forgotten.
                self.phase = Phase::Idle;
                let all: Vec<u64> = self.books.keys().copied().collect();
                self.lose(tracker, &all);
            }
        }
        self.rebase(committed);
    }

    /// This side serves on under a higher epoch (its handover was voided). What it sent under the old one is below the
    /// target's floor (I6) and goes again; a read that is under way comes back under its old name and must be reported
    /// as failed by the shell.
    pub fn raise_epoch<M: Maps>(&mut self, tracker: &Tracker<M>, epoch: u64) {
        if epoch == self.epoch {
            return;
        }
        self.epoch = epoch;
        // A generation that is durable at the target already is forgotten as usual.
        if !matches!(self.phase, Phase::Forgetting { .. }) {
            self.abandon(tracker);
            let all: Vec<u64> = self.books.keys().copied().collect();
            self.lose(tracker, &all);
            self.resend.clear();
        }
    }

    /// The target has committed more than we knew (the word of it was lost with a former worker). Only between
    /// generations; our marks cover at least what differs.
    pub fn rebase(&mut self, committed: Generation) {
        if self.phase == Phase::Idle {
            self.base = committed;
            self.next_number = self.next_number.max(committed.number.0 + 1);
        }
    }

    /// The target is full and takes no frames, or has room again.
    pub fn block(&mut self, blocked: bool) {
        self.blocked = blocked;
    }

    /// Drop frames of which no block counts any more (rewritten since): the target may reclaim them. Only between
    /// generations, when a block that is dirty again is of no use in its old form.
    pub fn superseded<M: Maps>(&mut self, tracker: &Tracker<M>) -> Vec<Sequence> {
        if self.phase != Phase::Idle || !self.reads.is_empty() {
            return Vec::new();
        }
        let mut seen: BTreeMap<(DiskIndex, u64), u64> = BTreeMap::new();
        let mut gone = Vec::new();
        for (s, book) in self.books.iter().rev() {
            let mut counts = false;
            for b in book.extents.iter().flat_map(|e| e.start.0..e.end().0) {
                let word = seen.entry((book.disk, b / 64)).or_insert(0);
                counts |= *word >> (b % 64) & 1 == 0 && !tracker.overwritten(book.disk, Block(b));
                *word |= 1 << (b % 64);
            }
            if !counts && book.durable {
                gone.push(Sequence(*s));
            }
        }
        for s in &gone {
            self.books.remove(&s.0);
        }
        gone
    }

    /// The connection broke. What was sent and not acknowledged is decided at the next [`Primary::link_up`].
    pub fn link_down(&mut self) {
        self.linked = false;
        self.sent_at.clear();
    }

    /// These frames are not at the target and cannot be sent again as they were: their blocks must be read again.
    pub(super) fn lose<M: Maps>(&mut self, tracker: &Tracker<M>, gone: &[u64]) {
        if gone.is_empty() {
            return;
        }
        for s in gone {
            let Some(book) = self.books.remove(s) else { continue };
            self.unacked_bytes -= if book.durable { 0 } else { book.wire_bytes };
            for e in &book.extents {
                tracker.unstage(book.disk, *e);
                tracker.mark(book.disk, *e);
            }
        }
        // Their content as of the cut is gone where the guest has written since; and a closed generation cannot be
        // opened again. What was sent stays staged, the rest is dirty: the next cut takes it all.
        if !matches!(self.phase, Phase::Idle) {
            self.abandon(tracker);
        }
    }
}
