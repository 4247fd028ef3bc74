//! What is to be said about a peer: a pure, total function of what was seen.

use watari_crds::card::SiteCard;
use watari_crds::conditions::{Finding, Kind, Reason};
use watari_crds::peer::{Missing, PeerClusterSpec, PeerClusterStatus, Versions};

use super::observe::Seen;
use crate::card::CARD_AGE_MAX_SECONDS;

/// A live migration between clusters needs these gates at both (kubevirt.md §1.1, §3.1).
const GATES: [&str; 2] = ["Sidecar", "DecentralizedLiveMigration"];

/// What is to be said: findings, and the fields of a status beside its conditions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdict {
    pub findings: Vec<Finding>,
    pub status: PeerClusterStatus,
}

/// `now` in seconds since the Unix epoch.
pub fn judge(spec: &PeerClusterSpec, own: &SiteCard, seen: &Seen, now: i64) -> Verdict {
    match seen {
        Seen::NoKubeconfig(why) => not_ready(Reason::KubeconfigInvalid, why.clone(), PeerClusterStatus::default()),
        Seen::Unreachable(why) => {
            let text = format!("The peer's API server does not answer us: {why}.");
            not_ready(Reason::PeerUnreachable, text, PeerClusterStatus::default())
        }
        Seen::Silent { why, round_trip_millis } => {
            let status = PeerClusterStatus { round_trip_millis: Some(*round_trip_millis), ..Default::default() };
            not_ready(Reason::PeerSilent, why.clone(), status)
        }
        Seen::Card { card, round_trip_millis } => {
            let status =
                PeerClusterStatus { round_trip_millis: Some(rounded(*round_trip_millis)), ..known(spec, own, card) };
            with_card(spec, own, card, now, status)
        }
    }
}

/// Two significant digits: a status that is written for each millisecond would never rest.
fn rounded(millis: i64) -> i64 {
    let mut step = 1;
    while millis / step >= 100 {
        step *= 10;
    }
    millis / step * step
}

fn with_card(spec: &PeerClusterSpec, own: &SiteCard, card: &SiteCard, now: i64, status: PeerClusterStatus) -> Verdict {
    if card.site != spec.site || card.site == own.site {
        let (found, expected) = (&card.site, &spec.site);
        let text = format!("The peer calls itself {found:?}, expected {expected:?}; this site is {:?}.", own.site);
        return not_ready(Reason::SiteNameWrong, text, status);
    }
    let age = now - card.written_unix_seconds;
    if age > CARD_AGE_MAX_SECONDS {
        let text = format!("The peer's operator has said nothing for {} minutes.", age / 60);
        return not_ready(Reason::PeerSilent, text, status);
    }
    let ready = match status.missing.len() {
        0 => Finding::new(Kind::Ready, true, Reason::AsAsked, "Pairs can use this peer, and VMs can move to it."),
        count => {
            let text = format!("Pairs can use this peer; {count} things are missing for moves.");
            Finding::new(Kind::Ready, true, Reason::MoveNotPossible, text)
        }
    };
    let rest = [Kind::Reconciling, Kind::Stalled].map(|kind| Finding::new(kind, false, Reason::AsAsked, ""));
    Verdict { findings: [vec![ready], rest.to_vec()].concat(), status }
}

fn known(spec: &PeerClusterSpec, own: &SiteCard, card: &SiteCard) -> PeerClusterStatus {
    let gateways = match (spec.gateways.is_empty(), card.gateway.is_empty()) {
        (false, _) => spec.gateways.clone(),
        (true, false) => vec![card.gateway.clone()],
        (true, true) => Vec::new(),
    };
    PeerClusterStatus {
        versions: Some(Versions {
            watari: card.watari_version.clone(),
            kubernetes: card.kubernetes_version.clone(),
            kubevirt: card.kubevirt.as_ref().map(|it| it.version.clone()).unwrap_or_default(),
        }),
        missing: missing(spec, own, card, gateways.is_empty()),
        gateways,
        storage_classes: card.storage_classes.keys().cloned().collect(),
        ..PeerClusterStatus::default()
    }
}

fn not_ready(reason: Reason, message: String, status: PeerClusterStatus) -> Verdict {
    // These two may end by themselves.
    let stalled = !matches!(reason, Reason::PeerUnreachable | Reason::PeerSilent);
    let findings = vec![
        Finding::new(Kind::Ready, false, reason, message.clone()),
        Finding::new(Kind::Reconciling, !stalled, reason, message.clone()),
        Finding::new(Kind::Stalled, stalled, reason, message),
    ];
    Verdict { findings, status }
}

