//! The table of [`super::decide`].

use watari_crds::conditions::Status;
use watari_crds::names;
use watari_wire::report::Report;

use super::super::observe::{ClaimSeen, PodSeen};
use super::*;
use crate::side::observe::Side;

const PAIR: &str = "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10";

fn replica() -> SyncReplica {
    let mut replica: SyncReplica = serde_json::from_value(serde_json::json!({
        "apiVersion": "watari.io/v1alpha1", "kind": "SyncReplica", "metadata": { "name": "ledger", "namespace": "shop" },
        "spec": {
            "pairId": PAIR, "pairName": "shop/ledger", "vmName": "ledger", "homeSite": "tokyo", "site": "osaka",
            "disks": [{ "name": "root", "claim": "ledger-root", "sizeBytes": 4096, "claimBytes": 4096, "mode": "Block", "access": "ReadWriteOnce" }],
            "metadata": { "sizeBytes": 1 << 30, "access": "ReadWriteOnce" },
            "interval": "10s", "retention": { "count": 3 }, "homeAuthorities": "PEM",
        },
    }))
    .expect("a SyncReplica");
    replica.metadata.finalizers = Some(vec![finalizer::REPLICA.to_owned()]);
    replica
}

fn claim(uid: &str) -> ClaimSeen {
    ClaimSeen { uid: uid.to_owned(), ours: true, deleting: false }
}

fn claims() -> BTreeMap<String, ClaimSeen> {
    BTreeMap::from([("ledger-root".to_owned(), claim("1")), (names::metadata_claim(PAIR), claim("2"))])
}

fn made() -> BTreeMap<String, String> {
    claims().into_iter().map(|(name, claim)| (name, claim.uid)).collect()
}

fn running(replica: &SyncReplica) -> PodSeen {
    let made_from = made_from(replica);
    PodSeen { phase: "Running".to_owned(), ready: true, made_from, ..PodSeen::default() }
}

fn of_role(role: &str) -> Option<Report> {
    Some(Report { role: role.to_owned(), ..Report::default() })
}

fn with(report: Option<Report>) -> Side {
    Side { report, ..Side::default() }
}

fn ready(decision: &Decision) -> (Status, Reason) {
    let finding = decision.findings.iter().find(|finding| finding.kind == Kind::Ready).expect("always said");
    (finding.status, finding.reason)
}

fn deleted(mut replica: SyncReplica, role: Option<&str>) -> SyncReplica {
    replica.metadata.deletion_timestamp =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::UNIX_EPOCH));
    replica.status = Some(watari_crds::replica::SyncReplicaStatus {
        claims: made(),
        role: role.map(str::to_owned),
        ..Default::default()
    });
    replica
}

#[test]
fn a_new_replica_gets_its_finalizer_before_its_claims_and_those_before_its_pod() {
    let mut replica = replica();
    replica.metadata.finalizers = None;
    let decision = decide(&replica, "osaka", &Seen::default());
    let metadata = names::metadata_claim(PAIR);
    assert_eq!(
        decision.steps,
        [
            Step::SetFinalizer,
            Step::Furnish,
            Step::MakeClaim("ledger-root".to_owned()),
            Step::MakeClaim(metadata),
            Step::MakePod
        ]
    );
    assert!(decision.claims.is_empty(), "nothing counts as made before it was seen");
}

#[test]
fn what_was_made_is_recorded_and_a_ready_pod_is_a_ready_replica() {
    let replica = replica();
    let seen = Seen { claims: claims(), pod: Some(running(&replica)), ..Seen::default() };
    let decision = decide(&replica, "osaka", &seen);
    assert_eq!((decision.steps, decision.claims.clone()), (vec![Step::Furnish], made()));
    assert_eq!(ready(&decide(&replica, "osaka", &seen)), (Status::True, Reason::AsAsked));
}

#[test]
fn a_claim_that_was_made_and_is_missing_or_another_one_is_lost_and_never_made_anew() {
    let mut replica = replica();
    replica.status = Some(watari_crds::replica::SyncReplicaStatus { claims: made(), ..Default::default() });
    let mut missing = claims();
    missing.remove("ledger-root");
    let mut other = claims();
    other.insert("ledger-root".to_owned(), claim("3"));
    let mut going = claims();
    going.get_mut("ledger-root").expect("there").deleting = true;
    for claims in [missing, other, going] {
        let decision = decide(&replica, "osaka", &Seen { claims, ..Seen::default() });
        assert_eq!(ready(&decision), (Status::False, Reason::ClaimLost));
        assert_eq!((decision.steps, decision.claims), (Vec::new(), made()));
    }
}

#[test]
fn somebody_elses_claim_of_the_same_name_is_left_alone() {
    let mut claims = claims();
    claims.get_mut("ledger-root").expect("there").ours = false;
    let decision = decide(&replica(), "osaka", &Seen { claims, ..Seen::default() });
    assert_eq!((ready(&decision).1, decision.steps), (Reason::DiskUnsuitable, Vec::new()));
}

#[test]
fn a_pod_that_ended_or_was_made_of_something_else_is_replaced() {
    let replica = replica();
    let ended = PodSeen { phase: "Failed".to_owned(), ..running(&replica) };
    let old = PodSeen { made_from: "else".to_owned(), ..running(&replica) };
    for pod in [ended, old] {
        let seen = Seen { claims: claims(), pod: Some(pod), ..Seen::default() };
        assert_eq!(decide(&replica, "osaka", &seen).steps, [Step::Furnish, Step::DeletePod]);
    }
}

#[test]
fn a_replica_for_another_site_does_nothing() {
    let decision = decide(&replica(), "kobe", &Seen::default());
    assert_eq!((ready(&decision).1, decision.steps), (Reason::NotForThisSite, Vec::new()));
}

#[test]
fn a_deleted_replica_ends_its_pod_then_its_claims_then_itself() {
    let replica = deleted(replica(), Some("Replica"));
    let mut seen = Seen { claims: claims(), pod: Some(running(&replica)), side: with(of_role("Replica")) };
    assert_eq!(decide(&replica, "osaka", &seen).steps, [Step::DeletePod]);
    seen.pod = None;
    seen.side.report = None;
    let steps = decide(&replica, "osaka", &seen).steps;
    assert!(matches!(steps.as_slice(), [Step::DeleteClaim(_), Step::DeleteClaim(_)]), "{steps:?}");
    seen.claims.clear();
    let last = decide(&replica, "osaka", &seen);
    assert_eq!((last.steps, last.finished), (vec![Step::Unfurnish], true));
}

#[test]
fn nothing_is_deleted_of_a_side_that_is_not_a_replica_or_does_not_say_so() {
    for (role, report) in [(Some("Serving"), None), (Some("Replica"), of_role("Serving")), (None, None)] {
        let replica = deleted(replica(), role);
        let seen = Seen { claims: claims(), pod: Some(running(&replica)), side: with(report) };
        let decision = decide(&replica, "osaka", &seen);
        assert_eq!((decision.steps, decision.finished), (Vec::new(), false), "{role:?}");
    }
}
