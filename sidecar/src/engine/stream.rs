//! The stream to the peer: gRPC calls on mutually authenticated connections, as channels for the brain.
//!
//! Whoever believes itself the active side dials ([`dial_loop`]); everybody listens ([`Service`]). One Control call
//! carries messages both ways; N Data calls, each on a TCP connection of its own, carry frames. A link is gone when
//! its Control call ends; the brain decides what that means. Frames that wait for the brain are bounded
//! ([`INBOX_BYTES`]); what waits to be sent is bounded by the source's window.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio_stream::{Stream, StreamExt, wrappers::UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};
use watari_wire::replication::{
    ControlMessage, DataEnd, DataFrame, Hello,
    control_message::Body,
    replication_client::ReplicationClient,
    replication_server::{Replication, ReplicationServer},
};

use super::{
    build::OutFrame,
    event::{Event, LinkId},
};
use crate::{
    config::Peer,
    control::OwnSiteControl,
    throttle::Throttle,
    tls::{self, Connection, DialOptions, Listener, Tls},
};

/// Bytes of frames that may wait for the brain before HTTP/2 stops the sender (two data calls' windows).
const INBOX_BYTES: usize = 32 << 20;
/// HTTP/2 windows of the listener, bytes: 1 Gbit/s at 200 ms over four data calls, with room.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// Largest message: a frame with its header and some room. Everything else is smaller.
const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Pauses between dials.
const REDIAL_MIN: Duration = Duration::from_millis(200);
const REDIAL_MAX: Duration = Duration::from_secs(5);
/// The peer's Hello must come within this time.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Posts events to the brain from any thread.
pub type Post = Arc<dyn Fn(Event) + Send + Sync>;

static NEXT_LINK: AtomicU64 = AtomicU64::new(1);

fn next_link() -> LinkId {
    LinkId(NEXT_LINK.fetch_add(1, Relaxed))
}

/// Wrap a message body.
pub fn message(body: Body) -> ControlMessage {
    ControlMessage { body: Some(body) }
}

// ---- listening

/// The listener's side.
pub struct Service {
    post: Post,
    inbox: Arc<Semaphore>,
}

type Outgoing = Pin<Box<dyn Stream<Item = Result<ControlMessage, Status>> + Send>>;

#[tonic::async_trait]
impl Replication for Service {
    type ControlStream = Outgoing;

    async fn control(&self, request: Request<Streaming<ControlMessage>>) -> Result<Response<Outgoing>, Status> {
        let peer = request.remote_addr().map_or_else(|| "peer".to_owned(), |a| a.to_string());
        let mut incoming = request.into_inner();
        let hello = first_hello(&mut incoming).await?;
        let link = next_link();
        let (control, outgoing) = mpsc::unbounded_channel();
        (self.post)(Event::LinkOpened { link, peer, hello: Box::new(hello), control, data: None });
        let post = self.post.clone();
        tokio::spawn(async move {
            let reason = pump(link, &mut incoming, &post).await;
            post(Event::LinkClosed(link, reason));
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(outgoing).map(Ok))))
    }

    async fn data(&self, request: Request<Streaming<DataFrame>>) -> Result<Response<DataEnd>, Status> {
        let mut frames = request.into_inner();
        while let Some(DataFrame { header, payload }) = frames.message().await? {
            let bytes = (header.len() + payload.len()).clamp(1, INBOX_BYTES) as u32;
            let permit = self.inbox.clone().acquire_many_owned(bytes).await.map_err(|_| Status::aborted("stopping"))?;
            (self.post)(Event::Frame { header, payload, permit });
        }
        Ok(Response::new(DataEnd {}))
    }
}

async fn first_hello(incoming: &mut Streaming<ControlMessage>) -> Result<Hello, Status> {
    let first = tokio::time::timeout(HELLO_TIMEOUT, incoming.message())
        .await
        .map_err(|_| Status::deadline_exceeded(format!("no Hello within {HELLO_TIMEOUT:?}")))??;
    match first.and_then(|m| m.body) {
        Some(Body::Hello(hello)) => Ok(hello),
        Some(Body::Refused(refused)) => Err(Status::failed_precondition(refused.text)),
        _ => Err(Status::invalid_argument("the first message of a Control call must be Hello")),
    }
}

async fn pump(link: LinkId, incoming: &mut Streaming<ControlMessage>, post: &Post) -> String {
    loop {
        match incoming.message().await {
            Ok(Some(message)) => post(Event::LinkMessage(link, Box::new(message))),
            Ok(None) => return "the peer closed the connection".into(),
            Err(status) => return tls::explain(&status).unwrap_or_else(|| status.message().to_owned()),
        }
    }
}

/// Serve until `stop` changes: the peer's stream, and the control API for our own site.
pub async fn listen(
    listener: Listener,
    post: Post,
    control: OwnSiteControl,
    mut stop: watch::Receiver<bool>,
) -> Result<(), tonic::transport::Error> {
    let service = ReplicationServer::new(Service { post, inbox: Arc::new(Semaphore::new(INBOX_BYTES)) })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(service)
        .add_service(control)
        .serve_with_incoming_shutdown(listener.incoming(), async move {
            let _ = stop.wait_for(|s| *s).await;
        })
        .await
}

// ---- dialling

