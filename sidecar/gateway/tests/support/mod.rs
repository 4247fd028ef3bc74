//! A gateway in this process, real TLS servers behind it, and real TLS clients in front.
#![allow(dead_code, clippy::unwrap_used)]

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{PrivateKeyDer, ServerName},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::oneshot,
    task::JoinHandle,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};
use watari_gateway::{Gateway, Limits, Options, metrics::Observed};

/// Nothing here takes long on a quiet machine; this one may be busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// An authority with its servers' certificates.
pub struct Pki {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    roots: RootCertStore,
}

impl Pki {
    pub fn new() -> Pki {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone()).unwrap();
        Pki { issuer: rcgen::Issuer::new(params, key), roots }
    }

    fn server(&self, name: &str) -> Arc<ServerConfig> {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        Arc::new(config)
    }

    fn client(&self) -> Arc<ClientConfig> {
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        Arc::new(config)
    }

    /// A server with a certificate for `name` that greets with its name, and then returns what it gets until the end, and
    /// says "bye" after that.
    pub async fn serve(&self, name: &str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (acceptor, name) = (TlsAcceptor::from(self.server(name)), name.to_owned());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, name) = (acceptor.clone(), name.clone());
                tokio::spawn(async move {
                    let mut stream = acceptor.accept(stream).await?;
                    stream.write_all(format!("{name}\n").as_bytes()).await?;
                    stream.flush().await?;
                    let mut buffer = vec![0; 64 << 10];
                    loop {
                        match stream.read(&mut buffer).await? {
                            0 => break,
                            read => stream.write_all(&buffer[..read]).await?,
                        }
                        stream.flush().await?;
                    }
                    stream.write_all(b"bye").await?;
                    stream.shutdown().await
                });
            }
        });
        address
    }

    /// A handshake through the gateway, to a server that must have a certificate for `name`.
    pub async fn dial(&self, gateway: SocketAddr, name: &str) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(gateway).await?;
        self.handshake(stream, name).await
    }

    /// The same from another loopback address: another source, for the gateway.
    pub async fn dial_from(&self, last: u8, gateway: SocketAddr, name: &str) -> io::Result<TlsStream<TcpStream>> {
        let stream = connect_from(last, gateway).await?;
        self.handshake(stream, name).await
    }

    async fn handshake(&self, stream: TcpStream, name: &str) -> io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut stream = TlsConnector::from(self.client()).connect(name.clone(), stream).await?;
        let mut greeting = vec![0; name.to_str().len() + 1];
        stream.read_exact(&mut greeting).await?;
        assert_eq!(greeting, format!("{}\n", name.to_str()).into_bytes());
        Ok(stream)
    }
}

pub async fn connect_from(last: u8, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from(([127, 0, 0, last], 0)))?;
    socket.connect(to).await
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The server name of the n-th pair.
pub fn name(pair: usize) -> String {
    format!("p{pair}.pair.watari.internal")
}

/// A running gateway; it ends when this is dropped.
pub struct Running {
    pub address: SocketAddr,
    pub observed: Observed,
    pub metrics: SocketAddr,
    folder: tempfile::TempDir,
    stop: Option<oneshot::Sender<()>>,
    ended: JoinHandle<()>,
}

impl Running {
    pub async fn start(limits: Limits, routes: &[(String, SocketAddr)]) -> Running {
        let folder = tempfile::tempdir().unwrap();
        write_routes(folder.path().join("routes.json"), routes);
        let loopback: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let gateway = Gateway::bind(Options {
            listen: loopback,
            routes: folder.path().join("routes.json"),
            metrics: Some(loopback),
            drain: Duration::from_millis(500),
            limits,
        })
        .await
        .unwrap();
        let (address, observed, metrics) =
            (gateway.local_addr(), gateway.observed().clone(), gateway.metrics_addr().unwrap());
        let (stop, stopped) = oneshot::channel();
        let ended = tokio::spawn(gateway.run(async { drop(stopped.await) }));
        Running { address, observed, metrics, folder, stop: Some(stop), ended }
    }

    pub fn routes_file(&self) -> PathBuf {
        self.folder.path().join("routes.json")
    }

    pub fn write_routes(&self, routes: &[(String, SocketAddr)]) {
        write_routes(self.routes_file(), routes);
    }

    /// Connections now: waiting, routed.
    pub fn counts(&self) -> (usize, usize) {
        self.observed.places.counts()
    }

    /// Orders the end and waits for it.
    pub async fn end(mut self) {
        drop(self.stop.take());
        tokio::time::timeout(PATIENCE, self.ended).await.expect("it ends").unwrap();
    }
}

fn write_routes(path: PathBuf, routes: &[(String, SocketAddr)]) {
    let routes: std::collections::HashMap<_, _> = routes.iter().cloned().collect();
    let text = serde_json::to_string(&serde_json::json!({"version": 1, "routes": routes})).unwrap();
    std::fs::write(path.with_extension("new"), text).unwrap();
    std::fs::rename(path.with_extension("new"), path).unwrap();
}

/// Waits until `done`, or says what was waited for.
pub async fn until(what: &str, done: impl Fn() -> bool) {
    let waited = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waited).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"));
}

/// An exchange of `bytes` over a connection to a server of [`Pki::serve`].
pub async fn echo(stream: &mut TlsStream<TcpStream>, bytes: &[u8]) {
    let mut back = vec![0; bytes.len()];
    let (mut reads, mut writes) = tokio::io::split(stream);
    let (sent, got) = tokio::join!(
        async {
            writes.write_all(bytes).await?;
            writes.flush().await
        },
        reads.read_exact(&mut back)
    );
    sent.unwrap();
    got.unwrap();
    assert!(back == bytes, "the bytes came back changed");
}
