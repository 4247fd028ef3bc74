//! KubeVirt's objects as the API server has them: JSON, of which we read and write some fields.

use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};

/// Field manager of everything that is applied.
pub const MANAGER: &str = "kubevirt-standin";

/// A kind of the group `kubevirt.io`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Vm,
    Vmi,
    Vmim,
    KubeVirt,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Vm, Kind::Vmi, Kind::Vmim, Kind::KubeVirt];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Vm => "VirtualMachine",
            Kind::Vmi => "VirtualMachineInstance",
            Kind::Vmim => "VirtualMachineInstanceMigration",
            Kind::KubeVirt => "KubeVirt",
        }
    }

    pub fn plural(self) -> String {
        format!("{}s", self.name().to_lowercase())
    }

    pub fn resource(self) -> ApiResource {
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("kubevirt.io", "v1", self.name()), &self.plural())
    }

    pub fn api(self, client: &Client, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(client.clone(), namespace, &self.resource())
    }

    pub fn everywhere(self, client: &Client) -> Api<DynamicObject> {
        Api::all_with(client.clone(), &self.resource())
    }
}

/// A merge patch of an object and its status, whether the status is a subresource or not.
pub async fn merge(client: &Client, kind: Kind, namespace: &str, name: &str, patch: &Value) -> kube::Result<()> {
    let api = kind.api(client, namespace);
    let (parameters, status) = (PatchParams::default(), json!({ "status": patch["status"] }));
    let mut rest = patch.clone();
    // The VMI has no status subresource (components/crds.go).
    let apart = kind != Kind::Vmi && !patch["status"].is_null();
    if apart {
        api.patch_status(name, &parameters, &Patch::Merge(&status)).await?;
        rest.as_object_mut().map(|rest| rest.remove("status"));
    }
    if rest.as_object().is_some_and(|rest| !rest.is_empty()) {
        api.patch(name, &parameters, &Patch::Merge(&rest)).await?;
    }
    Ok(())
}

/// What of `wanted` differs from `known`, for a merge patch; `None` if nothing does. `null` and missing are the same.
pub fn difference(known: &Value, wanted: &Value) -> Option<Value> {
    let object = wanted.as_object()?;
    let differs = object.iter().filter(|(name, value)| known[name.as_str()] != **value);
    let changed = differs.map(|(name, value)| (name.clone(), replacing(&known[name.as_str()], value)));
    let differing: serde_json::Map<_, _> = changed.collect();
    (!differing.is_empty()).then_some(Value::Object(differing))
}

/// A merge patch leaves names alone that it does not have: those that shall go are `null` in it.
fn replacing(known: &Value, wanted: &Value) -> Value {
    let mut wanted = wanted.clone();
    if let (Some(known), Some(wanted)) = (known.as_object(), wanted.as_object_mut()) {
        for name in known.keys() {
            wanted.entry(name.clone()).or_insert(Value::Null);
        }
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_written() {
        let known = json!({ "phase": "Running", "conditions": [] });
        assert_eq!(difference(&known, &json!({ "phase": "Running", "frozen": null })), None);
        assert_eq!(
            difference(&known, &json!({ "phase": "Failed", "conditions": [] })),
            Some(json!({ "phase": "Failed" }))
        );
    }
}
