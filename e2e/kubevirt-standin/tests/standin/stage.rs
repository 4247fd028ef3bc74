//! What the tests of the stand-in share: the stand-in on both clusters, VMs with the test guest, and questions about them.

// The scene is the test bed's own; not all of it is needed here.
#[allow(dead_code)]
#[path = "../../../clusters/tests/clusters/scene.rs"]
mod scene;

use std::future::Future;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
pub use kubevirt_standin::guest::Guest;
use kubevirt_standin::install;
use kubevirt_standin::objects::Kind;
use serde_json::{Value, json};
use tokio::sync::OnceCell;
use watari_clusters::handle::{ClaimKind, Cluster, Ours};
use watari_clusters::keeper;

pub use scene::{Scene, until};

/// From an object to a running guest, and for any other step; seconds on an idle machine.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// A namespace on both clusters, with the stand-in at work.
#[derive(Clone)]
pub struct Stage {
    pub scene: Scene,
    pub ours: Ours,
}

/// Runs a test on a stage of its own, on our clusters; elsewhere it says that it is skipped.
pub async fn play<F: Future<Output = anyhow::Result<()>>>(
    test: &str,
    job: impl FnOnce(Stage) -> F,
) -> anyhow::Result<()> {
    static UP: OnceCell<()> = OnceCell::const_new();
    scene::play(&format!("standin-{test}"), |scene| async move {
        let Some(ours) = scene.pair.ours.clone() else {
            eprintln!("skipped: the stand-in is for our own clusters");
            return Ok(());
        };
        let program = Path::new(env!("CARGO_BIN_EXE_kubevirt-standin"));
        UP.get_or_try_init(|| install::up(&ours, program)).await?;
        let stage = Stage { scene, ours };
        let outcome = job(stage.clone()).await;
        // A namespace with a VMI that waits for its guest to shut down in good order would keep the next test waiting.
        for cluster in stage.scene.pair.both() {
            Kind::Vm
                .api(&cluster.client, &stage.scene.namespace)
                .delete_collection(&DeleteParams::default(), &ListParams::default())
                .await?;
        }
        outcome
    })
    .await
}

impl Stage {
    pub fn clusters(&self) -> [&Cluster; 2] {
        self.scene.pair.both()
    }

    /// A VM with one 64 MiB claim of the same name, its root disk. `guest` are the guest's settings.
    pub async fn vm(
        &self,
        cluster: &Cluster,
        name: &str,
        strategy: &str,
        kind: ClaimKind,
        guest: &str,
    ) -> anyhow::Result<()> {
        self.vm_with(cluster, name, strategy, kind, json!({ "standin.watari.internal/guest": guest })).await
    }

