//! Certificates of two clusters over years, judged by rustls at each instant: nothing waits, `now` is passed in.

#![allow(clippy::unwrap_used)]

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
    pki_types::{CertificateDer, UnixTime, pem::PemObject},
    server::WebPkiClientVerifier,
};

use super::{
    authority::{AUTHORITY_LIFETIME, Authority, LEAF_LIFETIME, Subject},
    bundle::Bundle,
    renewal::{Renewal, Why, renewal},
    rotation::{Authorities, OVERLAP, Step},
    secret::{self, CA, CERTIFICATE, Data, KEY},
};

const PAIR: &str = "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10";

fn start() -> Timestamp {
    "2026-11-24T12:00:00Z".parse().unwrap()
}

fn days(days: i64) -> SignedDuration {
    SignedDuration::from_hours(24 * days)
}

fn subject(site: &str) -> Subject {
    Subject::Pair { pair_id: PAIR.to_owned(), site: site.to_owned() }
}

/// What a sidecar with this `ca.crt` says about a peer with this `tls.crt`, as listener and as dialer.
fn accepts(ca: &str, certificate: &str, now: Timestamp) -> Result<(), String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for authority in CertificateDer::pem_slice_iter(ca.as_bytes()) {
        roots.add(authority.unwrap()).unwrap();
    }
    let (roots, leaf) = (Arc::new(roots), CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap());
    let at = UnixTime::since_unix_epoch(Duration::from_secs(now.as_second().try_into().unwrap()));
    let listener = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build().unwrap();
    listener.verify_client_cert(&leaf, &[], at).map_err(|error| format!("as listener: {error}"))?;
    let dialer = WebPkiServerVerifier::builder_with_provider(roots, provider).build().unwrap();
    let name = watari_crds::names::server_name(PAIR).try_into().unwrap();
    dialer.verify_server_cert(&leaf, &[], &name, &[], at).map_err(|error| format!("as dialer: {error}"))?;
    Ok(())
}

#[test]
fn a_leaf_is_good_for_both_ends_of_its_pair_and_only_while_it_holds() {
    let authorities = Authorities::create("tokyo", start()).unwrap();
    let leaf = authorities.signing.issue(&subject("tokyo"), start()).unwrap();
    let ca = authorities.bundle_pem();
    accepts(&ca, &leaf.certificate_pem, start()).unwrap();
    accepts(&ca, &leaf.certificate_pem, start() + LEAF_LIFETIME).unwrap();
    // The peer's clock is half an hour behind.
    accepts(&ca, &leaf.certificate_pem, start() - SignedDuration::from_mins(30)).unwrap();
    let error = accepts(&ca, &leaf.certificate_pem, start() + LEAF_LIFETIME + days(1)).unwrap_err();
    assert!(error.contains("xpired"), "{error}");
    let stranger = Authorities::create("tokyo", start()).unwrap();
    let error = accepts(&stranger.bundle_pem(), &leaf.certificate_pem, start()).unwrap_err();
    assert!(error.contains("UnknownIssuer") || error.contains("BadSignature"), "{error}");
}

/// What the sidecar's verifier reads (sidecar/src/identity.rs): exactly one URI, and the pair's DNS name.
#[test]
fn a_leaf_names_its_pair_and_site_and_no_other() {
    use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
    let authority = Authority::create("tokyo", start()).unwrap();
    let leaf = authority.issue(&subject("tokyo"), start()).unwrap();
    let der = CertificateDer::from_pem_slice(leaf.certificate_pem.as_bytes()).unwrap();
    let (_, parsed) = X509Certificate::from_der(&der).unwrap();
    let said: Vec<String> = parsed
        .subject_alternative_name()
        .unwrap()
        .unwrap()
        .value
        .general_names
        .iter()
        .map(|name| match name {
            GeneralName::DNSName(name) => format!("dns {name}"),
            GeneralName::URI(uri) => format!("uri {uri}"),
            other => panic!("{other:?}"),
        })
        .collect();
    let expected = [format!("dns {PAIR}.pair.watari.internal"), format!("uri watari://pair/{PAIR}/site/tokyo")];
    assert_eq!(said, expected);
    assert!(!parsed.is_ca());
}

