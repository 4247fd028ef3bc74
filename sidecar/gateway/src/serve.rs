//! The loop: accept, read the ClientHello, find the route, connect, relay.
//!
//! Each connection is one task, which holds a place in one of the two rooms of [`places`](crate::places) from its first
//! instant to its last; everything it awaits has a limit in time. What a stranger sends never ends up in a log line longer than
//! a server name, and refusals of one kind are logged at most once a second.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::timeout,
};

use crate::{
    hello::{ALERT_INTERNAL_ERROR, ALERT_UNRECOGNISED_NAME, Hello, HelloError, HelloReader},
    limits::{CONNECT_TIMEOUT, HELLO_TIMEOUT, Limits, raise_descriptors},
    metrics::{self, Counts, MetricsServer, Observed, Refusal},
    places::{Full, Places, Routed, Source, Waiting},
    relay::relay,
    routes::Route,
    socket::tune,
    table::Table,
};

/// Pause after the system refused to accept (out of descriptors): it does not get better by asking at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections the kernel keeps until they are accepted.
const BACKLOG: u32 = 1024;
/// One read of a ClientHello; ours comes in one.
const READ_BYTES: usize = 4096;
/// Silence after which the kernel asks whether an end is there; a dead one is noticed within about 40 s.
const TCP_KEEPALIVE_IDLE: Duration = Duration::from_secs(20);
/// How long a refused client may take to fetch its alert.
const ALERT_TIMEOUT: Duration = Duration::from_secs(1);
/// At most one line in the log for each kind of refusal in this time.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// How to run.
#[derive(Clone, Debug)]
pub struct Options {
    pub listen: SocketAddr,
    /// The routes file ([`routes`](crate::routes)).
    pub routes: PathBuf,
    /// Where metrics and health are served over plain HTTP.
    pub metrics: Option<SocketAddr>,
    /// How long connections may go on after the order to end.
    pub drain: Duration,
    pub limits: Limits,
}

/// Why a gateway cannot start.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} ({what}): {error}; choose another address or port, or end what listens there")]
pub struct GatewayError {
    what: &'static str,
    address: SocketAddr,
    error: io::Error,
}

/// A bound gateway.
pub struct Gateway {
    listener: TcpListener,
    local: SocketAddr,
    drain: Duration,
    shared: Arc<Shared>,
    metrics: Option<MetricsServer>,
}

struct Shared {
    observed: Observed,
    /// When each kind of refusal was last logged, and how many were not.
    logged: Mutex<HashMap<Refusal, (Instant, u64)>>,
}

