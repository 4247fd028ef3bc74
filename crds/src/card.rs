//! The site card: what a site's operator tells its peers about itself, in a ConfigMap that the peers' kubeconfig may read.
//!
//! A peer's kubeconfig may see neither nodes nor KubeVirt's configuration; each operator looks at its own cluster and writes
//! down what matters. A field that an older operator did not write is empty, which never counts as "not there".

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Content of [`crate::names::SITE_CARD`], as JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SiteCard {
    /// The site's name.
    pub site: String,
    /// Version of its operator.
    pub watari_version: String,
    /// As its API server says.
    pub kubernetes_version: String,
    /// Certificates (PEM) of the authorities that vouch for its sidecars; several during a rotation.
    pub authorities: String,
    /// `host:port` of its gateway, as reachable from outside; empty: not known.
    pub gateway: String,
    pub kubevirt: Option<KubeVirtCard>,
    /// Its storage classes; the value says whether it is the default.
    pub storage_classes: BTreeMap<String, bool>,
    /// Names of its nodes: KubeVirt cannot migrate between nodes of one name.
    pub nodes: Vec<String>,
    /// When this was written last, seconds since the Unix epoch: an old card means an operator that does not run.
    pub written_unix_seconds: i64,
}

/// What matters about a site's KubeVirt.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KubeVirtCard {
    /// As observed by KubeVirt itself; empty: not known.
    pub version: String,
    pub feature_gates: Vec<String>,
}
