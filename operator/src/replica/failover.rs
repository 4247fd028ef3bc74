//! The wish for a failover, against what this side knows: taken up once, at one count of moves only. A pure, total function.

use jiff::Timestamp;
use watari_crds::conditions::{Finding, Kind, Reason};
use watari_crds::failover::{FailoverStage, FailoverStatus, Promote};
use watari_crds::replica::{SyncReplica, SyncReplicaStatus};

use crate::side::fail_over::{self, About};
use crate::side::observe::Side;
use crate::side::{Progress, accepts_writes};

/// What follows for the replica.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Course {
    /// How often the VM has changed its site, as far as this side knows.
    pub moves: i64,
    /// As it shall stand in the status.
    pub record: Option<FailoverStatus>,
    /// While it is under way: instead of what a crossing calls for.
    pub progress: Option<Progress>,
    /// A wish of another time.
    differs: Option<String>,
}

impl Course {
    /// What is to be said about a wish that is not followed.
    pub fn site_differs(&self) -> Finding {
        match &self.differs {
            Some(text) => Finding::new(Kind::SiteDiffers, true, Reason::PromoteDiffers, text.clone()),
            None => Finding::new(Kind::SiteDiffers, false, Reason::AsAsked, ""),
        }
    }
}

/// Decides for the operator of `site`; a replica that is going, or that was written for another site, is never promoted.
pub fn decide(replica: &SyncReplica, site: &str, now: Timestamp, seen: &Side) -> Course {
    let before = replica.status.clone().unwrap_or_default();
    let moves = replica.spec.moves.max(before.moves);
    let standing = Course { moves, record: before.failover.clone(), ..Course::default() };
    if replica.spec.site != site || replica.metadata.deletion_timestamp.is_some() {
        return standing;
    }
    let wish = replica.spec.promote.as_ref();
    let record = before.failover.clone().filter(|it| it.stage != FailoverStage::Refused);
    match (record, wish) {
        (Some(record), _) if is_bound(&record, seen) => go_on(replica, wish, record, now, seen),
        (Some(record), Some(wish)) if record.stage != FailoverStage::Done && record.at_move == wish.at_move => {
            go_on(replica, Some(wish), record, now, seen)
        }
        // Done once, and for good.
        (Some(record), Some(wish)) if record.at_move == wish.at_move => Course { record: Some(record), ..standing },
        (record, Some(wish)) if wish.at_move != moves => {
            let text = format!("`promote.atMove` is {}, and the VM has moved {moves} times.", wish.at_move);
            Course { record: record.filter(|it| it.counts()), differs: Some(text), ..standing }
        }
        (_, Some(wish)) => begin(replica, wish, moves, now, seen),
        // One that was taken back before it changed anything.
        (record, None) => Course { record: record.filter(|it| it.counts()), ..standing },
    }
}

/// It cannot be taken back any more.
fn is_bound(record: &FailoverStatus, seen: &Side) -> bool {
    match record.stage {
        FailoverStage::Refused | FailoverStage::Clearing | FailoverStage::Done => false,
        FailoverStage::Promoting => !matches!(seen.role(), Some("Replica" | "Voided")),
        FailoverStage::Starting => true,
    }
}

/// The newest generation that is whole here.
fn newest(seen: &Side) -> Option<String> {
    let replica = seen.report.as_ref()?.replica.as_ref()?;
    Some(replica.committed.clone()).filter(|it| !it.is_empty())
}

fn begin(replica: &SyncReplica, wish: &Promote, moves: i64, now: Timestamp, seen: &Side) -> Course {
    let spec = &replica.spec;
    let mut record = FailoverStatus {
        at_move: wish.at_move,
        stage: FailoverStage::Clearing,
        message: "It begins.".to_owned(),
        generation: wish.generation.clone().or_else(|| newest(seen)),
        began: now,
        ended: None,
    };
    let refused = fail_over::hindrance(&spec.pair_id, spec.vm.as_ref(), wish.generation.as_deref(), seen);
    if let Some(why) = &refused {
        let again = replica.status.as_ref().and_then(|status| status.failover.as_ref());
        let again = again.filter(|it| it.at_move == wish.at_move && it.stage == FailoverStage::Refused);
        record.began = again.map_or(now, |it| it.began);
        (record.stage, record.message) = (FailoverStage::Refused, why.clone());
        return Course { moves, record: Some(record), ..Course::default() };
    }
    if seen.role().is_none() {
        let why = seen.silence.as_deref().unwrap_or("no Pod has the disks");
        record.message = format!("Waiting for the sidecar that holds the replica: {why}.");
    }
    // Nothing is done before this stands in the status.
    let progress = Some(Progress { message: record.message.clone(), ..Progress::default() });
    Course { moves, record: Some(record), progress, ..Course::default() }
}

fn go_on(
    replica: &SyncReplica,
    wish: Option<&Promote>,
    mut record: FailoverStatus,
    now: Timestamp,
    seen: &Side,
) -> Course {
    let (spec, before) = (&replica.spec, replica.status.clone().unwrap_or_default());
    let about = About {
        pair_id: &spec.pair_id,
        vm: spec.vm.as_ref(),
        generation: wish.and_then(|wish| wish.generation.as_deref()),
        told: told(&before),
    };
    let next = fail_over::decide(&record, about, seen);
    record.generation = record.generation.or_else(|| newest(seen));
    (record.stage, record.message) = (next.stage, next.message.clone());
    if record.stage == FailoverStage::Done {
        record.ended = Some(now);
    }
    let counted = if record.counts() { record.at_move + 1 } else { 0 };
    let progress = Some(Progress { steps: next.steps, message: next.message, ..Progress::default() });
    Course { moves: spec.moves.max(before.moves).max(counted), record: Some(record), progress, differs: None }
}

/// The status says already that this side has the right to write.
fn told(status: &SyncReplicaStatus) -> bool {
    status.role.as_deref().is_some_and(accepts_writes)
}

#[cfg(test)]
#[path = "failover_tests.rs"]
mod tests;
