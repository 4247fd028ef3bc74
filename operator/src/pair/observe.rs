//! What there is of a pair, at both sites.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::{Api, Client, ResourceExt};
use watari_crds::card::SiteCard;
use watari_crds::kubevirt::VirtualMachine;
use watari_crds::names;
use watari_crds::pair::SyncPair;
use watari_crds::peer::PeerCluster;
use watari_crds::replica::SyncReplica;

use super::{pair_id, target_namespace};
use crate::context::Context;
use crate::peer::client::{self, peer_client};
use crate::peer::observe::{self as peer_observe, Seen as PeerSeen};
use crate::replica::observe::{PodSeen, pod_seen};
use crate::side::{self, observe::Side};
use crate::{authority, pair::Error};

/// All that a decision needs.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub peer: Peer,
    pub vm: Option<VirtualMachine>,
    /// By name, those of the VM's volumes.
    pub claims: BTreeMap<String, PersistentVolumeClaim>,
    pub replica: Replica,
    /// The VM here, and the sidecar that has the folder.
    pub side: Side,
    /// Our own Pod that holds the folder while the VM is not here.
    pub holder: Option<PodSeen>,
    pub now: Timestamp,
    /// Certificates of our own authorities, for the peer.
    pub own_authorities: String,
    /// `host:port` of our own gateway; empty: there is none.
    pub own_gateway: String,
}

/// The peer, as far as it can be used.
#[derive(Clone, Debug, Default)]
pub enum Peer {
    /// There is no PeerCluster of that name.
    #[default]
    Missing,
    /// It cannot be used now; the words say why.
    Unusable(String),
    Usable(Box<Usable>),
}

#[derive(Clone, Debug)]
pub struct Usable {
    pub cluster: PeerCluster,
    pub card: SiteCard,
}

/// The SyncReplica at the peer.
#[derive(Clone, Debug, Default)]
pub enum Replica {
    /// The peer could not be asked.
    #[default]
    Unknown,
    None,
    Found(Box<SyncReplica>),
}

/// Errors are those of our own API server; whatever is wrong at the peer is in [`Seen`]. The client is the peer's, where it can be used.
pub async fn observe(context: &Context, pair: &SyncPair) -> Result<(Seen, Option<Client>), Error> {
    let namespace = pair.namespace().expect("a SyncPair is namespaced");
    let client = || context.client.clone();
    let peers: Api<PeerCluster> = Api::all(client());
    let side = side::observe::observe(context, &namespace, &pair_id(pair), &pair.spec.vm_name).await?;
    let mut seen = Seen {
        own_gateway: context.settings.gateway.clone(),
        vm: side.vm.clone().and_then(|vm| serde_json::from_value(vm).ok()),
        side,
        now: Timestamp::now(),
        own_authorities: authority::authorities(context)
            .await?
            .bundle()
            .map_err(authority::Error::from)?
            .joined_with(&Default::default(), Timestamp::now()),
        ..Seen::default()
    };
    let mut peer_client = None;
    if let Some(cluster) = peers.get_opt(&pair.spec.peer).await? {
        (seen.peer, peer_client) = peer(context, cluster).await?;
    }
    if let Some(client) = &peer_client {
        let replicas: Api<SyncReplica> = Api::namespaced(client.clone(), &target_namespace(pair));
        seen.replica = match replicas.get_opt(&pair.name_any()).await {
            Ok(Some(found)) => Replica::Found(Box::new(found)),
            Ok(None) => Replica::None,
            Err(error) => {
                tracing::info!(%error, "the peer did not answer");
                Replica::Unknown
            }
        };
    }
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client(), &namespace);
    let volumes = seen.vm.iter().flat_map(|vm| &vm.spec.template.spec.volumes);
    for name in volumes.filter_map(|volume| volume.claim()).map(str::to_owned).collect::<Vec<_>>() {
        if let Some(claim) = claims.get_opt(&name).await? {
            seen.claims.insert(name, claim);
        }
    }
    let pods: Api<Pod> = Api::namespaced(client(), &namespace);
    seen.holder = pods.get_opt(&names::replica_pod(&pair_id(pair))).await?.map(|pod| pod_seen(&pod));
    Ok((seen, peer_client))
}

async fn peer(context: &Context, cluster: PeerCluster) -> kube::Result<(Peer, Option<Client>)> {
    let client = match peer_client(context, &cluster).await {
        Ok(client) => client,
        Err(client::Error::Kubeconfig(why)) => return Ok((Peer::Unusable(why), None)),
        Err(client::Error::Api(error)) => return Err(error),
    };
    Ok(match peer_observe::card(client.clone(), &cluster.spec.operator_namespace).await {
        PeerSeen::NoKubeconfig(why) | PeerSeen::Unreachable(why) | PeerSeen::Silent { why, .. } => {
            (Peer::Unusable(why), None)
        }
        PeerSeen::Card { card, .. } if card.site != cluster.spec.site || card.site == context.settings.site => {
            (Peer::Unusable(format!("The peer calls itself {:?}.", card.site)), None)
        }
        PeerSeen::Card { card, .. } => (Peer::Usable(Box::new(Usable { cluster, card: *card })), Some(client)),
    })
}
