//! The table of [`super::decide`].

use serde_json::json;
use watari_crds::card::SiteCard;
use watari_crds::conditions::Status;
use watari_wire::report::{GenerationsReport, LinkReport, Report};

use super::*;
use crate::side::observe::{Launcher, Side};

pub const ID: &str = "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10";

fn pair() -> SyncPair {
    serde_json::from_value(json!({
        "apiVersion": "watari.io/v1alpha1", "kind": "SyncPair",
        "metadata": { "name": "ledger", "namespace": "shop", "uid": ID, "finalizers": [finalizer::PAIR] },
        "spec": { "vmName": "ledger", "peer": "osaka", "bandwidth": "100M" },
    }))
    .expect("a SyncPair")
}

pub fn seen(mode: &str) -> Seen {
    let cluster = serde_json::from_value(json!({
        "apiVersion": "watari.io/v1alpha1", "kind": "PeerCluster", "metadata": { "name": "osaka" },
        "spec": { "site": "osaka", "kubeconfigSecret": "osaka", "storageClasses": { "fast": "quick" } },
    }));
    let card = SiteCard {
        site: "osaka".to_owned(),
        gateway: "gateway.osaka.example:7443".to_owned(),
        authorities: "PEER".to_owned(),
        ..SiteCard::default()
    };
    let vm = serde_json::from_value(json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": { "name": "ledger" },
        "spec": { "template": { "spec": {
            "domain": { "devices": { "disks": [{ "name": "root" }] } },
            "volumes": [{ "name": "root", "persistentVolumeClaim": { "claimName": "ledger-root" } }],
        } } },
    }));
    let claim = serde_json::from_value(json!({
        "metadata": { "name": "ledger-root" },
        "spec": { "volumeMode": mode, "accessModes": ["ReadWriteOnce"], "storageClassName": "fast" },
        "status": { "capacity": { "storage": "64Mi" } },
    }));
    let usable = Usable { cluster: cluster.expect("a PeerCluster"), card };
    Seen {
        peer: Peer::Usable(Box::new(usable)),
        vm: Some(vm.expect("a VM")),
        claims: BTreeMap::from([("ledger-root".to_owned(), claim.expect("a claim"))]),
        replica: Replica::None,
        own_authorities: "OURS".to_owned(),
        own_gateway: "gateway.tokyo.example:7443".to_owned(),
        ..Seen::default()
    }
}

fn launcher(wired: bool) -> Option<Launcher> {
    let ip = Some("192.0.2.7".to_owned());
    Some(Launcher { name: "virt-launcher".to_owned(), wired, scheduled: true, ip })
}

fn said(decision: &Decision, kind: Kind) -> (Status, Reason) {
    let finding = decision.findings.iter().find(|finding| finding.kind == kind).expect("said");
    (finding.status, finding.reason)
}

fn names(decision: &Decision) -> Vec<&'static str> {
    let name = |step: &Step| match step {
        Step::SetFinalizer => "finalizer",
        Step::Furnish(_) => "furnish",
        Step::WireVm(_) => "wire",
        Step::ApplyReplica(_) => "replica",
        Step::Configure => "configure",
        Step::UnwireVm => "unwire",
        Step::DeleteReplica => "delete replica",
        Step::Unfurnish => "unfurnish",
        Step::RemoveFinalizer => "remove finalizer",
        Step::MakeHolder(_) => "make holder",
        Step::EndHolder => "end holder",
        Step::Cross(_) => "cross",
    };
    decision.steps.iter().map(name).collect()
}

#[test]
fn a_new_pair_is_furnished_before_its_vm_is_wired_and_the_replica_is_asked_for() {
    let mut pair = pair();
    pair.metadata.finalizers = None;
    let decision = decide(&pair, "tokyo", &seen("Block"));
    assert_eq!(names(&decision), ["finalizer", "furnish", "wire", "replica"]);
    let Some(Step::ApplyReplica(spec)) = decision.steps.last() else { panic!("{:?}", decision.steps) };
    assert_eq!((spec.home_site.as_str(), spec.site.as_str()), ("tokyo", "osaka"));
    assert_eq!((spec.disks[0].size_bytes, spec.disks[0].storage_class.as_deref()), (64 << 20, Some("quick")));
    assert_eq!(spec.bandwidth_bits_per_second, Some(100_000_000));
    assert_eq!((decision.phase, said(&decision, Kind::Ready).1), (Phase::Stopped, Reason::VmNotRunning));
}

