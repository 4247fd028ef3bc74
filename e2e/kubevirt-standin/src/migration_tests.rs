//! Two clusters in memory: decisions are carried out on plain JSON, launchers do as they are told at once.

use super::*;
use crate::quirks::QUIRKS_ANNOTATION;
use crate::sync::{Side, half, news};
use crate::talk::Report;

const PORTS: Ports = Ports { libvirt: 1, memory: 2, disks: 3 };

/// One side with its VMI, its VMIM and the Pods.
struct World {
    side: Side,
    vmi: Value,
    vmim: Value,
    source: Option<PodSeen>,
    target: Option<PodSeen>,
    phases: Vec<Phase>,
    deleted: bool,
}

fn pod(name: &str, life: Life) -> PodSeen {
    PodSeen {
        name: name.into(),
        phase: "Running".into(),
        node: Some(format!("node-of-{name}")),
        address: "10.0.0.9".parse().ok(),
        ready: true,
        report: Some(Report { life, ..Report::default() }),
        ..PodSeen::default()
    }
}

impl World {
    fn new(side: Side, spec: Value) -> World {
        let (phase, uid, source) = match side {
            Side::Source => ("Running", "s", Some(pod("source", Life::Running))),
            Side::Target => ("WaitingForSync", "t", None),
        };
        World {
            side,
            vmi: json!({ "metadata": { "uid": format!("vmi-{uid}"), "namespace": "n", "name": uid }, "status": { "phase": phase } }),
            vmim: json!({ "metadata": { "uid": format!("vmim-{uid}"), "name": "move" }, "spec": spec }),
            source,
            target: None,
            phases: Vec::new(),
            deleted: false,
        }
    }

    fn look(&mut self, peer: Peer) -> Vec<Action> {
        let seen = Seen {
            vmim: &self.vmim,
            vmi: Some(&self.vmi),
            source: self.source.as_ref(),
            target: self.target.as_ref(),
            peer,
            more_nodes: false,
            age: 100,
        };
        let actions = decide(&seen);
        actions.iter().for_each(|action| self.perform(action));
        actions
    }

    fn perform(&mut self, action: &Action) {
        match action {
            Action::Phase(phase) => {
                self.phases.push(*phase);
                self.vmim["status"]["phase"] = phase.name().into();
            }
            Action::Begin(state) => self.vmi["status"]["migrationState"] = state.clone(),
            Action::State(change) => json_patch::merge(&mut self.vmi["status"]["migrationState"], change),
            Action::CreateTarget(_) => self.target = Some(pod("target", Life::Empty)),
            Action::DeleteTarget => self.target = None,
            Action::PrepareTarget => self.target = Some(pod("target", Life::Prepared(PORTS))),
            Action::Migrate(order) => {
                let report = Report {
                    leaving: Leaving::Running,
                    job: Some(order.job.clone()),
                    life: Life::Running,
                    ..Report::default()
                };
                self.source.as_mut().unwrap().report = Some(report);
            }
            Action::Abort => self.leave(Leaving::Failed("aborted".into())),
            Action::DeleteSelf => self.cancel(),
            Action::Release => self.deleted = true,
            Action::Event { .. } | Action::HandOff(_) | Action::TakeBack | Action::Arrive => {}
        }
    }

    fn leave(&mut self, leaving: Leaving) {
        let report = self.source.as_mut().and_then(|pod| pod.report.as_mut()).unwrap();
        report.leaving = leaving;
    }

    fn cancel(&mut self) {
        self.vmim["metadata"]["deletionTimestamp"] = "now".into();
    }

    fn hear(&mut self, other: &World) {
        let theirs = half(other.side, &other.vmi["status"]["migrationState"]);
        let ours = self.vmi["status"]["migrationState"].clone();
        if let Some(news) = news(self.side, &ours, &theirs).filter(|_| !ours.is_null()) {
            json_patch::merge(&mut self.vmi["status"]["migrationState"], &news);
        }
    }
}

fn two() -> (World, World) {
    let send = json!({ "vmiName": "s", "sendTo": { "migrationID": "m", "connectURL": "10.0.0.1:9185" } });
    let receive = json!({ "vmiName": "t", "receive": { "migrationID": "m" } });
    (World::new(Side::Source, send), World::new(Side::Target, receive))
}

fn peer(of: &World) -> Peer {
    Peer { cancelled: is_deleting(&of.vmim), told: true }
}

/// Both look until neither has anything to do.
fn settle(source: &mut World, target: &mut World) {
    for _ in 0..30 {
        source.hear(target);
        source.look(peer(target));
        target.hear(source);
        target.look(peer(source));
    }
}

