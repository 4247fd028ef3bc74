//! Our definitions, as the chart installs them. Shared by the tests that need clusters.

use std::time::Duration;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams};
use kube::runtime::wait::{await_condition, conditions::is_crd_established};
use kube::{Api, Client, ResourceExt};

/// Until an API server on a busy machine serves a new kind.
const PATIENCE: Duration = Duration::from_secs(60);

/// Installs them, or brings them up to date, and waits until they are served.
pub async fn install(client: &Client) -> anyhow::Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in watari_crds::definitions() {
        let name = definition.name_any();
        api.patch(&name, &PatchParams::apply("watari-crds").force(), &Patch::Apply(&definition)).await?;
        tokio::time::timeout(PATIENCE, await_condition(api.clone(), &name, is_crd_established())).await??;
    }
    Ok(())
}
