//! SyncPair: one VM here, kept at a peer. It lives in the VM's namespace and stays at the VM's home.
//!
//! What it cannot ask for yet (filesystem-consistent cuts) has no field; `operator/README.md` lists it.

use std::collections::BTreeMap;

use kube::core::Duration;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::conditions::Condition;
use crate::crossing::{Site, Stage};

/// What a person asks for.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(group = "watari.io", version = "v1alpha1", kind = "SyncPair", plural = "syncpairs", namespaced)]
#[kube(shortname = "spair", category = "watari", status = "SyncPairStatus")]
#[kube(doc = "A VM whose disks are kept synchronised with a peer cluster.")]
#[kube(printcolumn(name = "VM", type_ = "string", json_path = ".spec.vmName"))]
#[kube(printcolumn(name = "Peer", type_ = "string", json_path = ".spec.peer"))]
#[kube(printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"))]
#[kube(printcolumn(
    name = "Ready",
    type_ = "string",
    description = "True: a whole generation is at the peer and changes follow.",
    json_path = ".status.conditions[?(@.type=='Ready')].status"
))]
#[kube(printcolumn(
    name = "Committed",
    type_ = "date",
    description = "Age of the newest generation at the peer: what would be lost now.",
    json_path = ".status.committed.cutTime"
))]
#[kube(printcolumn(
    name = "Behind",
    type_ = "string",
    description = "What the peer does not have yet.",
    json_path = ".status.summary.behind"
))]
#[kube(printcolumn(
    name = "Move",
    type_ = "string",
    description = "How long the data of a move would need on the link, as measured.",
    json_path = ".status.summary.transfer"
))]
#[kube(printcolumn(
    name = "Active",
    type_ = "string",
    description = "Where the VM is active: Source is the pair's home.",
    json_path = ".status.activeSite"
))]
#[kube(printcolumn(
    name = "Moves",
    type_ = "integer",
    description = "What atMove must be for a wish to move.",
    json_path = ".status.moves",
    priority = 1
))]
#[kube(printcolumn(
    name = "Restart",
    type_ = "string",
    description = "True: the VM must be restarted before it is synchronised.",
    json_path = ".status.conditions[?(@.type=='RestartRequired')].status",
    priority = 1
))]
#[kube(printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"))]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.vmName == oldSelf.vmName").message("a pair keeps its VM; make a new SyncPair"))]
#[x_kube(validation = Rule::new("self.peer == oldSelf.peer").message("a pair keeps its peer; make a new SyncPair"))]
#[x_kube(validation = Rule::new("has(self.targetNamespace) == has(oldSelf.targetNamespace) && (!has(self.targetNamespace) || self.targetNamespace == oldSelf.targetNamespace)")
    .message("a pair keeps its namespace at the peer; make a new SyncPair"))]
pub struct SyncPairSpec {
    /// The VirtualMachine in this namespace.
    #[schemars(length(min = 1, max = 253))]
    pub vm_name: String,
    /// The PeerCluster.
    #[schemars(length(min = 1, max = 253))]
    pub peer: String,
    /// Namespace at the peer. Default: the same name as here.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub target_namespace: Option<String>,
    /// Volumes of the VM to synchronise. Default: all that stand on a claim.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub disks: Vec<PairDisk>,
    /// Time between two generations: how much may be lost when this site is. At least 1s, at most 168h.
    #[serde(default = "interval_default")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("duration(self) >= duration('1s') && duration(self) <= duration('168h')")
        .message("interval is a duration from 1s to 168h, such as 10s"))]
    pub interval: Duration,
    /// Which generations the peer keeps.
    #[serde(default)]
    pub retention: Retention,
    /// Most bits per second that this pair sends, as a quantity: 100M is 100 Mbit/s. Absent: no limit. At least 64k.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("isQuantity(self) && quantity(self).compareTo(quantity('64k')) >= 0")
        .message("bandwidth is a quantity of bits per second, at least 64k, such as 100M; to stop sending set paused"))]
    pub bandwidth: Option<String>,
    /// Send nothing for now. The VM runs on, its changes are remembered.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// The claim on each side that holds what belongs to the synchronisation itself (journal, history, marks).
    #[serde(default)]
    pub metadata: Metadata,
    /// Where the VM shall run. A change moves it, if `atMove` says that it knows where the VM is.
    #[serde(default)]
    pub active_site: Site,
    /// `status.moves` at the time of writing. While it differs from it, a wish to move is shown (`SiteDiffers`) and nothing moves: an old
    /// manifest that is applied again, or a site that returns, never moves a VM by itself.
    #[serde(default, skip_serializing_if = "is_zero")]
    #[schemars(range(min = 0))]
    pub at_move: i64,
    /// When a wished move begins.
    #[serde(default, skip_serializing_if = "Cutover::is_default")]
    pub cutover: Cutover,
    /// After a failover: what this site wrote alone may be overwritten, so that it becomes the replica. It stays a kept generation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overwrite_diverged: Option<OverwriteDiverged>,
}

