//! Where pairs are active, read from the objects that say so, on every replica of the operator: admission answers from memory,
//! and whoever does not lead is asked as well.
//!
//! An object that says nothing (yet) leaves its pair unknown, and what is unknown is allowed: the sidecar asks its peer.

use std::{collections::HashMap, fmt::Debug};

use futures::StreamExt as _;
use kube::{
    Api, Resource, ResourceExt,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;
use watari_crds::{crossing::Site, pair::SyncPair, replica::SyncReplica};

use super::placement::{Placement, Placements};
use crate::context::Context;

/// Follows the objects for as long as the process lives. `listed` is told once all of them were read a first time.
pub async fn run(context: Context, listed: oneshot::Sender<()>) {
    let Context { client, settings, placements, .. } = context;
    let (replicas_listed, replicas) = oneshot::channel();
    let (pairs_listed, pairs) = oneshot::channel();
    let both = async {
        // An error: its follower has ended, and with it this.
        let _ = tokio::join!(replicas, pairs);
        let _ = listed.send(());
    };
    let of_replica = |replica: &SyncReplica| of_replica(replica, &settings.site);
    tokio::join!(
        follow(Api::<SyncReplica>::all(client.clone()), of_replica, placements.clone(), replicas_listed),
        follow(Api::<SyncPair>::all(client), of_pair, placements, pairs_listed),
        both,
    );
}

/// What a SyncPair, which is at its home, says of its VM here.
fn of_pair(pair: &SyncPair) -> Option<(String, Placement)> {
    let (pair_id, status) = (pair.uid()?, pair.status.as_ref()?);
    let name = format!("{}/{}", pair.namespace().unwrap_or_default(), pair.name_any());
    let placement = match status.active_site {
        Site::Source => Placement::Here,
        Site::Peer => Placement::Elsewhere {
            active_site: pair.spec.peer.clone(),
            role_here: "Replica".to_owned(),
            sync_pair: Some(name),
        },
    };
    Some((pair_id, placement))
}

/// What a SyncReplica says of its pair at this site, by the role that the folder's owner reported last.
fn of_replica(replica: &SyncReplica, site: &str) -> Option<(String, Placement)> {
    let spec = &replica.spec;
    if spec.site != site {
        return None;
    }
    let role = replica.status.as_ref()?.role.as_deref()?;
    let placement = match role {
        "Serving" | "Converging" | "Sealed" | "Promoting" => Placement::Here,
        "Replica" | "Voided" | "Released" | "Fenced" => Placement::Elsewhere {
            active_site: spec.home_site.clone(),
            role_here: role.to_owned(),
            sync_pair: Some(format!("{} at {}", spec.pair_name, spec.home_site)),
        },
        // A word of a later sidecar.
        _ => return None,
    };
    Some((spec.pair_id.clone(), placement))
}

/// Keeps `placements` as the objects behind `api` say, each pair by at most one of them.
async fn follow<K>(
    api: Api<K>,
    says: impl Fn(&K) -> Option<(String, Placement)>,
    placements: Placements,
    listed: oneshot::Sender<()>,
) where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let mut listed = Some(listed);
    let mut told = Told::new(placements);
    let mut events = watcher(api, watcher::Config::default()).default_backoff().boxed();
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => told.begin(),
            Ok(Event::InitApply(object) | Event::Apply(object)) => {
                told.set(object.uid().unwrap_or_default(), says(&object));
            }
            Ok(Event::InitDone) => {
                told.end();
                // Nobody may wait for it any more.
                let _ = listed.take().map(|listed| listed.send(()));
            }
            Ok(Event::Delete(object)) => told.set(object.uid().unwrap_or_default(), None),
            Err(error) => tracing::warn!(%error, "where pairs are active cannot be followed now; trying again"),
        }
    }
}

/// Which object told what; an object that is not in a new list any more takes its word back.
struct Told {
    placements: Placements,
    /// Pair by object's UID.
    by_object: HashMap<String, String>,
    /// What the list before said and the present one has not said yet.
    unconfirmed: HashMap<String, String>,
}

impl Told {
    fn new(placements: Placements) -> Told {
        Told { placements, by_object: HashMap::new(), unconfirmed: HashMap::new() }
    }

