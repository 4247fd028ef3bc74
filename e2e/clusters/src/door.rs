//! A door from this machine's loopback into a cluster: TCP connections to a local port come out at the API server.
//!
//! Each connection enters the cluster's network for itself, by name. So kubectl, Helm and tests need no route and no namespace of their
//! own, nothing is added to the machine's network, and a door outlives its cluster: a new one of the same name is behind it again.

use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use watari_e2e::netns;

/// A door cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "port {port} of this machine's loopback: {source}; see who has it (ss -tlnp) and end that, it is the API server's door"
    )]
    Port { port: u16, source: io::Error },
}

/// The API server is one hop away: if it does not answer by then, it is down.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// Opens the door; the thread runs for ever.
pub fn open(port: u16, netns_path: &Path, to: SocketAddr) -> Result<JoinHandle<()>, Error> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(|source| Error::Port { port, source })?;
    let netns_path = netns_path.to_owned();
    Ok(std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let netns_path = netns_path.clone();
            std::thread::spawn(move || pass(&client, &netns_path, to));
        }
    }))
}

/// Carries bytes both ways until either side is done.
fn pass(client: &TcpStream, netns_path: &Path, to: SocketAddr) {
    // A socket stays in the network in which it was made.
    let Ok(Ok(server)) = netns::enter(netns_path, || TcpStream::connect_timeout(&to, CONNECT_PATIENCE)) else {
        // Closing tells the client as much as we know.
        return;
    };
    std::thread::scope(|scope| {
        scope.spawn(|| copy(client, &server));
        copy(&server, client);
        let _ = client.shutdown(Shutdown::Both);
        let _ = server.shutdown(Shutdown::Both);
    });
}

fn copy(mut from: &TcpStream, mut into: &TcpStream) {
    let _ = io::copy(&mut from, &mut into);
    // The other direction may still have something to say; a broken one is ended by this as well.
    let _ = into.shutdown(Shutdown::Write);
}
