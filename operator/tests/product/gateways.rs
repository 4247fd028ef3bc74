//! A gateway on each cluster, as the chart runs one: a Pod with the routes that the operator writes.

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::Api;
use kube::api::PostParams;
use serde_json::json;
use watari_clusters::handle::Cluster;
use watari_clusters::images::SIDECAR_IMAGE;
use watari_crds::names::{self, port};

use crate::scene::until;

/// Starts it, and answers where the other cluster's Pods reach it: Pod networks are routed over the emulated WAN.
pub async fn start(cluster: &Cluster, system: &str) -> anyhow::Result<String> {
    let routes = json!({ "metadata": { "name": names::GATEWAY_ROUTES }, "data": { "routes.json": "{\"version\":1,\"routes\":{}}" } });
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), system);
    maps.create(&PostParams::default(), &serde_json::from_value(routes)?).await?;
    let pod = json!({
        "metadata": { "name": "watari-gateway" },
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "gateway", "image": SIDECAR_IMAGE, "imagePullPolicy": "Never",
                "args": ["gateway", "--listen", format!("0.0.0.0:{}", port::GATEWAY), "--routes", "/routes/routes.json"],
                "volumeMounts": [{ "name": "routes", "mountPath": "/routes", "readOnly": true }],
            }],
            "volumes": [{ "name": "routes", "configMap": { "name": names::GATEWAY_ROUTES } }],
        },
    });
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), system);
    pods.create(&PostParams::default(), &serde_json::from_value(pod)?).await?;
    until("the gateway's address", async || {
        let status = pods.get("watari-gateway").await?.status.unwrap_or_default();
        let running = status.phase.as_deref() == Some("Running");
        Ok(status.pod_ip.filter(|_| running).map(|ip| format!("{ip}:{}", port::GATEWAY)))
    })
    .await
}
