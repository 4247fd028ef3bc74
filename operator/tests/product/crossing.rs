//! The whole product once: a running VM is paired, synchronised, moved to the peer by `activeSite`, and comes back as a delta.
//!
//! KubeVirt is played by the stand-in; the guest itself says whether anything that it wrote is missing.

use anyhow::ensure;
use serde_json::json;
use watari_crds::crossing::Site;

use crate::play::{MOVE_BYTES_MAX, Play};
use crate::scene::until;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_vm_is_moved_to_the_peer_by_its_sync_pair_and_comes_back_as_a_delta() -> anyhow::Result<()> {
    Play::play("crossing", crossing).await
}

async fn crossing(play: &Play) -> anyhow::Result<()> {
    let (a, b) = (&play.scene.pair.a, &play.scene.pair.b);
    play.synchronised().await?;

    let (there, bytes) = play.go("Peer", 0).await?;
    ensure!(there.moves == 1 && there.active_site == Site::Peer, "{there:?}");
    ensure!(bytes < MOVE_BYTES_MAX, "{bytes} bytes crossed the line: more than memory and a delta");
    let mut guest = play.guest(b).await?;
    guest.is_clean()?;
    guest.resume()?;
    drop(guest);

    play.until_protected("the home to be the replica").await?;
    // The old manifest, applied once more, moves nothing.
    play.change(json!({ "activeSite": "Source" })).await?;
    play.until_condition("SiteDiffers").await?;
    let (back, _) = play.go("Source", 1).await?;
    ensure!(back.moves == 2 && back.active_site == Site::Source, "{back:?}");
    play.guest(a).await?.is_clean()?;
    until("the VM that was made at the peer to be gone", async || {
        Ok(play.scene.vms(&b.client).get_opt("shop").await?.is_none().then_some(()))
    })
    .await?;
    let mut guest = play.guest(a).await?;
    guest.resume()?;
    drop(guest);
    play.until_protected("the peer to be the replica again").await?;
    play.outlives_the_chart().await
}
