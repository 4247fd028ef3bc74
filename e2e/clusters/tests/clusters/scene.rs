//! A test's stage: a namespace of its own on both clusters, gone afterwards; on failure everything in it is collected before.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use futures::FutureExt;
use k8s_openapi::api::core::v1::{Event, Namespace, PersistentVolumeClaim, Pod, ServiceAccount};
use kube::api::{DeleteParams, LogParams, PostParams};
use kube::{Api, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use watari_clusters::handle::{ClaimKind, Class, Cluster, Pair};

/// Until a Pod has started, run something short and ended, on a busy machine.
pub const POD_PATIENCE: Duration = Duration::from_secs(90);
/// Until a namespace and all in it is gone.
const END_PATIENCE: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(200);

/// What a test works with.
#[derive(Clone)]
pub struct Scene {
    pub pair: Pair,
    pub namespace: String,
}

/// Runs a test in a namespace of its own. `WATARI_E2E_KEEP=1` keeps it.
pub async fn play<F: Future<Output = anyhow::Result<()>>>(
    test: &str,
    job: impl FnOnce(Scene) -> F,
) -> anyhow::Result<()> {
    let pair = Pair::open().await?;
    let namespace = format!("watari-e2e-{test}-{}", std::process::id());
    let object = json!({ "metadata": { "name": namespace } });
    for cluster in pair.both() {
        create_cluster_wide::<Namespace>(cluster, object.clone()).await?;
        // No Pod is admitted before its service account is there, which Kubernetes makes in its own time.
        let accounts: Api<ServiceAccount> = Api::namespaced(cluster.client.clone(), &namespace);
        until("the namespace's service account", END_PATIENCE, || async {
            Ok(accounts.get_opt("default").await?.map(drop))
        })
        .await?;
    }
    let scene = Scene { pair, namespace };
    let result = AssertUnwindSafe(job(scene.clone())).catch_unwind().await;
    if !matches!(result, Ok(Ok(()))) {
        let folder = watari_e2e::build::target_folder().join("e2e/clusters").join(&scene.namespace);
        match scene.collect(&folder).await {
            Ok(()) => eprintln!("{test}: logs, events and objects are in {}", folder.display()),
            Err(error) => eprintln!("{test}: could not collect everything: {error:#}"),
        }
        if let Some(ours) = &scene.pair.ours {
            eprintln!("{test}: the nodes' logs are in {}", ours.folders.logs().display());
        }
    }
    if std::env::var_os("WATARI_E2E_KEEP").is_none() {
        scene.end().await?;
    }
    match result {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// For what belongs to no namespace.
pub async fn create_cluster_wide<K>(cluster: &Cluster, object: Value) -> anyhow::Result<K>
where
    K: kube::Resource<Scope = kube::core::ClusterResourceScope, DynamicType = ()>
        + Clone
        + Serialize
        + DeserializeOwned
        + std::fmt::Debug,
{
    let api: Api<K> = Api::all(cluster.client.clone());
    Ok(api.create(&PostParams::default(), &serde_json::from_value(object)?).await?)
}

/// Asks again until there is an answer.
pub async fn until<T, F: Future<Output = anyhow::Result<Option<T>>>>(
    what: &str,
    patience: Duration,
    mut ask: impl FnMut() -> F,
) -> anyhow::Result<T> {
    let begin = Instant::now();
    loop {
        if let Some(answer) = ask().await? {
            return Ok(answer);
        }
        ensure!(begin.elapsed() < patience, "waited {} s in vain for {what}", patience.as_secs());
        tokio::time::sleep(POLL).await;
    }
}

impl Scene {
    pub fn pods(&self, cluster: &Cluster) -> Api<Pod> {
        Api::namespaced(cluster.client.clone(), &self.namespace)
    }
    pub fn claims(&self, cluster: &Cluster) -> Api<PersistentVolumeClaim> {
        Api::namespaced(cluster.client.clone(), &self.namespace)
    }

    /// A claim of 64 MiB; false if the cluster has no class for the kind (which is said).
    pub async fn claim(&self, cluster: &Cluster, name: &str, kind: ClaimKind) -> anyhow::Result<bool> {
        let class = match cluster.class(kind) {
            Class::Default => Value::Null,
            Class::Named(class) => class.into(),
            Class::Unavailable => {
                eprintln!("skipped: cluster {} has no storage class for {}", cluster.name, kind.name());
                return Ok(false);
            }
        };
        let object = json!({
            "metadata": { "name": name },
            "spec": {
                "storageClassName": class,
                "accessModes": [if kind.shared { "ReadWriteMany" } else { "ReadWriteOnce" }],
                "volumeMode": if kind.block { "Block" } else { "Filesystem" },
                "resources": { "requests": { "storage": "64Mi" } },
            },
        });
        self.claims(cluster).create(&PostParams::default(), &serde_json::from_value(object)?).await?;
        Ok(true)
    }

    /// A Pod that runs a shell script, with claims at `/data/NAME` (a folder or a device).
    pub async fn pod(
        &self,
        cluster: &Cluster,
        name: &str,
        script: &str,
        claims: &[(&str, ClaimKind)],
    ) -> anyhow::Result<()> {
        let volume =
            |(name, _): &(&str, ClaimKind)| json!({ "name": name, "persistentVolumeClaim": { "claimName": name } });
        let mounts = |block: bool, key: &str| -> Vec<Value> {
            let of_mode = claims.iter().filter(|(_, kind)| kind.block == block);
            of_mode.map(|(name, _)| json!({ "name": name, key: format!("/data/{name}") })).collect()
        };
        let object = json!({
            "metadata": { "name": name },
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 0,
                // Not root where it touches data, as the Pods of VMs.
                "securityContext": if claims.is_empty() { json!({}) } else { json!({ "runAsUser": 107, "runAsGroup": 107, "fsGroup": 107 }) },
                "containers": [{
                    "name": "shell", "image": cluster.shell_image, "imagePullPolicy": "IfNotPresent",
                    "command": ["sh", "-c", script],
                    "volumeMounts": mounts(false, "mountPath"), "volumeDevices": mounts(true, "devicePath"),
                }],
                "volumes": claims.iter().map(volume).collect::<Vec<_>>(),
            },
        });
        self.pods(cluster).create(&PostParams::default(), &serde_json::from_value(object)?).await?;
        Ok(())
    }

    /// Waits for a Pod's end; answers what it printed. A Pod that fails is an error.
    pub async fn output(&self, cluster: &Cluster, name: &str) -> anyhow::Result<String> {
        let pods = self.pods(cluster);
        let what = format!("Pod {name} on cluster {} to end", cluster.name);
        let phase = until(&what, POD_PATIENCE, || async {
            let phase = pods.get(name).await?.status.and_then(|status| status.phase);
            Ok(phase.filter(|phase| phase == "Succeeded" || phase == "Failed"))
        })
        .await?;
        let log = pods.logs(name, &LogParams::default()).await?;
        if phase == "Failed" {
            bail!("Pod {name} on cluster {} failed:\n{log}", cluster.name);
        }
        Ok(log)
    }

    /// Waits until a Pod runs; answers its address.
    pub async fn running(&self, cluster: &Cluster, name: &str) -> anyhow::Result<String> {
        let pods = self.pods(cluster);
        let what = format!("Pod {name} on cluster {} to run", cluster.name);
        until(&what, POD_PATIENCE, || async {
            let status = pods.get(name).await?.status.context("a Pod has a status")?;
            Ok(status.pod_ip.filter(|_| status.phase.as_deref() == Some("Running")))
        })
        .await
    }

    async fn collect(&self, folder: &Path) -> anyhow::Result<()> {
        for cluster in self.pair.both() {
            let folder = folder.join(&cluster.name);
            std::fs::create_dir_all(&folder)?;
            let pods = self.pods(cluster).list(&Default::default()).await?.items;
            let claims = self.claims(cluster).list(&Default::default()).await?.items;
            let events: Api<Event> = Api::namespaced(cluster.client.clone(), &self.namespace);
            let events = events.list(&Default::default()).await?.items;
            std::fs::write(folder.join("pods.json"), serde_json::to_vec_pretty(&pods)?)?;
            std::fs::write(folder.join("claims.json"), serde_json::to_vec_pretty(&claims)?)?;
            std::fs::write(folder.join("events.json"), serde_json::to_vec_pretty(&events)?)?;
            for pod in pods {
                let spec = pod.spec.clone().unwrap_or_default();
                let names = spec.init_containers.unwrap_or_default().into_iter().chain(spec.containers);
                for container in names.map(|container| container.name) {
                    let parameters = LogParams { container: Some(container.clone()), ..LogParams::default() };
                    // A container that never started has no log.
                    let log = self.pods(cluster).logs(&pod.name_any(), &parameters).await;
                    let text = log.unwrap_or_else(|error| error.to_string());
                    std::fs::write(folder.join(format!("{}-{container}.log", pod.name_any())), text)?;
                }
            }
        }
        Ok(())
    }

    async fn end(&self) -> anyhow::Result<()> {
        for cluster in self.pair.both() {
            let api: Api<Namespace> = Api::all(cluster.client.clone());
            api.delete(&self.namespace, &DeleteParams::default()).await?;
        }
        for cluster in self.pair.both() {
            let api: Api<Namespace> = Api::all(cluster.client.clone());
            until("the test's namespace to be gone", END_PATIENCE, || async {
                Ok(api.get_opt(&self.namespace).await?.is_none().then_some(()))
            })
            .await?;
        }
        Ok(())
    }
}
