//! Does one step at a time; each can be repeated.

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use watari_crds::kubevirt::{VirtualMachine, VirtualMachineInstanceMigration};
use watari_crds::names::{self, annotation, label};

use super::observe::Side;
use super::{Step, trust};
use crate::apply::apply;
use crate::context::Context;
use crate::sidecar::{self, Sidecar};

/// The label by which the scheduler knows a node.
const HOSTNAME: &str = "kubernetes.io/hostname";

/// Whose VM it is.
#[derive(Clone, Copy, Debug)]
pub struct Whose<'a> {
    pub namespace: &'a str,
    pub pair_id: &'a str,
    pub vm: &'a str,
}

/// Why a step could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error(transparent)]
    Sidecar(#[from] sidecar::Error),
}

pub async fn act(context: &Context, whose: Whose<'_>, seen: &Side, step: &Step) -> Result<(), Error> {
    let client = || context.client.clone();
    tracing::info!(vm = whose.vm, namespace = whose.namespace, ?step, "crossing");
    match step {
        Step::Trust(certificates) => {
            let Some(kubevirt) = &seen.kubevirt else { return Ok(()) };
            let inbox: Api<ConfigMap> = Api::namespaced(client(), &kubevirt.namespace);
            let object = json!({
                "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": trust::INBOX },
                "data": { trust::KEY: certificates },
            });
            apply(&inbox, &object).await?;
        }
        Step::MakeVm(vm) => make(&vms(context, whose), vm).await?,
        Step::RemoveVm => gone_is_fine(vms(context, whose).delete(whose.vm, &DeleteParams::default()).await)?,
        Step::SetRunStrategy { strategy, restore } => {
            let patch = json!({
                "metadata": { "annotations": { annotation::RESTORE_RUN_STRATEGY: restore } },
                "spec": { "runStrategy": strategy },
            });
            vms(context, whose).patch(whose.vm, &manager(), &Patch::Merge(patch)).await?;
        }
        Step::Receive { id, node } => {
            let selector = node.as_ref().map(|node| json!({ HOSTNAME: node }));
            let spec = json!({ "vmiName": whose.vm, "receive": { "migrationID": id }, "addedNodeSelector": selector });
            migrate(context, whose, id, spec).await?;
        }
        Step::Send { id, connect } => {
            let spec = json!({ "vmiName": whose.vm, "sendTo": { "migrationID": id, "connectURL": connect } });
            migrate(context, whose, id, spec).await?;
        }
        Step::DeleteMigration(id) => {
            let api: Api<VirtualMachineInstanceMigration> = Api::namespaced(client(), whose.namespace);
            gone_is_fine(api.delete(id, &DeleteParams::default()).await)?;
        }
        Step::OpenHandover { vmi_uid } => holder(context, whose).await?.open_handover(vmi_uid).await?,
        Step::Acquire => holder(context, whose).await?.acquire().await?,
        Step::Void => holder(context, whose).await?.void().await?,
    }
    Ok(())
}

fn manager() -> PatchParams {
    PatchParams { field_manager: Some(names::FIELD_MANAGER.to_owned()), ..PatchParams::default() }
}

fn vms(context: &Context, whose: Whose<'_>) -> Api<DynamicObject> {
    let resource = ApiResource::erase::<VirtualMachine>(&());
    Api::namespaced_with(context.client.clone(), whose.namespace, &resource)
}

/// Created, not applied: a VM that a person made under this name meanwhile is theirs.
async fn make(api: &Api<DynamicObject>, object: &Value) -> kube::Result<()> {
    let object = serde_json::from_value(object.clone()).map_err(kube::Error::SerdeError)?;
    there_is_fine(api.create(&PostParams::default(), &object).await)
}

async fn migrate(context: &Context, whose: Whose<'_>, id: &str, spec: Value) -> kube::Result<()> {
    let resource = ApiResource::erase::<VirtualMachineInstanceMigration>(&());
    let api: Api<DynamicObject> = Api::namespaced_with(context.client.clone(), whose.namespace, &resource);
    let object = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
        "metadata": { "name": id, "labels": { label::PAIR: whose.pair_id, label::MANAGED: names::MANAGED_BY } },
        "spec": spec,
    });
    make(&api, &object).await
}

/// The sidecar that has the folder: of the Pods that may, the first that answers.
async fn holder(context: &Context, whose: Whose<'_>) -> Result<Sidecar, Error> {
    let pods: Api<Pod> = Api::namespaced(context.client.clone(), whose.namespace);
    let list = pods.list(&ListParams::default().labels(&format!("{}={}", label::PAIR, whose.pair_id))).await?;
    let mut failure = sidecar::Error::Silent { address: "no Pod".to_owned(), why: "none is there".to_owned() };
    for pod in &list {
        let status = pod.status.as_ref();
        if status.and_then(|it| it.phase.as_deref()).is_none_or(|phase| phase == "Succeeded" || phase == "Failed") {
            continue;
        }
        let Some(ip) = status.and_then(|it| it.pod_ip.as_ref()) else { continue };
        match Sidecar::connect(context, whose.namespace, whose.pair_id, ip).await {
            Ok(sidecar) => return Ok(sidecar),
            Err(error) => {
                tracing::debug!(pod = pod.name_any(), %error, "does not answer");
                failure = error;
            }
        }
    }
    Err(failure.into())
}

fn gone_is_fine<T>(result: kube::Result<T>) -> kube::Result<()> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other.map(drop),
    }
}

fn there_is_fine<T>(result: kube::Result<T>) -> kube::Result<()> {
    match result {
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => Ok(()),
        other => other.map(drop),
    }
}
