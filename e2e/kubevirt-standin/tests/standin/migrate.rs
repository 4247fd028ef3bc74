//! Between the clusters, with the disk copied in full: what KubeVirt does today, and the figure that Watari is measured by.

use std::time::Instant;

use anyhow::ensure;
use kubevirt_standin::objects::Kind;
use serde_json::Value;
use watari_clusters::handle::ClaimKind;

use crate::stage::{PATIENCE, play, until};

const LOCAL: ClaimKind = ClaimKind { block: false, shared: false };
/// The guest has this much on its 64 MiB disk.
const DATA: u64 = 96 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_vm_moves_to_the_other_cluster_with_a_full_copy_of_its_disk_and_back() -> anyhow::Result<()> {
    play("migrate", |stage| async move {
        let [a, b] = stage.clusters();
        stage.exchange_trust().await?;
        stage.vm(a, "vm", "Always", LOCAL, "start=1 rate=20000000 blocks=16384").await?;
        stage.vm(b, "vm", "WaitAsReceiver", LOCAL, "start=1 rate=20000000 blocks=16384").await?;
        stage.until_printable(b, "vm", "WaitingForReceiver").await?;
        stage.until_printable(a, "vm", "Running").await?;
        let mut guest = stage.guest(a).await?;
        guest.has_written(DATA)?;
        // With more writes QEMU's mirror, which sends 64 KiB for each 4 KiB, does not end on this line.
        tokio::task::block_in_place(|| guest.control.set_rate(20_000))?;
        drop(guest);

        let (began, bytes) = (Instant::now(), stage.uplink_bytes()?);
        stage.send(a, b, "vm", "there").await?;
        let ended = stage.until_migration(b, "there", "Succeeded").await?;
        stage.until_migration(a, "there", "Succeeded").await?;
        let (seconds, bytes) = (began.elapsed().as_secs_f64(), stage.uplink_bytes()? - bytes);
        eprintln!(
            "full copy over the line: {seconds:.1} s, {:.1} MiB on the uplink",
            bytes as f64 / f64::from(1 << 20)
        );
        ensure!(bytes > 40 << 20, "a disk of random data has crossed the line: {bytes} bytes");
        ensure!(ended["status"]["migrationState"]["completed"] == true, "{ended}");

        let mut guest = stage.guest(b).await?;
        guest.is_clean()?;
        tokio::task::block_in_place(|| guest.control.resume())?;
        drop(guest);
        stage.until_printable(b, "vm", "Running").await?;
        let strategy = |wanted: &'static str| move |vm: &Value| vm["spec"]["runStrategy"] == wanted;
        stage.until(b, Kind::Vm, "vm", "its own run strategy", strategy("Always")).await?;
        stage.until(a, Kind::Vm, "vm", "to be halted", strategy("Halted")).await?;
        until("the old Pod to be gone", PATIENCE, || async { Ok(stage.launchers(a).await?.is_empty().then_some(())) })
            .await?;
        stage.until(a, Kind::Vmi, "vm", "the old VMI to be gone", Value::is_null).await?;

        // A halted VM becomes a receiver, and the guest comes back.
        stage.merge(a, Kind::Vm, "vm", serde_json::json!({ "spec": { "runStrategy": "WaitAsReceiver" } })).await?;
        stage.until_printable(a, "vm", "WaitingForReceiver").await?;
        stage.send(b, a, "vm", "back").await?;
        stage.until_migration(a, "back", "Succeeded").await?;
        stage.guest(a).await?.is_clean()
    })
    .await
}
