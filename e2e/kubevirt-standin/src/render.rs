//! The virt-launcher Pod of a VMI, as KubeVirt renders it (`pkg/virt-controller/services/template.go`). Pure.
//!
//! What differs from KubeVirt's is listed in FIDELITY.md; above all the compute container runs our launcher, which is told its VMI in
//! the environment, where KubeVirt's gets it from virt-handler.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Of the VMI, as JSON, for the launcher.
pub const VMI_VARIABLE: &str = "STANDIN_VMI";
/// How many hook sidecars the launcher waits for.
pub const HOOKS_VARIABLE: &str = "STANDIN_HOOKS";
/// The claims' disks, a list of [`DiskFile`], for the launcher.
pub const DISKS_VARIABLE: &str = "STANDIN_DISKS";
/// Annotation with the list of hook sidecars (`pkg/hooks/hooks.go`).
pub const HOOKS_ANNOTATION: &str = "hooks.kubevirt.io/hookSidecars";
/// Where compute finds a hook's socket, one folder per sidecar; each sidecar sees its own folder at the same path.
pub const HOOKS_FOLDER: &str = "/var/run/kubevirt-hooks";
/// Private to compute; the guest's disks, consoles and control lines are below.
pub const PRIVATE_FOLDER: &str = "/var/run/kubevirt-private";
/// Set in the target of a migration.
pub const TARGET_VARIABLE: &str = "STANDIN_TARGET";
/// A JSON patch (RFC 6902) for the rendered Pod, in the place of a webhook; a test's own.
pub const PATCH_ANNOTATION: &str = "standin.watari.internal/pod-patch";
/// On the Pod of a migration's target: the VMIM's UID, and its name (`migration.go`).
pub const JOB_UID_LABEL: &str = "kubevirt.io/migrationJobUID";
pub const JOB_NAME_ANNOTATION: &str = "kubevirt.io/migrationJobName";
/// The VMI's UID, on its Pods.
pub const CREATED_BY_LABEL: &str = "kubevirt.io/created-by";
const HOSTNAME_LABEL: &str = "kubernetes.io/hostname";
/// The user of everything in the Pod (`template.go`, non-root VMIs).
const USER: u32 = 107;
/// Added to the VMI's own (`template.go:411`), whose default is 30.
const GRACE_SECONDS: i64 = 30;

/// The VMI cannot be rendered; KubeVirt reports FailedCreate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("annotation {HOOKS_ANNOTATION}: {0}")]
    Hooks(serde_json::Error),
    #[error("annotation {PATCH_ANNOTATION}: {0}")]
    Patch(serde_json::Error),
    #[error("annotation {PATCH_ANNOTATION}: {0}")]
    Patching(#[from] json_patch::PatchError),
    #[error("the VMI has no {0}")]
    Missing(&'static str),
}

/// One entry of the annotation; fields that we play.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct HookSidecar {
    image: String,
    #[serde(default)]
    image_pull_policy: Option<String>,
    #[serde(default)]
    command: Vec<String>,
    #[serde(default)]
    args: Vec<String>,
}

/// A volume of the VMI that is a claim, and the claim's mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimVolume {
    pub volume: String,
    pub claim: String,
    pub block: bool,
    /// What the claim asks for.
    pub bytes: u64,
    /// Several Pods may write to it at once (ReadWriteMany).
    pub shared: bool,
}

/// A claim as compute sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFile {
    pub volume: String,
    pub path: String,
    pub block: bool,
    pub bytes: u64,
    pub shared: bool,
}

impl DiskFile {
    /// Where the claim is mounted.
    pub fn folder(&self) -> String {
        self.path.rsplit_once('/').map_or(String::new(), |(folder, _)| folder.to_owned())
    }
}

impl ClaimVolume {
    fn disk_file(&self) -> DiskFile {
        let (volume, block, bytes, shared) = (self.volume.clone(), self.block, self.bytes, self.shared);
        let path =
            if block { format!("/dev/{volume}") } else { format!("{PRIVATE_FOLDER}/vmi-disks/{volume}/disk.img") };
        DiskFile { volume, path, block, bytes, shared }
    }
}

