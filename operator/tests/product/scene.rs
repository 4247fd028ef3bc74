//! Two clusters with an operator each: processes on this machine, in the network of a node, so that they reach the Pods' sidecars
//! as a Pod would, and the API server reaches their webhooks. Everything is in namespaces of the test's own and ends with it. What exists
//! once in a cluster (PeerClusters, webhook configurations, a site's name) is why only one scene at a time is played on it.

use std::fs::File;
use std::net::TcpListener;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use watari_clusters::handle::{Ours, Pair};
use watari_clusters::images::SIDECAR_IMAGE;
use watari_clusters::plan::ClusterPlan;
use watari_clusters::{network, node};
use watari_crds::kubevirt::VirtualMachine;
use watari_crds::names::{self, label};
use watari_crds::peer::PeerCluster;
use watari_operator::webhooks::objects::{Endpoint, configurations};

use crate::{definitions, gateways};

/// Until something has happened on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(500);
/// Whoever runs operators on the clusters holds the claim of this name.
pub const OPERATORS: &str = "operators";

/// Two clusters, their operators, and two namespaces on each.
pub struct Scene {
    pub pair: Pair,
    /// Of the operators.
    pub system: String,
    /// Of the pairs.
    pub namespace: String,
    operators: Vec<Child>,
    folder: tempfile::TempDir,
    /// Let go of last.
    _alone: File,
}

impl Drop for Scene {
    /// Also when a test panics.
    fn drop(&mut self) {
        for operator in &mut self.operators {
            let _ = operator.kill();
            let _ = operator.wait();
        }
    }
}

/// Asks again until there is an answer.
pub async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
    let begin = Instant::now();
    loop {
        if let Some(answer) = ask().await? {
            return Ok(answer);
        }
        ensure!(begin.elapsed() < PATIENCE, "waited {} s in vain for {what}", PATIENCE.as_secs());
        tokio::time::sleep(POLL).await;
    }
}

impl Scene {
    /// `None` on other people's clusters, where no process can be put beside a node.
    pub async fn begin(test: &str) -> anyhow::Result<Option<Scene>> {
        let pair = Pair::open().await?;
        let Some(ours) = pair.ours.clone() else {
            eprintln!("skipped: the operators run beside the nodes of our own clusters");
            return Ok(None);
        };
        let alone = tokio::task::block_in_place(|| ours.folders.claim(OPERATORS))?;
        let unique = format!("{test}-{}", std::process::id());
        let (system, namespace) = (format!("watari-e2e-system-{unique}"), format!("watari-e2e-{unique}"));
        for cluster in pair.both() {
            definitions::install(&cluster.client).await?;
            kubevirt_standin::crds::apply(&cluster.client).await?;
            for name in [&system, &namespace] {
                let api: Api<Namespace> = Api::all(cluster.client.clone());
                let object = serde_json::from_value(json!({ "metadata": { "name": name } }))?;
                api.create(&PostParams::default(), &object).await?;
            }
        }
        let folder = tempfile::tempdir()?;
        let mut scene = Scene { pair, system, namespace, operators: Vec::new(), folder, _alone: alone };
        let handles = [scene.pair.a.clone(), scene.pair.b.clone()];
        for (handle, (cluster, site)) in handles.iter().zip([(ours.a(), "tokyo"), (ours.b(), "osaka")]) {
            let gateway = gateways::start(handle, &scene.system).await?;
            let port = free_port(cluster)?;
            scene.ask(&handle.client, port).await?;
            scene.start(&ours, cluster, site, port, &gateway)?;
        }
        scene.introduce(&ours).await?;
        Ok(Some(scene))
    }

    /// Makes the API server ask the operator at `port` about the test's namespace. Whom to trust, the operator says itself.
    async fn ask(&self, client: &Client, port: u16) -> anyhow::Result<()> {
        let [mut mutating, mut validating] = configurations(&Endpoint::Url(format!("https://localhost:{port}")), None);
        for configuration in [&mut mutating, &mut validating] {
            for webhook in configuration["webhooks"].as_array_mut().into_iter().flatten() {
                webhook["namespaceSelector"] =
                    json!({ "matchLabels": { "kubernetes.io/metadata.name": self.namespace } });
            }
        }
        let parameters = PatchParams::apply("watari-e2e").force();
        let api: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
        api.patch(names::ADMISSION, &parameters, &Patch::Apply(&mutating)).await?;
        let api: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
        api.patch(names::ADMISSION, &parameters, &Patch::Apply(&validating)).await?;
        Ok(())
    }

