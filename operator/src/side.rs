//! One side of a pair's VM, whichever site it is: what KubeVirt has of it here, and what a crossing calls for here.
//!
//! ```text
//!   receive   the VM comes here: made to wait as a receiver, migrated into, given the right to write     pure
//!   send      the VM leaves: the handover opened, what remains sent, KubeVirt told to migrate            pure
//!   rest      no crossing: nothing of one is left                                                        pure
//!   fail_over the VM boots here from the replica: what a crossing left cleared, promoted, started          pure
//! ```
//! The home's SyncPair controller and the peer's SyncReplica controller both use it, each for its own cluster. Where the VM runs is
//! read from the role that the sidecar with the pair's folder reports, never from KubeVirt's phases: these say only when to ask for the right
//! to write (succeeded) and when to give it up for good (failed, and QEMU is gone here).

pub mod act;
pub mod fail_over;
pub mod manifest;
pub mod observe;
pub mod receive;
pub mod rest;
pub mod send;
pub mod trust;

use serde_json::Value;
use watari_crds::crossing::Stage;
use watari_wire::report::Report;

/// One thing to do in this cluster; each can be repeated.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Brings the other site's authorities into KubeVirt's inbox.
    Trust(String),
    /// The VM, as a receiver or (a stopped VM has moved here) as it is.
    MakeVm(Value),
    RemoveVm,
    /// Run strategy, and the one that KubeVirt restores when the guest has come.
    SetRunStrategy {
        strategy: String,
        restore: Option<String>,
    },
    /// The receiving VMIM; with the node that holds the claims, where only one can.
    Receive {
        id: String,
        node: Option<String>,
    },
    /// The sending VMIM.
    Send {
        id: String,
        connect: String,
    },
    /// Deletes a VMIM: KubeVirt calls its migration off at both sites, if it still runs.
    DeleteMigration(String),
    OpenHandover {
        vmi_uid: String,
    },
    Acquire,
    Void,
    /// A failover to a kept generation, by its number, or to the newest: then the source is asked for the rest first.
    Promote {
        generation: Option<u64>,
    },
    /// What this fenced side wrote alone may be overwritten.
    AcceptDivergence,
}

/// What a side does now, and how far it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    pub steps: Vec<Step>,
    pub stage: Stage,
    pub message: String,
}

impl Progress {
    fn new(stage: Stage, message: impl Into<String>, steps: Vec<Step>) -> Progress {
        Progress { steps, stage, message: message.into() }
    }

    fn waits(stage: Stage, message: impl Into<String>) -> Progress {
        Progress::new(stage, message, Vec::new())
    }
}

/// Whether a side with this role has the right to write (`watari_core::record::Role::accepts_writes`).
pub fn accepts_writes(role: &str) -> bool {
    matches!(role, "Serving" | "Converging")
}

/// What a move would have to send now: disk content in bytes, and together with `memory` (the guest's, bytes) in seconds at the rate last
/// measured. What the guest writes meanwhile is not counted.
pub fn remains(report: &Report, memory: u64) -> (i64, Option<i64>) {
    let whole = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    let bytes = report.generations.lag_bytes;
    let rate = report.link.rate_bytes_per_second;
    let seconds = (rate >= 1.0).then(|| (bytes.saturating_add(memory) as f64 / rate).ceil() as i64);
    (whole(bytes), seconds)
}

#[cfg(test)]
mod tests;