/// Volumes of the VMI that are claims: their names and the claims'.
pub fn claims_of(vmi: &Value) -> Vec<(String, String)> {
    let volumes = vmi["spec"]["volumes"].as_array().cloned().unwrap_or_default();
    let named = |volume: &Value| {
        // A DataVolume's claim has its name.
        let claim = volume["persistentVolumeClaim"]["claimName"].as_str().or(volume["dataVolume"]["name"].as_str())?;
        Some((volume["name"].as_str()?.to_owned(), claim.to_owned()))
    };
    volumes.iter().filter_map(named).collect()
}

/// What makes a Pod the target of a migration (`RenderMigrationManifest`, `createTargetPod`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Target {
    pub vmim_name: String,
    pub vmim_uid: String,
    /// `addedNodeSelector`; the VMI's own wins.
    pub added_node_selector: Map<String, Value>,
    /// The node that the VM comes from, of another cluster: a node of that name is never chosen.
    pub source_node: Option<String>,
    /// Within a cluster the two Pods must not meet on one node. Kept only where there is another node: see FIDELITY.md.
    pub apart: bool,
}

/// The Pod. `launcher_image` holds libvirt, QEMU and the launcher.
pub fn pod(vmi: &Value, claims: &[ClaimVolume], launcher_image: &str, target: Option<&Target>) -> Result<Value, Error> {
    let text = |value: &Value, what| value.as_str().map(str::to_owned).ok_or(Error::Missing(what));
    let name = text(&vmi["metadata"]["name"], "name")?;
    let uid = text(&vmi["metadata"]["uid"], "uid")?;
    let annotation = vmi["metadata"]["annotations"][HOOKS_ANNOTATION].as_str();
    let hooks: Vec<HookSidecar> =
        annotation.map(serde_json::from_str).transpose().map_err(Error::Hooks)?.unwrap_or_default();

    let mut labels = vmi["metadata"]["labels"].as_object().cloned().unwrap_or_default();
    labels.insert("kubevirt.io".into(), "virt-launcher".into());
    labels.insert(CREATED_BY_LABEL.into(), uid.clone().into());
    labels.insert("vm.kubevirt.io/name".into(), name.clone().into());
    let mut annotations = vmi["metadata"]["annotations"].as_object().cloned().unwrap_or_else(Map::new);
    annotations.insert("kubevirt.io/domain".into(), name.clone().into());

    let mut volumes = vec![empty("private"), empty("hook-sidecar-sockets"), empty("libvirt-runtime")];
    for claim in claims {
        volumes.push(json!({ "name": claim.volume, "persistentVolumeClaim": { "claimName": claim.claim } }));
    }
    let mut containers = vec![compute(vmi, claims, hooks.len(), launcher_image)];
    containers.extend(hooks.iter().enumerate().map(|(index, hook)| sidecar(index, hook)));
    if let Some(target) = target {
        labels.insert(JOB_UID_LABEL.into(), target.vmim_uid.clone().into());
        annotations.insert(JOB_NAME_ANNOTATION.into(), target.vmim_name.clone().into());
        containers[0]["env"]
            .as_array_mut()
            .expect("compute has variables")
            .push(json!({ "name": TARGET_VARIABLE, "value": "1" }));
    }
    let grace = vmi["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap_or(GRACE_SECONDS) + GRACE_SECONDS;
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "generateName": format!("virt-launcher-{name}-"), "labels": labels, "annotations": annotations,
            "ownerReferences": [{
                "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "name": name, "uid": uid,
                "controller": true, "blockOwnerDeletion": true,
            }],
        },
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": grace,
            "enableServiceLinks": false,
            "automountServiceAccountToken": false,
            "hostname": name,
            "nodeSelector": node_selector(vmi, target),
            "affinity": target.map(|target| affinity(target, &uid)),
            "tolerations": vmi["spec"]["tolerations"],
            "securityContext": { "runAsUser": USER, "runAsGroup": USER, "runAsNonRoot": true, "fsGroup": USER },
            "containers": containers,
            "volumes": volumes,
        },
    });
    if let Some(text) = vmi["metadata"]["annotations"][PATCH_ANNOTATION].as_str() {
        let changes: json_patch::Patch = serde_json::from_str(text).map_err(Error::Patch)?;
        json_patch::patch(&mut pod, &changes)?;
    }
    Ok(pod)
}

