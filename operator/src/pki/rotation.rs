//! The rotation of an authority, with overlap.
//!
//! ```text
//!            last third begins            OVERLAP later               the former ends
//!   signing A ──────┬───────────────────────┬──────────────────────────────┬────────▶ time
//!   bundle  A       │ A, B (B does not sign) │ A, B (B signs, A is former)   │ B
//!                Prepare                  Promote                        Forget
//! ```
//! The peer has to learn of B before B signs anything: [`OVERLAP`] is far longer than it takes, even with a site down for
//! weeks. All of it is read off the certificates, so an operator that was away for any time finds its place; a step is taken once
//! however often it is asked for.

use jiff::{SignedDuration, Timestamp};

use super::{
    PkiError,
    authority::{AUTHORITY_LIFETIME, Authority, CLOCK_SKEW, LEAF_LIFETIME},
    bundle::Bundle,
    validity,
};

/// From publishing a new authority to signing with it.
pub const OVERLAP: SignedDuration = SignedDuration::from_hours(24 * 30);

/// All authorities of this cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Authorities {
    /// Issues leaves.
    pub signing: Authority,
    /// Published, and signs later.
    pub next: Option<Authority>,
    /// Certificates (PEM) of those that signed before and have not ended.
    pub former: Vec<String>,
}

/// A step of a rotation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Make a successor and publish it.
    Prepare,
    /// The successor signs from now on.
    Promote,
    /// A former authority has ended.
    Forget,
    /// The signing one has ended before anybody could rotate it: begin anew. Peers have to learn of the new one first.
    Restart,
    /// Nothing to do before then.
    Wait { until: Timestamp },
}

/// What is to be done now, one step at a time.
pub fn next_step(authorities: &Authorities, now: Timestamp) -> Result<Step, PkiError> {
    let signing = authorities.signing.validity()?;
    for former in &authorities.former {
        if validity("a former authority", former)?.until < now {
            return Ok(Step::Forget);
        }
    }
    let prepare_at = signing.until - SignedDuration::from_secs(AUTHORITY_LIFETIME.as_secs() / 3);
    match &authorities.next {
        None if now > signing.until => Ok(Step::Restart),
        None if now >= prepare_at => Ok(Step::Prepare),
        None => Ok(Step::Wait { until: prepare_at }),
        Some(next) => {
            let published = next.validity()?.from + CLOCK_SKEW;
            // A signing authority that is about to end issues leaves that are too short to be of use.
            let promote_at = (published + OVERLAP).min(signing.until - LEAF_LIFETIME);
            if now >= promote_at { Ok(Step::Promote) } else { Ok(Step::Wait { until: promote_at }) }
        }
    }
}

impl Authorities {
    /// The first authority of a cluster.
    pub fn create(site: &str, now: Timestamp) -> Result<Authorities, PkiError> {
        Ok(Authorities { signing: Authority::create(site, now)?, next: None, former: Vec::new() })
    }

    /// Takes all steps that are due, and says which. The caller stores the result before it is used.
    pub fn advanced(mut self, site: &str, now: Timestamp) -> Result<(Authorities, Vec<Step>), PkiError> {
        let mut taken = Vec::new();
        loop {
            let step = next_step(&self, now)?;
            match step {
                Step::Prepare => self.next = Some(Authority::create(site, now)?),
                Step::Promote => {
                    let next = self.next.take().ok_or_else(|| PkiError::Malformed {
                        what: "the rotation",
                        why: "there is no successor to promote".to_owned(),
                    })?;
                    let former = std::mem::replace(&mut self.signing, next);
                    self.former.push(former.certificate_pem);
                }
                Step::Forget => {
                    let mut kept = Vec::new();
                    for former in std::mem::take(&mut self.former) {
                        if validity("a former authority", &former)?.until >= now {
                            kept.push(former);
                        }
                    }
                    self.former = kept;
                }
                Step::Restart => self.signing = Authority::create(site, now)?,
                Step::Wait { .. } => return Ok((self, taken)),
            }
            taken.push(step);
        }
    }

    /// What peers and our own sidecars shall trust, as PEM.
    pub fn bundle_pem(&self) -> String {
        let next = self.next.iter().map(|next| next.certificate_pem.as_str());
        let signing = std::iter::once(self.signing.certificate_pem.as_str());
        signing.chain(next).chain(self.former.iter().map(String::as_str)).collect()
    }

    pub fn bundle(&self) -> Result<Bundle, PkiError> {
        Bundle::parse("our own authorities", &self.bundle_pem())
    }
}
