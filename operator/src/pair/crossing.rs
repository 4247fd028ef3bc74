//! The course of a pair's moves: where the VM is, where it shall be, and the attempt that leads there. A pure, total function.
//!
//! The attempt's one durable record is the SyncReplica's `spec.crossing`; the pair's status repeats it for people, and stands in for it while
//! the peer does not answer. An operator that is killed anywhere finds its place again from there.

use jiff::Timestamp;
use watari_crds::conditions::{Finding, Kind, Reason};
use watari_crds::crossing::{Crossing, Site, Stage};
use watari_crds::failover::FailoverStatus;
use watari_crds::pair::{Moved, PairCrossing, SyncPair, SyncPairStatus};
use watari_crds::replica::SyncReplica;

use super::observe::{Replica, Seen};
use super::pair_id;
use super::readiness::{hindrance, is_stopped, not_due};
use crate::side::manifest::{self, travelling};
use crate::side::send::Receiver;
use crate::side::{self, Progress, accepts_writes, receive, rest, send};

/// Moves that the status remembers.
const HISTORY_MAX: usize = 10;
/// Pause after a failed attempt, times the number of attempts, seconds; and the longest.
const PAUSE_SECONDS: i64 = 30;
const PAUSE_SECONDS_MAX: i64 = 600;

/// What follows for the pair.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Course {
    pub active: Site,
    pub epoch: Option<i64>,
    pub moves: i64,
    pub history: Vec<Moved>,
    /// As it shall stand in the SyncReplica.
    pub crossing: Option<Crossing>,
    /// As it shall stand in the pair's status.
    pub record: Option<PairCrossing>,
    /// For the VM at home.
    pub steps: Vec<side::Step>,
    /// A wish to move that waits or is not followed, with the reason.
    pub held_up: Option<(Reason, String)>,
    /// The home wrote alone while the peer was promoted: what it holds, in words.
    pub diverged: Option<String>,
}

impl Course {
    /// Nothing is known that was not known before.
    pub fn standing(before: &SyncPairStatus) -> Course {
        Course {
            active: before.active_site,
            epoch: before.epoch,
            moves: before.moves,
            history: before.history.clone(),
            record: before.crossing.clone(),
            ..Course::default()
        }
    }

    fn remember(&mut self, moved: Moved) {
        self.history.insert(0, moved);
        self.history.truncate(HISTORY_MAX);
    }

    /// An attempt is under way.
    pub fn is_under_way(&self) -> bool {
        self.crossing.is_some()
    }

    /// Our own Pod holds the folder at home: the VM is not here, or leaves without having run.
    pub fn wants_holder(&self, seen: &Seen) -> bool {
        let vm_has_the_claims = seen.side.launcher.as_ref().is_some_and(|pod| pod.scheduled);
        !vm_has_the_claims && (self.active == Site::Peer || self.is_under_way())
    }

    /// What is to be said about a wish that is not followed.
    pub fn site_differs(&self) -> Finding {
        match &self.held_up {
            Some((Reason::AtMoveDiffers, text)) => {
                Finding::new(Kind::SiteDiffers, true, Reason::AtMoveDiffers, text.clone())
            }
            Some(_) | None => Finding::new(Kind::SiteDiffers, false, Reason::AsAsked, ""),
        }
    }

    /// Whether the home holds writes that the peer never had.
    pub fn divergence(&self) -> Finding {
        match &self.diverged {
            Some(text) => Finding::new(Kind::Diverged, true, Reason::WroteAlone, text.clone()),
            None => Finding::new(Kind::Diverged, false, Reason::AsAsked, ""),
        }
    }

    /// The VM is at the peer because it was promoted without the home.
    pub fn is_failed_over(&self) -> bool {
        self.active == Site::Peer && self.history.first().is_some_and(|moved| moved.failover)
    }

    fn place(&self) -> rest::Place {
        if self.is_failed_over() { rest::Place::Left } else { rest::Place::Home }
    }
}

/// Decides what comes next.
pub fn course(pair: &SyncPair, seen: &Seen) -> Course {
    let before = pair.status.clone().unwrap_or_default();
    let mut course = Course::standing(&before);
    (course.active, course.epoch) = active(seen, &before);
    // What the peer did alone comes first: another move may have followed it.
    let alone = failed_over(seen, &before);
    let mut was = before.active_site;
    if let Some(failover) = alone {
        (course.moves, was) = (failover.at_move + 1, Site::Peer);
        course.remember(Moved { failover: true, ..moved(Site::Peer, None, failover.ended.unwrap_or(seen.now)) });
    }
    if course.active != was {
        course.moves += 1;
        course.remember(moved(course.active, before.crossing.as_ref(), seen.now));
    }
    // An attempt that began before a failover is over, wherever it led.
    match written(seen, &before).filter(|attempt| alone.is_none() && attempt.at_move == before.moves) {
        Some(attempt) if attempt.to == course.active => arrived(pair, seen, &mut course),
        Some(attempt) => go_on(pair, seen, attempt, &before, &mut course),
        None => begin(pair, seen, &before, &mut course),
    }
    course
}

