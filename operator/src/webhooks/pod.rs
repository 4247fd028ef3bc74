//! virt-launcher Pods: our hook sidecar becomes a native sidecar with everything mounted that it needs.
//!
//! A native sidecar (an init container with `restartPolicy: Always`) is restarted when it fails although the Pod never
//! is, starts before `compute`, and is told to end only after `compute` has. The claims of the VM's disks are already volumes of the
//! Pod, named like the VM's volumes; they are mounted a second time, never added again: a Pod with two volumes for one claim
//! is never started by kubelet, without a word.

use serde_json::{Value, json};
use watari_crds::{
    names::{self, annotation, path, port},
    wiring::{VolumeMode, WiredDisk, Wiring},
};

use super::{
    Refusal, array, named, put_named,
    settings::{Qos, SidecarSettings},
    wiring_of,
};

/// KubeVirt's container that runs QEMU.
const COMPUTE: &str = "compute";
/// Names of the Pod's volumes that we add.
const NBD_VOLUME: &str = "watari-nbd";
const RUNTIME_VOLUME: &str = "watari-runtime";
const METADATA_VOLUME: &str = "watari-metadata";
const TLS_VOLUME: &str = "watari-tls";
const CONFIGURATION_VOLUME: &str = "watari-config";
/// Bound of the emptyDir with the dirty map: 32 KiB for each GiB of disk, so this is enough for 2 TiB.
const RUNTIME_BYTES: &str = "64Mi";
/// Readable for the Pod's group alone (fsGroup, KubeVirt's 107).
const SECRET_MODE: u32 = 0o440;

/// Wires a virt-launcher Pod of a paired VM. Repeating it changes nothing more.
pub fn wire(pod: &mut Value, settings: &SidecarSettings) -> Result<(), Refusal> {
    let wiring = wiring_of(pod)?;
    if named(&pod["spec"]["initContainers"], path::CONTAINER).is_some_and(SidecarSettings::is_ours) {
        return Ok(());
    }
    let containers = array(&mut pod["spec"], "containers");
    let ours = containers.iter().position(SidecarSettings::is_ours).ok_or(Refusal::NoSidecar)?;
    let found = containers.remove(ours);
    if only_provisions(pod) {
        // Its compute ends at once, and so must everything else in it.
        return Ok(());
    }
    for disk in &wiring.disks {
        check_disk(pod, &wiring, disk)?;
    }
    let native = native_sidecar(found, qos(pod), &wiring, settings);
    let spec = &mut pod["spec"];
    put_named(array(spec, "initContainers"), native);
    for volume in volumes(&wiring) {
        put_named(array(spec, "volumes"), volume);
    }
    let compute = array(spec, "containers").iter_mut().find(|one| one["name"] == COMPUTE).ok_or(Refusal::NoCompute)?;
    put_named(array(compute, "volumeMounts"), json!({ "name": NBD_VOLUME, "mountPath": path::NBD_DIR }));
    for secret in &settings.image_pull_secrets {
        put_named(array(spec, "imagePullSecrets"), json!({ "name": secret }));
    }
    Ok(())
}

/// A Pod that KubeVirt makes only so that WaitForFirstConsumer claims get bound.
fn only_provisions(pod: &Value) -> bool {
    pod["metadata"]["annotations"][annotation::EPHEMERAL_PROVISIONING] == "true"
}

fn qos(pod: &Value) -> Qos {
    let of = |key: &str| pod["spec"][key].as_array().map(Vec::as_slice).unwrap_or_default();
    Qos::of(of("containers").iter().chain(of("initContainers")))
}

