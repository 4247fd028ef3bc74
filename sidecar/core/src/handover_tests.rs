//! The transition table, row by row: every role meets every event that matters to it.

use std::vec;

use super::*;
use crate::{
    geometry::GenerationNumber,
    record::{DiskRecord, RoleRecord},
};

const H: Id = [9; 16];
const OTHER: Id = [8; 16];
const NONCE: Id = [5; 16];
const SESSION: u64 = 77;
const G: Generation = generation(1, 10);

const fn generation(epoch: u64, number: u64) -> Generation {
    Generation { epoch, number: GenerationNumber(number) }
}

fn act(n: u8) -> ActivationId {
    ActivationId([n; 16])
}

fn epoch(counter: u64) -> Epoch {
    Epoch { counter, activation: act(counter as u8) }
}

fn record(role: Role, counter: u64) -> RoleRecord {
    RoleRecord {
        pair: [1; 16],
        site: [2; 16],
        identity: [3; 16],
        starts: 1,
        epoch: epoch(counter),
        floor: counter,
        role,
        base: generation(1, 7),
        numbers_reserved: GenerationNumber(100),
        unfenced: false,
        untracked: false,
        disks: vec![DiskRecord { name: "root".into(), size_bytes: 1 << 20 }],
    }
}

fn site(role: Role, counter: u64) -> Site {
    Site::new(record(role, counter), SESSION)
}

fn every_role() -> Vec<Role> {
    vec![
        Role::Serving,
        Role::HandoverOpen { handover: H },
        sealed(),
        Role::Released { handover: H, generation: G },
        Role::Replica,
        Role::Voided { handover: H },
        Role::Promoting { generation: G },
        Role::Fenced { by: epoch(9) },
    ]
}

fn sealed() -> Role {
    Role::Sealed { handover: H, nonce: NONCE, session: SESSION }
}

fn peer(role: PeerRole, counter: u64) -> Peer {
    Peer { epoch: epoch(counter), floor: counter, role, generation: G }
}

fn met(s: &mut Site, peer: Peer) -> Vec<Action> {
    s.apply(Event::Met { peer, activation: act(200) })
}

fn received(s: &mut Site, message: Message) -> Vec<Action> {
    s.apply(Event::Received(message, act(201)))
}

/// A replica at epoch 1 that knows of an open handover.
fn offered() -> Site {
    let mut s = site(Role::Replica, 1);
    assert!(received(&mut s, Message::Open { handover: H, epoch: epoch(1) }).is_empty());
    s
}

/// And has asked for the right to write.
fn asking() -> Site {
    let mut s = offered();
    s.apply(Event::GuestAttached);
    let asked = s.apply(Event::WantWrite { nonce: NONCE });
    assert_eq!(asked[0], Action::Send(Message::Acquire { handover: H, nonce: NONCE, session: SESSION }));
    s
}

fn grant(nonce: Id, session: u64, counter: u64) -> Message {
    Message::Grant { handover: H, nonce, session, epoch: epoch(counter), generation: G }
}

fn position(actions: &[Action], wanted: impl Fn(&Action) -> bool) -> usize {
    actions.iter().position(wanted).unwrap_or_else(|| panic!("missing in {actions:?}"))
}

fn sends(actions: &[Action]) -> Vec<Message> {
    actions.iter().filter_map(|a| if let Action::Send(m) = a { Some(m.clone()) } else { None }).collect()
}

fn refuses(actions: &[Action]) -> bool {
    matches!(actions, [Action::Refuse(_)])
}

/// What every list of actions must keep: the record that is persisted last is the one that the site holds, and no
/// message that promises something goes out before it.
fn holds_together(s: &Site, actions: &[Action]) {
    let last = actions.iter().rev().find_map(|a| if let Action::Persist(r) = a { Some(r) } else { None });
    if let Some(last) = last {
        assert_eq!(last, s.record());
        let persisted = position(actions, |a| matches!(a, Action::Persist(_)));
        if let Some(sent) = actions.iter().position(|a| matches!(a, Action::Send(_) | Action::Gate(Gate::Serve))) {
            assert!(persisted < sent, "nothing is promised before the record is durable: {actions:?}");
        }
    }
}

// ---- the planned move

#[test]
fn a_handover_opens_durably_before_the_target_hears_of_it() {
    let mut s = site(Role::Serving, 1);
    let actions = s.apply(Event::OpenHandover { handover: H });
    holds_together(&s, &actions);
    assert_eq!(s.record().role, Role::HandoverOpen { handover: H });
    assert_eq!(sends(&actions), vec![Message::Open { handover: H, epoch: epoch(1) }]);
    assert!(actions.contains(&Action::Converge(Pace::Generations)));
}

#[test]
fn asking_twice_for_the_same_handover_is_asking_once() {
    let mut s = site(Role::HandoverOpen { handover: H }, 1);
    let actions = s.apply(Event::OpenHandover { handover: H });
    assert_eq!(actions, vec![Action::Send(Message::Open { handover: H, epoch: epoch(1) })]);
    assert!(refuses(&s.apply(Event::OpenHandover { handover: OTHER })));
}

