//! The real binary as a gateway: our own TLS through it, in our own words, and what thousands of connections cost it.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use support::{Folder, OTHER_PAIR, PAIR, authority, identity, pair};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
};
use watari_sidecar::{
    pki::Validity,
    tls::{Listener, Tls, TlsError, dial::dial},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A gateway process on a free port; killed when dropped.
struct Gateway {
    process: Child,
    address: SocketAddr,
}

impl Gateway {
    fn start(folder: &Path, routes: &[(String, SocketAddr)]) -> Gateway {
        let file = folder.join("routes.json");
        let routes: Vec<String> = routes.iter().map(|(name, address)| format!("\"{name}\":\"{address}\"")).collect();
        std::fs::write(&file, format!("{{\"version\":1,\"routes\":{{{}}}}}", routes.join(","))).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_watari-sidecar"))
            .args(["gateway", "--listen", "127.0.0.1:0", "--drain", "1s", "--log-format", "json", "--routes"])
            .arg(&file)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let address = loop {
            let mut line = String::new();
            assert!(log.read_line(&mut line).unwrap() > 0, "the gateway ended");
            if let Some((_, rest)) = line.split_once("\"listen\":\"") {
                break rest.split_once('"').unwrap().0.parse().unwrap();
            }
        };
        // Nobody may wait for a full pipe.
        std::thread::spawn(move || log.read_to_end(&mut Vec::new()));
        Gateway { process, address }
    }

    fn resident_mebibytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

async fn through(
    gateway: &Gateway,
    tls: &Arc<Tls>,
    pair_id: &str,
) -> Result<watari_sidecar::tls::PeerStream, TlsError> {
    dial(tls, &gateway.address.to_string(), &pair(pair_id).server_name(), CONNECT_TIMEOUT).await
}

#[tokio::test]
async fn a_sidecar_reaches_its_peer_through_a_gateway_and_each_failure_has_its_words() {
    let ca = authority("both");
    let days = Validity::days(30);
    let tokyo = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), days);
    let osaka = Folder::new(&ca, &ca, identity(PAIR, "osaka"), days);
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), tokyo.tls()).await.unwrap();
    let behind = listener.local_addr();
    let mut incoming = listener.incoming();
    tokio::spawn(async move {
        use tokio_stream::StreamExt;
        while let Some(Ok(mut stream)) = incoming.next().await {
            stream.write_all(b"tokyo").await.unwrap();
            stream.flush().await.unwrap();
        }
    });
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let routes = [(pair(PAIR).server_name(), behind), (pair(OTHER_PAIR).server_name(), nobody)];
    let gateway = Gateway::start(folder.path(), &routes);

    let mut stream = through(&gateway, &osaka.tls(), PAIR).await.unwrap();
    assert_eq!(stream.info().identity, identity(PAIR, "tokyo"), "the certificate is the sidecar's own");
    let mut said = [0; 5];
    stream.read_exact(&mut said).await.unwrap();
    assert_eq!(&said, b"tokyo");

    let error = through(&gateway, &osaka.tls(), OTHER_PAIR).await.err().unwrap();
    assert!(matches!(error, TlsError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("nobody answers behind the gateway"), "{error}");

    let unknown = "22222222-2222-4333-8444-555555555555";
    let error = through(&gateway, &osaka.tls(), unknown).await.err().unwrap();
    assert!(matches!(error, TlsError::Refused(..)), "{error:?}");
    assert!(error.to_string().contains("the gateway knows no such pair"), "{error}");
}

#[tokio::test]
async fn two_thousand_idle_connections_to_fifty_pairs_cost_a_gateway_little_memory() {
    const PAIRS: usize = 50;
    const EACH: usize = 40;
    /// Debug builds, allocator slack and thread stacks included; buffers kept for each connection would need 125 MiB.
    const MEBIBYTES_MAX: u64 = 48;
    // Behind: whoever comes is kept and never answered.
    let behind = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = behind.local_addr().unwrap();
    let kept = tokio::spawn(async move {
        let mut kept = Vec::new();
        while kept.len() < PAIRS * EACH {
            kept.push(behind.accept().await.unwrap().0);
        }
        kept
    });
    let name = |index: usize| format!("p{index}.pair.watari.internal");
    let routes: Vec<_> = (0..PAIRS).map(|index| (name(index), address)).collect();
    let folder = tempfile::tempdir().unwrap();
    let gateway = Gateway::start(folder.path(), &routes);
    let before = gateway.resident_mebibytes();
    let mut clients = Vec::new();
    for index in 0..PAIRS {
        let hello = client_hello(&name(index));
        for _ in 0..EACH {
            let mut client = TcpStream::connect(gateway.address).await.unwrap();
            client.write_all(&hello).await.unwrap();
            clients.push(client);
        }
    }
    let kept = tokio::time::timeout(Duration::from_secs(60), kept).await.expect("all are routed").unwrap();
    let after = gateway.resident_mebibytes();
    assert!(after - before < MEBIBYTES_MAX, "{before} MiB without connections, {after} MiB with {}", kept.len());
    // And it still routes, for a source that has not used its share.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut stranger = socket.connect(gateway.address).await.unwrap();
    stranger.write_all(&client_hello("nobody.internal")).await.unwrap();
    let mut alert = Vec::new();
    stranger.read_to_end(&mut alert).await.unwrap();
    assert_eq!(alert, [21, 3, 3, 0, 2, 2, 112]);
}

fn client_hello(name: &str) -> Vec<u8> {
    let config = rustls::ClientConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = name.to_owned().try_into().unwrap();
    let mut bytes = Vec::new();
    rustls::ClientConnection::new(config.into(), name).unwrap().write_tls(&mut bytes).unwrap();
    bytes
}

#[test]
fn sigterm_ends_it_with_exit_code_0() {
    let folder = tempfile::tempdir().unwrap();
    let mut gateway = Gateway::start(folder.path(), &[]);
    let _silent = std::net::TcpStream::connect(gateway.address).unwrap();
    let id = rustix::process::Pid::from_child(&gateway.process);
    rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
    assert_eq!(gateway.process.wait().unwrap().code(), Some(0));
}
