//! The side that goes on alone: a pure, total function of what was seen.
//!
//! ```text
//!   Clearing ──nothing of a move is left──▶ Promoting ──the right to write is here──▶ Starting ──the VM runs──▶ Done
//! ```
//! The wish is recorded durably before the first step (the SyncReplica's status), so an operator that is killed anywhere goes on. The
//! VM boots fresh: a QEMU that came with a move holds a memory that belongs to newer data, and goes before anything is promoted.

use serde_json::Value;
use watari_crds::failover::{FailoverStage, FailoverStatus};

use super::manifest::{self, HALTED};
use super::observe::Side;
use super::{Step, accepts_writes};

/// What else it needs to know.
#[derive(Clone, Copy, Debug)]
pub struct About<'a> {
    pub pair_id: &'a str,
    /// The VM as the home sent it.
    pub vm: Option<&'a Value>,
    /// The generation that was asked for; `None`: the newest.
    pub generation: Option<&'a str>,
    /// The status already says that this side has the right to write: admission lets the VM start.
    pub told: bool,
}

/// What comes next.
#[derive(Clone, Debug, PartialEq)]
pub struct Next {
    pub stage: FailoverStage,
    pub message: String,
    pub steps: Vec<Step>,
}

fn next(stage: FailoverStage, message: impl Into<String>, steps: Vec<Step>) -> Next {
    Next { stage, message: message.into(), steps }
}

fn waits(stage: FailoverStage, message: impl Into<String>) -> Next {
    next(stage, message, Vec::new())
}

/// Whether a wish for a failover can be taken up; the words say why not. `generation`: the one that was asked for.
pub fn hindrance(pair_id: &str, vm: Option<&Value>, generation: Option<&str>, seen: &Side) -> Option<String> {
    let role = seen.role()?;
    if accepts_writes(role) {
        return Some("The VM is active here already.".to_owned());
    }
    if !matches!(role, "Replica" | "Attached" | "Voided") {
        return Some(format!("The sidecar here is {role}, not a replica."));
    }
    if vm.is_none() {
        return Some("The home never sent the VM's definition, so it cannot be made here.".to_owned());
    }
    if let Some(found) = &seen.vm
        && !manifest::is_ours(found, pair_id)
    {
        return Some("There is a VM of that name here that Watari did not make.".to_owned());
    }
    let replica = seen.report.as_ref().and_then(|report| report.replica.as_ref());
    let kept = replica.map(|replica| replica.kept.as_slice()).unwrap_or_default();
    match generation {
        Some(asked) if !kept.iter().any(|it| it == asked) => {
            Some(format!("Generation {asked} is not kept here; kept are {}.", kept.join(", ")))
        }
        None if replica.is_none_or(|replica| replica.committed.is_empty()) => {
            Some("No generation is whole here: there is nothing from which the VM could boot.".to_owned())
        }
        Some(_) | None => None,
    }
}

/// Goes on with a failover that is recorded.
pub fn decide(record: &FailoverStatus, about: About<'_>, seen: &Side) -> Next {
    match seen.role() {
        Some(role) if accepts_writes(role) => start(about, seen),
        _ if record.counts() => waits(FailoverStage::Starting, "Waiting for the sidecar that has the right to write."),
        Some(role) => promote(role, about, seen),
        // Without its word nothing is touched: it may have got the right to write meanwhile.
        None => {
            let why = seen.silence.as_deref().unwrap_or("no Pod has the disks");
            waits(FailoverStage::Clearing, format!("Waiting for the sidecar that holds the replica: {why}."))
        }
    }
}

fn promote(role: &str, about: About<'_>, seen: &Side) -> Next {
    let open = seen.migrations.iter().filter(|migration| !migration.deleting);
    let mut steps: Vec<Step> = open.map(|migration| Step::DeleteMigration(migration.name.clone())).collect();
    let ours = seen.vm.as_ref().filter(|vm| manifest::is_ours(vm, about.pair_id));
    if ours.is_some_and(|vm| vm["metadata"]["deletionTimestamp"].is_null()) {
        steps.push(Step::RemoveVm);
    }
    if !steps.is_empty() || ours.is_some() || seen.vmi.is_some() || seen.launcher.is_some() {
        return next(FailoverStage::Clearing, "What a move left here is going: the VM boots fresh.", steps);
    }
    match role {
        "Replica" | "Voided" => {
            let number = about.generation.and_then(|it| it.rsplit('.').next());
            let step = Step::Promote { generation: number.and_then(|number| number.parse().ok()) };
            let text = match (about.generation, seen.report.as_ref().is_some_and(|report| report.link.connected)) {
                (Some(_), _) => "The VM goes on from the generation that was asked for.",
                (None, true) => "The home answers: it is sealed, and what remains is on its way.",
                (None, false) => "The home does not answer: the VM goes on from what is whole here.",
            };
            next(FailoverStage::Promoting, text, vec![step])
        }
        other => waits(FailoverStage::Promoting, format!("The sidecar here is {other}.")),
    }
}

/// The right to write is here.
fn start(about: About<'_>, seen: &Side) -> Next {
    let starting = |text: &str| waits(FailoverStage::Starting, text);
    let Some(manifest) = about.vm else { return starting("The home never sent the VM's definition.") };
    let strategy = manifest::run_strategy(manifest);
    match (&seen.vm, &seen.vmi) {
        (None, _) if !about.told => starting("This side has the right to write; admission is told."),
        (None, _) => {
            let vm = manifest::object(manifest, about.pair_id, strategy);
            next(FailoverStage::Starting, "The VM is being made here.", vec![Step::MakeVm(vm)])
        }
        (Some(_), Some(vmi)) if vmi.phase == "Running" => waits(FailoverStage::Done, "The VM runs here."),
        (Some(_), _) if strategy == HALTED => waits(FailoverStage::Done, "The VM is here, as stopped as it was."),
        (Some(_), Some(vmi)) => starting(&format!("KubeVirt starts the VM: it is {}.", vmi.phase)),
        (Some(_), None) => starting("KubeVirt starts the VM."),
    }
}

#[cfg(test)]
#[path = "fail_over_tests.rs"]
mod tests;