#[test]
fn a_leaf_is_renewed_at_half_of_its_life_and_whenever_it_says_something_else() {
    let authority = Authority::create("tokyo", start()).unwrap();
    let leaf = authority.issue(&subject("tokyo"), start()).unwrap().certificate_pem;
    let half = start() + SignedDuration::from_secs(LEAF_LIFETIME.as_secs() / 2);
    let second = SignedDuration::from_secs(1);
    let cases = [
        (start(), subject("tokyo"), Renewal::Wait { until: half }),
        (half - second, subject("tokyo"), Renewal::Wait { until: half }),
        (half, subject("tokyo"), Renewal::Due(Why::HalfSpent)),
        (start() + LEAF_LIFETIME + second, subject("tokyo"), Renewal::Due(Why::Expired)),
        (start() - days(1), subject("tokyo"), Renewal::Due(Why::NotYet)),
        (start(), subject("osaka"), Renewal::Due(Why::OtherSubject)),
        (start(), Subject::Webhooks { dns_names: vec!["a.svc".into()] }, Renewal::Due(Why::OtherSubject)),
    ];
    for (now, subject, expected) in cases {
        assert_eq!(renewal(Some(&leaf), &subject, now), expected, "{now} {subject:?}");
    }
    assert_eq!(renewal(None, &subject("tokyo"), start()), Renewal::Due(Why::Unreadable));
    assert_eq!(renewal(Some("rubbish"), &subject("tokyo"), start()), Renewal::Due(Why::Unreadable));
}

/// One cluster's operator with its stored Secrets: it advances its authority and keeps its pair's leaf.
struct Operator {
    site: &'static str,
    stored: Data,
    leaf: Data,
    steps: Vec<Step>,
}

impl Operator {
    fn new(site: &'static str) -> Operator {
        let stored = secret::store_authorities(&Authorities::create(site, start()).unwrap());
        Operator { site, stored, leaf: Data::new(), steps: Vec::new() }
    }

    fn authorities(&self) -> Authorities {
        secret::load_authorities(&self.stored).unwrap()
    }

    fn reconcile(&mut self, peer: &Bundle, now: Timestamp) {
        let (authorities, steps) = self.authorities().advanced(self.site, now).unwrap();
        self.stored = secret::store_authorities(&authorities);
        self.steps.extend(steps);
        self.leaf = secret::leaf(Some(&self.leaf), &subject(self.site), &authorities, peer, now).unwrap().data;
    }
}

/// Five years, two operators that look once a day, each hearing of the other's authorities three weeks late, one of them
/// away for three days each month.
#[test]
fn over_years_and_rotations_each_side_always_accepts_the_other() {
    let (mut tokyo, mut osaka) = (Operator::new("tokyo"), Operator::new("osaka"));
    let mut heard = Vec::new();
    for day in 0..5 * 365 {
        let now = start() + days(day);
        heard.push((tokyo.authorities().bundle().unwrap(), osaka.authorities().bundle().unwrap()));
        let (of_tokyo, of_osaka) = &heard[heard.len().saturating_sub(21)];
        if day % 30 >= 3 || day == 0 {
            tokyo.reconcile(of_osaka, now);
        }
        osaka.reconcile(of_tokyo, now);
        for (listener, dialer) in [(&tokyo, &osaka), (&osaka, &tokyo), (&tokyo, &tokyo)] {
            accepts(&listener.leaf[CA], &dialer.leaf[CERTIFICATE], now)
                .unwrap_or_else(|why| panic!("day {day}, {} refuses {}: {why}", listener.site, dialer.site));
        }
        assert!(tokyo.authorities().bundle().unwrap().members().len() <= 3, "day {day}");
    }
    let rotation = [Step::Prepare, Step::Promote, Step::Forget];
    let times = tokyo.steps.len() / 3;
    assert!(times >= 2, "{:?}", tokyo.steps);
    assert_eq!(tokyo.steps[..3 * times], rotation.repeat(times)[..]);
}

#[test]
fn an_operator_that_was_away_past_the_end_of_its_authority_begins_anew_and_forgets_nothing_that_holds() {
    let authorities = Authorities::create("tokyo", start()).unwrap();
    let late = start() + AUTHORITY_LIFETIME + days(1);
    let (anew, steps) = authorities.clone().advanced("tokyo", late).unwrap();
    assert_eq!(steps, [Step::Restart]);
    accepts(&anew.bundle_pem(), &anew.signing.issue(&subject("tokyo"), late).unwrap().certificate_pem, late).unwrap();
    // Away from before the successor was published until the signing one is about to end: no overlap is left, but it goes on.
    let last = start() + AUTHORITY_LIFETIME - days(2);
    let (promoted, steps) = authorities.advanced("tokyo", last).unwrap();
    assert_eq!(steps, [Step::Prepare, Step::Promote]);
    assert_eq!(promoted.former.len(), 1);
}

