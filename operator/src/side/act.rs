//! Does one step at a time; each can be repeated.

use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::api::{ApiResource, DeleteParams, DynamicObject, Patch, PostParams};
use serde_json::{Value, json};
use watari_crds::kubevirt::{VirtualMachine, VirtualMachineInstanceMigration};
use watari_crds::names::{self, annotation, label};

use super::observe::Side;
use super::{Step, trust};
use crate::answers::{gone_is_fine, there_is_fine};
use crate::apply::{apply, merging};
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
                // The older way to say it; the API has one or the other.
                "spec": { "runStrategy": strategy, "running": null },
            });
            vms(context, whose).patch(whose.vm, &merging(), &Patch::Merge(patch)).await?;
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
        Step::OpenHandover { vmi_uid } => holder(context, whose, seen).await?.open_handover(vmi_uid).await?,
        Step::Acquire => holder(context, whose, seen).await?.acquire().await?,
        Step::Void => holder(context, whose, seen).await?.void().await?,
        Step::Promote { generation } => {
            let said = holder(context, whose, seen).await?.promote(*generation).await?;
            tracing::info!(vm = whose.vm, namespace = whose.namespace, said, "failover");
        }
        Step::AcceptDivergence => holder(context, whose, seen).await?.accept_divergence().await?,
    }
    Ok(())
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

/// The sidecar that has the folder: that of the Pod that reported.
async fn holder(context: &Context, whose: Whose<'_>, seen: &Side) -> Result<Sidecar, Error> {
    let nobody = || sidecar::Error::Silent { address: "no Pod".to_owned(), why: "none reported".to_owned() };
    let ip = seen.ip.as_ref().ok_or_else(nobody)?;
    Ok(Sidecar::connect(context, whose.namespace, whose.pair_id, ip).await?)
}
