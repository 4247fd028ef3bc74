//! The table of [`super::decide`].

use serde_json::json;
use watari_crds::conditions::Status;
use watari_wire::report::{ReplicaReport, Report};

use super::*;
use crate::side::Step;

fn replica(promote: serde_json::Value) -> SyncReplica {
    serde_json::from_value(json!({
        "apiVersion": "watari.io/v1alpha1", "kind": "SyncReplica", "metadata": { "name": "ledger", "namespace": "shop" },
        "spec": {
            "pairId": "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10", "pairName": "shop/ledger", "vmName": "ledger", "homeSite": "tokyo",
            "site": "osaka", "disks": [], "metadata": { "sizeBytes": 1 << 30, "access": "ReadWriteOnce" }, "interval": "10s",
            "retention": { "count": 3 }, "homeAuthorities": "PEM", "vm": { "metadata": { "name": "ledger" }, "spec": {} },
            "moves": 2, "promote": promote,
        },
    }))
    .expect("a SyncReplica")
}

fn side(role: &str) -> Side {
    let replica = ReplicaReport { committed: "3.9".to_owned(), ..ReplicaReport::default() };
    let report = Report { role: role.to_owned(), replica: Some(replica), ..Report::default() };
    Side { report: Some(report), ..Side::default() }
}

/// Decides, and takes over what would be written.
fn step(replica: &mut SyncReplica, seen: &Side) -> Course {
    let course = decide(replica, "osaka", Timestamp::UNIX_EPOCH, seen);
    let status = replica.status.get_or_insert_default();
    status.failover = course.record.clone();
    status.moves = course.moves;
    status.role = seen.role().map(str::to_owned).or(status.role.clone());
    course
}

fn stage(course: &Course) -> FailoverStage {
    course.record.as_ref().expect("it is recorded").stage
}

#[test]
fn a_wish_of_this_count_is_recorded_first_then_done_and_counted_once() {
    let mut replica = replica(json!({ "atMove": 2 }));
    let first = step(&mut replica, &side("Replica"));
    assert_eq!((stage(&first), first.moves), (FailoverStage::Clearing, 2));
    assert!(first.progress.expect("it is under way").steps.is_empty(), "nothing is done before it is recorded");
    assert_eq!(first.record.expect("one").generation.as_deref(), Some("3.9"));
    let promoting = step(&mut replica, &side("Replica"));
    assert_eq!(promoting.progress.expect("under way").steps, [Step::Promote { generation: None }]);
    let serving = step(&mut replica, &side("Serving"));
    assert_eq!((stage(&serving), serving.moves), (FailoverStage::Starting, 3));
    let mut runs = side("Serving");
    runs.vm = Some(json!({ "metadata": {} }));
    runs.vmi = Some(crate::side::observe::VmiSeen { phase: "Running".to_owned(), ..Default::default() });
    let done = step(&mut replica, &runs);
    assert_eq!((stage(&done), done.moves), (FailoverStage::Done, 3));
    let after = step(&mut replica, &runs);
    assert_eq!((after.moves, after.progress.is_none(), after.site_differs().status), (3, true, Status::False));
    // The VM has gone home, and the wish still stands there: it is spent.
    replica.spec.moves = 4;
    let home = step(&mut replica, &side("Replica"));
    assert_eq!((home.moves, home.progress.is_none(), home.site_differs().status), (4, true, Status::False));
}

#[test]
fn a_wish_of_another_count_does_nothing_and_says_so() {
    for at_move in [0, 1, 3] {
        let mut replica = replica(json!({ "atMove": at_move }));
        let course = step(&mut replica, &side("Replica"));
        let said = course.site_differs();
        assert_eq!((said.status, said.reason), (Status::True, Reason::PromoteDiffers));
        assert_eq!((course.record, course.progress), (None, None), "{at_move}");
        assert_eq!(said.message, format!("`promote.atMove` is {at_move}, and the VM has moved 2 times."));
    }
}

#[test]
fn a_refused_wish_touches_nothing_and_is_judged_again() {
    let mut replica = replica(json!({ "atMove": 2 }));
    let refused = step(&mut replica, &side("Fenced"));
    assert_eq!((stage(&refused), refused.progress), (FailoverStage::Refused, None));
    assert_eq!(stage(&step(&mut replica, &side("Replica"))), FailoverStage::Clearing);
}

#[test]
fn a_wish_can_be_taken_back_until_it_has_changed_something() {
    for (role, kept) in [("Replica", false), ("Promoting", true), ("Serving", true)] {
        let mut replica = replica(json!({ "atMove": 2 }));
        step(&mut replica, &side("Replica"));
        step(&mut replica, &side("Replica"));
        replica.spec.promote = None;
        let course = step(&mut replica, &side(role));
        assert_eq!(course.record.is_some(), kept, "{role}");
    }
}

#[test]
fn a_replica_that_is_going_or_of_another_site_is_never_promoted() {
    let elsewhere = decide(&replica(json!({ "atMove": 2 })), "kobe", Timestamp::UNIX_EPOCH, &side("Replica"));
    assert_eq!((elsewhere.record, elsewhere.progress), (None, None));
    let mut going = replica(json!({ "atMove": 2 }));
    going.metadata.deletion_timestamp =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::UNIX_EPOCH));
    assert_eq!(decide(&going, "osaka", Timestamp::UNIX_EPOCH, &side("Replica")).record, None);
}
