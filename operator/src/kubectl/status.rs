//! What `status` says about a SyncPair: from the object alone.

use jiff::Timestamp;
use serde::Serialize;
use watari_crds::{
    conditions::{Condition, Kind, Status},
    crossing::Site,
    pair::{Phase, SyncPair},
};

use super::table::{bytes, columns, seconds};

/// One pair, as JSON and as the source of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    pub namespace: String,
    pub name: String,
    pub vm_name: String,
    pub peer: String,
    pub phase: Phase,
    /// Where the VM is active.
    pub active_site: Site,
    /// A whole generation is at the peer and changes follow.
    pub ready: bool,
    /// Age of the newest generation at the peer: what would be lost now.
    pub committed_age_seconds: Option<i64>,
    pub lag_bytes: Option<i64>,
    /// How long the data of a move would need on the link.
    pub move_seconds: Option<i64>,
    /// How much of the disks the peer has, 0 to 100, while that is not all.
    pub progress_percent: Option<u8>,
    /// What keeps it from being well, worst first.
    pub problems: Vec<String>,
}

/// Reads a pair's status.
pub fn row(pair: &SyncPair, now: Timestamp) -> Row {
    let status = pair.status.clone().unwrap_or_default();
    let committed = status.committed.as_ref();
    let (size, dirty) = status.disks.iter().fold((0, 0), |(size, dirty), disk| {
        (size + disk.size_bytes.max(0), dirty + (disk.dirty_bytes - disk.staged_bytes).max(0))
    });
    let progress = (status.phase == Phase::Synchronizing && size > 0)
        .then(|| u8::try_from((size - dirty.min(size)).saturating_mul(100) / size).unwrap_or(100));
    // A status that speaks of an older spec says nothing about this one.
    let current = pair.metadata.generation.is_none_or(|generation| generation == status.observed_generation);
    let holds = |kind: Kind| status.conditions.iter().find(|one| one.kind == kind.name() && one.status == Status::True);
    let mut problems: Vec<String> = [Kind::Stalled, Kind::RestartRequired, Kind::SiteDiffers, Kind::Attention]
        .into_iter()
        .filter_map(holds)
        .map(words)
        .collect();
    let ready = status.conditions.iter().find(|one| one.kind == Kind::Ready.name());
    if problems.is_empty() {
        problems.extend(ready.filter(|one| one.status != Status::True).map(words));
    }
    if !current {
        problems.insert(0, "the operator has not looked at this spec yet; is it running?".to_owned());
    }
    Row {
        namespace: pair.metadata.namespace.clone().unwrap_or_default(),
        name: pair.metadata.name.clone().unwrap_or_default(),
        vm_name: pair.spec.vm_name.clone(),
        peer: pair.spec.peer.clone(),
        phase: status.phase,
        active_site: status.active_site,
        ready: current && ready.is_some_and(|one| one.status == Status::True),
        committed_age_seconds: committed.map(|committed| now.duration_since(committed.cut_time).as_secs().max(0)),
        lag_bytes: status.lag_bytes,
        move_seconds: status.predicted_cutover.as_ref().map(|predicted| predicted.transfer_seconds),
        progress_percent: progress,
        problems,
    }
}

fn words(condition: &Condition) -> String {
    format!("{} ({}): {}", condition.kind, condition.reason, condition.message)
}

