//! Server-side apply, the way in which the operator writes objects: the body holds our fields only, whatever else an object
//! has stays. The exception is the list of finalizers.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

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

/// What was applied lately, so that what must be there at each look is not sent at each look.
#[derive(Clone, Debug, Default)]
pub struct Applied(Arc<Mutex<HashMap<[u8; 32], Instant>>>);

/// Sent again after so long, since somebody may have changed it or taken it away.
const AGAIN: Duration = Duration::from_secs(60);

impl Applied {
    /// As [`apply`], unless the same was applied lately.
    pub async fn keep<K>(&self, api: &Api<K>, object: &Value) -> kube::Result<()>
    where
        K: Resource + Clone + DeserializeOwned + Debug,
    {
        let digest = *blake3::hash(format!("{} {object}", api.resource_url()).as_bytes()).as_bytes();
        if self.is_fresh(&digest, Instant::now()) {
            return Ok(());
        }
        apply(api, object).await?;
        self.remember(digest, Instant::now());
        Ok(())
    }

    /// Something was deleted: nothing is taken for granted any more.
    pub fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn is_fresh(&self, digest: &[u8; 32], now: Instant) -> bool {
        let applied = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        applied.get(digest).is_some_and(|then| now.duration_since(*then) < AGAIN)
    }

    fn remember(&self, digest: [u8; 32], now: Instant) {
        let mut applied = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        applied.retain(|_, then| now.duration_since(*then) < AGAIN);
        applied.insert(digest, now);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_applied_lately_is_taken_for_granted_until_it_is_old_or_something_was_deleted() {
        let (applied, then) = (Applied::default(), Instant::now());
        applied.remember([1; 32], then);
        assert!(applied.is_fresh(&[1; 32], then) && !applied.is_fresh(&[2; 32], then));
        assert!(!applied.is_fresh(&[1; 32], then + AGAIN));
        applied.remember([2; 32], then + AGAIN);
        assert_eq!(applied.0.lock().map(|all| all.len()).unwrap_or_default(), 1, "what is old is not kept");
        applied.forget();
        assert!(!applied.is_fresh(&[2; 32], then + AGAIN));
    }
}