/// What the dialer needs.
pub struct Dialer {
    pub tls: Arc<Tls>,
    pub peer: Peer,
    pub data_streams: u32,
    pub throttle: Arc<Throttle>,
    pub post: Post,
    /// Our durable record as it is now.
    pub hello: Arc<Mutex<Hello>>,
    /// Whether this side dials; `false` also ends a link that we dialled.
    pub wanted: watch::Receiver<bool>,
}

/// Dial, keep one link, dial again; for ever.
pub async fn dial_loop(mut dialer: Dialer) {
    let mut pause = REDIAL_MIN;
    let mut turn = 0;
    loop {
        if dialer.wanted.wait_for(|w| *w).await.is_err() {
            return;
        }
        let address = dialer.peer.addresses[turn % dialer.peer.addresses.len()].clone();
        turn += 1;
        match one_link(&mut dialer, &address).await {
            Ok(()) => pause = REDIAL_MIN,
            Err(error) => {
                (dialer.post)(Event::DialFailed(error));
                pause = (pause * 2).min(REDIAL_MAX);
            }
        }
        // A little disorder, so that many pairs do not dial in step after a link returns.
        let jitter = pause.mul_f64(0.75 + f64::from(std::process::id() % 50) / 100.0);
        tokio::time::sleep(jitter).await;
    }
}

async fn one_link(dialer: &mut Dialer, address: &str) -> Result<(), String> {
    let options = DialOptions::default();
    let connect = || tls::connect(&dialer.tls, address, &dialer.peer.server_name, &options);
    let words = |status: Status| tls::explain(&status).unwrap_or_else(|| status.message().to_owned());
    let Connection { channel, peer } = connect().await.map_err(|e| e.to_string())?;
    let (control, outgoing) = mpsc::unbounded_channel();
    let hello = dialer.hello.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let said = Box::new(hello.clone());
    control.send(message(Body::Hello(hello))).map_err(|_| "stopping".to_owned())?;
    let mut client = limits(ReplicationClient::new(channel));
    let mut incoming = client.control(UnboundedReceiverStream::new(outgoing)).await.map_err(words)?.into_inner();
    let hello = first_hello(&mut incoming).await.map_err(words)?;
    let broken = Arc::new(Notify::new());
    let mut streams = Vec::new();
    for _ in 0..dialer.data_streams.max(1) {
        let Connection { channel, .. } = connect().await.map_err(|e| e.to_string())?;
        streams.push(data_call(limits(ReplicationClient::new(channel)), dialer.throttle.clone(), broken.clone()));
    }
    let link = next_link();
    let data = Some((DataPool { streams: streams.into() }, said));
    let peer = format!("{} ({})", peer.address, peer.identity.site);
    (dialer.post)(Event::LinkOpened { link, peer, hello: Box::new(hello), control, data });
    let reason = tokio::select! {
        reason = pump(link, &mut incoming, &dialer.post) => reason,
        () = broken.notified() => "a data call broke".into(),
        _ = dialer.wanted.wait_for(|w| !*w) => "this side is not the active one any more".into(),
    };
    (dialer.post)(Event::LinkClosed(link, reason));
    Ok(())
}

fn limits<T>(client: ReplicationClient<T>) -> ReplicationClient<T>
where
    T: tonic::client::GrpcService<tonic::body::Body>,
    T::Error: Into<tonic::codegen::StdError>,
    T::ResponseBody: tonic::codegen::Body<Data = Bytes> + Send + 'static,
    <T::ResponseBody as tonic::codegen::Body>::Error: Into<tonic::codegen::StdError> + Send,
{
    client.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX)
}

/// One data call: frames queue here until the stream takes them.
struct DataStream {
    queue: mpsc::UnboundedSender<DataFrame>,
    queued_bytes: Arc<AtomicU64>,
}

/// The data calls of one link. Dropping it ends them.
#[derive(Clone)]
pub struct DataPool {
    streams: Arc<[DataStream]>,
}

impl DataPool {
    /// Hand a frame to the least loaded data call.
    pub fn send(&self, frame: &OutFrame) {
        let frame = DataFrame { header: frame.header.encode().into(), payload: frame.payload.clone() };
        let bytes = (frame.header.len() + frame.payload.len()) as u64;
        let best = self.streams.iter().min_by_key(|s| s.queued_bytes.load(Relaxed));
        if let Some(stream) = best {
            stream.queued_bytes.fetch_add(bytes, Relaxed);
            // A broken call ends the link; the frame is sent again on the next one.
            let _ = stream.queue.send(frame);
        }
    }
}

fn data_call(
    mut client: ReplicationClient<tonic::transport::Channel>,
    throttle: Arc<Throttle>,
    broken: Arc<Notify>,
) -> DataStream {
    let (queue, mut frames) = mpsc::unbounded_channel::<DataFrame>();
    let (ready, outgoing) = mpsc::channel(1);
    let queued_bytes = Arc::new(AtomicU64::new(0));
    let left = queued_bytes.clone();
    tokio::spawn(async move {
        while let Some(frame) = frames.recv().await {
            let bytes = (frame.header.len() + frame.payload.len()) as u64;
            throttle.acquire(bytes).await;
            if ready.send(frame).await.is_err() {
                return;
            }
            left.fetch_sub(bytes, Relaxed);
        }
    });
    tokio::spawn(async move {
        let outgoing = tokio_stream::wrappers::ReceiverStream::new(outgoing);
        if let Err(status) = client.data(outgoing).await {
            tracing::debug!(%status, "a data call ended");
        }
        broken.notify_one();
    });
    DataStream { queue, queued_bytes }
}
