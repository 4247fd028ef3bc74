//! `connect`: lets two sites use each other, from two contexts of a person's kubeconfig.
//!
//! Each site grants the other what the chart's value `peers` grants ([`rights`]); where the chart has done so, nothing is touched. Then
//! each operator gets a kubeconfig of the other ([`door`]) and a PeerCluster, and both are waited for until they say that all is well.

pub mod door;
pub mod rights;

use std::fmt::Debug;
use std::io::Write;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Secret, ServiceAccount};
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::config::{Cluster, KubeConfigOptions, Kubeconfig};
use kube::core::GroupVersionKind;
use kube::discovery::ApiResource;
use kube::{Api, Client, Config};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use watari_crds::card::SiteCard;
use watari_crds::names::{self, label};
use watari_crds::peer::PeerCluster;

use super::cli::{Cli, Connect, Output};
use super::{Outcome, api_error, check};

/// Who writes what this command makes.
const FIELD_MANAGER: &str = "kubectl-watari";
/// Until a token is made for a new account, and between two looks at what the operators found.
const LOOK: Duration = Duration::from_secs(1);
/// Kubernetes makes a token within a second or so.
const TOKEN_PATIENCE: Duration = Duration::from_secs(30);

/// Why two sites could not be connected. What was made stays, and repeating the command goes on from there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Door(#[from] door::Error),
    #[error(
        "no site card in namespace {namespace} of context {context}: is Watari's chart installed there (`helm list -A`), under another \
         namespace ({flag}), and does its operator run (`kubectl --context {context} -n {namespace} get pods`)?"
    )]
    NoCard { context: String, namespace: String, flag: &'static str },
    #[error("the site card of context {context} cannot be read: {why}; is its operator much newer than this command?")]
    Card { context: String, why: String },
    #[error(
        "both contexts lead to the site {0}: name the context of the other cluster, or give each chart its own `site`"
    )]
    SameSite(String),
    #[error("context {context} has no namespace {namespace}: kubectl --context {context} create namespace {namespace}")]
    NoNamespace { context: String, namespace: String },
    #[error("context {context}: no token was made for ServiceAccount {account}; does its controller manager run?")]
    NoToken { context: String, account: String },
}

/// One of the two sites.
struct Side {
    context: String,
    client: Client,
    /// Of the operator.
    namespace: String,
    /// As the other site's Pods reach it.
    cluster: Cluster,
    site: String,
}

/// How a side was asked for.
struct Asked<'a> {
    kubeconfig: Kubeconfig,
    context: Option<&'a str>,
    namespace: &'a str,
    server: Option<&'a str>,
    server_remedy: &'static str,
    namespace_flag: &'static str,
}

impl Side {
    async fn open(asked: Asked<'_>) -> Result<Side, super::Error> {
        let (context, entry) = door::cluster(&asked.kubeconfig, asked.context).map_err(Error::Door)?;
        let cluster = door::reachable(&context, entry, asked.server, asked.server_remedy).map_err(Error::Door)?;
        let options = KubeConfigOptions { context: Some(context.clone()), ..KubeConfigOptions::default() };
        let config = Config::from_custom_kubeconfig(asked.kubeconfig, &options).await?;
        let client = Client::try_from(config).map_err(api_error(&context))?;
        let cards: Api<ConfigMap> = Api::namespaced(client.clone(), asked.namespace);
        let card = cards.get_opt(names::SITE_CARD).await.map_err(api_error(&context))?;
        let text = card.and_then(|card| card.data).unwrap_or_default().remove(names::SITE_CARD_KEY);
        let namespace = asked.namespace.to_owned();
        let Some(text) = text else {
            return Err(Error::NoCard { context, namespace, flag: asked.namespace_flag }.into());
        };
        let card: SiteCard = serde_json::from_str(&text)
            .map_err(|error| Error::Card { context: context.clone(), why: error.to_string() })?;
        Ok(Side { context, client, namespace, cluster, site: card.site })
    }