#[test]
fn only_a_serving_and_tracked_side_opens_a_handover() {
    for role in every_role() {
        if !matches!(role, Role::Serving) {
            let mut s = site(role.clone(), 1);
            let actions = s.apply(Event::OpenHandover { handover: OTHER });
            assert!(refuses(&actions), "{role:?} {actions:?}");
        }
    }
    let mut untracked = record(Role::Serving, 1);
    untracked.untracked = true;
    assert!(refuses(&Site::new(untracked, SESSION).apply(Event::OpenHandover { handover: H })));
}

#[test]
fn the_source_seals_durably_then_closes_the_gate_and_sends_what_remains() {
    let mut s = site(Role::HandoverOpen { handover: H }, 1);
    let actions = received(&mut s, Message::Acquire { handover: H, nonce: NONCE, session: 4 });
    holds_together(&s, &actions);
    assert_eq!(s.record().role, Role::Sealed { handover: H, nonce: NONCE, session: 4 });
    let order = [
        position(&actions, |a| matches!(a, Action::Persist(_))),
        position(&actions, |a| *a == Action::Gate(Gate::Hold)),
        position(&actions, |a| *a == Action::SealAndSend),
    ];
    assert!(order.is_sorted());
    assert!(sends(&actions).is_empty(), "nothing is granted before the remainder is sent");
}

#[test]
fn an_untracked_source_never_seals() {
    let mut r = record(Role::HandoverOpen { handover: H }, 1);
    r.untracked = true;
    let mut s = Site::new(r, SESSION);
    assert!(received(&mut s, Message::Acquire { handover: H, nonce: NONCE, session: 4 }).is_empty());
    assert_eq!(s.record().role, Role::HandoverOpen { handover: H });
}

#[test]
fn an_acquire_for_another_handover_or_in_another_role_moves_nothing() {
    for role in every_role() {
        let mut s = site(role.clone(), 1);
        let actions = received(&mut s, Message::Acquire { handover: OTHER, nonce: NONCE, session: 4 });
        assert!(actions.is_empty(), "{role:?} {actions:?}");
        assert_eq!(s.record().role, role);
    }
}

#[test]
fn the_grant_names_the_newest_acquire_when_the_target_restarted_meanwhile() {
    let mut s = site(sealed(), 1);
    s.apply(Event::RemainderSent { generation: G });
    let actions = received(&mut s, Message::Acquire { handover: H, nonce: [6; 16], session: 78 });
    holds_together(&s, &actions);
    assert_eq!(s.record().role, Role::Sealed { handover: H, nonce: [6; 16], session: 78 });
    assert_eq!(sends(&actions), vec![grant([6; 16], 78, 1)]);
}

#[test]
fn an_acquire_that_comes_twice_is_granted_twice_with_the_same_words() {
    let mut s = site(sealed(), 1);
    let again = Message::Acquire { handover: H, nonce: NONCE, session: SESSION };
    assert!(received(&mut s, again.clone()).is_empty(), "the remainder is not known yet");
    s.apply(Event::RemainderSent { generation: G });
    assert_eq!(received(&mut s, again), vec![Action::Send(grant(NONCE, SESSION, 1))]);
}

#[test]
fn a_remainder_means_nothing_unless_sealed() {
    for role in every_role() {
        if !matches!(role, Role::Sealed { .. }) {
            assert!(site(role, 1).apply(Event::RemainderSent { generation: G }).is_empty());
        }
    }
}

#[test]
fn the_target_applies_exactly_the_granted_generation_before_it_serves() {
    let mut s = asking();
    assert_eq!(received(&mut s, grant(NONCE, SESSION, 1)), vec![Action::ApplyUpTo(G)]);
    assert!(
        s.apply(Event::Applied { generation: generation(1, 9), activation: act(3) }).is_empty(),
        "another generation"
    );
    let actions = s.apply(Event::Applied { generation: G, activation: act(3) });
    holds_together(&s, &actions);
    let epoch = Epoch { counter: 2, activation: act(3) };
    assert_eq!((s.record().role.clone(), s.record().epoch, s.record().base), (Role::Serving, epoch, G));
    let order = [
        position(&actions, |a| matches!(a, Action::Persist(_))),
        position(&actions, |a| *a == Action::BecomeSource { base: Some(G) }),
        position(&actions, |a| *a == Action::Gate(Gate::Serve)),
        position(&actions, |a| matches!(a, Action::Send(Message::Activated { .. }))),
    ];
    assert!(order.is_sorted(), "{actions:?}");
}

#[test]
fn a_grant_for_another_nonce_session_epoch_or_handover_is_void() {
    let g = |handover, nonce, session, counter| Message::Grant {
        handover,
        nonce,
        session,
        epoch: epoch(counter),
        generation: G,
    };
    for stale in [
        g(H, [6; 16], SESSION, 1),
        g(H, NONCE, SESSION + 1, 1),
        g(H, NONCE, SESSION, 2),
        g(H, NONCE, SESSION, 0),
        g(OTHER, NONCE, SESSION, 1),
    ] {
        let mut s = asking();
        assert!(received(&mut s, stale.clone()).is_empty(), "{stale:?}");
        assert!(s.apply(Event::Applied { generation: G, activation: act(3) }).is_empty());
    }
}

