//! What a person does with one VM on two clusters, for the tests that play through a whole story.

use std::time::Instant;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kubevirt_standin::guest::Guest;
use kubevirt_standin::install;
use serde_json::{Value, json};
use watari_clusters::handle::{Cluster, Ours};
use watari_clusters::provision::LOCAL_CLASS;
use watari_crds::pair::{Phase, SyncPair, SyncPairStatus};
use watari_crds::replica::SyncReplica;
use watari_e2e::build;

use crate::scene::{Scene, condition, until};

/// The disk's size, and what the guest has written of it before a test goes on.
const DISK: &str = "128Mi";
const DATA: u64 = 64 << 20;
/// What a move may send at most: the guest's memory (160 MiB, much of it zero) and a delta. The disk's content alone is 64 MiB.
pub const MOVE_BYTES_MAX: u64 = 120 << 20;

/// A scene with KubeVirt's stand-in and the VM `shop`.
pub struct Play {
    pub scene: Scene,
    pub ours: Ours,
}

impl Play {
    /// Plays `story` and cleans up after it; of one that failed it prints what there is.
    pub async fn play(test: &str, story: impl AsyncFnOnce(&Play) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let Some(scene) = Scene::begin(test).await? else { return Ok(()) };
        let ours = scene.pair.ours.clone().context("the scene is for our own clusters")?;
        let program = tokio::task::block_in_place(|| build::binary("kubevirt-standin"))?;
        install::up(&ours, &program).await?;
        let play = Play { scene, ours };
        let result = story(&play).await;
        play.ours.link("restore")?;
        if result.is_err() {
            eprintln!("{}", play.scene.logs().await);
            play.collect().await;
        }
        let cleaned = play.clean().await;
        play.scene.end().await?;
        result.and(cleaned)
    }

    pub fn pairs(&self) -> Api<SyncPair> {
        self.scene.api(&self.scene.pair.a.client)
    }

    /// A VM that runs at home, is paired and synchronised, and has written slowly since.
    pub async fn synchronised(&self) -> anyhow::Result<()> {
        let a = &self.scene.pair.a;
        self.boot(a).await?;
        self.pair().await?;
        // It runs already, so it has to be restarted once; Watari never does that by itself.
        self.until_condition("RestartRequired").await?;
        self.restart(a).await?;
        self.until_protected("the first whole generation").await?;
        let mut guest = self.guest(a).await?;
        guest.has_written(DATA)?;
        tokio::task::block_in_place(|| guest.control.set_rate(200_000))?;
        drop(guest);
        // What was written so far is at the peer.
        self.until_behind_at_most(4 << 20).await
    }

    /// Waits until a condition of the pair holds, and answers its words.
    pub async fn until_condition(&self, kind: &str) -> anyhow::Result<String> {
        until(&format!("the pair to say {kind}"), async || {
            let pair = serde_json::to_value(self.pairs().get("shop").await?)?;
            Ok(condition(&pair, kind).filter(|(status, _)| status == "True").map(|(_, words)| words))
        })
        .await
    }

