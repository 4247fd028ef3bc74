//! Hostile clients: each kind alone and in thousands, with an honest pair that must not notice.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use support::{PATIENCE, Pki, Running, connect_from, echo, name, until};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use watari_gateway::{
    Limits,
    limits::{HELLO_BYTES_MAX, HELLO_TIMEOUT, HELLOS_PER_SOURCE_MAX},
    metrics::Refusal,
};

/// Far below [`HELLO_TIMEOUT`]: an honest dial that waited for a hostile one's deadline would exceed it.
const UNDISTURBED: Duration = Duration::from_secs(5);

/// The bytes until the gateway closes.
async fn closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut said = Vec::new();
    // A reset is as good an end as a close.
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut said)).await.expect("the gateway closes");
    said
}

#[tokio::test]
async fn two_thousand_silent_connections_of_one_source_cost_only_that_source() {
    let pki = Pki::new();
    let gateway = Running::start(Limits::default(), &[(name(1), pki.serve(&name(1)).await)]).await;
    let mut established = pki.dial_from(3, gateway.address, &name(1)).await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..2000 {
        silent.push(connect_from(2, gateway.address).await.unwrap());
    }
    until("all to be accepted", || gateway.observed.counts.accepted.get() == 2001).await;
    assert!(gateway.counts().0 <= HELLOS_PER_SOURCE_MAX, "{:?}", gateway.counts());
    let before = Instant::now();
    let mut honest = pki.dial_from(3, gateway.address, &name(1)).await.unwrap();
    echo(&mut honest, b"undisturbed").await;
    echo(&mut established, b"undisturbed").await;
    assert!(before.elapsed() < UNDISTURBED, "{:?}", before.elapsed());
    let evicted = || gateway.observed.counts.refused(Refusal::Evicted);
    until("the oldest to be sent away", || evicted() == (2000 - HELLOS_PER_SOURCE_MAX) as u64).await;
    // Even the greedy source's own honest clients get in: the newest waits the shortest.
    let mut neighbour = pki.dial_from(2, gateway.address, &name(1)).await.unwrap();
    echo(&mut neighbour, b"undisturbed").await;
    drop(silent);
    until("all places to be free", || gateway.counts() == (0, 3)).await;
}

#[tokio::test]
async fn a_client_that_says_nothing_and_one_that_says_it_slowly_have_ten_seconds() {
    let pki = Pki::new();
    let gateway = Running::start(Limits::default(), &[(name(1), pki.serve(&name(1)).await)]).await;
    let began = Instant::now();
    let mut silent = TcpStream::connect(gateway.address).await.unwrap();
    let (mut slow_reads, mut slow_writes) = TcpStream::connect(gateway.address).await.unwrap().into_split();
    let dribble = async {
        // A handshake record that would go on: one byte each half second.
        for byte in [22u8, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3].into_iter().chain(std::iter::repeat(7)) {
            if slow_writes.write_all(&[byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    let ends = async {
        let mut said = Vec::new();
        let _ = slow_reads.read_to_end(&mut said).await;
        assert!(said.is_empty());
        assert!(closed(&mut silent).await.is_empty());
    };
    tokio::select! { () = dribble => {}, () = ends => {} }
    let took = began.elapsed();
    assert!(
        took > HELLO_TIMEOUT - Duration::from_secs(1) && took < HELLO_TIMEOUT + Duration::from_secs(10),
        "{took:?}"
    );
    until("both to be counted", || gateway.observed.counts.refused(Refusal::HelloTimeout) == 2).await;
    assert_eq!(gateway.counts(), (0, 0));
}

#[tokio::test]
async fn an_endless_hello_and_bytes_that_are_no_tls_are_closed_without_a_word() {
    let gateway = Running::start(Limits::default(), &[]).await;
    let mut endless = TcpStream::connect(gateway.address).await.unwrap();
    let mut record = vec![22, 3, 1, 4, 0];
    record.extend_from_slice(&[1, 0, 0xff, 0xf0]);
    record.resize(5 + 1024, 0);
    let mut sent = 0;
    while endless.write_all(&record).await.is_ok() && sent < 64 * HELLO_BYTES_MAX {
        record[5..9].fill(0);
        sent += record.len();
        // Sent bytes that nobody reads would fill the kernel's buffers first.
        tokio::task::yield_now().await;
    }
    assert!(closed(&mut endless).await.is_empty());
    let mut http = TcpStream::connect(gateway.address).await.unwrap();
    http.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert!(closed(&mut http).await.is_empty());
    let counts = &gateway.observed.counts;
    until("both to be counted", || counts.refused(Refusal::NotTls) + counts.refused(Refusal::HelloTooLong) == 2).await;
}

#[tokio::test]
async fn one_source_and_one_pair_have_limits_and_others_get_what_is_left() {
    let pki = Pki::new();
    let limits = Limits { connections: 8, connections_per_source: 5, connections_per_route: 4, ..Limits::default() };
    let routes = [(name(1), pki.serve(&name(1)).await), (name(2), pki.serve(&name(2)).await)];
    let gateway = Running::start(limits, &routes).await;
    let mut hoard = Vec::new();
    for _ in 0..4 {
        hoard.push(pki.dial_from(2, gateway.address, &name(1)).await.unwrap());
    }
    assert!(pki.dial_from(2, gateway.address, &name(1)).await.is_err(), "the pair has all it may have");
    hoard.push(pki.dial_from(2, gateway.address, &name(2)).await.unwrap());
    assert!(pki.dial_from(2, gateway.address, &name(2)).await.is_err(), "the source has all it may have");
    let mut other = pki.dial_from(3, gateway.address, &name(2)).await.unwrap();
    echo(&mut other, b"undisturbed").await;
    for one in &mut hoard {
        echo(one, b"kept").await;
    }
    let counts = &gateway.observed.counts;
    assert_eq!((counts.refused(Refusal::RouteFull), counts.refused(Refusal::SourceFull)), (1, 1));
    drop(hoard);
    until("the places to be free", || gateway.counts() == (0, 1)).await;
    pki.dial_from(2, gateway.address, &name(1)).await.unwrap();
}

/// Neither end reads: the buffers fill, nothing more is taken, and others go on.
#[tokio::test]
async fn a_client_that_never_reads_holds_up_nobody_else() {
    let pki = Pki::new();
    let gateway = Running::start(Limits::default(), &[(name(1), pki.serve(&name(1)).await)]).await;
    let mut greedy = pki.dial_from(2, gateway.address, &name(1)).await.unwrap();
    let megabyte = vec![1; 1 << 20];
    let mut taken = 0;
    while tokio::time::timeout(Duration::from_millis(500), greedy.write_all(&megabyte)).await.is_ok() {
        taken += 1;
        assert!(taken < 256, "somebody keeps all of it");
    }
    let mut honest = pki.dial_from(3, gateway.address, &name(1)).await.unwrap();
    echo(&mut honest, &megabyte).await;
}
