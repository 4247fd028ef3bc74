//! The storage driver of the clusters: gives each claim of our two classes a volume, takes it away after the claim.
//!
//! | class | access | binding | where |
//! | --- | --- | --- | --- |
//! | `watari-local` | ReadWriteOnce, ReadWriteOncePod | when a Pod is scheduled | the node of that Pod |
//! | `watari-shared` | also ReadWriteMany | at once | every node of the cluster |
//!
//! Both in Filesystem and Block mode. Observe (watches), decide (pure, [`decide`]), act. It acts again after whatever interrupted it:
//! a volume is made before its object, and removed before its object is.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use crate::folders::VOLUMES_IN_NODE;
use crate::volumes;

/// What claims name us by.
pub const PROVISIONER: &str = "watari.internal/volumes";
/// Volumes of one node.
pub const LOCAL_CLASS: &str = "watari-local";
/// Volumes that all nodes of a cluster share.
pub const SHARED_CLASS: &str = "watari-shared";
/// Who writes our objects.
const MANAGER: &str = "watari-clusters";
/// Set by Kubernetes on a claim that is ours to serve, once it is time.
const WANTED_FROM: &str = "volume.kubernetes.io/storage-provisioner";
/// Set by the scheduler on a claim of a class that waits for its consumer.
const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
/// Tells Kubernetes that the volume is deleted by us, not by it.
const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";
/// Changes of objects that are looked at together.
const CHANGES_AT_ONCE: usize = 256;
/// Between two attempts after a failure.
const RETRY: Duration = Duration::from_secs(2);

/// Why a cluster's volumes are not served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error(transparent)]
    Volume(#[from] volumes::Error),
    #[error("watching the claims: {0}")]
    Watch(#[from] watcher::Error),
    #[error("{0} is no size")]
    Size(String),
}

/// How a volume is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Where {
    Node(String),
    Everywhere,
}

/// The next thing to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Provision {
        volume: String,
        namespace: String,
        claim: String,
        uid: String,
        class: String,
        place: Where,
        block: bool,
        size: String,
        modes: Vec<String>,
    },
    Remove {
        volume: String,
    },
}

/// What claims and volumes call for.
pub fn decide(claims: &[PersistentVolumeClaim], present: &[PersistentVolume]) -> Vec<Action> {
    let wanted = claims.iter().filter_map(provision).filter(|action| match action {
        Action::Provision { volume, .. } => present.iter().all(|known| known.name_any() != *volume),
        Action::Remove { .. } => false,
    });
    let released = present.iter().filter(|volume| {
        let status = volume.status.as_ref().and_then(|status| status.phase.as_deref());
        let policy = volume.spec.as_ref().and_then(|spec| spec.persistent_volume_reclaim_policy.as_deref());
        volume.annotations().get(PROVISIONED_BY).is_some_and(|by| by == PROVISIONER)
            && (status == Some("Released") && policy == Some("Delete")
                || volume.metadata.deletion_timestamp.is_some() && status != Some("Bound"))
    });
    wanted.chain(released.map(|volume| Action::Remove { volume: volume.name_any() })).collect()
}

/// The volume that a claim waits for, if it waits for us.
fn provision(claim: &PersistentVolumeClaim) -> Option<Action> {
    let spec = claim.spec.as_ref()?;
    let annotation = |name: &str| claim.annotations().get(name).cloned();
    let served = annotation(WANTED_FROM)? == PROVISIONER && spec.volume_name.as_deref().unwrap_or_default().is_empty();
    if !served || claim.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let class = spec.storage_class_name.clone()?;
    let modes = spec.access_modes.clone().unwrap_or_default();
    let place = match class.as_str() {
        LOCAL_CLASS if modes.iter().all(|mode| mode != "ReadWriteMany") => Where::Node(annotation(SELECTED_NODE)?),
        SHARED_CLASS => Where::Everywhere,
        _ => return None,
    };
    let uid = claim.uid()?;
    Some(Action::Provision {
        volume: format!("pvc-{uid}"),
        namespace: claim.namespace()?,
        claim: claim.name_any(),
        uid,
        class,
        place,
        block: spec.volume_mode.as_deref() == Some("Block"),
        size: spec.resources.as_ref()?.requests.as_ref()?.get("storage")?.0.clone(),
        modes,
    })
}

