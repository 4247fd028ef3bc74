//! No crossing is under way: what is left of one goes. A pure, total function of what was seen.

use super::manifest::{HALTED, RECEIVER, is_ours};
use super::observe::Side;
use super::{Step, accepts_writes};

/// Where this side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The VM object is a person's.
    Home,
    /// The same after a failover: the VM runs at the peer, whatever its object here says.
    Left,
    /// The VM object is ours, and is there only while the VM is.
    Peer,
}

/// A side that has the right to write keeps everything but ended VMIMs; one that has not ended yet is never touched, since calling it off
/// might meet a guest that already runs at the other site.
pub fn decide(place: Place, pair_id: &str, seen: &Side) -> Vec<Step> {
    let ended = seen.migrations.iter().filter(|migration| migration.is_final() && !migration.deleting);
    let mut steps: Vec<Step> = ended.map(|migration| Step::DeleteMigration(migration.name.clone())).collect();
    if place == Place::Left && seen.vm.is_some() && seen.run_strategy() != Some(HALTED) && has_no_right(seen) {
        steps.push(Step::SetRunStrategy { strategy: HALTED.to_owned(), restore: None });
        return steps;
    }
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

/// The VM's Pod has been told that it is replaced, or there is none.
fn has_no_right(seen: &Side) -> bool {
    match (seen.role(), &seen.launcher) {
        (Some(role), Some(_)) => !accepts_writes(role),
        (None, Some(_)) => false,
        (_, None) => true,
    }
}