#[test]
fn a_grant_that_nobody_asked_for_is_void_also_after_a_restart() {
    let mut s = offered();
    assert!(received(&mut s, grant(NONCE, SESSION, 1)).is_empty());
    let mut restarted = Site::new(asking().record().clone(), SESSION + 1);
    received(&mut restarted, Message::Open { handover: H, epoch: epoch(1) });
    assert!(received(&mut restarted, grant(NONCE, SESSION, 1)).is_empty());
}

#[test]
fn the_first_nonce_stays_until_it_is_answered() {
    let mut s = asking();
    let again = s.apply(Event::WantWrite { nonce: [6; 16] });
    assert_eq!(sends(&again), vec![Message::Acquire { handover: H, nonce: NONCE, session: SESSION }]);
    assert!(again.contains(&Action::Report(Condition::WaitingForGrant)));
    assert!(s.waiting_for_grant());
}

#[test]
fn an_acquire_and_an_attach_are_told_again_on_a_new_link() {
    let mut s = asking();
    s.apply(Event::Parted);
    assert!(!s.attachable());
    let actions = received(&mut s, Message::Open { handover: H, epoch: epoch(1) });
    let acquire = Message::Acquire { handover: H, nonce: NONCE, session: SESSION };
    assert_eq!(sends(&actions), vec![Message::Attached { handover: H }, acquire]);
}

#[test]
fn an_open_of_another_epoch_offers_nothing() {
    for counter in [0, 2] {
        let mut s = site(Role::Replica, 1);
        received(&mut s, Message::Open { handover: H, epoch: epoch(counter) });
        assert!(!s.attachable());
    }
    let mut other = site(Role::Replica, 1);
    received(&mut other, Message::Open { handover: H, epoch: Epoch { counter: 1, activation: act(99) } });
    assert!(!other.attachable(), "an equal counter with another identity is not our epoch");
}

#[test]
fn a_guest_attaches_only_while_a_handover_is_offered() {
    assert!(site(Role::Replica, 1).apply(Event::GuestAttached).is_empty());
    let attached = offered().apply(Event::GuestAttached);
    assert_eq!(attached, vec![Action::Gate(Gate::Remote), Action::Send(Message::Attached { handover: H })]);
    assert!(refuses(&site(Role::Replica, 1).apply(Event::WantWrite { nonce: NONCE })));
}

#[test]
fn the_source_says_that_its_qemu_left_and_neither_seals_nor_grants_by_itself() {
    for role in [Role::HandoverOpen { handover: H }, sealed()] {
        let mut s = site(role.clone(), 1);
        assert_eq!(s.apply(Event::GuestLeft), vec![Action::Send(Message::QemuLeft { handover: H })]);
        assert_eq!(s.record().role, role);
    }
    assert!(site(Role::Serving, 1).apply(Event::GuestLeft).is_empty());
}

#[test]
fn that_the_qemu_left_is_said_again_at_each_contact_until_one_is_back() {
    for role in [Role::HandoverOpen { handover: H }, sealed()] {
        let mut s = site(role, 1);
        let left = Message::QemuLeft { handover: H };
        assert!(!sends(&met(&mut s, peer(PeerRole::Replica, 1))).contains(&left));
        s.apply(Event::GuestLeft);
        assert!(sends(&met(&mut s, peer(PeerRole::Replica, 1))).contains(&left));
        s.apply(Event::GuestAttached);
        assert!(!sends(&met(&mut s, peer(PeerRole::Replica, 1))).contains(&left));
    }
}

#[test]
fn what_left_in_a_voided_handover_says_nothing_about_the_next_one() {
    let mut s = site(Role::HandoverOpen { handover: H }, 1);
    s.apply(Event::GuestLeft);
    received(&mut s, Message::Void { handover: H, epoch: 2 });
    s.apply(Event::OpenHandover { handover: [77; 16] });
    let epoch = s.record().epoch;
    let replica = Peer { epoch, ..peer(PeerRole::Replica, 3) };
    assert_eq!(sends(&met(&mut s, replica)), vec![Message::Open { handover: [77; 16], epoch }]);
}

#[test]
fn an_attached_target_changes_the_pace_of_the_handover_it_is_attached_for() {
    let mut s = site(Role::HandoverOpen { handover: H }, 1);
    assert_eq!(received(&mut s, Message::Attached { handover: H }), vec![Action::Converge(Pace::Staging)]);
    assert!(received(&mut s, Message::Attached { handover: [77; 16] }).is_empty());
    for role in [Role::Serving, sealed(), Role::Replica] {
        assert!(received(&mut site(role, 1), Message::Attached { handover: H }).is_empty());
    }
}