/// By the sidecars' roles: of two that both believe to be active, the one with the higher epoch, and never one below an epoch that was seen
/// already. A home that was promoted past says "Serving" until it hears of it, also while the peer does not answer.
fn active(seen: &Seen, before: &SyncPairStatus) -> (Site, Option<i64>) {
    let current = |epoch: &i64| *epoch >= before.epoch.unwrap_or_default();
    let home = seen.side.report.as_ref().filter(|report| accepts_writes(&report.role));
    let home = home.and_then(|report| i64::try_from(report.epoch).ok()).filter(current);
    let peer = replica(seen).and_then(|found| found.status.as_ref());
    let peer = peer.filter(|status| status.role.as_deref().is_some_and(accepts_writes));
    let peer = peer.map(|status| status.epoch.unwrap_or_default()).filter(current);
    match (home, peer) {
        (Some(home), Some(peer)) if peer > home => (Site::Peer, Some(peer)),
        (Some(home), _) => (Site::Source, Some(home)),
        (None, Some(peer)) => (Site::Peer, Some(peer)),
        (None, None) => (before.active_site, before.epoch),
    }
}

/// A failover that this pair has not counted yet.
fn failed_over<'a>(seen: &'a Seen, before: &SyncPairStatus) -> Option<&'a FailoverStatus> {
    let failover = replica(seen)?.status.as_ref()?.failover.as_ref()?;
    (failover.counts() && failover.at_move >= before.moves).then_some(failover)
}

fn moved(to: Site, attempt: Option<&PairCrossing>, now: Timestamp) -> Moved {
    let planned = attempt.filter(|crossing| crossing.to == to);
    Moved {
        to,
        ended: now,
        seconds: planned.map(|crossing| now.as_second() - crossing.began.as_second()),
        predicted_seconds: planned.and_then(|crossing| crossing.predicted_seconds),
        failover: false,
    }
}

pub(super) fn replica(seen: &Seen) -> Option<&SyncReplica> {
    match &seen.replica {
        Replica::Found(found) => Some(found),
        Replica::None | Replica::Unknown => None,
    }
}

/// The attempt that is under way.
fn written(seen: &Seen, before: &SyncPairStatus) -> Option<Crossing> {
    match &seen.replica {
        Replica::Found(found) => found.spec.crossing.clone(),
        Replica::None => None,
        Replica::Unknown => {
            let record = before.crossing.as_ref().filter(|record| record.failed.is_none())?;
            Some(Crossing {
                id: record.id.clone(),
                to: record.to,
                connect: None,
                at_move: before.moves,
                stopped: record.stopped,
                cancelled: false,
            })
        }
    }
}

/// The VM is where the attempt led. Its last duties here are done before the record goes.
fn arrived(pair: &SyncPair, seen: &Seen, course: &mut Course) {
    course.record = None;
    course.crossing = None;
    course.steps = rest::decide(rest::Place::Home, &pair_id(pair), &seen.side);
}

fn go_on(pair: &SyncPair, seen: &Seen, mut attempt: Crossing, before: &SyncPairStatus, course: &mut Course) {
    attempt.cancelled |= pair.spec.active_site != attempt.to;
    let own = own_part(pair, seen, &attempt);
    let said = replica(seen).and_then(|found| found.status.as_ref()?.crossing.as_ref());
    let said = said.filter(|said| said.id == attempt.id);
    let peer_failed = said.is_some_and(|said| said.stage == Stage::Failed);
    let mut record = record(&attempt, before, seen.now);
    record.stage = own.stage;
    record.message = match (attempt.to, said) {
        (Site::Source, Some(said)) if said.stage != Stage::Done => format!("{} Peer: {}", own.message, said.message),
        _ => own.message.clone(),
    };
    course.steps = own.steps;
    if own.stage == Stage::Failed && peer_failed {
        record.failed = Some(seen.now);
        course.crossing = None;
        // One that a person called off is over and not worth a word.
        course.record = (!attempt.cancelled).then_some(record);
        return;
    }
    if attempt.to == Site::Source && !matches!(own.stage, Stage::Preparing | Stage::Failed) {
        attempt.connect = seen.side.kubevirt.as_ref().map(|kubevirt| kubevirt.end.address.clone());
    }
    course.record = Some(record);
    course.crossing = Some(attempt);
}

fn own_part(pair: &SyncPair, seen: &Seen, attempt: &Crossing) -> Progress {
    let status = replica(seen).and_then(|found| found.status.as_ref());
    let other = status.and_then(|status| status.migration.clone()).unwrap_or_default();
    match attempt.to {
        Site::Peer => {
            let said = status.and_then(|status| status.crossing.as_ref());
            send::decide(attempt, &other, &Receiver::at_peer(attempt, said), &seen.side)
        }
        Site::Source => {
            // At the peer it may have been changed; what runs there comes home with its memory, and the template is the home's.
            let manifest = replica(seen).and_then(|found| found.spec.vm.clone());
            let manifest = manifest.or_else(|| seen.side.vm.as_ref().map(travelling)).unwrap_or_default();
            receive::decide(attempt, &pair_id(pair), &manifest, &other, &seen.side)
        }
    }
}

