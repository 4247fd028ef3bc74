//! Is an operation fast enough, lately, to be done on the thread that would otherwise read the next request?
//!
//! A write into the page cache takes microseconds and handing it to another thread costs more than that; a write that
//! waits for the disk takes milliseconds and must not hold up its connection. Which of the two the next one will be is
//! guessed from the last ones, whichever thread they ran on, so that a disk that recovers is noticed without a trial
//! on the fast path.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// One slow operation weighs as much as this many fast ones: two close together change the mind, one outlier (a
/// preempted thread) does not.
const SLOW_WEIGHT: u32 = 8;
/// Above this the operation goes to the pool.
const INLINE_MAX: u32 = 8;
/// So many fast operations in a row, at most, bring it back.
const SCORE_MAX: u32 = 64;

/// A running guess for one kind of operation on one disk.
pub struct Pace {
    score: AtomicU32,
    slow: Duration,
}

impl Pace {
    /// An operation counts as slow from `slow` on, plus 1 ns per byte: copying is work, not waiting.
    pub const fn new(slow: Duration) -> Self {
        Pace { score: AtomicU32::new(0), slow }
    }

    /// Do the next one inline?
    pub fn inline(&self) -> bool {
        self.score.load(Ordering::Relaxed) <= INLINE_MAX
    }

    /// What one operation of `bytes` took. Races between threads lose a sample, which does no harm.
    pub fn record(&self, elapsed: Duration, bytes: u64) {
        let score = self.score.load(Ordering::Relaxed);
        let slow = elapsed > self.slow + Duration::from_nanos(bytes);
        let next = if slow { (score + SLOW_WEIGHT).min(SCORE_MAX) } else { score.saturating_sub(1) };
        if next != score {
            self.score.store(next, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_outlier_stays_inline_two_do_not_and_fast_ones_bring_it_back() {
        let pace = Pace::new(Duration::from_micros(100));
        pace.record(Duration::from_millis(5), 4096);
        assert!(pace.inline());
        pace.record(Duration::from_millis(5), 4096);
        assert!(!pace.inline());
        for _ in 0..SLOW_WEIGHT {
            pace.record(Duration::from_micros(3), 4096);
        }
        assert!(pace.inline());
    }

    #[test]
    fn a_large_copy_is_not_mistaken_for_a_slow_disk() {
        let pace = Pace::new(Duration::from_micros(100));
        for _ in 0..10 {
            pace.record(Duration::from_micros(900), 1 << 20);
        }
        assert!(pace.inline());
    }
}