#[test]
fn a_pair_goes_through_kubevirts_phases_and_waits_for_libvirt_in_the_middle() {
    let (mut source, mut target) = two();
    settle(&mut source, &mut target);
    assert_eq!(source.phases.last(), Some(&Phase::Running));
    assert_eq!(target.phases.last(), Some(&Phase::Running));
    source.leave(Leaving::Done);
    target.target = Some(pod("target", Life::Running));
    settle(&mut source, &mut target);
    use Phase::*;
    let after = [Pending, Scheduling, Scheduled, PreparingTarget, TargetReady, Running, Succeeded];
    assert_eq!(source.phases, [[Synchronizing].as_slice(), &after].concat());
    assert_eq!(target.phases, [[WaitingForSync].as_slice(), &after].concat());
    assert_eq!(source.vmi["status"]["migrationState"]["targetState"]["node"], "node-of-target");
}

#[test]
fn a_target_alone_waits_without_a_pod() {
    let (_, mut target) = two();
    for _ in 0..5 {
        target.look(Peer::default());
    }
    assert_eq!(target.phases, [Phase::WaitingForSync]);
    assert!(target.target.is_none());
}

#[test]
fn a_gate_that_stays_shut_is_asked_again_and_nothing_else_moves() {
    let (mut source, mut target) = two();
    for _ in 0..30 {
        source.hear(&target);
        source.look(Peer::default());
        target.hear(&source);
        let asked = target.look(Peer::default()).contains(&Action::PrepareTarget);
        if asked {
            target.target = Some(pod("target", Life::Empty));
        }
    }
    assert_eq!(target.phases.last(), Some(&Phase::PreparingTarget));
    assert_eq!(source.phases.last(), Some(&Phase::PreparingTarget));
    // virt-launcher gives up after 240 s.
    target.target.as_mut().unwrap().phase = "Failed".into();
    settle(&mut source, &mut target);
    assert_eq!(target.phases.last(), Some(&Phase::Failed));
    assert_eq!(source.phases.last(), Some(&Phase::Failed));
    assert!(target.target.is_none(), "its Pod is taken away");
}

#[test]
fn deleting_one_vmim_under_way_aborts_at_the_source_and_takes_both_away() {
    let (mut source, mut target) = two();
    settle(&mut source, &mut target);
    target.cancel();
    settle(&mut source, &mut target);
    for world in [&source, &target] {
        assert_eq!(world.phases.last(), Some(&Phase::Failed));
        assert!(world.deleted, "{:?}", world.side);
    }
    assert!(target.target.is_none());
    assert_eq!(source.vmi["status"]["phase"], "Running");
}

#[test]
fn a_failure_called_after_the_switch_leaves_the_guest_where_it_is() {
    let (mut source, mut target) = two();
    source.vmim["metadata"]["annotations"] = json!({ QUIRKS_ANNOTATION: "fail-after-switch" });
    settle(&mut source, &mut target);
    source.leave(Leaving::Done);
    target.target = Some(pod("target", Life::Running));
    settle(&mut source, &mut target);
    assert_eq!(source.phases.last(), Some(&Phase::Failed));
    assert!(target.target.is_some());
}

#[test]
fn a_second_migration_of_the_same_vmi_is_refused_while_the_first_goes_on() {
    let (mut source, _) = two();
    source.look(Peer::default());
    source.vmim["metadata"]["uid"] = "another".into();
    source.vmim["status"] = Value::Null;
    source.look(Peer::default());
    assert_eq!(source.phases.last(), Some(&Phase::Failed));
}

#[test]
fn within_a_cluster_one_vmi_has_both_halves() {
    let (mut local, _) = two();
    local.vmim["spec"] = json!({ "vmiName": "s" });
    for _ in 0..10 {
        local.look(Peer::default());
    }
    local.leave(Leaving::Done);
    local.target = Some(pod("target", Life::Running));
    for _ in 0..3 {
        local.look(Peer::default());
    }
    assert_eq!(local.phases.first(), Some(&Phase::Pending));
    assert_eq!(local.phases.last(), Some(&Phase::Succeeded));
}

#[test]
fn within_a_cluster_a_claim_of_one_node_keeps_a_vm_where_it_is() {
    let (mut local, _) = two();
    local.vmim["spec"] = json!({ "vmiName": "s" });
    local.vmi["status"]["conditions"] =
        json!([{ "type": "LiveMigratable", "status": "False", "message": "not shared" }]);
    local.look(Peer::default());
    assert_eq!(local.phases, [Phase::Failed]);
}
