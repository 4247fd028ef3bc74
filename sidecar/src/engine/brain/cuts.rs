//! Cuts on demand and their answers.

use super::*;

/// A demand for a cut is answered when its generation, or a later one, is committed.
impl Brain {
    pub(super) fn answer_cuts(&mut self) {
        let Some(source) = &self.source else { return };
        let committed = source.primary.base();
        let open = match source.primary.phase() {
            Phase::Idle => None,
            Phase::Open { generation, .. }
            | Phase::Committing { generation, .. }
            | Phase::Forgetting { generation, .. } => Some(generation.number.0),
        };
        let now = Instant::now();
        let mut answers = Vec::new();
        for mut waiter in std::mem::take(&mut self.cuts) {
            if waiter.number.is_none() {
                waiter.number = open.filter(|n| *n > waiter.after);
            }
            if waiter.number.is_some_and(|n| committed.number.0 >= n) {
                let done = Outcome::Committed { epoch: committed.epoch, number: committed.number.0 };
                answers.push((waiter.answer, done));
            } else if now >= waiter.deadline {
                let text = "the cut goes on; its generation is not committed yet".to_owned();
                answers.push((waiter.answer, Outcome::Pending(text)));
            } else {
                self.cuts.push(waiter);
            }
        }
        if !answers.is_empty() {
            // Whoever looks after the answer sees what it says.
            self.make_report();
        }
        for (answer, outcome) in answers {
            let _ = answer.send(Ok(outcome));
        }
    }

    pub(super) fn decline(answer: Answer, why: impl Into<String>) {
        let _ = answer.send(Err(Declined(why.into())));
    }
}
