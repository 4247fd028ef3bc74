//! What there is of a pair's VM in this cluster.

use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod};
use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::{Api, Client, ResourceExt};
use serde_json::Value;
use watari_crds::crossing::MigrationEnd;
use watari_crds::kubevirt::{VirtualMachine, VirtualMachineInstance, VirtualMachineInstanceMigration};
use watari_crds::names::{annotation, label, path, role};
use watari_crds::quantity;
use watari_wire::report::Report;

use super::trust;
use crate::answers::none_if_missing;
use crate::context::Context;
use crate::kubevirt::installation;
use crate::sidecar::Sidecar;

/// KubeVirt's label of the Pod that runs QEMU.
const VIRT_LAUNCHER: &str = "kubevirt.io=virt-launcher";
/// Its annotation with the VMI's name (`pkg/virt-controller/services/template.go`).
const DOMAIN: &str = "kubevirt.io/domain";

/// All that a decision about this side needs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Side {
    /// Whole, with what our views do not know.
    pub vm: Option<Value>,
    pub vmi: Option<VmiSeen>,
    /// VMIMs of this pair here, by name.
    pub migrations: Vec<MigrationSeen>,
    pub launcher: Option<Launcher>,
    /// `None`: there is no KubeVirt here.
    pub kubevirt: Option<KubeVirtSeen>,
    /// Of the sidecar that has the pair's folder now.
    pub report: Option<Report>,
    /// Why there is no report although such a Pod runs.
    pub silence: Option<String>,
    /// Address and node of the Pod that reports.
    pub ip: Option<String>,
    pub node: Option<String>,
    /// A claim of the pair can be used on one node only.
    pub one_node: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmiSeen {
    pub uid: String,
    pub phase: String,
    /// It waits for a migration.
    pub receiver: bool,
    /// KubeVirt's words, after a migration that failed.
    pub failure: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MigrationSeen {
    pub name: String,
    /// Empty: KubeVirt has not seen it yet.
    pub phase: String,
    pub deleting: bool,
}

/// The VM's virt-launcher Pod that has not ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Launcher {
    pub name: String,
    /// Our container is in it.
    pub wired: bool,
    /// It has a node: from now on it needs the claims.
    pub scheduled: bool,
    pub ip: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KubeVirtSeen {
    pub namespace: String,
    pub end: MigrationEnd,
}

impl MigrationSeen {
    pub fn is_final(&self) -> bool {
        matches!(self.phase.as_str(), "Succeeded" | "Failed")
    }
}

impl Side {
    pub fn migration(&self, id: &str) -> Option<&MigrationSeen> {
        self.migrations.iter().find(|migration| migration.name == id)
    }

    /// The role in which the folder is held; `None`: nobody says.
    pub fn role(&self) -> Option<&str> {
        self.report.as_ref().map(|report| report.role.as_str()).filter(|role| !role.is_empty())
    }

    /// The source has a handover open towards this side.
    pub fn attachable(&self) -> bool {
        self.report.as_ref().is_some_and(|report| report.attachable)
    }

    /// The guest's memory as the VM asks for it, bytes; 0: it does not say.
    pub fn memory(&self) -> u64 {
        let domain = self.vm.as_ref().map(|vm| &vm["spec"]["template"]["spec"]["domain"]);
        let text =
            domain.and_then(|it| it["memory"]["guest"].as_str().or(it["resources"]["requests"]["memory"].as_str()));
        text.and_then(|text| quantity::parse(text).ok()).unwrap_or_default()
    }

    pub fn run_strategy(&self) -> Option<&str> {
        self.vm.as_ref()?["spec"]["runStrategy"].as_str()
    }
}

/// Looks at one pair.
pub async fn observe(context: &Context, namespace: &str, pair_id: &str, vm: &str) -> kube::Result<Side> {
    let client = || context.client.clone();
    let vms: Api<DynamicObject> = Api::namespaced_with(client(), namespace, &ApiResource::erase::<VirtualMachine>(&()));
    let vmis: Api<VirtualMachineInstance> = Api::namespaced(client(), namespace);
    let ours = ListParams::default().labels(&format!("{}={pair_id}", label::PAIR));
    let migrations: Api<VirtualMachineInstanceMigration> = Api::namespaced(client(), namespace);
    let migrations = none_if_missing(migrations.list(&ours).await)?.map(|list| list.items).unwrap_or_default();
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client(), namespace);
    let mut side = Side {
        vm: none_if_missing(vms.get(vm).await)?.map(|vm| serde_json::to_value(vm).expect("an object has a JSON form")),
        vmi: none_if_missing(vmis.get(vm).await)?.map(|vmi| vmi_seen(&vmi)),
        migrations: migrations.iter().map(migration_seen).collect(),
        launcher: launcher(client(), namespace, vm).await?,
        kubevirt: kubevirt(client()).await?,
        one_node: claims.list(&ours).await?.iter().any(one_node),
        ..Side::default()
    };
    ask(context, namespace, pair_id, &mut side).await?;
    Ok(side)
}

