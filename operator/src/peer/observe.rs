//! Looks at a peer: its client, its card, how long it takes to answer.

use std::time::Instant;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use watari_crds::card::SiteCard;
use watari_crds::names;
use watari_crds::peer::PeerCluster;

use super::client::{self, peer_client};
use crate::context::Context;

/// What was seen.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    /// The kubeconfig cannot be used.
    NoKubeconfig(String),
    /// It does not answer, or refuses us.
    Unreachable(String),
    /// It answers, and its operator has said nothing (that can be read).
    Silent {
        why: String,
        round_trip_millis: i64,
    },
    Card {
        card: Box<SiteCard>,
        round_trip_millis: i64,
    },
}

/// Errors are those of our own API server; whatever is wrong with the peer is in [`Seen`].
pub async fn observe(context: &Context, peer: &PeerCluster) -> kube::Result<Seen> {
    match peer_client(context, peer).await {
        Ok(client) => Ok(card(client, &peer.spec.operator_namespace).await),
        Err(client::Error::Kubeconfig(why)) => Ok(Seen::NoKubeconfig(why)),
        Err(client::Error::Api(error)) => Err(error),
    }
}

/// Reads the peer's card.
pub async fn card(client: Client, namespace: &str) -> Seen {
    let api: Api<ConfigMap> = Api::namespaced(client, namespace);
    let begin = Instant::now();
    let answer = api.get_opt(names::SITE_CARD).await;
    let round_trip_millis = i64::try_from(begin.elapsed().as_millis()).unwrap_or(i64::MAX);
    let silent = |why: String| Seen::Silent { why, round_trip_millis };
    let text = match answer {
        Err(error) => return Seen::Unreachable(error.to_string()),
        Ok(found) => found.and_then(|map| map.data).and_then(|mut data| data.remove(names::SITE_CARD_KEY)),
    };
    match text.as_deref().map(serde_json::from_str::<SiteCard>) {
        None => silent(format!("There is no ConfigMap {namespace}/{} at the peer.", names::SITE_CARD)),
        Some(Err(error)) => silent(format!("The peer's site card cannot be read: {error}.")),
        Some(Ok(card)) => Seen::Card { card: Box::new(card), round_trip_millis },
    }
}
