//! A crossing: one attempt to move a pair's VM to the other site, as the two operators tell each other about it.
//!
//! The home's operator decides that there is one and writes it into the SyncReplica, which is its one durable record; each operator then does
//! what its own cluster needs and says how far it is. Who may write to the disks is settled by the sidecars' epochs, not here.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One of the two sites of a pair, seen from its home.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Site {
    /// The pair's home.
    #[default]
    Source,
    Peer,
}

impl Site {
    pub fn other(self) -> Site {
        match self {
            Site::Source => Site::Peer,
            Site::Peer => Site::Source,
        }
    }
}

/// What both sides must know of an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Crossing {
    /// Name of both VirtualMachineInstanceMigrations and KubeVirt's `migrationID`. Another id is another attempt.
    #[schemars(length(min = 1, max = 63))]
    pub id: String,
    /// Where the VM goes.
    pub to: Site,
    /// `host:port` of the home's synchronization controller, once the VM at the home waits as the receiver. Only for the way home.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 262))]
    pub connect: Option<String>,
    /// The count of moves when it began. At another count it is over: a failover happened meanwhile.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub at_move: i64,
    /// The VM does not run: its disks are handed over without KubeVirt.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stopped: bool,
    /// It is called off: whatever has not been handed over stays where it is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cancelled: bool,
}

/// How far one side is with an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CrossingStatus {
    /// The attempt of which this speaks.
    pub id: String,
    pub stage: Stage,
    /// For people.
    #[serde(default)]
    pub message: String,
    /// As in [`Crossing::connect`], of the receiving peer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect: Option<String>,
}

/// The stages of one side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Stage {
    /// What the move needs is being made here.
    #[default]
    Preparing,
    /// The receiver waits for the sender.
    Ready,
    /// The source sends what remains without pause, until little enough is left.
    Converging,
    /// KubeVirt migrates the VM's memory.
    Migrating,
    /// The VM runs at the other site.
    Done,
    /// It did not happen, and nothing of it is left here.
    Failed,
}

/// The end of a site's KubeVirt in migrations between clusters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MigrationEnd {
    /// First of KubeVirt's `status.synchronizationAddresses`, `host:port`; empty: it has none.
    #[serde(default)]
    #[schemars(length(max = 262))]
    pub address: String,
    /// Certificates (PEM) that this site's KubeVirt trusts, its own among them (ConfigMap `kubevirt-ca`).
    #[serde(default)]
    #[schemars(length(max = 262_144))]
    pub authorities: String,
}