    /// The same with further annotations of the VMI.
    pub async fn vm_with(
        &self,
        cluster: &Cluster,
        name: &str,
        strategy: &str,
        kind: ClaimKind,
        annotations: Value,
    ) -> anyhow::Result<()> {
        ensure!(self.scene.claim(cluster, name, kind).await?, "our clusters have every class");
        let vm = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine",
            "metadata": { "name": name, "annotations": { "kubevirt.io/restore-run-strategy": "Always" } },
            "spec": { "runStrategy": strategy, "template": {
                "metadata": { "annotations": annotations },
                "spec": {
                    "terminationGracePeriodSeconds": 0,
                    "domain": { "memory": { "guest": "160Mi" }, "devices": { "disks": [
                        { "name": "root", "disk": { "bus": "virtio" } }, { "name": "local", "disk": { "bus": "sata" } },
                    ] } },
                    "volumes": [
                        { "name": "root", "persistentVolumeClaim": { "claimName": name } },
                        { "name": "local", "emptyDisk": { "capacity": "1Mi" } },
                    ],
                },
            } },
        });
        let api = Kind::Vm.api(&cluster.client, &self.scene.namespace);
        api.create(&PostParams::default(), &serde_json::from_value(vm)?).await?;
        Ok(())
    }

    /// `null` if it is not there.
    pub async fn get(&self, cluster: &Cluster, kind: Kind, name: &str) -> anyhow::Result<Value> {
        let found = kind.api(&cluster.client, &self.scene.namespace).get_opt(name).await?;
        Ok(found.map(serde_json::to_value).transpose()?.unwrap_or_default())
    }

    /// Waits until an object is as `is` wants it, and answers it.
    pub async fn until(
        &self,
        cluster: &Cluster,
        kind: Kind,
        name: &str,
        what: &str,
        is: impl Fn(&Value) -> bool,
    ) -> anyhow::Result<Value> {
        let begin = Instant::now();
        loop {
            let object = self.get(cluster, kind, name).await?;
            if is(&object) {
                return Ok(object);
            }
            let late =
                || format!("{} {name} of cluster {}: waited in vain for {what}: {object}", kind.name(), cluster.name);
            ensure!(begin.elapsed() < PATIENCE, late());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    pub async fn until_printable(&self, cluster: &Cluster, vm: &str, wanted: &str) -> anyhow::Result<Value> {
        self.until(cluster, Kind::Vm, vm, wanted, |vm| vm["status"]["printableStatus"] == wanted).await
    }

    pub async fn until_migration(&self, cluster: &Cluster, name: &str, wanted: &str) -> anyhow::Result<Value> {
        let over = |vmim: &Value| vmim["status"]["phase"] == "Failed" && wanted != "Failed";
        let seen = self
            .until(cluster, Kind::Vmim, name, wanted, |vmim| vmim["status"]["phase"] == wanted || over(vmim))
            .await?;
        ensure!(!over(&seen), "migration {name} of cluster {} failed: {}", cluster.name, seen["status"]);
        Ok(seen)
    }

    pub async fn merge(&self, cluster: &Cluster, kind: Kind, name: &str, patch: Value) -> anyhow::Result<()> {
        let api = kind.api(&cluster.client, &self.scene.namespace);
        api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    pub async fn vmim(&self, cluster: &Cluster, name: &str, spec: Value) -> anyhow::Result<()> {
        let object = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration", "metadata": { "name": name }, "spec": spec,
        });
        let api = Kind::Vmim.api(&cluster.client, &self.scene.namespace);
        api.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
        Ok(())
    }

    /// The pair of VMIMs that moves `vm` from the first cluster to the second, as the address in the KubeVirt object says.
    pub async fn send(&self, from: &Cluster, to: &Cluster, vm: &str, migration: &str) -> anyhow::Result<()> {
        let kubevirt = Kind::KubeVirt.api(&to.client, "kubevirt").get("kubevirt").await?;
        let connect = &kubevirt.data["status"]["synchronizationAddresses"][0];
        let id = format!("{}-{migration}", self.scene.namespace);
        self.vmim(to, migration, json!({ "vmiName": vm, "receive": { "migrationID": id } })).await?;
        self.vmim(from, migration, json!({ "vmiName": vm, "sendTo": { "migrationID": id, "connectURL": connect } }))
            .await
    }

    /// Pods of a VMI, the newest last.
    pub async fn launchers(&self, cluster: &Cluster) -> anyhow::Result<Vec<Pod>> {
        let mut pods =
            self.scene.pods(cluster).list(&ListParams::default().labels("kubevirt.io=virt-launcher")).await?.items;
        pods.sort_by_key(|pod| pod.metadata.creation_timestamp.clone());
        Ok(pods)
    }

    /// The control line in the newest Pod of that cluster, which has one VM.
    pub async fn guest(&self, cluster: &Cluster) -> anyhow::Result<Guest> {
        let pod = self.launchers(cluster).await?.pop().context("a VM that runs has a Pod")?;
        Guest::of(&self.ours, &pod)
    }

    /// Bytes that have crossed the line from the first cluster to the second.
    pub fn uplink_bytes(&self) -> anyhow::Result<u64> {
        let stats = keeper::link(&self.ours.folders, self.ours.a(), self.ours.b(), "stats")?;
        let stats: Value = serde_json::from_str(&stats)?;
        stats["a_to_b"]["counters"]["delivered_bytes"].as_u64().context("the link counts bytes")
    }

    /// Each cluster's KubeVirt trusts the other's authority, as an administrator would have it: through the inbox.
    pub async fn exchange_trust(&self) -> anyhow::Result<()> {
        let [a, b] = self.clusters();
        for (from, to) in [(a, b), (b, a)] {
            let begin = Instant::now();
            loop {
                let theirs = bundle(from).await?;
                let ours = bundle(to).await?;
                let first =
                    theirs.split_inclusive("-----END CERTIFICATE-----").next().unwrap_or_default().trim().to_owned();
                if ours.contains(&first) {
                    break;
                }
                ensure!(begin.elapsed() < PATIENCE, "cluster {} does not take the other's certificate up", to.name);
                put_into_inbox(to, &theirs).await?;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        Ok(())
    }
}

fn config_maps(cluster: &Cluster) -> kube::Api<k8s_openapi::api::core::v1::ConfigMap> {
    kube::Api::namespaced(cluster.client.clone(), "kubevirt")
}

/// What KubeVirt trusts there.
pub async fn bundle(cluster: &Cluster) -> anyhow::Result<String> {
    let data = config_maps(cluster).get("kubevirt-ca").await?.data.unwrap_or_default();
    data.get("ca-bundle").cloned().context("a bundle")
}

pub async fn put_into_inbox(cluster: &Cluster, bundle: &str) -> anyhow::Result<()> {
    let patch = Patch::Merge(json!({ "data": { "ca-bundle": bundle } }));
    config_maps(cluster).patch("kubevirt-external-ca", &PatchParams::default(), &patch).await?;
    Ok(())
}
