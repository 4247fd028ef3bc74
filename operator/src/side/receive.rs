//! The side to which the VM comes: a pure, total function of what was seen.
//!
//! Only this side asks for the right to write, or gives it up for good, and it does the latter only when QEMU is gone here.

use serde_json::Value;
use watari_crds::crossing::{Crossing, MigrationEnd, Stage};

use super::manifest::{self, HALTED, RECEIVER};
use super::observe::Side;
use super::{Progress, Step, accepts_writes, trust};

/// KubeVirt's phase of a VMI that waits for a migration.
const WAITING: &str = "WaitingForSync";

/// `manifest` is the VM as it shall be here, `other` the sender's end of migrations.
pub fn decide(attempt: &Crossing, pair_id: &str, manifest: &Value, other: &MigrationEnd, seen: &Side) -> Progress {
    if seen.role().is_some_and(accepts_writes) {
        return here(attempt, pair_id, manifest, seen);
    }
    let phase = seen.migration(&attempt.id).map(|migration| migration.phase.as_str());
    match phase {
        Some("Succeeded") => {
            let text = "The VM's memory is here; asking for the right to write.";
            Progress::new(Stage::Migrating, text, vec![Step::Acquire])
        }
        Some("Failed") => gone(&failure(seen), seen),
        _ if attempt.cancelled => called_off(attempt, seen),
        None if attempt.stopped => take_over(seen),
        None => prepare(attempt, pair_id, manifest, other, seen),
        Some("" | "Pending" | WAITING) => Progress::waits(Stage::Ready, "The VM waits here for its memory."),
        Some(phase) => Progress::waits(Stage::Migrating, format!("KubeVirt's migration is in phase {phase}.")),
    }
}

/// The right to write is here. A VM that runs came with it; one that was stopped is made as it was.
fn here(attempt: &Crossing, pair_id: &str, manifest: &Value, seen: &Side) -> Progress {
    let strategy = manifest::run_strategy(manifest);
    let steps = match (&seen.vm, attempt.stopped) {
        (None, true) => vec![Step::MakeVm(manifest::object(manifest, pair_id, strategy))],
        (Some(_), true) if seen.run_strategy() != Some(strategy) => {
            vec![Step::SetRunStrategy { strategy: strategy.to_owned(), restore: None }]
        }
        (Some(_), true) | (_, false) => Vec::new(),
    };
    Progress::new(Stage::Done, "The VM is active here.", steps)
}

fn failure(seen: &Side) -> String {
    match seen.vmi.as_ref().map(|vmi| vmi.failure.as_str()).filter(|words| !words.is_empty()) {
        Some(words) => format!("KubeVirt's migration failed: {words}."),
        None => "KubeVirt's migration failed.".to_owned(),
    }
}

/// After an attempt that is over: QEMU has to be gone here before the right to write is given up. Where it runs, the move has
/// happened, whatever KubeVirt says of it.
fn gone(why: &str, seen: &Side) -> Progress {
    if seen.launcher.is_some() && seen.vmi.as_ref().is_some_and(|vmi| vmi.phase == "Running") {
        let text = format!("{why} And yet the VM runs here; asking for the right to write.");
        return Progress::new(Stage::Migrating, text, vec![Step::Acquire]);
    }
    if seen.launcher.is_some() {
        return Progress::waits(Stage::Migrating, format!("{why} Its Pod here is ending."));
    }
    match (seen.role(), seen.attachable()) {
        (None, _) => Progress::waits(Stage::Migrating, format!("{why} The replica's Pod is on its way back.")),
        (Some(_), true) => Progress::new(Stage::Migrating, format!("{why} The source shall go on."), vec![Step::Void]),
        (Some(_), false) => Progress::waits(Stage::Failed, why),
    }
}

fn called_off(attempt: &Crossing, seen: &Side) -> Progress {
    let text = "The move is called off.";
    match seen.migration(&attempt.id) {
        Some(migration) if !migration.deleting => {
            Progress::new(Stage::Migrating, text, vec![Step::DeleteMigration(attempt.id.clone())])
        }
        Some(_) => Progress::waits(Stage::Migrating, text),
        None => gone(text, seen),
    }
}

/// A stopped VM: whoever holds the folder here takes over as soon as the source offers it.
fn take_over(seen: &Side) -> Progress {
    match seen.attachable() {
        true => Progress::new(Stage::Migrating, "Taking the stopped VM's disks over.", vec![Step::Acquire]),
        false => Progress::waits(Stage::Preparing, "Waiting for the source to offer the stopped VM's disks."),
    }
}

fn prepare(attempt: &Crossing, pair_id: &str, manifest: &Value, other: &MigrationEnd, seen: &Side) -> Progress {
    let preparing = |text: &str| Progress::waits(Stage::Preparing, text);
    if seen.role() != Some("Replica") {
        return preparing("Waiting for the sidecar that holds the replica.");
    }
    let Some(kubevirt) = &seen.kubevirt else { return preparing("There is no KubeVirt here.") };
    if other.authorities.is_empty() || kubevirt.end.address.is_empty() {
        return preparing("Waiting until both KubeVirt installations say how they are reached.");
    }
    if let Some(missing) = trust::missing(&kubevirt.end.authorities, &other.authorities) {
        let text = "KubeVirt here does not trust the other site's yet.";
        return Progress::new(Stage::Preparing, text, vec![Step::Trust(missing)]);
    }
    let Some(_) = &seen.vm else {
        let vm = manifest::object(manifest, pair_id, RECEIVER);
        return Progress::new(Stage::Preparing, "The VM is being made here.", vec![Step::MakeVm(vm)]);
    };
    if seen.run_strategy() != Some(RECEIVER) {
        if seen.launcher.is_some() {
            return preparing("The VM's former Pod here is ending.");
        }
        let restore = Some(manifest::run_strategy(manifest)).filter(|it| *it != RECEIVER && *it != HALTED);
        let restore = Some(restore.unwrap_or("Always").to_owned());
        let step = Step::SetRunStrategy { strategy: RECEIVER.to_owned(), restore };
        return Progress::new(Stage::Preparing, "The VM here becomes a receiver.", vec![step]);
    }
    match &seen.vmi {
        Some(vmi) if vmi.receiver && vmi.phase == WAITING => {
            let node = seen.node.clone().filter(|_| seen.one_node);
            let step = Step::Receive { id: attempt.id.clone(), node };
            Progress::new(Stage::Preparing, "The VM here is told to receive.", vec![step])
        }
        Some(_) | None => preparing("KubeVirt prepares the VM as a receiver."),
    }
}