#[test]
fn a_promotion_within_reach_of_the_source_seals_it_and_takes_everything() {
    let mut target = site(Role::Replica, 1);
    assert!(refuses(&target.apply(Event::TakeOver { handover: H, nonce: NONCE })), "nobody is there to ask");
    met(&mut target, peer(PeerRole::Active { handover: None }, 1));
    let actions = target.apply(Event::TakeOver { handover: H, nonce: NONCE });
    let ask = Message::TakeOver { handover: H, nonce: NONCE, session: SESSION, epoch: epoch(1) };
    assert_eq!((&actions[0], sends(&actions)), (&Action::Gate(Gate::Dead), vec![ask.clone()]));
    // A handover that was opened meanwhile keeps its name: its target may void it (watari-sim seed 1003201).
    let open = [77; 16];
    for (role, handover) in [(Role::Serving, H), (Role::HandoverOpen { handover: open }, open)] {
        let mut source = site(role, 1);
        let actions = received(&mut source, ask.clone());
        holds_together(&source, &actions);
        assert_eq!(source.record().role, Role::Sealed { handover, nonce: NONCE, session: SESSION });
        assert_eq!(actions[1..], [Action::Gate(Gate::Hold), Action::SealAndSend]);
    }
    assert_eq!(received(&mut target, grant(NONCE, SESSION, 1)), vec![Action::ApplyUpTo(G)]);
    let actions = target.apply(Event::Applied { generation: G, activation: act(3) });
    assert_eq!(target.record().epoch.counter, 2);
    assert!(!target.record().unfenced && actions.contains(&Action::Gate(Gate::Serve)));
}

#[test]
fn a_sealed_or_untracked_source_is_not_taken_over_by_another_handover() {
    let ask = Message::TakeOver { handover: [77; 16], nonce: NONCE, session: SESSION, epoch: epoch(1) };
    assert!(received(&mut site(sealed(), 1), ask.clone()).is_empty());
    // Risen meanwhile: the target's own promotion would look like an activation on this grant (watari-sim seed 1001642).
    assert!(received(&mut site(Role::Serving, 2), ask.clone()).is_empty());
    let mut untracked = site(Role::Serving, 1);
    let _ = untracked.amend(|r| r.untracked = true);
    assert!(received(&mut untracked, ask).is_empty());
}

#[test]
fn released_comes_after_a_sync_of_all_disks() {
    let mut s = site(sealed(), 1);
    s.apply(Event::RemainderSent { generation: G });
    let actions = received(&mut s, Message::Activated { handover: H, epoch: epoch(2), generation: G });
    let order = [
        position(&actions, |a| *a == Action::SyncDisks),
        position(&actions, |a| matches!(a, Action::Persist(_))),
        position(&actions, |a| *a == Action::Gate(Gate::Dead)),
        position(&actions, |a| matches!(a, Action::Send(Message::Released { .. }))),
        position(&actions, |a| *a == Action::BecomeReplica { generation: G }),
    ];
    assert!(order.is_sorted(), "{actions:?}");
    assert_eq!((s.record().role.clone(), s.record().epoch), (Role::Released { handover: H, generation: G }, epoch(2)));
    let adopted = s.apply(Event::Adopted);
    holds_together(&s, &adopted);
    assert_eq!((s.record().role.clone(), s.record().base), (Role::Replica, G));
}

#[test]
fn an_activation_of_another_handover_or_epoch_releases_nothing() {
    for (handover, counter) in [(OTHER, 2), (H, 1), (H, 3)] {
        let mut s = site(sealed(), 1);
        let m = Message::Activated { handover, epoch: epoch(counter), generation: G };
        assert!(received(&mut s, m).is_empty());
        assert_eq!(s.record().role, sealed());
    }
    for role in every_role().into_iter().filter(|r| !matches!(r, Role::Sealed { .. })) {
        let mut s = site(role.clone(), 1);
        received(&mut s, Message::Activated { handover: H, epoch: epoch(2), generation: G });
        assert_eq!(s.record().role, role, "only a sealed side can be released");
    }
}

#[test]
fn a_lost_activated_is_learned_at_the_next_contact() {
    let mut s = site(sealed(), 1);
    s.apply(Event::RemainderSent { generation: G });
    let actions = met(&mut s, peer(PeerRole::Active { handover: None }, 2));
    assert!(actions.contains(&Action::SyncDisks));
    assert_eq!(s.record().role, Role::Released { handover: H, generation: G });
}

#[test]
fn the_new_active_side_tells_a_sealed_one_where_it_is() {
    for role in [PeerRole::Sealed { handover: H }, PeerRole::Active { handover: Some(H) }] {
        let mut s = site(Role::Serving, 2);
        let actions = met(&mut s, peer(role, 1));
        let told = Message::Activated { handover: H, epoch: epoch(2), generation: generation(1, 7) };
        assert_eq!(sends(&actions), vec![told]);
    }
}

// ---- void

#[test]
fn the_target_voids_durably_before_the_source_hears_of_it_and_its_floor_forbids_a_late_grant() {
    let mut s = asking();
    let actions = s.apply(Event::WantVoid { activation: act(4) });
    holds_together(&s, &actions);
    assert_eq!((s.record().role.clone(), s.record().floor), (Role::Voided { handover: H }, 3));
    assert_eq!(sends(&actions), vec![Message::Void { handover: H, epoch: 2 }]);
    assert!(actions.contains(&Action::Gate(Gate::Dead)));
    assert!(received(&mut s, grant(NONCE, SESSION, 1)).is_empty(), "void first, grant late");
    assert!(s.apply(Event::Applied { generation: G, activation: act(3) }).is_empty());
    assert_eq!(s.record().role, Role::Voided { handover: H });
}

