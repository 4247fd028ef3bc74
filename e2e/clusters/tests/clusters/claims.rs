//! Claims of all four kinds, as the product will ask for them.

use std::time::Duration;

use anyhow::ensure;
use k8s_openapi::api::core::v1::PersistentVolume;
use kube::Api;
use kube::api::DeleteParams;
use watari_clusters::handle::ClaimKind;

use crate::scene::{play, until};

/// Until a deleted claim's volume is gone.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn what_one_pod_writes_to_a_claim_of_each_kind_the_next_one_reads() -> anyhow::Result<()> {
    play("claims", |scene| async move {
        for cluster in scene.pair.both() {
            let mut claims = Vec::new();
            for kind in ClaimKind::ALL {
                let name = kind.name();
                if scene.claim(cluster, &name, kind).await? {
                    claims.push((name, kind));
                }
            }
            ensure!(!claims.is_empty(), "cluster {} offers no storage at all", cluster.name);
            let claims: Vec<(&str, ClaimKind)> = claims.iter().map(|(name, kind)| (name.as_str(), *kind)).collect();
            let each = |job: &str| {
                let file = |(name, kind): &(&str, ClaimKind)| {
                    let file = if kind.block { format!("/data/{name}") } else { format!("/data/{name}/file") };
                    format!("f={file}; {job}")
                };
                format!("set -e\n{}", claims.iter().map(file).collect::<Vec<_>>().join("\n"))
            };
            // The page cache is the same for both Pods: what is shown is the claim's identity, not durability.
            let write =
                each("dd if=/dev/urandom of=$f bs=1M count=8 conv=fsync 2>/dev/null; head -c 8388608 $f | sha256sum");
            scene.pod(cluster, "writer", &write, &claims).await?;
            let written = scene.output(cluster, "writer").await?;
            scene.pods(cluster).delete("writer", &DeleteParams::default()).await?;
            scene.pod(cluster, "reader", &each("head -c 8388608 $f | sha256sum"), &claims).await?;
            let read = scene.output(cluster, "reader").await?;
            ensure!(written == read, "cluster {}: written\n{written}read\n{read}", cluster.name);
            let distinct: std::collections::BTreeSet<&str> = written.lines().collect();
            ensure!(distinct.len() == claims.len(), "two claims hold the same bytes:\n{written}");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_deleted_claim_takes_its_volume_along() -> anyhow::Result<()> {
    play("removal", |scene| async move {
        let cluster = &scene.pair.a;
        let kind = ClaimKind { block: true, shared: false };
        ensure!(scene.claim(cluster, "data", kind).await?);
        scene.pod(cluster, "user", "echo x >/data/data", &[("data", kind)]).await?;
        scene.output(cluster, "user").await?;
        let claim = scene.claims(cluster).get("data").await?;
        let volume = claim.spec.and_then(|spec| spec.volume_name).expect("a Pod has used it, so it is bound");
        scene.pods(cluster).delete("user", &DeleteParams::default()).await?;
        scene.claims(cluster).delete("data", &DeleteParams::default()).await?;
        let volumes: Api<PersistentVolume> = Api::all(cluster.client.clone());
        until("the volume to be gone", REMOVAL_PATIENCE, || async {
            Ok(volumes.get_opt(&volume).await?.is_none().then_some(()))
        })
        .await?;
        if let Some(ours) = &scene.pair.ours {
            let folder = ours.folders.volumes(ours.a());
            let left: Vec<_> = std::fs::read_dir(folder)?.flatten().map(|entry| entry.file_name()).collect();
            let ours: Vec<_> = left.iter().filter(|name| name.to_string_lossy().starts_with(&volume)).collect();
            ensure!(ours.is_empty(), "left on the disk: {ours:?}");
        }
        Ok(())
    })
    .await
}
