//! What a replica calls for: a pure, total function of what was seen.
//!
//! Claims come first and once: a claim that was made (its UID is in the status) and is not there any more is *lost*, and stays so
//! until a person decides; making it anew would pretend that its content still exists.

use std::collections::BTreeMap;

use kube::ResourceExt as _;
use watari_crds::conditions::{Finding, Kind, Reason};
use watari_crds::names::finalizer;
use watari_crds::replica::SyncReplica;

use super::observe::{Seen, claim_names};
use super::pod::Holder;
use crate::side::accepts_writes;

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Before anything that has to be undone.
    SetFinalizer,
    /// Secret, ConfigMap and Service: applied as they should be.
    Furnish,
    MakeClaim(String),
    MakePod,
    DeletePod,
    DeleteClaim(String),
    /// Secret, ConfigMap and Service.
    Unfurnish,
}

/// What to do, what to say, and which claims count as made.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    pub steps: Vec<Step>,
    pub findings: Vec<Finding>,
    pub claims: BTreeMap<String, String>,
    /// Nothing is left of a deleted replica.
    pub finished: bool,
}

impl Decision {
    /// Nothing is on its way: what is applied each time is no news.
    pub fn is_settled(&self) -> bool {
        self.steps.iter().all(|step| *step == Step::Furnish)
    }
}

/// Decides for the operator of `site`.
pub fn decide(replica: &SyncReplica, site: &str, seen: &Seen) -> Decision {
    let known = replica.status.as_ref().map(|status| status.claims.clone()).unwrap_or_default();
    if replica.spec.site != site {
        let text = format!("It was written for site {}, this is {site}.", replica.spec.site);
        // One that was never executed here has nothing to be undone.
        let finished = replica.metadata.deletion_timestamp.is_some() && known.is_empty();
        return Decision { finished, claims: known, ..stalled(Reason::NotForThisSite, text) };
    }
    if replica.metadata.deletion_timestamp.is_some() {
        return remove(replica, seen, known);
    }
    keep(replica, seen, known)
}

fn keep(replica: &SyncReplica, seen: &Seen, mut known: BTreeMap<String, String>) -> Decision {
    let mut steps = Vec::new();
    if !replica.finalizers().iter().any(|it| it == finalizer::REPLICA) {
        steps.push(Step::SetFinalizer);
    }
    steps.push(Step::Furnish);
    for name in claim_names(replica) {
        match (seen.claims.get(&name), known.get(&name)) {
            (Some(claim), _) if !claim.ours => {
                let text = format!("There is a claim {name} in this namespace that is not this pair's.");
                return Decision { claims: known, ..stalled(Reason::DiskUnsuitable, text) };
            }
            (Some(claim), Some(uid)) if claim.uid != *uid || claim.deleting => return lost(&name, known),
            (None, Some(_)) => return lost(&name, known),
            (Some(claim), _) => {
                known.insert(name, claim.uid.clone());
            }
            (None, None) => steps.push(Step::MakeClaim(name)),
        }
    }
    let vm_has_the_claims = seen.side.launcher.as_ref().is_some_and(|pod| pod.scheduled);
    let mut decision = match &seen.pod {
        None if vm_has_the_claims => beside_the_vm(seen),
        None => {
            steps.push(Step::MakePod);
            preparing("The replica's Pod is being made.".to_owned())
        }
        Some(pod) if pod.deleting => preparing("The replica's Pod is ending.".to_owned()),
        Some(_) if vm_has_the_claims => {
            steps.push(Step::DeletePod);
            preparing("The replica's Pod gives way to the VM's.".to_owned())
        }
        Some(pod) if pod.has_ended() || pod.made_from != made_from(replica) => {
            steps.push(Step::DeletePod);
            preparing("The replica's Pod is being replaced.".to_owned())
        }
        Some(pod) if !pod.ready => {
            let why = pod.waiting.clone().map(|why| format!(": {why}")).unwrap_or_default();
            waiting(Reason::ReplicaNotRunning, format!("The replica's Pod is not ready{why}."))
        }
        Some(_) => listening(seen),
    };
    decision.steps = steps;
    decision.claims = known;
    decision
}

