//! KubeVirt's own authority and the bundle it trusts (`pkg/virt-operator/resource/apply/core.go`, `components/secrets.go`).
//!
//! - Secret `kubevirt-ca` holds the authority, ConfigMap `kubevirt-ca` the bundle. ConfigMap `kubevirt-external-ca` is an inbox: what a
//!   peer's administrator puts there is added to the bundle, and the inbox is emptied.
//! - **A peer is dropped**: each reconcile keeps foreign certificates only while the local authority is younger than `renewBefore`
//!   (`MergeCABundle`; kubevirt.md, appendix 3, 18).
//! - A change of `certificateRotateStrategy` makes a new authority at once.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};

use crate::objects::MANAGER;

/// Where KubeVirt lives.
pub const NAMESPACE: &str = "kubevirt";
pub const CA_NAME: &str = "kubevirt-ca";
pub const INBOX_NAME: &str = "kubevirt-external-ca";
pub const BUNDLE_KEY: &str = "ca-bundle";
/// The strategy that an authority was made under.
const STRATEGY_ANNOTATION: &str = "standin.watari.internal/certificate-strategy";
/// The bundle never grows beyond this (`core.go`).
const CERTIFICATES_MAX: usize = 50;
/// Defaults of `selfSigned.ca`.
const DURATION: Duration = Duration::from_secs(168 * 3600);
const RENEW_BEFORE: Duration = Duration::from_secs(168 * 3600 / 5);
/// In every certificate of a synchronization controller; the peer asks for it (KubeVirt checks the common name instead).
pub const SYNC_NAME: &str = "virt-synchronization-controller";

/// The authority cannot be made, read or stored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error("certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("{0} is damaged: delete it")]
    Damaged(&'static str),
}

/// `certificateRotateStrategy.selfSigned.ca` of the KubeVirt object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strategy {
    pub duration: Duration,
    pub renew_before: Duration,
}

impl Strategy {
    pub fn of(kubevirt: &Value) -> Strategy {
        let ca = &kubevirt["spec"]["certificateRotateStrategy"]["selfSigned"]["ca"];
        let read = |value: &Value, otherwise| value.as_str().and_then(go_duration).unwrap_or(otherwise);
        Strategy { duration: read(&ca["duration"], DURATION), renew_before: read(&ca["renewBefore"], RENEW_BEFORE) }
    }
}

/// As Go writes durations: `168h0m0s`.
pub fn go_duration(text: &str) -> Option<Duration> {
    text.parse::<jiff::SignedDuration>().ok()?.try_into().ok()
}

/// A certificate and its key, PEM.
#[derive(Clone)]
pub struct Pair {
    pub certificate: String,
    pub key: String,
}

/// The local authority.
pub struct Authority(Pair);

impl Authority {
    fn create(duration: Duration) -> Result<Authority, Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        let now = std::time::SystemTime::now();
        params.distinguished_name.push(DnType::CommonName, format!("kubevirt.io@{}", seconds_since_epoch()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        (params.not_before, params.not_after) = (now.into(), (now + duration).into());
        let certificate = params.self_signed(&key)?.pem();
        Ok(Authority(Pair { certificate, key: key.serialize_pem() }))
    }

    pub fn certificate(&self) -> &str {
        &self.0.certificate
    }

    /// A certificate for these names, for a client and a server alike.
    pub fn issue(&self, common_name: &str, names: &[String]) -> Result<Pair, Error> {
        let issuer = Issuer::from_ca_cert_pem(&self.0.certificate, KeyPair::from_pem(&self.0.key)?)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names.to_vec())?;
        params.distinguished_name.push(DnType::CommonName, common_name);
        Ok(Pair { certificate: params.signed_by(&key, &issuer)?.pem(), key: key.serialize_pem() })
    }
}

fn seconds_since_epoch() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// Seconds since it became valid; `None` if it is no certificate.
fn age(pem: &str) -> Option<i64> {
    let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).ok()?;
    let certificate = block.parse_x509().ok()?;
    Some(seconds_since_epoch() - certificate.validity().not_before.timestamp())
}

/// Every PEM block of a text, each by itself.
fn certificates(text: &str) -> Vec<String> {
    const END: &str = "-----END CERTIFICATE-----";
    let blocks =
        text.split_inclusive(END).filter_map(|block| block.find("-----BEGIN").map(|at| block[at..].to_owned()));
    blocks.filter(|block| block.ends_with(END)).map(|block| block + "\n").collect()
}

/// What the bundle holds after a reconcile.
fn merged(local: &str, local_age: i64, strategy: Strategy, bundle: &str, inbox: &str) -> String {
    let local = certificates(local);
    let young = local_age < strategy.renew_before.as_secs() as i64;
    let mut kept = local;
    let mut add = |certificates: Vec<String>| {
        for certificate in certificates {
            if !kept.contains(&certificate) && age(&certificate).is_some() && kept.len() < CERTIFICATES_MAX {
                kept.push(certificate);
            }
        }
    };
    if young {
        add(certificates(bundle));
    }
    // Added after the merge: they live until the next one.
    add(certificates(inbox));
    kept.concat()
}