impl Gateway {
    /// Binds, and reads the routes once.
    pub async fn bind(options: Options) -> Result<Gateway, GatewayError> {
        let refuse = |what, address| move |error| GatewayError { what, address, error };
        let listener = listen(options.listen).map_err(refuse("listen", options.listen))?;
        let local = listener.local_addr().map_err(refuse("listen", options.listen))?;
        let limits = options.limits.fit(raise_descriptors());
        if limits != options.limits {
            tracing::warn!(
                ?limits,
                wanted = options.limits.descriptors(),
                "too few descriptors (ulimit -n) for the usual limits"
            );
        }
        let table = Arc::new(Table::open(&options.routes));
        let observed = Observed { counts: Counts::default(), places: Places::new(limits), table };
        let metrics = match options.metrics {
            Some(at) => Some(metrics::serve(at, observed.clone()).await.map_err(refuse("metrics", at))?),
            None => None,
        };
        let shared = Arc::new(Shared { observed, logged: Mutex::default() });
        Ok(Gateway { listener, local, drain: options.drain, shared, metrics })
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    pub fn metrics_addr(&self) -> Option<SocketAddr> {
        self.metrics.as_ref().map(|server| server.address)
    }

    pub fn observed(&self) -> &Observed {
        &self.shared.observed
    }

    /// Serves until `stop` resolves; then accepts nothing more, lets connections end for the time of `drain`, and ends them.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let watching = tokio::spawn(Arc::clone(&self.shared.observed.table).watch());
        // Told when only routed connections may go on.
        let (ending, told) = watch::channel(false);
        let mut connections = JoinSet::new();
        tokio::pin!(stop);
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                // A JoinSet keeps what its tasks returned until it is asked.
                Some(_) = connections.join_next() => continue,
                () = &mut stop => break,
            };
            match accepted {
                Ok((stream, from)) => {
                    self.shared.observed.counts.accepted.inc();
                    // The place is taken before the task runs: a flood of unstarted tasks would be unbounded.
                    let waiting = self.shared.observed.places.wait(Source::from(from.ip()));
                    connections.spawn(Arc::clone(&self.shared).connection(stream, from, waiting, told.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept connections now");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(self.listener);
        watching.abort();
        ending.send_replace(true);
        tracing::info!(open = connections.len(), drain_seconds = self.drain.as_secs_f64(), "ending");
        let all = async { while connections.join_next().await.is_some() {} };
        if timeout(self.drain, all).await.is_err() {
            tracing::info!(open = connections.len(), "connections are cut; sidecars dial again");
            connections.shutdown().await;
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
        SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

impl Shared {
    /// The whole life of one connection.
    async fn connection(
        self: Arc<Self>,
        mut client: TcpStream,
        from: SocketAddr,
        mut waiting: Waiting,
        mut told: watch::Receiver<bool>,
    ) {
        let hello = tokio::select! {
            hello = timeout(HELLO_TIMEOUT, read_hello(&mut client)) => hello.unwrap_or(Err(NoHello::Late)),
            _ = &mut waiting.evicted => Err(NoHello::Evicted),
            _ = told.wait_for(|ending| *ending) => return,
        };
        let hello = match hello {
            Ok(hello) => hello,
            Err(why) => return self.refuse(why.refusal(), from, &why, why.alert(), client).await,
        };
        let Some(route) = self.observed.table.routes().find(&hello.server_name) else {
            let why = format!("no route for server name {}", hello.server_name);
            return self.refuse(Refusal::UnknownServerName, from, &why, Some(ALERT_UNRECOGNISED_NAME), client).await;
        };
        let place = match waiting.route(Arc::clone(&route.server_name)) {
            Ok(place) => place,
            Err(full) => return self.refuse(full.into(), from, &full, None, client).await,
        };
        match reach(&route, &hello).await {
            Ok(pod) => self.routed(client, pod, place).await,
            Err(error) => {
                let why = format!("{} at {}: {error}", route.server_name, route.address);
                self.refuse(Refusal::Unreachable, from, &why, Some(ALERT_INTERNAL_ERROR), client).await;
            }
        }
    }

    async fn routed(&self, client: TcpStream, pod: TcpStream, place: Routed) {
        let counts = &self.observed.counts;
        counts.routed.inc();
        if let Err(error) = relay(client, pod, &counts.bytes).await {
            tracing::debug!(%error, "a connection broke");
        }
        drop(place);
    }

    async fn refuse(
        &self,
        reason: Refusal,
        from: SocketAddr,
        why: &(dyn std::fmt::Display + Sync),
        alert: Option<[u8; 7]>,
        mut client: TcpStream,
    ) {
        self.observed.counts.refuse(reason);
        if let Some(unsaid) = self.may_log(reason) {
            tracing::warn!(%from, ?reason, %why, unsaid, "connection refused");
        }
        if let Some(alert) = alert {
            // Whether the client reads it is the client's affair.
            let _ = timeout(ALERT_TIMEOUT, async {
                client.write_all(&alert).await?;
                client.shutdown().await
            })
            .await;
        }
    }

    /// How many refusals of this kind were not logged since the last line; `None`: not yet again.
    fn may_log(&self, reason: Refusal) -> Option<u64> {
        let mut logged = self.logged.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match logged.get_mut(&reason) {
            Some((last, unsaid)) if last.elapsed() < LOG_INTERVAL => {
                *unsaid += 1;
                None
            }
            Some((last, unsaid)) => {
                *last = Instant::now();
                Some(std::mem::take(unsaid))
            }
            None => {
                logged.insert(reason, (Instant::now(), 0));
                Some(0)
            }
        }
    }
}

/// Connects to the sidecar and hands it what the client has said so far.
async fn reach(route: &Route, hello: &Hello) -> io::Result<TcpStream> {
    let connect = async {
        let mut pod = TcpStream::connect(&*route.address).await?;
        tune(&pod, TCP_KEEPALIVE_IDLE)?;
        pod.write_all(&hello.bytes).await?;
        Ok(pod)
    };
    timeout(CONNECT_TIMEOUT, connect).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Why a connection has not named its pair.
#[derive(Debug, thiserror::Error)]
enum NoHello {
    #[error("no whole ClientHello within {HELLO_TIMEOUT:?}")]
    Late,
    #[error("it ended before its ClientHello was whole")]
    Gone,
    #[error("too many connections wait; the oldest of the source with the most has to go")]
    Evicted,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Hello(#[from] HelloError),
}

impl NoHello {
    fn refusal(&self) -> Refusal {
        match self {
            NoHello::Late => Refusal::HelloTimeout,
            NoHello::Gone | NoHello::Io(_) => Refusal::Gone,
            NoHello::Evicted => Refusal::Evicted,
            NoHello::Hello(HelloError::NotTls(_)) => Refusal::NotTls,
            NoHello::Hello(HelloError::TooLong) => Refusal::HelloTooLong,
            NoHello::Hello(HelloError::NoName) => Refusal::NoServerName,
        }
    }

    /// Only to those who speak TLS.
    fn alert(&self) -> Option<[u8; 7]> {
        match self {
            NoHello::Hello(HelloError::NoName) => Some(ALERT_UNRECOGNISED_NAME),
            NoHello::Hello(HelloError::NotTls(_) | HelloError::TooLong)
            | NoHello::Late
            | NoHello::Gone
            | NoHello::Evicted
            | NoHello::Io(_) => None,
        }
    }
}

impl From<Full> for Refusal {
    fn from(full: Full) -> Self {
        match full {
            Full::Gateway => Refusal::GatewayFull,
            Full::Source => Refusal::SourceFull,
            Full::Route => Refusal::RouteFull,
        }
    }
}

async fn read_hello(client: &mut TcpStream) -> Result<Hello, NoHello> {
    tune(client, TCP_KEEPALIVE_IDLE)?;
    let mut reader = HelloReader::default();
    // A silent client has no buffer yet.
    client.readable().await?;
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let room = reader.room().min(READ_BYTES);
        let read = client.read(&mut buffer[..room]).await?;
        if read == 0 {
            return Err(NoHello::Gone);
        }
        if let Some(hello) = reader.feed(&buffer[..read])? {
            return Ok(hello);
        }
    }
}
