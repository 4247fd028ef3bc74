//! A VM's whole life without hooks.

use kubevirt_standin::objects::Kind;
use serde_json::json;
use watari_clusters::handle::ClaimKind;

use crate::stage::{PATIENCE, play, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_boots_from_its_claim_writes_and_stops_when_it_is_halted() -> anyhow::Result<()> {
    play("boot", |stage| async move {
        let [a, _] = stage.clusters();
        stage.vm(a, "vm", "Always", ClaimKind { block: false, shared: false }, "start=1 rate=500000").await?;
        stage.until_printable(a, "vm", "Running").await?;
        let mut guest = stage.guest(a).await?;
        guest.has_written(1 << 20)?;
        guest.is_clean()?;
        drop(guest);
        stage.merge(a, Kind::Vm, "vm", json!({ "spec": { "runStrategy": "Halted" } })).await?;
        stage.until_printable(a, "vm", "Stopped").await?;
        until("the Pod to be gone", PATIENCE, || async { Ok(stage.launchers(a).await?.is_empty().then_some(())) })
            .await?;
        // The VMI goes after its Pods.
        stage.until(a, Kind::Vmi, "vm", "nothing", |vmi| vmi.is_null()).await.map(drop)
    })
    .await
}