#[test]
fn a_void_after_a_grant_wins_as_long_as_nothing_is_active() {
    let mut s = asking();
    received(&mut s, grant(NONCE, SESSION, 1));
    s.apply(Event::WantVoid { activation: act(4) });
    assert!(s.apply(Event::Applied { generation: G, activation: act(3) }).is_empty());
    assert!(!s.record().role.accepts_writes());
}

#[test]
fn after_activation_nothing_can_be_voided() {
    let mut s = asking();
    received(&mut s, grant(NONCE, SESSION, 1));
    s.apply(Event::Applied { generation: G, activation: act(3) });
    assert!(refuses(&s.apply(Event::WantVoid { activation: act(4) })));
}

#[test]
fn a_voided_source_rises_over_the_targets_floor_and_serves_sealed_or_not() {
    for role in [Role::HandoverOpen { handover: H }, sealed()] {
        let mut s = site(role, 1);
        let actions = received(&mut s, Message::Void { handover: H, epoch: 2 });
        holds_together(&s, &actions);
        assert_eq!((s.record().role.clone(), s.record().epoch.counter), (Role::Serving, 3));
        let order = [
            position(&actions, |a| matches!(a, Action::Persist(_))),
            position(&actions, |a| *a == Action::Unseal),
            position(&actions, |a| *a == Action::Gate(Gate::Serve)),
        ];
        assert!(order.is_sorted());
        assert!(matches!(sends(&actions)[..], [Message::Voided { epoch: Epoch { counter: 3, .. }, .. }]));
    }
}

#[test]
fn a_void_of_another_handover_and_epoch_moves_nothing() {
    for role in [Role::HandoverOpen { handover: H }, sealed()] {
        let mut s = site(role.clone(), 3);
        assert!(received(&mut s, Message::Void { handover: OTHER, epoch: 2 }).is_empty());
        assert_eq!(s.record().role, role);
    }
}

#[test]
fn a_void_that_comes_twice_is_answered_twice_and_raises_once() {
    let mut s = site(sealed(), 1);
    received(&mut s, Message::Void { handover: H, epoch: 2 });
    let epoch = s.record().epoch;
    let again = received(&mut s, Message::Void { handover: H, epoch: 2 });
    assert_eq!(again, vec![Action::Send(Message::Voided { handover: H, epoch })]);
    assert_eq!(s.record().epoch, epoch);
}

#[test]
fn the_target_becomes_a_replica_again_only_under_an_epoch_over_its_floor() {
    let mut s = offered();
    s.apply(Event::WantVoid { activation: act(4) });
    assert!(received(&mut s, Message::Voided { handover: H, epoch: epoch(2) }).is_empty(), "below the floor");
    assert!(received(&mut s, Message::Voided { handover: OTHER, epoch: epoch(3) }).is_empty(), "another handover");
    let actions = received(&mut s, Message::Voided { handover: H, epoch: epoch(3) });
    holds_together(&s, &actions);
    assert_eq!((s.record().role.clone(), s.record().epoch), (Role::Replica, epoch(3)));
}

#[test]
fn a_lost_void_is_repeated_at_the_next_contact() {
    let mut s = site(Role::Voided { handover: H }, 1);
    let actions = met(&mut s, peer(PeerRole::Sealed { handover: H }, 1));
    assert_eq!(sends(&actions), vec![Message::Void { handover: H, epoch: 2 }]);
    let mut source = site(sealed(), 1);
    let mut voided = peer(PeerRole::Voided { handover: H }, 1);
    voided.floor = 3;
    let actions = met(&mut source, voided);
    assert_eq!((source.record().role.clone(), source.record().epoch.counter), (Role::Serving, 3));
    assert!(matches!(sends(&actions)[..], [Message::Voided { .. }]));
}

#[test]
fn a_lost_voided_is_learned_from_the_sources_epoch() {
    let mut s = offered();
    s.apply(Event::WantVoid { activation: act(4) });
    met(&mut s, peer(PeerRole::Active { handover: None }, 3));
    assert_eq!((s.record().role.clone(), s.record().epoch.counter), (Role::Replica, 3));
}

#[test]
fn without_a_known_handover_there_is_nothing_to_void() {
    for role in every_role().into_iter().filter(|r| !matches!(r, Role::Voided { .. })) {
        assert!(refuses(&site(role, 1).apply(Event::WantVoid { activation: act(4) })));
    }
}

// ---- promotion, fencing, return

#[test]
fn a_promotion_is_durable_and_serves_nothing_before_the_image_is_rolled() {
    for role in [Role::Replica, Role::Voided { handover: H }] {
        let mut s = site(role, 4);
        let actions = s.apply(Event::Promote { generation: G });
        holds_together(&s, &actions);
        assert_eq!(s.record().role, Role::Promoting { generation: G });
        assert_eq!(actions[1..], [Action::Gate(Gate::Dead), Action::RollTo(G)], "an attached QEMU is never served");
        let rolled = s.apply(Event::Rolled { activation: act(6) });
        holds_together(&s, &rolled);
        assert_eq!(s.record().role, Role::Serving);
        assert!(s.record().unfenced && s.record().epoch.counter > 4);
        assert!(rolled.contains(&Action::Report(Condition::Unfenced)));
        let order = [
            position(&rolled, |a| *a == Action::BecomeSource { base: Some(G) }),
            position(&rolled, |a| *a == Action::Gate(Gate::Serve)),
        ];
        assert!(order.is_sorted());
    }
}