/// Consent to overwriting what the home wrote alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OverwriteDiverged {
    /// `status.moves` at the time of writing. While it differs from it, nothing is overwritten.
    #[schemars(range(min = 0))]
    pub at_move: i64,
}

/// When a wished move begins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("(has(self.policy) && self.policy == 'At') == has(self.at)")
    .message("cutover.at is the time for the policy At, and only for that"))]
#[x_kube(validation = Rule::new("(has(self.policy) && self.policy == 'WhenReady') == (has(self.maxBytes) || has(self.maxSeconds))")
    .message("the policy WhenReady, and only that, needs cutover.maxBytes or cutover.maxSeconds"))]
pub struct Cutover {
    #[serde(default)]
    pub policy: CutoverPolicy,
    /// WhenReady: the peer may lack at most so much disk content, as a quantity of bytes such as 64Mi.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("isQuantity(self) && quantity(self).compareTo(quantity('4Ki')) >= 0")
        .message("cutover.maxBytes is a quantity of bytes, at least 4Ki, such as 64Mi"))]
    pub max_bytes: Option<String>,
    /// WhenReady: what the peer lacks, disks and memory, may take the link at most so long, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86_400))]
    pub max_seconds: Option<i64>,
    /// At: not before this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub at: Option<jiff::Timestamp>,
}

impl Cutover {
    fn is_default(&self) -> bool {
        *self == Cutover::default()
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CutoverPolicy {
    /// At once.
    #[default]
    Manual,
    /// As soon as little enough is left to send.
    WhenReady,
    /// At a time.
    At,
}

fn is_zero(count: &i64) -> bool {
    *count == 0
}

/// One volume of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PairDisk {
    /// Name in `spec.template.spec.volumes` of the VM.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Storage class at the peer. Default: as the PeerCluster maps the class of the claim here.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub target_storage_class: Option<String>,
}

/// Both bounds hold; the newest generation is always kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Retention {
    /// How many generations.
    #[serde(default = "retention_count_default")]
    #[schemars(range(min = 1, max = 10_000))]
    pub count: u32,
    /// How old they may be. Absent: no bound. At least 1m, at most 8784h.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("duration(self) >= duration('1m') && duration(self) <= duration('8784h')")
        .message("retention.age is a duration from 1m to 8784h, such as 24h"))]
    pub age: Option<Duration>,
}

/// The metadata claims.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    /// Size of each. Half of it holds the largest delta between two generations, the rest history and spill. At least 1Gi.
    #[serde(default = "metadata_size_default")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("isQuantity(self) && quantity(self).compareTo(quantity('1Gi')) >= 0")
        .message("metadata.size is a quantity of bytes, at least 1Gi, such as 8Gi"))]
    pub size: String,
}

fn interval_default() -> Duration {
    std::time::Duration::from_secs(10).into()
}

fn retention_count_default() -> u32 {
    3
}

fn metadata_size_default() -> String {
    "4Gi".to_owned()
}

impl Default for Retention {
    fn default() -> Retention {
        Retention { count: retention_count_default(), age: None }
    }
}

