//! `kubectl get nodes,pods -A` of both.

use std::collections::BTreeSet;

use anyhow::ensure;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{Api, ResourceExt};
use watari_clusters::handle::{Pair, is_ready};

#[tokio::test]
async fn every_node_of_both_clusters_is_ready_and_no_two_share_a_name() -> anyhow::Result<()> {
    let pair = Pair::open().await?;
    let mut names = BTreeSet::new();
    for cluster in pair.both() {
        let nodes = Api::<Node>::all(cluster.client.clone()).list(&Default::default()).await?.items;
        ensure!(!nodes.is_empty(), "cluster {} has no node", cluster.name);
        for node in nodes {
            ensure!(is_ready(&node), "node {} of cluster {} is not ready", node.name_any(), cluster.name);
            ensure!(names.insert(node.name_any()), "both clusters have a node {}", node.name_any());
        }
    }
    Ok(())
}

#[tokio::test]
async fn no_pod_of_the_system_fails() -> anyhow::Result<()> {
    for cluster in Pair::open().await?.both() {
        for pod in Api::<Pod>::all(cluster.client.clone()).list(&Default::default()).await?.items {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
            ensure!(phase != "Failed", "{}/{} failed", pod.namespace().unwrap_or_default(), pod.name_any());
        }
    }
    Ok(())
}
