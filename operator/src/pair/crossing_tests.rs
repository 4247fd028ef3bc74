//! The table of [`super::course`].

use serde_json::json;
use watari_crds::crossing::CrossingStatus;
use watari_crds::failover::FailoverStage;
use watari_crds::replica::{SyncReplicaSpec, SyncReplicaStatus};
use watari_wire::report::{GenerationsReport, LinkReport, Report};

use super::super::decide::tests::{ID, seen as found};
use super::*;
use crate::side::observe::{Launcher, VmiSeen};

fn pair(active: &str, at_move: i64) -> SyncPair {
    serde_json::from_value(json!({
        "apiVersion": "watari.io/v1alpha1", "kind": "SyncPair",
        "metadata": { "name": "ledger", "namespace": "shop", "uid": ID },
        "spec": { "vmName": "ledger", "peer": "osaka", "activeSite": active, "atMove": at_move },
    }))
    .expect("a SyncPair")
}

fn report(role: &str, epoch: u64) -> Report {
    Report {
        role: role.to_owned(),
        epoch,
        trust: "Tracked".to_owned(),
        link: LinkReport { connected: true, ..LinkReport::default() },
        generations: GenerationsReport { committed: "1.4".to_owned(), ..GenerationsReport::default() },
        ..Report::default()
    }
}

/// The VM runs at home, and the peer is its replica.
fn seen() -> Seen {
    let mut seen = found("Block");
    seen.now = Timestamp::from_second(1000).expect("a small number");
    seen.side.launcher = Some(Launcher { wired: true, scheduled: true, ..Launcher::default() });
    seen.side.vmi = Some(VmiSeen { uid: "u".to_owned(), phase: "Running".to_owned(), ..VmiSeen::default() });
    seen.side.report = Some(report("Serving", 1));
    at_peer(&mut seen, "Replica", 1, None);
    seen
}

fn at_peer(seen: &mut Seen, role: &str, epoch: i64, crossing: Option<Crossing>) {
    let spec: SyncReplicaSpec = serde_json::from_value(json!({
        "pairId": ID, "pairName": "shop/ledger", "vmName": "ledger", "homeSite": "tokyo", "site": "osaka", "disks": [],
        "metadata": { "sizeBytes": 1 << 30, "access": "ReadWriteOnce" }, "interval": "10s", "retention": { "count": 3 },
        "homeAuthorities": "PEM",
    }))
    .expect("a spec");
    let mut found = SyncReplica::new("ledger", SyncReplicaSpec { crossing, ..spec });
    found.status =
        Some(SyncReplicaStatus { role: Some(role.to_owned()), epoch: Some(epoch), ..SyncReplicaStatus::default() });
    seen.replica = Replica::Found(Box::new(found));
}

fn says(seen: &mut Seen, stage: Stage) {
    let Replica::Found(found) = &mut seen.replica else { panic!("there is one") };
    let id = found.spec.crossing.as_ref().expect("one is under way").id.clone();
    let status = found.status.as_mut().expect("there is one");
    status.crossing = Some(CrossingStatus { id, stage, message: String::new(), connect: None });
}

/// Decides, and takes over what would be written.
fn step(pair: &mut SyncPair, seen: &mut Seen) -> Course {
    let course = course(pair, seen);
    if let Replica::Found(found) = &mut seen.replica {
        found.spec.crossing = course.crossing.clone();
    }
    pair.status = Some(SyncPairStatus {
        active_site: course.active,
        epoch: course.epoch,
        moves: course.moves,
        history: course.history.clone(),
        crossing: course.record.clone(),
        ..pair.status.clone().unwrap_or_default()
    });
    course
}

