//! Whether a wished move can begin now: what is in its way, and what its policy waits for. Pure.

use watari_crds::crossing::Site;
use watari_crds::pair::{CutoverPolicy, SyncPair, SyncPairStatus};
use watari_crds::quantity;
use watari_wire::report::Report;

use super::crossing::replica;
use super::observe::{Peer, Seen};
use crate::side::{self, accepts_writes};

/// The VM does not run where it is.
pub fn is_stopped(seen: &Seen, to: Site) -> bool {
    match to {
        Site::Peer => seen.side.launcher.is_none() && seen.side.vmi.is_none(),
        Site::Source => {
            let status = replica(seen).and_then(|found| found.status.as_ref());
            !status.is_some_and(|status| status.running)
        }
    }
}

/// Why a move cannot begin; before it has cost anything.
pub fn hindrance(seen: &Seen, before: &SyncPairStatus, to: Site) -> Option<String> {
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
pub fn not_due(pair: &SyncPair, seen: &Seen, to: Site) -> Option<String> {
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
