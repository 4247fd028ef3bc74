//! Objects that both sides of a pair have, as server-side apply bodies: claim, ConfigMap, Service. Pure.
//!
//! None carries an ownerReference: what holds data goes only when its own controller says so.

use serde_json::{Value, json};
use watari_crds::names::{self, label, path, port, role};
use watari_crds::replica::AccessMode;
use watari_crds::wiring::VolumeMode;

/// Labels of an object of a pair. The VM's name is left out where it does not fit a label.
pub fn labels(pair_id: &str, vm: &str, role: &str) -> Value {
    let mut labels = json!({ label::MANAGED: names::MANAGED_BY, label::PAIR: pair_id, label::ROLE: role });
    if vm.len() <= 63 {
        labels[label::VM] = json!(vm);
    }
    labels
}

/// A claim.
pub struct Claim<'a> {
    pub name: &'a str,
    pub pair_id: &'a str,
    pub vm: &'a str,
    pub role: &'a str,
    pub bytes: i64,
    pub mode: VolumeMode,
    pub access: AccessMode,
    /// `None`: the cluster's default.
    pub class: Option<&'a str>,
}

impl Claim<'_> {
    pub fn to_object(&self) -> Value {
        let mut labels = labels(self.pair_id, self.vm, self.role);
        labels[label::BACKUP_EXCLUDE] = json!("true");
        let mut spec = json!({
            "accessModes": [self.access.name()],
            "volumeMode": match self.mode { VolumeMode::Filesystem => "Filesystem", VolumeMode::Block => "Block" },
            "resources": { "requests": { "storage": self.bytes.to_string() } },
        });
        if let Some(class) = self.class {
            spec["storageClassName"] = json!(class);
        }
        json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": { "name": self.name, "labels": labels },
            "spec": spec,
        })
    }
}

/// The ConfigMap with `sidecar.toml`.
pub fn configuration(pair_id: &str, vm: &str, toml: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": names::configuration(pair_id), "labels": labels(pair_id, vm, role::CONFIGURATION) },
        "data": { path::CONFIGURATION_FILE: toml },
    })
}

/// The Service to which the gateway leads: whichever Pod of the pair is ready.
pub fn service(pair_id: &str, vm: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": names::service(pair_id), "labels": labels(pair_id, vm, role::ENDPOINT) },
        "spec": {
            "selector": { label::PAIR: pair_id },
            "ports": [{ "name": "sidecar", "port": port::SIDECAR, "targetPort": port::SIDECAR, "protocol": "TCP" }],
        },
    })
}