#[test]
fn a_wish_becomes_an_attempt_and_the_attempt_a_move_that_is_counted_once() {
    let (mut pair, mut seen) = (pair("Peer", 0), seen());
    let first = step(&mut pair, &mut seen);
    let attempt = first.crossing.expect("it begins");
    assert_eq!(
        (attempt.id.as_str(), attempt.to, attempt.stopped),
        (format!("watari-{ID}-1000").as_str(), Site::Peer, false)
    );
    assert_eq!(step(&mut pair, &mut seen).crossing.as_ref(), Some(&attempt), "it goes on under the same name");
    at_peer(&mut seen, "Serving", 2, Some(attempt));
    seen.side.report = Some(report("Replica", 2));
    seen.now = Timestamp::from_second(1030).expect("a small number");
    let done = step(&mut pair, &mut seen);
    assert_eq!((done.active, done.moves, done.crossing), (Site::Peer, 1, None));
    assert_eq!((done.history[0].seconds, done.history.len()), (Some(30), 1));
    let after = step(&mut pair, &mut seen);
    assert_eq!((after.moves, after.history.len(), after.record, after.held_up), (1, 1, None, None));
}

#[test]
fn an_old_wish_never_moves_a_vm() {
    let (mut pair, mut seen) = (pair("Source", 0), seen());
    pair.status = Some(SyncPairStatus { active_site: Site::Peer, moves: 1, ..SyncPairStatus::default() });
    at_peer(&mut seen, "Serving", 2, None);
    seen.side.report = Some(report("Replica", 2));
    let course = step(&mut pair, &mut seen);
    assert_eq!((course.crossing, course.held_up.clone().map(|(why, _)| why)), (None, Some(Reason::AtMoveDiffers)));
    let (_, words) = course.held_up.expect("it is said");
    assert_eq!(
        words,
        "`activeSite` is Source and the VM is active at Peer; `atMove` is 0, and the VM has moved 1 times."
    );
    pair.spec.at_move = 1;
    assert_eq!(step(&mut pair, &mut seen).crossing.map(|it| it.to), Some(Site::Source));
}

#[test]
fn a_changed_mind_calls_the_move_off_and_leaves_no_word_of_it() {
    let (mut pair, mut seen) = (pair("Peer", 0), seen());
    step(&mut pair, &mut seen);
    pair.spec.active_site = Site::Source;
    assert!(step(&mut pair, &mut seen).crossing.expect("until both are through").cancelled);
    says(&mut seen, Stage::Failed);
    let over = step(&mut pair, &mut seen);
    assert_eq!((over.crossing, over.record, over.active), (None, None, Site::Source));
}

#[test]
fn a_failed_attempt_is_followed_by_another_one_after_a_pause() {
    let (mut pair, mut seen) = (pair("Peer", 0), seen());
    step(&mut pair, &mut seen);
    says(&mut seen, Stage::Failed);
    let failed = step(&mut pair, &mut seen);
    assert!(failed.crossing.is_none() && failed.record.expect("it is shown").failed.is_some());
    let waits = step(&mut pair, &mut seen);
    assert_eq!(waits.held_up.expect("it waits").0, Reason::MoveFailed);
    seen.now = Timestamp::from_second(1031).expect("a small number");
    let again = step(&mut pair, &mut seen);
    assert_eq!(
        (again.crossing.expect("it begins").id, again.record.expect("shown").attempt),
        (format!("watari-{ID}-1031"), 2)
    );
}

#[test]
fn what_stands_in_a_moves_way_is_said_before_anything_is_done() {
    let mut untracked = seen();
    untracked.side.report.as_mut().expect("one").trust = "Untracked".to_owned();
    let mut unlinked = seen();
    unlinked.side.report.as_mut().expect("one").link.connected = false;
    let mut silent = seen();
    silent.side.report = None;
    let mut never = seen();
    (never.side.launcher, never.side.vmi, never.side.report) = (None, None, None);
    for (mut seen, words) in
        [(untracked, "Untracked"), (unlinked, "not connected"), (silent, "restart it"), (never, "start it once")]
    {
        let course = step(&mut pair("Peer", 0), &mut seen);
        let (_, said) = course.held_up.expect(words);
        assert!(course.crossing.is_none() && said.contains(words), "{said}");
    }
}

