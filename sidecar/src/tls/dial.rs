//! The dialing end: one TCP connection, the handshake, and a gRPC channel on exactly that connection.
//!
//! A [`Connection`] never reconnects by itself: whoever owns it decides when to dial again, and begins with the
//! protocol's first message (each side's durable record).

use std::{io, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use rustls::{AlertDescription, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};
use watari_gateway::socket::tune;

use super::{HANDSHAKE_TIMEOUT, PeerInfo, PeerStream, TCP_KEEPALIVE_IDLE, Tls, TlsError, explain, verify::identity_of};

/// How to dial.
#[derive(Clone, Debug)]
pub struct DialOptions {
    /// For name resolution and TCP; the handshake has [`HANDSHAKE_TIMEOUT`] of its own.
    pub connect_timeout: Duration,
    /// HTTP/2 flow-control windows for what the *peer* sends to us, bytes, at most 2³¹ − 1.
    pub stream_window_bytes: u32,
    pub connection_window_bytes: u32,
    /// An HTTP/2 ping after this long without news, and how long its answer may take.
    pub keepalive_interval: Duration,
    pub keepalive_timeout: Duration,
}

impl Default for DialOptions {
    /// Windows for 8 MiB in flight per call: 1 Gbit/s at 64 ms, or 300 Mbit/s at 200 ms.
    fn default() -> Self {
        DialOptions {
            connect_timeout: Duration::from_secs(10),
            stream_window_bytes: 8 << 20,
            connection_window_bytes: 16 << 20,
            keepalive_interval: Duration::from_secs(5),
            keepalive_timeout: Duration::from_secs(10),
        }
    }
}

/// A channel on one connection; calls fail for good when that connection ends.
#[derive(Clone, Debug)]
pub struct Connection {
    pub channel: Channel,
    pub peer: PeerInfo,
}

/// Dials `address` (`host:port`) and expects a peer of our pair whose certificate contains `server_name`.
pub async fn connect(
    tls: &Arc<Tls>,
    address: &str,
    server_name: &str,
    options: &DialOptions,
) -> Result<Connection, TlsError> {
    let stream = dial(tls, address, server_name, options.connect_timeout).await?;
    let peer = stream.info().clone();
    let channel = channel_on(stream, options).await.map_err(|error| refused(address, &error))?;
    Ok(Connection { channel, peer })
}

/// The same without gRPC on top.
pub async fn dial(
    tls: &Arc<Tls>,
    address: &str,
    server_name: &str,
    connect_timeout: Duration,
) -> Result<PeerStream, TlsError> {
    let unreachable = |found: String| TlsError::Unreachable { address: address.to_owned(), found };
    let name = ServerName::try_from(server_name.to_owned())
        .map_err(|error| TlsError::Refused(format!("server name {server_name:?}: {error}"), address.to_owned()))?;
    let stream = tokio::time::timeout(connect_timeout, TcpStream::connect(address))
        .await
        .map_err(|_| unreachable(format!("no connection within {connect_timeout:?}")))?
        .map_err(|error| unreachable(error.to_string()))?;
    tune(&stream, TCP_KEEPALIVE_IDLE).map_err(|error| unreachable(error.to_string()))?;
    let remote = stream.peer_addr().map_err(|error| unreachable(error.to_string()))?;
    let connector = TlsConnector::from(Arc::clone(&tls.current().await.client));
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, connector.connect(name, stream))
        .await
        .map_err(|_| unreachable(format!("no TLS handshake within {HANDSHAKE_TIMEOUT:?}")))?
        .map_err(|error| refused(address, &error))?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let identity = certificate
        .ok_or_else(|| "the peer shows no certificate".to_owned())
        .and_then(|certificate| identity_of(certificate).map_err(|error| error.to_string()))
        .map_err(|why| TlsError::Refused(why, address.to_owned()))?;
    Ok(PeerStream { stream: stream.into(), info: PeerInfo { identity, address: remote } })
}

async fn channel_on(stream: PeerStream, options: &DialOptions) -> Result<Channel, tonic::transport::Error> {
    let mut stream = Some(TokioIo::new(stream));
    let once = tower::service_fn(move |_: Uri| {
        let stream =
            stream.take().ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "the connection has ended"));
        async move { stream }
    });
    // The URI is never resolved: it only becomes the authority of the calls.
    Endpoint::from_static("http://peer.watari.internal")
        .initial_stream_window_size(options.stream_window_bytes)
        .initial_connection_window_size(options.connection_window_bytes)
        .http2_keep_alive_interval(options.keepalive_interval)
        .keep_alive_timeout(options.keepalive_timeout)
        .keep_alive_while_idle(true)
        .connect_with_connector(once)
        .await
}

/// TLS said no, or the connection broke on the way.
fn refused(address: &str, error: &(dyn std::error::Error + 'static)) -> TlsError {
    match explain(error) {
        // A gateway's word for a Pod that is not there now; time alone may mend it.
        Some(found) if internal_error(error) => TlsError::Unreachable { address: address.to_owned(), found },
        Some(words) => TlsError::Refused(words, address.to_owned()),
        None => TlsError::Unreachable { address: address.to_owned(), found: error.to_string() },
    }
}

fn internal_error(error: &(dyn std::error::Error + 'static)) -> bool {
    let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    let alert = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(alert, Some(rustls::Error::AlertReceived(AlertDescription::InternalError)))
}
