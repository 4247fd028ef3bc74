//! A pair's status: what the sidecar reports, in the API's words, and what follows for people.

use std::collections::BTreeMap;

use jiff::Timestamp;
use kube::{Api, ResourceExt};
use watari_crds::conditions::{Finding, Kind, Reason, merged};
use watari_crds::crossing::Site;
use watari_crds::pair::{
    Committed, DiskStatus, LinkStatus, Phase, PredictedCutover, Summary, SyncPair, SyncPairStatus,
};
use watari_wire::report::Report;

use super::crossing::Course;
use super::decide::Decision;
use super::observe::Seen;
use crate::apply::apply_status;
use crate::context::Context;
use crate::events;
use crate::side::{accepts_writes, remains};

/// Writes the status, if it changed.
pub async fn report(
    context: &Context,
    pair: &SyncPair,
    seen: &Seen,
    decision: &Decision,
    failure: Option<String>,
) -> kube::Result<()> {
    let before = pair.status.clone().unwrap_or_default();
    let mut findings = decision.findings.clone();
    if let Some(why) = failure {
        findings.retain(|finding| finding.kind != Kind::Reconciling);
        findings.push(Finding::new(Kind::Reconciling, true, Reason::Retrying, format!("Trying again: {why}.")));
    }
    let generation = pair.metadata.generation.unwrap_or_default();
    let figures = match &seen.side.report {
        Some(report) if accepts_writes(&report.role) => figures(report, seen.side.memory()),
        // The last figures stay true of what the peer has; what concerns the moment goes.
        Some(_) | None => {
            SyncPairStatus { committed: before.committed.clone(), disks: before.disks.clone(), ..Default::default() }
        }
    };
    let course = decision.course.clone().unwrap_or_else(|| Course::standing(&before));
    let status = SyncPairStatus {
        observed_generation: generation,
        phase: decision.phase,
        conditions: merged(&before.conditions, &findings, generation, seen.now),
        active_site: course.active,
        epoch: course.epoch,
        moves: course.moves,
        claims: if holds_replica(decision.phase, course.active) { claims(seen) } else { BTreeMap::new() },
        crossing: course.record,
        history: course.history,
        ..figures
    };
    context.metrics.found(pair, &status);
    if status != before {
        let namespace = pair.namespace().expect("a SyncPair is namespaced");
        let api: Api<SyncPair> = Api::namespaced(context.client.clone(), &namespace);
        apply_status(&api, "SyncPair", &pair.name_any(), &status).await?;
        events::tell(context, pair, &before.conditions, &findings).await;
    }
    Ok(())
}

/// Whether the VM's disks here are the replica. Those of a home that wrote alone are not yet: a person may want to copy them.
fn holds_replica(phase: Phase, active: Site) -> bool {
    active == Site::Peer && phase != Phase::Diverged
}

/// The VM's claims, by name with their UIDs.
fn claims(seen: &Seen) -> BTreeMap<String, String> {
    seen.claims.iter().filter_map(|(name, claim)| Some((name.clone(), claim.uid()?))).collect()
}

/// Everything of a status that a report tells. `memory` is the guest's, bytes.
fn figures(report: &Report, memory: u64) -> SyncPairStatus {
    let whole = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    let generations = &report.generations;
    let cut_time = Timestamp::from_millisecond(whole(generations.committed_cut_unix_millis)).ok();
    let cut_time = cut_time.filter(|_| !generations.committed.is_empty());
    let rate = report.link.rate_bytes_per_second;
    let bytes = generations.lag_bytes.saturating_add(memory);
    let (lag_bytes, seconds) = remains(report, memory);
    let disk = |disk: &watari_wire::report::DiskReport| DiskStatus {
        name: disk.name.clone(),
        size_bytes: whole(disk.size_bytes),
        dirty_bytes: whole(disk.dirty_bytes),
        staged_bytes: whole(disk.staged_bytes),
    };
    SyncPairStatus {
        committed: cut_time.map(|cut_time| Committed { generation: generations.committed.clone(), cut_time }),
        disks: report.disks.iter().map(disk).collect(),
        lag_bytes: Some(lag_bytes),
        behind_because: Some(generations.behind_because.clone()).filter(|text| !text.is_empty()),
        link: Some(LinkStatus {
            connected: report.link.connected,
            round_trip_millis: report.link.rtt_millis.round() as i64,
            rate_bytes_per_second: rate.round() as i64,
            content_bytes: whole(report.transfer.content_bytes),
            wire_bytes: whole(report.transfer.wire_bytes),
        }),
        predicted_cutover: seconds.map(|transfer_seconds| PredictedCutover { bytes: whole(bytes), transfer_seconds }),
        summary: Some(Summary {
            behind: in_words(generations.lag_bytes),
            transfer: seconds.map(|seconds| format!("{seconds}s")).unwrap_or_default(),
        }),
        ..SyncPairStatus::default()
    }
}

/// Bytes for people: three digits and a unit.
fn in_words(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 100.0 { 0 } else { 1 };
    format!("{value:.digits$} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;
    use watari_wire::report::{GenerationsReport, LinkReport};

    #[test]
    fn claims_are_held_while_they_are_the_replica_and_not_while_somebody_may_want_to_copy_them() {
        assert!(holds_replica(Phase::Protected, Site::Peer) && holds_replica(Phase::Moving, Site::Peer));
        assert!(!holds_replica(Phase::Protected, Site::Source) && !holds_replica(Phase::Diverged, Site::Peer));
    }

    #[test]
    fn a_move_is_predicted_from_the_lag_and_the_guests_memory_at_the_measured_rate() {
        let report = Report {
            generations: GenerationsReport {
                committed: "1.7".to_owned(),
                committed_cut_unix_millis: 1_000_000,
                lag_bytes: 12 << 20,
                ..GenerationsReport::default()
            },
            link: LinkReport { rate_bytes_per_second: 10.0 * 1024.0 * 1024.0, ..LinkReport::default() },
            ..Report::default()
        };
        let status = figures(&report, 128 << 20);
        let predicted = status.predicted_cutover.expect("the rate is known");
        assert_eq!((predicted.bytes, predicted.transfer_seconds), (140 << 20, 14));
        assert_eq!(status.summary.expect("there is a report").behind, "12.0 MiB");
        assert_eq!(status.committed.expect("one is whole").cut_time.as_second(), 1000);
    }

    #[test]
    fn without_a_measured_rate_or_a_generation_nothing_is_promised() {
        let status = figures(&Report::default(), 128 << 20);
        assert_eq!((status.predicted_cutover, status.committed), (None, None));
    }
}
