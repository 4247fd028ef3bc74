//! Whether a leaf certificate is to be replaced now: a function of the certificate, what it should say, and the time.

use jiff::{SignedDuration, Timestamp};
use x509_parser::extensions::GeneralName;

use super::{
    PkiError, Validity,
    authority::{CLOCK_SKEW, Subject},
    first_certificate, parse, validity_of,
};

/// What to do about a leaf.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Renewal {
    /// Nothing before then.
    Wait { until: Timestamp },
    /// Issue a new one now.
    Due(Why),
}

/// Why a leaf is to be replaced.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Why {
    /// There is none, or it cannot be read.
    Unreadable,
    /// It is not for this subject: the site was renamed, a Secret was copied.
    OtherSubject,
    /// Half of its life is over.
    HalfSpent,
    Expired,
    /// It begins in the future: it was made under a wrong clock.
    NotYet,
}

/// Judges the first certificate in `pem` (`tls.crt`).
pub fn renewal(pem: Option<&str>, subject: &Subject, now: Timestamp) -> Renewal {
    let Some(Ok((validity, said))) = pem.map(read) else { return Renewal::Due(Why::Unreadable) };
    if said.dns_names != subject.dns_names() || said.uris != Vec::from_iter(subject.uri()) {
        return Renewal::Due(Why::OtherSubject);
    }
    let due = half_spent(validity);
    if now < validity.from {
        Renewal::Due(Why::NotYet)
    } else if now > validity.until {
        Renewal::Due(Why::Expired)
    } else if now >= due {
        Renewal::Due(Why::HalfSpent)
    } else {
        Renewal::Wait { until: due }
    }
}

fn half_spent(validity: Validity) -> Timestamp {
    let made = validity.from + CLOCK_SKEW;
    let life = validity.until.duration_since(made);
    made + SignedDuration::from_secs(life.as_secs().max(0) / 2)
}

struct Said {
    dns_names: Vec<String>,
    uris: Vec<String>,
}

fn read(pem: &str) -> Result<(Validity, Said), PkiError> {
    const WHAT: &str = "the certificate";
    let der = first_certificate(WHAT, pem)?;
    let parsed = parse(WHAT, &der)?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|error| PkiError::Malformed { what: WHAT, why: error.to_string() })?;
    let mut said = Said { dns_names: Vec::new(), uris: Vec::new() };
    for name in names.iter().flat_map(|extension| &extension.value.general_names) {
        match name {
            GeneralName::DNSName(name) => said.dns_names.push((*name).to_owned()),
            GeneralName::URI(uri) => said.uris.push((*uri).to_owned()),
            // Of no meaning to a sidecar.
            _ => {}
        }
    }
    Ok((validity_of(WHAT, &parsed)?, said))
}
