//! Does one step at a time; each can be repeated.

use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Service};
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use watari_crds::kubevirt::VirtualMachine;
use watari_crds::names::{self, annotation, finalizer, label, role};
use watari_crds::pair::SyncPair;
use watari_crds::quantity;
use watari_crds::replica::{SyncReplica, SyncReplicaSpec};
use watari_crds::wiring::{VolumeMode, Wiring};
use watari_wire::control::ConfigureRequest;

use super::decide::{Furniture, Holding, Step};
use super::observe::Seen;
use super::{Error, pair_id, target_namespace};
use crate::answers::gone_is_fine;
use crate::apply::{apply, merging, set_finalizer};
use crate::authority;
use crate::configuration::{Disk, Sidecar as Configuration};
use crate::context::Context;
use crate::objects::{self, Claim};
use crate::replica::act::{delete, unfurnish};
use crate::replica::pod::{HeldDisk, Holder};
use crate::side::{self, act::Whose};
use crate::sidecar::Sidecar;

/// `peer` is the peer's client; without one no step concerns the peer.
pub async fn act(
    context: &Context,
    pair: &SyncPair,
    seen: &Seen,
    peer: Option<&Client>,
    step: &Step,
) -> Result<(), Error> {
    let namespace = pair.namespace().expect("a SyncPair is namespaced");
    let pairs = || Api::<SyncPair>::namespaced(context.client.clone(), &namespace);
    match step {
        Step::SetFinalizer => set_finalizer(&pairs(), pair, finalizer::PAIR, true).await?,
        Step::RemoveFinalizer => set_finalizer(&pairs(), pair, finalizer::PAIR, false).await?,
        Step::Furnish(furniture) => furnish(context, &namespace, pair, furniture).await?,
        Step::WireVm(wiring) => wire(context, &namespace, pair, Some(wiring)).await?,
        Step::UnwireVm => wire(context, &namespace, pair, None).await?,
        Step::ApplyReplica(spec) => apply_replica(pair, peer, spec).await?,
        Step::DeleteReplica => delete_replica(pair, peer).await?,
        Step::Configure => configure(context, &namespace, pair, seen).await?,
        Step::MakeHolder(holding) => {
            let object = holding.holder(pair, &context.settings.site).to_object(&context.settings);
            apply(&Api::<Pod>::namespaced(context.client.clone(), &namespace), &object).await?;
        }
        Step::EndHolder => {
            delete::<Pod>(context.client.clone(), &namespace, &names::replica_pod(&pair_id(pair))).await?;
        }
        Step::Cross(step) => {
            let id = pair_id(pair);
            let whose = Whose { namespace: &namespace, pair_id: &id, vm: &pair.spec.vm_name };
            side::act::act(context, whose, &seen.side, step).await?;
        }
        Step::Unfurnish => {
            let id = pair_id(pair);
            delete::<Pod>(context.client.clone(), &namespace, &names::replica_pod(&id)).await?;
            delete::<PersistentVolumeClaim>(context.client.clone(), &namespace, &names::metadata_claim(&id)).await?;
            unfurnish(context, &namespace, &id).await?;
        }
    }
    Ok(())
}

async fn furnish(context: &Context, namespace: &str, pair: &SyncPair, furniture: &Furniture) -> Result<(), Error> {
    let (id, vm) = (pair_id(pair), pair.spec.vm_name.as_str());
    authority::certify(context, namespace, &id, &furniture.peer_authorities).await?;
    let toml = configuration(pair, &context.settings.site, furniture).to_toml();
    let client = || context.client.clone();
    let (maps, services) =
        (Api::<ConfigMap>::namespaced(client(), namespace), Api::<Service>::namespaced(client(), namespace));
    context.applied.keep(&maps, &objects::configuration(&id, vm, &toml)).await?;
    context.applied.keep(&services, &objects::service(&id, vm)).await?;
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client(), namespace);
    let name = names::metadata_claim(&id);
    // A claim's specification cannot be changed, and one that exists is right.
    if claims.get_metadata_opt(&name).await?.is_none() {
        let claim = Claim {
            name: &name,
            pair_id: &id,
            vm,
            role: role::METADATA,
            bytes: furniture.metadata_bytes,
            mode: VolumeMode::Filesystem,
            access: furniture.access,
            class: furniture.class.as_deref(),
        };
        apply(&claims, &claim.to_object()).await?;
    }
    Ok(())
}