#[test]
fn each_policy_waits_for_what_it_names() {
    let mut seen = seen();
    seen.side.report.as_mut().expect("one").generations.lag_bytes = 5 << 20;
    for (cutover, waits) in [
        (json!({}), false),
        (json!({ "policy": "WhenReady", "maxBytes": "4Mi" }), true),
        (json!({ "policy": "WhenReady", "maxBytes": "8Mi" }), false),
        (json!({ "policy": "WhenReady", "maxSeconds": 10 }), true),
        (json!({ "policy": "At", "at": "1970-01-01T00:16:41Z" }), true),
        (json!({ "policy": "At", "at": "1970-01-01T00:16:40Z" }), false),
    ] {
        let mut pair = pair("Peer", 0);
        pair.spec.cutover = serde_json::from_value(cutover.clone()).expect("a cutover");
        let course = course(&pair, &seen);
        assert_eq!(course.crossing.is_none(), waits, "{cutover}: {:?}", course.held_up);
    }
}

#[test]
fn of_two_that_believe_to_be_active_the_higher_epoch_counts() {
    let mut seen = seen();
    let before = |active_site, epoch| SyncPairStatus { active_site, epoch, ..SyncPairStatus::default() };
    at_peer(&mut seen, "Serving", 2, None);
    assert_eq!(active(&seen, &before(Site::Source, None)), (Site::Peer, Some(2)));
    seen.side.report = Some(report("Serving", 3));
    assert_eq!(active(&seen, &before(Site::Peer, Some(2))), (Site::Source, Some(3)));
    seen.side.report = None;
    assert_eq!(active(&seen, &before(Site::Source, Some(1))), (Site::Peer, Some(2)));
    at_peer(&mut seen, "Replica", 2, None);
    assert_eq!(active(&seen, &before(Site::Peer, Some(2))), (Site::Peer, Some(2)), "nobody says otherwise");
}

#[test]
fn our_own_pod_has_the_folder_at_home_while_the_vm_is_not_there() {
    let mut seen = seen();
    let away = Course { active: Site::Peer, ..Course::default() };
    assert!(!away.wants_holder(&seen), "the VM's Pod still has the claims");
    seen.side.launcher = None;
    assert!(away.wants_holder(&seen));
    assert!(!Course::default().wants_holder(&seen), "a VM that is only stopped starts where its claims are free");
}

/// The peer was promoted at this count of moves.
fn promoted(seen: &mut Seen, at_move: i64, crossing: Option<Crossing>) {
    at_peer(seen, "Serving", 9, crossing);
    let Replica::Found(found) = &mut seen.replica else { panic!("there is one") };
    let status = found.status.as_mut().expect("there is one");
    let (stage, began) = (FailoverStage::Done, seen.now);
    let failover =
        FailoverStatus { at_move, stage, message: String::new(), generation: None, began, ended: Some(seen.now) };
    (status.failover, status.moves) = (Some(failover), at_move + 1);
}

fn fenced(alone: u64) -> Report {
    let divergence =
        watari_wire::report::DivergenceReport { bytes: alone, after: "1.4".to_owned(), ..Default::default() };
    Report { divergence: Some(divergence), ..report("Fenced", 1) }
}

