//! A client of a peer's API server, from the kubeconfig in a Secret.
//!
//! The Secret is data, not a person's shell: a kubeconfig that would run a program or read files of the operator's container
//! is refused.

use kube::config::{AuthInfo, Config, KubeConfigOptions, Kubeconfig};
use kube::{Client, ResourceExt};
use std::time::Duration;
use watari_crds::names::{self, label};
use watari_crds::peer::PeerCluster;

use crate::context::Context;

/// The Secret's key.
const KEY: &str = "kubeconfig";
/// A peer is a WAN away, and one that does not answer must not hold a reconcile up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const READ_TIMEOUT: Duration = Duration::from_secs(15);

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Of our own API server.
    #[error(transparent)]
    Api(kube::Error),
    /// A person must correct it.
    #[error("{0}")]
    Kubeconfig(String),
}

/// The client of a peer; the same one until its Secret changes.
pub async fn peer_client(context: &Context, peer: &PeerCluster) -> Result<Client, Error> {
    let name = &peer.spec.kubeconfig_secret;
    let wrong = |why: String| Error::Kubeconfig(format!("Secret {}/{name}: {why}.", context.settings.namespace));
    let secret = context.own_secrets().get_opt(name).await.map_err(Error::Api)?;
    let secret = secret.ok_or_else(|| wrong("found none".to_owned()))?;
    if secret.labels().get(label::MANAGED).is_none_or(|value| value != names::MANAGED_BY) {
        return Err(wrong(format!("it has no label {}={}", label::MANAGED, names::MANAGED_BY)));
    }
    let version = format!("{}/{}", secret.uid().unwrap_or_default(), secret.resource_version().unwrap_or_default());
    let mut clients = context.peers.lock().await;
    if let Some((_, client)) = clients.get(&peer.name_any()).filter(|(known, _)| *known == version) {
        return Ok(client.clone());
    }
    let data = crate::authority::text(&secret);
    let text = data.get(KEY).ok_or_else(|| wrong(format!("it has no key `{KEY}`, or that is no text")))?;
    let client = client(text).await.map_err(wrong)?;
    clients.insert(peer.name_any(), (version, client.clone()));
    Ok(client)
}

async fn client(text: &str) -> Result<Client, String> {
    let kubeconfig = Kubeconfig::from_yaml(text).map_err(|error| error.to_string())?;
    for named in &kubeconfig.auth_infos {
        harmless(named.auth_info.as_ref().unwrap_or(&AuthInfo::default()))?;
    }
    if kubeconfig.clusters.iter().flat_map(|named| &named.cluster).any(|it| it.certificate_authority.is_some()) {
        return Err("it names a file for the authority; embed it (`kubectl config view --flatten`)".to_owned());
    }
    let options = KubeConfigOptions::default();
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|error| error.to_string())?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(READ_TIMEOUT);
    Client::try_from(config).map_err(|error| error.to_string())
}

fn harmless(user: &AuthInfo) -> Result<(), String> {
    let files = [&user.token_file, &user.client_certificate, &user.client_key];
    if user.exec.is_some() || user.auth_provider.is_some() {
        return Err("it would run a program to log in; use a token or a certificate".to_owned());
    }
    if files.iter().any(|file| file.is_some()) {
        return Err("it names files; embed them (`kubectl config view --flatten`)".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kubeconfig(user: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: x\ncontexts: [{{name: x, context: {{cluster: x, user: x}}}}]\n\
             clusters: [{{name: x, cluster: {{server: \"https://peer.example:6443\"}}}}]\nusers: [{{name: x, user: {user}}}]\n"
        )
    }

    #[tokio::test]
    async fn a_kubeconfig_that_would_run_a_program_or_read_our_files_is_refused() {
        for (user, words) in [
            ("{exec: {command: sh, apiVersion: client.authentication.k8s.io/v1}}", "run a program"),
            ("{tokenFile: /var/run/secrets/token}", "names files"),
            ("{client-certificate: /tls/a, client-key: /tls/b}", "names files"),
        ] {
            let error = client(&kubeconfig(user)).await.map(|_| ()).expect_err(user);
            assert!(error.contains(words), "{user}: {error}");
        }
    }
}