/// The authority as it is stored, or a new one.
async fn stored(client: &Client, strategy: Strategy) -> Result<Authority, Error> {
    let api: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    let written = format!("{strategy:?}");
    if let Some(secret) = api.get_opt(CA_NAME).await? {
        let made_for = secret.metadata.annotations.as_ref().and_then(|all| all.get(STRATEGY_ANNOTATION)).cloned();
        let data = secret.data.unwrap_or_default();
        let read = |key: &str| data.get(key).and_then(|bytes| String::from_utf8(bytes.0.clone()).ok());
        let (certificate, key) = (read("tls.crt"), read("tls.key"));
        let pair = certificate.zip(key).ok_or(Error::Damaged("Secret kubevirt/kubevirt-ca"))?;
        let end = (strategy.duration - strategy.renew_before.min(strategy.duration)).as_secs() as i64;
        let due = age(&pair.0).is_none_or(|age| age >= end);
        if made_for == Some(written.clone()) && !due {
            return Ok(Authority(Pair { certificate: pair.0, key: pair.1 }));
        }
    }
    let authority = Authority::create(strategy.duration)?;
    let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
    let secret = Secret {
        metadata: serde_json::from_value(json!({ "name": CA_NAME, "annotations": { STRATEGY_ANNOTATION: written } }))
            .expect("plain metadata"),
        data: Some(BTreeMap::from([
            ("tls.crt".into(), bytes(&authority.0.certificate)),
            ("tls.key".into(), bytes(&authority.0.key)),
        ])),
        ..Secret::default()
    };
    api.patch(CA_NAME, &PatchParams::apply(MANAGER).force(), &Patch::Apply(secret)).await?;
    Ok(authority)
}

/// One reconcile: the authority, the bundle written, the inbox emptied.
pub async fn reconcile(client: &Client, kubevirt: &Value) -> Result<(Authority, String), Error> {
    let strategy = Strategy::of(kubevirt);
    let authority = stored(client, strategy).await?;
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), NAMESPACE);
    let read = async |name: &str| -> Result<Option<String>, Error> {
        let data = api.get_opt(name).await?.and_then(|map| map.data);
        Ok(data.and_then(|data| data.get(BUNDLE_KEY).cloned()))
    };
    let (bundle, inbox) = (read(CA_NAME).await?, read(INBOX_NAME).await?);
    let age = age(authority.certificate()).ok_or(Error::Damaged("Secret kubevirt/kubevirt-ca"))?;
    let (old, new_inbox) = (bundle.clone().unwrap_or_default(), inbox.clone().unwrap_or_default());
    let merged = merged(authority.certificate(), age, strategy, &old, &new_inbox);
    // Merged, not applied: whoever fills the inbox is not in a conflict with us over it.
    let write = async |name: &str, text: &str| {
        let map = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name }, "data": { BUNDLE_KEY: text } });
        api.patch(name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(map)).await
    };
    if bundle.as_ref() != Some(&merged) {
        write(CA_NAME, &merged).await?;
    }
    if inbox.as_deref() != Some("") {
        write(INBOX_NAME, "").await?;
    }
    Ok((authority, merged))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRATEGY: Strategy = Strategy { duration: DURATION, renew_before: RENEW_BEFORE };

    #[test]
    fn a_young_authority_keeps_the_peers_certificate_and_an_old_one_drops_it() {
        let [local, peer] = [(); 2].map(|()| Authority::create(DURATION).unwrap().0.certificate);
        let bundle = format!("{local}{peer}");
        assert_eq!(merged(&local, 3600, STRATEGY, &bundle, ""), bundle);
        assert_eq!(merged(&local, 40 * 3600, STRATEGY, &bundle, ""), local);
        // What is put into the inbox of an old one lives until the next reconcile.
        assert_eq!(merged(&local, 40 * 3600, STRATEGY, &local, &peer), bundle);
    }

    #[test]
    fn rubbish_in_the_inbox_and_repeats_are_not_taken_up() {
        let local = Authority::create(DURATION).unwrap().0.certificate;
        let rubbish = "-----BEGIN CERTIFICATE-----\nbm90aGluZw==\n-----END CERTIFICATE-----\n";
        assert_eq!(merged(&local, 0, STRATEGY, &local, &format!("{rubbish}{local}")), local);
    }

    #[test]
    fn the_strategy_is_read_in_gos_words() {
        let ca = json!({ "duration": "10m0s", "renewBefore": "6m" });
        let kubevirt = json!({ "spec": { "certificateRotateStrategy": { "selfSigned": { "ca": ca } } } });
        let read = Strategy::of(&kubevirt);
        assert_eq!((read.duration.as_secs(), read.renew_before.as_secs()), (600, 360));
        assert_eq!(Strategy::of(&Value::Null), STRATEGY);
    }
}
