//! The control API end to end over its unix socket, with a steering that only remembers.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant},
};

use support::RememberingSteering;
use watari_sidecar::{
    control::{
        self, ControlError,
        client::{Client, ClientError},
    },
    engine::steering::{Declined, Intent, Outcome, Settings},
};

const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn every_intent_arrives_as_it_was_sent() {
    let folder = tempfile::tempdir().unwrap();
    let steering = RememberingSteering::new();
    let socket = control::serve(&folder.path().join("control.sock"), steering.clone()).unwrap();
    let mut client = Client::connect(socket.path()).await.unwrap();
    let settings = Settings {
        interval: Some(Duration::from_millis(1500)),
        bandwidth_bits_per_second: Some(0),
        paused: None,
        slow_down: Some(true),
    };
    let intents = [
        Intent::Cut { wait: Duration::from_millis(2500) },
        Intent::Configure(settings),
        Intent::Configure(Settings { paused: Some(false), ..Settings::default() }),
        Intent::OpenHandover { vmi_uid: "b7e4".to_owned() },
        Intent::Acquire,
        Intent::Void,
        Intent::MoveStopped,
        Intent::Promote { generation: None },
        Intent::Promote { generation: Some(12) },
        Intent::AcceptDivergence,
        Intent::Release,
    ];
    for intent in intents {
        assert_eq!(client.intent(intent.clone(), PATIENCE).await.unwrap(), "done", "{intent:?}");
        assert_eq!(steering.last(), intent);
    }
}

#[tokio::test]
async fn a_commit_a_pending_answer_and_a_refusal_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let steering = RememberingSteering::new();
    let socket = control::serve(&folder.path().join("control.sock"), steering.clone()).unwrap();
    let mut client = Client::connect(socket.path()).await.unwrap();
    steering.answer(Ok(Outcome::Committed { epoch: 3, number: 12 }));
    let cut = || Intent::Cut { wait: Duration::ZERO };
    assert_eq!(client.intent(cut(), PATIENCE).await.unwrap(), "generation 3.12 is committed");
    steering.answer(Ok(Outcome::Pending("it goes on".to_owned())));
    assert_eq!(client.intent(Intent::Acquire, PATIENCE).await.unwrap(), "it goes on");
    steering.answer(Err(Declined("a handover is open: void it first".to_owned())));
    for intent in [cut(), Intent::Void, Intent::Configure(Settings::default()), Intent::Promote { generation: None }] {
        match client.intent(intent.clone(), PATIENCE).await {
            Err(ClientError::Declined(why)) => assert_eq!(why, "a handover is open: void it first", "{intent:?}"),
            other => panic!("{intent:?}: {other:?}"),
        }
    }
    let before = steering.asked.lock().unwrap().len();
    let empty = client.intent(Intent::OpenHandover { vmi_uid: String::new() }, PATIENCE).await;
    assert!(matches!(&empty, Err(ClientError::Declined(why)) if why.contains("vmi_uid")), "{empty:?}");
    assert_eq!(steering.asked.lock().unwrap().len(), before, "a malformed request never reaches the engine");
}

#[tokio::test]
async fn a_report_arrives_whole_and_a_watcher_sees_it_change() {
    let folder = tempfile::tempdir().unwrap();
    let steering = RememberingSteering::new();
    steering.report.lock().unwrap().generations.eta_seconds = Some(1.5);
    let socket = control::serve(&folder.path().join("control.sock"), steering.clone()).unwrap();
    let mut client = Client::connect(socket.path()).await.unwrap();
    let report = steering.report.lock().unwrap().clone();
    assert_eq!(client.report().await.unwrap(), report);
    let mut watch = client.watch(Duration::from_millis(100)).await.unwrap();
    assert_eq!(watch.next().await.unwrap(), Some(report));
    steering.report.lock().unwrap().role = "Sealed".to_owned();
    let end = Instant::now() + PATIENCE;
    while watch.next().await.unwrap().expect("it goes on").role != "Sealed" {
        assert!(Instant::now() < end);
    }
    let begin = Instant::now();
    socket.stop().await;
    assert!(begin.elapsed() < Duration::from_secs(1), "a watcher does not hold it up");
    while watch.next().await.unwrap().is_some() {
        assert!(Instant::now() < end);
    }
}

#[tokio::test]
async fn the_socket_is_private_taken_from_nobody_and_removed_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let socket = control::serve(&path, RememberingSteering::new()).unwrap();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o660);
    let second = control::serve(&path, RememberingSteering::new()).err().unwrap();
    assert!(matches!(second, ControlError::InUse(_)), "{second}");
    Client::connect(&path).await.unwrap().report().await.unwrap();
    drop(socket);
    assert!(!path.exists());
    // What a killed process leaves is replaced; what is no socket is not.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(control::serve(&path, RememberingSteering::new()).unwrap());
    std::fs::write(&path, "precious").unwrap();
    let refused = control::serve(&path, RememberingSteering::new()).err().unwrap();
    assert!(matches!(refused, ControlError::NotASocket(_)), "{refused}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[tokio::test]
async fn a_sidecar_that_is_not_running_is_named_by_its_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let error = Client::connect(&path).await.unwrap_err();
    assert!(matches!(error, ClientError::NotRunning { .. }));
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
}

#[tokio::test]
async fn metrics_and_health_are_served_over_http() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use watari_sidecar::{config::Metrics, metrics};
    let folder = tempfile::tempdir().unwrap();
    let steering = RememberingSteering::new();
    let path = folder.path().join("metrics.sock");
    let tcp = metrics::serve(&Metrics::Tcp("127.0.0.1:0".parse().unwrap()), steering.clone()).await.unwrap();
    let _unix = metrics::serve(&Metrics::Unix(path.clone()), steering.clone()).await.unwrap();
    assert!(metrics::serve(&Metrics::Unix(path.clone()), steering.clone()).await.is_err(), "it is served already");
    let get = async |what: &str| {
        let request = format!("GET {what} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let mut tcp = tokio::net::TcpStream::connect(tcp.address.unwrap()).await.unwrap();
        tcp.write_all(request.as_bytes()).await.unwrap();
        let mut over_tcp = String::new();
        tcp.read_to_string(&mut over_tcp).await.unwrap();
        let mut unix = tokio::net::UnixStream::connect(&path).await.unwrap();
        unix.write_all(request.as_bytes()).await.unwrap();
        let mut over_unix = String::new();
        unix.read_to_string(&mut over_unix).await.unwrap();
        assert_eq!(over_tcp.lines().next(), over_unix.lines().next());
        over_tcp
    };
    let text = get("/metrics").await;
    assert!(text.starts_with("HTTP/1.1 200") && text.contains("openmetrics-text"), "{text}");
    assert!(text.contains("watari_role{pair=\"default/vm1\",site=\"tokyo\",role=\"Serving\"} 1"), "{text}");
    assert!(get("/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(get("/readyz").await.starts_with("HTTP/1.1 200"));
    assert!(get("/nothing").await.starts_with("HTTP/1.1 404"));
    steering.report.lock().unwrap().role.clear();
    assert!(get("/readyz").await.starts_with("HTTP/1.1 503"), "no role yet");
    assert!(get("/healthz").await.starts_with("HTTP/1.1 200"));
}
