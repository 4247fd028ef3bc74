//! The SyncReplica controller: claims, certificate, configuration, Service and Pod of a replica at this site.
//!
//! observe → decide (pure) → act → report. What must hold: a claim whose content is lost is never silently made anew, and a
//! claim is deleted only while the folder's owner says that it is a replica.

pub mod act;
pub mod crossing;
pub mod decide;
pub mod failover;
pub mod observe;
pub mod pod;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kube::runtime::controller::Action;
use kube::{Api, ResourceExt};
use watari_crds::conditions::merged;
use watari_crds::names::finalizer;
use watari_crds::replica::{SyncReplica, SyncReplicaStatus};

use crate::apply::{apply_status, set_finalizer};
use crate::authority;
use crate::context::Context;
use crate::side::{self, Progress, act::Whose};
use crate::{events, wake};

/// While nothing changes, the sidecar's report is read this often.
const PERIOD: Duration = Duration::from_secs(15);
/// After an error, and while something is on its way.
const RETRY: Duration = Duration::from_secs(5);
/// While a VM crosses.
const CROSSING: Duration = Duration::from_millis(500);

/// Why a reconcile could not be finished; the next one begins from what it observes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error(transparent)]
    Certificate(#[from] authority::Error),
    #[error(transparent)]
    Side(#[from] side::act::Error),
}

/// Runs until the process ends.
pub async fn run(context: Context) {
    let api: Api<SyncReplica> = Api::all(context.client.clone());
    let id = |replica: &SyncReplica| Some(replica.spec.pair_id.clone());
    wake::run(wake::with_pods(wake::controller(api), context.client.clone(), id), context, RETRY, reconcile).await;
}

async fn reconcile(replica: Arc<SyncReplica>, context: Arc<Context>) -> Result<Action, Error> {
    let seen = observe::observe(&context, &replica).await?;
    let decision = decide::decide(&replica, &context.settings.site, &seen);
    for step in &decision.steps {
        act::act(&context, &replica, step).await?;
    }
    if decision.finished {
        set_finalizer(&api(&context, &replica), &replica, finalizer::REPLICA, false).await?;
        return Ok(Action::await_change());
    }
    let site = &context.settings.site;
    let mut failover = failover::decide(&replica, site, Timestamp::now(), &seen.side);
    let crossing = || crossing::decide(&replica, site, failover.moves, &seen.side);
    let mut progress = failover.progress.clone().unwrap_or_else(crossing);
    let failure = cross(&context, &replica, &seen, &progress).await.err();
    if let Some(error) = &failure {
        progress.message = format!("{} Trying again: {error}.", progress.message);
        if let (Some(record), Some(_)) = (&mut failover.record, &failover.progress) {
            record.message = progress.message.clone();
        }
    }
    report(&context, &replica, &seen, &decision, &progress, &failover).await?;
    match failure {
        Some(error) => Err(error.into()),
        None if replica.spec.crossing.is_some() || failover.progress.is_some() => Ok(Action::requeue(CROSSING)),
        None => Ok(Action::requeue(if decision.is_settled() { PERIOD } else { RETRY })),
    }
}

async fn cross(
    context: &Context,
    replica: &SyncReplica,
    seen: &observe::Seen,
    progress: &Progress,
) -> Result<(), side::act::Error> {
    let namespace = replica.namespace().expect("a SyncReplica is namespaced");
    let spec = &replica.spec;
    let whose = Whose { namespace: &namespace, pair_id: &spec.pair_id, vm: &spec.vm_name };
    for step in &progress.steps {
        side::act::act(context, whose, &seen.side, step).await?;
    }
    Ok(())
}

fn api(context: &Context, replica: &SyncReplica) -> Api<SyncReplica> {
    let namespace = replica.namespace().expect("a SyncReplica is namespaced");
    Api::namespaced(context.client.clone(), &namespace)
}

async fn report(
    context: &Context,
    replica: &SyncReplica,
    seen: &observe::Seen,
    decision: &decide::Decision,
    progress: &Progress,
    failover: &failover::Course,
) -> kube::Result<()> {
    let before = replica.status.clone().unwrap_or_default();
    let generation = replica.metadata.generation.unwrap_or_default();
    let side = &seen.side;
    let sidecar = side.report.as_ref().and_then(|report| report.replica.as_ref());
    let filled = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let left = side.report.as_ref().filter(|report| side::accepts_writes(&report.role));
    let left = left.map(|report| side::remains(report, side.memory()));
    let committed_time = sidecar.and_then(|it| i64::try_from(it.committed_unix_millis).ok()).filter(|it| *it > 0);
    let mut findings = decision.findings.clone();
    findings.push(failover.site_differs());
    let status = SyncReplicaStatus {
        observed_generation: generation,
        conditions: merged(&before.conditions, &findings, generation, Timestamp::now()),
        claims: decision.claims.clone(),
        role: side.role().map(str::to_owned).or(before.role.clone()),
        epoch: side.report.as_ref().and_then(|report| i64::try_from(report.epoch).ok()).or(before.epoch),
        committed: sidecar.and_then(|it| filled(&it.committed)).or(before.committed.clone()),
        committed_time: committed_time
            .and_then(|millis| Timestamp::from_millisecond(millis).ok())
            .or(before.committed_time),
        home_answers: side.report.as_ref().is_some_and(|report| report.link.connected),
        kept: sidecar.map_or_else(|| before.kept.clone(), |it| it.kept.clone()),
        node: seen.pod.as_ref().and_then(|pod| pod.node.clone()),
        running: side.launcher.is_some(),
        lag_bytes: left.map(|(bytes, _)| bytes),
        transfer_seconds: left.and_then(|(_, seconds)| seconds),
        migration: side.kubevirt.as_ref().map(|kubevirt| kubevirt.end.clone()),
        crossing: crossing::status(&replica.spec, failover.moves, side, progress),
        moves: failover.moves,
        failover: failover.record.clone(),
    };
    if status != before {
        apply_status(&api(context, replica), "SyncReplica", &replica.name_any(), &status).await?;
        events::tell(context, replica, &before.conditions, &findings).await;
    }
    Ok(())
}
