//! What there is of a replica at this site.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::{Api, ResourceExt};
use watari_crds::names::{self, label};
use watari_crds::replica::SyncReplica;

use super::pod;
use crate::context::Context;
use crate::side::{self, observe::Side};

/// All that a decision needs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// By name: all claims that the replica has or should have.
    pub claims: BTreeMap<String, ClaimSeen>,
    pub pod: Option<PodSeen>,
    /// The VM here, and the sidecar that has the folder.
    pub side: Side,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimSeen {
    pub uid: String,
    /// It carries the label of this pair.
    pub ours: bool,
    pub deleting: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSeen {
    pub phase: String,
    pub ready: bool,
    pub deleting: bool,
    pub node: Option<String>,
    /// What it was made from ([`pod::MADE_FROM`]).
    pub made_from: String,
    /// Why it does not start, in Kubernetes' words.
    pub waiting: Option<String>,
}

impl PodSeen {
    pub fn has_ended(&self) -> bool {
        matches!(self.phase.as_str(), "Failed" | "Succeeded")
    }
}

/// Names of all claims of a replica: its disks in order, then the metadata claim.
pub fn claim_names(replica: &SyncReplica) -> Vec<String> {
    let disks = replica.spec.disks.iter().map(|disk| disk.claim.clone());
    disks.chain([names::metadata_claim(&replica.spec.pair_id)]).collect()
}

pub async fn observe(context: &Context, replica: &SyncReplica) -> kube::Result<Seen> {
    let namespace = replica.namespace().expect("a SyncReplica is namespaced");
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(context.client.clone(), &namespace);
    let pods: Api<Pod> = Api::namespaced(context.client.clone(), &namespace);
    let mut seen = Seen::default();
    for name in claim_names(replica) {
        if let Some(claim) = claims.get_opt(&name).await? {
            seen.claims.insert(name, claim_seen(&claim, &replica.spec.pair_id));
        }
    }
    seen.pod = pods.get_opt(&names::replica_pod(&replica.spec.pair_id)).await?.map(|pod| pod_seen(&pod));
    seen.side = side::observe::observe(context, &namespace, &replica.spec.pair_id, &replica.spec.vm_name).await?;
    Ok(seen)
}

fn claim_seen(claim: &PersistentVolumeClaim, pair_id: &str) -> ClaimSeen {
    ClaimSeen {
        uid: claim.uid().unwrap_or_default(),
        ours: claim.labels().get(label::PAIR).is_some_and(|id| id == pair_id),
        deleting: claim.metadata.deletion_timestamp.is_some(),
    }
}

/// Also of the Pod of this kind at the home.
pub fn pod_seen(found: &Pod) -> PodSeen {
    let status = found.status.clone().unwrap_or_default();
    let ready =
        |condition: &k8s_openapi::api::core::v1::PodCondition| condition.type_ == "Ready" && condition.status == "True";
    let containers = status.container_statuses.clone().unwrap_or_default();
    let waiting = containers.into_iter().find_map(|container| container.state?.waiting);
    PodSeen {
        ready: status.conditions.iter().flatten().any(ready),
        waiting: waiting.map(|it| [it.reason, it.message].into_iter().flatten().collect::<Vec<_>>().join(": ")),
        phase: status.phase.unwrap_or_default(),
        deleting: found.metadata.deletion_timestamp.is_some(),
        node: found.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        made_from: found.annotations().get(pod::MADE_FROM).cloned().unwrap_or_default(),
    }
}
