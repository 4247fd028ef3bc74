//! Migrations that do not come to their end.

use std::time::Duration;

use anyhow::ensure;
use kube::api::DeleteParams;
use kubevirt_standin::objects::Kind;
use serde_json::Value;
use watari_clusters::handle::ClaimKind;

use crate::stage::play;

const LOCAL: ClaimKind = ClaimKind { block: false, shared: false };

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_is_called_off_leaves_the_vm_where_it_was_and_the_next_one_succeeds() -> anyhow::Result<()> {
    play("call-off", |stage| async move {
        let [a, b] = stage.clusters();
        stage.exchange_trust().await?;
        // More changes of memory than the line carries: it cannot end by itself. With more writes QEMU's mirror would not end either.
        let guest = "start=1 rate=20000 churn=40000000";
        stage.vm(a, "vm", "Always", LOCAL, guest).await?;
        stage.vm(b, "vm", "WaitAsReceiver", LOCAL, guest).await?;
        stage.until_printable(b, "vm", "WaitingForReceiver").await?;
        stage.until_printable(a, "vm", "Running").await?;
        stage.guest(a).await?.has_written(64 << 10)?;

        stage.send(a, b, "vm", "first").await?;
        stage.until_migration(a, "first", "Running").await?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        // At the target: it is the source that has to hear of it.
        let vmims = Kind::Vmim.api(&b.client, &stage.scene.namespace);
        vmims.delete("first", &DeleteParams::default()).await?;
        for cluster in [a, b] {
            stage.until(cluster, Kind::Vmim, "first", "its end", Value::is_null).await?;
        }
        stage.until_printable(b, "vm", "WaitingForReceiver").await?;
        ensure!(stage.get(a, Kind::Vmi, "vm").await?["status"]["phase"] == "Running", "the VM stays");
        let mut guest = stage.guest(a).await?;
        guest.is_clean()?;
        tokio::task::block_in_place(|| guest.control.set_churn(0))?;
        tokio::task::block_in_place(|| guest.control.resume())?;
        drop(guest);

        stage.send(a, b, "vm", "second").await?;
        stage.until_migration(b, "second", "Succeeded").await?;
        stage.guest(b).await?.is_clean()
    })
    .await
}
