//! The custom resources that we play, as far as we play them: no schema beyond the fields' existence, as FIDELITY.md says.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};

/// VM and VMI. The VM has a status subresource, the VMI has none (`components/crds.go`).
fn definitions() -> Vec<Value> {
    [("VirtualMachine", "virtualmachine", "virtualmachines", "vm", true), ("VirtualMachineInstance", "virtualmachineinstance", "virtualmachineinstances", "vmi", false)]
        .map(|(kind, singular, plural, short, status)| {
            let subresources = if status { json!({ "status": {} }) } else { json!({}) };
            let phase = if status { ".status.printableStatus" } else { ".status.phase" };
            json!({
                "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
                "metadata": { "name": format!("{plural}.kubevirt.io"), "labels": { "app.kubernetes.io/managed-by": "kubevirt-standin" } },
                "spec": {
                    "group": "kubevirt.io", "scope": "Namespaced",
                    "names": { "kind": kind, "listKind": format!("{kind}List"), "singular": singular, "plural": plural, "shortNames": [short] },
                    "versions": [{
                        "name": "v1", "served": true, "storage": true, "subresources": subresources,
                        "additionalPrinterColumns": [{ "name": "Phase", "type": "string", "jsonPath": phase }],
                        "schema": { "openAPIV3Schema": { "type": "object", "x-kubernetes-preserve-unknown-fields": true } },
                    }],
                },
            })
        })
        .into()
}

/// Applies them and waits until they are served.
pub async fn apply(client: &Client) -> kube::Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in definitions() {
        let name = definition["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        api.patch(&name, &PatchParams::apply("kubevirt-standin").force(), &Patch::Apply(definition)).await?;
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