impl Holding {
    /// The Pod, with the same configuration as beside the VM.
    pub fn holder(&self, pair: &SyncPair, site: &str) -> Holder {
        let disk = |disk: &super::disks::Disk| HeldDisk {
            name: disk.name.clone(),
            claim: disk.claim.clone(),
            mode: disk.mode,
        };
        Holder {
            pair_id: pair_id(pair),
            vm: pair.spec.vm_name.clone(),
            toml: configuration(pair, site, &self.furniture).to_toml(),
            node_selector: self.node_selector.clone(),
            disks: self.furniture.disks.iter().map(disk).collect(),
        }
    }
}

fn configuration(pair: &SyncPair, site: &str, furniture: &Furniture) -> Configuration {
    // No size: the VM's disks exist, and the sidecar records what it finds.
    let disk = |disk: &super::disks::Disk| Disk { name: disk.name.clone(), mode: disk.mode, size_bytes: None };
    Configuration {
        site: site.to_owned(),
        pair_id: pair_id(pair),
        pair_name: format!("{}/{}", pair.namespace().unwrap_or_default(), pair.name_any()),
        disks: furniture.disks.iter().map(disk).collect(),
        interval: pair.spec.interval.into(),
        bandwidth: bandwidth(pair),
        retention_count: pair.spec.retention.count,
        retention_age: pair.spec.retention.age.map(Into::into),
        metadata_bytes: u64::try_from(furniture.metadata_bytes).unwrap_or_default(),
        peers: furniture.gateways.clone(),
    }
}

/// Bits per second. What is no quantity was refused by `decide`, and by the API server before.
fn bandwidth(pair: &SyncPair) -> Option<u64> {
    pair.spec.bandwidth.as_deref().and_then(|text| quantity::parse(text).ok())
}

/// A merge patch and not an apply: a VM that was deleted meanwhile must not be made of two fields.
async fn wire(context: &Context, namespace: &str, pair: &SyncPair, wiring: Option<&Wiring>) -> kube::Result<()> {
    let api: Api<VirtualMachine> = Api::namespaced(context.client.clone(), namespace);
    let id = wiring.map(|wiring| wiring.pair_id.clone());
    let patch = json!({ "spec": { "template": { "metadata": {
        "labels": { label::PAIR: id },
        "annotations": { annotation::WIRING: wiring.map(Wiring::to_annotation) },
    } } } });
    gone_is_fine(api.patch(&pair.spec.vm_name, &merging(), &Patch::Merge(patch)).await)
}

async fn apply_replica(pair: &SyncPair, peer: Option<&Client>, spec: &SyncReplicaSpec) -> Result<(), Error> {
    let Some(client) = peer else { return Ok(()) };
    let api: Api<SyncReplica> = Api::namespaced(client.clone(), &target_namespace(pair));
    let object = json!({
        "apiVersion": format!("{}/{}", names::GROUP, names::VERSION), "kind": "SyncReplica",
        "metadata": { "name": pair.name_any(), "labels": { label::PAIR: spec.pair_id, label::MANAGED: names::MANAGED_BY } },
        "spec": spec,
    });
    let parameters = PatchParams::apply(names::FIELD_MANAGER_FROM_HOME).force();
    let stored = api.patch(&pair.name_any(), &parameters, &Patch::Apply(&object)).await?;
    if stored.spec.of_the_home() != *spec {
        return Err(Error::PeerTooOld);
    }
    Ok(())
}

async fn delete_replica(pair: &SyncPair, peer: Option<&Client>) -> kube::Result<()> {
    let Some(client) = peer else { return Ok(()) };
    let api: Api<SyncReplica> = Api::namespaced(client.clone(), &target_namespace(pair));
    gone_is_fine(api.delete(&pair.name_any(), &DeleteParams::default()).await)
}

/// Settings that the running sidecar takes up without a restart. Repeating them changes nothing.
async fn configure(context: &Context, namespace: &str, pair: &SyncPair, seen: &Seen) -> Result<(), Error> {
    let Some(ip) = seen.side.launcher.as_ref().and_then(|pod| pod.ip.as_ref()) else { return Ok(()) };
    let interval: std::time::Duration = pair.spec.interval.into();
    let settings = ConfigureRequest {
        interval_millis: u64::try_from(interval.as_millis()).ok(),
        bandwidth_bits_per_second: Some(bandwidth(pair).unwrap_or(0)),
        paused: Some(pair.spec.paused),
        slow_down: None,
    };
    Sidecar::connect(context, namespace, &pair_id(pair), ip).await?.configure(settings).await?;
    Ok(())
}
