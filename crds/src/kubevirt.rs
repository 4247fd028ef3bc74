//! Thin views of KubeVirt's objects: only the fields that we touch.
//!
//! Unknown fields are ignored when read. We write by server-side apply or merge patch, with only our own fields in the body, so what we do not
//! know stays. Source: `staging/src/kubevirt.io/api/core/v1/types.go` in KubeVirt's repository.

use std::collections::BTreeMap;

use kube::CustomResource;
use serde::{Deserialize, Serialize};

/// `VirtualMachine`.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(group = "kubevirt.io", version = "v1", kind = "VirtualMachine", plural = "virtualmachines", namespaced)]
#[kube(status = "VirtualMachineStatus", schema = "disabled")]
#[serde(rename_all = "camelCase")]
pub struct VirtualMachineSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_strategy: Option<String>,
    #[serde(default)]
    pub template: VmiTemplate,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VirtualMachineStatus {
    pub printable_status: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmiTemplate {
    pub metadata: TemplateMetadata,
    pub spec: VmiSpecView,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TemplateMetadata {
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
}

/// `VirtualMachineInstance`. It has no status subresource.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(group = "kubevirt.io", version = "v1", kind = "VirtualMachineInstance", plural = "virtualmachineinstances")]
#[kube(namespaced, status = "VmiStatus", schema = "disabled")]
#[serde(rename_all = "camelCase", default)]
pub struct VmiSpecView {
    pub domain: Domain,
    pub volumes: Vec<Volume>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<k8s_openapi::api::core::v1::Toleration>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VmiStatus {
    pub phase: String,
    pub node_name: String,
    /// UID of each Pod that belongs to the VMI, with its node.
    pub active_pods: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration_state: Option<MigrationState>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MigrationState {
    pub failed: bool,
    pub failure_reason: String,
}

/// `VirtualMachineInstanceMigration`: one for each side of a migration between clusters.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(group = "kubevirt.io", version = "v1", kind = "VirtualMachineInstanceMigration")]
#[kube(plural = "virtualmachineinstancemigrations", namespaced, status = "VmimStatus", schema = "disabled")]
#[serde(rename_all = "camelCase", default)]
pub struct VmimSpec {
    pub vmi_name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub send_to: Option<SendTo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receive: Option<Receive>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub added_node_selector: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SendTo {
    #[serde(rename = "migrationID")]
    pub migration_id: String,
    /// `host:port`, no scheme.
    #[serde(rename = "connectURL")]
    pub connect_url: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Receive {
    #[serde(rename = "migrationID")]
    pub migration_id: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmimStatus {
    pub phase: String,
}

impl VirtualMachineInstanceMigration {
    /// Its phase; empty before KubeVirt has seen it.
    pub fn phase(&self) -> &str {
        self.status.as_ref().map_or("", |status| status.phase.as_str())
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Domain {
    pub devices: Devices,
    pub memory: Memory,
    pub resources: DomainResources,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Devices {
    pub disks: Vec<Disk>,
}

/// One disk of a domain; exactly one of the kinds is set, and none means a disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Disk {
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskTarget>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cdrom: Option<DiskTarget>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lun: Option<DiskTarget>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shareable: Option<bool>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskTarget {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub readonly: Option<bool>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// A quantity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DomainResources {
    pub requests: BTreeMap<String, String>,
}

/// One volume of a VMI; other sources than these are none of our business.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Volume {
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimSource>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_volume: Option<DataVolumeSource>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClaimSource {
    pub claim_name: String,
    /// Plugged into a running VM: it never passes the hook, so it cannot be synchronised.
    pub hotpluggable: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DataVolumeSource {
    /// The DataVolume and its claim have one name.
    pub name: String,
    pub hotpluggable: bool,
}

impl Volume {
    /// The claim behind the volume, if there is one that the VM starts with.
    pub fn claim(&self) -> Option<&str> {
        match (&self.persistent_volume_claim, &self.data_volume) {
            (Some(source), _) => (!source.hotpluggable).then_some(source.claim_name.as_str()),
            (None, Some(source)) => (!source.hotpluggable).then_some(source.name.as_str()),
            (None, None) => None,
        }
    }
}

/// The `KubeVirt` object: the installation's own configuration.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(group = "kubevirt.io", version = "v1", kind = "KubeVirt", plural = "kubevirts", namespaced)]
#[kube(status = "KubeVirtStatus", schema = "disabled")]
#[serde(default)]
pub struct KubeVirtSpec {
    pub configuration: Configuration,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KubeVirtStatus {
    pub observed_kube_virt_version: String,
    /// `host:port` of the synchronization controller.
    pub synchronization_addresses: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Configuration {
    pub developer_configuration: DeveloperConfiguration,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DeveloperConfiguration {
    pub feature_gates: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_virtual_machine_with_much_that_we_do_not_know_is_read() {
        let text = serde_json::json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": { "name": "vm1", "namespace": "default" },
            "spec": {
                "runStrategy": "Always", "instancetype": { "name": "u1.small" },
                "template": { "metadata": { "creationTimestamp": null, "labels": { "a": "b" } }, "spec": {
                    "architecture": "amd64",
                    "domain": { "devices": { "disks": [{ "name": "root", "disk": { "bus": "virtio" }, "bootOrder": 1 }] }, "memory": { "guest": "128Mi" } },
                    "volumes": [
                        { "name": "root", "persistentVolumeClaim": { "claimName": "vm1-root" } },
                        { "name": "extra", "dataVolume": { "name": "plugged", "hotpluggable": true } },
                        { "name": "init", "cloudInitNoCloud": { "userData": "" } },
                    ],
                } },
            },
            "status": { "printableStatus": "Running", "conditions": [] },
        });
        let vm: VirtualMachine = serde_json::from_value(text).expect("KubeVirt's own form");
        let claims: Vec<_> = vm.spec.template.spec.volumes.iter().map(Volume::claim).collect();
        assert_eq!(claims, [Some("vm1-root"), None, None]);
        assert_eq!(vm.spec.template.spec.domain.memory.guest.as_deref(), Some("128Mi"));
    }
}
