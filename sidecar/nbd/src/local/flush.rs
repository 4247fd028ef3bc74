//! Flushes that wait together are served by one fdatasync, and a few fdatasyncs overlap.
//!
//! One fdatasync writes pages, then waits for the device's cache; the next one can write its pages meanwhile. So up
//! to `leaders_max` run at once, each for all who had joined when it began; who joins while that many run is
//! covered by the next one.
//!
//! Invariant: an item is finished by an fdatasync that began after the item joined.

use std::sync::Mutex;

use crate::lock;

pub(super) struct FlushGroup<T> {
    state: Mutex<State<T>>,
    leaders_max: usize,
}

struct State<T> {
    leaders: usize,
    waiting: Vec<T>,
    /// Emptied batches: no allocation per round.
    spare: Vec<Vec<T>>,
}

impl<T> FlushGroup<T> {
    pub fn new(leaders_max: usize) -> Self {
        FlushGroup { state: Mutex::new(State { leaders: 0, waiting: Vec::new(), spare: Vec::new() }), leaders_max }
    }

    /// Add an item; `true` makes the caller a leader, who calls [`FlushGroup::round`] until it says that it is over.
    #[must_use = "a group that nobody leads waits for ever"]
    pub fn join(&self, item: T) -> bool {
        let mut state = lock(&self.state);
        state.waiting.push(item);
        let leads = state.leaders < self.leaders_max;
        state.leaders += usize::from(leads);
        leads
    }

    /// One fdatasync for all who wait now. Returns whether others joined meanwhile, who need another round; if not,
    /// the caller is no leader any more.
    pub fn round<R: Copy>(&self, sync: impl FnOnce() -> R, mut finish: impl FnMut(T, R)) -> bool {
        let mut batch = {
            let mut state = lock(&self.state);
            let spare = state.spare.pop().unwrap_or_default();
            std::mem::replace(&mut state.waiting, spare)
        };
        // Another leader may have taken along whom we came for.
        if !batch.is_empty() {
            let result = sync();
            for item in batch.drain(..) {
                finish(item, result);
            }
        }
        let mut state = lock(&self.state);
        state.spare.push(batch);
        let more = !state.waiting.is_empty();
        state.leaders -= usize::from(!more);
        more
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_joins_during_a_sync_is_finished_by_the_next_one() {
        let group = FlushGroup::new(1);
        assert!(group.join(1));
        let mut order = Vec::new();
        let more =
            group.round(|| assert!(!group.join(2), "the group already has a leader"), |item, ()| order.push((1, item)));
        assert!(more);
        assert!(!group.round(|| (), |item, ()| order.push((2, item))));
        assert_eq!(order, [(1, 1), (2, 2)]);
        assert!(group.join(3), "after the last round the next one leads again");
    }

    #[test]
    fn a_second_leader_syncs_while_the_first_does_and_everybody_is_finished_once() {
        let group = FlushGroup::new(2);
        assert!(group.join(1));
        let mut finished = Vec::new();
        let mut inner = Vec::new();
        group.round(
            || {
                assert!(group.join(2), "one more may lead");
                assert!(!group.join(3), "but not two more");
                assert!(!group.round(|| (), |item, ()| inner.push(item)));
            },
            |item, ()| finished.push(item),
        );
        assert_eq!((finished, inner), (vec![1], vec![2, 3]));
    }
}
