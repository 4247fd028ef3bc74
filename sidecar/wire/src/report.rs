//! One report type, read by `status`, metrics, the operator and tests. Report is not state: nothing is decided from it.
//!
//! Units stand in the field names; times are milliseconds since the Unix epoch unless they say otherwise.

use serde::{Deserialize, Serialize};

/// What a running sidecar says about its pair.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Report {
    /// The pair's name (namespace/name in Kubernetes).
    pub pair: String,
    /// This site's name, as configured.
    pub site: String,
    pub version: String,
    /// Serving, Converging, Sealed, Released, Replica, Attached, Active, Fenced, Diverged.
    pub role: String,
    /// A target whose source has a handover open: an incoming QEMU may connect.
    pub attachable: bool,
    pub epoch: u64,
    pub floor: u64,
    pub disks: Vec<DiskReport>,
    pub link: LinkReport,
    pub generations: GenerationsReport,
    /// Present while this side holds a replica.
    pub replica: Option<ReplicaReport>,
    pub transfer: TransferReport,
    /// Present while this side is fenced: what it wrote alone.
    pub divergence: Option<DivergenceReport>,
    /// Present while this side is the source.
    pub verification: Option<VerificationReport>,
    /// How marks are trusted: Tracked, Untracked, Comparing, PassThrough.
    pub trust: String,
    /// Bytes in regions that the region log names: compared with the peer should this node be lost. 0 while not the source.
    pub logged_bytes: u64,
    pub conditions: Vec<Condition>,
    /// Worker restarts since the supervisor started.
    pub worker_restarts: u64,
    pub now_unix_millis: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DiskReport {
    pub name: String,
    pub size_bytes: u64,
    /// Bytes written since the last committed generation (current, frozen and staged together).
    pub dirty_bytes: u64,
    /// Of those, bytes already durable at the peer but not committed.
    pub staged_bytes: u64,
    /// NBD clients connected now.
    pub clients: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinkReport {
    pub connected: bool,
    pub peer: String,
    pub rtt_millis: f64,
    /// Measured delivery rate, bytes per second.
    pub rate_bytes_per_second: f64,
    pub limit_bits_per_second: u64,
    pub reconnects: u64,
    pub last_error: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GenerationsReport {
    /// "epoch.number" of the newest generation committed at the target; empty: none yet.
    pub committed: String,
    pub committed_number: u64,
    /// When that generation was cut.
    pub committed_cut_unix_millis: u64,
    /// Age of the newest committed generation, seconds: what would be lost now.
    pub lag_seconds: f64,
    pub lag_bytes: u64,
    /// "epoch.number" of the generation being sent; empty: none open.
    pub open: String,
    pub open_total_bytes: u64,
    pub open_sent_bytes: u64,
    pub eta_seconds: Option<f64>,
    pub committed_count: u64,
    pub given_up_count: u64,
    /// Why the pair is behind, in words; empty when it is not.
    pub behind_because: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ReplicaReport {
    pub committed: String,
    /// When that generation was committed, by this site's clock; 0: none is.
    pub committed_unix_millis: u64,
    pub applied: String,
    pub kept: Vec<String>,
    pub journal_bytes: u64,
    pub journal_limit_bytes: u64,
    pub free_bytes: u64,
    pub undo_bytes: u64,
    /// Ready or Full or JournalTooSmall or Poisoned.
    pub state: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TransferReport {
    /// Guest content covered by frames sent, bytes.
    pub content_bytes: u64,
    /// Frame headers and payloads handed to the stream, bytes.
    pub wire_bytes: u64,
    /// Of those, bytes sent a second time because a connection broke.
    pub resent_bytes: u64,
    /// Bytes newly durable at the peer.
    pub durable_bytes: u64,
    pub frames: u64,
    pub preserve_bytes: u64,
    pub preserve_limit_bytes: u64,
}

/// What a fenced side wrote after the newest generation that both sites have.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DivergenceReport {
    /// Bytes in all disks; a block that was written twice counts once.
    pub bytes: u64,
    pub extents: u64,
    /// "epoch.number" of that generation.
    pub after: String,
    /// Changes were not tracked: any block may have been written.
    pub anything: bool,
}

/// The continuous comparison of clean blocks with the replica (source only).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VerificationReport {
    /// How far the present pass is.
    pub pass_bytes: u64,
    pub pass_total_bytes: u64,
    /// When the last pass began that found the whole of all disks identical; 0: none yet.
    pub proved_unix_millis: u64,
    /// Blocks that differed, since this worker started.
    pub differed_blocks: u64,
}

/// kstatus-like: a type, whether it holds, why, and what a person should do next.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    #[serde(rename = "type")]
    pub kind: String,
    pub status: bool,
    pub reason: String,
    pub message: String,
    /// What to do next; empty when nothing is needed.
    pub next_step: String,
    pub since_unix_millis: u64,
}
