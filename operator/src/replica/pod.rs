//! The replica's Pod: our sidecar as `replica`, with the pair's claims. Pure.
//!
//! It fits Pod Security "restricted" and runs as KubeVirt's uid 107, so that files have one owner on both sides of a move.

use serde_json::{Value, json};
use watari_crds::names::{self, path, port, role};
use watari_crds::replica::{SyncReplica, SyncReplicaSpec};
use watari_crds::wiring::VolumeMode;

use crate::configuration::{Disk, Sidecar};
use crate::objects;
use crate::settings::Settings;

/// Annotation: digest of all that the Pod was made from; another one means another Pod.
pub const MADE_FROM: &str = "watari.io/made-from";
/// Annotation: name of the SyncReplica, in the same namespace.
pub const OWNER: &str = "watari.io/sync-replica";
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

/// Digest of what a replica's Pod is made from, without what may differ between two operators (image).
pub fn made_from(spec: &SyncReplicaSpec) -> String {
    let selector = serde_json::to_string(&spec.node_selector).expect("a map of strings has a JSON form");
    let text = format!("{}\n{selector}", configuration(spec).to_toml());
    // Half of it is more than enough to tell two configurations apart.
    blake3::hash(text.as_bytes()).to_hex()[..32].to_owned()
}

/// The Pod as it is applied.
pub fn object(replica: &SyncReplica, owner: &str, settings: &Settings) -> Value {
    let spec = &replica.spec;
    let id = &spec.pair_id;
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": names::replica_pod(id),
            "labels": objects::labels(id, &spec.vm_name, role::REPLICA),
            "annotations": { MADE_FROM: made_from(spec), OWNER: owner },
        },
        "spec": {
            "restartPolicy": "Always",
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "nodeSelector": spec.node_selector,
            "securityContext": {
                "runAsUser": QEMU, "runAsGroup": QEMU, "fsGroup": QEMU, "runAsNonRoot": true,
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "containers": [container(spec, settings)],
            "volumes": volumes(spec),
        },
    })
}

fn container(spec: &SyncReplicaSpec, settings: &Settings) -> Value {
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
        "volumeMounts": mounts(spec),
        "volumeDevices": devices(spec),
    })
}

fn mounts(spec: &SyncReplicaSpec) -> Vec<Value> {
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
    let files = spec.disks.iter().filter(|disk| disk.mode == VolumeMode::Filesystem);
    list.extend(files.map(|disk| mount(&disk.name, &format!("{}/{}", path::DISKS_DIR, disk.name))));
    list
}

fn devices(spec: &SyncReplicaSpec) -> Vec<Value> {
    let blocks = spec.disks.iter().filter(|disk| disk.mode == VolumeMode::Block);
    let device = |name: &str| json!({ "name": name, "devicePath": format!("{}/{name}", path::DEVICES_DIR) });
    blocks.map(|disk| device(&disk.name)).collect()
}

fn volumes(spec: &SyncReplicaSpec) -> Vec<Value> {
    let id = &spec.pair_id;
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
    list.extend(spec.disks.iter().map(|disk| claim(&disk.name, &disk.claim)));
    list
}