impl Default for Metadata {
    fn default() -> Metadata {
        Metadata { size: metadata_size_default() }
    }
}

/// What the operator found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SyncPairStatus {
    /// Generation of the spec that this speaks of.
    #[serde(default)]
    pub observed_generation: i64,
    #[serde(default)]
    pub phase: Phase,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The newest generation that is whole at the peer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub committed: Option<Committed>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub disks: Vec<DiskStatus>,
    /// Bytes that the peer does not have yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag_bytes: Option<i64>,
    /// Why it is behind; absent when it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub behind_because: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<LinkStatus>,
    /// What a live migration would have to send now, and how long the link would need for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predicted_cutover: Option<PredictedCutover>,
    /// The same for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub summary: Option<Summary>,
    /// Where the VM is active, as the sidecars' epochs say.
    #[serde(default)]
    pub active_site: Site,
    /// The counter of the epoch at which it is active there; a side that serves at a lower one has been replaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<i64>,
    /// How often it has changed its site.
    #[serde(default)]
    pub moves: i64,
    /// While the VM is active at the peer: its claims here, which are the replica, by name with their UIDs. Other Pods are kept off them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub claims: BTreeMap<String, String>,
    /// The move that is under way, or the attempt that failed last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crossing: Option<PairCrossing>,
    /// The last moves, newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<Moved>,
}

/// An attempt to move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PairCrossing {
    pub id: String,
    pub to: Site,
    /// The VM does not run.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stopped: bool,
    pub stage: Stage,
    /// For people.
    #[serde(default)]
    pub message: String,
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub began: jiff::Timestamp,
    /// When it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub failed: Option<jiff::Timestamp>,
    /// Attempts at this move so far, this one included.
    #[serde(default)]
    pub attempt: i64,
    /// What the prediction was when it began, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predicted_seconds: Option<i64>,
}

/// A move that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Moved {
    pub to: Site,
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub ended: jiff::Timestamp,
    /// From the beginning of the attempt until the VM was seen running at its new site. Absent: it was not planned here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predicted_seconds: Option<i64>,
    /// It was a failover: a person promoted the peer without the home.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub failover: bool,
}

/// Where a pair stands, in one word.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Serialize,
    Deserialize,
    JsonSchema,
    strum::EnumIter,
    strum::EnumMessage,
    strum::IntoStaticStr,
)]
pub enum Phase {
    /// Something that it needs is not there; see the conditions.
    #[default]
    Pending,
    /// The replica is being made, or the VM must be restarted.
    Preparing,
    /// The first whole generation is on its way.
    Synchronizing,
    /// A whole generation is at the peer, and changes follow.
    Protected,
    /// A whole generation is at the peer, and changes do not follow at the moment.
    Lagging,
    /// A person paused it.
    Paused,
    /// The VM does not run; the peer has what was last sent.
    Stopped,
    /// The VM is on its way to the other site.
    Moving,
    /// The VM is active at the peer after a failover, and the home wrote alone; a person must decide.
    Diverged,
    /// It is being taken apart.
    Deleting,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Committed {
    /// "epoch.number".
    pub generation: String,
    /// When it was cut.
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub cut_time: jiff::Timestamp,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DiskStatus {
    pub name: String,
    pub size_bytes: i64,
    /// Written since the newest committed generation.
    pub dirty_bytes: i64,
    /// Of those, already durable at the peer.
    pub staged_bytes: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LinkStatus {
    pub connected: bool,
    pub round_trip_millis: i64,
    /// Measured delivery, bytes per second.
    pub rate_bytes_per_second: i64,
    /// Sent since the VM's sidecar started: guest content covered.
    pub content_bytes: i64,
    /// The same as it went over the link.
    pub wire_bytes: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PredictedCutover {
    /// Disk content that the peer lacks, and the guest's whole memory.
    pub bytes: i64,
    /// At the rate last measured. What the guest writes meanwhile is not counted.
    pub transfer_seconds: i64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// Such as "12 MiB".
    #[serde(default)]
    pub behind: String,
    /// Such as "14s".
    #[serde(default)]
    pub transfer: String,
}
