//! virt-controller's part that we play: VM → VMI → virt-launcher Pod, and the states back.
//!
//! Observe (a list of each kind), decide (pure, [`decide`]), act. It looks twice a second instead of watching: it is a stand-in.

use std::time::Duration;

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams,
};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use watari_clusters::provision::bytes;

use crate::render::{self, ClaimVolume};

const POLL: Duration = Duration::from_millis(500);
const MANAGER: &str = "kubevirt-standin";

/// Why a pass could not be finished; the next one tries again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error(transparent)]
    Render(#[from] render::Error),
    #[error(transparent)]
    Size(#[from] watari_clusters::provision::Error),
    #[error("{0}")]
    Json(#[from] serde_json::Error),
}

/// A VM with what belongs to it.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub vm: Value,
    pub vmi: Option<Value>,
    /// The newest Pod of this VMI.
    pub pod: Option<PodSeen>,
}

/// What matters about a Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSeen {
    pub phase: String,
    /// The launcher says that the guest runs.
    pub running: bool,
    pub node: Option<String>,
}

/// The next thing to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    CreateVmi,
    DeleteVmi,
    CreatePod,
    /// Of the VMI.
    Phase(&'static str),
    Nothing,
}

/// Phases after which a VMI does not come back.
fn is_final(phase: &str) -> bool {
    matches!(phase, "Succeeded" | "Failed")
}

/// What a VM calls for. Run strategies other than Always, RerunOnFailure and Halted leave it as it is.
pub fn decide(seen: &Seen) -> Action {
    let strategy = seen.vm["spec"]["runStrategy"].as_str().unwrap_or_default();
    let wanted = matches!(strategy, "Always" | "RerunOnFailure");
    let Some(vmi) = &seen.vmi else {
        return if wanted { Action::CreateVmi } else { Action::Nothing };
    };
    if !vmi["metadata"]["deletionTimestamp"].is_null() {
        return Action::Nothing;
    }
    let phase = vmi["status"]["phase"].as_str().unwrap_or_default();
    // A VM that is to run is started anew; RerunOnFailure takes an end in good order for an answer.
    let again = strategy == "Always" || strategy == "RerunOnFailure" && phase == "Failed";
    if strategy == "Halted" || is_final(phase) && again {
        return Action::DeleteVmi;
    }
    if is_final(phase) {
        return Action::Nothing;
    }
    let next = match &seen.pod {
        None if phase.is_empty() => "Pending",
        None => return Action::CreatePod,
        Some(pod) => match pod.phase.as_str() {
            "Succeeded" => "Succeeded",
            "Failed" => "Failed",
            "Running" if pod.running => "Running",
            "Running" => "Scheduled",
            _ => "Scheduling",
        },
    };
    // A guest that ran does not go back because its Pod is not ready for a moment.
    if next == phase || phase == "Running" && !is_final(next) { Action::Nothing } else { Action::Phase(next) }
}

fn resource(kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("kubevirt.io", "v1", kind), plural)
}

/// One cluster's controller.
pub struct Controller {
    client: Client,
    launcher_image: String,
}

impl Controller {
    pub fn new(client: Client, launcher_image: impl Into<String>) -> Controller {
        Controller { client, launcher_image: launcher_image.into() }
    }

