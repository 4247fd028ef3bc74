//! The pair check, on top of the ordinary checks of a certificate chain, for both ends of a connection.

use std::{fmt, sync::Arc};

use rustls::{
    AlertDescription, CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::identity::{Identity, PairId};

/// Why a certificate that may be valid otherwise is not our peer's.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotOurPeer {
    #[error("the certificate of {subject} cannot be read: {why}; issue a new one")]
    Unreadable { subject: String, why: String },
    #[error(
        "the certificate of {subject} names no pair: found {found}, expected exactly one URI name watari://pair/<uuid>/site/<name>; issue it with `watari-sidecar pki` or the operator"
    )]
    NoPair { subject: String, found: String },
    #[error(
        "the certificate is of another pair: found pair {found} (site {site}), expected pair {expected}; check the address, or issue a certificate for this pair"
    )]
    OtherPair { found: PairId, site: String, expected: PairId },
    #[error(
        "the certificate of {subject} was issued by a stranger: found issuer {issuer}, expected one of the authorities in {expected}; add the peer's authority to `tls.ca`, or issue the certificate anew"
    )]
    Stranger { subject: String, issuer: String, expected: String },
}

/// What a certificate says about its holder.
pub fn identity_of(certificate: &CertificateDer<'_>) -> Result<Identity, NotOurPeer> {
    let (_, parsed) = X509Certificate::from_der(certificate)
        .map_err(|error| NotOurPeer::Unreadable { subject: "unknown".to_owned(), why: error.to_string() })?;
    let subject = parsed.subject().to_string();
    let names = parsed
        .subject_alternative_name()
        .map_err(|error| NotOurPeer::Unreadable { subject: subject.clone(), why: error.to_string() })?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) if uri.starts_with("watari:") => Some(*uri),
            _ => None,
        })
        .collect();
    match uris.as_slice() {
        [uri] => uri.parse().map_err(|_| NotOurPeer::NoPair { subject, found: (*uri).to_owned() }),
        [] => Err(NotOurPeer::NoPair { subject, found: "no such name".to_owned() }),
        many => Err(NotOurPeer::NoPair { subject, found: many.join(", ") }),
    }
}

fn check_pair(certificate: &CertificateDer<'_>, expected: PairId) -> Result<(), Error> {
    let refuse = |why: NotOurPeer| Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(why))));
    let found = identity_of(certificate).map_err(refuse)?;
    if found.pair != expected {
        let site = found.site.to_string();
        return Err(refuse(NotOurPeer::OtherPair { found: found.pair, site, expected }));
    }
    Ok(())
}

/// Names the issuer where rustls only says that it is unknown.
fn name_the_stranger(error: Error, certificate: &CertificateDer<'_>, authorities: &str) -> Error {
    if !matches!(error, Error::InvalidCertificate(CertificateError::UnknownIssuer)) {
        return error;
    }
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return error };
    let why = NotOurPeer::Stranger {
        subject: parsed.subject().to_string(),
        issuer: parsed.issuer().to_string(),
        expected: authorities.to_owned(),
    };
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(why))))
}

/// Checks the certificate of whoever dials in.
pub struct DialerVerifier {
    pub chain: Arc<dyn ClientCertVerifier>,
    pub pair: PairId,
    /// For messages: the file and the subjects in it.
    pub authorities: String,
}

/// Checks the certificate of whoever we dial.
pub struct ListenerVerifier {
    pub chain: Arc<dyn ServerCertVerifier>,
    pub pair: PairId,
    pub authorities: String,
}

impl fmt::Debug for DialerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DialerVerifier({})", self.pair)
    }
}

impl fmt::Debug for ListenerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ListenerVerifier({})", self.pair)
    }
}

impl ClientCertVerifier for DialerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .chain
            .verify_client_cert(end_entity, intermediates, now)
            .map_err(|error| name_the_stranger(error, end_entity, &self.authorities))?;
        check_pair(end_entity, self.pair)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

impl ServerCertVerifier for ListenerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        // A wrong pair explains a wrong name better than the name does.
        if let Err(Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        )) = &verified
        {
            check_pair(end_entity, self.pair)?;
        }
        let verified = verified.map_err(|error| name_the_stranger(error, end_entity, &self.authorities))?;
        check_pair(end_entity, self.pair)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// A refusal by either end, for a person.
pub fn words(error: &Error) -> String {
    let date = |seconds: u64| {
        i64::try_from(seconds)
            .ok()
            .and_then(|seconds| jiff::Timestamp::from_second(seconds).ok())
            .map_or_else(|| format!("{seconds} s after 1970"), |time| time.to_string())
    };
    match error {
        Error::InvalidCertificate(CertificateError::Other(other)) => other.0.to_string(),
        Error::InvalidCertificate(CertificateError::ExpiredContext { time, not_after }) => format!(
            "the peer's certificate is expired: found an end at {}, expected one after now ({}); renew it, or correct the clock",
            date(not_after.as_secs()),
            date(time.as_secs())
        ),
        Error::InvalidCertificate(CertificateError::NotValidYetContext { time, not_before }) => format!(
            "the peer's certificate is not valid yet: found a beginning at {}, expected one before now ({}); correct the clock",
            date(not_before.as_secs()),
            date(time.as_secs())
        ),
        Error::InvalidCertificate(CertificateError::NotValidForNameContext { expected, presented }) => format!(
            "the peer's certificate is for another name: found {}, expected {:?}; correct `peer.server_name`, or issue the certificate anew",
            presented.join(", "),
            expected.to_str()
        ),
        Error::NoCertificatesPresented => {
            "the peer shows no certificate: found none, expected one of this pair; is it a Watari sidecar?".to_owned()
        }
        Error::AlertReceived(alert) => alert_words(*alert),
        Error::InvalidMessage(_) => {
            format!("the other end does not speak TLS ({error}): expected a Watari sidecar; check the address and port")
        }
        other => format!("TLS failed: {other}"),
    }
}

/// The words for an alert of the other end that survives only as text, as rustls writes it.
pub fn alert_in(text: &str) -> Option<String> {
    const REFUSALS: [AlertDescription; 8] = [
        AlertDescription::BadCertificate,
        AlertDescription::UnsupportedCertificate,
        AlertDescription::CertificateExpired,
        AlertDescription::CertificateUnknown,
        AlertDescription::UnknownCA,
        AlertDescription::CertificateRequired,
        AlertDescription::UnrecognisedName,
        AlertDescription::InternalError,
    ];
    let found = REFUSALS.into_iter().find(|alert| Error::AlertReceived(*alert).to_string() == text);
    found.map(alert_words)
}

fn alert_words(alert: AlertDescription) -> String {
    let why = match alert {
        AlertDescription::CertificateExpired => {
            "as expired or not yet valid; renew `tls.certificate`, or correct the clocks"
        }
        AlertDescription::UnknownCA | AlertDescription::CertificateUnknown => {
            "as a stranger's or of another pair; the peer's log names what it found and what it expected"
        }
        AlertDescription::CertificateRequired => "because there was none; check `tls.certificate`",
        AlertDescription::UnrecognisedName => {
            return "the gateway knows no such pair (unrecognised_name): check `peer.server_name`".to_owned();
        }
        AlertDescription::InternalError => {
            return "nobody answers behind the gateway now (internal_error): the peer's Pod may be starting".to_owned();
        }
        _ => return format!("the peer ended the TLS handshake with alert {alert:?}; its log says why"),
    };
    format!("the peer refused our certificate (alert {alert:?}) {why}")
}
