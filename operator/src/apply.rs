//! Server-side apply, the one way in which the operator writes objects: the body holds our fields only, whatever else an object
//! has stays.

use std::fmt::Debug;

use kube::Api;
use kube::api::{Patch, PatchParams};
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