/// A table, and below it what is not well. `whole`: one pair was asked for, so say also that nothing is wrong.
pub fn text(rows: &[Row], whole: bool) -> String {
    if rows.is_empty() {
        return "No SyncPairs here. `-A` looks in all namespaces.\n".to_owned();
    }
    let unknown = || "-".to_owned();
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                row.namespace.clone(),
                row.name.clone(),
                row.vm_name.clone(),
                row.peer.clone(),
                format!("{:?}", row.active_site),
                match row.progress_percent {
                    Some(percent) => format!("{:?} {}", row.phase, bar(percent)),
                    None => format!("{:?}", row.phase),
                },
                row.committed_age_seconds.map_or_else(unknown, seconds),
                row.lag_bytes.map_or_else(unknown, bytes),
                row.move_seconds.map_or_else(unknown, seconds),
            ]
        })
        .collect();
    let mut text =
        columns(&["NAMESPACE", "NAME", "VM", "PEER", "ACTIVE", "PHASE", "LOST IF NOW", "BEHIND", "MOVE"], &cells);
    for row in rows {
        for problem in &row.problems {
            text.push_str(&format!("\n{}/{}: {problem}", row.namespace, row.name));
        }
        if whole && row.problems.is_empty() {
            text.push_str(&format!("\n{}/{}: all is well", row.namespace, row.name));
        }
    }
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

/// "[######----] 60 %".
fn bar(percent: u8) -> String {
    let full = usize::from(percent.min(100)) / 10;
    format!("[{}{}] {percent} %", "#".repeat(full), "-".repeat(10 - full))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::{Value, json};

    use super::*;

    fn now() -> Timestamp {
        "2026-11-24T12:00:00Z".parse().unwrap()
    }

    fn pair(status: Value) -> SyncPair {
        serde_json::from_value(json!({
            "apiVersion": "watari.io/v1alpha1", "kind": "SyncPair",
            "metadata": { "name": "vm1", "namespace": "default", "generation": 3 },
            "spec": { "vmName": "vm1", "peer": "osaka" },
            "status": status,
        }))
        .unwrap()
    }

    fn condition(kind: &str, status: &str, message: &str) -> Value {
        json!({
            "type": kind, "status": status, "reason": "Because", "message": message, "observedGeneration": 3,
            "lastTransitionTime": "2026-11-24T11:00:00Z",
        })
    }

    #[test]
    fn a_protected_pair_is_well_and_says_what_would_be_lost_and_how_long_a_move_takes() {
        let row = row(
            &pair(json!({
                "observedGeneration": 3, "phase": "Protected", "lagBytes": 12 << 20,
                "committed": { "generation": "1.7", "cutTime": "2026-11-24T11:59:52Z" },
                "predictedCutover": { "bytes": 1, "transferSeconds": 14 },
                "conditions": [condition("Ready", "True", "")],
            })),
            now(),
        );
        assert!(row.ready && row.problems.is_empty());
        let text = text(&[row], true);
        assert!(text.contains("Protected   8s            12.0 MiB   14s") && text.contains("all is well"), "{text}");
    }

    #[test]
    fn a_first_synchronisation_shows_its_progress_without_what_is_staged_counted_as_missing() {
        let row = row(
            &pair(json!({
                "observedGeneration": 3, "phase": "Synchronizing",
                "disks": [{ "name": "root", "sizeBytes": 1000, "dirtyBytes": 900, "stagedBytes": 500 }],
                "conditions": [condition("Ready", "False", "the first generation is on its way")],
            })),
            now(),
        );
        assert_eq!((row.ready, row.progress_percent), (false, Some(60)));
        let text = text(&[row], false);
        assert!(text.contains("Synchronizing [######----] 60 %") && text.contains("on its way"), "{text}");
    }

    #[test]
    fn what_a_person_must_do_comes_before_what_is_merely_not_ready() {
        let conditions =
            [condition("Ready", "False", "not yet"), condition("RestartRequired", "True", "restart the VM")];
        let row = row(&pair(json!({ "observedGeneration": 3, "conditions": conditions })), now());
        assert_eq!(row.problems, ["RestartRequired (Because): restart the VM"]);
    }

    #[test]
    fn a_status_of_an_older_spec_is_not_believed() {
        let row = row(&pair(json!({ "observedGeneration": 2, "conditions": [condition("Ready", "True", "")] })), now());
        assert!(!row.ready && row.problems[0].contains("is it running"), "{row:?}");
        let untouched = super::row(&pair(Value::Null), now());
        assert!(!untouched.ready && untouched.problems.len() == 1, "{untouched:?}");
    }
}
