//! A failover: the peer goes on without the VM's home. A person asks for it at the peer, the peer's operator carries it out and says how far
//! it is, and the home learns of it when it returns.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The wish, in a SyncReplica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Promote {
    /// `status.moves` of the SyncReplica at the time of writing. While it differs, nothing is promoted and the condition `SiteDiffers` says
    /// so.
    #[schemars(range(min = 0))]
    pub at_move: i64,
    /// "epoch.number" of the generation from which the VM shall boot, one of `status.kept`. Absent: the newest, and before that the home is
    /// asked for what it has written since, if it answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 41))]
    #[x_kube(validation = Rule::new("self.matches('^[0-9]+[.][0-9]+$')").message("promote.generation is epoch.number, one of status.kept, such as 1.42"))]
    pub generation: Option<String>,
}

/// How far a failover is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailoverStatus {
    /// `promote.atMove` of the wish.
    pub at_move: i64,
    pub stage: FailoverStage,
    /// For people.
    #[serde(default)]
    pub message: String,
    /// "epoch.number" of the generation that was whole here when it began, or that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<String>,
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub began: jiff::Timestamp,
    /// When the VM was seen running here.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub ended: Option<jiff::Timestamp>,
}

/// The stages of a failover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum FailoverStage {
    /// It cannot be done; the message says why. Nothing was touched.
    Refused,
    /// What a move left here goes.
    Clearing,
    /// The replica becomes the VM's disks.
    Promoting,
    /// This side has the right to write, and the VM boots.
    Starting,
    /// The VM runs here, or is as stopped as it was.
    Done,
}

impl FailoverStatus {
    /// This side has the right to write because of it: the VM has changed its site.
    pub fn counts(&self) -> bool {
        matches!(self.stage, FailoverStage::Starting | FailoverStage::Done)
    }
}
