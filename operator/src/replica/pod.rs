//! The Pod that holds a pair's folder while no VM of its site does: our sidecar as `replica`, with the pair's claims. Pure.
//!
//! At the peer it is the replica's; at the home it is there while the VM is not. It fits Pod Security "restricted" and runs as KubeVirt's uid 107, so that files have one owner on both sides of a move.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use watari_crds::names::{self, path, port, role};
use watari_crds::replica::SyncReplicaSpec;
use watari_crds::wiring::VolumeMode;

use crate::configuration::{Disk, Sidecar};
use crate::objects;
use crate::settings::Settings;

/// Annotation: digest of all that the Pod was made from; another one means another Pod.
pub const MADE_FROM: &str = "watari.io/made-from";
/// KubeVirt's own user and group (`qemu`).
const QEMU: i64 = 107;
/// As the webhooks give beside a VM.
const MEMORY: &str = "512Mi";
const CPU_REQUEST: &str = "100m";

/// The configuration of the replica's sidecar.
pub fn configuration(spec: &SyncReplicaSpec) -> Sidecar {
    let disk = |disk: &watari_crds::replica::ReplicaDisk| Disk {
        name: disk.name.clone(),
        mode: disk.mode,
        size_bytes: u64::try_from(disk.size_bytes).ok(),
    };
    Sidecar {
        site: spec.site.clone(),
        pair_id: spec.pair_id.clone(),
        pair_name: spec.pair_name.clone(),
        disks: spec.disks.iter().map(disk).collect(),
        interval: spec.interval.into(),
        bandwidth: spec.bandwidth_bits_per_second.and_then(|bits| u64::try_from(bits).ok()),
        retention_count: spec.retention.count,
        retention_age: spec.retention.age.map(Into::into),
        metadata_bytes: u64::try_from(spec.metadata.size_bytes).unwrap_or_default(),
        peers: spec.home_gateways.clone(),
    }
}

/// What such a Pod is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct Holder {
    pub pair_id: String,
    pub vm: String,
    /// `sidecar.toml`, as it lies in the ConfigMap.
    pub toml: String,
    /// Where the VM may run, and so this.
    pub node_selector: BTreeMap<String, String>,
    pub disks: Vec<HeldDisk>,
}

/// One disk of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldDisk {
    pub name: String,
    pub claim: String,
    pub mode: VolumeMode,
}

impl Holder {
    /// Of a replica at the peer.
    pub fn of(spec: &SyncReplicaSpec) -> Holder {
        let disk = |disk: &watari_crds::replica::ReplicaDisk| HeldDisk {
            name: disk.name.clone(),
            claim: disk.claim.clone(),
            mode: disk.mode,
        };
        Holder {
            pair_id: spec.pair_id.clone(),
            vm: spec.vm_name.clone(),
            toml: configuration(spec).to_toml(),
            node_selector: spec.node_selector.clone(),
            disks: spec.disks.iter().map(disk).collect(),
        }
    }

    /// Digest of what it is made from, without what may differ between two operators (image).
    pub fn made_from(&self) -> String {
        let selector = serde_json::to_string(&self.node_selector).expect("a map of strings has a JSON form");
        let text = format!("{}\n{selector}", self.toml);
        // Half of it is more than enough to tell two configurations apart.
        blake3::hash(text.as_bytes()).to_hex()[..32].to_owned()
    }

    /// The Pod as it is applied.
    pub fn to_object(&self, settings: &Settings) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": names::replica_pod(&self.pair_id),
                "labels": objects::labels(&self.pair_id, &self.vm, role::REPLICA),
                "annotations": { MADE_FROM: self.made_from() },
            },
            "spec": {
                "restartPolicy": "Always",
                "automountServiceAccountToken": false,
                "enableServiceLinks": false,
                "nodeSelector": self.node_selector,
                "securityContext": {
                    "runAsUser": QEMU, "runAsGroup": QEMU, "fsGroup": QEMU, "runAsNonRoot": true,
                    "seccompProfile": { "type": "RuntimeDefault" },
                },
                "containers": [container(&self.disks, settings)],
                "volumes": volumes(self),
            },
        })
    }
}

fn container(disks: &[HeldDisk], settings: &Settings) -> Value {
    let file = format!("{}/{}", path::CONFIGURATION_DIR, path::CONFIGURATION_FILE);
    json!({
        "name": path::CONTAINER,
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "args": ["replica", "--config", file],
        "ports": [
            { "name": "watari", "containerPort": port::SIDECAR, "protocol": "TCP" },
            { "name": "watari-metrics", "containerPort": port::METRICS, "protocol": "TCP" },
        ],
        "readinessProbe": { "httpGet": { "path": "/readyz", "port": port::METRICS }, "periodSeconds": 5 },
        "resources": { "requests": { "cpu": CPU_REQUEST, "memory": MEMORY }, "limits": { "memory": MEMORY } },
        "securityContext": {
            "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": { "drop": ["ALL"] },
        },
        "volumeMounts": mounts(disks),
        "volumeDevices": devices(disks),
    })
}

fn mounts(disks: &[HeldDisk]) -> Vec<Value> {
    let mount = |name: &str, at: &str| json!({ "name": name, "mountPath": at });
    let read_only = |name: &str, at: &str| json!({ "name": name, "mountPath": at, "readOnly": true });
    let mut list = vec![
        read_only("watari-config", path::CONFIGURATION_DIR),
        read_only("watari-tls", path::TLS_DIR),
        mount("watari-metadata", path::METADATA_DIR),
        mount("watari-runtime", path::RUNTIME_DIR),
        mount("watari-nbd", path::NBD_DIR),
        mount("watari-hooks", path::HOOKS_DIR),
    ];
    let files = disks.iter().filter(|disk| disk.mode == VolumeMode::Filesystem);
    list.extend(files.map(|disk| mount(&disk.name, &format!("{}/{}", path::DISKS_DIR, disk.name))));
    list
}

fn devices(disks: &[HeldDisk]) -> Vec<Value> {
    let blocks = disks.iter().filter(|disk| disk.mode == VolumeMode::Block);
    let device = |name: &str| json!({ "name": name, "devicePath": format!("{}/{name}", path::DEVICES_DIR) });
    blocks.map(|disk| device(&disk.name)).collect()
}

fn volumes(holder: &Holder) -> Vec<Value> {
    let id = &holder.pair_id;
    let claim = |name: &str, claim: &str| json!({ "name": name, "persistentVolumeClaim": { "claimName": claim } });
    let mut list = vec![
        json!({ "name": "watari-config", "configMap": { "name": names::configuration(id) } }),
        json!({ "name": "watari-tls", "secret": { "secretName": names::certificate_secret(id), "defaultMode": 0o440 } }),
        claim("watari-metadata", &names::metadata_claim(id)),
        json!({ "name": "watari-runtime", "emptyDir": { "medium": "Memory", "sizeLimit": "64Mi" } }),
        json!({ "name": "watari-nbd", "emptyDir": {} }),
        // No KubeVirt looks there; the configuration is the same as beside a VM.
        json!({ "name": "watari-hooks", "emptyDir": {} }),
    ];
    list.extend(holder.disks.iter().map(|disk| claim(&disk.name, &disk.claim)));
    list
}