    fn start(
        &mut self,
        ours: &Ours,
        cluster: &ClusterPlan,
        site: &str,
        port: u16,
        gateway: &str,
    ) -> anyhow::Result<()> {
        let kubeconfig = self.folder.path().join(site);
        std::fs::write(&kubeconfig, admin(ours, cluster)?)?;
        let log = std::fs::File::create(self.log(site))?;
        let operator = Command::new("ip")
            .args(["netns", "exec", &cluster.control_plane().netns(), env!("CARGO_BIN_EXE_watari-operator")])
            .args(["--site", site, "--namespace", &self.system, "--image", SIDECAR_IMAGE])
            .args(["--gateway", gateway])
            .args(["--webhook-listen", &format!("127.0.0.1:{port}")])
            .args(["--webhook-url", &format!("https://localhost:{port}")])
            .env("KUBECONFIG", kubeconfig)
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("ip netns exec")?;
        self.operators.push(operator);
        Ok(())
    }

    fn log(&self, site: &str) -> std::path::PathBuf {
        self.folder.path().join(format!("{site}.log"))
    }

    /// What the operators said, for a test that failed.
    pub fn logs(&self) -> String {
        let read = |site| std::fs::read_to_string(self.log(site)).unwrap_or_default();
        format!("tokyo:\n{}\nosaka:\n{}", read("tokyo"), read("osaka"))
    }

    /// The PeerCluster of osaka at tokyo, with its kubeconfig.
    async fn introduce(&self, ours: &Ours) -> anyhow::Result<()> {
        let secrets: Api<Secret> = Api::namespaced(self.pair.a.client.clone(), &self.system);
        let secret = json!({
            "metadata": { "name": "osaka", "labels": { label::MANAGED: names::MANAGED_BY } },
            "stringData": { "kubeconfig": admin(ours, ours.b())? },
        });
        secrets.create(&PostParams::default(), &serde_json::from_value(secret)?).await?;
        let peers: Api<PeerCluster> = Api::all(self.pair.a.client.clone());
        let peer = json!({
            "apiVersion": "watari.io/v1alpha1", "kind": "PeerCluster", "metadata": { "name": self.peer() },
            "spec": { "site": "osaka", "kubeconfigSecret": "osaka", "operatorNamespace": self.system },
        });
        peers.create(&PostParams::default(), &serde_json::from_value(peer)?).await?;
        Ok(())
    }

    /// Name of the PeerCluster: it belongs to no namespace, so it carries the test's.
    pub fn peer(&self) -> String {
        self.namespace.clone()
    }

    pub fn api<K>(&self, client: &Client) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()> + DeserializeOwned,
    {
        Api::namespaced(client.clone(), &self.namespace)
    }

    /// VirtualMachines as people write them, with fields that our view does not know.
    pub fn vms(&self, client: &Client) -> Api<DynamicObject> {
        Api::namespaced_with(client.clone(), &self.namespace, &ApiResource::erase::<VirtualMachine>(&()))
    }

    /// Ends the operators and removes everything that was made.
    pub async fn end(mut self) -> anyhow::Result<()> {
        let peers: Api<PeerCluster> = Api::all(self.pair.a.client.clone());
        peers.delete(&self.peer(), &DeleteParams::default()).await?;
        for operator in &mut self.operators {
            operator.kill()?;
            operator.wait()?;
        }
        for cluster in self.pair.both() {
            let (client, parameters) = (cluster.client.clone(), DeleteParams::default());
            Api::<MutatingWebhookConfiguration>::all(client.clone()).delete(names::ADMISSION, &parameters).await?;
            Api::<ValidatingWebhookConfiguration>::all(client).delete(names::ADMISSION, &parameters).await?;
            let api: Api<Namespace> = Api::all(cluster.client.clone());
            for name in [&self.system, &self.namespace] {
                api.delete(name, &DeleteParams::default()).await?;
            }
        }
        Ok(())
    }
}

/// A port that nobody listens on beside the cluster's API server.
fn free_port(cluster: &ClusterPlan) -> anyhow::Result<u16> {
    let inside = network::path(&cluster.control_plane().netns());
    let socket = watari_e2e::netns::enter(&inside, || TcpListener::bind("127.0.0.1:0"))??;
    Ok(socket.local_addr()?.port())
}

/// The administrator's kubeconfig, with the API server's address as the nodes know it.
fn admin(ours: &Ours, cluster: &ClusterPlan) -> anyhow::Result<String> {
    Ok(node::run(&ours.folders, &cluster.control_plane(), "cat", &["/etc/kubernetes/admin.conf"])?)
}

/// The status of a condition in an object, and its message.
pub fn condition(object: &Value, kind: &str) -> Option<(String, String)> {
    let list = object["status"]["conditions"].as_array()?;
    let found = list.iter().find(|condition| condition["type"] == kind)?;
    Some((found["status"].as_str()?.to_owned(), format!("{}: {}", found["reason"], found["message"])))
}
