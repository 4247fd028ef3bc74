//! A cluster as tests see it: a client and what the cluster offers, whoever made it.
//!
//! Without further words these are our own clusters. Any other two take their place by environment:
//!
//! | variable | meaning |
//! | --- | --- |
//! | `WATARI_E2E_KUBECONFIG_A`, `WATARI_E2E_KUBECONFIG_B` | administrators' kubeconfigs; both or neither |
//! | `WATARI_E2E_CLASS_RWO` | storage class for claims of one Pod (default: the cluster's default class) |
//! | `WATARI_E2E_CLASS_RWX` | storage class for shared claims; tests that need one are skipped without it |
//! | `WATARI_E2E_CLASS_BLOCK_RWO`, `WATARI_E2E_CLASS_BLOCK_RWX` | the same for Block mode, if other ones |
//! | `WATARI_E2E_IMAGE_SHELL` | an image with busybox or the like, for both clusters |
//!
//! What breaks a cluster is offered by [`Ours`] only, so that no test can break somebody else's.

use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};

use crate::folders::{self, Folders};
use crate::images::BUSYBOX_IMAGE;
use crate::keeper;
use crate::plan::{self, ClusterPlan, Plan};
use crate::provision::{LOCAL_CLASS, SHARED_CLASS};

/// Why there is no cluster to talk to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: {source}")]
    Kubeconfig { path: PathBuf, source: kube::config::KubeconfigError },
    #[error(transparent)]
    Client(#[from] kube::Error),
    #[error(transparent)]
    Folder(#[from] folders::Error),
    #[error(transparent)]
    Plan(#[from] plan::Error),
    #[error("no clusters: `make clusters` brings ours up, or set WATARI_E2E_KUBECONFIG_A and WATARI_E2E_KUBECONFIG_B")]
    None,
    #[error("{0} must be set too: other people's clusters do not have our images")]
    Unset(&'static str),
}

/// A client as the kubeconfig says.
pub async fn client(kubeconfig: &Path) -> Result<Client, Error> {
    let fail = |source| Error::Kubeconfig { path: kubeconfig.to_owned(), source };
    let file = Kubeconfig::read_from(kubeconfig).map_err(fail)?;
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(fail)?;
    Ok(Client::try_from(config)?)
}

/// Does the node say that it is ready?
pub fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Access and mode of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClaimKind {
    pub block: bool,
    pub shared: bool,
}

impl ClaimKind {
    pub const ALL: [ClaimKind; 4] = [
        ClaimKind { block: false, shared: false },
        ClaimKind { block: false, shared: true },
        ClaimKind { block: true, shared: false },
        ClaimKind { block: true, shared: true },
    ];

    /// "filesystem-rwo", …: good for names.
    pub fn name(self) -> String {
        let (mode, access) = (if self.block { "block" } else { "filesystem" }, if self.shared { "rwx" } else { "rwo" });
        format!("{mode}-{access}")
    }
}

/// One cluster.
#[derive(Clone)]
pub struct Cluster {
    /// "a" or "b".
    pub name: String,
    pub client: Client,
    /// For programs that are not us.
    pub kubeconfig: PathBuf,
    /// An image with a shell.
    pub shell_image: String,
    classes: Classes,
}

#[derive(Clone)]
struct Classes {
    /// `None` is the cluster's default.
    local: Option<String>,
    shared: Option<String>,
    block_local: Option<String>,
    block_shared: Option<String>,
}

/// What a storage class is called where, or that there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Class {
    Default,
    Named(String),
    Unavailable,
}

impl Cluster {
    /// The storage class for claims of this kind.
    pub fn class(&self, kind: ClaimKind) -> Class {
        let Classes { local, shared, block_local, block_shared } = &self.classes;
        let named = |class: &Option<String>| class.clone().map(Class::Named);
        match (kind.block, kind.shared) {
            (false, false) => named(local).unwrap_or(Class::Default),
            (true, false) => named(block_local).or_else(|| named(local)).unwrap_or(Class::Default),
            (false, true) => named(shared).unwrap_or(Class::Unavailable),
            (true, true) => named(block_shared).or_else(|| named(shared)).unwrap_or(Class::Unavailable),
        }
    }
}

/// Two clusters, source and peer.
#[derive(Clone)]
pub struct Pair {
    pub a: Cluster,
    pub b: Cluster,
    /// Only for our own.
    pub ours: Option<Ours>,
}

/// Our own clusters: these may be broken.
#[derive(Clone)]
pub struct Ours {
    pub folders: Folders,
    pub plan: Plan,
}

impl Ours {
    pub fn a(&self) -> &ClusterPlan {
        &self.plan.clusters[0]
    }
    pub fn b(&self) -> &ClusterPlan {
        &self.plan.clusters[1]
    }

    /// A command to the link between a and b (see `watari_e2e::wan::control`).
    pub fn link(&self, command: &str) -> Result<watari_e2e::wan::Report, keeper::Error> {
        let answer = keeper::link(&self.folders, self.a(), self.b(), command)?;
        let fail = |error: serde_json::Error| keeper::Error::Setting(format!("{answer}: {error}"));
        serde_json::from_str(&answer).map_err(fail)
    }
}

impl Pair {
    /// As the environment says.
    pub async fn open() -> Result<Pair, Error> {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        match (variable("WATARI_E2E_KUBECONFIG_A"), variable("WATARI_E2E_KUBECONFIG_B")) {
            (None, None) => Pair::ours().await,
            (None, _) => Err(Error::Unset("WATARI_E2E_KUBECONFIG_A")),
            (_, None) => Err(Error::Unset("WATARI_E2E_KUBECONFIG_B")),
            (Some(a), Some(b)) => {
                let classes = Classes {
                    local: variable("WATARI_E2E_CLASS_RWO"),
                    shared: variable("WATARI_E2E_CLASS_RWX"),
                    block_local: variable("WATARI_E2E_CLASS_BLOCK_RWO"),
                    block_shared: variable("WATARI_E2E_CLASS_BLOCK_RWX"),
                };
                let image = variable("WATARI_E2E_IMAGE_SHELL").ok_or(Error::Unset("WATARI_E2E_IMAGE_SHELL"))?;
                let a = Cluster::open("a", a.into(), image.clone(), classes.clone()).await?;
                let b = Cluster::open("b", b.into(), image, classes).await?;
                Ok(Pair { a, b, ours: None })
            }
        }
    }

    async fn ours() -> Result<Pair, Error> {
        let folders = Folders::from_environment()?;
        let plan = folders.read_plan()?.ok_or(Error::None)?;
        let open = |cluster: &ClusterPlan| {
            let classes = Classes {
                local: Some(LOCAL_CLASS.to_owned()),
                shared: Some(SHARED_CLASS.to_owned()),
                block_local: None,
                block_shared: None,
            };
            let (name, kubeconfig) = (cluster.name(), folders.kubeconfig(cluster));
            async move { Cluster::open(&name, kubeconfig, BUSYBOX_IMAGE.to_owned(), classes).await }
        };
        let (a, b) = (open(plan.cluster("a")?).await?, open(plan.cluster("b")?).await?);
        Ok(Pair { a, b, ours: Some(Ours { folders, plan }) })
    }

    pub fn both(&self) -> [&Cluster; 2] {
        [&self.a, &self.b]
    }
}

impl Cluster {
    async fn open(name: &str, kubeconfig: PathBuf, shell_image: String, classes: Classes) -> Result<Cluster, Error> {
        let client = client(&kubeconfig).await?;
        Ok(Cluster { name: name.to_owned(), client, kubeconfig, shell_image, classes })
    }
}
