//! The loop that plays virt-controller, virt-handler, virt-operator and the synchronization controller of one cluster: observe (a list
//! of each kind, a question to each launcher), decide ([`crate::vm`], [`crate::vmi`], [`crate::migration`], all pure), act.
//!
//! It looks twice a second instead of watching: it is a stand-in. Whatever fails is logged and tried again at the next look.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures::future::join_all;
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod};
use kube::api::ListParams;
use kube::{Api, Client};
use serde_json::Value;
use tokio::sync::watch;
use watari_clusters::provision::bytes;

use crate::act::{self, Cluster};
use crate::ca::{self, NAMESPACE, SYNC_NAME};
use crate::migration::{self, Peer, Phase, Role, Seen};
use crate::objects::{Kind, difference, merge};
use crate::quirks::Quirks;
use crate::render::{self, ClaimVolume};
use crate::seen::{PodSeen, current_pod, is_deleting, is_final, phase, uid};
use crate::sync::{self, Board, Message, Side, Trust};
use crate::talk::{self, Request};
use crate::{crds, subresources, vm, vmi};

const POLL: Duration = Duration::from_millis(500);
/// virt-operator's: how long what is not kept by the merge lives in the bundle.
const RECONCILE_CA: Duration = Duration::from_secs(5);
/// A VMIM that is deleted waits this long for its peer to be told.
const PEER_PATIENCE_SECONDS: i64 = 30;

