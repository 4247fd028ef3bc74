//! Within a cluster, on a shared claim: nothing of the disk is copied.

use anyhow::ensure;
use kubevirt_standin::objects::Kind;
use serde_json::json;
use watari_clusters::handle::ClaimKind;

use crate::stage::play;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_on_a_shared_claim_moves_within_its_cluster_and_one_on_a_local_claim_does_not() -> anyhow::Result<()> {
    play("in-cluster", |stage| async move {
        let [a, b] = stage.clusters();
        stage.vm(a, "vm", "Always", ClaimKind { block: false, shared: true }, "start=1 rate=500000").await?;
        stage.vm(b, "local", "Always", ClaimKind { block: false, shared: false }, "").await?;
        stage.until_printable(a, "vm", "Running").await?;
        stage.guest(a).await?.has_written(1 << 20)?;
        let before = stage.get(a, Kind::Vmi, "vm").await?;

        stage.vmim(a, "move", json!({ "vmiName": "vm" })).await?;
        stage.until_migration(a, "move", "Succeeded").await?;
        let after = stage.get(a, Kind::Vmi, "vm").await?;
        ensure!(before["metadata"]["uid"] == after["metadata"]["uid"], "it is the same VMI");
        ensure!(before["status"]["activePods"] != after["status"]["activePods"], "in another Pod");
        let mut guest = stage.guest(a).await?;
        guest.has_written(2 << 20)?;
        guest.is_clean()?;

        stage.until_printable(b, "local", "Running").await?;
        stage.vmim(b, "move", json!({ "vmiName": "local" })).await?;
        stage.until_migration(b, "move", "Failed").await.map(drop)
    })
    .await
}
