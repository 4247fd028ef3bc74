//! Watari itself comes and goes while a pair runs: an upgrade, and an uninstallation with everything left as it is.

use anyhow::ensure;

use crate::play::Play;
use crate::scene::until;

/// What the guest writes while nothing of the chart is there.
const WRITTEN_ALONE: u64 = 1 << 20;

impl Play {
    /// The pair runs at home. The chart is upgraded, then uninstalled at both sites, then installed again: the VM's Pod stays the same
    /// one, its guest writes on, and the pair goes on where it was.
    pub async fn outlives_the_chart(&self) -> anyhow::Result<()> {
        let a = &self.scene.pair.a;
        let before = self.running_pod(a).await?.metadata.uid;
        for site in &self.scene.sites {
            site.install(&self.scene.system, &["operator.replicas=1"]).await?;
        }
        self.until_committed_after("the upgrade").await?;
        for site in &self.scene.sites {
            site.uninstall(&self.scene.system).await?;
        }
        let mut guest = self.guest(a).await?;
        let written = guest.written()?;
        guest.has_written(written + WRITTEN_ALONE)?;
        drop(guest);
        for site in &self.scene.sites {
            site.install(&self.scene.system, &[]).await?;
        }
        self.until_committed_after("the new installation").await?;
        let after = self.running_pod(a).await?.metadata.uid;
        ensure!(before.is_some() && before == after, "the VM's Pod is another one");
        let mut guest = self.guest(a).await?;
        guest.is_clean()?;
        guest.resume()
    }

    /// A generation that was not there yet is whole at the peer.
    async fn until_committed_after(&self, what: &str) -> anyhow::Result<()> {
        let before = self.status().await?.committed;
        until(&format!("a new generation after {what}"), async || {
            let now = self.status().await?.committed;
            Ok((now.is_some() && now != before).then_some(()))
        })
        .await
    }
}