fn vmi_seen(vmi: &VirtualMachineInstance) -> VmiSeen {
    let status = vmi.status.clone().unwrap_or_default();
    VmiSeen {
        uid: vmi.uid().unwrap_or_default(),
        phase: status.phase,
        receiver: vmi.annotations().get(annotation::CREATE_MIGRATION_TARGET).is_some_and(|value| value == "true"),
        failure: status.migration_state.filter(|state| state.failed).map(|it| it.failure_reason).unwrap_or_default(),
    }
}

fn migration_seen(migration: &VirtualMachineInstanceMigration) -> MigrationSeen {
    MigrationSeen {
        name: migration.name_any(),
        phase: migration.phase().to_owned(),
        deleting: migration.metadata.deletion_timestamp.is_some(),
    }
}

fn one_node(claim: &PersistentVolumeClaim) -> bool {
    let modes = claim.spec.as_ref().and_then(|spec| spec.access_modes.clone()).unwrap_or_default();
    !modes.iter().any(|mode| mode == "ReadWriteMany")
}

/// Of a VM; one without our container as well.
async fn launcher(client: Client, namespace: &str, vm: &str) -> kube::Result<Option<Launcher>> {
    let pods: Api<Pod> = Api::namespaced(client, namespace);
    let list = pods.list(&ListParams::default().labels(VIRT_LAUNCHER)).await?;
    let of_vm = |pod: &Pod| pod.annotations().get(DOMAIN).is_some_and(|name| name == vm);
    let running = list.into_iter().find(|pod| of_vm(pod) && matches!(phase(pod), "Pending" | "Running"));
    Ok(running.map(|pod| {
        let wired = has_our_container(&pod) && pod.labels().contains_key(label::PAIR);
        let scheduled = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
        Launcher { name: pod.name_any(), wired, scheduled, ip: pod.status.and_then(|status| status.pod_ip) }
    }))
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

fn has_our_container(pod: &Pod) -> bool {
    let spec = pod.spec.iter();
    spec.flat_map(|spec| spec.init_containers.iter().flatten().chain(&spec.containers))
        .any(|container| container.name == path::CONTAINER)
}

/// Asks the Pods that may hold the folder. A Pod that waits for it does not listen yet, so whoever answers has it.
async fn ask(context: &Context, namespace: &str, pair_id: &str, side: &mut Side) -> kube::Result<()> {
    let pods: Api<Pod> = Api::namespaced(context.client.clone(), namespace);
    let list = pods.list(&ListParams::default().labels(&format!("{}={pair_id}", label::PAIR))).await?;
    let mut candidates: Vec<&Pod> =
        list.iter().filter(|pod| phase(pod) != "Succeeded" && phase(pod) != "Failed").collect();
    // The Pod beside the VM first.
    candidates.sort_by_key(|pod| pod.labels().get(label::ROLE).is_some_and(|it| it == role::REPLICA));
    for pod in candidates.into_iter().filter(|pod| has_our_container(pod)) {
        let Some(ip) = pod.status.as_ref().and_then(|status| status.pod_ip.as_ref()) else { continue };
        let ask = async { Sidecar::connect(context, namespace, pair_id, ip).await?.report().await };
        match ask.await {
            Ok(report) => {
                side.ip = Some(ip.clone());
                side.node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
                side.report = Some(report);
                side.silence = None;
                return Ok(());
            }
            Err(error) => side.silence = Some(error.to_string()),
        }
    }
    Ok(())
}

async fn kubevirt(client: Client) -> kube::Result<Option<KubeVirtSeen>> {
    let Some(found) = installation(client.clone()).await? else { return Ok(None) };
    let namespace = found.namespace().unwrap_or_default();
    let maps: Api<ConfigMap> = Api::namespaced(client, &namespace);
    let map = maps.get_opt(trust::BUNDLE).await?;
    let authorities = map.and_then(|map| map.data?.remove(trust::KEY)).unwrap_or_default();
    let address = found.status.unwrap_or_default().synchronization_addresses.into_iter().next().unwrap_or_default();
    Ok(Some(KubeVirtSeen { namespace, end: MigrationEnd { address, authorities } }))
}