fn node_selector(vmi: &Value, target: Option<&Target>) -> Map<String, Value> {
    let mut selector = target.map(|target| target.added_node_selector.clone()).unwrap_or_default();
    selector.extend(vmi["spec"]["nodeSelector"].as_object().cloned().unwrap_or_default());
    selector
}

/// `migration.go:893` and `:913`.
fn affinity(target: &Target, uid: &str) -> Value {
    let mut affinity = json!({});
    if let Some(node) = &target.source_node {
        let elsewhere = json!({ "key": HOSTNAME_LABEL, "operator": "NotIn", "values": [node] });
        affinity["nodeAffinity"] = json!({ "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{ "matchExpressions": [elsewhere] }],
        } });
    }
    if target.apart {
        affinity["podAntiAffinity"] = json!({ "requiredDuringSchedulingIgnoredDuringExecution": [{
            "labelSelector": { "matchLabels": { CREATED_BY_LABEL: uid } }, "topologyKey": HOSTNAME_LABEL,
        }] });
    }
    affinity
}

fn empty(name: &str) -> Value {
    json!({ "name": name, "emptyDir": {} })
}

fn restricted() -> Value {
    json!({ "runAsUser": USER, "runAsGroup": USER, "runAsNonRoot": true, "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } })
}

fn compute(vmi: &Value, claims: &[ClaimVolume], hooks: usize, image: &str) -> Value {
    let mut mounts = vec![
        json!({ "name": "private", "mountPath": PRIVATE_FOLDER }),
        json!({ "name": "hook-sidecar-sockets", "mountPath": HOOKS_FOLDER }),
        json!({ "name": "libvirt-runtime", "mountPath": "/var/run/libvirt" }),
    ];
    let mut devices = Vec::new();
    let files: Vec<DiskFile> = claims.iter().map(ClaimVolume::disk_file).collect();
    for DiskFile { volume, block, .. } in &files {
        match block {
            true => devices.push(json!({ "name": volume, "devicePath": format!("/dev/{volume}") })),
            false => {
                mounts.push(json!({ "name": volume, "mountPath": format!("{PRIVATE_FOLDER}/vmi-disks/{volume}") }))
            }
        }
    }
    json!({
        "name": "compute", "image": image, "imagePullPolicy": "IfNotPresent",
        "command": ["/usr/bin/kubevirt-standin", "monitor"],
        "env": [
            { "name": VMI_VARIABLE, "value": vmi.to_string() },
            { "name": HOOKS_VARIABLE, "value": hooks.to_string() },
            { "name": DISKS_VARIABLE, "value": serde_json::to_string(&files).expect("plain data") },
            { "name": "HOME", "value": PRIVATE_FOLDER },
            { "name": "XDG_CACHE_HOME", "value": PRIVATE_FOLDER },
            { "name": "XDG_CONFIG_HOME", "value": PRIVATE_FOLDER },
            { "name": "XDG_RUNTIME_DIR", "value": "/var/run" },
        ],
        "securityContext": restricted(),
        "volumeMounts": mounts,
        "volumeDevices": devices,
    })
}

fn sidecar(index: usize, hook: &HookSidecar) -> Value {
    let name = format!("hook-sidecar-{index}");
    let mut container = json!({
        "name": name, "image": hook.image, "args": hook.args,
        "imagePullPolicy": hook.image_pull_policy,
        "env": [
            { "name": "CONTAINER_NAME", "value": name },
            { "name": "XDG_CACHE_HOME", "value": PRIVATE_FOLDER },
            { "name": "XDG_CONFIG_HOME", "value": PRIVATE_FOLDER },
            { "name": "XDG_RUNTIME_DIR", "value": "/var/run" },
        ],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": restricted(),
        "volumeMounts": [{ "name": "hook-sidecar-sockets", "mountPath": HOOKS_FOLDER, "subPath": name }],
    });
    if !hook.command.is_empty() {
        container["command"] = hook.command.clone().into();
    }
    container
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vmi(annotations: Value) -> Value {
        json!({
            "metadata": { "name": "vm", "uid": "1", "labels": { "own": "label" }, "annotations": annotations },
            "spec": { "volumes": [
                { "name": "root", "persistentVolumeClaim": { "claimName": "data" } },
                { "name": "seed", "emptyDisk": { "capacity": "1Mi" } },
            ] },
        })
    }

    fn rendered(annotations: Value, block: bool) -> Value {
        let claims =
            [ClaimVolume { volume: "root".into(), claim: "data".into(), block, bytes: 1 << 20, shared: false }];
        pod(&vmi(annotations), &claims, "launcher", None).unwrap()
    }

    #[test]
    fn only_claims_are_volumes_of_the_pod() {
        assert_eq!(claims_of(&vmi(json!({}))), [("root".to_owned(), "data".to_owned())]);
    }

    #[test]
    fn labels_and_annotations_of_the_vmi_are_on_the_pod_beside_kubevirts() {
        let pod = rendered(json!({ "some": "annotation" }), false);
        let labels = &pod["metadata"]["labels"];
        assert_eq!(labels["kubevirt.io"], "virt-launcher");
        assert_eq!(labels["kubevirt.io/created-by"], "1");
        assert_eq!(labels["own"], "label");
        assert_eq!(pod["metadata"]["annotations"]["kubevirt.io/domain"], "vm");
        assert_eq!(pod["metadata"]["annotations"]["some"], "annotation");
        assert_eq!(pod["spec"]["restartPolicy"], "Never");
    }

    #[test]
    fn a_hook_sidecar_sees_only_its_own_folder_of_sockets() {
        let pod = rendered(json!({ HOOKS_ANNOTATION: r#"[{"image":"i","args":["a"]},{"image":"j"}]"# }), false);
        let containers = pod["spec"]["containers"].as_array().unwrap();
        let names: Vec<_> = containers.iter().map(|container| container["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["compute", "hook-sidecar-0", "hook-sidecar-1"]);
        assert_eq!(containers[2]["volumeMounts"][0]["subPath"], "hook-sidecar-1");
        assert_eq!(containers[2]["volumeMounts"][0]["mountPath"], HOOKS_FOLDER);
        assert_eq!(containers[1]["args"][0], "a");
    }

    #[test]
    fn a_list_that_is_no_json_is_refused_at_rendering() {
        assert!(matches!(pod(&vmi(json!({ HOOKS_ANNOTATION: "no" })), &[], "l", None), Err(Error::Hooks(_))));
    }

    #[test]
    fn a_block_claim_is_a_device_and_a_filesystem_claim_a_folder() {
        let block = rendered(json!({}), true);
        assert_eq!(block["spec"]["containers"][0]["volumeDevices"][0]["devicePath"], "/dev/root");
        let folder = rendered(json!({}), false);
        let mounts = folder["spec"]["containers"][0]["volumeMounts"].as_array().unwrap();
        assert!(mounts.iter().any(|mount| mount["mountPath"] == "/var/run/kubevirt-private/vmi-disks/root"));
    }
    #[test]
    fn a_target_carries_the_migrations_name_and_never_lands_on_a_node_called_like_the_sources() {
        let added = json!({ "zone": "east", "own": "theirs" }).as_object().cloned().unwrap();
        let target = Target {
            vmim_name: "move".into(),
            vmim_uid: "9".into(),
            added_node_selector: added,
            source_node: Some("a-1".into()),
            apart: false,
        };
        let mut vmi = vmi(json!({}));
        vmi["spec"]["nodeSelector"] = json!({ "own": "mine" });
        let pod = pod(&vmi, &[], "l", Some(&target)).unwrap();
        assert_eq!(pod["metadata"]["labels"][JOB_UID_LABEL], "9");
        assert_eq!(pod["metadata"]["annotations"][JOB_NAME_ANNOTATION], "move");
        assert_eq!(pod["spec"]["nodeSelector"], json!({ "zone": "east", "own": "mine" }));
        let terms = &pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
        assert_eq!(terms["nodeSelectorTerms"][0]["matchExpressions"][0]["values"][0], "a-1");
        assert!(pod["spec"]["containers"][0]["env"].to_string().contains(TARGET_VARIABLE));
    }

    #[test]
    fn a_test_may_patch_the_pod_where_no_webhook_does() {
        let patch = r#"[{ "op": "add", "path": "/spec/volumes/-", "value": { "name": "config" } }]"#;
        let pod = rendered(json!({ PATCH_ANNOTATION: patch }), false);
        assert_eq!(pod["spec"]["volumes"].as_array().unwrap().last().unwrap()["name"], "config");
    }
}
