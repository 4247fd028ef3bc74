//! An authority, and what it issues.

use std::{fmt, time::Duration};

use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData, SanType, date_time_ymd, string::Ia5String,
};
use watari_crds::names;

use super::{PkiError, Validity, validity};

/// How long an authority lives: two years, of which the last third is for its successor.
pub const AUTHORITY_LIFETIME: SignedDuration = SignedDuration::from_hours(24 * 730);
/// How long a leaf lives. Renewed at half of it, so an operator may be away for three days.
pub const LEAF_LIFETIME: SignedDuration = SignedDuration::from_hours(24 * 7);
/// Certificates begin this long before they are made, because clocks differ.
pub const CLOCK_SKEW: SignedDuration = SignedDuration::from_hours(1);

/// Signs for one cluster. Its `Debug` shows no key.
#[derive(Clone, PartialEq, Eq)]
pub struct Authority {
    pub certificate_pem: String,
    key_pem: String,
}

/// A leaf certificate with its key. Its `Debug` shows no key.
#[derive(Clone, PartialEq, Eq)]
pub struct Issued {
    pub certificate_pem: String,
    pub key_pem: String,
}

/// Who a leaf is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Subject {
    /// Whoever speaks for a pair at a site, at either end of a connection: its sidecars, and the operator that steers
    /// them. The URI in it binds the certificate to that pair and site alone (PROTOCOL.md).
    Pair { pair_id: String, site: String },
    /// The webhook server, called by the API server under these DNS names.
    Webhooks { dns_names: Vec<String> },
}

impl Subject {
    /// DNS names in the certificate.
    pub fn dns_names(&self) -> Vec<String> {
        match self {
            Subject::Pair { pair_id, .. } => vec![names::server_name(pair_id)],
            Subject::Webhooks { dns_names } => dns_names.clone(),
        }
    }

    /// The URI in the certificate.
    pub fn uri(&self) -> Option<String> {
        match self {
            Subject::Pair { pair_id, site } => Some(names::identity_uri(pair_id, site)),
            Subject::Webhooks { .. } => None,
        }
    }

    fn common_name(&self) -> String {
        match self {
            // The pair's id does not fit: a common name has at most 64 characters (RFC 5280, appendix A).
            Subject::Pair { site, .. } => format!("watari site {site}").chars().take(64).collect(),
            Subject::Webhooks { .. } => "watari webhooks".to_owned(),
        }
    }

    fn usages(&self) -> Vec<ExtendedKeyUsagePurpose> {
        match self {
            Subject::Pair { .. } => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            Subject::Webhooks { .. } => vec![ExtendedKeyUsagePurpose::ServerAuth],
        }
    }
}

impl Authority {
    /// A new authority of the cluster `site`.
    pub fn create(site: &str, now: Timestamp) -> Result<Authority, PkiError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        // Two authorities of one site differ in name, so that a chain is never tried against the wrong one.
        params
            .distinguished_name
            .push(DnType::CommonName, format!("watari {site} {}", now.strftime("%Y-%m-%dT%H:%M:%SZ")));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        apply(&mut params, Validity { from: now - CLOCK_SKEW, until: now + AUTHORITY_LIFETIME });
        let certificate = params.self_signed(&key)?;
        Ok(Authority { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// From a Secret. The key must be readable; that it belongs to the certificate is checked by issuing with both.
    pub fn from_pem(certificate_pem: String, key_pem: String) -> Result<Authority, PkiError> {
        let authority = Authority { certificate_pem, key_pem };
        validity("the authority", &authority.certificate_pem)?;
        let key = authority.key()?;
        let der = super::first_certificate("the authority", &authority.certificate_pem)?;
        let parsed = super::parse("the authority", &der)?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            let why = "its key belongs to another certificate".to_owned();
            return Err(PkiError::Malformed { what: "the authority", why });
        }
        Ok(authority)
    }

    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    pub fn validity(&self) -> Result<Validity, PkiError> {
        validity("the authority", &self.certificate_pem)
    }

    /// A leaf with a fresh key, for [`LEAF_LIFETIME`] or until this authority ends.
    pub fn issue(&self, subject: &Subject, now: Timestamp) -> Result<Issued, PkiError> {
        let own = self.validity()?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(subject.dns_names())?;
        if let Some(uri) = subject.uri() {
            params.subject_alt_names.push(SanType::URI(Ia5String::try_from(uri)?));
        }
        params.distinguished_name.push(DnType::CommonName, subject.common_name());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = subject.usages();
        params.use_authority_key_identifier_extension = true;
        let until = (now + LEAF_LIFETIME).min(own.until);
        apply(&mut params, Validity { from: (now - CLOCK_SKEW).max(own.from), until });
        let issuer = Issuer::from_ca_cert_pem(&self.certificate_pem, self.key()?)?;
        let certificate = params.signed_by(&key, &issuer)?;
        Ok(Issued { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    fn key(&self) -> Result<KeyPair, PkiError> {
        Ok(KeyPair::from_pem(&self.key_pem)?)
    }
}

fn apply(params: &mut CertificateParams, validity: Validity) {
    let at = |time: Timestamp| {
        date_time_ymd(1970, 1, 1) + Duration::from_secs(u64::try_from(time.as_second()).unwrap_or_default())
    };
    params.not_before = at(validity.from);
    params.not_after = at(validity.until);
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("certificate_pem", &self.certificate_pem).finish_non_exhaustive()
    }
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").field("certificate_pem", &self.certificate_pem).finish_non_exhaustive()
    }
}