    /// For ever; errors are logged and tried again.
    pub async fn run(&self) {
        loop {
            if let Err(error) = self.pass().await {
                tracing::warn!(%error, "trying again");
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn vmis(&self, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(
            self.client.clone(),
            namespace,
            &resource("VirtualMachineInstance", "virtualmachineinstances"),
        )
    }

    fn vms(&self, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), namespace, &resource("VirtualMachine", "virtualmachines"))
    }

    async fn pass(&self) -> Result<(), Error> {
        let all: Api<DynamicObject> =
            Api::all_with(self.client.clone(), &resource("VirtualMachine", "virtualmachines"));
        for vm in all.list(&ListParams::default()).await?.items {
            let (namespace, name) = (vm.namespace().unwrap_or_default(), vm.name_any());
            let seen = self.observe(&namespace, &name, serde_json::to_value(&vm)?).await?;
            let action = decide(&seen);
            if action != Action::Nothing {
                tracing::info!(namespace, name, ?action, "VM");
            }
            self.act(&namespace, &name, &seen, &action).await?;
            self.report(&namespace, &name, &seen).await?;
        }
        Ok(())
    }

    async fn observe(&self, namespace: &str, name: &str, vm: Value) -> Result<Seen, Error> {
        let Some(vmi) = self.vmis(namespace).get_opt(name).await? else { return Ok(Seen { vm, vmi: None, pod: None }) };
        let selector = format!("kubevirt.io/created-by={}", vmi.uid().unwrap_or_default());
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let mut pods = pods.list(&ListParams::default().labels(&selector)).await?.items;
        pods.sort_by_key(|pod| pod.metadata.creation_timestamp.clone());
        let pod = pods.pop().map(|pod| {
            let status = pod.status.unwrap_or_default();
            let compute = status.container_statuses.iter().flatten().find(|container| container.name == "compute");
            PodSeen {
                phase: status.phase.clone().unwrap_or_default(),
                running: compute.is_some_and(|container| container.ready),
                node: pod.spec.and_then(|spec| spec.node_name),
            }
        });
        Ok(Seen { vm, vmi: Some(serde_json::to_value(&vmi)?), pod })
    }

    async fn act(&self, namespace: &str, name: &str, seen: &Seen, action: &Action) -> Result<(), Error> {
        let vmis = self.vmis(namespace);
        match action {
            Action::Nothing => {}
            Action::CreateVmi => {
                vmis.create(&PostParams::default(), &serde_json::from_value(vmi_of(&seen.vm))?).await?;
            }
            Action::DeleteVmi => {
                vmis.delete(name, &DeleteParams::default()).await?;
            }
            Action::CreatePod => {
                let vmi = seen.vmi.as_ref().unwrap_or(&Value::Null);
                let pod = render::pod(vmi, &self.claims(namespace, vmi).await?, &self.launcher_image)?;
                let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
                pods.create(&PostParams::default(), &serde_json::from_value(pod)?).await?;
            }
            Action::Phase(phase) => {
                let node = seen.pod.as_ref().and_then(|pod| pod.node.clone());
                let ready = if *phase == "Running" { "True" } else { "False" };
                let conditions = json!([{ "type": "Ready", "status": ready }]);
                // The VMI has no status subresource (components/crds.go).
                let patch = json!({
                    "metadata": { "labels": { "kubevirt.io/nodeName": node } },
                    "status": { "phase": phase, "nodeName": node, "conditions": conditions },
                });
                vmis.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
            }
        }
        Ok(())
    }

    /// The mode of each claim; one that is not there yet keeps the Pod waiting, as KubeVirt does.
    async fn claims(&self, namespace: &str, vmi: &Value) -> Result<Vec<ClaimVolume>, Error> {
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), namespace);
        let mut claims = Vec::new();
        for (volume, claim) in render::claims_of(vmi) {
            let spec = api.get(&claim).await?.spec.unwrap_or_default();
            let requests = spec.resources.and_then(|resources| resources.requests).unwrap_or_default();
            let bytes = requests.get("storage").map(|size| bytes(&size.0)).transpose()?.unwrap_or_default();
            claims.push(ClaimVolume { volume, claim, block: spec.volume_mode.as_deref() == Some("Block"), bytes });
        }
        Ok(claims)
    }

    async fn report(&self, namespace: &str, name: &str, seen: &Seen) -> Result<(), Error> {
        let phase = seen.vmi.as_ref().map(|vmi| vmi["status"]["phase"].as_str().unwrap_or_default());
        let printable = match phase {
            None => "Stopped",
            Some("Running") => "Running",
            Some(phase) if is_final(phase) => "Stopped",
            Some(_) => "Starting",
        };
        let status =
            json!({ "created": phase.is_some(), "ready": phase == Some("Running"), "printableStatus": printable });
        let known = &seen.vm["status"];
        if known["printableStatus"] != printable || known["created"] != status["created"] {
            let patch = Patch::Merge(json!({ "status": status }));
            self.vms(namespace)
                .patch_status(name, &PatchParams { field_manager: Some(MANAGER.into()), ..Default::default() }, &patch)
                .await?;
        }
        Ok(())
    }
}

/// The VMI that a VM's template describes.
fn vmi_of(vm: &Value) -> Value {
    let (metadata, template) = (&vm["metadata"], &vm["spec"]["template"]);
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": {
            "name": metadata["name"], "namespace": metadata["namespace"],
            "labels": template["metadata"]["labels"], "annotations": template["metadata"]["annotations"],
            "ownerReferences": [{
                "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "name": metadata["name"], "uid": metadata["uid"],
                "controller": true, "blockOwnerDeletion": true,
            }],
        },
        "spec": template["spec"],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(strategy: &str, phase: Option<&str>, pod: Option<(&str, bool)>) -> Seen {
        Seen {
            vm: json!({ "spec": { "runStrategy": strategy } }),
            vmi: phase.map(|phase| json!({ "metadata": {}, "status": { "phase": phase } })),
            pod: pod.map(|(phase, running)| PodSeen { phase: phase.into(), running, node: None }),
        }
    }

    #[test]
    fn a_vm_goes_from_its_object_to_a_running_guest_and_back() {
        let cases = [
            (seen("Always", None, None), Action::CreateVmi),
            (seen("Always", Some(""), None), Action::Phase("Pending")),
            (seen("Always", Some("Pending"), None), Action::CreatePod),
            (seen("Always", Some("Pending"), Some(("Pending", false))), Action::Phase("Scheduling")),
            (seen("Always", Some("Scheduling"), Some(("Running", false))), Action::Phase("Scheduled")),
            (seen("Always", Some("Scheduled"), Some(("Running", true))), Action::Phase("Running")),
            (seen("Always", Some("Running"), Some(("Running", true))), Action::Nothing),
            (seen("Always", Some("Running"), Some(("Running", false))), Action::Nothing),
            (seen("Always", Some("Running"), Some(("Failed", false))), Action::Phase("Failed")),
            (seen("Always", Some("Failed"), Some(("Failed", false))), Action::DeleteVmi),
            (seen("Halted", Some("Running"), Some(("Running", true))), Action::DeleteVmi),
            (seen("Halted", None, None), Action::Nothing),
        ];
        for (seen, action) in cases {
            assert_eq!(decide(&seen), action, "{seen:?}");
        }
    }

    #[test]
    fn rerun_on_failure_lets_a_guest_that_switched_itself_off_rest() {
        assert_eq!(decide(&seen("RerunOnFailure", Some("Succeeded"), Some(("Succeeded", false)))), Action::Nothing);
        assert_eq!(decide(&seen("RerunOnFailure", Some("Failed"), Some(("Failed", false)))), Action::DeleteVmi);
    }
}
