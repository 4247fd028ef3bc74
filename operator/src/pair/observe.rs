//! What there is of a pair, at both sites.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};
use watari_crds::card::SiteCard;
use watari_crds::kubevirt::VirtualMachine;
use watari_crds::names::{label, path};
use watari_crds::pair::SyncPair;
use watari_crds::peer::PeerCluster;
use watari_crds::replica::SyncReplica;
use watari_wire::report::Report;

use super::{pair_id, target_namespace};
use crate::context::Context;
use crate::peer::client::{self, peer_client};
use crate::peer::observe::{self as peer_observe, Seen as PeerSeen};
use crate::sidecar::Sidecar;
use crate::{authority, pair::Error};

/// All that a decision needs.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub peer: Peer,
    pub vm: Option<VirtualMachine>,
    /// By name, those of the VM's volumes.
    pub claims: BTreeMap<String, PersistentVolumeClaim>,
    pub replica: Replica,
    pub launcher: Option<Launcher>,
    pub report: Option<Report>,
    /// Why there is no report although the VM's sidecar runs.
    pub silence: Option<String>,
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

/// The VM's running virt-launcher Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launcher {
    pub name: String,
    /// Our container is in it.
    pub wired: bool,
    pub ip: Option<String>,
}

/// Errors are those of our own API server; whatever is wrong at the peer is in [`Seen`]. The client is the peer's, where it can be used.
pub async fn observe(context: &Context, pair: &SyncPair) -> Result<(Seen, Option<Client>), Error> {
    let namespace = pair.namespace().expect("a SyncPair is namespaced");
    let client = || context.client.clone();
    let peers: Api<PeerCluster> = Api::all(client());
    let vms: Api<VirtualMachine> = Api::namespaced(client(), &namespace);
    let mut seen = Seen {
        own_gateway: context.settings.gateway.clone(),
        vm: none_if_missing(vms.get(&pair.spec.vm_name).await)?,
        own_authorities: authority::authorities(context)
            .await?
            .bundle()
            .map_err(authority::Error::from)?
            .joined_with(&Default::default(), jiff::Timestamp::now()),
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
    seen.launcher = launcher(client(), &namespace, &pair.spec.vm_name).await?;
    let ip = seen.launcher.as_ref().filter(|pod| pod.wired).and_then(|pod| pod.ip.clone());
    if let Some(ip) = ip {
        let ask = async { Sidecar::connect(context, &namespace, &pair_id(pair), &ip).await?.report().await };
        match ask.await {
            Ok(report) => seen.report = Some(report),
            Err(error) => seen.silence = Some(error.to_string()),
        }
    }
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

/// Also where the kind itself is not installed.
fn none_if_missing<T>(result: kube::Result<T>) -> kube::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(error) => Err(error),
    }
}

/// KubeVirt's label of a launcher Pod, and its annotation with the VMI's name (`template.go`).
async fn launcher(client: Client, namespace: &str, vm: &str) -> kube::Result<Option<Launcher>> {
    let pods: Api<Pod> = Api::namespaced(client, namespace);
    let list = pods.list(&ListParams::default().labels("kubevirt.io=virt-launcher")).await?;
    let of_vm = |pod: &Pod| pod.annotations().get("kubevirt.io/domain").is_some_and(|name| name == vm);
    let phase = |pod: &Pod| pod.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default();
    let running = list.into_iter().find(|pod| of_vm(pod) && matches!(phase(pod).as_str(), "Pending" | "Running"));
    Ok(running.map(|pod| {
        let spec = pod.spec.clone().unwrap_or_default();
        let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
        Launcher {
            name: pod.name_any(),
            wired: pod.labels().contains_key(label::PAIR)
                && containers.into_iter().any(|it| it.name == path::CONTAINER),
            ip: pod.status.and_then(|status| status.pod_ip),
        }
    }))
}
