//! The listening end: TCP, then the handshake, then a stream that tonic serves.
//!
//! Handshakes run beside each other, bounded in number and time, so that a silent stranger holds up neither the loop
//! nor, for more than [`HANDSHAKE_TIMEOUT`], a place in it. A refused stranger costs one log line.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use watari_gateway::socket::tune;

use super::{HANDSHAKE_TIMEOUT, PeerInfo, PeerStream, TCP_KEEPALIVE_IDLE, Tls, TlsError, explain, verify::identity_of};

/// Handshakes at once: a pair needs two, a burst of reconnects after a cut a few more, each costs about 50 KiB.
const HANDSHAKES_MAX: usize = 64;
/// Accepted connections that the server has not taken yet.
const ACCEPTED_MAX: usize = 16;
/// Pause after the system refused to accept (out of descriptors): it does not get better by asking at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections for `tonic::transport::Server::serve_with_incoming`.
pub type Incoming = ReceiverStream<io::Result<PeerStream>>;

/// A bound listener.
pub struct Listener {
    socket: TcpListener,
    local: SocketAddr,
    tls: Arc<Tls>,
    refusals: Arc<Refusals>,
}

/// Who was not let in, for reports.
#[derive(Default)]
pub struct Refusals(Mutex<(u64, Option<Refused>)>);

/// The last one that was not let in.
#[derive(Clone, Debug)]
pub struct Refused {
    pub at: SystemTime,
    pub from: SocketAddr,
    pub why: String,
}

impl Refusals {
    /// How many since the start, and the last one.
    pub fn get(&self) -> (u64, Option<Refused>) {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    fn add(&self, from: SocketAddr, why: String) {
        let mut refusals = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        refusals.0 += 1;
        refusals.1 = Some(Refused { at: SystemTime::now(), from, why });
    }
}

impl Listener {
    /// Binds `address`; port 0 takes a free one.
    pub async fn bind(address: SocketAddr, tls: Arc<Tls>) -> Result<Listener, TlsError> {
        let refuse = |found: io::Error| TlsError::Listen {
            address,
            remedy: match found.kind() {
                io::ErrorKind::AddrInUse => "another process listens there: end it, or choose another port",
                io::ErrorKind::AddrNotAvailable => "no interface of this machine has that address: choose one that has",
                io::ErrorKind::PermissionDenied => "choose a port from 1024 on",
                _ => "choose another address or port",
            },
            found,
        };
        let socket = TcpListener::bind(address).await.map_err(refuse)?;
        let local = socket.local_addr().map_err(refuse)?;
        Ok(Listener { socket, local, tls, refusals: Arc::default() })
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    pub fn refusals(&self) -> Arc<Refusals> {
        Arc::clone(&self.refusals)
    }

    /// Starts to accept. It ends, and the port is free, when the stream is dropped.
    pub fn incoming(self) -> Incoming {
        let (accepted, incoming) = mpsc::channel(ACCEPTED_MAX);
        tokio::spawn(self.accept_all(accepted));
        ReceiverStream::new(incoming)
    }

    async fn accept_all(self, accepted: mpsc::Sender<io::Result<PeerStream>>) {
        let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        loop {
            let next = async {
                let place = Arc::clone(&places).acquire_owned().await.expect("the semaphore is never closed");
                (place, self.socket.accept().await)
            };
            let (place, next) = tokio::select! {
                next = next => next,
                () = accepted.closed() => return,
            };
            let (stream, from) = match next {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::warn!(%error, listen = %self.local, "cannot accept connections now");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (tls, refusals, accepted) = (Arc::clone(&self.tls), Arc::clone(&self.refusals), accepted.clone());
            tokio::spawn(async move {
                let outcome = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(&tls, stream, from)).await;
                drop(place);
                match outcome.unwrap_or_else(|_| Err(format!("no handshake within {HANDSHAKE_TIMEOUT:?}"))) {
                    // An error means that nobody serves any more.
                    Ok(stream) => drop(accepted.send(Ok(stream)).await),
                    Err(why) => {
                        tracing::warn!(%from, %why, "connection refused");
                        refusals.add(from, why);
                    }
                }
            });
        }
    }
}

async fn handshake(tls: &Arc<Tls>, stream: TcpStream, from: SocketAddr) -> Result<PeerStream, String> {
    tune(&stream, TCP_KEEPALIVE_IDLE).map_err(|error| error.to_string())?;
    let material = tls.current().await;
    let stream = TlsAcceptor::from(Arc::clone(&material.server))
        .accept(stream)
        .await
        .map_err(|error| explain(&error).unwrap_or_else(|| error.to_string()))?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let certificate = certificate.ok_or("the peer shows no certificate")?;
    let identity = identity_of(certificate).map_err(|error| error.to_string())?;
    Ok(PeerStream { stream: stream.into(), info: PeerInfo { identity, address: from } })
}
