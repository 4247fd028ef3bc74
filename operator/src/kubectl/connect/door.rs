//! The kubeconfig that a site's operator gets of its peer: address and authority from a person's kubeconfig, and a token of its own.
//!
//! Nothing of the person's own rights goes into it. It is written as JSON, which is YAML too.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kube::config::{Cluster, Kubeconfig};
use serde_json::{Value, json};

/// Why a person's kubeconfig does not lead an operator anywhere.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("the kubeconfig has no context named {0}; `kubectl config get-contexts` lists those there are")]
    NoContext(String),
    #[error("the kubeconfig has no current context; name one with --context")]
    NoCurrentContext,
    #[error("the kubeconfig's context {context} names the cluster {cluster}, which it does not describe")]
    NoCluster { context: String, cluster: String },
    #[error("{file}, the authority of context {context}, cannot be read: {why}")]
    Authority { context: String, file: String, why: String },
    #[error("context {context} reaches its API server at {server}, which leads nowhere from another cluster; {remedy}")]
    Loopback { context: String, server: String, remedy: &'static str },
}

/// The cluster entry of `context` (of the current context, without one).
pub fn cluster(kubeconfig: &Kubeconfig, context: Option<&str>) -> Result<(String, Cluster), Error> {
    let named = context.or(kubeconfig.current_context.as_deref()).filter(|name| !name.is_empty());
    let name = named.ok_or(Error::NoCurrentContext)?.to_owned();
    let found = kubeconfig.contexts.iter().find(|it| it.name == name).and_then(|it| it.context.as_ref());
    let wanted = &found.ok_or_else(|| Error::NoContext(name.clone()))?.cluster;
    let found = kubeconfig.clusters.iter().find(|it| it.name == *wanted).and_then(|it| it.cluster.clone());
    let cluster = found.ok_or_else(|| Error::NoCluster { context: name.clone(), cluster: wanted.clone() })?;
    Ok((name, cluster))
}

/// `cluster` as another cluster's Pods reach it: at `server` if given, with its authority embedded.
pub fn reachable(
    context: &str,
    mut cluster: Cluster,
    server: Option<&str>,
    remedy: &'static str,
) -> Result<Cluster, Error> {
    if let Some(file) = cluster.certificate_authority.take() {
        let bytes = std::fs::read(&file).map_err(|error| Error::Authority {
            context: context.to_owned(),
            file: file.clone(),
            why: error.to_string(),
        })?;
        cluster.certificate_authority_data = Some(STANDARD.encode(bytes));
    }
    if let Some(server) = server {
        cluster.server = Some(server.to_owned());
    }
    let server = cluster.server.clone().unwrap_or_default();
    match is_loopback(&server) {
        true => Err(Error::Loopback { context: context.to_owned(), server, remedy }),
        false => Ok(cluster),
    }
}

fn is_loopback(server: &str) -> bool {
    let rest = server.split_once("://").map_or(server, |(_, rest)| rest);
    rest.starts_with("localhost") || rest.starts_with("127.") || rest.starts_with("[::1]")
}

/// What goes into the Secret: one cluster, one user with a token.
pub fn kubeconfig(site: &str, cluster: &Cluster, token: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": site,
        "clusters": [{ "name": site, "cluster": cluster }],
        "contexts": [{ "name": site, "context": { "cluster": site, "user": site } }],
        "users": [{ "name": site, "user": { "token": token } }],
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn persons(server: &str) -> Kubeconfig {
        Kubeconfig::from_yaml(&format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: tokyo\n\
             contexts: [{{name: tokyo, context: {{cluster: tokyo, user: me}}}}, {{name: lost, context: {{cluster: gone, user: me}}}}]\n\
             clusters: [{{name: tokyo, cluster: {{server: \"{server}\", certificate-authority-data: YQ==}}}}]\n\
             users: [{{name: me, user: {{token: mine}}}}]\n"
        ))
        .unwrap()
    }

    #[test]
    fn it_holds_the_cluster_and_the_token_and_nothing_of_the_person() {
        let (name, cluster) = cluster(&persons("https://tokyo.example:6443"), None).unwrap();
        let cluster = reachable(&name, cluster, None, "").unwrap();
        let text = kubeconfig("tokyo", &cluster, "theirs").to_string();
        for part in ["https://tokyo.example:6443", "YQ==", "theirs", "\"current-context\":\"tokyo\""] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("mine"), "{text}");
        // An operator reads it as it reads every kubeconfig.
        assert_eq!(Kubeconfig::from_yaml(&text).unwrap().clusters.len(), 1);
    }

    #[test]
    fn an_address_of_this_machine_is_refused_unless_another_is_given() {
        for server in ["https://127.0.0.1:16441", "https://localhost:6443", "https://[::1]:6443"] {
            let (name, entry) = cluster(&persons(server), None).unwrap();
            let error = reachable(&name, entry.clone(), None, "give --server").unwrap_err();
            assert!(error.to_string().contains("give --server"), "{error}");
            let given = reachable(&name, entry, Some("https://tokyo.example:6443"), "").unwrap();
            assert_eq!(given.server.as_deref(), Some("https://tokyo.example:6443"));
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let persons = persons("https://tokyo.example:6443");
        assert_eq!(cluster(&persons, Some("kyoto")).unwrap_err(), Error::NoContext("kyoto".to_owned()));
        assert!(matches!(cluster(&persons, Some("lost")), Err(Error::NoCluster { .. })));
        assert_eq!(cluster(&Kubeconfig::default(), None).unwrap_err(), Error::NoCurrentContext);
    }
}
