//! The few facts of a VirtualMachineInstance that the hook needs, read tolerantly from the JSON that virt-launcher passes.
//!
//! Unknown fields are ignored and missing ones are empty, whatever KubeVirt's version. It is a view: nothing is written back.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

/// Set by virt-controller on the VMI of a decentralized migration's target (`pkg/virt-controller/watch/vm/vm.go`).
const CREATE_MIGRATION_TARGET: &str = "kubevirt.io/create-migration-target";

/// Why this virt-launcher is asked for a domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LaunchRole {
    /// The guest boots here.
    Boot,
    /// The guest comes in by live migration; the XML that we answer is thrown away, an error is honoured and retried.
    MigrationTarget,
}

/// The JSON is no VMI.
#[derive(Debug, thiserror::Error)]
#[error("the VMI that virt-launcher sent cannot be read: {0}")]
pub struct VmiError(#[from] serde_json::Error);

/// A VirtualMachineInstance, as far as we look at it.
#[derive(Clone, PartialEq, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Vmi {
    /// Standard metadata.
    pub metadata: Metadata,
    spec: Spec,
    status: Status,
}

/// Metadata of a VMI.
#[derive(Clone, PartialEq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Metadata {
    /// Name of the VMI.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its UID.
    pub uid: String,
    #[serde(deserialize_with = "null_is_default")]
    annotations: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Debug, Default, Deserialize)]
#[serde(default)]
struct Spec {
    #[serde(deserialize_with = "null_is_default")]
    volumes: Vec<Volume>,
}

#[derive(Clone, PartialEq, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Volume {
    name: String,
    persistent_volume_claim: Option<Hotpluggable>,
    data_volume: Option<Hotpluggable>,
}

#[derive(Clone, PartialEq, Debug, Default, Deserialize)]
#[serde(default)]
struct Hotpluggable {
    hotpluggable: bool,
}

#[derive(Clone, PartialEq, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Status {
    migration_state: Option<MigrationState>,
    #[serde(deserialize_with = "null_is_default")]
    volume_status: Vec<VolumeStatus>,
}

#[derive(Clone, PartialEq, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct MigrationState {
    target_pod: String,
    migration_uid: String,
}

#[derive(Clone, PartialEq, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct VolumeStatus {
    name: String,
    hotplug_volume: Option<serde::de::IgnoredAny>,
}

/// Go writes empty maps and lists as `null` where a field has no `omitempty`.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

impl Vmi {
    /// Read virt-launcher's JSON. An empty message (a caller without Kubernetes) is an empty VMI.
    pub fn parse(json: &[u8]) -> Result<Self, VmiError> {
        if json.is_empty() {
            return Ok(Vmi::default());
        }
        Ok(serde_json::from_slice(json)?)
    }

    /// Boot or migration target. Both kinds of target are found: the decentralized one by its annotation (it may have no
    /// migration state yet), the in-cluster one by its target Pod. The hook is not called again once a domain exists, so an old
    /// migration's state is never seen at a boot.
    pub fn role(&self) -> LaunchRole {
        let annotated = self.metadata.annotations.get(CREATE_MIGRATION_TARGET).is_some_and(|v| v != "false");
        let has_target = self.status.migration_state.as_ref().is_some_and(|m| !m.target_pod.is_empty());
        if annotated || has_target { LaunchRole::MigrationTarget } else { LaunchRole::Boot }
    }

    /// UID of the migration that is under way, if one is.
    pub fn migration_uid(&self) -> Option<&str> {
        self.status.migration_state.as_ref().map(|m| m.migration_uid.as_str()).filter(|uid| !uid.is_empty())
    }

    /// An annotation's value.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.metadata.annotations.get(name).map(String::as_str)
    }

    /// Names of the volumes that KubeVirt attaches while the VM runs.
    pub fn hotplugged_volumes(&self) -> BTreeSet<String> {
        let pluggable = |v: &&Volume| {
            [&v.persistent_volume_claim, &v.data_volume].iter().any(|c| c.as_ref().is_some_and(|c| c.hotpluggable))
        };
        let declared = self.spec.volumes.iter().filter(pluggable).map(|v| v.name.clone());
        let attached = self.status.volume_status.iter().filter(|v| v.hotplug_volume.is_some()).map(|v| v.name.clone());
        declared.chain(attached).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(json: &str) -> LaunchRole {
        Vmi::parse(json.as_bytes()).expect("a VMI").role()
    }

    #[test]
    fn a_migration_target_is_known_by_its_annotation_or_by_its_target_pod() {
        assert_eq!(role("{}"), LaunchRole::Boot);
        assert_eq!(role(""), LaunchRole::Boot);
        assert_eq!(role(r#"{"metadata":{"annotations":null},"status":{"migrationState":null}}"#), LaunchRole::Boot);
        assert_eq!(role(r#"{"status":{"migrationState":{"targetPod":""}}}"#), LaunchRole::Boot);
        assert_eq!(
            role(r#"{"metadata":{"annotations":{"kubevirt.io/create-migration-target":"true"}}}"#),
            LaunchRole::MigrationTarget
        );
        assert_eq!(
            role(r#"{"status":{"migrationState":{"targetPod":"virt-launcher-x","targetNode":"n","new":{}}}}"#),
            LaunchRole::MigrationTarget
        );
    }

    #[test]
    fn hotplugged_volumes_are_found_in_spec_and_in_status() {
        let json = r#"{"spec":{"volumes":[{"name":"a","persistentVolumeClaim":{"claimName":"c","hotpluggable":true}},
            {"name":"b","dataVolume":{"name":"d"}},{"name":"h","hostDisk":{"path":"/x","type":"Disk"}}]},
            "status":{"volumeStatus":[{"name":"e","hotplugVolume":{"attachPodName":"p"}},{"name":"b","target":"vda"}]}}"#;
        let vmi = Vmi::parse(json.as_bytes()).expect("a VMI");
        assert_eq!(vmi.hotplugged_volumes(), BTreeSet::from(["a".to_owned(), "e".to_owned()]));
    }

    #[test]
    fn what_is_not_json_is_refused_with_its_place() {
        let error = Vmi::parse(b"{\"metadata\":").expect_err("cut short").to_string();
        assert!(error.contains("line 1"), "{error}");
    }
}
