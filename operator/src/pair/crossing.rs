//! The course of a pair's moves: where the VM is, where it shall be, and the attempt that leads there. A pure, total function.
//!
//! The attempt's one durable record is the SyncReplica's `spec.crossing`; the pair's status repeats it for people, and stands in for it while
//! the peer does not answer. An operator that is killed anywhere finds its place again from there.

use jiff::Timestamp;
use watari_crds::conditions::{Finding, Kind, Reason};
use watari_crds::crossing::{Crossing, Site, Stage};
use watari_crds::pair::{CutoverPolicy, Moved, PairCrossing, SyncPair, SyncPairStatus};
use watari_crds::quantity;
use watari_crds::replica::SyncReplica;
use watari_wire::report::Report;

use super::observe::{Peer, Replica, Seen};
use super::pair_id;
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
}

impl Course {
    /// Nothing is known that was not known before.
    pub fn standing(before: &SyncPairStatus) -> Course {
        Course {
            active: before.active_site,
            moves: before.moves,
            history: before.history.clone(),
            record: before.crossing.clone(),
            ..Course::default()
        }
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
}

/// Decides what comes next.
pub fn course(pair: &SyncPair, seen: &Seen) -> Course {
    let before = pair.status.clone().unwrap_or_default();
    let mut course = Course::standing(&before);
    course.active = active(seen, before.active_site);
    if course.active != before.active_site {
        course.moves += 1;
        course.history.insert(0, moved(course.active, &before, seen.now));
        course.history.truncate(HISTORY_MAX);
    }
    match written(seen, &before) {
        Some(attempt) if attempt.to == course.active => arrived(pair, seen, &mut course),
        Some(attempt) => go_on(pair, seen, attempt, &before, &mut course),
        None => begin(pair, seen, &before, &mut course),
    }
    course
}

/// By the sidecars' roles; of two that both believe to be active, the one with the higher epoch.
fn active(seen: &Seen, before: Site) -> Site {
    let home = seen.side.report.as_ref().map(|report| (report.role.as_str(), i64::try_from(report.epoch).ok()));
    let status = replica(seen).and_then(|found| found.status.as_ref());
    let peer = status.and_then(|status| Some((status.role.as_deref()?, status.epoch)));
    let home = home.filter(|(role, _)| accepts_writes(role));
    let peer = peer.filter(|(role, _)| accepts_writes(role));
    match (home, peer) {
        (Some((_, home)), Some((_, peer))) => {
            if peer > home {
                Site::Peer
            } else {
                Site::Source
            }
        }
        (Some(_), None) => Site::Source,
        (None, Some(_)) => Site::Peer,
        (None, None) => before,
    }
}

fn moved(to: Site, before: &SyncPairStatus, now: Timestamp) -> Moved {
    let planned = before.crossing.as_ref().filter(|crossing| crossing.to == to);
    Moved {
        to,
        ended: now,
        seconds: planned.map(|crossing| now.as_second() - crossing.began.as_second()),
        predicted_seconds: planned.and_then(|crossing| crossing.predicted_seconds),
    }
}

fn replica(seen: &Seen) -> Option<&SyncReplica> {
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
    course.steps = rest::decide(rest::Place::Home, &pair_id(pair), &seen.side);
    let to = pair.spec.active_site;
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
    let attempt = Crossing { id, to, connect: None, stopped: is_stopped(seen, to), cancelled: false };
    let mut record = record(&attempt, before, seen.now);
    record.message = "It begins.".to_owned();
    course.record = Some(record);
    course.crossing = Some(attempt);
    course.steps = Vec::new();
}

/// The VM does not run where it is.
fn is_stopped(seen: &Seen, to: Site) -> bool {
    match to {
        Site::Peer => seen.side.launcher.is_none() && seen.side.vmi.is_none(),
        Site::Source => {
            let status = replica(seen).and_then(|found| found.status.as_ref());
            !status.is_some_and(|status| status.running)
        }
    }
}

/// Why a move cannot begin; before it has cost anything.
fn hindrance(seen: &Seen, before: &SyncPairStatus, to: Site) -> Option<String> {
    let Peer::Usable(usable) = &seen.peer else { return Some("The peer cannot be used now.".to_owned()) };
    let Some(found) = replica(seen) else { return Some("There is no replica at the peer yet.".to_owned()) };
    if let Some(missing) = usable.cluster.status.iter().flat_map(|status| &status.missing).next() {
        return Some(format!("Site {} lacks {}. {}", missing.site, missing.what, missing.remedy));
    }
    let stopped = is_stopped(seen, to);
    match to {
        Site::Peer if stopped && before.committed.is_none() => {
            Some("The VM does not run and was never synchronised: start it once.".to_owned())
        }
        Site::Peer if stopped => None,
        Site::Peer => match &seen.side.report {
            None => Some("The VM runs without a sidecar that answers: restart it.".to_owned()),
            Some(report) => not_in_order(report),
        },
        Site::Source => {
            let role = found.status.as_ref().and_then(|status| status.role.as_deref()).unwrap_or_default();
            if !accepts_writes(role) {
                return Some(format!(
                    "The peer's sidecar is {role}: it has no right to write that it could hand over."
                ));
            }
            match &seen.side.report {
                Some(report) if report.role == "Replica" && report.link.connected => None,
                Some(report) if report.role == "Replica" => Some("The two sidecars are not connected.".to_owned()),
                Some(report) => Some(format!("The sidecar at home is {}, not a replica.", report.role)),
                None => Some("The sidecar at home does not answer yet.".to_owned()),
            }
        }
    }
}

fn not_in_order(report: &Report) -> Option<String> {
    if !accepts_writes(&report.role) {
        return Some(format!("The VM's sidecar is {}: it has no right to write that it could hand over.", report.role));
    }
    if report.generations.committed.is_empty() {
        return Some("No whole generation is at the peer yet.".to_owned());
    }
    if report.trust != "Tracked" {
        return Some(format!("The VM's sidecar is {}: it must compare its disks with the peer's first.", report.trust));
    }
    (!report.link.connected).then(|| "The two sidecars are not connected.".to_owned())
}

/// The policy says to wait.
fn not_due(pair: &SyncPair, seen: &Seen, to: Site) -> Option<String> {
    let cutover = &pair.spec.cutover;
    match cutover.policy {
        CutoverPolicy::Manual => None,
        CutoverPolicy::At => {
            let at = cutover.at?;
            (seen.now < at).then(|| format!("The move begins at {at}."))
        }
        CutoverPolicy::WhenReady => {
            let (bytes, seconds) = left(seen, to)?;
            let max = cutover.max_bytes.as_deref().and_then(|text| quantity::parse(text).ok());
            if let Some(max) = max.filter(|max| u128::try_from(bytes).unwrap_or_default() > u128::from(*max)) {
                return Some(format!("{bytes} bytes are left to send; the move begins at {max}."));
            }
            let max = cutover.max_seconds?;
            match seconds {
                Some(seconds) if seconds <= max => None,
                Some(seconds) => Some(format!("{seconds} s are left to send; the move begins at {max}.")),
                None => Some("The link's speed is not known yet.".to_owned()),
            }
        }
    }
}

/// What a move has to send: disk content in bytes, and disks and memory in seconds.
fn left(seen: &Seen, to: Site) -> Option<(i64, Option<i64>)> {
    match to {
        Site::Peer => Some(side::remains(seen.side.report.as_ref()?, seen.side.memory())),
        Site::Source => {
            let status = replica(seen)?.status.as_ref()?;
            Some((status.lag_bytes?, status.transfer_seconds))
        }
    }
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
