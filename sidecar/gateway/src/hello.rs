//! From the first bytes of a connection to the server name in its ClientHello (RFC 8446, 4.1.2; RFC 6066, 3).
//!
//! rustls reads the message; nothing is answered and no handshake begins. The bytes are kept as they came, because the
//! sidecar behind must see them all. Bounded by [`HELLO_BYTES_MAX`]; time is the caller's.

use rustls::server::Acceptor;

use crate::limits::HELLO_BYTES_MAX;

/// A plaintext fatal alert `unrecognized_name` (RFC 8446, 6): what a sidecar reports as "the gateway knows no such pair".
pub const ALERT_UNRECOGNISED_NAME: [u8; 7] = alert(112);
/// A plaintext fatal alert `internal_error`: the route is known, and nobody answers behind it now.
pub const ALERT_INTERNAL_ERROR: [u8; 7] = alert(80);

const fn alert(description: u8) -> [u8; 7] {
    const ALERT: u8 = 21;
    const FATAL: u8 = 2;
    // Record type, version of TLS 1.2 as every record has it, length, level.
    [ALERT, 3, 3, 0, 2, FATAL, description]
}

/// A whole ClientHello.
#[derive(Debug, PartialEq, Eq)]
pub struct Hello {
    /// Lower case: DNS names are equal whatever their case.
    pub server_name: String,
    /// All bytes received so far, to be passed on first.
    pub bytes: Vec<u8>,
}

/// Why there will be no server name. Nothing here is worth another try by the same client.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HelloError {
    #[error("it does not begin with a TLS ClientHello ({0})")]
    NotTls(String),
    #[error("its ClientHello is longer than {HELLO_BYTES_MAX} bytes")]
    TooLong,
    #[error("its ClientHello names no server")]
    NoName,
}

/// Reads one connection's ClientHello, fed with bytes as they come.
#[derive(Default)]
pub struct HelloReader {
    acceptor: Acceptor,
    bytes: Vec<u8>,
}

impl HelloReader {
    /// How many bytes may still be fed: at least one until [`feed`](Self::feed) has returned something else than `None`.
    pub fn room(&self) -> usize {
        HELLO_BYTES_MAX - self.bytes.len()
    }

    /// Takes the next bytes, at most [`room`](Self::room). `None`: the message is not whole yet. After anything else it must not be called again.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Option<Hello>, HelloError> {
        assert!(bytes.len() <= self.room(), "the caller reads no more than there is room for");
        self.bytes.extend_from_slice(bytes);
        let mut rest = bytes;
        while !rest.is_empty() {
            let not_tls = |error: &dyn std::fmt::Display| HelloError::NotTls(error.to_string());
            let taken = self.acceptor.read_tls(&mut rest).map_err(|error| not_tls(&error))?;
            match self.acceptor.accept() {
                Ok(Some(accepted)) => {
                    let name = accepted.client_hello().server_name().map(str::to_ascii_lowercase);
                    let server_name = name.ok_or(HelloError::NoName)?;
                    return Ok(Some(Hello { server_name, bytes: std::mem::take(&mut self.bytes) }));
                }
                Ok(None) if taken == 0 => return Err(HelloError::TooLong),
                Ok(None) => {}
                Err((error, _)) => return Err(not_tls(&error)),
            }
        }
        if self.room() == 0 { Err(HelloError::TooLong) } else { Ok(None) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use rustls::{AlertDescription, ClientConfig, ClientConnection, RootCertStore, pki_types::ServerName};

    use super::*;

    fn client(name: &str) -> ClientConnection {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        ClientConnection::new(Arc::new(config), name).unwrap()
    }

    fn client_hello(name: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        client(name).write_tls(&mut bytes).unwrap();
        bytes
    }

    /// Feeds `bytes` in pieces of `step`.
    fn read(bytes: &[u8], step: usize) -> Result<Option<Hello>, HelloError> {
        let mut reader = HelloReader::default();
        for piece in bytes.chunks(step) {
            if let Some(hello) = reader.feed(&piece[..piece.len().min(reader.room())])? {
                return Ok(Some(hello));
            }
        }
        Ok(None)
    }

    #[test]
    fn the_name_is_found_however_the_bytes_arrive_and_every_byte_is_kept() {
        let bytes = client_hello("A1.pair.Watari.internal");
        for step in [1, 2, 5, 6, 100, bytes.len()] {
            let hello = read(&bytes, step).unwrap().expect("a whole message");
            assert_eq!(hello.server_name, "a1.pair.watari.internal");
            assert_eq!(hello.bytes, bytes, "in steps of {step}");
        }
        assert_eq!(read(&bytes[..bytes.len() - 1], 7).unwrap(), None, "one byte is missing");
    }

    #[test]
    fn bytes_that_follow_the_message_are_kept_too() {
        let mut bytes = client_hello("b.internal");
        bytes.extend_from_slice(&[20, 3, 3, 0, 1, 1]);
        assert_eq!(read(&bytes, bytes.len()).unwrap().expect("whole").bytes, bytes);
    }

    #[test]
    fn what_is_no_hello_is_refused_at_once() {
        for text in ["GET / HTTP/1.1\r\nHost: a\r\n\r\n", "SSH-2.0-OpenSSH_9.2p1\r\n", "\0\0\0\0\0\0\0\0\0\0\0\0"] {
            assert!(matches!(read(text.as_bytes(), 64), Err(HelloError::NotTls(_))), "{text:?}");
        }
        // A client without a host name sends none, and so does one that has only an address.
        assert_eq!(read(&client_hello("192.0.2.1"), 4096), Err(HelloError::NoName));
    }

    /// A handshake message that says it has 16 MiB, carried by full records of valid form: it never ends, and is never kept.
    #[test]
    fn an_endless_hello_is_refused_when_the_room_is_used_up() {
        let mut endless = Vec::new();
        let mut body = vec![1, 0xff, 0xff, 0xff];
        while endless.len() < 2 * HELLO_BYTES_MAX {
            body.resize(1024, 0);
            endless.extend_from_slice(&[22, 3, 1, 4, 0]);
            endless.extend_from_slice(&body);
            body.clear();
        }
        assert!(matches!(read(&endless, 1000), Err(HelloError::TooLong | HelloError::NotTls(_))));
    }

    #[test]
    fn the_alerts_are_what_rustls_reads_as_such() {
        for (bytes, expected) in [
            (ALERT_UNRECOGNISED_NAME, AlertDescription::UnrecognisedName),
            (ALERT_INTERNAL_ERROR, AlertDescription::InternalError),
        ] {
            let mut connection = client("a.internal");
            connection.write_tls(&mut Vec::new()).unwrap();
            connection.read_tls(&mut bytes.as_slice()).unwrap();
            assert_eq!(connection.process_new_packets().unwrap_err(), rustls::Error::AlertReceived(expected));
        }
    }
}