fn made_from(replica: &SyncReplica) -> String {
    Holder::of(&replica.spec).made_from()
}

/// The VM's own Pod is here: its sidecar has the folder, whether the VM is active here or on its way.
fn beside_the_vm(seen: &Seen) -> Decision {
    match seen.side.role() {
        Some(role) if accepts_writes(role) => {
            let text = "The VM is active here.".to_owned();
            ready(text)
        }
        Some(_) => preparing("The VM's Pod is here and holds the replica.".to_owned()),
        None => {
            let why = seen.side.silence.as_deref().unwrap_or("it has no address yet");
            waiting(Reason::SidecarSilent, format!("No word from the sidecar in the VM's Pod: {why}."))
        }
    }
}

fn listening(seen: &Seen) -> Decision {
    if seen.side.role().is_some_and(accepts_writes) {
        let text = "The VM is active here, and does not run.".to_owned();
        return ready(text);
    }
    let committed =
        seen.side.report.as_ref().and_then(|report| report.replica.as_ref()).map(|it| it.committed.as_str());
    let text = match committed.filter(|text| !text.is_empty()) {
        Some(generation) => format!("Generation {generation} is whole here."),
        None => "It listens; no generation is whole yet.".to_owned(),
    };
    ready(text)
}

fn lost(name: &str, known: BTreeMap<String, String>) -> Decision {
    let text = format!("The claim {name} was made and is not there any more, or is another one.");
    Decision { claims: known, ..stalled(Reason::ClaimLost, text) }
}

/// In this order: ask that it is a replica, end the Pod, delete the claims, delete the rest.
fn remove(replica: &SyncReplica, seen: &Seen, known: BTreeMap<String, String>) -> Decision {
    let role_known = replica.status.as_ref().and_then(|status| status.role.as_deref());
    let role = seen.side.report.as_ref().map(|report| report.role.as_str()).or(role_known);
    let ours: Vec<&String> = seen.claims.iter().filter(|(_, claim)| claim.ours).map(|(name, _)| name).collect();
    match (role, &seen.pod) {
        // A folder that nobody ever served holds nothing of the VM.
        (None, None) | (Some("Replica"), None) => {
            let going: Vec<Step> = ours.iter().map(|name| Step::DeleteClaim((*name).clone())).collect();
            if going.is_empty() {
                return Decision { steps: vec![Step::Unfurnish], finished: true, ..Decision::default() };
            }
            let text = format!("{} claims are going.", going.len());
            Decision { steps: going, claims: known, ..waiting(Reason::Preparing, text) }
        }
        (Some("Replica"), Some(pod)) => {
            let steps = if pod.deleting { Vec::new() } else { vec![Step::DeletePod] };
            Decision { steps, claims: known, ..waiting(Reason::Preparing, "The replica's Pod is ending.".to_owned()) }
        }
        (None, Some(_)) => {
            let text = "Its sidecar must say that it is a replica before anything is deleted.".to_owned();
            Decision { claims: known, ..waiting(Reason::ReplicaNotRunning, text) }
        }
        (Some(other), _) => {
            let text = format!("Its role is {other}: the VM's data may be here only. Nothing is deleted.");
            Decision { claims: known, ..stalled(Reason::SidecarReports, text) }
        }
    }
}

fn said(kinds: [(Kind, bool); 3], reason: Reason, text: String) -> Decision {
    let findings = kinds.map(|(kind, holds)| Finding::new(kind, holds, reason, text.clone()));
    Decision { findings: findings.to_vec(), ..Decision::default() }
}

fn ready(text: String) -> Decision {
    said([(Kind::Ready, true), (Kind::Reconciling, false), (Kind::Stalled, false)], Reason::AsAsked, text)
}

fn stalled(reason: Reason, text: String) -> Decision {
    said([(Kind::Ready, false), (Kind::Reconciling, false), (Kind::Stalled, true)], reason, text)
}

fn waiting(reason: Reason, text: String) -> Decision {
    said([(Kind::Ready, false), (Kind::Reconciling, true), (Kind::Stalled, false)], reason, text)
}

fn preparing(text: String) -> Decision {
    waiting(Reason::Preparing, text)
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
