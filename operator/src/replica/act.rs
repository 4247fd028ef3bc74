//! Does one step at a time; each can be repeated.

use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Secret, Service};
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use watari_crds::names::{self, finalizer, role};
use watari_crds::replica::SyncReplica;
use watari_crds::wiring::VolumeMode;

use super::{Error, api, decide::Step, pod};
use crate::answers::gone_is_fine;
use crate::apply::{apply, set_finalizer};
use crate::authority;
use crate::context::Context;
use crate::objects::{self, Claim};

pub async fn act(context: &Context, replica: &SyncReplica, step: &Step) -> Result<(), Error> {
    let namespace = replica.namespace().expect("a SyncReplica is namespaced");
    let client = || context.client.clone();
    match step {
        Step::SetFinalizer => set_finalizer(&api(context, replica), replica, finalizer::REPLICA, true).await?,
        Step::Furnish => furnish(context, &namespace, replica).await?,
        Step::MakeClaim(name) => {
            apply(&Api::<PersistentVolumeClaim>::namespaced(client(), &namespace), &claim(replica, name)).await?;
        }
        Step::MakePod => {
            let object = pod::Holder::of(&replica.spec).to_object(&context.settings);
            apply(&Api::<Pod>::namespaced(client(), &namespace), &object).await?;
        }
        Step::DeletePod => delete::<Pod>(client(), &namespace, &names::replica_pod(&replica.spec.pair_id)).await?,
        Step::DeleteClaim(name) => delete_claim(client(), &namespace, replica, name).await?,
        Step::Unfurnish => unfurnish(context, &namespace, &replica.spec.pair_id).await?,
    }
    Ok(())
}

async fn furnish(context: &Context, namespace: &str, replica: &SyncReplica) -> Result<(), Error> {
    let spec = &replica.spec;
    authority::certify(context, namespace, &spec.pair_id, &spec.home_authorities).await?;
    let toml = pod::configuration(spec).to_toml();
    let configuration = objects::configuration(&spec.pair_id, &spec.vm_name, &toml);
    context.applied.keep(&Api::<ConfigMap>::namespaced(context.client.clone(), namespace), &configuration).await?;
    let service = objects::service(&spec.pair_id, &spec.vm_name);
    context.applied.keep(&Api::<Service>::namespaced(context.client.clone(), namespace), &service).await?;
    Ok(())
}

fn claim(replica: &SyncReplica, name: &str) -> serde_json::Value {
    let spec = &replica.spec;
    let (pair_id, vm) = (spec.pair_id.as_str(), spec.vm_name.as_str());
    let claim = match spec.disks.iter().find(|disk| disk.claim == name) {
        Some(disk) => Claim {
            name,
            pair_id,
            vm,
            role: role::DATA,
            bytes: disk.claim_bytes,
            mode: disk.mode,
            access: disk.access,
            class: disk.storage_class.as_deref(),
        },
        None => Claim {
            name,
            pair_id,
            vm,
            role: role::METADATA,
            bytes: spec.metadata.size_bytes,
            mode: VolumeMode::Filesystem,
            access: spec.metadata.access,
            class: spec.metadata.storage_class.as_deref(),
        },
    };
    claim.to_object()
}

/// Deletes the very claim that was made, and no other that has taken its name since.
async fn delete_claim(client: Client, namespace: &str, replica: &SyncReplica, name: &str) -> kube::Result<()> {
    let made = replica.status.as_ref().and_then(|status| status.claims.get(name).cloned());
    let preconditions = made.map(|uid| Preconditions { uid: Some(uid), resource_version: None });
    let parameters = DeleteParams { preconditions, ..DeleteParams::default() };
    let api: Api<PersistentVolumeClaim> = Api::namespaced(client, namespace);
    gone_is_fine(api.delete(name, &parameters).await)
}

/// Secret, ConfigMap and Service of a pair at this site.
pub async fn unfurnish(context: &Context, namespace: &str, pair_id: &str) -> kube::Result<()> {
    context.applied.forget();
    let client = context.client.clone();
    delete::<Service>(client.clone(), namespace, &names::service(pair_id)).await?;
    delete::<ConfigMap>(client.clone(), namespace, &names::configuration(pair_id)).await?;
    delete::<Secret>(client, namespace, &names::certificate_secret(pair_id)).await
}

/// Deletes an object that may be gone already.
pub async fn delete<K>(client: Client, namespace: &str, name: &str) -> kube::Result<()>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
{
    gone_is_fine(Api::<K>::namespaced(client, namespace).delete(name, &DeleteParams::default()).await)
}
