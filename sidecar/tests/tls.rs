//! Real handshakes over loopback: the right peer gets in, everybody else is told why not.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use support::{Folder, OTHER_PAIR, PAIR, RememberingSteering, authority, identity, pair};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};
use tonic::transport::Server;
use watari_sidecar::{
    control::{self, client::Client},
    pki::Validity,
    tls::{
        Connection, DialOptions, Listener, Tls, TlsError,
        accept::{Incoming, Refusals},
        connect, explain,
    },
};

fn days() -> Validity {
    Validity::days(30)
}

fn expired() -> Validity {
    Validity { from_unix_seconds: 1_600_000_000, until_unix_seconds: 1_600_086_400 }
}

/// A listener that serves the control API, so that a call can be made over each connection.
struct Served {
    address: SocketAddr,
    refusals: Arc<Refusals>,
    /// Dropped: the server sends its connections away and ends.
    _stop: oneshot::Sender<()>,
}

impl Served {
    async fn start(tls: Arc<Tls>) -> Served {
        let own = tls.identity().clone();
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), tls).await.unwrap();
        let (address, refusals) = (listener.local_addr(), listener.refusals());
        let incoming: Incoming = listener.incoming();
        let service = control::service_for_own_site(RememberingSteering::new(), own);
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(async move {
            let told = async { drop(stopped.await) };
            Server::builder().add_service(service).serve_with_incoming_shutdown(incoming, told).await.unwrap();
        });
        Served { address, refusals, _stop: stop }
    }

    async fn dial(&self, tls: &Arc<Tls>) -> Result<Connection, TlsError> {
        connect(tls, &self.address.to_string(), &pair(PAIR).server_name(), &DialOptions::default()).await
    }

    /// What the listener says about the last one it did not let in.
    async fn refusal(&self) -> String {
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            if let (_, Some(refused)) = self.refusals.get() {
                return refused.why;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("nothing was refused");
    }
}

async fn call(connection: &Connection) -> Result<(), String> {
    let mut client = Client::on(connection.channel.clone());
    client.report().await.map(|_| ()).map_err(|error| error.to_string())
}

#[tokio::test]
async fn two_sites_of_a_pair_get_through_to_each_other_and_know_who_is_there() {
    let ca = authority("both");
    let tokyo = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), days());
    let osaka = Folder::new(&ca, &ca, identity(PAIR, "osaka"), days());
    let served = Served::start(tokyo.tls()).await;
    let connection = served.dial(&osaka.tls()).await.unwrap();
    assert_eq!(connection.peer.identity, identity(PAIR, "tokyo"));
    assert_eq!(connection.peer.address, served.address);
    // The connection stands, and the control API behind it knows the caller: the other site may not steer.
    let why = call(&connection).await.unwrap_err();
    assert!(why.contains("site/osaka") && why.contains("site/tokyo") && why.contains("only our own site"), "{why}");
    let operator = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), days());
    call(&served.dial(&operator.tls()).await.unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_peer_of_another_pair_is_refused_by_both_ends_with_found_and_expected() {
    let ca = authority("both");
    let ours = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), days());
    let other = Folder::new(&ca, &ca, identity(OTHER_PAIR, "osaka"), days());
    // As a dialer: the listener says so in its log, the dialer at its first call.
    let served = Served::start(ours.tls()).await;
    let words = match served.dial(&other.tls()).await {
        Err(error) => error.to_string(),
        Ok(_) => panic!("the dialer checks the listener too"),
    };
    assert!(
        words.contains(&format!("found pair {PAIR}")) && words.contains(&format!("expected pair {OTHER_PAIR}")),
        "{words}"
    );
    // As a listener.
    let served = Served::start(other.tls()).await;
    let error = served.dial(&ours.tls()).await.unwrap_err();
    assert!(matches!(error, TlsError::Refused(..)), "{error:?}");
    let words = error.to_string();
    assert!(words.contains(&format!("found pair {OTHER_PAIR} (site osaka), expected pair {PAIR}")), "{words}");
}

/// The listener's own check, with a dialer that would accept anything: what a misconfigured or hostile peer meets.
#[tokio::test]
async fn the_listener_refuses_a_dialer_that_checks_nothing_itself() {
    let ca = authority("both");
    let ours = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), days());
    let stranger = authority("stranger");
    let cases = [
        (Folder::new(&ca, &ca, identity(OTHER_PAIR, "osaka"), days()), vec![OTHER_PAIR, PAIR]),
        (Folder::new(&ca, &stranger, identity(PAIR, "osaka"), days()), vec!["CN=stranger", "CN=both", "tls.ca"]),
        (Folder::new(&ca, &ca, identity(PAIR, "osaka"), expired()), vec!["expired", "2020-09-14", "renew it"]),
    ];
    for (folder, parts) in cases {
        let served = Served::start(ours.tls()).await;
        let words = careless_dial(&folder, served.address).await;
        assert!(words.contains("the peer refused our certificate"), "{words}");
        let why = served.refusal().await;
        assert!(parts.iter().all(|part| why.contains(part)), "{parts:?}: {why}");
    }
}

