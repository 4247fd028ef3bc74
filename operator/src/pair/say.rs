//! What a pair says of itself: its phase and its conditions. Pure.

use watari_crds::conditions::{Finding, Kind, Reason};
use watari_crds::crossing::Site;
use watari_crds::pair::{Phase, SyncPair};
use watari_wire::report::Report;

use super::crossing::Course;
use super::observe::Seen;
use crate::side;

/// Phase and findings of a pair that has all it needs.
pub fn say(pair: &SyncPair, seen: &Seen, course: &Course, waits_for_size: bool) -> (Phase, Vec<Finding>) {
    let committed = seen.side.report.as_ref().is_some_and(|report| !report.generations.committed.is_empty());
    let (phase, ready, reconciling, reason, text) = match (&seen.side.launcher, &seen.side.report) {
        _ if course.is_under_way() => {
            let text = course.record.as_ref().map_or("", |record| record.message.as_str());
            let to = pair.spec.active_site;
            (Phase::Moving, false, true, Reason::Moving, format!("The VM is on its way to {to:?}. {text}"))
        }
        _ if course.diverged.is_some() => {
            let text = course.diverged.clone().unwrap_or_default();
            (Phase::Diverged, false, false, Reason::WroteAlone, text)
        }
        (_, report) if course.active == Site::Peer => at_peer(report.as_ref(), course.is_failed_over()),
        _ if pair.spec.paused => (Phase::Paused, false, false, Reason::Paused, "A person paused it.".to_owned()),
        (None, _) => {
            let text = match waits_for_size {
                true => "The VM does not run; how large its disks are is read at its next start.",
                false => "The VM does not run; the peer has what was last sent.",
            };
            (Phase::Stopped, false, false, Reason::VmNotRunning, text.to_owned())
        }
        (Some(pod), _) if !pod.wired => {
            (Phase::Preparing, false, true, Reason::NotWired, "The VM runs without its sidecar.".to_owned())
        }
        (Some(_), None) => {
            let why = seen.side.silence.clone().unwrap_or_else(|| "its Pod has no address yet".to_owned());
            (Phase::Preparing, false, true, Reason::SidecarSilent, format!("No word from the VM's sidecar: {why}."))
        }
        (Some(_), Some(report)) if !committed => {
            let why = behind(report.link.connected, &report.generations.behind_because);
            let text = format!("The first whole generation is on its way{why}.");
            (Phase::Synchronizing, false, true, Reason::Synchronizing, text)
        }
        (Some(_), Some(report)) if !report.link.connected => {
            let text = format!("No connection to the peer's sidecar: {}.", report.link.last_error);
            (Phase::Lagging, true, true, Reason::LinkDown, text)
        }
        (Some(_), Some(report)) => {
            let text = format!("Generation {} is whole at the peer.", report.generations.committed);
            (Phase::Protected, true, false, Reason::AsAsked, text)
        }
    };
    let (reconciling, reason, text) = match &course.held_up {
        Some((why @ (Reason::Moving | Reason::MoveFailed), held_up)) => (true, *why, held_up.clone()),
        Some(_) | None => (reconciling, reason, text),
    };
    let restart = seen.side.launcher.as_ref().is_some_and(|pod| !pod.wired);
    let (why, words) = match restart {
        true => (Reason::NotWired, "The VM runs without its sidecar."),
        false => (Reason::AsAsked, ""),
    };
    let findings = vec![
        Finding::new(Kind::Ready, ready, reason, text.clone()),
        Finding::new(Kind::Reconciling, reconciling, reason, text),
        stuck(course),
        Finding::new(Kind::RestartRequired, restart, why, words),
        attention(seen),
    ];
    (phase, findings)
}

/// After a failover the home waits for a person's consent, for as long as it takes.
fn stuck(course: &Course) -> Finding {
    let consented = course.steps.contains(&side::Step::AcceptDivergence);
    match course.diverged.as_ref().filter(|_| !consented) {
        Some(text) => Finding::new(Kind::Stalled, true, Reason::WroteAlone, text.clone()),
        None => Finding::new(Kind::Stalled, false, Reason::AsAsked, ""),
    }
}

/// The VM is active at the peer, and the home is its replica.
fn at_peer(report: Option<&Report>, failed_over: bool) -> (Phase, bool, bool, Reason, String) {
    let Some(report) = report else {
        let text = "The VM is active at the peer; the sidecar here, which receives its changes, does not answer yet.";
        return (Phase::Lagging, false, true, Reason::SidecarSilent, text.to_owned());
    };
    let committed = report.replica.as_ref().map(|it| it.committed.as_str()).unwrap_or_default();
    if failed_over && !holds_its_epoch(report, committed) {
        let text = "The VM is active at the peer after a failover; no generation of its is whole here yet.";
        return (Phase::Synchronizing, false, true, Reason::Synchronizing, text.to_owned());
    }
    if !report.link.connected {
        let text = format!("The VM is active at the peer; no connection to its sidecar: {}.", report.link.last_error);
        return (Phase::Lagging, true, true, Reason::LinkDown, text);
    }
    let text = format!("The VM is active at the peer; generation {committed} is whole here.");
    (Phase::Protected, true, false, Reason::AsAsked, text)
}

/// The disks here began as something else than the VM's: they are its replica from the first generation of the promoted side on.
fn holds_its_epoch(report: &Report, committed: &str) -> bool {
    let epoch = committed.split('.').next().and_then(|epoch| epoch.parse::<u64>().ok());
    report.role == "Replica" && epoch.is_some_and(|epoch| epoch >= report.epoch)
}

fn behind(connected: bool, because: &str) -> String {
    match (connected, because) {
        (false, _) => "; there is no connection to the peer's sidecar now".to_owned(),
        (true, "") => String::new(),
        (true, why) => format!(": {why}"),
    }
}

/// Everything that the sidecar itself wants a person to know.
fn attention(seen: &Seen) -> Finding {
    let conditions = seen.side.report.iter().flat_map(|report| &report.conditions).filter(|condition| condition.status);
    let words: Vec<String> = conditions.map(|it| format!("{}: {} {}", it.kind, it.message, it.next_step)).collect();
    match words.is_empty() {
        true => Finding::new(Kind::Attention, false, Reason::AsAsked, ""),
        false => Finding::new(Kind::Attention, true, Reason::SidecarReports, words.join(" ").trim().to_owned()),
    }
}
