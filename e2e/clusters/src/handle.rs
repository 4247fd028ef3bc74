//! A cluster as tests see it: a client and what the cluster offers, whoever made it.

use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};

/// Why there is no cluster to talk to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: {source}")]
    Kubeconfig { path: PathBuf, source: kube::config::KubeconfigError },
    #[error(transparent)]
    Client(#[from] kube::Error),
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
