//! What the decisions do to the cluster. No judgement here.

use k8s_openapi::api::core::v1::{Event, Pod, Service};
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::ca::{Authority, NAMESPACE};
use crate::controller::{Error, write_status};
use crate::migration::{self, Phase, Seen};
use crate::objects::{Kind, MANAGER, difference, merge};
use crate::render::{self, ClaimVolume};
use crate::seen::{
    PodSeen, RECEIVER_ANNOTATION, TARGET_NODE_LABEL, TARGET_READY_ANNOTATION, is_deleting, timestamp, uid,
};
use crate::talk::{self, Request};
use crate::{subresources, vm, vmi};

/// Of a VMIM while it is at work: virt-controller's, and the synchronization controller's.
const VMIM_FINALIZERS: [&str; 2] =
    ["kubevirt.io/migrationJobFinalize", "synchronization.kubevirt.io/migrationFinalizer"];
const VMI_NAME_LABEL: &str = "kubevirt.io/vmi-name";
const NODE_LABEL: &str = "kubevirt.io/nodeName";

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn place(object: &Value) -> (&str, &str) {
    (text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]))
}

/// Seconds since an object was made.
pub fn age_seconds(object: &Value) -> i64 {
    seconds_since(&object["metadata"]["creationTimestamp"])
}

/// Seconds since its deletion was asked for; 0 if it was not.
pub fn deleted_for_seconds(object: &Value) -> i64 {
    seconds_since(&object["metadata"]["deletionTimestamp"])
}

fn seconds_since(time: &Value) -> i64 {
    let time: Option<jiff::Timestamp> = text(time).parse().ok();
    time.map_or(0, |time| jiff::Timestamp::now().as_second() - time.as_second())
}

/// A hand on one cluster.
pub struct Cluster {
    pub client: Client,
    pub launcher_image: String,
}

impl Cluster {
    fn pods(&self, namespace: &str) -> Api<Pod> {
        Api::namespaced(self.client.clone(), namespace)
    }

    pub async fn status(&self, kind: Kind, object: &Value, wanted: &Value) -> Result<(), Error> {
        write_status(&self.client, kind, object, wanted).await
    }

    pub async fn vm(&self, vm: &Value, action: vm::Action) -> Result<(), Error> {
        let (namespace, name) = place(vm);
        let vmis = Kind::Vmi.api(&self.client, namespace);
        match action {
            vm::Action::Nothing => return Ok(()),
            vm::Action::CreateVmi(vmi) => {
                vmis.create(&PostParams::default(), &serde_json::from_value(*vmi)?).await?;
            }
            vm::Action::DeleteVmi => {
                vmis.delete(name, &DeleteParams::default()).await?;
            }
            vm::Action::RunStrategy(ref strategy) => {
                merge(&self.client, Kind::Vm, namespace, name, &json!({ "spec": { "runStrategy": strategy } })).await?;
            }
        }
        tracing::info!(namespace, name, "VM");
        Ok(())
    }

    pub async fn vmi(
        &self,
        vmi: &Value,
        action: vmi::Action,
        claims: &[ClaimVolume],
        pods: &[&PodSeen],
    ) -> Result<(), Error> {
        let (namespace, name) = place(vmi);
        match action {
            vmi::Action::Nothing => return Ok(()),
            vmi::Action::CreatePod => {
                let rendered = render::pod(vmi, claims, &self.launcher_image, None);
                self.create_pod(vmi, rendered).await?;
            }
            vmi::Action::DeletePods => {
                for pod in pods.iter().filter(|pod| !pod.deleting) {
                    self.pods(namespace).delete(&pod.name, &DeleteParams::default()).await?;
                }
            }
            vmi::Action::Release => {
                let patch = json!({ "metadata": { "finalizers": null } });
                merge(&self.client, Kind::Vmi, namespace, name, &patch).await?;
            }
        }
        tracing::info!(namespace, name, ?action, "VMI");
        Ok(())
    }

    async fn create_pod(&self, vmi: &Value, rendered: Result<Value, render::Error>) -> Result<(), Error> {
        let created = async {
            let pod: Pod = serde_json::from_value(rendered?)?;
            self.pods(place(vmi).0).create(&PostParams::default(), &pod).await?;
            Ok(())
        };
        let outcome: Result<(), Error> = created.await;
        if let Err(error) = &outcome {
            // An admission webhook's words reach users by this event.
            event(&self.client, vmi, "FailedCreate", &format!("Error creating pod: {error}")).await?;
        }
        outcome
    }

