//! What one look at the cluster shows: plain data that the decisions are made from.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde_json::Value;

use crate::render::{CREATED_BY_LABEL, JOB_UID_LABEL};
use crate::talk::{Life, Report};

/// The VMI was made to receive a guest (`kubevirt.io/create-migration-target`).
pub const RECEIVER_ANNOTATION: &str = "kubevirt.io/create-migration-target";
/// What the VM's run strategy becomes once the guest has arrived.
pub const RESTORE_ANNOTATION: &str = "kubevirt.io/restore-run-strategy";
/// On the target's Pod once the guest is there.
pub const TARGET_READY_ANNOTATION: &str = "kubevirt.io/migration-target-ready-timestamp";
/// On a VMI whose target Pod has been handed over to virt-handler.
pub const TARGET_NODE_LABEL: &str = "kubevirt.io/migrationTargetNodeName";

/// What matters about a virt-launcher Pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodSeen {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    /// UID of the VMI that it was made for.
    pub vmi_uid: String,
    /// UID of the VMIM whose target it is.
    pub job: Option<String>,
    /// The guest of that migration has arrived.
    pub arrived: bool,
    pub phase: String,
    pub node: Option<String>,
    pub address: Option<IpAddr>,
    /// Every regular container but compute is ready (`IsPodReady`).
    pub ready: bool,
    pub deleting: bool,
    /// Seconds since the epoch.
    pub created: i64,
    /// What the launcher says, if it answers.
    pub report: Option<Report>,
}

impl PodSeen {
    pub fn of(pod: &Pod) -> PodSeen {
        let status = pod.status.clone().unwrap_or_default();
        let mut others = status.container_statuses.iter().flatten().filter(|container| container.name != "compute");
        PodSeen {
            name: pod.name_any(),
            namespace: pod.namespace().unwrap_or_default(),
            uid: pod.uid().unwrap_or_default(),
            vmi_uid: pod.labels().get(CREATED_BY_LABEL).cloned().unwrap_or_default(),
            job: pod.labels().get(JOB_UID_LABEL).cloned(),
            arrived: pod.annotations().contains_key(TARGET_READY_ANNOTATION),
            ready: others.all(|container| container.ready),
            node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            address: status.pod_ip.as_deref().and_then(|address| address.parse().ok()),
            phase: status.phase.unwrap_or_default(),
            deleting: pod.metadata.deletion_timestamp.is_some(),
            created: pod.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
            report: None,
        }
    }

    pub fn down(&self) -> bool {
        matches!(self.phase.as_str(), "Succeeded" | "Failed")
    }

    /// The guest runs in here, as far as the launcher answers.
    pub fn guest_runs(&self) -> bool {
        matches!(self.life(), Some(Life::Running | Life::Paused(_)))
    }

    pub fn life(&self) -> Option<&Life> {
        self.report.as_ref().map(|report| &report.life)
    }
}

/// Of a VMI.
pub fn phase(vmi: &Value) -> &str {
    vmi["status"]["phase"].as_str().unwrap_or_default()
}

/// Phases after which a VMI does not come back.
pub fn is_final(phase: &str) -> bool {
    matches!(phase, "Succeeded" | "Failed")
}

pub fn is_receiver(vmi: &Value) -> bool {
    vmi["metadata"]["annotations"][RECEIVER_ANNOTATION] == "true"
}

pub fn is_deleting(object: &Value) -> bool {
    !object["metadata"]["deletionTimestamp"].is_null()
}

pub fn uid(object: &Value) -> &str {
    object["metadata"]["uid"].as_str().unwrap_or_default()
}

/// As in KubeVirt (`types.go`): only the other side's address is known.
pub fn is_decentralized(vmi: &Value) -> bool {
    let state = &vmi["status"]["migrationState"];
    let source = !state["sourceState"]["syncAddress"].is_null();
    let target = !state["targetState"]["syncAddress"].is_null();
    source != target
}

/// The Pod that the VMI is in: its newest that is no migration's target, or whose guest has arrived. A VMI that waits for its guest is
/// in the target Pod. (KubeVirt goes by the VMI's node, which two Pods on one node would confuse.)
pub fn current_pod<'p>(vmi: &Value, pods: impl IntoIterator<Item = &'p PodSeen>) -> Option<&'p PodSeen> {
    let target = vmi["status"]["migrationState"]["targetPod"].as_str();
    let its = pods.into_iter().filter(|pod| pod.vmi_uid == uid(vmi));
    let here = |pod: &&PodSeen| match is_receiver(vmi) {
        true => target == Some(&pod.name),
        false => pod.job.is_none() || pod.arrived,
    };
    its.filter(here).max_by_key(|pod| (pod.created, pod.arrived))
}

/// Now, as Kubernetes writes it.
pub fn timestamp() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
