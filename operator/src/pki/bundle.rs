//! The trust bundle: which authorities' certificates a sidecar is given.
//!
//! What comes from a peer is somebody else's text: it is parsed, bounded, and refused as a whole when something in it is no
//! authority, because a bundle that silently lost a member would be noticed only at the next rotation.

use jiff::Timestamp;
use rustls::pki_types::{CertificateDer, pem::PemObject};

use super::{PkiError, Validity, parse, validity_of};

/// Most authorities of one site at once: the signing one, its successor, and a few formers.
pub const AUTHORITIES_MAX: usize = 8;
/// Largest bundle of one site in bytes; ours have about 700 each.
pub const BUNDLE_BYTES_MAX: usize = 64 << 10;

/// One authority's certificate.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    der: CertificateDer<'static>,
    pub subject: String,
    pub validity: Validity,
}

/// Authorities of one site, checked.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Bundle(Vec<Member>);

impl Bundle {
    /// Reads a PEM text. `what` names its owner in errors ("the peer's authorities").
    pub fn parse(what: &'static str, pem: &str) -> Result<Bundle, PkiError> {
        let refuse = |why: String| PkiError::Malformed { what, why };
        if pem.len() > BUNDLE_BYTES_MAX {
            return Err(refuse(format!("found {} bytes, expected at most {BUNDLE_BYTES_MAX}", pem.len())));
        }
        let mut members = Vec::new();
        for der in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            let der = der.map_err(|error| refuse(format!("no PEM certificates ({error})")))?;
            members.push(member(what, der)?);
        }
        if members.is_empty() || members.len() > AUTHORITIES_MAX {
            return Err(refuse(format!("found {} authorities, expected 1 to {AUTHORITIES_MAX}", members.len())));
        }
        Ok(Bundle(members))
    }

    pub fn members(&self) -> &[Member] {
        &self.0
    }

    /// This site's and the peer's as one PEM text: without those that have ended, without doubles, always in the same order, so that an
    /// unchanged trust is an unchanged Secret.
    pub fn joined_with(&self, peer: &Bundle, now: Timestamp) -> String {
        let mut members: Vec<&Member> = self.0.iter().chain(&peer.0).filter(|one| one.validity.until >= now).collect();
        members.sort_by(|a, b| (a.validity.from, &a.der[..]).cmp(&(b.validity.from, &b.der[..])));
        members.dedup_by(|a, b| a.der == b.der);
        members.iter().map(|member| member.to_pem()).collect()
    }
}

impl Member {
    fn to_pem(&self) -> String {
        super::to_pem(&self.der)
    }
}

fn member(what: &'static str, der: CertificateDer<'static>) -> Result<Member, PkiError> {
    let (subject, validity) = {
        let parsed = parse(what, &der)?;
        let subject = parsed.subject().to_string();
        let signs = parsed.key_usage().ok().flatten().is_none_or(|usage| usage.value.key_cert_sign());
        if !parsed.is_ca() || !signs {
            let why = format!("the certificate of {subject} is no authority's");
            return Err(PkiError::Malformed { what, why });
        }
        (subject, validity_of(what, &parsed)?)
    };
    Ok(Member { der, subject, validity })
}
