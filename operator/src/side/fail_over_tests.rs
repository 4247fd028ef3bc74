//! The table of [`super::decide`] and [`super::hindrance`].

use serde_json::json;
use watari_crds::names::label;
use watari_wire::report::{LinkReport, ReplicaReport, Report};

use super::super::observe::{Launcher, MigrationSeen, VmiSeen};
use super::*;

const PAIR: &str = "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10";

fn manifest() -> Value {
    json!({ "metadata": { "name": "ledger" }, "spec": { "runStrategy": "Always" } })
}

fn side(role: &str) -> Side {
    let kept = vec!["1.9".to_owned(), "1.8".to_owned()];
    let replica = ReplicaReport { committed: "1.9".to_owned(), kept, ..ReplicaReport::default() };
    let report = Report { role: role.to_owned(), replica: Some(replica), ..Report::default() };
    Side { report: Some(report), ..Side::default() }
}

fn record(stage: FailoverStage) -> FailoverStatus {
    let began = jiff::Timestamp::UNIX_EPOCH;
    FailoverStatus { at_move: 0, stage, message: String::new(), generation: None, began, ended: None }
}

fn ours(strategy: &str) -> Option<Value> {
    let labels = json!({ label::PAIR: PAIR, label::MANAGED: "watari" });
    Some(json!({ "metadata": { "name": "ledger", "labels": labels }, "spec": { "runStrategy": strategy } }))
}

fn launcher() -> Option<Launcher> {
    Some(Launcher { wired: true, scheduled: true, ..Launcher::default() })
}

fn vmi(phase: &str) -> Option<VmiSeen> {
    Some(VmiSeen { phase: phase.to_owned(), ..VmiSeen::default() })
}

fn go(stage: FailoverStage, vm: &Value, generation: Option<&str>, told: bool, seen: &Side) -> Next {
    decide(&record(stage), About { pair_id: PAIR, vm: Some(vm), generation, told }, seen)
}

#[test]
fn a_replica_is_promoted_then_its_vm_made_and_that_only_when_admission_knows() {
    let vm = manifest();
    let step = |role: &str, stage, told| go(stage, &vm, None, told, &side(role));
    for role in ["Replica", "Voided"] {
        let promoting = step(role, FailoverStage::Clearing, false);
        assert_eq!(promoting.steps, [Step::Promote { generation: None }]);
        assert!(promoting.message.starts_with("The home does not answer"), "{}", promoting.message);
    }
    let mut linked = side("Replica");
    linked.report.as_mut().expect("one").link = LinkReport { connected: true, ..LinkReport::default() };
    assert!(go(FailoverStage::Clearing, &vm, None, false, &linked).message.starts_with("The home answers"));
    assert!(step("Promoting", FailoverStage::Promoting, false).steps.is_empty());
    assert!(step("Serving", FailoverStage::Promoting, false).steps.is_empty(), "admission would refuse the VM");
    let made = step("Serving", FailoverStage::Starting, true);
    let [Step::MakeVm(object)] = made.steps.as_slice() else { panic!("{made:?}") };
    assert_eq!((object["spec"]["runStrategy"].as_str(), made.stage), (Some("Always"), FailoverStage::Starting));
    let started = |phase| Side { vm: ours("Always"), vmi: vmi(phase), launcher: launcher(), ..side("Serving") };
    let stage = |seen: &Side| go(FailoverStage::Starting, &vm, None, true, seen).stage;
    assert_eq!(stage(&started("Scheduling")), FailoverStage::Starting);
    assert_eq!(stage(&started("Running")), FailoverStage::Done);
    // The VM's Pod takes the folder over: nobody answers for a moment, and nothing is promoted again.
    let silent = Side { report: None, ..started("Scheduled") };
    assert_eq!(stage(&silent), FailoverStage::Starting);
}

#[test]
fn a_named_generation_goes_to_the_sidecar_by_its_number() {
    let next = go(FailoverStage::Clearing, &manifest(), Some("1.8"), false, &side("Replica"));
    assert_eq!(next.steps, [Step::Promote { generation: Some(8) }]);
}

#[test]
fn a_vm_that_was_stopped_is_as_stopped_afterwards() {
    let vm = json!({ "metadata": { "name": "ledger" }, "spec": { "runStrategy": "Halted" } });
    let made = go(FailoverStage::Starting, &vm, None, true, &side("Serving"));
    assert!(matches!(made.steps.as_slice(), [Step::MakeVm(object)] if object["spec"]["runStrategy"] == "Halted"));
    let seen = Side { vm: ours("Halted"), ..side("Serving") };
    assert_eq!(go(FailoverStage::Starting, &vm, None, true, &seen).stage, FailoverStage::Done);
}

#[test]
fn what_a_move_left_goes_before_anything_is_promoted_and_nothing_goes_without_the_sidecars_word() {
    let migration = |deleting| MigrationSeen { name: "watari-1".to_owned(), phase: "Running".to_owned(), deleting };
    let mut seen = Side {
        vm: ours("WaitAsReceiver"),
        vmi: vmi("Scheduled"),
        launcher: launcher(),
        migrations: vec![migration(false)],
        ..side("Attached")
    };
    let vm = manifest();
    let clear = |seen: &Side| go(FailoverStage::Clearing, &vm, None, false, seen);
    assert_eq!(clear(&seen).steps, [Step::DeleteMigration("watari-1".to_owned()), Step::RemoveVm]);
    seen.migrations = vec![migration(true)];
    seen.vm.as_mut().expect("one")["metadata"]["deletionTimestamp"] = json!("now");
    let waiting = clear(&seen);
    assert_eq!((waiting.steps.len(), waiting.stage), (0, FailoverStage::Clearing));
    let silent = Side { report: None, ..Side { vm: ours("WaitAsReceiver"), ..Side::default() } };
    assert!(clear(&silent).steps.is_empty());
    (seen.vm, seen.vmi, seen.launcher, seen.report) = (None, None, None, side("Replica").report);
    assert_eq!(clear(&seen).steps, [Step::Promote { generation: None }], "KubeVirt may keep the VMIM for long");
}

#[test]
fn what_cannot_be_done_is_said_before_anything_is_touched() {
    let vm = manifest();
    let stranger = Side { vm: Some(json!({ "metadata": { "name": "ledger" } })), ..side("Replica") };
    let mut empty = side("Replica");
    empty.report.as_mut().expect("one").replica = Some(ReplicaReport::default());
    for (seen, vm, generation, words) in [
        (side("Replica"), Some(&vm), None, None),
        (side("Attached"), Some(&vm), Some("1.8"), None),
        (Side::default(), Some(&vm), None, None),
        (side("Serving"), Some(&vm), None, Some("active here already")),
        (side("Fenced"), Some(&vm), None, Some("is Fenced, not a replica")),
        (side("Sealed"), Some(&vm), None, Some("is Sealed, not a replica")),
        (side("Replica"), None, None, Some("never sent the VM's definition")),
        (stranger, Some(&vm), None, Some("Watari did not make")),
        (side("Replica"), Some(&vm), Some("1.7"), Some("Generation 1.7 is not kept here; kept are 1.9, 1.8.")),
        (empty, Some(&vm), None, Some("No generation is whole here")),
    ] {
        let why = hindrance(PAIR, vm, generation, &seen);
        assert_eq!(why.is_some(), words.is_some(), "{words:?}: {why:?}");
        assert!(why.unwrap_or_default().contains(words.unwrap_or_default()), "{words:?}");
    }
}
