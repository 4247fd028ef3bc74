//! What this operator is told at its start, by its command line or environment; nothing changes while it runs.

use std::net::SocketAddr;

use clap::Parser;

use crate::webhooks::objects::Endpoint;
use crate::webhooks::settings::{Resources, SidecarSettings};

/// The command line. A wrong one ends with exit code 2 and words that say what was expected.
#[derive(Parser, Clone, Debug)]
#[command(name = "watari-operator", version)]
#[command(about = "Keeps the disks of KubeVirt VMs pre-synchronised with peer clusters")]
#[command(
    after_help = "KUBECONFIG, or the Pod's service account, leads to the API server. RUST_LOG chooses what is logged (default: info).\n\
                  Exit codes: 0 it was asked to end, 1 it could not go on (the last log line says why), 2 a bad command line."
)]
pub struct Arguments {
    /// This site's name; each cluster has its own. It becomes part of certificates and is not changed later.
    #[arg(long, env = "WATARI_SITE", value_name = "NAME", value_parser = site)]
    pub site: String,
    /// The operator's own namespace.
    #[arg(long, env = "WATARI_NAMESPACE", value_name = "NAME", default_value = "watari-system")]
    pub namespace: String,
    /// The sidecar's image.
    #[arg(long, env = "WATARI_IMAGE", value_name = "IMAGE")]
    pub image: String,
    /// When the sidecar's image is pulled.
    #[arg(long, env = "WATARI_IMAGE_PULL_POLICY", value_name = "POLICY", default_value = "IfNotPresent")]
    #[arg(value_parser = ["Always", "IfNotPresent", "Never"])]
    pub image_pull_policy: String,
    /// host:port of this site's gateway, as reachable for peers; empty: there is none.
    #[arg(long, env = "WATARI_GATEWAY", value_name = "HOST:PORT", default_value = "")]
    pub gateway: String,
    /// Where the webhooks listen, with TLS.
    #[arg(long, env = "WATARI_WEBHOOK_LISTEN", value_name = "ADDRESS:PORT", default_value = "0.0.0.0:9443")]
    pub webhook_listen: SocketAddr,
    /// Where metrics are served, plain HTTP.
    #[arg(long, env = "WATARI_METRICS_LISTEN", value_name = "ADDRESS:PORT", default_value = "0.0.0.0:9090")]
    pub metrics_listen: SocketAddr,
    /// https://localhost:PORT, say, under which the API server reaches the webhooks, where that is not the chart's Service: an operator
    /// outside the cluster.
    #[arg(long, env = "WATARI_WEBHOOK_URL", value_name = "URL", value_parser = https)]
    pub webhook_url: Option<String>,
}

fn site(text: &str) -> Result<String, String> {
    let allowed = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
    let well = (1..=63).contains(&text.len()) && text.as_bytes().iter().all(allowed);
    match well && !text.starts_with('-') && !text.ends_with('-') {
        true => Ok(text.to_owned()),
        false => Err("expected 1 to 63 lower-case letters, digits and inner hyphens, such as tokyo".to_owned()),
    }
}

fn https(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix("https://");
    match rest.filter(|rest| !rest.is_empty() && !rest.contains('/')) {
        Some(_) => Ok(text.to_owned()),
        None => Err("expected an https URL without a path, such as https://localhost:9443".to_owned()),
    }
}

/// What controllers need to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This site's name; each cluster has its own.
    pub site: String,
    /// The operator's own namespace: authority, site card, kubeconfigs of peers.
    pub namespace: String,
    /// The sidecar's image, for replica Pods.
    pub image: String,
    /// `Always`, `IfNotPresent` or `Never`.
    pub image_pull_policy: String,
    /// `host:port` of this site's gateway, as reachable for peers; empty: there is none.
    pub gateway: String,
}

impl Arguments {
    pub fn settings(&self) -> Settings {
        let Arguments { site, namespace, image, image_pull_policy, gateway, .. } = self.clone();
        Settings { site, namespace, image, image_pull_policy, gateway }
    }

    /// Where the API server finds the webhooks.
    pub fn endpoint(&self) -> Endpoint {
        match &self.webhook_url {
            Some(url) => Endpoint::Url(url.clone()),
            None => Endpoint::Service { namespace: self.namespace.clone() },
        }
    }
}

impl Settings {
    /// What sidecars beside VMs are started with.
    pub fn sidecars(&self) -> SidecarSettings {
        SidecarSettings {
            image: self.image.clone(),
            image_pull_policy: Some(self.image_pull_policy.clone()),
            image_pull_secrets: Vec::new(),
            resources: Resources::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn parse(more: &[&str]) -> Result<Arguments, String> {
        let least = ["watari-operator", "--site", "tokyo", "--image", "watari-sidecar"];
        Arguments::try_parse_from(least.iter().chain(more)).map_err(|error| error.to_string())
    }

    #[test]
    fn a_wrong_command_line_is_refused_with_what_was_expected() {
        for (wrong, words) in [
            (["--site", "Tokyo"], "such as tokyo"),
            (["--site", "tokyo-"], "such as tokyo"),
            (["--image-pull-policy", "Sometimes"], "IfNotPresent"),
            (["--webhook-listen", "9443"], "ADDRESS:PORT"),
            (["--webhook-url", "http://localhost:9443"], "such as https://localhost:9443"),
            (["--webhook-url", "https://localhost:9443/path"], "such as https://localhost:9443"),
        ] {
            // Given twice, an argument is an error of its own.
            let line = ["watari-operator", "--image", "x"];
            let site: &[&str] = if wrong[0] == "--site" { &[] } else { &["--site", "tokyo"] };
            let line = line.iter().chain(site).chain(&wrong);
            let error = Arguments::try_parse_from(line).expect_err(wrong[1]).to_string();
            assert!(error.contains(words), "{wrong:?}: {error}");
        }
    }

    #[test]
    fn the_webhooks_are_behind_the_service_of_the_operators_namespace_unless_a_url_is_given() {
        let inside = parse(&["--namespace", "watari-test"]).unwrap();
        assert_eq!(inside.endpoint().dns_names(), ["watari-webhooks.watari-test.svc"]);
        let outside = parse(&["--webhook-url", "https://localhost:9443"]).unwrap();
        assert_eq!(outside.endpoint().dns_names(), ["localhost"]);
    }
}
