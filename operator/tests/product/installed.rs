//! Watari on a cluster as its users install it: the chart by Helm, `kubectl watari connect` for the acquaintance. So whatever the tests
//! then see was done with the chart's own rights.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, LogParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::Value;
use tokio::process::Command;
use watari_clusters::handle::Ours;
use watari_clusters::images::{OPERATOR_IMAGE, SIDECAR_IMAGE};
use watari_clusters::plan::ClusterPlan;
use watari_clusters::programs;

/// The release.
const RELEASE: &str = "watari";
/// Where the gateway is reached at each node: one of the ports that Kubernetes leaves to NodePorts.
const GATEWAY_NODE_PORT: u16 = 31743;

/// One cluster's Helm, and what is installed with it.
pub struct Site {
    helm: PathBuf,
    kubeconfig: PathBuf,
    cluster: ClusterPlan,
    pub name: &'static str,
}

impl Site {
    pub fn new(ours: &Ours, cluster: &ClusterPlan, name: &'static str) -> anyhow::Result<Site> {
        let helm = programs::folder(&ours.folders)?.join("helm");
        Ok(Site { helm, kubeconfig: ours.folders.kubeconfig(cluster), cluster: cluster.clone(), name })
    }

    async fn helm(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(&self.helm);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(arguments).kill_on_drop(true);
        output(&mut command).await.with_context(|| format!("helm {} at {}", arguments.join(" "), self.name))
    }

    /// Of the API server, as every node and Pod reaches it, also those of the other cluster.
    fn server(&self) -> String {
        format!("https://{}:6443", self.cluster.control_plane().address())
    }

    /// Takes away what an ended test left; only one at a time has operators.
    pub async fn clear(&self) -> anyhow::Result<()> {
        let listed: Value = serde_json::from_str(&self.helm(&["list", "--all-namespaces", "--output", "json"]).await?)?;
        for release in listed.as_array().into_iter().flatten().filter(|release| release["name"] == RELEASE) {
            let namespace = release["namespace"].as_str().context("a release has a namespace")?;
            self.helm(&["uninstall", RELEASE, "--namespace", namespace, "--ignore-not-found"]).await?;
        }
        Ok(())
    }

    /// Installs the chart, or changes what is installed, and waits until everything of it is ready. `more` are further values.
    pub async fn install(&self, namespace: &str, more: &[&str]) -> anyhow::Result<()> {
        let gateway = format!("gateway.address={}:{GATEWAY_NODE_PORT}", self.cluster.control_plane().address());
        let (site, port) = (format!("site={}", self.name), format!("gateway.service.nodePort={GATEWAY_NODE_PORT}"));
        let (operator, sidecar) =
            (format!("operator.image={OPERATOR_IMAGE}"), format!("sidecar.image={SIDECAR_IMAGE}"));
        let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/watari");
        // A test that was killed may have left cluster-wide objects of a release whose namespace is gone.
        let mut arguments = vec!["upgrade", "--install", RELEASE, chart, "--namespace", namespace, "--take-ownership"];
        arguments.extend(["--wait", "--timeout", "180s"]);
        for value in [&site, &gateway, "gateway.service.type=NodePort", &port, &operator, &sidecar] {
            arguments.extend(["--set", value]);
        }
        for value in more {
            arguments.extend(["--set", value]);
        }
        self.helm(&arguments).await?;
        Ok(())
    }

    pub async fn uninstall(&self, namespace: &str) -> anyhow::Result<()> {
        self.helm(&["uninstall", RELEASE, "--namespace", namespace, "--wait", "--timeout", "120s"]).await?;
        Ok(())
    }

    /// `kubectl watari` with this cluster's kubeconfig and nobody at the terminal; answers what it printed.
    pub async fn kubectl_watari(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-watari"));
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        output(&mut command).await.with_context(|| format!("kubectl watari {} at {}", arguments.join(" "), self.name))
    }

    /// Lets this site and `peer` use each other, and waits until both say that they can.
    pub async fn connect(&self, peer: &Site, system: &str, namespace: &str) -> anyhow::Result<String> {
        let kubeconfig = peer.kubeconfig.to_str().context("a path that is text")?;
        let arguments = ["connect", &peer.cluster.name(), "--peer-kubeconfig", kubeconfig, "--namespaces", namespace];
        let servers = ["--server", &self.server(), "--peer-server", &peer.server()];
        let systems = ["--operator-namespace", system, "--peer-operator-namespace", system];
        self.kubectl_watari(&[&arguments[..], &servers[..], &systems[..]].concat()).await
    }
}

async fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(output.status.success(), "{}: {}{}", output.status, text(&output.stdout), text(&output.stderr));
    Ok(text(&output.stdout))
}

/// The end of what every Pod of `namespace` logged.
pub async fn logs(client: &Client, namespace: &str) -> String {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let mut text = String::new();
    for pod in pods.list(&ListParams::default()).await.map(|list| list.items).unwrap_or_default() {
        let parameters = LogParams { tail_lines: Some(60), ..LogParams::default() };
        let log = pods.logs(&pod.name_any(), &parameters).await.unwrap_or_else(|error| error.to_string());
        text.push_str(&format!("== {}\n{log}\n", pod.name_any()));
    }
    text
}