fn missing(spec: &PeerClusterSpec, own: &SiteCard, peer: &SiteCard, no_gateway: bool) -> Vec<Missing> {
    let mut list = Vec::new();
    let mut add = |site: &SiteCard, what: String, remedy: String| {
        list.push(Missing { site: site.site.clone(), what, remedy });
    };
    for site in [own, peer] {
        let Some(kubevirt) = &site.kubevirt else {
            add(site, "KubeVirt".to_owned(), "Install KubeVirt.".to_owned());
            continue;
        };
        for gate in GATES.iter().filter(|gate| !kubevirt.feature_gates.iter().any(|on| on == *gate)) {
            let place = "spec.configuration.developerConfiguration.featureGates of the KubeVirt object";
            add(site, format!("KubeVirt's feature gate {gate}"), format!("Add it to {place}."));
        }
    }
    for node in own.nodes.iter().filter(|node| peer.nodes.contains(node)) {
        let remedy = "KubeVirt cannot migrate between nodes of one name; rename it at one of the sites.";
        add(peer, format!("a node name of its own instead of {node}"), remedy.to_owned());
    }
    for class in spec.storage_classes.values().filter(|class| !peer.storage_classes.contains_key(*class)) {
        add(peer, format!("the storage class {class}"), "Make it, or correct spec.storageClasses.".to_owned());
    }
    if no_gateway {
        let remedy = "Set gateway.address in the values of the peer's chart, or spec.gateways here.";
        add(peer, "a gateway".to_owned(), remedy.to_owned());
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use watari_crds::card::KubeVirtCard;
    use watari_crds::conditions::Status;

    fn spec() -> PeerClusterSpec {
        serde_json::from_value(serde_json::json!({ "site": "osaka", "kubeconfigSecret": "osaka" })).expect("a spec")
    }

    fn card(site: &str) -> SiteCard {
        let gates = GATES.map(str::to_owned).to_vec();
        SiteCard {
            site: site.to_owned(),
            gateway: "gateway.osaka.example:7443".to_owned(),
            kubevirt: Some(KubeVirtCard { version: "v1.9.0".to_owned(), feature_gates: gates }),
            nodes: vec![format!("{site}-1")],
            written_unix_seconds: 1000,
            ..SiteCard::default()
        }
    }

    fn seen(card: SiteCard) -> Seen {
        Seen::Card { card: Box::new(card), round_trip_millis: 171 }
    }

    fn ready(verdict: &Verdict) -> (Status, Reason) {
        let finding = verdict.findings.iter().find(|finding| finding.kind == Kind::Ready).expect("always said");
        (finding.status, finding.reason)
    }

    #[test]
    fn each_way_in_which_a_peer_cannot_be_used_has_its_reason() {
        let silent = Seen::Silent { why: "nothing there".to_owned(), round_trip_millis: 3 };
        for (what, reason) in [
            (Seen::NoKubeconfig("no Secret".to_owned()), Reason::KubeconfigInvalid),
            (Seen::Unreachable("timed out".to_owned()), Reason::PeerUnreachable),
            (silent, Reason::PeerSilent),
            (seen(card("kobe")), Reason::SiteNameWrong),
        ] {
            let verdict = judge(&spec(), &card("tokyo"), &what, 1000);
            assert_eq!(ready(&verdict), (Status::False, reason), "{what:?}");
        }
        let old = judge(&spec(), &card("tokyo"), &seen(card("osaka")), 1001 + CARD_AGE_MAX_SECONDS);
        assert_eq!(ready(&old), (Status::False, Reason::PeerSilent));
        let ourselves = judge(&spec(), &card("osaka"), &seen(card("osaka")), 1000);
        assert_eq!(ready(&ourselves), (Status::False, Reason::SiteNameWrong));
    }

    #[test]
    fn a_whole_peer_is_ready_with_nothing_missing_and_its_gateway_is_taken_from_its_card() {
        let verdict = judge(&spec(), &card("tokyo"), &seen(card("osaka")), 1000);
        assert_eq!(ready(&verdict), (Status::True, Reason::AsAsked));
        assert_eq!(verdict.status.missing, []);
        assert_eq!(verdict.status.gateways, ["gateway.osaka.example:7443"]);
        assert_eq!(verdict.status.round_trip_millis, Some(170));
    }

    #[test]
    fn everything_that_a_move_lacks_is_named_with_its_site_and_remedy_and_pairs_still_work() {
        let mut spec = spec();
        spec.storage_classes.insert("fast".to_owned(), "quick".to_owned());
        let mut own = card("tokyo");
        own.kubevirt = None;
        let mut peer = card("osaka");
        peer.kubevirt.as_mut().expect("set above").feature_gates = vec!["Sidecar".to_owned()];
        peer.nodes = own.nodes.clone();
        peer.gateway = String::new();
        let verdict = judge(&spec, &own, &seen(peer), 1000);
        assert_eq!(ready(&verdict), (Status::True, Reason::MoveNotPossible));
        let found: Vec<_> = verdict.status.missing.iter().map(|it| (it.site.as_str(), it.what.as_str())).collect();
        assert_eq!(
            found,
            [
                ("tokyo", "KubeVirt"),
                ("osaka", "KubeVirt's feature gate DecentralizedLiveMigration"),
                ("osaka", "a node name of its own instead of tokyo-1"),
                ("osaka", "the storage class quick"),
                ("osaka", "a gateway"),
            ]
        );
        assert!(verdict.status.missing.iter().all(|it| !it.remedy.is_empty()));
    }
}
