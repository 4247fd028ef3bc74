//! Server-side apply, the way in which the operator writes objects: the body holds our fields only, whatever else an object
//! has stays. The exception is the list of finalizers.

use std::fmt::Debug;

use kube::api::{Patch, PatchParams};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::Value;
use watari_crds::names;

/// Applies `object` (with `apiVersion`, `kind`, `metadata.name`) and answers what is stored.
///
/// It takes fields from other writers: what we name is ours. Errors are the API server's.
pub async fn apply<K>(api: &Api<K>, object: &Value) -> kube::Result<K>
where
    K: Clone + DeserializeOwned + Debug,
{
    let name = object["metadata"]["name"].as_str().expect("every object that we make has a name");
    api.patch(name, &PatchParams::apply(names::FIELD_MANAGER).force(), &Patch::Apply(object)).await
}

/// Applies `status` to the status subresource.
pub async fn apply_status<K>(api: &Api<K>, kind: &str, name: &str, status: &impl serde::Serialize) -> kube::Result<()>
where
    K: Clone + DeserializeOwned + Debug,
{
    let version = format!("{}/{}", names::GROUP, names::VERSION);
    let object =
        serde_json::json!({ "apiVersion": version, "kind": kind, "metadata": { "name": name }, "status": status });
    api.patch_status(name, &PatchParams::apply(names::FIELD_MANAGER).force(), &Patch::Apply(&object)).await?;
    Ok(())
}

/// For a merge patch of ours: of an object that must not be made of our fields alone.
pub fn merging() -> PatchParams {
    PatchParams { field_manager: Some(names::FIELD_MANAGER.to_owned()), ..PatchParams::default() }
}

/// Puts our finalizer on `object`, or takes it off; the others of the list stay.
pub async fn set_finalizer<K>(api: &Api<K>, object: &K, finalizer: &str, wanted: bool) -> kube::Result<()>
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    let mut list: Vec<&str> = object.finalizers().iter().map(String::as_str).filter(|it| *it != finalizer).collect();
    if wanted {
        list.push(finalizer);
    }
    // The version makes it fail when somebody else changed the list meanwhile.
    let metadata = serde_json::json!({ "finalizers": list, "resourceVersion": object.resource_version() });
    let patch = serde_json::json!({ "metadata": metadata });
    api.patch(&object.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await?;
    Ok(())
}
