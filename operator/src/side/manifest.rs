//! A VirtualMachine as it is made at the other site: what a person wrote, without what belongs to one cluster. Pure.

use serde_json::{Map, Value, json};
use watari_crds::names::{self, annotation, label};

/// Prefixes of annotations and labels that a cluster's own programs wrote.
const LOCAL: [&str; 3] = ["kubevirt.io/", "kubectl.kubernetes.io/", "argocd.argoproj.io/"];
pub const RECEIVER: &str = "WaitAsReceiver";
pub const HALTED: &str = "Halted";

/// What travels of a VM. Claims have the same names at both sites; a DataVolume becomes the claim that it made.
pub fn travelling(vm: &Value) -> Value {
    let metadata = &vm["metadata"];
    let kept = |map: &Value| -> Map<String, Value> {
        let entries = map.as_object().into_iter().flatten();
        let kept = entries.filter(|(key, _)| !LOCAL.iter().any(|prefix| key.starts_with(prefix)));
        kept.map(|(key, value)| (key.clone(), value.clone())).collect()
    };
    let mut spec = vm["spec"].clone();
    if let Some(fields) = spec.as_object_mut() {
        fields.remove("dataVolumeTemplates");
        // The older way to say it; the API has one or the other.
        if let Some(running) = fields.remove("running").and_then(|it| it.as_bool()) {
            fields.insert("runStrategy".to_owned(), json!(if running { "Always" } else { HALTED }));
        }
    }
    for volume in spec["template"]["spec"]["volumes"].as_array_mut().into_iter().flatten() {
        if let Some(fields) = volume.as_object_mut()
            && let Some(source) = fields.remove("dataVolume")
        {
            fields.insert("persistentVolumeClaim".to_owned(), json!({ "claimName": source["name"] }));
        }
    }
    let metadata = json!({
        "name": metadata["name"], "labels": kept(&metadata["labels"]), "annotations": kept(&metadata["annotations"]),
    });
    json!({ "metadata": metadata, "spec": spec })
}

/// The run strategy that the VM shall have when it is there.
pub fn run_strategy(manifest: &Value) -> &str {
    manifest["spec"]["runStrategy"].as_str().unwrap_or("Always")
}

/// The object to create: with this run strategy, marked as ours, and with what KubeVirt shall restore when the guest has come.
pub fn object(manifest: &Value, pair_id: &str, strategy: &str) -> Value {
    let mut object = manifest.clone();
    object["apiVersion"] = json!("kubevirt.io/v1");
    object["kind"] = json!("VirtualMachine");
    object["spec"]["runStrategy"] = json!(strategy);
    object["metadata"]["labels"][label::PAIR] = json!(pair_id);
    object["metadata"]["labels"][label::MANAGED] = json!(names::MANAGED_BY);
    if strategy == RECEIVER {
        object["metadata"]["annotations"][annotation::RESTORE_RUN_STRATEGY] = json!(run_strategy(manifest));
    }
    object
}

/// Whether a VM here is one that we made.
pub fn is_ours(vm: &Value, pair_id: &str) -> bool {
    let labels = &vm["metadata"]["labels"];
    labels[label::MANAGED] == names::MANAGED_BY && labels[label::PAIR] == pair_id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_cluster_added_stays_there_and_the_rest_travels() {
        let vm = json!({
            "metadata": {
                "name": "shop", "uid": "1", "resourceVersion": "5", "labels": { "app": "shop" },
                "annotations": { "kubevirt.io/latest-observed-api-version": "v1", "team": "blue" },
            },
            "spec": {
                "running": true, "dataVolumeTemplates": [{}], "instancetype": { "name": "u1.small" },
                "template": { "spec": { "volumes": [{ "name": "root", "dataVolume": { "name": "shop-root" } }] } },
            },
            "status": { "ready": true },
        });
        let manifest = travelling(&vm);
        assert_eq!(
            manifest,
            json!({
                "metadata": { "name": "shop", "labels": { "app": "shop" }, "annotations": { "team": "blue" } },
                "spec": {
                    "runStrategy": "Always", "instancetype": { "name": "u1.small" },
                    "template": { "spec": { "volumes": [{ "name": "root", "persistentVolumeClaim": { "claimName": "shop-root" } }] } },
                },
            })
        );
        let object = object(&manifest, "id", RECEIVER);
        assert_eq!(object["spec"]["runStrategy"], RECEIVER);
        assert_eq!(object["metadata"]["annotations"][annotation::RESTORE_RUN_STRATEGY], "Always");
        assert!(is_ours(&object, "id") && !is_ours(&vm, "id"));
    }
}
