//! No crossing is under way: what is left of one goes. A pure, total function of what was seen.

use super::Step;
use super::manifest::{HALTED, RECEIVER, is_ours};
use super::observe::Side;

/// Where this side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The VM object is a person's.
    Home,
    /// The VM object is ours, and is there only while the VM is.
    Peer,
}

/// A side that has the right to write keeps everything but ended VMIMs; one that has not ended yet is never touched, since calling it off
/// might meet a guest that already runs at the other site.
pub fn decide(place: Place, pair_id: &str, seen: &Side) -> Vec<Step> {
    let ended = seen.migrations.iter().filter(|migration| migration.is_final() && !migration.deleting);
    let mut steps: Vec<Step> = ended.map(|migration| Step::DeleteMigration(migration.name.clone())).collect();
    if seen.role() != Some("Replica") || seen.launcher.is_some() {
        return steps;
    }
    match (&seen.vm, place) {
        (Some(vm), Place::Peer) if is_ours(vm, pair_id) && vm["metadata"]["deletionTimestamp"].is_null() => {
            steps.push(Step::RemoveVm);
        }
        (Some(_), Place::Home) if seen.run_strategy() == Some(RECEIVER) => {
            steps.push(Step::SetRunStrategy { strategy: HALTED.to_owned(), restore: None });
        }
        (Some(_) | None, _) => {}
    }
    steps
}