#[test]
fn a_promotion_after_a_void_rises_over_the_voided_epoch_and_over_the_sources_new_one() {
    let mut s = offered();
    s.apply(Event::WantVoid { activation: act(4) });
    s.apply(Event::Promote { generation: G });
    s.apply(Event::Rolled { activation: act(6) });
    assert!(s.record().epoch.counter > 3, "the source may serve in epoch 3");
}

#[test]
fn only_a_replica_is_promoted() {
    for role in every_role() {
        if !matches!(role, Role::Replica | Role::Voided { .. } | Role::Promoting { .. }) {
            assert!(refuses(&site(role, 1).apply(Event::Promote { generation: G })));
        }
    }
    assert_eq!(
        site(Role::Promoting { generation: G }, 1).apply(Event::Promote { generation: generation(1, 3) }),
        vec![Action::RollTo(G)],
        "the first choice stands"
    );
}

#[test]
fn a_grant_that_was_applied_after_a_promotion_began_activates_nothing() {
    let mut s = asking();
    received(&mut s, grant(NONCE, SESSION, 1));
    s.apply(Event::Promote { generation: generation(1, 3) });
    assert!(s.apply(Event::Applied { generation: G, activation: act(3) }).is_empty());
    assert!(received(&mut s, grant(NONCE, SESSION, 1)).is_empty());
}

#[test]
fn a_side_that_meets_a_higher_epoch_it_did_not_grant_is_fenced() {
    for role in [Role::Serving, Role::HandoverOpen { handover: H }, sealed()] {
        for counter in [3, 7] {
            let mut s = site(role.clone(), 1);
            let actions = met(&mut s, peer(PeerRole::Active { handover: None }, counter));
            holds_together(&s, &actions);
            assert!(matches!(s.record().role, Role::Fenced { by } if by.counter == counter), "{role:?} {counter}");
            assert!(
                actions.contains(&Action::Gate(Gate::Dead)) && actions.contains(&Action::Report(Condition::Fenced))
            );
        }
    }
}

#[test]
fn an_equal_counter_with_another_identity_is_diverged_and_stops_nobody() {
    for role in [Role::Serving, Role::HandoverOpen { handover: H }, Role::Replica, Role::Voided { handover: H }] {
        let mut s = site(role.clone(), 2);
        let mut other = peer(PeerRole::Active { handover: None }, 2);
        other.epoch.activation = act(99);
        let actions = met(&mut s, other);
        assert!(actions.contains(&Action::Report(Condition::Diverged)), "{role:?}");
        assert_eq!(s.record().role, role);
    }
}

#[test]
fn consent_makes_the_divergent_disks_a_generation_of_their_own() {
    // Lost without it: the fenced side kept its divergent content under the number of a committed generation, and a
    // later promotion to that number would have served it (watari-sim seed 28).
    let mut s = site(Role::Fenced { by: epoch(9) }, 2);
    let actions = s.apply(Event::AcceptDivergence);
    let own = generation(2, 100);
    assert_eq!(actions[0], Action::SyncDisks);
    assert_eq!(s.record().role, Role::Released { handover: [0; 16], generation: own });
    assert_eq!(s.record().numbers_reserved, GenerationNumber(101), "the number is never used again");
    assert_eq!(s.record().identity, [0; 16], "the peer must compare");
    assert_eq!(s.record().epoch, epoch(9));
    assert!(actions.contains(&Action::BecomeReplica { generation: own }));
    for role in every_role().into_iter().filter(|r| !matches!(r, Role::Fenced { .. })) {
        assert!(refuses(&site(role, 1).apply(Event::AcceptDivergence)));
    }
}

#[test]
fn a_replica_follows_an_epoch_that_was_raised_properly_and_no_lower_one() {
    let mut s = site(Role::Replica, 2);
    let actions = met(&mut s, peer(PeerRole::Active { handover: None }, 5));
    holds_together(&s, &actions);
    assert_eq!((s.record().epoch, s.record().floor), (epoch(5), 5));
    assert!(met(&mut s, peer(PeerRole::Active { handover: None }, 3)).is_empty());
    assert_eq!(s.record().epoch, epoch(5));
}

#[test]
fn roles_that_wait_for_something_else_do_not_move_at_contact() {
    for role in [
        Role::Promoting { generation: G },
        Role::Released { handover: H, generation: G },
        Role::Fenced { by: epoch(9) },
    ] {
        let mut s = site(role.clone(), 1);
        assert!(met(&mut s, peer(PeerRole::Active { handover: None }, 5)).is_empty());
        assert_eq!(s.record().role, role);
    }
}

// ---- restarts

