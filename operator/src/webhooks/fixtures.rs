//! A paired VM's objects as KubeVirt renders them, and what tests say about them.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use watari_crds::{
    names::{annotation, label},
    wiring::{VolumeMode, WiredDisk, Wiring},
};

use super::settings::{Resources, SidecarSettings};

/// What a case makes different from the sound object.
pub type Change<'a> = &'a dyn Fn(&mut Value);

pub const PAIR: &str = "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10";

pub fn settings() -> SidecarSettings {
    SidecarSettings {
        image: "registry.example/watari:1".to_owned(),
        image_pull_policy: Some("IfNotPresent".to_owned()),
        image_pull_secrets: vec!["pull".to_owned()],
        resources: Resources::default(),
    }
}

pub fn wiring() -> Wiring {
    let disk = |name: &str, mode| WiredDisk { name: name.to_owned(), mode };
    Wiring {
        pair_id: PAIR.to_owned(),
        disks: vec![disk("root", VolumeMode::Filesystem), disk("data", VolumeMode::Block)],
    }
}

pub fn metadata(name: &str) -> Value {
    json!({
        "name": name, "namespace": "default", "labels": { label::PAIR: PAIR },
        "annotations": { annotation::WIRING: wiring().to_annotation() },
    })
}

/// A VMI as the VM controller creates it, after KubeVirt's own defaults.
pub fn vmi() -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": metadata("vm1"),
        "spec": {
            "domain": {
                "devices": { "disks": [
                    { "name": "root", "disk": { "bus": "virtio" } },
                    { "name": "data", "disk": { "bus": "virtio" } },
                ] },
                "resources": { "requests": { "memory": "128Mi" } },
            },
            "volumes": [
                { "name": "root", "persistentVolumeClaim": { "claimName": "vm1-root" } },
                { "name": "data", "dataVolume": { "name": "vm1-data" } },
            ],
        },
    })
}

/// The virt-launcher Pod of that VMI with our hook sidecar, as `template.go` renders it (kubevirt.md §1.2, §1.3).
pub fn pod() -> Value {
    let mut metadata = metadata("virt-launcher-vm1-x");
    metadata["labels"]["kubevirt.io"] = json!("virt-launcher");
    let restricted = json!({
        "runAsUser": 107, "runAsGroup": 107, "runAsNonRoot": true, "allowPrivilegeEscalation": false,
        "capabilities": { "drop": ["ALL"] },
    });
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
        "spec": {
            "restartPolicy": "Never",
            "securityContext": { "runAsUser": 107, "runAsGroup": 107, "runAsNonRoot": true, "fsGroup": 107 },
            "containers": [
                {
                    "name": "compute", "image": "launcher",
                    "resources": { "requests": { "cpu": "100m", "memory": "400Mi" } },
                    "volumeMounts": [
                        { "name": "private", "mountPath": "/var/run/kubevirt-private" },
                        { "name": "hook-sidecar-sockets", "mountPath": "/var/run/kubevirt-hooks" },
                        { "name": "root", "mountPath": "/var/run/kubevirt-private/vmi-disks/root" },
                    ],
                    "volumeDevices": [{ "name": "data", "devicePath": "/dev/data" }],
                },
                {
                    "name": "hook-sidecar-0", "image": "registry.example/watari:1",
                    "args": SidecarSettings::arguments(),
                    "env": [{ "name": "CONTAINER_NAME", "value": "hook-sidecar-0" }],
                    "securityContext": restricted,
                    "volumeMounts": [{
                        "name": "hook-sidecar-sockets", "mountPath": "/var/run/kubevirt-hooks", "subPath": "hook-sidecar-0",
                    }],
                },
            ],
            "volumes": [
                { "name": "private", "emptyDir": {} },
                { "name": "hook-sidecar-sockets", "emptyDir": {} },
                { "name": "root", "persistentVolumeClaim": { "claimName": "vm1-root" } },
                { "name": "data", "persistentVolumeClaim": { "claimName": "vm1-data" } },
            ],
        },
    })
}

/// Names of the elements of a list.
pub fn names(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

/// The element of that name.
pub fn of<'a>(list: &'a Value, name: &str) -> &'a Value {
    super::named(list, name).unwrap_or_else(|| panic!("no {name} in {list}"))
}