#[test]
fn a_home_that_returns_after_a_failover_counts_it_once_and_moves_nothing_back() {
    let (mut pair, mut seen) = (pair("Source", 0), seen());
    promoted(&mut seen, 0, None);
    let first = step(&mut pair, &mut seen);
    assert_eq!((first.active, first.moves, first.history.len()), (Site::Peer, 1, 1));
    assert!(first.history[0].failover && first.history[0].seconds.is_none() && first.crossing.is_none());
    assert_eq!(first.held_up.expect("the old wish is shown").0, Reason::AtMoveDiffers);
    assert!(first.steps.is_empty(), "its sidecar has not heard of it: the VM runs on");
    seen.side.vm = Some(json!({ "spec": { "runStrategy": "Always" } }));
    seen.side.report = Some(fenced(4096));
    let held = step(&mut pair, &mut seen);
    assert_eq!((held.moves, held.history.len(), held.crossing), (1, 1, None));
    let halted = side::Step::SetRunStrategy { strategy: "Halted".to_owned(), restore: None };
    assert_eq!(held.steps, [halted]);
    assert!(held.diverged.expect("it is said").contains("holds 4096 bytes that it wrote alone after generation 1.4"));
}

#[test]
fn a_home_that_was_promoted_past_and_has_not_heard_of_it_is_not_believed_while_the_peer_is_silent() {
    let (mut pair, mut seen) = (pair("Source", 0), seen());
    promoted(&mut seen, 0, None);
    assert_eq!(step(&mut pair, &mut seen).moves, 1);
    let replica = std::mem::replace(&mut seen.replica, Replica::Unknown);
    let silent = step(&mut pair, &mut seen);
    assert_eq!((silent.active, silent.moves), (Site::Peer, 1));
    seen.replica = replica;
    assert_eq!(step(&mut pair, &mut seen).moves, 1);
}

#[test]
fn what_the_home_wrote_alone_is_given_up_only_at_this_count_of_moves_and_without_the_vm() {
    let overwrite = |at_move| Some(watari_crds::pair::OverwriteDiverged { at_move });
    for (consent, launcher, given_up) in
        [(None, false, false), (overwrite(0), false, false), (overwrite(1), true, false), (overwrite(1), false, true)]
    {
        let (mut pair, mut seen) = (pair("Peer", 0), seen());
        promoted(&mut seen, 0, None);
        seen.side.report = Some(fenced(4096));
        seen.side.launcher = seen.side.launcher.filter(|_| launcher);
        pair.spec.overwrite_diverged = consent.clone();
        let course = step(&mut pair, &mut seen);
        assert_eq!(course.steps.contains(&side::Step::AcceptDivergence), given_up, "{consent:?}");
        assert!(course.diverged.is_some());
    }
}

#[test]
fn an_attempt_that_a_failover_overtook_is_over_wherever_it_led() {
    for (to, at_move) in [(Site::Peer, 0), (Site::Source, 1)] {
        let (mut pair, mut seen) = (pair(&format!("{to:?}"), at_move), seen());
        let active_site = to.other();
        pair.status = Some(SyncPairStatus { active_site, moves: at_move, ..SyncPairStatus::default() });
        let id = "watari-old".to_owned();
        let attempt = Crossing { id, to, connect: None, at_move, stopped: false, cancelled: false };
        // Home by its sidecars, which its operator did not live to see; then the peer was promoted.
        promoted(&mut seen, at_move, Some(attempt.clone()));
        let course = course(&pair, &seen);
        assert_eq!((course.active, course.moves, course.crossing), (Site::Peer, at_move + 1, None), "{to:?}");
        // The SyncReplica could not be written: the old attempt still stands there.
        pair.status = Some(SyncPairStatus { active_site: Site::Peer, moves: at_move + 1, ..SyncPairStatus::default() });
        assert_eq!(super::course(&pair, &seen).crossing, None, "{to:?}");
    }
}

#[test]
fn a_way_back_after_a_failover_is_a_wish_at_its_count() {
    let (mut pair, mut seen) = (pair("Source", 0), seen());
    promoted(&mut seen, 0, None);
    seen.side.launcher = None;
    seen.side.report = Some(report("Replica", 9));
    assert!(step(&mut pair, &mut seen).crossing.is_none());
    pair.spec.at_move = 1;
    let attempt = step(&mut pair, &mut seen).crossing.expect("it begins");
    assert_eq!((attempt.to, attempt.at_move), (Site::Source, 1));
}