#[test]
fn every_role_takes_up_after_a_restart_what_it_owes() {
    let expected: Vec<(Role, Vec<Action>)> = vec![
        (Role::Serving, vec![Action::Gate(Gate::Serve)]),
        (Role::HandoverOpen { handover: H }, vec![Action::Gate(Gate::Serve), Action::Converge(Pace::Generations)]),
        (sealed(), vec![Action::Gate(Gate::Hold), Action::SealAndSend]),
        (
            Role::Released { handover: H, generation: G },
            vec![Action::Gate(Gate::Dead), Action::BecomeReplica { generation: G }],
        ),
        (Role::Replica, vec![Action::Gate(Gate::Remote)]),
        (Role::Voided { handover: H }, vec![Action::Gate(Gate::Dead)]),
        (Role::Promoting { generation: G }, vec![Action::Gate(Gate::Hold), Action::RollTo(G)]),
        (Role::Fenced { by: epoch(9) }, vec![Action::Gate(Gate::Dead), Action::Report(Condition::Fenced)]),
    ];
    for (role, actions) in expected {
        let mut s = site(role.clone(), 1);
        assert_eq!(s.resume(), actions, "{role:?}");
        assert_eq!(Action::Gate(s.gate()), actions[0], "the gate is right before the first event");
    }
}

#[test]
fn a_sealed_source_that_restarted_grants_only_after_its_remainder_is_sent_again() {
    let mut s = site(sealed(), 1);
    let actions = met(&mut s, peer(PeerRole::Replica, 1));
    assert_eq!(sends(&actions), vec![Message::Open { handover: H, epoch: epoch(1) }]);
    let granted = s.apply(Event::RemainderSent { generation: generation(1, 11) });
    assert!(matches!(sends(&granted)[..], [Message::Grant { generation: Generation { epoch: 1, .. }, .. }]));
}

#[test]
fn the_session_of_a_former_life_is_not_granted() {
    let mut restarted = Site::new(record(Role::Replica, 1), SESSION + 1);
    received(&mut restarted, Message::Open { handover: H, epoch: epoch(1) });
    restarted.apply(Event::WantWrite { nonce: NONCE });
    assert!(received(&mut restarted, grant(NONCE, SESSION, 1)).is_empty());
    assert_eq!(received(&mut restarted, grant(NONCE, SESSION + 1, 1)), vec![Action::ApplyUpTo(G)]);
}

#[test]
#[should_panic(expected = "rights change only by events")]
fn bookkeeping_cannot_change_rights() {
    let _ = site(Role::Serving, 1).amend(|r| r.floor = 9);
}

#[test]
fn whatever_happens_the_record_is_durable_before_the_promise_and_the_floor_never_falls() {
    // Every role, every event, every message: the same two laws.
    let messages = [
        Message::Open { handover: H, epoch: epoch(1) },
        Message::Attached { handover: H },
        Message::QemuLeft { handover: H },
        Message::Acquire { handover: H, nonce: NONCE, session: 3 },
        Message::TakeOver { handover: H, nonce: NONCE, session: 3, epoch: epoch(1) },
        grant(NONCE, SESSION, 1),
        Message::Activated { handover: H, epoch: epoch(2), generation: G },
        Message::Released { handover: H },
        Message::Void { handover: H, epoch: 2 },
        Message::Voided { handover: H, epoch: epoch(3) },
    ];
    let mut events: Vec<Event> = messages.into_iter().map(|m| Event::Received(m, act(200))).collect();
    events.extend([
        Event::OpenHandover { handover: H },
        Event::GuestAttached,
        Event::GuestLeft,
        Event::WantWrite { nonce: NONCE },
        Event::WantVoid { activation: act(4) },
        Event::TakeOver { handover: H, nonce: NONCE },
        Event::Promote { generation: G },
        Event::Rolled { activation: act(6) },
        Event::AcceptDivergence,
        Event::RemainderSent { generation: G },
        Event::Applied { generation: G, activation: act(3) },
        Event::Adopted,
        Event::Parted,
    ]);
    for counter in [1, 2, 3, 8] {
        for role in [
            PeerRole::Active { handover: None },
            PeerRole::Active { handover: Some(H) },
            PeerRole::Sealed { handover: H },
            PeerRole::Replica,
            PeerRole::Voided { handover: H },
            PeerRole::Fenced,
            PeerRole::Released { handover: H },
        ] {
            events.push(Event::Met { peer: peer(role, counter), activation: act(200) });
        }
    }
    for role in every_role() {
        for first in &events {
            for second in &events {
                let mut s = site(role.clone(), 1);
                for event in [first, second] {
                    let (floor, counter) = (s.record().floor, s.record().epoch.counter);
                    let actions = s.apply(event.clone());
                    holds_together(&s, &actions);
                    assert!(s.record().floor >= floor && s.record().epoch.counter >= counter, "{role:?} {event:?}");
                    assert!(s.record().floor >= s.record().epoch.counter);
                    let changed = s.record().role != role;
                    let serves = actions.contains(&Action::Gate(Gate::Serve));
                    assert!(!serves || s.record().role.accepts_writes(), "{role:?} {event:?} {changed}");
                }
            }
        }
    }
}

#[test]
fn a_sealed_source_that_restarted_is_fenced_by_a_promotion_and_not_released_by_it() {
    // Lost without it: the promoted side took epoch + 1, which is what an activation takes; the restarted source released
    // itself and called its newer disks the promoted generation (watari-sim seed 2).
    let mut target = asking();
    target.apply(Event::Promote { generation: generation(1, 3) });
    target.apply(Event::Rolled { activation: act(6) });
    let mut source = site(sealed(), 1);
    met(&mut source, Peer { epoch: target.record().epoch, ..peer(PeerRole::Active { handover: None }, 1) });
    assert!(matches!(source.record().role, Role::Fenced { .. }), "{:?}", source.record().role);
}

