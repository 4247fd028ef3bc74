//! The tables of [`super::receive`], [`super::send`] and [`super::rest`].

use serde_json::{Value, json};
use watari_crds::crossing::{Crossing, MigrationEnd, Site, Stage};
use watari_crds::names::label;
use watari_wire::report::{GenerationsReport, LinkReport, Report};

use super::observe::{KubeVirtSeen, Launcher, MigrationSeen, Side, VmiSeen};
use super::send::Receiver;
use super::*;

const PAIR: &str = "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10";
const ID: &str = "watari-move-1";

fn attempt() -> Crossing {
    Crossing { id: ID.to_owned(), to: Site::Peer, connect: None, at_move: 0, stopped: false, cancelled: false }
}

fn manifest() -> Value {
    json!({ "metadata": { "name": "ledger" }, "spec": { "runStrategy": "Always" } })
}

fn end(name: &str) -> MigrationEnd {
    let authorities = format!("-----BEGIN CERTIFICATE-----\n{name}\n-----END CERTIFICATE-----\n");
    MigrationEnd { address: format!("{name}:9185"), authorities }
}

/// A side whose KubeVirt trusts the other's, with a sidecar in this role.
fn side(role: &str) -> Side {
    let mut own = end("here");
    own.authorities += &end("there").authorities;
    Side {
        kubevirt: Some(KubeVirtSeen { namespace: "kubevirt".to_owned(), end: own }),
        report: Some(Report {
            role: role.to_owned(),
            link: LinkReport { connected: true, ..LinkReport::default() },
            ..Report::default()
        }),
        node: Some("node1".to_owned()),
        ..Side::default()
    }
}

fn migration(phase: &str) -> Vec<MigrationSeen> {
    vec![MigrationSeen { name: ID.to_owned(), phase: phase.to_owned(), deleting: false }]
}

fn vmi(phase: &str, receiver: bool) -> Option<VmiSeen> {
    Some(VmiSeen { uid: "u".to_owned(), phase: phase.to_owned(), receiver, failure: String::new() })
}

fn launcher() -> Option<Launcher> {
    Some(Launcher { name: "virt-launcher".to_owned(), wired: true, scheduled: true, ip: None })
}

fn receive(attempt: &Crossing, seen: &Side) -> Progress {
    super::receive::decide(attempt, PAIR, &manifest(), &end("there"), seen)
}

fn send(attempt: &Crossing, receiver: &Receiver, seen: &Side) -> Progress {
    super::send::decide(attempt, &end("there"), receiver, seen)
}

fn ready() -> Receiver {
    Receiver { stage: Stage::Ready, connect: Some("there:9185".to_owned()), message: String::new() }
}

#[test]
fn a_receiver_is_made_step_by_step_each_only_when_the_one_before_is_seen() {
    let attempt = attempt();
    let mut seen = side("Replica");
    seen.kubevirt = Some(KubeVirtSeen { namespace: "kubevirt".to_owned(), end: end("here") });
    assert_eq!(receive(&attempt, &seen).steps, [Step::Trust(end("there").authorities)]);
    let mut seen = side("Replica");
    let made = receive(&attempt, &seen);
    let [Step::MakeVm(vm)] = made.steps.as_slice() else { panic!("{made:?}") };
    assert_eq!((vm["spec"]["runStrategy"].as_str(), made.stage), (Some("WaitAsReceiver"), Stage::Preparing));
    seen.vm = Some(vm.clone());
    assert_eq!(receive(&attempt, &seen), Progress::waits(Stage::Preparing, "KubeVirt prepares the VM as a receiver."));
    seen.vmi = vmi("WaitingForSync", true);
    assert_eq!(receive(&attempt, &seen).steps, [Step::Receive { id: ID.to_owned(), node: None }]);
    seen.one_node = true;
    let pinned = Step::Receive { id: ID.to_owned(), node: Some("node1".to_owned()) };
    assert_eq!(receive(&attempt, &seen).steps, [pinned]);
    seen.migrations = migration("WaitingForSync");
    assert_eq!(receive(&attempt, &seen).stage, Stage::Ready);
    seen.migrations = migration("Running");
    assert_eq!(receive(&attempt, &seen).stage, Stage::Migrating);
    seen.migrations = migration("Succeeded");
    assert_eq!(receive(&attempt, &seen).steps, [Step::Acquire], "an idle guest asks for nothing by itself");
    seen.report = side("Serving").report;
    assert_eq!(receive(&attempt, &seen).stage, Stage::Done);
}

