//! Honest peers: real TLS through the gateway to the server that its name says, and nowhere else.

#![allow(clippy::unwrap_used)]

mod support;

use std::{net::SocketAddr, time::Duration};

use rustls::AlertDescription;
use support::{PATIENCE, Pki, Running, echo, name, until};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use watari_gateway::{Limits, metrics::Refusal};

fn alert_in(error: &std::io::Error) -> Option<AlertDescription> {
    match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        rustls::Error::AlertReceived(alert) => Some(*alert),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn each_name_leads_to_its_own_server_and_bytes_cross_unchanged_in_both_directions() {
    let pki = Pki::new();
    let routes = [(name(1), pki.serve(&name(1)).await), (name(2), pki.serve(&name(2)).await)];
    let gateway = Running::start(Limits::default(), &routes).await;
    let mut one = pki.dial(gateway.address, &name(1)).await.unwrap();
    let mut two = pki.dial(gateway.address, &name(2)).await.unwrap();
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n * 7 % 251) as u8).collect();
    tokio::join!(echo(&mut one, &bytes), echo(&mut two, &bytes));
    assert_eq!(gateway.counts(), (0, 2));
    assert!(gateway.observed.counts.bytes.to_pods.get() > 6_000_000, "bytes are counted while they flow");
    drop((one, two));
    until("both places to be free", || gateway.counts() == (0, 0)).await;
}

#[tokio::test]
async fn the_end_of_one_direction_is_passed_on_and_the_other_goes_on() {
    let pki = Pki::new();
    let gateway = Running::start(Limits::default(), &[(name(1), pki.serve(&name(1)).await)]).await;
    let mut stream = pki.dial(gateway.address, &name(1)).await.unwrap();
    stream.write_all(b"last words").await.unwrap();
    // TLS's own end, then that of TCP.
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest, b"last wordsbye");
    until("the place to be free", || gateway.counts() == (0, 0)).await;
}

#[tokio::test]
async fn a_name_without_a_route_is_answered_with_the_alert_that_says_so() {
    let pki = Pki::new();
    let gateway = Running::start(Limits::default(), &[(name(1), pki.serve(&name(1)).await)]).await;
    let error = pki.dial(gateway.address, &name(2)).await.unwrap_err();
    assert_eq!(alert_in(&error), Some(AlertDescription::UnrecognisedName));
    assert_eq!(gateway.observed.counts.refused(Refusal::UnknownServerName), 1);
}

#[tokio::test]
async fn a_route_that_leads_to_nobody_is_answered_with_another_alert() {
    let pki = Pki::new();
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let gateway = Running::start(Limits::default(), &[(name(1), nobody)]).await;
    let error = pki.dial(gateway.address, &name(1)).await.unwrap_err();
    assert_eq!(alert_in(&error), Some(AlertDescription::InternalError));
    until("the place to be free", || gateway.counts() == (0, 0)).await;
}

#[tokio::test]
async fn changed_routes_hold_for_new_connections_and_end_no_old_one() {
    let pki = Pki::new();
    let (one, two) = (pki.serve(&name(1)).await, pki.serve(&name(2)).await);
    let gateway = Running::start(Limits::default(), &[(name(1), one)]).await;
    let mut old = pki.dial(gateway.address, &name(1)).await.unwrap();
    gateway.write_routes(&[(name(2), two)]);
    until("the new routes", || gateway.observed.table.status().reloads == 2).await;
    pki.dial(gateway.address, &name(2)).await.unwrap();
    assert!(pki.dial(gateway.address, &name(1)).await.is_err());
    echo(&mut old, b"still here").await;
    // A bad file changes nothing.
    std::fs::write(gateway.routes_file(), "{").unwrap();
    until("the bad file to be seen", || gateway.observed.table.status().error.is_some()).await;
    pki.dial(gateway.address, &name(2)).await.unwrap();
}

#[tokio::test]
async fn health_and_metrics_say_what_is_in_force() {
    let pki = Pki::new();
    let gateway = Running::start(Limits::default(), &[(name(1), pki.serve(&name(1)).await)]).await;
    let _open = pki.dial(gateway.address, &name(1)).await.unwrap();
    let _ = pki.dial(gateway.address, &name(3)).await;
    assert!(get(gateway.metrics, "/healthz").await.contains("ok"));
    assert!(get(gateway.metrics, "/readyz").await.contains("200 OK"));
    let text = get(gateway.metrics, "/metrics").await;
    for line in [
        "watari_gateway_accepted_connections_total 2",
        "watari_gateway_routed_connections_total 1",
        "watari_gateway_refused_connections_total{reason=\"UnknownServerName\"} 1",
        "watari_gateway_open 1",
        "watari_gateway_routes 1",
        "watari_gateway_routes_file_bad 0",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    std::fs::remove_file(gateway.routes_file()).unwrap();
    until("the missing file to be seen", || gateway.observed.table.status().error.is_some()).await;
    assert!(get(gateway.metrics, "/readyz").await.contains("200 OK"), "the former routes are in force");
    assert!(get(gateway.metrics, "/metrics").await.contains("watari_gateway_routes_file_bad 1"));
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn told_to_end_it_lets_a_connection_finish_and_cuts_what_does_not() {
    let pki = Pki::new();
    let gateway = Running::start(Limits::default(), &[(name(1), pki.serve(&name(1)).await)]).await;
    let address = gateway.address;
    let mut finishing = pki.dial(address, &name(1)).await.unwrap();
    let mut lasting = pki.dial(address, &name(1)).await.unwrap();
    let silent = TcpStream::connect(address).await.unwrap();
    let (ended, ()) = tokio::join!(async { tokio::time::timeout(PATIENCE, gateway.end()).await }, async {
        // Within the time it leaves.
        tokio::time::sleep(Duration::from_millis(100)).await;
        echo(&mut finishing, b"on the way out").await;
        finishing.shutdown().await.unwrap();
        assert_eq!(lasting.read(&mut [0; 1]).await.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
    });
    ended.unwrap();
    drop(silent);
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
}
