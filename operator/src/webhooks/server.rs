//! HTTPS for the API server: the three paths of [`Hook`], and `/healthz`.
//!
//! The certificate can be replaced while connections live. Handshakes run beside each other and are bounded in number and
//! time, so that a silent stranger holds up no admission; a connection holds a body of bounded size. Whoever reaches this port
//! learns how an object would be wired, and nothing else: nothing is looked up or changed for a request.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, RwLock},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State},
    routing::{get, post},
};
use kube::core::{DynamicObject, admission::AdmissionReview};
use rustls::{
    ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::review::{Hook, Knowledge, answer};
use crate::pki::authority::Issued;

/// Largest review in bytes. An object has at most 1.5 MiB (etcd), and a review holds it twice.
const BODY_BYTES_MAX: usize = 8 << 20;
/// Handshakes at once; an API server keeps its connections.
const HANDSHAKES_MAX: usize = 64;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Accepted connections that are not served yet.
const ACCEPTED_MAX: usize = 16;
/// Pause after the system refused to accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a certificate cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("the webhooks' certificate cannot be used: {0}")]
pub struct CertificateError(String);

/// The certificate in force, replaceable.
#[derive(Debug)]
pub struct ServingCertificate {
    provider: Arc<CryptoProvider>,
    current: RwLock<Arc<CertifiedKey>>,
}

impl ServingCertificate {
    pub fn new(issued: &Issued) -> Result<Arc<ServingCertificate>, CertificateError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let current = RwLock::new(certified(&provider, issued)?);
        Ok(Arc::new(ServingCertificate { provider, current }))
    }

    /// From the next handshake on. An error changes nothing.
    pub fn replace(&self, issued: &Issued) -> Result<(), CertificateError> {
        let fresh = certified(&self.provider, issued)?;
        *self.current.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = fresh;
        Ok(())
    }
}

impl ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(|poisoned| poisoned.into_inner())))
    }
}

fn certified(provider: &CryptoProvider, issued: &Issued) -> Result<Arc<CertifiedKey>, CertificateError> {
    let refuse = |error: &dyn std::fmt::Display| CertificateError(error.to_string());
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(issued.certificate_pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| refuse(&error))?;
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).map_err(|error| refuse(&error))?;
    CertifiedKey::from_der(chain, key, provider).map(Arc::new).map_err(|error| refuse(&error))
}

/// Serves on `socket` until `stop` resolves; requests under way are answered.
pub async fn serve(
    socket: TcpListener,
    certificate: Arc<ServingCertificate>,
    knowledge: Knowledge,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let mut routes = Router::new().route("/healthz", get(async || "ok\n"));
    for hook in Hook::ALL {
        let handler = move |State(knowledge): State<Knowledge>, Json(review): Json<AdmissionReview<DynamicObject>>| async move {
            Json(answer(hook, review, &knowledge))
        };
        routes = routes.route(hook.path(), post(handler));
    }
    let routes = routes.layer(DefaultBodyLimit::max(BODY_BYTES_MAX)).with_state(knowledge);
    let listener = TlsListener::start(socket, certificate)?;
    axum::serve(listener, routes).with_graceful_shutdown(stop).await
}

/// Accepted and secured connections.
pub struct TlsListener {
    local: SocketAddr,
    accepted: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
}

impl TlsListener {
    /// It ends, and the port is free, when the listener is dropped.
    pub fn start(socket: TcpListener, certificate: Arc<ServingCertificate>) -> io::Result<TlsListener> {
        let local = socket.local_addr()?;
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&certificate.provider))
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_cert_resolver(certificate);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let (sender, accepted) = mpsc::channel(ACCEPTED_MAX);
        tokio::spawn(accept_all(socket, TlsAcceptor::from(Arc::new(config)), sender));
        Ok(TlsListener { local, accepted })
    }
}

impl axum::serve::Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.accepted.recv().await {
            Some(accepted) => accepted,
            // The accepting task ends only after this listener; there will be no connection.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.local)
    }
}

async fn accept_all(
    socket: TcpListener,
    acceptor: TlsAcceptor,
    accepted: mpsc::Sender<(TlsStream<TcpStream>, SocketAddr)>,
) {
    let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let place = Arc::clone(&places).acquire_owned().await.expect("the semaphore is never closed");
        let next = tokio::select! {
            next = socket.accept() => next,
            () = accepted.closed() => return,
        };
        let (stream, from) = match next {
            Ok(next) => next,
            Err(error) => {
                tracing::warn!(%error, "cannot accept connections now");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (acceptor, accepted) = (acceptor.clone(), accepted.clone());
        tokio::spawn(async move {
            let outcome = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await;
            drop(place);
            match outcome {
                Ok(Ok(stream)) => drop(accepted.send((stream, from)).await),
                Ok(Err(error)) => tracing::debug!(%from, %error, "no handshake"),
                Err(_) => tracing::debug!(%from, "no handshake in time"),
            }
        });
    }
}