#[test]
fn an_image_in_a_file_system_waits_for_the_sidecar_to_say_how_large_it_is() {
    let mut seen = seen("Filesystem");
    assert_eq!(names(&decide(&pair(), "tokyo", &seen)), ["furnish", "wire"]);
    seen.side.launcher = launcher(true);
    let disk = watari_wire::report::DiskReport { name: "root".to_owned(), size_bytes: 60 << 20, ..Default::default() };
    seen.side.report = Some(Report { disks: vec![disk], ..Report::default() });
    let decision = decide(&pair(), "tokyo", &seen);
    let spec = decision.steps.iter().find_map(|step| match step {
        Step::ApplyReplica(spec) => Some(spec),
        _ => None,
    });
    assert_eq!(spec.expect("the size is known now").disks[0].size_bytes, 60 << 20);
}

#[test]
fn what_is_right_already_is_not_written_again() {
    let mut seen = seen("Block");
    let first = decide(&pair(), "tokyo", &seen);
    for step in first.steps {
        match step {
            Step::WireVm(wiring) => {
                let metadata = &mut seen.vm.as_mut().expect("a VM").spec.template.metadata;
                metadata.labels.insert(label::PAIR.to_owned(), wiring.pair_id.clone());
                metadata.annotations.insert(annotation::WIRING.to_owned(), wiring.to_annotation());
            }
            Step::ApplyReplica(spec) => {
                let mut found = watari_crds::replica::SyncReplica::new("ledger", *spec);
                // A wish of the peer's: not the home's business.
                found.spec.promote = Some(watari_crds::failover::Promote { at_move: 7, generation: None });
                seen.replica = Replica::Found(Box::new(found));
            }
            Step::SetFinalizer
            | Step::Furnish(_)
            | Step::Configure
            | Step::UnwireVm
            | Step::DeleteReplica
            | Step::Unfurnish
            | Step::MakeHolder(_)
            | Step::EndHolder
            | Step::Cross(_)
            | Step::RemoveFinalizer => {}
        }
    }
    assert_eq!(names(&decide(&pair(), "tokyo", &seen)), ["furnish"]);
}

#[test]
fn each_state_of_the_running_vm_has_its_phase_and_reason() {
    let report = |committed: &str, connected| {
        let generations = GenerationsReport { committed: committed.to_owned(), ..GenerationsReport::default() };
        Some(Report { generations, link: LinkReport { connected, ..LinkReport::default() }, ..Report::default() })
    };
    for (launcher, report, phase, ready, reason) in [
        (None, None, Phase::Stopped, Status::False, Reason::VmNotRunning),
        (launcher(false), None, Phase::Preparing, Status::False, Reason::NotWired),
        (launcher(true), None, Phase::Preparing, Status::False, Reason::SidecarSilent),
        (launcher(true), report("", false), Phase::Synchronizing, Status::False, Reason::Synchronizing),
        (launcher(true), report("1.1", false), Phase::Lagging, Status::True, Reason::LinkDown),
        (launcher(true), report("1.1", true), Phase::Protected, Status::True, Reason::AsAsked),
    ] {
        let side = Side { launcher: launcher.clone(), report, ..Side::default() };
        let seen = Seen { side, ..seen("Block") };
        let decision = decide(&pair(), "tokyo", &seen);
        assert_eq!((decision.phase, said(&decision, Kind::Ready)), (phase, (ready, reason)));
        let restart = launcher.is_some_and(|pod| !pod.wired);
        assert_eq!(said(&decision, Kind::RestartRequired).0 == Status::True, restart, "{phase:?}");
    }
}

