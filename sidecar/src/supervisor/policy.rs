//! What becomes of a worker that has ended, and when the next one starts. Pure.

use std::{
    collections::VecDeque,
    fmt,
    time::{Duration, Instant},
};

use crate::cli::{EXIT_AGAIN, EXIT_REFUSED};

/// So many crashes within [`CRASH_WINDOW`], and the next worker serves without tracking: the VM comes first.
pub const CRASHES_MAX: usize = 5;
pub const CRASH_WINDOW: Duration = Duration::from_secs(60);
/// Pauses begin only where even a pass-through crashes; until then every restart is immediate.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
/// Well below the reconnect delay that QEMU is given.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// A later worker that finds its configuration refused cannot do better at once, but the VM still needs one.
const PAUSE_REFUSED: Duration = Duration::from_secs(1);

/// How a worker ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    Exited(u8),
    Killed(i32),
    /// The system could not start it.
    NotStarted,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ended::Exited(code) => write!(f, "exit code {code}"),
            Ended::Killed(signal) => write!(f, "signal {signal}"),
            Ended::NotStarted => f.write_str("not started"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It ended on purpose: the supervisor ends with this code.
    PassOn(u8),
    Restart,
}

/// Whether a worker's end is the end. A refusal is final only from the very first worker: once one has served, a
/// configuration that broke in the meantime must not take a running VM's disks away.
pub fn verdict(ended: Ended, crashes_before: u64) -> Verdict {
    match ended {
        Ended::Exited(0) => Verdict::PassOn(0),
        Ended::Exited(EXIT_REFUSED) if crashes_before == 0 => Verdict::PassOn(EXIT_REFUSED),
        Ended::Exited(_) | Ended::Killed(_) | Ended::NotStarted => Verdict::Restart,
    }
}

/// Crashes so far.
#[derive(Debug, Default)]
pub struct Crashes {
    total: u64,
    /// Those within the window, oldest first; bounded by the pauses between restarts.
    recent: VecDeque<Instant>,
}

impl Crashes {
    pub fn total(&self) -> u64 {
        self.total
    }

    pub fn pass_through(&self) -> bool {
        self.recent.len() >= CRASHES_MAX
    }

    /// Counts one; returns the pause before the next start.
    pub fn add(&mut self, now: Instant, ended: Ended) -> Duration {
        if ended == Ended::Exited(EXIT_AGAIN) {
            return Duration::ZERO;
        }
        self.total += 1;
        self.recent.push_back(now);
        while self.recent.front().is_some_and(|at| now.duration_since(*at) > CRASH_WINDOW) {
            self.recent.pop_front();
        }
        let pause = match self.recent.len().checked_sub(CRASHES_MAX + 1) {
            None => Duration::ZERO,
            Some(beyond) => PAUSE_FIRST.saturating_mul(1 << beyond.min(8)).min(PAUSE_MAX),
        };
        match ended {
            Ended::Exited(EXIT_REFUSED) => pause.max(PAUSE_REFUSED),
            Ended::NotStarted => pause.max(PAUSE_FIRST),
            Ended::Exited(_) | Ended::Killed(_) => pause,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_asks_to_be_started_again_has_not_crashed() {
        let (mut crashes, now) = (Crashes::default(), Instant::now());
        for _ in 0..2 * CRASHES_MAX {
            assert_eq!(crashes.add(now, Ended::Exited(EXIT_AGAIN)), Duration::ZERO);
        }
        assert_eq!((crashes.total(), crashes.pass_through()), (0, false));
        assert_eq!(verdict(Ended::Exited(EXIT_AGAIN), 0), Verdict::Restart);
    }

    #[test]
    fn only_a_deliberate_end_is_passed_on() {
        let table = [
            (Ended::Exited(0), 0, Verdict::PassOn(0)),
            (Ended::Exited(0), 3, Verdict::PassOn(0)),
            (Ended::Exited(2), 0, Verdict::PassOn(2)),
            (Ended::Exited(2), 1, Verdict::Restart),
            (Ended::Exited(1), 0, Verdict::Restart),
            (Ended::Exited(101), 0, Verdict::Restart),
            (Ended::Killed(9), 0, Verdict::Restart),
            (Ended::Killed(15), 0, Verdict::Restart),
            (Ended::NotStarted, 0, Verdict::Restart),
        ];
        for (ended, before, expected) in table {
            assert_eq!(verdict(ended, before), expected, "{ended} after {before}");
        }
    }

    #[test]
    fn five_crashes_in_a_minute_cost_no_pause_and_lead_to_a_pass_through() {
        let (mut crashes, start) = (Crashes::default(), Instant::now());
        for second in 0..5 {
            assert!(!crashes.pass_through());
            assert_eq!(crashes.add(start + Duration::from_secs(second), Ended::Killed(9)), Duration::ZERO);
        }
        assert!(crashes.pass_through());
        let pauses: Vec<u128> = (5..12)
            .map(|second| crashes.add(start + Duration::from_secs(second), Ended::Killed(6)).as_millis())
            .collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 2000, 2000]);
        assert_eq!(crashes.total(), 12);
    }

    #[test]
    fn a_crash_now_and_then_never_leads_to_a_pass_through() {
        let (mut crashes, start) = (Crashes::default(), Instant::now());
        for round in 0..100 {
            assert_eq!(crashes.add(start + Duration::from_secs(16 * round), Ended::Killed(9)), Duration::ZERO);
            assert!(!crashes.pass_through(), "round {round}");
        }
        assert!(crashes.recent.len() <= CRASHES_MAX);
    }

    #[test]
    fn a_refused_configuration_is_retried_slowly() {
        let mut crashes = Crashes::default();
        assert_eq!(crashes.add(Instant::now(), Ended::Exited(EXIT_REFUSED)), PAUSE_REFUSED);
    }
}
