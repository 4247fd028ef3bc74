//! mTLS between the two sites of a pair: who is let in, and connections that gRPC can use.
//!
//! A connection belongs to a pair because *both* certificates name that pair ([`crate::identity`]) and were issued by a
//! configured authority; addresses and host names prove nothing. Files are read again whenever they change
//! ([`material`]), so certificates and authorities rotate under live connections, which keep what they had. TLS 1.3
//! only and no session resumption: a resumed session would skip the check of a certificate that has expired since.
//! Who may *write* is not decided here but by epochs (I6).

pub mod accept;
pub mod dial;
pub mod material;
pub mod verify;

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tonic::transport::server::Connected;

use crate::identity::Identity;

pub use accept::Listener;
pub use dial::{Connection, DialOptions, connect};
pub use material::Tls;

/// Longest time from the first byte of a connection to the end of its handshake: several round trips on the worst
/// link, and far less than a silent stranger would like.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The only protocol spoken (ALPN).
const ALPN_HTTP2: &[u8] = b"h2";
/// Silence after which the kernel asks whether the peer is there.
const TCP_KEEPALIVE_IDLE: Duration = Duration::from_secs(10);

/// Why there is no secured connection, in words with found, expected and remedy.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Our own files cannot be used. Permanent until they change.
    #[error("`{field}` ({}): found {found}, expected {expected}; {remedy}", file.display())]
    Material { field: &'static str, file: PathBuf, found: String, expected: String, remedy: &'static str },
    #[error("`listen`: cannot listen on {address}: {found}; {remedy}")]
    Listen { address: SocketAddr, found: io::Error, remedy: &'static str },
    /// The peer cannot be reached now. Try again.
    #[error("cannot reach {address}: {found}")]
    Unreachable { address: String, found: String },
    /// It was reached, and one side refused the other. Trying again helps only after somebody has acted.
    #[error("{address}: {0}", address = .1)]
    Refused(String, String),
}

/// The other end of a connection, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerInfo {
    pub identity: Identity,
    pub address: SocketAddr,
}

/// A connection whose both ends have proved to belong to the pair.
pub struct PeerStream {
    stream: tokio_rustls::TlsStream<TcpStream>,
    info: PeerInfo,
}

impl PeerStream {
    pub fn info(&self) -> &PeerInfo {
        &self.info
    }
}

/// A gRPC handler finds it as `request.extensions().get::<PeerInfo>()`.
impl Connected for PeerStream {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.info.clone()
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Words for what went wrong on a connection that TLS has refused at either end, found anywhere in an error's chain of
/// sources; `None` if TLS has refused nothing. With TLS 1.3 the dialer learns only at its first read that its own
/// certificate was refused, so this is asked about failed calls too.
pub fn explain(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(rustls) = error.downcast_ref::<rustls::Error>() {
            return Some(verify::words(rustls));
        }
        // An io::Error hides the error it wraps from `source`, and shows that one's source instead.
        if let Some(inner) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            if let Some(words) = explain(inner) {
                return Some(words);
            }
            // HTTP/2 keeps only the text of an I/O error.
            if let Some(words) = verify::alert_in(&inner.to_string()) {
                return Some(words);
            }
        }
        next = error.source();
    }
    None
}