/// The volume is there, is a claim, and is used as the configuration expects.
fn check_disk(pod: &Value, wiring: &Wiring, wired: &WiredDisk) -> Result<(), Refusal> {
    const RESTART: &str = "restart the VM once the SyncPair's controller has written the wiring anew";
    let refuse = |found: String, expected, remedy| {
        Err(Refusal::Disk { disk: wired.name.clone(), pair_id: wiring.pair_id.clone(), found, expected, remedy })
    };
    match named(&pod["spec"]["volumes"], &wired.name) {
        Some(volume) if volume.get("persistentVolumeClaim").is_some() => {}
        Some(_) => return refuse("a volume that is no claim".to_owned(), "a claim", RESTART),
        None => return refuse("no volume of that name in the Pod".to_owned(), "the VM's volume", RESTART),
    }
    let compute = named(&pod["spec"]["containers"], COMPUTE).ok_or(Refusal::NoCompute)?;
    let used = match named(&compute["volumeDevices"], &wired.name) {
        Some(_) => VolumeMode::Block,
        None => VolumeMode::Filesystem,
    };
    if used != wired.mode {
        let expected = match wired.mode {
            VolumeMode::Filesystem => "a claim of mode Filesystem",
            VolumeMode::Block => "a claim of mode Block",
        };
        return refuse(format!("a claim of mode {used:?}"), expected, RESTART);
    }
    Ok(())
}

/// What KubeVirt rendered, with environment, security context and hook folder kept.
fn native_sidecar(mut container: Value, qos: Qos, wiring: &Wiring, settings: &SidecarSettings) -> Value {
    container["name"] = json!(path::CONTAINER);
    container["restartPolicy"] = json!("Always");
    container["resources"] = settings.resources.for_qos(qos);
    container["ports"] = json!([
        { "name": "watari", "containerPort": port::SIDECAR },
        { "name": "watari-metrics", "containerPort": port::METRICS },
    ]);
    restrict(&mut container["securityContext"]);
    let mounts = array(&mut container, "volumeMounts");
    let read_only = |name: &str, path: &str| json!({ "name": name, "mountPath": path, "readOnly": true });
    put_named(mounts, read_only(CONFIGURATION_VOLUME, path::CONFIGURATION_DIR));
    put_named(mounts, read_only(TLS_VOLUME, path::TLS_DIR));
    put_named(mounts, json!({ "name": METADATA_VOLUME, "mountPath": path::METADATA_DIR }));
    put_named(mounts, json!({ "name": RUNTIME_VOLUME, "mountPath": path::RUNTIME_DIR }));
    put_named(mounts, json!({ "name": NBD_VOLUME, "mountPath": path::NBD_DIR }));
    for disk in &wiring.disks {
        match disk.mode {
            VolumeMode::Filesystem => {
                let at = format!("{}/{}", path::DISKS_DIR, disk.name);
                put_named(array(&mut container, "volumeMounts"), json!({ "name": disk.name, "mountPath": at }));
            }
            VolumeMode::Block => {
                let at = format!("{}/{}", path::DEVICES_DIR, disk.name);
                put_named(array(&mut container, "volumeDevices"), json!({ "name": disk.name, "devicePath": at }));
            }
        }
    }
    container
}

/// Pod Security "restricted", as far as KubeVirt's own settings do not say otherwise already.
fn restrict(context: &mut Value) {
    let defaults = [
        ("allowPrivilegeEscalation", json!(false)),
        ("capabilities", json!({ "drop": ["ALL"] })),
        ("readOnlyRootFilesystem", json!(true)),
        ("seccompProfile", json!({ "type": "RuntimeDefault" })),
    ];
    for (key, value) in defaults {
        if context[key].is_null() {
            context[key] = value;
        }
    }
}

fn volumes(wiring: &Wiring) -> [Value; 5] {
    let id = &wiring.pair_id;
    [
        json!({ "name": NBD_VOLUME, "emptyDir": {} }),
        json!({ "name": RUNTIME_VOLUME, "emptyDir": { "medium": "Memory", "sizeLimit": RUNTIME_BYTES } }),
        json!({ "name": METADATA_VOLUME, "persistentVolumeClaim": { "claimName": names::metadata_claim(id) } }),
        json!({ "name": TLS_VOLUME, "secret": { "secretName": names::certificate_secret(id), "defaultMode": SECRET_MODE } }),
        json!({ "name": CONFIGURATION_VOLUME, "configMap": { "name": names::configuration(id) } }),
    ]
}

#[cfg(test)]
#[path = "pod_tests.rs"]
mod tests;
