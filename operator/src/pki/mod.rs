//! Certificates: an authority per cluster, leaf certificates per pair and site, renewal and rotation.
//!
//! Each cluster has an authority of its own, whose key never leaves it. Operators exchange authorities' *certificates* (site
//! card), and every sidecar gets both in its `ca.crt`; its own certificate names its pair and site ([`authority::Subject`]), and
//! sidecars let in only their own pair. Sidecars read their files again whenever they change, so renewal and
//! rotation disturb no live connection.
//!
//! Everything here is a function of certificates and a `now` that is passed in; no clock, no client, no state beside
//! the certificates themselves. Only making keys needs the system's randomness.
//!
//! What must hold: at every moment, and with the other cluster a propagation time behind, each side's certificate
//! verifies against the other's bundle. Hence a new authority is published long before it signs ([`rotation`]), and a former one
//! is trusted until it ends.
//!
//! What it does not do: revoke. A certificate lives for a week; whoever lost a key before then deletes the pair.

pub mod authority;
pub mod bundle;
pub mod renewal;
pub mod rotation;
pub mod secret;
#[cfg(test)]
mod time_travel;

use jiff::Timestamp;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use x509_parser::prelude::{FromDer, X509Certificate};

/// What went wrong with a certificate or key.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// What was found is not what belongs there. Permanent until somebody changes it.
    #[error("{what}: {why}")]
    Malformed { what: &'static str, why: String },
    /// A certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// From when until when a certificate holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Validity {
    pub from: Timestamp,
    pub until: Timestamp,
}

impl Validity {
    pub fn holds_at(&self, now: Timestamp) -> bool {
        (self.from..=self.until).contains(&now)
    }
}

/// The first certificate of a PEM text.
fn first_certificate(what: &'static str, pem: &str) -> Result<CertificateDer<'static>, PkiError> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| PkiError::Malformed { what, why: format!("no PEM certificate ({error})") })
}

fn parse<'a>(what: &'static str, der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, PkiError> {
    let (_, parsed) = X509Certificate::from_der(der)
        .map_err(|error| PkiError::Malformed { what, why: format!("no X.509 certificate ({error})") })?;
    Ok(parsed)
}

fn validity_of(what: &'static str, certificate: &X509Certificate<'_>) -> Result<Validity, PkiError> {
    let time = |seconds: i64| {
        Timestamp::from_second(seconds)
            .map_err(|error| PkiError::Malformed { what, why: format!("its validity cannot be read ({error})") })
    };
    let validity = certificate.validity();
    Ok(Validity { from: time(validity.not_before.timestamp())?, until: time(validity.not_after.timestamp())? })
}

/// The validity of the first certificate in `pem`; `what` names it in errors.
pub fn validity(what: &'static str, pem: &str) -> Result<Validity, PkiError> {
    let der = first_certificate(what, pem)?;
    validity_of(what, &parse(what, &der)?)
}

/// The same bytes always become the same text.
fn to_pem(der: &CertificateDer<'_>) -> String {
    let lines = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE", der.to_vec()), lines)
}
