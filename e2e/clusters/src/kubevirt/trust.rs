//! Every cluster learns the KubeVirt CA of every other one, so that their synchronisation controllers and handlers talk to each other.
//!
//! ```text
//! Secret kubevirt-ca (own, newest) ──▶ the others' ConfigMap kubevirt-external-ca ── virt-operator ──▶ their ConfigMap kubevirt-ca
//! ```
//! The inbox is emptied by virt-operator when it has taken what is in it (`virt-operator/resource/apply/core.go`). A CA that is known
//! there is not sent again. This is what Watari's operator does for its pairs as well; here it is for tests of KubeVirt alone.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::{Error, NAMESPACE, Site};

/// Name of the Secret of the own CA and of the ConfigMap of all that are trusted.
const CA: &str = "kubevirt-ca";
const INBOX: &str = "kubevirt-external-ca";
const BUNDLE: &str = "ca-bundle";
/// From the inbox to the bundle: 1 to 5 s were seen.
const TAKEN_PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_secs(1);
/// With `keep`. A rotated CA is away from its peers for no longer than that.
const PERIOD: Duration = Duration::from_secs(20);

/// A certificate as it stands in a PEM file, without line ends, so that two of them compare whoever wrapped the lines.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Certificate(String);

impl Certificate {
    const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
    const END: &str = "-----END CERTIFICATE-----";

    /// All certificates of a PEM text, in their order.
    fn all(pem: &str) -> Vec<Certificate> {
        let blocks = pem.split(Certificate::BEGIN).skip(1).filter_map(|rest| rest.split_once(Certificate::END));
        blocks.map(|(body, _)| Certificate(body.split_whitespace().collect())).collect()
    }

    fn pem(&self) -> String {
        format!("{}\n{}\n{}\n", Certificate::BEGIN, self.0, Certificate::END)
    }
}

/// Exchanges what is missing and returns when all have taken it; with `keep` it does so again and again, and never returns.
pub fn exchange(sites: &[Site], keep: bool) -> Result<(), Error> {
    loop {
        match (once(sites), keep) {
            (result, false) => return result,
            (Ok(()), true) => {}
            // A rotation under way, an API server that boots: the next round sees more.
            (Err(error), true) => eprintln!("{error}"),
        }
        std::thread::sleep(PERIOD);
    }
}

fn once(sites: &[Site]) -> Result<(), Error> {
    let mut own = Vec::new();
    for site in sites {
        own.push((site.cluster.name(), own_certificate(site)?));
    }
    let begin = Instant::now();
    for site in sites {
        let others = own.iter().filter(|(name, _)| *name != site.cluster.name());
        let wanted: BTreeSet<Certificate> = others.clone().filter_map(|(_, certificate)| certificate.clone()).collect();
        let missing: Vec<Certificate> = wanted.difference(&bundle(site)?).cloned().collect();
        if missing.is_empty() {
            continue;
        }
        site.kubectl.apply(&inbox(&missing).to_string())?;
        while !wanted.is_subset(&bundle(site)?) {
            if begin.elapsed() > TAKEN_PATIENCE {
                let missing: Vec<&str> = others.map(|(name, _)| name.as_str()).collect();
                let (cluster, seconds) = (site.cluster.name(), TAKEN_PATIENCE.as_secs());
                return Err(Error::Distrusted { cluster, missing: missing.join(", "), seconds });
            }
            std::thread::sleep(POLL);
        }
        eprintln!("cluster {}: trusts the others after {:.1} s", site.cluster.name(), begin.elapsed().as_secs_f64());
    }
    Ok(())
}

fn inbox(certificates: &[Certificate]) -> Value {
    let text: String = certificates.iter().map(Certificate::pem).collect();
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": INBOX, "namespace": NAMESPACE },
        "data": { BUNDLE: text },
    })
}

/// How many CAs a site trusts, its own among them.
pub fn certificates(site: &Site) -> Result<usize, Error> {
    Ok(bundle(site)?.len())
}

fn bundle(site: &Site) -> Result<BTreeSet<Certificate>, Error> {
    let map = site.kubectl.get(&["-n", NAMESPACE, "configmap", CA])?;
    let text = map.as_ref().and_then(|map| map["data"][BUNDLE].as_str()).unwrap_or_default();
    Ok(Certificate::all(text).into_iter().collect())
}

/// The CA with which a site signs now; nothing where KubeVirt is not (yet).
fn own_certificate(site: &Site) -> Result<Option<Certificate>, Error> {
    let secret = site.kubectl.get(&["-n", NAMESPACE, "secret", CA])?;
    let encoded = secret.as_ref().and_then(|secret| secret["data"]["tls.crt"].as_str()).unwrap_or_default();
    // The API server encodes what it keeps as bytes.
    let pem = String::from_utf8_lossy(&STANDARD.decode(encoded).unwrap_or_default()).into_owned();
    Ok(Certificate::all(&pem).into_iter().next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_compare_however_their_lines_are_wrapped_and_survive_the_inbox() {
        let wide = "text before\n-----BEGIN CERTIFICATE-----\nAAAABBBB\n-----END CERTIFICATE-----\n";
        let narrow = "-----BEGIN CERTIFICATE-----\nAAAA\nBBBB\n-----END CERTIFICATE-----";
        assert_eq!(Certificate::all(wide), Certificate::all(narrow));
        let two = format!("{wide}{}", narrow.replace("AAAA", "CCCC"));
        let certificates = Certificate::all(&two);
        assert_eq!(certificates.len(), 2);
        let map = inbox(&certificates);
        assert_eq!(Certificate::all(map["data"][BUNDLE].as_str().unwrap()), certificates);
    }

    #[test]
    fn what_is_no_certificate_is_none() {
        for text in
            ["", "-----BEGIN CERTIFICATE-----\nAAAA", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----"]
        {
            assert_eq!(Certificate::all(text), []);
        }
    }
}
