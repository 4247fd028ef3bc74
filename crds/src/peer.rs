//! PeerCluster: where another cluster is, and whether pairs can use it. Made on both sides; belongs to no namespace.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::conditions::Condition;

/// What a person says about a peer.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(group = "watari.io", version = "v1alpha1", kind = "PeerCluster", plural = "peerclusters")]
#[kube(shortname = "peer", category = "watari", status = "PeerClusterStatus")]
#[kube(doc = "Another cluster to which VMs can be kept synchronised.")]
#[kube(printcolumn(name = "Site", type_ = "string", json_path = ".spec.site"))]
#[kube(printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status"))]
#[kube(printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].reason"))]
#[kube(printcolumn(
    name = "RTT (ms)",
    type_ = "integer",
    description = "Time until the peer's API server has answered, in milliseconds.",
    json_path = ".status.roundTripMillis"
))]
#[kube(printcolumn(name = "Watari", type_ = "string", json_path = ".status.versions.watari"))]
#[kube(printcolumn(name = "KubeVirt", type_ = "string", json_path = ".status.versions.kubevirt"))]
#[kube(printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"))]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.site == oldSelf.site").message("a PeerCluster keeps its site; make a new one"))]
pub struct PeerClusterSpec {
    /// The peer's site name, as in the values of its chart. It becomes part of certificates.
    #[schemars(length(min = 1, max = 63), regex(pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub site: String,
    /// Name of a Secret in the operator's namespace, with the label app.kubernetes.io/managed-by=watari, whose key
    /// `kubeconfig` leads to the peer's API server.
    #[schemars(length(min = 1, max = 253))]
    pub kubeconfig_secret: String,
    /// Namespace of the operator at the peer, where its site card is.
    #[serde(default = "operator_namespace")]
    #[schemars(length(min = 1, max = 63))]
    pub operator_namespace: String,
    /// `host:port` of the peer's gateway, as reachable from this cluster's Pods, tried in order. Absent: what the peer says of itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(validation = Rule::new("self.all(a, a.size() <= 262 && a.matches('^([A-Za-z0-9.-]+|\\\\[[0-9a-fA-F:]+\\\\]):[0-9]{1,5}$'))")
        .message("each gateway is host:port, such as gateway.osaka.example:7443"))]
    #[schemars(inner(length(max = 262)))]
    pub gateways: Vec<String>,
    /// Storage class there for a storage class here. A class that is not named keeps its name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(length(max = 64))]
    pub storage_classes: BTreeMap<String, String>,
}

fn operator_namespace() -> String {
    "watari-system".to_owned()
}

/// What the operator found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PeerClusterStatus {
    /// Generation of the spec that this speaks of.
    #[serde(default)]
    pub observed_generation: i64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Milliseconds until the peer's API server had answered a small request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub round_trip_millis: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub versions: Option<Versions>,
    /// The gateway that pairs dial.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateways: Vec<String>,
    /// Storage classes at the peer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub storage_classes: Vec<String>,
    /// What is missing for a live migration, or for pairs at all, each with its remedy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<Missing>,
}

/// What runs at the peer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Versions {
    #[serde(default)]
    pub watari: String,
    #[serde(default)]
    pub kubernetes: String,
    /// Empty: no KubeVirt was found there.
    #[serde(default)]
    pub kubevirt: String,
}

/// One thing that is missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Missing {
    /// Name of the site where it is missing.
    pub site: String,
    pub what: String,
    pub remedy: String,
}