    /// On the VMI and, once it is known, never taken back while the VMI lives there.
    pub async fn node_label(&self, vmi: &Value, pod: Option<&PodSeen>) -> Result<(), Error> {
        let Some(node) = pod.and_then(|pod| pod.node.as_deref()) else { return Ok(()) };
        if vmi["metadata"]["labels"][NODE_LABEL] == node {
            return Ok(());
        }
        let (namespace, name) = place(vmi);
        let patch = json!({ "metadata": { "labels": { NODE_LABEL: node } } });
        Ok(merge(&self.client, Kind::Vmi, namespace, name, &patch).await?)
    }

    /// Merged into the VMI's `status.migrationState`.
    pub async fn migration_state(&self, vmi: &Value, change: &Value) -> Result<(), Error> {
        let (namespace, name) = place(vmi);
        Ok(merge(&self.client, Kind::Vmi, namespace, name, &json!({ "status": { "migrationState": change } })).await?)
    }

    /// The synchronization controller's trouble: a condition of the VMI, from there one of the VMIM.
    pub async fn peer_condition(&self, vmi: &Value, vmim: &Value, error: Option<&str>) -> Result<(), Error> {
        let with = |object: &Value, kind: &str| -> Value {
            let known = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let mut conditions: Vec<Value> = known.into_iter().filter(|condition| condition["type"] != kind).collect();
            if let Some(error) = error {
                conditions.push(json!({ "type": kind, "status": "True", "reason": kind, "message": error }));
            }
            json!({ "conditions": conditions })
        };
        self.status(Kind::Vmi, vmi, &with(vmi, vmi::PEER_CONDITION)).await?;
        let blocked = with(vmim, "decentralizedMigrationBlocked");
        let none = blocked["conditions"].as_array().is_none_or(Vec::is_empty) && vmim["status"]["conditions"].is_null();
        if none { Ok(()) } else { self.status(Kind::Vmim, vmim, &blocked).await }
    }

