//! The PeerCluster controller: can pairs use that peer, and what is missing for a live migration.
//!
//! It only looks and reports; nothing is made at the peer. Pairs ask [`client::peer_client`] and [`observe::card`] themselves.

pub mod client;
pub mod judge;
pub mod observe;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kube::runtime::controller::Action;
use kube::{Api, ResourceExt};
use watari_crds::conditions::merged;
use watari_crds::peer::{PeerCluster, PeerClusterStatus};

use crate::apply::apply_status;
use crate::authority;
use crate::card;
use crate::context::Context;
use crate::{events, wake};

/// A peer is looked at this often.
const PERIOD: Duration = Duration::from_secs(60);
/// After an error of our own API server.
const RETRY: Duration = Duration::from_secs(10);

/// Runs until the process ends.
pub async fn run(context: Context) {
    let api: Api<PeerCluster> = Api::all(context.client.clone());
    wake::run(wake::controller(api), context, RETRY, reconcile).await;
}

async fn reconcile(peer: Arc<PeerCluster>, context: Arc<Context>) -> Result<Action, authority::Error> {
    let own = card::observe(&context).await?;
    let seen = observe::observe(&context, &peer).await?;
    let verdict = judge::judge(&peer.spec, &own, &seen, Timestamp::now().as_second());
    let before = peer.status.clone().unwrap_or_default();
    let generation = peer.metadata.generation.unwrap_or_default();
    let status = PeerClusterStatus {
        observed_generation: generation,
        conditions: merged(&before.conditions, &verdict.findings, generation, Timestamp::now()),
        ..verdict.status
    };
    if status != before {
        let api: Api<PeerCluster> = Api::all(context.client.clone());
        apply_status(&api, "PeerCluster", &peer.name_any(), &status).await?;
        events::tell(&context, &*peer, &before.conditions, &verdict.findings).await;
    }
    Ok(Action::requeue(PERIOD))
}
