//! The custom resources that we play, as far as we play them: no schema beyond the fields' existence, as FIDELITY.md says; and the
//! KubeVirt object, from which others read what this KubeVirt can do.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::ca::NAMESPACE;
use crate::objects::{Kind, MANAGER};

/// What the stand-in calls itself.
pub const VERSION: &str = "v1.9.0-standin";
/// Gates that Watari asks for; what they stand for is always on here.
const GATES: [&str; 2] = ["Sidecar", "DecentralizedLiveMigration"];

/// The VMI has no status subresource, the others have one (`components/crds.go`).
fn definition(kind: Kind) -> Value {
    let column = |name: &str, path: &str| json!({ "name": name, "type": "string", "jsonPath": path });
    let (short, columns) = match kind {
        Kind::Vm => (
            ["vm"].as_slice(),
            vec![column("Status", ".status.printableStatus"), column("Strategy", ".spec.runStrategy")],
        ),
        Kind::Vmi => (["vmi"].as_slice(), vec![column("Phase", ".status.phase"), column("Node", ".status.nodeName")]),
        Kind::Vmim => (["vmim"].as_slice(), vec![column("Phase", ".status.phase"), column("VMI", ".spec.vmiName")]),
        Kind::KubeVirt => (["kv"].as_slice(), vec![column("Phase", ".status.phase")]),
    };
    let subresources = if kind == Kind::Vmi { json!({}) } else { json!({ "status": {} }) };
    let (name, plural) = (kind.name(), kind.plural());
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": { "name": format!("{plural}.kubevirt.io"), "labels": { "app.kubernetes.io/managed-by": MANAGER } },
        "spec": {
            "group": "kubevirt.io", "scope": "Namespaced",
            "names": { "kind": name, "listKind": format!("{name}List"), "singular": name.to_lowercase(), "plural": plural, "shortNames": short },
            "versions": [{
                "name": "v1", "served": true, "storage": true, "subresources": subresources,
                "additionalPrinterColumns": columns,
                "schema": { "openAPIV3Schema": { "type": "object", "x-kubernetes-preserve-unknown-fields": true } },
            }],
        },
    })
}

/// Applies them and waits until they are served.
pub async fn apply(client: &Client) -> kube::Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for kind in Kind::ALL {
        let definition = definition(kind);
        let name = definition["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        api.patch(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(definition)).await?;
        loop {
            let status = api.get(&name).await?.status.and_then(|status| status.conditions).unwrap_or_default();
            if status.iter().any(|condition| condition.type_ == "Established" && condition.status == "True") {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    }
    Ok(())
}

/// The KubeVirt object; a `certificateRotateStrategy` or whatever else somebody wrote into it stays.
pub async fn apply_kubevirt(client: &Client, synchronization_address: &str) -> kube::Result<()> {
    let api = Kind::KubeVirt.api(client, NAMESPACE);
    let head = json!({ "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt", "metadata": { "name": "kubevirt", "namespace": NAMESPACE } });
    let mut object = head.clone();
    object["spec"] = json!({ "configuration": { "developerConfiguration": { "featureGates": GATES } } });
    let parameters = PatchParams::apply(MANAGER).force();
    api.patch("kubevirt", &parameters, &Patch::Apply(object)).await?;
    let mut status = head;
    status["status"] = json!({
        "phase": "Deployed", "observedKubeVirtVersion": VERSION, "targetKubeVirtVersion": VERSION,
        "synchronizationAddresses": [synchronization_address],
        "conditions": [{ "type": "Available", "status": "True", "reason": "AllComponentsReady", "message": "All components are ready." }],
    });
    api.patch_status("kubevirt", &parameters, &Patch::Apply(status)).await.map(drop)
}