    fn begin(&mut self) {
        self.unconfirmed.extend(self.by_object.drain());
    }

    fn end(&mut self) {
        for pair_id in std::mem::take(&mut self.unconfirmed).into_values() {
            self.placements.forget(&pair_id);
        }
    }

    fn set(&mut self, object: String, word: Option<(String, Placement)>) {
        let before = self.by_object.remove(&object).or_else(|| self.unconfirmed.remove(&object));
        match word {
            Some((pair_id, placement)) => {
                self.placements.set(&pair_id, placement);
                self.by_object.insert(object, pair_id);
            }
            None => {
                if let Some(pair_id) = before {
                    self.placements.forget(&pair_id);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    const PAIR: &str = "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10";

    fn replica(role: Option<&str>) -> SyncReplica {
        serde_json::from_value(json!({
            "apiVersion": "watari.io/v1alpha1", "kind": "SyncReplica", "metadata": { "name": "shop" },
            "spec": {
                "pairId": PAIR, "pairName": "apps/shop", "vmName": "shop", "homeSite": "tokyo", "site": "osaka",
                "disks": [], "metadata": { "sizeBytes": 1 << 30, "access": "ReadWriteOnce" },
                "interval": "10s", "retention": { "count": 3 }, "homeAuthorities": "x",
            },
            "status": { "role": role },
        }))
        .unwrap()
    }

    #[test]
    fn a_replica_says_that_its_vm_is_elsewhere_until_its_folder_serves() {
        let at = |role| of_replica(&replica(role), "osaka").map(|(_, placement)| placement);
        assert_eq!(at(None), None, "nobody has reported yet");
        let elsewhere = |role: &str| {
            Some(Placement::Elsewhere {
                active_site: "tokyo".to_owned(),
                role_here: role.to_owned(),
                sync_pair: Some("apps/shop at tokyo".to_owned()),
            })
        };
        for role in ["Replica", "Voided", "Released", "Fenced"] {
            assert_eq!(at(Some(role)), elsewhere(role));
        }
        for role in ["Serving", "Converging", "Sealed", "Promoting"] {
            assert_eq!(at(Some(role)), Some(Placement::Here), "{role}");
        }
        assert_eq!(of_replica(&replica(Some("Replica")), "kobe"), None, "written for another site");
    }

    #[test]
    fn a_pair_whose_vm_is_at_the_peer_says_so_at_home() {
        let pair = |status: serde_json::Value| -> SyncPair {
            serde_json::from_value(json!({
                "apiVersion": "watari.io/v1alpha1", "kind": "SyncPair",
                "metadata": { "name": "shop", "namespace": "apps", "uid": PAIR },
                "spec": { "vmName": "shop", "peer": "osaka" }, "status": status,
            }))
            .unwrap()
        };
        assert_eq!(of_pair(&pair(json!(null))), None, "its controller has not looked yet");
        let here = of_pair(&pair(json!({ "activeSite": "Source" })));
        assert_eq!(here, Some((PAIR.to_owned(), Placement::Here)));
        let Some((_, Placement::Elsewhere { active_site, sync_pair, .. })) =
            of_pair(&pair(json!({ "activeSite": "Peer" })))
        else {
            panic!("it is elsewhere")
        };
        assert_eq!((active_site.as_str(), sync_pair.as_deref()), ("osaka", Some("apps/shop")));
    }

    #[test]
    fn what_a_deleted_object_said_is_forgotten_also_when_nobody_saw_the_deletion() {
        let placements = Placements::default();
        let mut told = Told::new(placements.clone());
        let says = |pair: &str| Some((pair.to_owned(), Placement::Here));
        told.begin();
        for (object, pair) in [("a", "pair-a"), ("b", "pair-b"), ("c", "pair-c")] {
            told.set(object.to_owned(), says(pair));
        }
        told.end();
        told.set("a".to_owned(), None);
        assert_eq!(placements.of("pair-a"), None);
        // The watch breaks, and the new list lacks one.
        told.begin();
        assert_eq!(placements.of("pair-b"), Some(Placement::Here), "until the list is whole nothing is forgotten");
        told.set("c".to_owned(), says("pair-c"));
        told.end();
        assert_eq!(placements.of("pair-b"), None);
        assert_eq!(placements.of("pair-c"), Some(Placement::Here));
    }
}
