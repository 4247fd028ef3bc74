//! Two clusters with Watari on each, installed and connected as its users do it. Everything is in namespaces of the test's own and
//! ends with it. What exists once in a cluster (PeerClusters, webhook configurations, a site's name) is why only one scene at a time is
//! played on it.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::ensure;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use watari_clusters::handle::Pair;
use watari_clusters::images;
use watari_crds::kubevirt::VirtualMachine;
use watari_crds::peer::PeerCluster;

use crate::definitions;
use crate::installed::{self, Site};

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
    /// The homes of pairs, and their peer.
    pub sites: [Site; 2],
    /// Let go of last.
    _alone: File,
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
    /// `None` on other people's clusters, where no image can be given to a node.
    pub async fn begin(test: &str) -> anyhow::Result<Option<Scene>> {
        let pair = Pair::open().await?;
        let Some(ours) = pair.ours.clone() else {
            eprintln!("skipped: the operator's image is given to the nodes of our own clusters");
            return Ok(None);
        };
        let alone = tokio::task::block_in_place(|| {
            let alone = ours.folders.claim(OPERATORS)?;
            images::ensure_operator(&ours.folders, Path::new(env!("CARGO_BIN_EXE_watari-operator")))?;
            images::import(&ours.folders, &ours.plan)?;
            anyhow::Ok(alone)
        })?;
        let unique = format!("{test}-{}", std::process::id());
        let (system, namespace) = (format!("watari-e2e-system-{unique}"), format!("watari-e2e-{unique}"));
        let sites = [Site::new(&ours, ours.a(), "tokyo")?, Site::new(&ours, ours.b(), "osaka")?];
        let scene = Scene { pair, system, namespace, sites, _alone: alone };
        if let Err(error) = scene.install().await {
            return Err(error.context(scene.logs().await));
        }
        Ok(Some(scene))
    }

    async fn install(&self) -> anyhow::Result<()> {
        for (cluster, site) in self.pair.both().into_iter().zip(&self.sites) {
            site.clear().await?;
            // Helm installs definitions that are missing and leaves others as they are.
            definitions::install(&cluster.client).await?;
            kubevirt_standin::crds::apply(&cluster.client).await?;
            for name in [&self.system, &self.namespace] {
                let api: Api<Namespace> = Api::all(cluster.client.clone());
                let object = serde_json::from_value(json!({ "metadata": { "name": name } }))?;
                api.create(&PostParams::default(), &object).await?;
            }
        }
        let [here, there] = &self.sites;
        tokio::try_join!(here.install(&self.system, &[]), there.install(&self.system, &[]))?;
        // An operator writes its site card once it leads.
        let printed = until("both operators to introduce themselves", async || {
            Ok(here.connect(there, &self.system, &self.namespace).await.ok())
        })
        .await?;
        eprintln!("{printed}");
        Ok(())
    }

    /// What the Pods of both operators and gateways logged, for a test that failed.
    pub async fn logs(&self) -> String {
        let mut text = String::new();
        for (cluster, site) in self.pair.both().into_iter().zip(&self.sites) {
            text.push_str(&format!("{}:\n{}\n", site.name, installed::logs(&cluster.client, &self.system).await));
        }
        text
    }

    /// Name of the PeerCluster at home.
    pub fn peer(&self) -> &'static str {
        self.sites[1].name
    }

    pub fn api<K>(&self, client: &Client) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()> + DeserializeOwned,
    {
        Api::namespaced(client.clone(), &self.namespace)
    }

    /// Names of all objects of a kind, in the pairs' namespace.
    pub async fn names<K>(&self, client: &Client, which: &ListParams) -> anyhow::Result<Vec<String>>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned,
    {
        Ok(self.api::<K>(client).list_metadata(which).await?.iter().map(|it| it.name_any()).collect())
    }

    /// VirtualMachines as people write them, with fields that our view does not know.
    pub fn vms(&self, client: &Client) -> Api<DynamicObject> {
        Api::namespaced_with(client.clone(), &self.namespace, &ApiResource::erase::<VirtualMachine>(&()))
    }

    /// Uninstalls Watari and removes everything that was made.
    pub async fn end(self) -> anyhow::Result<()> {
        for (cluster, site) in self.pair.both().into_iter().zip(&self.sites) {
            let peers: Api<PeerCluster> = Api::all(cluster.client.clone());
            peers.delete_collection(&DeleteParams::default(), &Default::default()).await?;
            site.uninstall(&self.system).await?;
            let api: Api<Namespace> = Api::all(cluster.client.clone());
            for name in [&self.system, &self.namespace] {
                api.delete(name, &DeleteParams::default()).await?;
            }
        }
        Ok(())
    }
}

/// The status of a condition in an object, and its message.
pub fn condition(object: &Value, kind: &str) -> Option<(String, String)> {
    let list = object["status"]["conditions"].as_array()?;
    let found = list.iter().find(|condition| condition["type"] == kind)?;
    Some((found["status"].as_str()?.to_owned(), format!("{}: {}", found["reason"], found["message"])))
}
