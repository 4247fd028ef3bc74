//! TLS of the synchronization controllers (mutual, both by their own clusters' authorities) and of the aggregated API.

use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::ca::{Pair, SYNC_NAME};

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("PEM: {0}")]
    Pem(#[from] rustls::pki_types::pem::Error),
    #[error("the bundle: {0}")]
    Roots(#[from] rustls::server::VerifierBuilderError),
}

fn chain(pair: &Pair) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), Error> {
    let chain = CertificateDer::pem_slice_iter(pair.certificate.as_bytes()).collect::<Result<_, _>>()?;
    Ok((chain, PrivateKeyDer::from_pem_slice(pair.key.as_bytes())?))
}

fn roots(bundle: &str) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
        roots.add(certificate?)?;
    }
    Ok(roots)
}

/// A server that shows its certificate and asks for none.
pub fn acceptor(pair: &Pair) -> Result<TlsAcceptor, Error> {
    let (chain, key) = chain(pair)?;
    Ok(TlsAcceptor::from(Arc::new(ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key)?)))
}

/// A server for peers whose certificates the bundle knows.
pub fn mutual_acceptor(pair: &Pair, bundle: &str) -> Result<TlsAcceptor, Error> {
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots(bundle)?)).build()?;
    let (chain, key) = chain(pair)?;
    let config = ServerConfig::builder().with_client_cert_verifier(verifier).with_single_cert(chain, key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// A client of such a server.
pub fn mutual_connector(pair: &Pair, bundle: &str) -> Result<TlsConnector, Error> {
    let (chain, key) = chain(pair)?;
    let config = ClientConfig::builder().with_root_certificates(roots(bundle)?).with_client_auth_cert(chain, key)?;
    Ok(TlsConnector::from(Arc::new(config)))
}

/// What every synchronization controller is called.
pub fn sync_name() -> ServerName<'static> {
    ServerName::try_from(SYNC_NAME).expect("a plain host name")
}