    /// A VM with one disk, and a guest that fills it.
    async fn boot(&self, a: &Cluster) -> anyhow::Result<()> {
        let claim = json!({
            "metadata": { "name": "shop-root" },
            "spec": {
                "storageClassName": LOCAL_CLASS, "accessModes": ["ReadWriteOnce"],
                "resources": { "requests": { "storage": DISK } },
            },
        });
        let claims: Api<PersistentVolumeClaim> = self.scene.api(&a.client);
        claims.create(&PostParams::default(), &serde_json::from_value(claim)?).await?;
        let vm = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": { "name": "shop" },
            "spec": { "runStrategy": "Always", "template": {
                "metadata": { "annotations": { "standin.watari.internal/guest": "start=1 rate=20000000 blocks=16384" } },
                "spec": {
                    "terminationGracePeriodSeconds": 0,
                    "domain": { "memory": { "guest": "160Mi" }, "devices": { "disks": [{ "name": "root", "disk": { "bus": "virtio" } }] } },
                    "volumes": [{ "name": "root", "persistentVolumeClaim": { "claimName": "shop-root" } }],
                },
            } },
        });
        self.scene.vms(&a.client).create(&PostParams::default(), &serde_json::from_value(vm)?).await?;
        self.until_printable(a, "Running").await
    }

    async fn pair(&self) -> anyhow::Result<()> {
        let pair = json!({
            "apiVersion": "watari.io/v1alpha1", "kind": "SyncPair", "metadata": { "name": "shop" },
            "spec": { "vmName": "shop", "peer": self.scene.peer(), "metadata": { "size": "1Gi" }, "interval": "2s" },
        });
        self.pairs().create(&PostParams::default(), &serde_json::from_value(pair)?).await?;
        Ok(())
    }

    pub async fn change(&self, spec: Value) -> anyhow::Result<()> {
        let patch = Patch::Merge(json!({ "spec": spec }));
        self.pairs().patch("shop", &PatchParams::default(), &patch).await?;
        Ok(())
    }

    async fn restart(&self, cluster: &Cluster) -> anyhow::Result<()> {
        for (strategy, printable) in [("Halted", "Stopped"), ("Always", "Running")] {
            let patch = Patch::Merge(json!({ "spec": { "runStrategy": strategy } }));
            self.scene.vms(&cluster.client).patch("shop", &PatchParams::default(), &patch).await?;
            self.until_printable(cluster, printable).await?;
        }
        Ok(())
    }

    pub async fn until_printable(&self, cluster: &Cluster, wanted: &str) -> anyhow::Result<()> {
        until(&format!("the VM to be {wanted}"), async || {
            let vm = self.scene.vms(&cluster.client).get("shop").await?;
            Ok((vm.data["status"]["printableStatus"] == wanted).then_some(()))
        })
        .await
    }

    pub async fn status(&self) -> anyhow::Result<SyncPairStatus> {
        Ok(self.pairs().get("shop").await?.status.unwrap_or_default())
    }

    pub async fn until_protected(&self, what: &str) -> anyhow::Result<()> {
        until(what, async || Ok((self.status().await?.phase == Phase::Protected).then_some(()))).await
    }

    async fn until_behind_at_most(&self, bytes: i64) -> anyhow::Result<()> {
        until("little to be left to send", async || {
            Ok(self.status().await?.lag_bytes.filter(|lag| *lag <= bytes).map(drop))
        })
        .await
    }

    /// Asks for the move, waits until the VM runs there, and answers the pair's status and the bytes that crossed the line.
    pub async fn go(&self, to: &str, at_move: i64) -> anyhow::Result<(SyncPairStatus, u64)> {
        let (begin, before) = (Instant::now(), self.bytes()?);
        if to == "Peer" {
            // As a person on a bad day.
            let site = &self.scene.sites[0];
            eprintln!("{}", site.kubectl_watari(&["cutover", "shop", "-n", &self.scene.namespace]).await?);
        } else {
            self.change(json!({ "activeSite": to, "atMove": at_move })).await?;
        }
        let status = self.until_moved(at_move + 1).await?;
        let bytes = self.bytes()? - before;
        let (seconds, recorded) = (begin.elapsed().as_secs_f64(), &status.history[0]);
        eprintln!(
            "to {to}: {seconds:.1} s until it was recorded ({recorded:?}), {:.1} MiB on the line",
            bytes as f64 / f64::from(1 << 20)
        );
        Ok((status, bytes))
    }

    /// Waits until that many moves are done and none is under way.
    pub async fn until_moved(&self, moves: i64) -> anyhow::Result<SyncPairStatus> {
        until(&format!("{moves} moves to be done"), async || {
            let status = self.status().await?;
            Ok((status.moves == moves && status.crossing.is_none()).then_some(status))
        })
        .await
    }

    /// Bytes that have crossed the line, both ways.
    fn bytes(&self) -> anyhow::Result<u64> {
        let stats = self.ours.link("stats")?;
        Ok(stats.a_to_b.counters.delivered_bytes + stats.b_to_a.counters.delivered_bytes)
    }

    pub async fn running_pod(&self, cluster: &Cluster) -> anyhow::Result<Pod> {
        let pods: Api<Pod> = self.scene.api(&cluster.client);
        let list = pods.list(&ListParams::default().labels("kubevirt.io=virt-launcher")).await?;
        let running = |pod: &Pod| pod.status.as_ref().and_then(|it| it.phase.as_deref()) == Some("Running");
        list.items.into_iter().find(running).context("a VM that runs has a Pod")
    }

    pub async fn guest(&self, cluster: &Cluster) -> anyhow::Result<Guest> {
        Guest::of(&self.ours, &self.running_pod(cluster).await?)
    }

    /// The VM goes, then the pair; of a test that failed also what would hold its namespace.
    async fn clean(&self) -> anyhow::Result<()> {
        for cluster in self.scene.pair.both() {
            self.scene.vms(&cluster.client).delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
        }
        let replicas: Api<SyncReplica> = self.scene.api(&self.scene.pair.b.client);
        if self.pairs().get_opt("shop").await?.is_some() {
            self.pairs().delete("shop", &DeleteParams::default()).await?;
        }
        let gone = until("the pair and its replica to be gone", async || {
            let gone = self.pairs().get_opt("shop").await?.is_none() && replicas.get_opt("shop").await?.is_none();
            Ok(gone.then_some(()))
        })
        .await;
        if gone.is_err() {
            let patch = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
            // Either may be gone.
            let _ = self.pairs().patch("shop", &PatchParams::default(), &patch).await;
            let _ = replicas.patch("shop", &PatchParams::default(), &patch).await;
        }
        gone
    }

    /// For a test that failed: what there is on both clusters.
    async fn collect(&self) {
        for cluster in self.scene.pair.both() {
            let pods: Api<Pod> = self.scene.api(&cluster.client);
            for pod in pods.list(&ListParams::default()).await.map(|list| list.items).unwrap_or_default() {
                let name = pod.metadata.name.unwrap_or_default();
                let log = kube::api::LogParams {
                    container: Some("watari".into()),
                    tail_lines: Some(30),
                    ..Default::default()
                };
                let text = pods.logs(&name, &log).await.unwrap_or_else(|error| error.to_string());
                let phase = pod.status.and_then(|status| status.phase).unwrap_or_default();
                eprintln!("{} {name} {phase}\n{text}", cluster.name);
            }
            for vm in self
                .scene
                .vms(&cluster.client)
                .list(&ListParams::default())
                .await
                .map(|list| list.items)
                .unwrap_or_default()
            {
                eprintln!("{} VM {}", cluster.name, serde_json::to_string(&vm.data).unwrap_or_default());
            }
        }
        let pair = self.pairs().get("shop").await.map(|pair| serde_json::to_string(&pair).unwrap_or_default());
        eprintln!("{pair:?}");
    }
}