/// Dials without checking the listener; returns what the first read says.
async fn careless_dial(folder: &Folder, address: SocketAddr) -> String {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = vec![CertificateDer::from_pem_file(folder.path("tls.crt")).unwrap()];
    let key = PrivateKeyDer::from_pem_file(folder.path("tls.key")).unwrap();
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Careless))
        .with_client_auth_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let stream = TcpStream::connect(address).await.unwrap();
    let name = pair(PAIR).server_name().try_into().unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    let error = stream.read(&mut [0; 1]).await.unwrap_err();
    explain(&error).unwrap_or_else(|| error.to_string())
}

#[derive(Debug)]
struct Careless;

impl rustls::client::danger::ServerCertVerifier for Careless {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[tokio::test]
async fn a_listener_with_an_expired_or_strange_certificate_is_refused_by_the_dialer() {
    let (ca, stranger) = (authority("both"), authority("stranger"));
    let dialer = Folder::new(&ca, &ca, identity(PAIR, "osaka"), days());
    let cases = [
        (
            Folder::new(&ca, &ca, identity(PAIR, "tokyo"), expired()),
            vec!["is expired", "2020-09-14T12:26:40Z", "renew it"],
        ),
        (Folder::new(&ca, &stranger, identity(PAIR, "tokyo"), days()), vec!["found issuer CN=stranger", "CN=both"]),
    ];
    for (listener, parts) in cases {
        let served = Served::start(listener.tls()).await;
        let words = served.dial(&dialer.tls()).await.unwrap_err().to_string();
        assert!(parts.iter().all(|part| words.contains(part)), "{parts:?}: {words}");
    }
}

#[tokio::test]
async fn a_dialer_learns_from_its_first_call_that_the_listener_refused_it() {
    let (ca, stranger) = (authority("both"), authority("stranger"));
    let listener = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), days());
    // It trusts the listener, but its own certificate is a stranger's.
    let dialer = Folder::new(&ca, &stranger, identity(PAIR, "osaka"), days());
    let served = Served::start(listener.tls()).await;
    let words = match served.dial(&dialer.tls()).await {
        Err(error) => error.to_string(),
        Ok(connection) => {
            let status = watari_wire::control::control_client::ControlClient::new(connection.channel)
                .status(watari_wire::control::StatusRequest {})
                .await
                .unwrap_err();
            explain(&status).unwrap_or_else(|| panic!("{status:?}"))
        }
    };
    assert!(words.contains("the peer refused our certificate"), "{words}");
}

#[tokio::test]
async fn a_certificate_for_another_server_name_is_refused_by_name() {
    let ca = authority("both");
    let tokyo = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), days());
    let served = Served::start(tokyo.tls()).await;
    let error = connect(&tokyo.tls(), &served.address.to_string(), "elsewhere.example", &DialOptions::default()).await;
    let words = error.unwrap_err().to_string();
    assert!(words.contains("elsewhere.example") && words.contains("peer.server_name"), "{words}");
}

#[tokio::test]
async fn new_files_are_in_force_at_the_next_connection_while_live_ones_go_on() {
    let (first, second) = (authority("first"), authority("second"));
    let own = || identity(PAIR, "tokyo");
    let listener = Folder::new(&first, &first, own(), days());
    let dialer = Folder::new(&first, &first, own(), days());
    let (listener_tls, dialer_tls) = (listener.tls(), dialer.tls());
    let served = Served::start(listener_tls.clone()).await;
    let live = served.dial(&dialer_tls).await.unwrap();
    call(&live).await.unwrap();
    // Both sites trust both authorities, then take certificates of the second, then forget the first.
    for folder in [&listener, &dialer] {
        folder.write("ca.crt", &format!("{}{}", first.certificate_pem, second.certificate_pem));
    }
    call(&served.dial(&dialer_tls).await.unwrap()).await.unwrap();
    for folder in [&listener, &dialer] {
        folder.install(&folder.issue(&second, days()));
        folder.write("ca.crt", &second.certificate_pem);
    }
    call(&served.dial(&dialer_tls).await.unwrap()).await.unwrap();
    call(&live).await.unwrap();
    assert!(listener_tls.status().reloads >= 2 && dialer_tls.status().reloads >= 2);
    // Whoever stayed with the first authority is a stranger now.
    let late = Folder::new(&first, &first, own(), days());
    let words = served.dial(&late.tls()).await.unwrap_err().to_string();
    assert!(words.contains("found issuer CN=second"), "{words}");
}

