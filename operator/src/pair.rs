//! The SyncPair controller, at the VM's home: the replica at the peer, the wiring of the VM, what its sidecar says.
//!
//! observe → validate → decide (pure) → act → report. It never restarts a VM: what waits for a restart is a condition.

pub mod act;
pub mod crossing;
pub mod decide;
pub mod disks;
pub mod observe;
pub mod readiness;
pub mod report;
pub mod say;

use std::sync::Arc;
use std::time::Duration;

use kube::runtime::controller::Action;
use kube::{Api, ResourceExt};
use watari_crds::pair::{Phase, SyncPair};

use crate::context::Context;
use crate::{authority, side, sidecar, wake};

/// How often a pair is looked at; its status is at most this old.
const PERIOD: Duration = Duration::from_secs(10);
/// While the VM crosses: a move of 30 s is not worth waiting ten for each step.
const CROSSING: Duration = Duration::from_millis(500);
/// While it is being made ready, which somebody may be watching.
const PREPARING: Duration = Duration::from_secs(2);
/// After an error.
const RETRY: Duration = Duration::from_secs(5);

/// Why a reconcile could not be finished; the next one begins from what it observes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error(transparent)]
    Certificate(#[from] authority::Error),
    #[error(transparent)]
    Sidecar(#[from] sidecar::Error),
    #[error(transparent)]
    Side(#[from] side::act::Error),
    /// What the peer stored is not what was sent: its definitions do not know a field.
    #[error(
        "the peer stored less than was sent: its definitions are older; upgrade the chart and its definitions there"
    )]
    PeerTooOld,
}

/// Runs until the process ends.
pub async fn run(context: Context) {
    let api: Api<SyncPair> = Api::all(context.client.clone());
    wake::run(
        wake::with_pods(wake::controller(api), context.client.clone(), ResourceExt::uid),
        context,
        RETRY,
        reconcile,
    )
    .await;
}

async fn reconcile(pair: Arc<SyncPair>, context: Arc<Context>) -> Result<Action, Error> {
    let (seen, peer) = observe::observe(&context, &pair).await?;
    let decision = decide::decide(&pair, &context.settings.site, &seen);
    let mut failure = None;
    for step in &decision.steps {
        if let Err(error) = act::act(&context, &pair, &seen, peer.as_ref(), step).await {
            failure = Some(error);
            break;
        }
    }
    if decision.finished && failure.is_none() {
        context.metrics.forget(&pair);
        return Ok(Action::await_change());
    }
    report::report(&context, &pair, &seen, &decision, failure.as_ref().map(|error| error.to_string())).await?;
    let crosses = decision.course.as_ref().is_some_and(crossing::Course::is_under_way);
    let period = match decision.phase {
        _ if crosses => CROSSING,
        Phase::Preparing | Phase::Deleting => PREPARING,
        _ => PERIOD,
    };
    failure.map_or(Ok(Action::requeue(period)), Err)
}

/// The namespace of the pair's replica at the peer.
pub fn target_namespace(pair: &SyncPair) -> String {
    let own = || pair.namespace().expect("a SyncPair is namespaced");
    pair.spec.target_namespace.clone().unwrap_or_else(own)
}

/// The pair's id: its UID, in the form of the API server.
pub fn pair_id(pair: &SyncPair) -> String {
    pair.uid().expect("an object that was read has a UID")
}
