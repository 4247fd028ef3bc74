//! The home is lost, the VM boots at the peer from the last whole generation, the home returns, and the VM goes back when a person says so.
//!
//! The clusters are shared with other tests, so the home is not killed: the line between the sites is cut, for the sidecars as for the
//! operators. That is the harder half of a disaster: the home lives on and writes alone. KubeVirt is played by the stand-in.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use watari_crds::crossing::Site;
use watari_crds::pair::Phase;
use watari_crds::replica::{SyncReplica, SyncReplicaStatus};

use crate::play::{MOVE_BYTES_MAX, Play};
use crate::scene::until;

/// How long a home that has returned is watched for a move that nobody asked for.
const QUIET: Duration = Duration::from_secs(25);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_homes_vm_boots_at_the_peer_and_goes_back_only_when_a_person_says_so() -> anyhow::Result<()> {
    Play::play("failover", story).await
}

async fn story(play: &Play) -> anyhow::Result<()> {
    let (a, b) = (&play.scene.pair.a, &play.scene.pair.b);
    play.synchronised().await?;
    let (run, whole) = written_and_committed(play).await?;

    let replicas: Api<SyncReplica> = play.scene.api(&b.client);
    let status =
        async || -> anyhow::Result<SyncReplicaStatus> { Ok(replicas.get("shop").await?.status.unwrap_or_default()) };
    // The peer's operator looks now and then: what it would boot from is what it knows.
    until("the peer to know its generation", async || {
        let status = status().await?;
        Ok((status.home_answers && status.committed.is_some()).then_some(()))
    })
    .await?;

    play.ours.link("cut")?;
    let failover = async |more: &[&str]| {
        let arguments = ["failover", "shop", "-n", &play.scene.namespace];
        play.scene.sites[1].kubectl_watari(&[&arguments[..], more].concat()).await
    };
    until("the peer to miss the home", async || Ok((!status().await?.home_answers).then_some(()))).await?;
    // Nobody is there to agree.
    let refused = format!("{:#}", failover(&[]).await.err().context("it must ask")?);
    ensure!(refused.contains("exit status: 1") && refused.contains("lost") && refused.contains("--yes"), "{refused}");
    ensure!(status().await?.failover.is_none(), "nothing was asked for");
    eprintln!("{}", failover(&["--yes"]).await?);
    is_a_point_in_time(play, run, &whole).await?;
    let there = status().await?;
    ensure!(there.moves == 1 && there.role.as_deref() == Some("Serving") && there.running, "{there:?}");
    // Once more is once.
    eprintln!("{}", failover(&["--yes"]).await?);

    play.ours.link("restore")?;
    let words = play.until_condition("Diverged").await?;
    ensure!(words.contains("bytes that it wrote alone"), "{words}");
    play.until_printable(a, "Stopped").await?;
    stays_where_it_is(play).await?;

    play.change(json!({ "overwriteDiverged": { "atMove": 1 } })).await?;
    play.until_protected("the home to be the replica").await?;
    let (back, bytes) = play.go("Source", 1).await?;
    ensure!(back.moves == 2 && back.active_site == Site::Source, "{back:?}");
    ensure!(bytes < MOVE_BYTES_MAX, "{bytes} bytes crossed the line: more than memory and a delta");
    play.guest(a).await?.is_clean()
}

/// The guest's run, and what each of its writers had written of which the peer has a whole generation.
async fn written_and_committed(play: &Play) -> anyhow::Result<(u64, Vec<u64>)> {
    let mut guest = play.guest(&play.scene.pair.a).await?;
    let hello = tokio::task::block_in_place(|| guest.control.hello(kubevirt_standin::guest::GUEST_PATIENCE))?;
    let stats = tokio::task::block_in_place(|| guest.control.stats())?;
    drop(guest);
    let then = Timestamp::now();
    until("a generation that was cut later", async || {
        Ok(play.status().await?.committed.filter(|it| it.cut_time > then).map(drop))
    })
    .await?;
    let run = hello.groups.first().context("the guest has a disk")?.layout.run;
    Ok((run, stats.streams.iter().map(|stream| stream.acknowledged).collect()))
}

/// The guest that booted at the peer found a disk as one power failure leaves it, no older than the last whole generation.
async fn is_a_point_in_time(play: &Play, run: u64, whole: &[u64]) -> anyhow::Result<()> {
    let mut guest = play.guest(&play.scene.pair.b).await?;
    let hello = tokio::task::block_in_place(|| guest.control.hello(kubevirt_standin::guest::GUEST_PATIENCE))?;
    let found = &hello.groups.first().context("the guest has a disk")?.found;
    let last = found.iter().find(|tally| tally.run == run).context("the run at home is found")?;
    eprintln!("found at the peer: {last:?}; whole before: {whole:?}");
    ensure!(last.clean(), "{found:?}");
    ensure!(last.acknowledged.iter().zip(whole).all(|(found, whole)| found >= whole), "{last:?} {whole:?}");
    tokio::task::block_in_place(|| guest.control.set_rate(200_000))?;
    Ok(())
}

/// Nobody asked for a move: a home that starts its VM again is refused, and the old manifest moves nothing.
async fn stays_where_it_is(play: &Play) -> anyhow::Result<()> {
    let vms = play.scene.vms(&play.scene.pair.a.client);
    let start = Patch::Merge(json!({ "spec": { "runStrategy": "Always" } }));
    vms.patch("shop", &PatchParams::default(), &start).await?;
    play.change(json!({ "activeSite": "Source" })).await?;
    play.until_condition("SiteDiffers").await?;
    tokio::time::sleep(QUIET).await;
    let status = play.status().await?;
    ensure!(status.active_site == Site::Peer && status.moves == 1 && status.crossing.is_none(), "{status:?}");
    ensure!(status.phase == Phase::Diverged && status.history[0].failover, "{status:?}");
    let vm: Value = vms.get("shop").await?.data;
    ensure!(vm["spec"]["runStrategy"] == "Halted" && vm["status"]["created"] != true, "{vm}");
    Ok(())
}