#[test]
fn a_vm_that_was_here_before_becomes_a_receiver_once_its_former_pod_is_gone() {
    let mut seen = side("Replica");
    seen.vm = Some(json!({ "spec": { "runStrategy": "Halted" } }));
    seen.launcher = launcher();
    assert!(receive(&attempt(), &seen).steps.is_empty());
    seen.launcher = None;
    let [Step::SetRunStrategy { strategy, restore }] = &receive(&attempt(), &seen).steps[..] else { panic!() };
    assert_eq!((strategy.as_str(), restore.as_deref()), ("WaitAsReceiver", Some("Always")));
}

#[test]
fn a_failed_migration_gives_the_right_to_write_up_only_when_qemu_is_gone_here() {
    let mut seen = Side { migrations: migration("Failed"), ..side("Replica") };
    seen.report.as_mut().expect("one was made").attachable = true;
    seen.launcher = launcher();
    assert!(receive(&attempt(), &seen).steps.is_empty(), "its Pod is still there");
    seen.vmi = vmi("Running", false);
    assert_eq!(receive(&attempt(), &seen).steps, [Step::Acquire], "failed, says KubeVirt, and the guest runs here");
    seen.launcher = None;
    let silent = Side { report: None, ..seen.clone() };
    assert!(receive(&attempt(), &silent).steps.is_empty(), "nobody holds the folder who could give it up");
    assert_eq!(receive(&attempt(), &seen).steps, [Step::Void]);
    seen.report = side("Voided").report;
    assert_eq!(receive(&attempt(), &seen).stage, Stage::Failed);
}

#[test]
fn a_move_that_is_called_off_deletes_its_migration_and_then_gives_the_handover_up() {
    let cancelled = Crossing { cancelled: true, ..attempt() };
    let mut seen = Side { migrations: migration("Running"), launcher: launcher(), ..side("Replica") };
    assert_eq!(receive(&cancelled, &seen).steps, [Step::DeleteMigration(ID.to_owned())]);
    seen.migrations.clear();
    seen.launcher = None;
    seen.report.as_mut().expect("one was made").attachable = true;
    assert_eq!(receive(&cancelled, &seen).steps, [Step::Void]);
    seen.report.as_mut().expect("one was made").attachable = false;
    assert_eq!(receive(&cancelled, &seen).stage, Stage::Failed);
    seen.migrations = migration("Succeeded");
    assert_eq!(receive(&cancelled, &seen).steps, [Step::Acquire], "too late: the guest is here");
}

#[test]
fn a_sender_opens_the_handover_and_migrates_only_when_little_is_left() {
    let (attempt, receiver) = (attempt(), ready());
    let mut seen = Side { vmi: vmi("Running", false), launcher: launcher(), ..side("Serving") };
    assert_eq!(send(&attempt, &Receiver::default(), &seen).stage, Stage::Preparing);
    assert_eq!(send(&attempt, &receiver, &seen).steps, [Step::OpenHandover { vmi_uid: "u".to_owned() }]);
    seen.report = side("Converging").report;
    let report = seen.report.as_mut().expect("one was made");
    report.generations = GenerationsReport { lag_bytes: 500 << 20, ..GenerationsReport::default() };
    report.link.rate_bytes_per_second = 10.0 * 1024.0 * 1024.0;
    let waiting = send(&attempt, &receiver, &seen);
    assert_eq!((waiting.steps.len(), waiting.message.as_str()), (0, "500 MiB are left to send, about 50 s."));
    seen.report.as_mut().expect("one was made").generations.lag_bytes = 90 << 20;
    let step = Step::Send { id: ID.to_owned(), connect: "there:9185".to_owned() };
    assert_eq!(send(&attempt, &receiver, &seen).steps, [step]);
    seen.migrations = migration("Succeeded");
    assert!(send(&attempt, &receiver, &seen).steps.is_empty());
    seen.report = side("Replica").report;
    assert_eq!(send(&attempt, &receiver, &seen).stage, Stage::Done);
}

