//! What the guest answers on its control line: plain data, shared by both ends.

use serde::{Deserialize, Serialize};

use crate::check::Tally;
use crate::schedule::Layout;

/// Answer to `hello`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    pub kernel: String,
    pub uptime_seconds: f64,
    pub groups: Vec<GroupHello>,
    /// Clocks that read backwards or leapt by more than an hour since boot.
    pub clock_anomalies: u64,
}

/// One group of disks that a workload runs over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupHello {
    pub name: String,
    pub disks: Vec<String>,
    pub layout: Layout,
    /// What the working set held when the guest started.
    pub found: Vec<Tally>,
}

/// Answer to `stats`, `pause` and `resume`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// No write is running or will start until `resume`.
    pub paused: bool,
    /// The wanted rate in bytes per second, all streams together.
    pub rate: u64,
    pub streams: Vec<StreamStats>,
    pub gaps: Gaps,
    pub clock_anomalies: u64,
}

/// One writer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StreamStats {
    pub group: String,
    pub stream: u32,
    /// Every write is followed by fdatasync and counts only after it.
    pub durable: bool,
    /// Operations acknowledged; with the layout this says what every block must hold.
    pub acknowledged: u64,
    pub bytes: u64,
    pub errors: u64,
    /// Blocks discarded, and how many of those did not read as zeroes afterwards (they were then written with zeroes).
    pub discards: u64,
    pub discards_kept: u64,
    /// errno of the first failed operation, 0 for none.
    pub first_errno: i32,
    /// Slowest operation since `reset-gaps` by the guest's own clock, milliseconds.
    pub slowest_ms: f64,
}

/// The largest interruptions since `reset-gaps`, in milliseconds.
///
/// A virtual machine's own clock stands still while the machine is stopped, so a pause is invisible to it. The real-time
/// clock of the machine goes on with the host; once a second the two are compared, and what the guest's clock lacks is
/// `stopped`. `pause` adds the largest gap of the same second, which is what the guest's users would have felt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gaps {
    /// Largest distance between two 1 ms heartbeats, by the guest's clock.
    pub heartbeat_ms: f64,
    /// Largest time the machine stood still as a whole (between two ticks of the real-time clock).
    pub stopped_ms: f64,
    /// Largest sum of both in one second.
    pub pause_ms: f64,
    /// Largest distance between two completed fsync'd writes, pauses included (0 while no durable stream runs).
    pub fsync_ms: f64,
    /// Sum of all time the machine stood still.
    pub stopped_total_ms: f64,
    /// Ticks of the real-time clock seen: 0 means that `stopped` could not be measured.
    pub ticks: u64,
}

/// Answer to `verify`: one tally per group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    pub groups: Vec<Tally>,
    pub errors: u64,
    pub seconds: f64,
}

impl Verdict {
    /// Nothing lost, torn, foreign, resurrected, from the future, unreadable, and no operation failed.
    pub fn clean(&self) -> bool {
        self.errors == 0 && self.groups.iter().all(Tally::clean)
    }
}
