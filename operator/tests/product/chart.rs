//! The chart: linted, refused without its one required value, rendered, and every object of it accepted by the API server.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use kube::api::{DynamicObject, PostParams};
use kube::core::GroupVersionKind;
use kube::discovery::{Scope, pinned_kind};
use kube::{Api, ResourceExt};
use serde::Deserialize as _;
use watari_clusters::handle::Pair;
use watari_clusters::programs;

/// What a person would set.
const VALUES: &str = "site=tokyo,gateway.address=gateway.tokyo.example:7443,gateway.service.type=NodePort,gateway.service.nodePort=31743,\
                      peers[0].name=osaka,peers[0].namespaces={default}";

fn helm(helm: &Path, arguments: &[&str]) -> anyhow::Result<(bool, String)> {
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/watari");
    let output = Command::new(helm).args(arguments).arg(chart).output().context("helm")?;
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    Ok((output.status.success(), text))
}

#[tokio::test]
async fn the_chart_is_clean_needs_a_site_and_all_of_it_is_accepted() -> anyhow::Result<()> {
    let pair = Pair::open().await?;
    let Some(ours) = &pair.ours else {
        eprintln!("skipped: Helm comes with our own clusters");
        return Ok(());
    };
    let program = programs::folder(&ours.folders)?.join("helm");
    let (clean, text) = helm(&program, &["lint", "--strict", "--set", VALUES])?;
    ensure!(clean, "{text}");
    let (accepted, text) = helm(&program, &["lint", "--strict"])?;
    ensure!(!accepted && text.contains("/site"), "a chart without a site: {text}");
    let (rendered, text) = helm(&program, &["template", "watari", "--namespace", "default", "--set", VALUES])?;
    ensure!(rendered, "{text}");

    // No Prometheus Operator is here to judge these.
    let monitored =
        format!("{VALUES},monitoring.podMonitors=true,monitoring.alerts=true,monitoring.labels.release=prometheus");
    let only = ["template", "watari", "--show-only", "templates/monitoring.yaml", "--set", &monitored];
    let (rendered, monitoring) = helm(&program, &only)?;
    ensure!(rendered, "{monitoring}");
    let kinds: Vec<String> = documents(&monitoring)?.into_iter().filter_map(|it| Some(it.types?.kind)).collect();
    ensure!(kinds == ["PodMonitor", "PodMonitor", "PrometheusRule"], "{kinds:?}");

    let mut count = 0;
    let mut namespaced = 0;
    for object in documents(&text)? {
        let client = pair.a.client.clone();
        let types = object.types.clone().context("an object has a kind")?;
        let (resource, capabilities) = pinned_kind(&client, &GroupVersionKind::try_from(&types)?).await?;
        let api: Api<DynamicObject> = match capabilities.scope {
            Scope::Cluster => Api::all_with(client, &resource),
            Scope::Namespaced => {
                namespaced += 1;
                Api::namespaced_with(client, &object.namespace().context("a namespace")?, &resource)
            }
        };
        let dry = PostParams { dry_run: true, field_manager: None };
        api.create(&dry, &object).await.with_context(|| format!("{} {}", types.kind, object.name_any()))?;
        count += 1;
    }
    ensure!(count > 10 && namespaced > 5, "{count} objects, {namespaced} of them in namespaces");
    Ok(())
}

/// The documents of a YAML stream; empty ones are left out.
fn documents(text: &str) -> anyhow::Result<Vec<DynamicObject>> {
    let mut objects = Vec::new();
    for document in text.split("\n---") {
        if document.lines().any(|line| line.starts_with("kind:")) {
            let value: serde_json::Value = serde_saphyr::from_str(document)?;
            objects.push(DynamicObject::deserialize(value)?);
        }
    }
    Ok(objects)
}