    pub async fn migration(
        &self,
        seen: &Seen<'_>,
        action: migration::Action,
        claims: &[ClaimVolume],
        sync_address: &str,
    ) -> Result<(), Error> {
        let (namespace, name) = place(seen.vmim);
        let vmi = seen.vmi.unwrap_or(&Value::Null);
        let vmi_name = place(vmi).1;
        if !matches!(action, migration::Action::PrepareTarget | migration::Action::Abort) {
            tracing::info!(namespace, name, ?action, "VMIM");
        }
        let patch_vmi = async |patch: Value| merge(&self.client, Kind::Vmi, namespace, vmi_name, &patch).await;
        match action {
            migration::Action::Phase(phase) => self.enter(seen.vmim, vmi, phase, sync_address).await?,
            migration::Action::Begin(state) => {
                // It goes with its VMI.
                let owner = json!({
                    "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "name": vmi_name, "uid": uid(vmi),
                });
                let patch = json!({ "metadata": {
                    "labels": { VMI_NAME_LABEL: vmi_name }, "finalizers": VMIM_FINALIZERS, "ownerReferences": [owner],
                } });
                merge(&self.client, Kind::Vmim, namespace, name, &patch).await?;
                // What an earlier migration left must not shine through.
                patch_vmi(json!({ "status": { "migrationState": null } })).await?;
                patch_vmi(json!({ "status": { "migrationState": state } })).await?;
            }
            migration::Action::State(change) => self.migration_state(vmi, &change).await?,
            migration::Action::Event { reason, message } => event(&self.client, seen.vmim, reason, &message).await?,
            migration::Action::CreateTarget(target) => {
                let rendered = render::pod(vmi, claims, &self.launcher_image, Some(&target));
                self.create_pod(vmi, rendered).await?;
            }
            migration::Action::DeleteTarget => {
                if let Some(pod) = seen.target {
                    self.pods(namespace).delete(&pod.name, &DeleteParams::default()).await?;
                }
            }
            migration::Action::HandOff(node) => {
                patch_vmi(json!({ "metadata": { "labels": { TARGET_NODE_LABEL: node } } })).await?;
            }
            migration::Action::TakeBack => {
                patch_vmi(json!({ "metadata": { "labels": { TARGET_NODE_LABEL: null } } })).await?;
            }
            migration::Action::PrepareTarget => {
                let mut vmi = vmi.clone();
                vmi["status"]["migrationState"]["targetPod"] = seen.target.map(|pod| pod.name.clone()).into();
                order(seen.target, Request::PrepareTarget { vmi: Box::new(vmi) }).await;
            }
            migration::Action::Migrate(migrate) => order(seen.source, Request::Migrate(migrate)).await,
            migration::Action::Abort => order(seen.source, Request::Abort).await,
            migration::Action::Arrive => {
                if let Some(pod) = seen.target {
                    let patch = json!({ "metadata": { "annotations": { TARGET_READY_ANNOTATION: timestamp() } } });
                    self.pods(namespace).patch(&pod.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
                }
                patch_vmi(json!({
                    "metadata": { "annotations": { RECEIVER_ANNOTATION: null }, "labels": { TARGET_NODE_LABEL: null } },
                    "status": { "migratedVolumes": null },
                }))
                .await?;
            }
            migration::Action::DeleteSelf => {
                Kind::Vmim.api(&self.client, namespace).delete(name, &DeleteParams::default()).await?;
            }
            migration::Action::Release => {
                let patch = json!({ "metadata": { "finalizers": null } });
                merge(&self.client, Kind::Vmim, namespace, name, &patch).await?;
            }
        }
        Ok(())
    }

    /// The phase, with what KubeVirt notes beside it.
    async fn enter(&self, vmim: &Value, vmi: &Value, phase: Phase, sync_address: &str) -> Result<(), Error> {
        let mut times = vmim["status"]["phaseTransitionTimestamps"].as_array().cloned().unwrap_or_default();
        times.push(json!({ "phase": phase.name(), "phaseTransitionTimestamp": timestamp() }));
        let mut wanted = json!({
            "phase": phase.name(), "phaseTransitionTimestamps": times, "synchronizationAddresses": [sync_address],
        });
        let state = &vmi["status"]["migrationState"];
        if phase.is_final() && state["migrationUid"] == uid(vmim) {
            wanted["migrationState"] = state.clone();
        }
        if is_deleting(vmim) && phase == Phase::Failed {
            wanted["conditions"] = json!([{ "type": "migrationAbortRequested", "status": "True" }]);
        }
        if difference(&vmim["status"], &wanted).is_some() {
            let (namespace, name) = place(vmim);
            merge(&self.client, Kind::Vmim, namespace, name, &json!({ "status": wanted })).await?;
        }
        Ok(())
    }
}

/// Repeated at the next look, if it was lost.
async fn order(pod: Option<&PodSeen>, request: Request) {
    let Some(address) = pod.and_then(|pod| pod.address) else { return };
    if let Err(error) = talk::ask(address, &request).await {
        tracing::warn!(%error, "a launcher's order");
    }
}

/// An event of an object. One that cannot be written is lost: a namespace that is being deleted takes none, and what happens in it
/// must go on nevertheless.
pub async fn event(client: &Client, object: &Value, reason: &str, message: &str) -> Result<(), Error> {
    let (namespace, name) = place(object);
    let event = json!({
        "metadata": { "generateName": format!("{name}."), "namespace": namespace },
        "involvedObject": {
            "apiVersion": object["apiVersion"], "kind": object["kind"], "namespace": namespace, "name": name, "uid": object["metadata"]["uid"],
        },
        "reason": reason, "message": message, "type": if reason.starts_with("Success") { "Normal" } else { "Warning" },
        "firstTimestamp": timestamp(), "lastTimestamp": timestamp(), "count": 1, "source": { "component": MANAGER },
    });
    let api: Api<Event> = Api::namespaced(client.clone(), namespace);
    if let Err(error) = api.create(&PostParams::default(), &serde_json::from_value(event)?).await {
        tracing::warn!(%error, namespace, name, reason, message, "an event is lost");
    }
    Ok(())
}

/// Tells the API server where the aggregated group is served.
pub async fn register(client: &Client, authority: &Authority) -> Result<(), Error> {
    let services: Api<Service> = Api::namespaced(client.clone(), NAMESPACE);
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "virt-api" },
        "spec": { "selector": { "app": MANAGER }, "ports": [{ "port": 443, "targetPort": subresources::PORT }] },
    });
    let parameters = PatchParams::apply(MANAGER).force();
    services.patch("virt-api", &parameters, &Patch::Apply(service)).await?;
    let name = format!("v1.{}", subresources::GROUP);
    let bundle = k8s_openapi::ByteString(authority.certificate().as_bytes().to_vec());
    let api_service = json!({
        "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": { "name": name },
        "spec": {
            "group": subresources::GROUP, "version": "v1", "groupPriorityMinimum": 1000, "versionPriority": 15, "caBundle": bundle,
            "service": { "namespace": NAMESPACE, "name": "virt-api" },
        },
    });
    let api: Api<APIService> = Api::all(client.clone());
    api.patch(&name, &parameters, &Patch::Apply(api_service)).await?;
    Ok(())
}
