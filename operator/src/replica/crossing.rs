//! What the peer does of a move, as its home wrote it into the SyncReplica. Pure.

use watari_crds::crossing::{Crossing, CrossingStatus, Site, Stage};
use watari_crds::replica::{SyncReplica, SyncReplicaSpec};

use crate::side::observe::Side;
use crate::side::send::Receiver;
use crate::side::{Progress, receive, rest, send};

/// Decides for the operator of `site`; a replica that is going, or that was written for another site, moves nothing.
/// `moves`: the count that this side knows; an attempt of another count is over.
pub fn decide(replica: &SyncReplica, site: &str, moves: i64, seen: &Side) -> Progress {
    let spec = &replica.spec;
    if spec.site != site || replica.metadata.deletion_timestamp.is_some() {
        return Progress::default();
    }
    let Some(attempt) = attempt(spec, moves) else {
        return Progress { steps: rest::decide(rest::Place::Peer, &spec.pair_id, seen), ..Progress::default() };
    };
    let home = spec.home_migration.clone().unwrap_or_default();
    match (attempt.to, &spec.vm) {
        (Site::Peer, Some(vm)) => receive::decide(attempt, &spec.pair_id, vm, &home, seen),
        (Site::Peer, None) => {
            Progress { message: "The home has not sent the VM's definition.".to_owned(), ..Progress::default() }
        }
        (Site::Source, _) => send::decide(attempt, &home, &Receiver::at_home(attempt), seen),
    }
}

fn attempt(spec: &SyncReplicaSpec, moves: i64) -> Option<&Crossing> {
    spec.crossing.as_ref().filter(|attempt| attempt.at_move == moves)
}

/// The same for the home's operator.
pub fn status(spec: &SyncReplicaSpec, moves: i64, seen: &Side, progress: &Progress) -> Option<CrossingStatus> {
    let attempt = attempt(spec, moves)?;
    let receives = attempt.to == Site::Peer && !matches!(progress.stage, Stage::Preparing | Stage::Failed);
    let address = seen.kubevirt.as_ref().map(|kubevirt| kubevirt.end.address.clone());
    Some(CrossingStatus {
        id: attempt.id.clone(),
        stage: progress.stage,
        message: progress.message.clone(),
        connect: address.filter(|address| receives && !address.is_empty()),
    })
}