#[test]
fn a_sender_is_through_with_a_failed_attempt_only_when_its_handover_is_closed() {
    let failed = Side { migrations: migration("Failed"), ..side("Converging") };
    assert_eq!(send(&attempt(), &ready(), &failed).stage, Stage::Migrating);
    let voided = Side { migrations: migration("Failed"), ..side("Serving") };
    assert_eq!(send(&attempt(), &ready(), &voided).stage, Stage::Failed);
    let cancelled = Crossing { cancelled: true, ..attempt() };
    let running = Side { migrations: migration("Running"), ..side("Converging") };
    assert_eq!(send(&cancelled, &ready(), &running).steps, [Step::DeleteMigration(ID.to_owned())]);
    assert_eq!(send(&cancelled, &ready(), &side("Serving")).stage, Stage::Failed);
}

#[test]
fn a_stopped_vm_is_offered_taken_over_and_made_as_it_was() {
    let stopped = Crossing { stopped: true, ..attempt() };
    let offered = send(&stopped, &Receiver::default(), &side("Serving"));
    assert_eq!(offered.steps, [Step::OpenHandover { vmi_uid: ID.to_owned() }]);
    assert_eq!(send(&stopped, &Receiver::default(), &side("Converging")).stage, Stage::Ready);
    let mut seen = side("Replica");
    assert!(receive(&stopped, &seen).steps.is_empty());
    seen.report.as_mut().expect("one was made").attachable = true;
    assert_eq!(receive(&stopped, &seen).steps, [Step::Acquire]);
    let here = receive(&stopped, &side("Serving"));
    let [Step::MakeVm(vm)] = here.steps.as_slice() else { panic!("{here:?}") };
    assert_eq!((vm["spec"]["runStrategy"].as_str(), here.stage), (Some("Always"), Stage::Done));
}

#[test]
fn without_a_move_nothing_of_one_is_left_and_nothing_else_is_touched() {
    let ours = json!({ "metadata": { "labels": { label::PAIR: PAIR, label::MANAGED: "watari" } } });
    let mut seen = Side { vm: Some(ours), migrations: migration("Succeeded"), ..side("Replica") };
    let cleaned = [Step::DeleteMigration(ID.to_owned()), Step::RemoveVm];
    assert_eq!(super::rest::decide(super::rest::Place::Peer, PAIR, &seen), cleaned);
    seen.report = side("Serving").report;
    seen.migrations = migration("Running");
    assert!(super::rest::decide(super::rest::Place::Peer, PAIR, &seen).is_empty());
    let mut home = Side { vm: Some(json!({ "spec": { "runStrategy": "WaitAsReceiver" } })), ..side("Replica") };
    let halted = [Step::SetRunStrategy { strategy: "Halted".to_owned(), restore: None }];
    assert_eq!(super::rest::decide(super::rest::Place::Home, PAIR, &home), halted);
    home.launcher = launcher();
    assert!(super::rest::decide(super::rest::Place::Home, PAIR, &home).is_empty());
}

#[test]
fn after_a_failover_the_vm_at_home_is_halted_once_its_sidecar_has_lost_the_right_to_write() {
    let halt = vec![Step::SetRunStrategy { strategy: "Halted".to_owned(), restore: None }];
    let vm = |strategy: &str| Some(json!({ "spec": { "runStrategy": strategy } }));
    let silent = Side { vm: vm("Always"), ..Side::default() };
    for (seen, expected) in [
        (Side { vm: vm("Always"), launcher: launcher(), ..side("Fenced") }, halt.clone()),
        (Side { vm: vm("Always"), launcher: launcher(), ..side("Replica") }, halt.clone()),
        (silent.clone(), halt),
        // Until the two sidecars meet, or while nobody says anything, it goes on.
        (Side { vm: vm("Always"), launcher: launcher(), ..side("Serving") }, Vec::new()),
        (Side { launcher: launcher(), ..silent }, Vec::new()),
        (Side { vm: vm("Halted"), launcher: launcher(), ..side("Fenced") }, Vec::new()),
    ] {
        assert_eq!(super::rest::decide(super::rest::Place::Left, PAIR, &seen), expected, "{seen:?}");
    }
}