/// Bytes of a Kubernetes quantity as claims use them: a whole number, with a suffix of a power of 1000 or 1024 or none.
pub fn bytes(quantity: &str) -> Result<u64, Error> {
    const UNITS: [(&str, u64); 8] = [
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
    ];
    let (digits, unit) =
        UNITS.iter().find_map(|(suffix, unit)| Some((quantity.strip_suffix(suffix)?, *unit))).unwrap_or((quantity, 1));
    let number: Option<u64> = digits.parse().ok();
    number.and_then(|number| number.checked_mul(unit)).ok_or_else(|| Error::Size(quantity.to_owned()))
}

/// One cluster's driver.
pub struct Provisioner {
    pub client: Client,
    /// The cluster's folder of volumes.
    pub volumes: PathBuf,
}

impl Provisioner {
    /// Serves for ever; errors are logged and tried again.
    pub async fn run(self) {
        loop {
            if let Err(error) = self.serve().await {
                tracing::warn!(volumes = %self.volumes.display(), %error, "volumes are not served; trying again");
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn serve(&self) -> Result<(), Error> {
        self.classes().await?;
        let claims: Api<PersistentVolumeClaim> = Api::all(self.client.clone());
        let present: Api<PersistentVolume> = Api::all(self.client.clone());
        let changes = stream::select(
            watcher(claims.clone(), watcher::Config::default()).touched_objects().map(|change| change.map(drop)),
            watcher(present.clone(), watcher::Config::default()).touched_objects().map(|change| change.map(drop)),
        );
        // Changes that came while one was handled are handled as one.
        let mut changes = pin!(changes.ready_chunks(CHANGES_AT_ONCE));
        while let Some(batch) = changes.next().await {
            batch.into_iter().collect::<Result<(), _>>()?;
            let everything = ListParams::default();
            let (claims, present) = (claims.list(&everything).await?.items, present.list(&everything).await?.items);
            for action in decide(&claims, &present) {
                self.act(action).await?;
            }
        }
        Ok(())
    }

    async fn classes(&self) -> Result<(), Error> {
        let api: Api<StorageClass> = Api::all(self.client.clone());
        for (name, binding) in [(LOCAL_CLASS, "WaitForFirstConsumer"), (SHARED_CLASS, "Immediate")] {
            let default = (name == LOCAL_CLASS).to_string();
            let class = json!({
                "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass",
                "metadata": { "name": name, "annotations": { "storageclass.kubernetes.io/is-default-class": default } },
                "provisioner": PROVISIONER, "volumeBindingMode": binding, "reclaimPolicy": "Delete",
            });
            api.patch(name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(class)).await?;
        }
        Ok(())
    }

    async fn act(&self, action: Action) -> Result<(), Error> {
        tracing::info!(?action, "volume");
        let api: Api<PersistentVolume> = Api::all(self.client.clone());
        match &action {
            Action::Provision { volume, block, size, .. } => {
                match block {
                    true => volumes::create_device(&self.volumes, volume, bytes(size)?)?,
                    false => volumes::create_folder(&self.volumes, volume)?,
                }
                match api.create(&PostParams::default(), &object(&action)).await {
                    // Made by a change that was handled a moment ago.
                    Err(kube::Error::Api(status)) if status.code == 409 => {}
                    result => drop(result?),
                }
            }
            Action::Remove { volume } => {
                volumes::delete(&self.volumes, volume)?;
                match api.delete(volume, &DeleteParams::default()).await {
                    Err(kube::Error::Api(status)) if status.code == 404 => {}
                    result => drop(result?),
                }
            }
        }
        Ok(())
    }
}

/// The volume's object. Of type `local` in either class: kubelet then treats its ownership as that of any other driver's.
fn object(action: &Action) -> PersistentVolume {
    let Action::Provision { volume, namespace, claim, uid, class, place, block, size, modes } = action else {
        unreachable!("only asked for what is to be provisioned")
    };
    let (key, value) = match place {
        Where::Node(node) => ("kubernetes.io/hostname", node.as_str()),
        // A local volume must say where it is; this label is on every node.
        Where::Everywhere => ("kubernetes.io/os", "linux"),
    };
    let object = json!({
        "metadata": { "name": volume, "annotations": { PROVISIONED_BY: PROVISIONER } },
        "spec": {
            "capacity": BTreeMap::from([("storage", Quantity(size.clone()))]),
            "accessModes": modes,
            "volumeMode": if *block { "Block" } else { "Filesystem" },
            "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": class,
            "claimRef": { "apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": namespace, "name": claim, "uid": uid },
            "local": { "path": format!("{VOLUMES_IN_NODE}/{volume}") },
            "nodeAffinity": { "required": { "nodeSelectorTerms": [{ "matchExpressions": [{ "key": key, "operator": "In", "values": [value] }] }] } },
        },
    });
    serde_json::from_value(object).expect("the object has the shape of its type")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(class: &str, annotations: &[(&str, &str)], modes: &[&str]) -> PersistentVolumeClaim {
        let annotations: BTreeMap<_, _> = annotations.iter().copied().collect();
        serde_json::from_value(json!({
            "metadata": { "name": "data", "namespace": "n", "uid": "1", "annotations": annotations },
            "spec": { "storageClassName": class, "accessModes": modes, "resources": { "requests": { "storage": "1Gi" } } },
        }))
        .unwrap()
    }

    fn volume(phase: &str, by: &str, policy: &str) -> PersistentVolume {
        serde_json::from_value(json!({
            "metadata": { "name": "pvc-1", "annotations": { PROVISIONED_BY: by } },
            "spec": { "persistentVolumeReclaimPolicy": policy },
            "status": { "phase": phase },
        }))
        .unwrap()
    }

    const OURS: (&str, &str) = (WANTED_FROM, PROVISIONER);

    #[test]
    fn a_claim_is_served_when_it_is_time_and_only_once() {
        let shared = claim(SHARED_CLASS, &[OURS], &["ReadWriteMany"]);
        assert_eq!(decide(std::slice::from_ref(&shared), &[]).len(), 1);
        assert_eq!(decide(&[shared], &[volume("Available", PROVISIONER, "Delete")]), []);
        assert_eq!(decide(&[claim(SHARED_CLASS, &[], &["ReadWriteMany"])], &[]), [], "Kubernetes has not asked yet");
        assert_eq!(decide(&[claim(SHARED_CLASS, &[(WANTED_FROM, "other.example")], &[])], &[]), [], "somebody else's");
    }

    #[test]
    fn a_local_claim_waits_for_the_node_of_its_pod() {
        assert_eq!(decide(&[claim(LOCAL_CLASS, &[OURS], &["ReadWriteOnce"])], &[]), []);
        let placed = claim(LOCAL_CLASS, &[OURS, (SELECTED_NODE, "a-1")], &["ReadWriteOnce"]);
        let actions = decide(&[placed], &[]);
        let [Action::Provision { place, volume, .. }] = actions.as_slice() else { panic!("{actions:?}") };
        assert_eq!((place, volume.as_str()), (&Where::Node("a-1".into()), "pvc-1"));
    }

    #[test]
    fn a_local_claim_cannot_be_shared_between_nodes() {
        let claim = claim(LOCAL_CLASS, &[OURS, (SELECTED_NODE, "a-1")], &["ReadWriteMany"]);
        assert_eq!(decide(&[claim], &[]), []);
    }

    #[test]
    fn only_released_volumes_of_ours_are_removed() {
        let removed = |volume| decide(&[], &[volume]).len();
        assert_eq!(removed(volume("Released", PROVISIONER, "Delete")), 1);
        assert_eq!(removed(volume("Bound", PROVISIONER, "Delete")), 0);
        assert_eq!(removed(volume("Released", PROVISIONER, "Retain")), 0);
        assert_eq!(removed(volume("Released", "other.example", "Delete")), 0);
    }

    #[test]
    fn sizes_are_understood_or_refused() {
        assert_eq!(bytes("64Mi").unwrap(), 64 << 20);
        assert_eq!(bytes("1G").unwrap(), 1_000_000_000);
        assert_eq!(bytes("4096").unwrap(), 4096);
        for nonsense in ["", "Gi", "1.5Gi", "-1", "99999999999Ti"] {
            assert!(bytes(nonsense).is_err(), "{nonsense}");
        }
    }
}
