//! What this operator is told at its start; nothing changes while it runs.

/// From the command line.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This site's name; each cluster has its own.
    pub site: String,
    /// The operator's own namespace: authority, site card, kubeconfigs of peers.
    pub namespace: String,
    /// The sidecar's image, for replica Pods.
    pub image: String,
    /// `Always`, `IfNotPresent` or `Never`.
    pub image_pull_policy: String,
    /// `host:port` of this site's gateway, as reachable for peers; empty: there is none.
    pub gateway: String,
}