fn record(attempt: &Crossing, before: &SyncPairStatus, now: Timestamp) -> PairCrossing {
    match before.crossing.as_ref().filter(|record| record.id == attempt.id) {
        Some(record) => record.clone(),
        None => PairCrossing {
            id: attempt.id.clone(),
            to: attempt.to,
            stopped: attempt.stopped,
            stage: Stage::Preparing,
            message: String::new(),
            began: now,
            failed: None,
            attempt: before.crossing.as_ref().map_or(0, |record| record.attempt) + 1,
            predicted_seconds: before.predicted_cutover.as_ref().map(|it| it.transfer_seconds),
        },
    }
}

fn begin(pair: &SyncPair, seen: &Seen, before: &SyncPairStatus, course: &mut Course) {
    course.steps = rest::decide(course.place(), &pair_id(pair), &seen.side);
    let to = pair.spec.active_site;
    if course.active == Site::Peer {
        diverged(pair, seen, course);
    }
    if to == course.active {
        course.record = None;
        return;
    }
    if pair.spec.at_move != course.moves {
        let text = format!(
            "`activeSite` is {to:?} and the VM is active at {:?}; `atMove` is {}, and the VM has moved {} times.",
            course.active, pair.spec.at_move, course.moves
        );
        course.held_up = Some((Reason::AtMoveDiffers, text));
        return;
    }
    if let Some(why) = hindrance(seen, before, to).or_else(|| not_due(pair, seen, to)) {
        course.held_up = Some((Reason::Moving, why));
        return;
    }
    if let Some(failed) = before.crossing.as_ref().filter(|record| record.failed.is_some() && record.to == to) {
        let ended = failed.failed.map_or(0, |at| at.as_second());
        let pause = (PAUSE_SECONDS * failed.attempt).min(PAUSE_SECONDS_MAX);
        let left = ended + pause - seen.now.as_second();
        if left > 0 {
            let text =
                format!("Attempt {} failed: {} The next one begins in {left} s.", failed.attempt, failed.message);
            course.held_up = Some((Reason::MoveFailed, text));
            return;
        }
    }
    // A name is used once: KubeVirt keeps what belongs to one.
    let id = format!("watari-{}-{}", pair_id(pair), seen.now.as_second());
    let (at_move, stopped) = (course.moves, is_stopped(seen, to));
    let attempt = Crossing { id, to, connect: None, at_move, stopped, cancelled: false };
    let mut record = record(&attempt, before, seen.now);
    record.message = "It begins.".to_owned();
    course.record = Some(record);
    course.crossing = Some(attempt);
    course.steps = Vec::new();
}

/// The home was replaced while it was active. What it wrote alone stays until a person consents, at this count of moves.
fn diverged(pair: &SyncPair, seen: &Seen, course: &mut Course) {
    let Some(report) = seen.side.report.as_ref().filter(|report| report.role == "Fenced") else { return };
    let held = match &report.divergence {
        Some(list) if list.anything => format!("may have written anything after generation {}", list.after),
        Some(list) => format!("holds {} bytes that it wrote alone after generation {}", list.bytes, list.after),
        None => "may have written alone".to_owned(),
    };
    let consent = pair.spec.overwrite_diverged.as_ref().map(|consent| consent.at_move);
    let asked = match consent {
        Some(at_move) if at_move == course.moves && seen.side.launcher.is_none() => {
            course.steps.push(side::Step::AcceptDivergence);
            " It is being given up, as asked.".to_owned()
        }
        Some(at_move) if at_move == course.moves => " It is given up once the VM's Pod here has ended.".to_owned(),
        Some(at_move) => {
            format!(" `overwriteDiverged.atMove` is {at_move}, and the VM has moved {} times.", course.moves)
        }
        None => String::new(),
    };
    course.diverged = Some(format!("The peer was promoted without this site, which {held}.{asked}"));
}

/// The VM's definition for the peer. While the VM is there it stays as it was sent.
pub fn definition(seen: &Seen, active: Site) -> Option<serde_json::Value> {
    let sent = replica(seen).and_then(|found| found.spec.vm.clone());
    match active {
        Site::Peer => sent,
        Site::Source => {
            let mut fresh = travelling(seen.side.vm.as_ref()?);
            // While it waits or has just left, its strategy says nothing of what a person wants.
            if manifest::run_strategy(&fresh) == manifest::RECEIVER {
                return sent;
            }
            if let Some(sent) = sent.filter(|_| seen.side.role().is_some_and(|role| !accepts_writes(role))) {
                fresh["spec"]["runStrategy"] = sent["spec"]["runStrategy"].clone();
            }
            Some(fresh)
        }
    }
}

#[cfg(test)]
#[path = "crossing_tests.rs"]
mod tests;
