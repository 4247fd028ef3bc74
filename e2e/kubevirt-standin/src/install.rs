//! Brings the stand-in into a cluster, as one Pod in KubeVirt's namespace, and waits until it is at work.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use k8s_openapi::api::rbac::v1::ClusterRoleBinding;
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, Client};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use watari_clusters::handle::{self, Ours};
use watari_clusters::images;

use crate::ca::NAMESPACE;
use crate::image::{self, LAUNCHER_IMAGE};
use crate::objects::{Kind, MANAGER};
use crate::subresources;

/// Until an image is unpacked and a Pod has started, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(300);
/// Of the program that runs.
const PROGRAM_ANNOTATION: &str = "standin.watari.internal/program";

/// Packs the image, gives it to the nodes, and starts this program's controller on both clusters. What is right already is left alone.
pub async fn up(ours: &Ours, program: &Path) -> anyhow::Result<()> {
    image::ensure(&ours.folders, program)?;
    let imports = images::import(&ours.folders, &ours.plan)?;
    tracing::info!(imports, "images");
    let mark = fingerprint(program)?;
    for cluster in [ours.a(), ours.b()] {
        let client = handle::client(&ours.folders.kubeconfig(cluster)).await?;
        install(&client, &mark).await.with_context(|| format!("cluster {}", cluster.name()))?;
    }
    Ok(())
}

/// Changes with the program.
fn fingerprint(program: &Path) -> anyhow::Result<String> {
    let mut hasher = DefaultHasher::new();
    std::fs::read(program)?.hash(&mut hasher);
    Ok(format!("{:016x}", hasher.finish()))
}

async fn apply<K>(api: Api<K>, object: Value) -> anyhow::Result<()>
where
    K: Clone + std::fmt::Debug + Serialize + DeserializeOwned,
{
    let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    api.patch(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(object)).await?;
    Ok(())
}

async fn install(client: &Client, mark: &str) -> anyhow::Result<()> {
    apply(
        Api::<Namespace>::all(client.clone()),
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } }),
    )
    .await?;
    let account = json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": MANAGER } });
    apply(Api::<ServiceAccount>::namespaced(client.clone(), NAMESPACE), account).await?;
    // KubeVirt's own components may do less; nothing is learned from playing that.
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": { "name": MANAGER },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin" },
        "subjects": [{ "kind": "ServiceAccount", "name": MANAGER, "namespace": NAMESPACE }],
    });
    apply(Api::<ClusterRoleBinding>::all(client.clone()), binding).await?;
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), NAMESPACE);
    apply(deployments.clone(), deployment(mark)).await?;
    let begin = Instant::now();
    while !at_work(client, &deployments).await? {
        ensure!(begin.elapsed() < PATIENCE, "the stand-in is not at work after {} s", PATIENCE.as_secs());
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

fn deployment(mark: &str) -> Value {
    let labels = json!({ "app": MANAGER });
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": MANAGER },
        "spec": {
            "replicas": 1, "strategy": { "type": "Recreate" }, "selector": { "matchLabels": labels },
            "template": {
                "metadata": { "labels": labels, "annotations": { PROGRAM_ANNOTATION: mark } },
                "spec": {
                    "serviceAccountName": MANAGER, "terminationGracePeriodSeconds": 1,
                    "containers": [{
                        "name": "controller", "image": LAUNCHER_IMAGE, "imagePullPolicy": "IfNotPresent",
                        "command": ["/usr/bin/kubevirt-standin", "controller"],
                        "env": [{ "name": "POD_IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } }],
                        "readinessProbe": { "tcpSocket": { "port": subresources::PORT }, "periodSeconds": 1 },
                    }],
                },
            },
        },
    })
}

/// This Deployment's newest Pod is ready, and the API server has found the aggregated group.
async fn at_work(client: &Client, deployments: &Api<Deployment>) -> anyhow::Result<bool> {
    let deployment = deployments.get(MANAGER).await?;
    let status = deployment.status.unwrap_or_default();
    let seen = status.observed_generation == deployment.metadata.generation;
    if !seen || status.updated_replicas != Some(1) || status.ready_replicas != Some(1) || status.replicas != Some(1) {
        return Ok(false);
    }
    let services: Api<APIService> = Api::all(client.clone());
    let service = services.get_opt(&format!("v1.{}", subresources::GROUP)).await?;
    let conditions =
        service.and_then(|service| service.status).and_then(|status| status.conditions).unwrap_or_default();
    Ok(conditions.iter().any(|condition| condition.type_ == "Available" && condition.status == "True"))
}

/// Takes the stand-in, its CRDs and with them all its objects away.
pub async fn down(ours: &Ours) -> anyhow::Result<()> {
    use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
    for cluster in [ours.a(), ours.b()] {
        let client = handle::client(&ours.folders.kubeconfig(cluster)).await?;
        let parameters = DeleteParams::default();
        let gone = |outcome: kube::Result<()>| match outcome {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            outcome => outcome,
        };
        let services: Api<APIService> = Api::all(client.clone());
        gone(services.delete(&format!("v1.{}", subresources::GROUP), &parameters).await.map(drop))?;
        let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
        for kind in Kind::ALL {
            gone(definitions.delete(&format!("{}.kubevirt.io", kind.plural()), &parameters).await.map(drop))?;
        }
        gone(Api::<Namespace>::all(client.clone()).delete(NAMESPACE, &parameters).await.map(drop))?;
        gone(Api::<ClusterRoleBinding>::all(client.clone()).delete(MANAGER, &parameters).await.map(drop))?;
    }
    Ok(())
}
