//! `make clusters` goes on wherever it, or what it made, was stopped.

use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use watari_clusters::handle::{ClaimKind, Ours};
use watari_clusters::plan::ClusterPlan;
use watari_clusters::{detached::Detached, keeper, node};

use crate::scene::play;

/// Instants at which `up` is killed: while nodes boot, while images are imported, while nodes register.
const INSTANTS_MILLISECONDS: [u64; 4] = [60, 300, 1200, 4000];

fn up(ours: &Ours) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_watari-clusters"));
    let (clusters, nodes) = (ours.plan.clusters.len().to_string(), ours.a().nodes.to_string());
    command.args(["up", "--clusters", &clusters, "--nodes", &nodes]).env("WATARI_CLUSTERS_DIR", ours.folders.root());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn ran(status: ExitStatus) -> anyhow::Result<()> {
    ensure!(status.success(), "up ended with {status}");
    Ok(())
}

#[tokio::test]
async fn after_kill_9_of_nodes_keeper_and_up_itself_everything_is_there_again() -> anyhow::Result<()> {
    play("resume", |scene| async move {
        let Some(ours) = scene.pair.ours.clone() else {
            eprintln!("skipped: other people's clusters are not killed");
            return Ok(());
        };
        let kind = ClaimKind { block: true, shared: true };
        for cluster in scene.pair.both() {
            ensure!(scene.claim(cluster, "data", kind).await?);
            scene.pod(cluster, "writer", "echo kept >/data/data", &[("data", kind)]).await?;
            scene.output(cluster, "writer").await?;
        }
        for node in [ours.a(), ours.b()].into_iter().flat_map(ClusterPlan::node_plans) {
            node::kill(&ours.folders, &node)?;
        }
        let process = Detached::read(&ours.folders.keeper()).context("the keeper is recorded")?;
        ensure!(process.kill(Duration::from_secs(5)), "the keeper does not end");
        ensure!(keeper::running(&ours.folders).is_none());

        for instant in INSTANTS_MILLISECONDS {
            let mut child = up(&ours).spawn()?;
            tokio::time::sleep(Duration::from_millis(instant)).await;
            child.kill()?;
            child.wait()?;
        }
        ran(up(&ours).status()?)?;
        ran(up(&ours).status()?).context("a second time in a row")?;

        for cluster in scene.pair.both() {
            scene.pod(cluster, "reader", "head -c 4 /data/data", &[("data", kind)]).await?;
            let read = scene.output(cluster, "reader").await?;
            ensure!(read == "kept", "cluster {}: {read:?}", cluster.name);
        }
        Ok(())
    })
    .await
}
