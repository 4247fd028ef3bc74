//! How authorities and leaves lie in Secrets. Keys and shapes only; reading and writing objects is the controllers'.
//!
//! | Secret | key | content |
//! | --- | --- | --- |
//! | [`names::AUTHORITY_SECRET`] | `tls.crt`, `tls.key` | the signing authority |
//! | | `next.crt`, `next.key` | its successor, while there is one |
//! | | `former.crt` | those before it that have not ended |
//! | [`names::certificate_secret`] | `ca.crt` | both sites' bundles, as the sidecar's `tls.ca` |
//! | | `tls.crt`, `tls.key` | the leaf, as its `tls.certificate` and `tls.key` |

use std::collections::BTreeMap;

use jiff::Timestamp;
use rustls::pki_types::{CertificateDer, pem::PemObject};
#[cfg(doc)]
use watari_crds::names;

use super::{
    PkiError,
    authority::{Authority, Issued, Subject},
    bundle::Bundle,
    renewal::{Renewal, Why, renewal},
    rotation::Authorities,
};

pub const CA: &str = "ca.crt";
pub const CERTIFICATE: &str = "tls.crt";
pub const KEY: &str = "tls.key";
const NEXT_CERTIFICATE: &str = "next.crt";
const NEXT_KEY: &str = "next.key";
const FORMER: &str = "former.crt";

/// A Secret's data, as text: all of ours is PEM.
pub type Data = BTreeMap<String, String>;

/// Authorities as they are stored.
pub fn store_authorities(authorities: &Authorities) -> Data {
    let mut data = Data::new();
    data.insert(CERTIFICATE.to_owned(), authorities.signing.certificate_pem.clone());
    data.insert(KEY.to_owned(), authorities.signing.key_pem().to_owned());
    if let Some(next) = &authorities.next {
        data.insert(NEXT_CERTIFICATE.to_owned(), next.certificate_pem.clone());
        data.insert(NEXT_KEY.to_owned(), next.key_pem().to_owned());
    }
    if !authorities.former.is_empty() {
        data.insert(FORMER.to_owned(), authorities.former.concat());
    }
    data
}

/// The reverse. An error is never answered by a new authority: that would end the trust of every peer.
pub fn load_authorities(data: &Data) -> Result<Authorities, PkiError> {
    let authority = |certificate: &str, key: &'static str| {
        let why = || format!("{certificate} is there and {key} is not; restore the Secret from a copy");
        let key = data.get(key).ok_or_else(|| PkiError::Malformed { what: "the authority's Secret", why: why() })?;
        Authority::from_pem(data[certificate].clone(), key.clone())
    };
    if !data.contains_key(CERTIFICATE) {
        let why =
            format!("it has no {CERTIFICATE}; restore it from a copy, or delete it to begin anew with every peer");
        return Err(PkiError::Malformed { what: "the authority's Secret", why });
    }
    let signing = authority(CERTIFICATE, KEY)?;
    let next = data.contains_key(NEXT_CERTIFICATE).then(|| authority(NEXT_CERTIFICATE, NEXT_KEY)).transpose()?;
    let former = match data.get(FORMER) {
        Some(text) => split(text)?,
        None => Vec::new(),
    };
    Ok(Authorities { signing, next, former })
}

fn split(text: &str) -> Result<Vec<String>, PkiError> {
    let malformed = |why: String| PkiError::Malformed { what: FORMER, why };
    CertificateDer::pem_slice_iter(text.as_bytes())
        .map(|der| Ok(super::to_pem(&der.map_err(|error| malformed(error.to_string()))?)))
        .collect()
}

/// The certificate Secret of a pair (or of the webhooks): what it must contain now, given what it contains.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leaf {
    pub data: Data,
    /// Why the leaf was issued anew; `None`: it is the one that was there.
    pub renewed: Option<Why>,
    /// When to look again.
    pub look_again: Timestamp,
}

/// Keeps the leaf in `found` while it serves, issues another when it is due, and brings `ca.crt` up to date.
pub fn leaf(
    found: Option<&Data>,
    subject: &Subject,
    authorities: &Authorities,
    peer: &Bundle,
    now: Timestamp,
) -> Result<Leaf, PkiError> {
    let certificate = found.and_then(|data| data.get(CERTIFICATE)).map(String::as_str);
    let key = found.and_then(|data| data.get(KEY));
    let kept = match (renewal(certificate, subject, now), certificate, key) {
        (Renewal::Wait { until }, Some(certificate), Some(key)) => {
            Ok((Issued { certificate_pem: certificate.to_owned(), key_pem: key.clone() }, until))
        }
        (Renewal::Due(why), ..) => Err(why),
        (Renewal::Wait { .. }, ..) => Err(Why::Unreadable),
    };
    let (issued, renewed, look_again) = match kept {
        Ok((issued, until)) => (issued, None, until),
        Err(why) => {
            let issued = authorities.signing.issue(subject, now)?;
            let look_again = match renewal(Some(&issued.certificate_pem), subject, now) {
                Renewal::Wait { until } => until,
                // An authority at its very end; the next look will find its successor.
                Renewal::Due(_) => now + super::authority::CLOCK_SKEW,
            };
            (issued, Some(why), look_again)
        }
    };
    let data = Data::from([
        (CA.to_owned(), authorities.bundle()?.joined_with(peer, now)),
        (CERTIFICATE.to_owned(), issued.certificate_pem),
        (KEY.to_owned(), issued.key_pem),
    ]);
    Ok(Leaf { data, renewed, look_again })
}
