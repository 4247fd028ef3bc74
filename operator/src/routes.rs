//! The gateway's routes: every pair's Service at this site, as the file that the gateway watches (sidecar/gateway, `routes`).

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use serde_json::json;
use watari_crds::names::{self, label, port, role};

use crate::context::Context;

/// A new pair waits for its route this long at most.
const PERIOD: Duration = Duration::from_secs(10);
/// Version of the file's format, and its name as mounted.
const VERSION: u32 = 1;
const KEY: &str = "routes.json";

/// Writes the routes whenever they change; an error is logged and tried again.
pub async fn keep(context: Context) {
    let mut written = None;
    loop {
        match routes(&context).await {
            Ok(routes) if written.as_ref() != Some(&routes) => match write(&context, &routes).await {
                Ok(()) => written = Some(routes),
                Err(error) => tracing::warn!(%error, "the gateway's routes could not be written; trying again"),
            },
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "the pairs' Services could not be listed; trying again"),
        }
        tokio::time::sleep(PERIOD).await;
    }
}

async fn routes(context: &Context) -> kube::Result<BTreeMap<String, String>> {
    let selector = format!("{}={}", label::ROLE, role::ENDPOINT);
    let services: Api<Service> = Api::all(context.client.clone());
    let list = services.list(&ListParams::default().labels(&selector)).await?;
    let route = |service: &Service| {
        let pair = service.labels().get(label::PAIR)?;
        let address = service.spec.as_ref()?.cluster_ip.as_ref().filter(|ip| !ip.is_empty() && *ip != "None")?;
        Some((names::server_name(pair), format!("{address}:{}", port::SIDECAR)))
    };
    Ok(list.iter().filter_map(route).collect())
}

async fn write(context: &Context, routes: &BTreeMap<String, String>) -> kube::Result<()> {
    let text = json!({ "version": VERSION, "routes": routes }).to_string();
    let object = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": names::GATEWAY_ROUTES, "labels": { label::MANAGED: names::MANAGED_BY } },
        "data": { KEY: text },
    });
    context.applied.keep(&context.own_config_maps(), &object).await
}