#[test]
fn a_source_that_sealed_a_second_remainder_after_a_restart_is_released_by_the_first() {
    // Lost without it: a planned move whose source restarted after its grant ended Fenced, waiting for a person.
    let mut source = site(sealed(), 1);
    source.apply(Event::RemainderSent { generation: generation(1, 12) });
    met(&mut source, peer(PeerRole::Active { handover: None }, 2));
    assert_eq!(source.record().role, Role::Released { handover: H, generation: G });
}

#[test]
fn a_handover_that_is_over_is_not_voided_again() {
    // Lost without it: the target kept the offer, voided it a second time under a floor that the source never reached,
    // and stayed Voided for ever (watari-sim seed 293).
    let mut s = offered();
    s.apply(Event::WantVoid { activation: act(4) });
    received(&mut s, Message::Voided { handover: H, epoch: epoch(3) });
    assert!(!s.attachable());
    assert!(refuses(&s.apply(Event::WantVoid { activation: act(5) })));
    assert!(refuses(&s.apply(Event::WantWrite { nonce: NONCE })));
    assert_eq!(s.record().role, Role::Replica);
}

#[test]
fn an_offer_outlives_the_link_and_a_vm_that_attaches_meanwhile_is_told_at_the_next_contact() {
    // Lost without it: a migration whose target connected in the moment of a cut failed, refused.
    let mut s = offered();
    s.apply(Event::Parted);
    assert!(s.offered() && !s.attachable(), "nobody starts a migration now; one under way may attach");
    s.apply(Event::GuestAttached);
    s.apply(Event::WantWrite { nonce: NONCE });
    let actions = received(&mut s, Message::Open { handover: H, epoch: epoch(1) });
    let acquire = Message::Acquire { handover: H, nonce: NONCE, session: SESSION };
    assert_eq!(sends(&actions), vec![Message::Attached { handover: H }, acquire]);
}

#[test]
fn a_promotion_without_consent_is_shown_until_the_other_side_is_seen_to_have_stopped() {
    let mut s = site(Role::Promoting { generation: G }, 1);
    s.apply(Event::Rolled { activation: act(9) });
    let counter = s.record().epoch.counter;
    let mut restarted = Site::new(s.record().clone(), SESSION + 1);
    assert!(restarted.resume().contains(&Action::Report(Condition::Unfenced)));
    met(&mut restarted, peer(PeerRole::Active { handover: None }, 1));
    assert!(restarted.record().unfenced, "it may still be running there");
    let actions = met(&mut restarted, peer(PeerRole::Fenced, 1));
    assert!(!restarted.record().unfenced && restarted.record().epoch.counter == counter);
    assert_eq!(actions, vec![Action::Persist(restarted.record().clone())]);
}

#[test]
fn a_qemu_that_came_with_a_handover_is_dead_once_its_source_serves_on() {
    // Lost without it: a person told the source to serve on, the VM booted there again, and the target's QEMU, still
    // connected, read the new VM's disk and would have been granted the next handover (watari-sim seed 1013114).
    let mut s = asking();
    let actions = met(&mut s, peer(PeerRole::Active { handover: None }, 3));
    let dead = position(&actions, |a| *a == Action::Gate(Gate::Dead));
    assert!(dead < position(&actions, |a| *a == Action::Gate(Gate::Remote)), "{actions:?}");
    let mut alone = site(Role::Replica, 1);
    let actions = met(&mut alone, peer(PeerRole::Active { handover: None }, 3));
    assert!(!actions.contains(&Action::Gate(Gate::Dead)), "nobody came with a handover: {actions:?}");
}

#[test]
fn a_target_that_voided_under_another_name_lifts_its_source_instead_of_stopping_it() {
    // Lost without it: a take-over that never arrived was voided while the source opened a handover of its own; at the next
    // contact the healthy source was fenced by a side that served nobody (watari-sim seed 1024652).
    let open = Role::HandoverOpen { handover: OTHER };
    let sealed = Role::Sealed { handover: OTHER, nonce: NONCE, session: SESSION };
    for role in [Role::Serving, open, sealed] {
        let told = |s: &Site, actions: &[Action]| {
            assert_eq!(s.record().role, Role::Serving, "{role:?}");
            assert!(s.record().epoch.counter >= 3, "{role:?}");
            assert!(matches!(sends(actions)[..], [Message::Voided { handover: H, .. }]), "{role:?}: {actions:?}");
            assert!(actions.contains(&Action::Unseal));
        };
        let mut s = site(role.clone(), 1);
        let actions = met(&mut s, Peer { floor: 3, ..peer(PeerRole::Voided { handover: H }, 1) });
        told(&s, &actions);
        let mut s = site(role.clone(), 1);
        let actions = received(&mut s, Message::Void { handover: H, epoch: 2 });
        told(&s, &actions);
        // A person told it to serve on meanwhile (seed 24393): still below what the target forbids.
        let mut s = site(role.clone(), 2);
        let actions = met(&mut s, Peer { floor: 3, ..peer(PeerRole::Voided { handover: H }, 1) });
        told(&s, &actions);
    }
}