    async fn apply(&self, object: &Value) -> Result<(), super::Error> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let kind = text(&object["kind"]);
        let (group, version) = match object["apiVersion"].as_str().unwrap_or_default().split_once('/') {
            Some((group, version)) => (group, version),
            None => ("", "v1"),
        };
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &kind));
        let api: Api<DynamicObject> = match object["metadata"]["namespace"].as_str() {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        };
        let name = text(&object["metadata"]["name"]);
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let what = format!("{kind} {name} of context {}", self.context);
        api.patch(&name, &parameters, &Patch::Apply(object)).await.map_err(api_error(&what))?;
        Ok(())
    }

    async fn get_opt<K>(&self, api: Api<K>, name: &str) -> Result<Option<K>, super::Error>
    where
        K: Clone + DeserializeOwned + Debug,
    {
        api.get_opt(name).await.map_err(api_error(&format!("{name} of context {}", self.context)))
    }

    /// Grants `peer` what it needs here, in `namespaces`. Answers what was done, in words.
    async fn let_in(&self, peer: &str, namespaces: &[String]) -> Result<String, super::Error> {
        let all: Api<Namespace> = Api::all(self.client.clone());
        for namespace in namespaces {
            if self.get_opt(all.clone(), namespace).await?.is_none() {
                let (context, namespace) = (self.context.clone(), namespace.clone());
                return Err(Error::NoNamespace { context, namespace }.into());
            }
        }
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &self.namespace);
        let account = self.get_opt(accounts, &rights::account(peer)).await?;
        let manager = account.and_then(|it| it.metadata.labels).unwrap_or_default().remove(label::MANAGED);
        if manager.as_deref().is_some_and(|manager| manager != names::MANAGED_BY) {
            return Ok(format!("{}: the chart lets {peer} in (its value `peers`); left as it is", self.site));
        }
        let mut objects = Vec::from(rights::account_objects(peer, &self.namespace));
        objects.extend(rights::card_rules(peer, &self.namespace));
        objects.extend(namespaces.iter().flat_map(|name| rights::replica_rules(peer, name, &self.namespace)));
        for object in &objects {
            self.apply(object).await?;
        }
        Ok(format!("{}: {peer} may hold replicas in {}", self.site, namespaces.join(", ")))
    }

    /// The token of `peer`'s account here.
    async fn token(&self, peer: &str) -> Result<String, super::Error> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let (account, begin) = (rights::account(peer), Instant::now());
        loop {
            let data = self.get_opt(secrets.clone(), &account).await?.and_then(|it| it.data).unwrap_or_default();
            if let Some(token) = data.get("token").and_then(|it| String::from_utf8(it.0.clone()).ok()) {
                return Ok(token);
            }
            if begin.elapsed() > TOKEN_PATIENCE {
                return Err(Error::NoToken { context: self.context.clone(), account }.into());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Tells the operator here of `peer`.
    async fn introduce(&self, peer: &Side) -> Result<(), super::Error> {
        let kubeconfig = door::kubeconfig(&peer.site, &peer.cluster, &peer.token(&self.site).await?);
        let secret = format!("watari-kubeconfig-{}", peer.site);
        let labels = json!({ label::MANAGED: names::MANAGED_BY });
        self.apply(&json!({
            "apiVersion": "v1", "kind": "Secret",
            "metadata": { "name": secret, "namespace": self.namespace, "labels": labels },
            "stringData": { "kubeconfig": kubeconfig.to_string() },
        }))
        .await?;
        self.apply(&json!({
            "apiVersion": format!("{}/{}", names::GROUP, names::VERSION), "kind": "PeerCluster",
            "metadata": { "name": peer.site },
            "spec": { "site": peer.site, "kubeconfigSecret": secret, "operatorNamespace": peer.namespace },
        }))
        .await
    }

    /// What the operator here found of `peer`.
    async fn finding(&self, peer: &str) -> Result<Option<check::Finding>, super::Error> {
        let peers: Api<PeerCluster> = Api::all(self.client.clone());
        Ok(self.get_opt(peers, peer).await?.map(|object| check::finding(&object)))
    }
}

fn read(file: Option<&std::path::PathBuf>) -> Result<Kubeconfig, super::Error> {
    Ok(match file {
        Some(file) => Kubeconfig::read_from(file)?,
        None => Kubeconfig::read()?,
    })
}

/// Connects, and waits until both operators have looked.
pub async fn run(cli: &Cli, asked: &Connect, out: &mut impl Write) -> Result<Outcome, super::Error> {
    let here = Side::open(Asked {
        kubeconfig: read(cli.kubeconfig.as_ref())?,
        context: cli.context.as_deref(),
        namespace: &asked.operator_namespace,
        server: asked.server.as_deref(),
        server_remedy: "give the address that the peer's Pods reach with --server",
        namespace_flag: "--operator-namespace",
    })
    .await?;
    let there = Side::open(Asked {
        kubeconfig: read(asked.peer_kubeconfig.as_ref().or(cli.kubeconfig.as_ref()))?,
        context: Some(&asked.peer),
        namespace: &asked.peer_operator_namespace,
        server: asked.peer_server.as_deref(),
        server_remedy: "give the address that this cluster's Pods reach with --peer-server",
        namespace_flag: "--peer-operator-namespace",
    })
    .await?;
    if here.site == there.site {
        return Err(Error::SameSite(here.site).into());
    }
    let ways = [(&here, &there), (&there, &here)];
    for (side, peer) in ways {
        say(asked.output, out, &side.let_in(&peer.site, &asked.namespaces).await?)?;
    }
    for (side, peer) in ways {
        side.introduce(peer).await?;
        say(asked.output, out, &format!("{}: PeerCluster {} made; its operator looks at it", side.site, peer.site))?;
    }
    let begin = Instant::now();
    loop {
        let mut findings = Vec::new();
        for (side, peer) in ways {
            findings.extend(side.finding(&peer.site).await?);
        }
        let well = findings.len() == ways.len() && findings.iter().all(|one| one.ready);
        if well || begin.elapsed().as_secs() >= asked.timeout_seconds {
            match asked.output {
                Output::Table => write!(out, "{}", check::text(&findings))?,
                Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(&findings)?)?,
            }
            return Ok(if well { Outcome::Well } else { Outcome::NotWell });
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// A line for people; programs get the findings alone.
fn say(output: Output, out: &mut impl Write, line: &str) -> Result<(), super::Error> {
    if output == Output::Table {
        writeln!(out, "{line}")?;
        out.flush()?;
    }
    Ok(())
}
