//! Flushes that wait together are served by one fdatasync.
//!
//! Invariant: an item is finished by an fdatasync that began after the item joined. Whoever joins while nobody leads
//! becomes the leader; everybody who joins while an fdatasync runs is covered by the next one.

use std::sync::Mutex;

use crate::lock;

pub(super) struct FlushGroup<T> {
    state: Mutex<State<T>>,
}

struct State<T> {
    led: bool,
    waiting: Vec<T>,
    /// The other half of the double buffer: no allocation per round.
    spare: Vec<T>,
}

impl<T> FlushGroup<T> {
    pub fn new() -> Self {
        FlushGroup { state: Mutex::new(State { led: false, waiting: Vec::new(), spare: Vec::new() }) }
    }

    /// Add an item; `true` makes the caller responsible for calling [`FlushGroup::round`] until it says that it is over.
    #[must_use = "a group that nobody leads waits for ever"]
    pub fn join(&self, item: T) -> bool {
        let mut state = lock(&self.state);
        state.waiting.push(item);
        !std::mem::replace(&mut state.led, true)
    }

    /// One fdatasync for all who wait now. Returns whether others joined meanwhile, who need another round.
    pub fn round<R: Copy>(&self, sync: impl FnOnce() -> R, mut finish: impl FnMut(T, R)) -> bool {
        let mut batch = {
            let mut state = lock(&self.state);
            let spare = std::mem::take(&mut state.spare);
            std::mem::replace(&mut state.waiting, spare)
        };
        let result = sync();
        for item in batch.drain(..) {
            finish(item, result);
        }
        let mut state = lock(&self.state);
        state.spare = batch;
        state.led = !state.waiting.is_empty();
        state.led
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_joins_during_a_sync_is_finished_by_the_next_one() {
        let group = FlushGroup::new();
        assert!(group.join(1));
        let mut order = Vec::new();
        let more =
            group.round(|| assert!(!group.join(2), "the group already has a leader"), |item, ()| order.push((1, item)));
        assert!(more);
        assert!(!group.round(|| (), |item, ()| order.push((2, item))));
        assert_eq!(order, [(1, 1), (2, 2)]);
        assert!(group.join(3), "after the last round the next one leads again");
    }
}