/// Why a pass could not be finished; the next one tries again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error(transparent)]
    Render(#[from] render::Error),
    #[error(transparent)]
    Size(#[from] watari_clusters::provision::Error),
    #[error(transparent)]
    Ca(#[from] ca::Error),
    #[error("{0}")]
    Json(#[from] serde_json::Error),
}

/// One cluster's controller.
pub struct Controller {
    cluster: Cluster,
    board: Board,
    trust: watch::Sender<Option<Trust>>,
    /// Where other clusters' controllers find this one.
    address: String,
}

/// One look at the whole cluster.
#[derive(Default)]
struct World {
    vms: Vec<Value>,
    vmis: Vec<Value>,
    vmims: Vec<Value>,
    pods: Vec<PodSeen>,
    nodes: usize,
}

impl Controller {
    /// `address` is this Pod's own.
    pub fn new(client: Client, launcher_image: impl Into<String>, address: &str) -> Controller {
        let address = format!("{address}:{}", sync::SYNC_PORT);
        let cluster = Cluster { client, launcher_image: launcher_image.into() };
        Controller { cluster, board: Board::default(), trust: watch::Sender::new(None), address }
    }

    /// For ever. Ends only if it cannot begin.
    pub async fn run(&self) -> Result<(), Error> {
        let client = &self.cluster.client;
        crds::apply(client).await?;
        crds::apply_kubevirt(client, &self.address).await?;
        let certificate = self.reconcile_ca(None).await?;
        tokio::spawn(subresources::serve(client.clone(), self.trust.subscribe()));
        tokio::spawn(sync::serve(self.board.clone(), self.trust.subscribe()));
        tokio::spawn(sync::call(self.board.clone(), self.trust.subscribe()));
        let mut reconciled = Instant::now();
        let mut known = certificate;
        loop {
            if let Err(error) = self.pass().await {
                tracing::warn!(%error, "trying again");
            }
            if reconciled.elapsed() > RECONCILE_CA {
                match self.reconcile_ca(Some(&known)).await {
                    Ok(certificate) => known = certificate,
                    Err(error) => tracing::warn!(%error, "certificates: trying again"),
                }
                reconciled = Instant::now();
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// virt-operator's part; answers the controller's own certificate, renewed with the authority.
    async fn reconcile_ca(&self, known: Option<&ca::Pair>) -> Result<ca::Pair, Error> {
        let client = &self.cluster.client;
        let kubevirt = Kind::KubeVirt.api(client, NAMESPACE).get("kubevirt").await?;
        let (authority, bundle) = ca::reconcile(client, &serde_json::to_value(&kubevirt)?).await?;
        let trusted = self.trust.borrow().clone();
        let first = |bundle: &str| bundle.starts_with(authority.certificate());
        let own = match (known, trusted.filter(|trust| first(&trust.bundle))) {
            (Some(known), Some(_)) => known.clone(),
            _ => {
                let name = format!("kubevirt.io:system:node:{SYNC_NAME}");
                authority.issue(&name, &[SYNC_NAME.into(), format!("virt-api.{NAMESPACE}.svc")])?
            }
        };
        act::register(client, &authority).await?;
        self.trust.send_replace(Some(Trust { own: own.clone(), bundle }));
        Ok(own)
    }

    async fn pass(&self) -> Result<(), Error> {
        let world = self.observe().await?;
        for vm in &world.vms {
            logged(vm, self.vm(vm, &world).await);
        }
        for vmi in &world.vmis {
            logged(vmi, self.vmi(vmi, &world).await);
        }
        let mut known = BTreeSet::new();
        for vmim in &world.vmims {
            known.extend(key_of(vmim));
            logged(vmim, self.vmim(vmim, &world).await);
        }
        self.board.keep(&known);
        Ok(())
    }

    async fn observe(&self) -> Result<World, Error> {
        let client = &self.cluster.client;
        let list = async |kind: Kind| -> Result<Vec<Value>, Error> {
            let items = kind.everywhere(client).list(&ListParams::default()).await?.items;
            Ok(items.iter().map(serde_json::to_value).collect::<Result<_, _>>()?)
        };
        let launchers = ListParams::default().labels("kubevirt.io=virt-launcher");
        let pods: Api<Pod> = Api::all(client.clone());
        let nodes: Api<Node> = Api::all(client.clone());
        let pods = pods.list(&launchers).await?.items;
        let pods = join_all(pods.iter().map(PodSeen::of).map(|mut pod| async {
            if let Some(address) = pod.address.filter(|_| pod.phase == "Running") {
                pod.report = talk::ask(address, &Request::Report).await.ok();
            }
            pod
        }));
        Ok(World {
            pods: pods.await,
            vms: list(Kind::Vm).await?,
            vmis: list(Kind::Vmi).await?,
            vmims: list(Kind::Vmim).await?,
            nodes: nodes.list_metadata(&ListParams::default()).await?.items.len(),
        })
    }

    async fn vm(&self, vm: &Value, world: &World) -> Result<(), Error> {
        let name = &vm["metadata"]["name"];
        let vmi = world.find(&world.vmis, vm, name);
        let action = vm::decide(vm, vmi);
        self.cluster.vm(vm, action).await?;
        let moving = |vmim: &&Value| vmim["spec"]["vmiName"] == *name && !Phase::of(vmim).is_final();
        let migrating = world.vmims.iter().filter(|vmim| same_namespace(vmim, vm)).any(|vmim| moving(&vmim));
        self.cluster.status(Kind::Vm, vm, &vm::status(vm, vmi, migrating)).await
    }

    async fn vmi(&self, vmi: &Value, world: &World) -> Result<(), Error> {
        let pods: Vec<&PodSeen> = world.pods.iter().filter(|pod| pod.vmi_uid == uid(vmi)).collect();
        let pod = current_pod(vmi, pods.iter().copied());
        let (claims, complete) = self.claims(vmi).await?;
        match vmi::decide(vmi, pod, &pods) {
            // A claim that is not there yet keeps the VMI waiting, as KubeVirt does.
            vmi::Action::CreatePod if !complete => {}
            action => self.cluster.vmi(vmi, action, &claims, &pods).await?,
        }
        let trouble = pod.and_then(|pod| pod.report.as_ref()).and_then(|report| report.trouble.as_ref());
        let known =
            |text: &String| vmi["status"]["conditions"].to_string().contains(&Value::from(text.as_str()).to_string());
        if let Some(trouble) = trouble.filter(|trouble| !known(trouble)) {
            act::event(&self.cluster.client, vmi, "SyncFailed", trouble).await?;
        }
        if !is_deleting(vmi) || !is_final(phase(vmi)) {
            self.cluster.status(Kind::Vmi, vmi, &vmi::status(vmi, pod, &claims)).await?;
            self.cluster.node_label(vmi, pod).await?;
        }
        Ok(())
    }

    async fn vmim(&self, vmim: &Value, world: &World) -> Result<(), Error> {
        let vmi = world.find(&world.vmis, vmim, &vmim["spec"]["vmiName"]);
        let state = vmi.map_or(&Value::Null, |vmi| &vmi["status"]["migrationState"]);
        let word = self.exchange(vmim, state);
        let ended = Phase::of(vmim).is_final();
        if let (Some((side, _)), Some(vmi), false) = (key_of(vmim), vmi, ended) {
            // The peer's half is entered first; decisions are made from it at the next look.
            let begun = state["migrationUid"] == uid(vmim);
            let theirs = word.message.as_ref().map(|message| &message.state);
            let news = theirs.filter(|_| begun).and_then(|theirs| sync::news(side, state, theirs));
            self.cluster.peer_condition(vmi, vmim, word.error.as_deref()).await?;
            if let Some(news) = news {
                return self.cluster.migration_state(vmi, &news).await;
            }
        }
        let pods = || {
            world.pods.iter().filter(|pod| pod.namespace == vmim["metadata"]["namespace"].as_str().unwrap_or_default())
        };
        let source = state["sourcePod"].as_str().and_then(|name| pods().find(|pod| pod.name == name));
        let seen = Seen {
            vmim,
            vmi,
            source: source.or_else(|| vmi.and_then(|vmi| current_pod(vmi, &world.pods))),
            target: pods().find(|pod| pod.job.as_deref() == Some(uid(vmim))),
            peer: Peer {
                cancelled: word.message.as_ref().is_some_and(|peer| peer.cancelled),
                told: word.told || act::deleted_for_seconds(vmim) > PEER_PATIENCE_SECONDS,
            },
            more_nodes: world.nodes > 1,
            age: act::age_seconds(vmim),
        };
        let actions = migration::decide(&seen);
        for action in actions {
            self.migrate(&seen, action).await?;
        }
        Ok(())
    }

    async fn migrate(&self, seen: &Seen<'_>, action: migration::Action) -> Result<(), Error> {
        let (claims, complete) = match (&action, seen.vmi) {
            (migration::Action::CreateTarget(_), Some(vmi)) => self.claims(vmi).await?,
            _ => (Vec::new(), true),
        };
        if !complete {
            return Ok(());
        }
        self.cluster.migration(seen, action, &claims, &self.address).await
    }

    /// Tells the peer our half, and answers its own.
    fn exchange(&self, vmim: &Value, state: &Value) -> sync::PeerWord {
        let Some((side, migration)) = key_of(vmim) else { return sync::PeerWord::default() };
        let begun = state["migrationUid"] == uid(vmim);
        let ours = Message {
            migration,
            cancelled: is_deleting(vmim),
            ended: Phase::of(vmim).is_final(),
            state: if begun { sync::half(side, state) } else { Value::Null },
        };
        let connect = match Role::of(vmim) {
            Role::Source { connect, .. } => Some(connect),
            Role::Local | Role::Target { .. } => None,
        };
        self.board.pin(side, ours, connect.as_deref(), Quirks::of(vmim).unreachable)
    }

    /// The VMI's claims as far as they are there, and whether all are.
    async fn claims(&self, vmi: &Value) -> Result<(Vec<ClaimVolume>, bool), Error> {
        let namespace = vmi["metadata"]["namespace"].as_str().unwrap_or_default();
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.cluster.client.clone(), namespace);
        let (mut claims, mut complete) = (Vec::new(), true);
        for (volume, claim) in render::claims_of(vmi) {
            let Some(found) = api.get_opt(&claim).await? else {
                complete = false;
                continue;
            };
            let spec = found.spec.unwrap_or_default();
            let requests = spec.resources.and_then(|resources| resources.requests).unwrap_or_default();
            let bytes = requests.get("storage").map(|size| bytes(&size.0)).transpose()?.unwrap_or_default();
            let shared = spec.access_modes.iter().flatten().any(|mode| mode == "ReadWriteMany");
            claims.push(ClaimVolume {
                volume,
                claim,
                block: spec.volume_mode.as_deref() == Some("Block"),
                bytes,
                shared,
            });
        }
        Ok((claims, complete))
    }
}

impl World {
    /// The object of that name in the namespace of `beside`.
    fn find<'w>(&self, objects: &'w [Value], beside: &Value, name: &Value) -> Option<&'w Value> {
        objects.iter().find(|object| object["metadata"]["name"] == *name && same_namespace(object, beside))
    }
}

fn same_namespace(a: &Value, b: &Value) -> bool {
    a["metadata"]["namespace"] == b["metadata"]["namespace"]
}

/// Of a migration between clusters.
fn key_of(vmim: &Value) -> Option<(Side, String)> {
    match Role::of(vmim) {
        Role::Local => None,
        Role::Source { migration, .. } => Some((Side::Source, migration)),
        Role::Target { migration } => Some((Side::Target, migration)),
    }
}

/// One object's trouble is not the others'.
fn logged(object: &Value, outcome: Result<(), Error>) {
    if let Err(error) = outcome {
        let (namespace, name) = (&object["metadata"]["namespace"], &object["metadata"]["name"]);
        tracing::warn!(%namespace, %name, kind = %object["kind"], %error, "trying again");
    }
}

/// What of a status is not as it should be.
pub async fn write_status(client: &Client, kind: Kind, object: &Value, wanted: &Value) -> Result<(), Error> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    if let Some(change) = difference(&object["status"], wanted) {
        let patch = serde_json::json!({ "status": change });
        let (namespace, name) = (text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]));
        merge(client, kind, &namespace, &name, &patch).await?;
    }
    Ok(())
}
