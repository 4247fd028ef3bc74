//! SyncReplica: what a site holds for a pair whose home is elsewhere. Written by the home's operator, executed by this site's.
//!
//! It acts only in its own namespace and refers to nothing outside it: no host paths, no foreign objects.

use std::collections::BTreeMap;

use kube::core::Duration;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::conditions::Condition;
use crate::crossing::{Crossing, CrossingStatus, MigrationEnd};
use crate::failover::{FailoverStatus, Promote};
use crate::pair::Retention;
use crate::wiring::VolumeMode;

/// What the home asks for.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(group = "watari.io", version = "v1alpha1", kind = "SyncReplica", plural = "syncreplicas", namespaced)]
#[kube(shortname = "srep", category = "watari", status = "SyncReplicaStatus")]
#[kube(doc = "The replica of a VM whose home is another cluster; written by that cluster's operator.")]
#[kube(printcolumn(name = "VM", type_ = "string", json_path = ".spec.vmName"))]
#[kube(printcolumn(name = "Home", type_ = "string", json_path = ".spec.homeSite"))]
#[kube(printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status"))]
#[kube(printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].reason"))]
#[kube(printcolumn(
    name = "Generation",
    type_ = "string",
    description = "The newest generation that is whole here.",
    json_path = ".status.committed"
))]
#[kube(printcolumn(
    name = "Role",
    type_ = "string",
    description = "Serving: the VM is active here.",
    json_path = ".status.role"
))]
#[kube(printcolumn(
    name = "Moves",
    type_ = "integer",
    description = "What promote.atMove must be.",
    json_path = ".status.moves",
    priority = 1
))]
#[kube(printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"))]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.pairId == oldSelf.pairId").message("a replica keeps its pair"))]
#[x_kube(validation = Rule::new("self.homeSite == oldSelf.homeSite && self.site == oldSelf.site").message("a replica keeps its sites"))]
#[x_kube(validation = Rule::new("self.homeSite != self.site").message("home and replica are two sites"))]
#[x_kube(validation = Rule::new("self.disks.size() == oldSelf.disks.size() && self.disks.all(d, oldSelf.disks.exists(o, o.name == d.name && o.sizeBytes <= d.sizeBytes && o.mode == d.mode))")
    .message("a replica keeps its disks, and they never shrink"))]
pub struct SyncReplicaSpec {
    /// The SyncPair's UID.
    #[schemars(length(min = 36, max = 36), regex(pattern = "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"))]
    pub pair_id: String,
    /// namespace/name of the SyncPair, for people.
    #[schemars(length(min = 3, max = 317))]
    pub pair_name: String,
    /// Name of the VM.
    #[schemars(length(min = 1, max = 253))]
    pub vm_name: String,
    /// Site of the pair's home.
    #[schemars(length(min = 1, max = 63), regex(pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub home_site: String,
    /// The site for which this is written. Elsewhere it does nothing.
    #[schemars(length(min = 1, max = 63), regex(pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub site: String,
    /// In the order that both sites share.
    #[schemars(length(min = 1, max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub disks: Vec<ReplicaDisk>,
    pub metadata: ReplicaMetadata,
    /// As in the SyncPair.
    #[schemars(length(max = 32))]
    pub interval: Duration,
    /// As in the SyncPair.
    pub retention: Retention,
    /// Most bits per second that this side would send, were it active. Absent: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 64_000))]
    pub bandwidth_bits_per_second: Option<i64>,
    /// `host:port` of the home's gateway, as reachable from here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 262)))]
    pub home_gateways: Vec<String>,
    /// Certificates (PEM) of the authorities that vouch for the home's sidecar.
    #[schemars(length(min = 1, max = 65_536))]
    pub home_authorities: String,
    /// Where the VM may run, and so its replica.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(length(max = 64))]
    pub node_selector: BTreeMap<String, String>,
    /// The VirtualMachine as it shall be made here when it comes: `metadata` (name, labels, annotations) and `spec`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "kept_as_it_is")]
    pub vm: Option<serde_json::Value>,
    /// The home's end of migrations between the clusters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub home_migration: Option<MigrationEnd>,
    /// The move that is under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crossing: Option<Crossing>,
    /// How often the VM has changed its site, as the home counts.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub moves: i64,
    /// A failover: this side shall go on without the home. The one field that is written here and not by the home.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub promote: Option<Promote>,
}

impl SyncReplicaSpec {
    /// Without what is not the home's.
    pub fn of_the_home(&self) -> SyncReplicaSpec {
        SyncReplicaSpec { promote: None, ..self.clone() }
    }
}

/// An object whose fields are KubeVirt's business.
fn kept_as_it_is(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true })
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaDisk {
    /// The volume's name in the VM.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// The claim to make here; the VM will refer to it by this name.
    #[schemars(length(min = 1, max = 253))]
    pub claim: String,
    /// The guest's disk, bytes.
    #[schemars(range(min = 4096))]
    pub size_bytes: i64,
    /// Room that the claim asks for, bytes: at least the disk's size.
    #[schemars(range(min = 4096))]
    pub claim_bytes: i64,
    pub mode: VolumeMode,
    pub access: AccessMode,
    /// Absent: the cluster's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub storage_class: Option<String>,
}

/// The metadata claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaMetadata {
    /// Bytes.
    #[schemars(range(min = 1_073_741_824))]
    pub size_bytes: i64,
    pub access: AccessMode,
    /// Absent: the cluster's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub storage_class: Option<String>,
}

/// How many nodes may use a claim. ReadWriteOncePod is refused: two Pods of ours meet on a claim when a VM moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AccessMode {
    ReadWriteOnce,
    ReadWriteMany,
}

impl AccessMode {
    /// As in a claim's `accessModes`.
    pub fn name(self) -> &'static str {
        match self {
            AccessMode::ReadWriteOnce => "ReadWriteOnce",
            AccessMode::ReadWriteMany => "ReadWriteMany",
        }
    }
}

/// What this site's operator found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SyncReplicaStatus {
    /// Generation of the spec that this speaks of.
    #[serde(default)]
    pub observed_generation: i64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// UIDs of the claims that were made, by name. A claim with another UID, or none, is one whose content is lost.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub claims: BTreeMap<String, String>,
    /// The role that the folder's owner reports: Replica, Serving, …
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// The counter of the epoch that goes with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<i64>,
    /// "epoch.number" of the newest whole generation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub committed: Option<String>,
    /// Since when it is whole here. What would be lost is what was written since it was cut, shortly before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub committed_time: Option<jiff::Timestamp>,
    /// The home's sidecar is connected to the one here.
    #[serde(default)]
    pub home_answers: bool,
    /// Generations from which the VM could boot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<String>,
    /// Node of the replica's Pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The VM has a Pod here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub running: bool,
    /// While the VM is active here: bytes that the home does not have yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag_bytes: Option<i64>,
    /// The same, with the VM's memory: how long the link would need, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transfer_seconds: Option<i64>,
    /// This site's end of migrations between the clusters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationEnd>,
    /// How far this side is with the move that `spec.crossing` names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crossing: Option<CrossingStatus>,
    /// How often the VM has changed its site, as far as this side knows.
    #[serde(default)]
    pub moves: i64,
    /// The failover that `spec.promote` asked for, or the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failover: Option<FailoverStatus>,
}