#[test]
fn a_home_that_wrote_alone_is_stalled_until_a_person_consents() {
    let peer = json!({ "role": "Serving", "epoch": 9, "failover": {
        "atMove": 0, "stage": "Done", "began": "2026-01-01T00:00:00Z", "ended": "2026-01-01T00:00:30Z",
    } });
    let report = Report { role: "Fenced".to_owned(), epoch: 1, ..Report::default() };
    let mut seen = Seen { side: Side { report: Some(report), ..Side::default() }, ..seen("Block") };
    let sent = decide(&pair(), "tokyo", &seen).steps.into_iter().find_map(|step| match step {
        Step::ApplyReplica(spec) => Some(spec),
        _ => None,
    });
    let mut replica = watari_crds::replica::SyncReplica::new("ledger", *sent.expect("it is asked for"));
    replica.status = Some(serde_json::from_value(peer).expect("a status"));
    seen.replica = Replica::Found(Box::new(replica));
    let mut pair = pair();
    let waits = decide(&pair, "tokyo", &seen);
    assert_eq!((waits.phase, said(&waits, Kind::Diverged)), (Phase::Diverged, (Status::True, Reason::WroteAlone)));
    assert_eq!(said(&waits, Kind::Stalled), (Status::True, Reason::WroteAlone));
    assert!(
        names(&waits).contains(&"make holder") && names(&waits).contains(&"replica"),
        "the count is told to the peer"
    );
    pair.status = Some(watari_crds::pair::SyncPairStatus { active_site: Site::Peer, moves: 1, ..Default::default() });
    pair.spec.overwrite_diverged = Some(watari_crds::pair::OverwriteDiverged { at_move: 1 });
    let consented = decide(&pair, "tokyo", &seen);
    assert!(consented.steps.contains(&Step::Cross(side::Step::AcceptDivergence)));
    assert_eq!(said(&consented, Kind::Stalled).0, Status::False);
}

#[test]
fn after_a_failover_the_home_protects_the_vm_only_with_a_generation_of_the_promoted_side() {
    let moved = json!({ "to": "Peer", "ended": "2026-01-01T00:00:00Z", "failover": true });
    let mut pair = pair();
    pair.status = serde_json::from_value(json!({ "activeSite": "Peer", "moves": 1, "history": [moved] })).ok();
    for (role, committed, connected, phase) in [
        ("Serving", "", false, Phase::Synchronizing),
        ("Replica", "1.12", true, Phase::Synchronizing),
        ("Replica", "9.1", true, Phase::Protected),
        ("Replica", "9.1", false, Phase::Lagging),
    ] {
        let replica = watari_wire::report::ReplicaReport { committed: committed.to_owned(), ..Default::default() };
        let link = LinkReport { connected, ..LinkReport::default() };
        let report = Report { role: role.to_owned(), epoch: 9, link, replica: Some(replica), ..Report::default() };
        let side = Side { report: Some(report), ..Side::default() };
        pair.status.as_mut().expect("one").epoch = Some(10);
        let decision = decide(&pair, "tokyo", &Seen { side, ..seen("Block") });
        assert_eq!(decision.phase, phase, "{role} {committed}");
    }
}

#[test]
fn what_a_pair_lacks_stalls_it_and_changes_nothing() {
    let no_peer = Seen { peer: Peer::Missing, ..seen("Block") };
    let no_vm = Seen { vm: None, ..seen("Block") };
    let no_gateway = Seen { own_gateway: String::new(), ..seen("Block") };
    for (seen, reason) in
        [(no_peer, Reason::PeerNotReady), (no_vm, Reason::VmMissing), (no_gateway, Reason::PeerNotReady)]
    {
        let decision = decide(&pair(), "tokyo", &seen);
        assert_eq!((said(&decision, Kind::Stalled), names(&decision)), ((Status::True, reason), vec![]));
    }
    let away = Seen { peer: Peer::Unusable("timed out".to_owned()), replica: Replica::Unknown, ..seen("Block") };
    let decision = decide(&pair(), "tokyo", &away);
    assert_eq!((names(&decision), said(&decision, Kind::Ready).1), (vec![], Reason::PeerNotReady));
    assert_eq!(said(&decision, Kind::Stalled).0, Status::False, "a peer comes back by itself");
}

#[test]
fn a_deleted_pair_keeps_what_a_running_vm_still_uses_and_takes_the_rest_away() {
    let mut pair = pair();
    pair.metadata.deletion_timestamp =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::UNIX_EPOCH));
    let side = Side { launcher: launcher(true), ..Side::default() };
    let mut seen = Seen { side, ..seen("Block") };
    let running = decide(&pair, "tokyo", &seen);
    assert_eq!((names(&running), running.finished, running.phase), (vec![], false, Phase::Deleting));
    assert_eq!(said(&running, Kind::RestartRequired).0, Status::True);
    seen.side.launcher = None;
    let stopped = decide(&pair, "tokyo", &seen);
    assert_eq!((names(&stopped), stopped.finished), (vec!["unfurnish", "remove finalizer"], true));
    seen.peer = Peer::Unusable("timed out".to_owned());
    seen.replica = Replica::Unknown;
    let unreachable = decide(&pair, "tokyo", &seen);
    assert_eq!((names(&unreachable), unreachable.finished), (vec!["unfurnish"], false));
}