#[test]
fn a_successor_signs_nothing_before_the_overlap_is_over() {
    let prepare = start() + SignedDuration::from_secs(AUTHORITY_LIFETIME.as_secs() / 3 * 2) + days(1);
    let (prepared, steps) = Authorities::create("tokyo", start()).unwrap().advanced("tokyo", prepare).unwrap();
    assert_eq!(steps, [Step::Prepare]);
    let (same, steps) = prepared.clone().advanced("tokyo", prepare + OVERLAP - days(1)).unwrap();
    assert_eq!((steps, &same), (vec![], &prepared), "asked again, nothing happens");
    let (promoted, steps) = prepared.clone().advanced("tokyo", prepare + OVERLAP).unwrap();
    assert_eq!(steps, [Step::Promote]);
    assert_eq!(Some(promoted.signing), prepared.next);
}

#[test]
fn a_secret_reads_back_and_a_damaged_one_is_never_replaced_in_silence() {
    let prepare = start() + days(600);
    let (authorities, _) = Authorities::create("tokyo", start()).unwrap().advanced("tokyo", prepare).unwrap();
    let (authorities, _) = authorities.advanced("tokyo", prepare + OVERLAP).unwrap();
    let data = secret::store_authorities(&authorities);
    assert_eq!(secret::load_authorities(&data).unwrap(), authorities);
    for missing in [CERTIFICATE, KEY] {
        let mut damaged = data.clone();
        damaged.remove(missing);
        assert!(secret::load_authorities(&damaged).unwrap_err().to_string().contains("restore"), "{missing}");
    }
    let mut damaged = data.clone();
    damaged.insert(KEY.to_owned(), Authority::create("x", start()).unwrap().key_pem().to_owned());
    assert!(secret::load_authorities(&damaged).unwrap_err().to_string().contains("another certificate"));
}

#[test]
fn a_leafs_secret_is_left_alone_while_it_serves() {
    let authorities = Authorities::create("tokyo", start()).unwrap();
    let peer = Authorities::create("osaka", start()).unwrap().bundle().unwrap();
    let first = secret::leaf(None, &subject("tokyo"), &authorities, &peer, start()).unwrap();
    assert_eq!(first.renewed, Some(Why::Unreadable));
    assert_eq!(first.data.keys().map(String::as_str).collect::<BTreeSet<_>>(), BTreeSet::from([CA, CERTIFICATE, KEY]));
    let again = secret::leaf(Some(&first.data), &subject("tokyo"), &authorities, &peer, start() + days(1)).unwrap();
    assert_eq!((again.renewed, &again.data), (None, &first.data));
    // A key without its certificate is of no use.
    let mut torn = first.data.clone();
    torn.remove(KEY);
    let mended = secret::leaf(Some(&torn), &subject("tokyo"), &authorities, &peer, start()).unwrap();
    assert_eq!(mended.renewed, Some(Why::Unreadable));
    let moved = secret::leaf(Some(&first.data), &subject("kyoto"), &authorities, &peer, start()).unwrap();
    assert_eq!(moved.renewed, Some(Why::OtherSubject));
}

#[test]
fn a_peers_bundle_that_holds_anything_but_authorities_is_refused_as_a_whole() {
    let authority = Authority::create("osaka", start()).unwrap();
    let leaf = authority.issue(&subject("osaka"), start()).unwrap().certificate_pem;
    let good = authority.certificate_pem.clone();
    for bad in [String::new(), "rubbish".to_owned(), leaf.clone(), format!("{good}{leaf}"), good.repeat(9)] {
        let error = Bundle::parse("the peer's authorities", &bad).unwrap_err().to_string();
        assert!(error.starts_with("the peer's authorities: "), "{error}");
    }
    let bundle = Bundle::parse("the peer's authorities", &good.repeat(2)).unwrap();
    assert_eq!(bundle.joined_with(&bundle, start()), good, "no doubles");
    assert_eq!(bundle.joined_with(&bundle, start() + AUTHORITY_LIFETIME + days(1)), "", "none that has ended");
}