#[tokio::test]
async fn files_that_cannot_be_used_leave_the_former_ones_in_force_and_are_reported() {
    let ca = authority("both");
    let listener = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), days());
    let tls = listener.tls();
    let served = Served::start(tls.clone()).await;
    let former = std::fs::read_to_string(listener.path("tls.key")).unwrap();
    for (name, text) in [("tls.key", String::new()), ("tls.key", listener.issue(&ca, days()).key_pem)] {
        listener.write(name, &text);
        call(&served.dial(&tls).await.unwrap()).await.unwrap();
        let error = tls.status().reload_error.expect("it is reported");
        assert!(error.contains("tls.key"), "{error}");
    }
    listener.write("tls.key", &former);
    served.dial(&tls).await.unwrap();
    assert_eq!(tls.status().reload_error, None);
}

#[test]
fn material_that_could_never_work_is_refused_at_the_start_by_field() {
    let ca = authority("both");
    let folder = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), days());
    let refused = |folder: &Folder| folder.try_tls().err().expect("refused").to_string();
    let wrong = Tls::load(folder.files(), identity(OTHER_PAIR, "tokyo")).err().expect("refused").to_string();
    assert!(wrong.contains("`tls.certificate`") && wrong.contains(PAIR) && wrong.contains(OTHER_PAIR), "{wrong}");
    let wrong = Tls::load(folder.files(), identity(PAIR, "osaka")).err().expect("refused").to_string();
    assert!(wrong.contains("site/tokyo") && wrong.contains("site/osaka"), "{wrong}");
    folder.write("tls.key", "");
    assert!(refused(&folder).contains("`tls.key`"));
    folder.write("ca.crt", "no certificate");
    assert!(refused(&folder).contains("`tls.ca`"));
    std::fs::remove_file(folder.path("ca.crt")).unwrap();
    let words = refused(&folder);
    assert!(words.contains("`tls.ca`") && words.contains("No such file"), "{words}");
    // Expired is not refused here: a VM's disks are served whatever the date.
    let old = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), expired());
    assert_eq!(old.tls().status().not_after_unix_seconds, 1_600_086_400);
}

#[tokio::test]
async fn a_port_in_use_is_refused_with_the_remedy() {
    let ca = authority("both");
    let folder = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), days());
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let error = Listener::bind(taken.local_addr().unwrap(), folder.tls()).await.err().unwrap().to_string();
    assert!(error.contains("`listen`") && error.contains("another process listens there"), "{error}");
}

#[tokio::test]
async fn silent_strangers_do_not_keep_the_peer_out() {
    let ca = authority("both");
    let folder = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), days());
    let tls = folder.tls();
    let served = Served::start(tls.clone()).await;
    let mut silent = Vec::new();
    for _ in 0..32 {
        silent.push(TcpStream::connect(served.address).await.unwrap());
    }
    let mut noisy = TcpStream::connect(served.address).await.unwrap();
    noisy.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    call(&served.dial(&tls).await.unwrap()).await.unwrap();
    assert!(served.refusal().await.contains("does not speak TLS"), "the noisy one was told apart");
}

#[tokio::test]
async fn dialing_nobody_and_dialing_something_else_are_told_apart() {
    let ca = authority("both");
    let tls = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), days());
    let (files, tls) = (tls.dir.path().to_owned(), tls.tls());
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = free.local_addr().unwrap().to_string();
    let dialed = tokio::spawn({
        let (tls, address) = (tls.clone(), address.clone());
        async move { connect(&tls, &address, "x.example", &DialOptions::default()).await }
    });
    let (mut http, _) = free.accept().await.unwrap();
    http.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    let error = dialed.await.unwrap().unwrap_err();
    assert!(matches!(&error, TlsError::Refused(why, _) if why.contains("does not speak TLS")), "{error:?}");
    drop((http, free));
    let error = connect(&tls, &address, "x.example", &DialOptions::default()).await.unwrap_err();
    assert!(
        matches!(&error, TlsError::Unreachable { .. }) && error.to_string().contains(&address),
        "{error} {files:?}"
    );
}

#[tokio::test]
async fn a_channel_ends_with_its_connection_and_never_dials_again_by_itself() {
    let ca = authority("both");
    let folder = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), days());
    let tls = folder.tls();
    let served = Served::start(tls.clone()).await;
    let connection = served.dial(&tls).await.unwrap();
    call(&connection).await.unwrap();
    let address = served.address;
    drop(served);
    // Another server takes the port: the old channel must not find it.
    let again = loop {
        match Listener::bind(address, tls.clone()).await {
            Ok(listener) => break listener,
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    let mut incoming = again.incoming();
    let watched = tokio::spawn(async move { tokio_stream::StreamExt::next(&mut incoming).await.is_some() });
    let end = Instant::now() + Duration::from_secs(5);
    while call(&connection).await.is_ok() {
        assert!(Instant::now() < end, "the connection should have ended");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!watched.is_finished(), "it dialed again");
    watched.abort();
}
