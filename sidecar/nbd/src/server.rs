//! One listening socket and the clients on it.
//!
//! Invariants: at most [`Limits::connections`] clients at once; when all places are taken, a client that shows no sign of
//! life (a handshake that hangs, replies that nobody takes) loses its place to a newcomer, anybody else keeps it;
//! shutting down accepts nobody any more, answers what is outstanding, and ends every thread of the server.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::Shutdown;

use crate::connection::{self, Entry};
use crate::crew::STACK_BYTES;
use crate::exports::Exports;
use crate::limits::Limits;
pub use crate::link::Counters;
pub use crate::listener::BindError;
use crate::listener::SocketPath;
use crate::lock;

/// A handshake that takes longer than this may lose its place when all are taken.
const HANDSHAKE_GRACE: Duration = Duration::from_secs(1);
/// How long a newcomer waits for a place that was just taken from another.
const EVICTION_WAIT: Duration = Duration::from_secs(1);
/// Pause after an accept that failed for lack of resources.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connection numbers are unique in the process, so that one disk on several servers can tell them apart.
static NEXT_CONNECTION: AtomicU64 = AtomicU64::new(1);

/// Where and how to serve.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Path of the unix socket, at most 107 bytes.
    pub path: PathBuf,
    /// Permission bits of the socket: who may connect.
    pub mode: u32,
    pub limits: Limits,
}

impl ServerConfig {
    /// Owner only, default limits.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        ServerConfig { path: path.into(), mode: 0o600, limits: Limits::default() }
    }
}

/// One client, for status and tests.
#[derive(Clone, Debug)]
pub struct ConnectionReport {
    /// The number that [`GuestDisk::attach`](watari_core::front::GuestDisk::attach) got.
    pub id: u64,
    /// `None` while it is in the handshake.
    pub export: Option<String>,
    pub counters: Counters,
    /// Requests whose reply the client has not taken, and the bytes of their payloads.
    pub outstanding_requests: usize,
    pub outstanding_bytes: usize,
    /// How long the client has taken nothing of a waiting reply.
    pub blocked: Option<Duration>,
}

/// The server's own view, for status and tests.
#[derive(Clone, Debug)]
pub struct ServerReport {
    pub path: PathBuf,
    pub accepted: u64,
    /// Turned away because all places were taken.
    pub refused: u64,
    /// Lost their place to a newcomer.
    pub evicted: u64,
    pub connections: Vec<ConnectionReport>,
}

/// A server on one socket. Dropping it shuts it down without waiting.
pub struct Server {
    shared: Arc<Shared>,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    socket: SocketPath,
    exports: Arc<dyn Exports>,
    limits: Limits,
    stopping: AtomicBool,
    register: Mutex<Register>,
    /// Signalled whenever a connection has ended.
    ended: Condvar,
}

#[derive(Default)]
struct Register {
    entries: HashMap<u64, Arc<Entry>>,
    accepted: u64,
    refused: u64,
    evicted: u64,
}

impl Server {
    /// Take the socket path. Clients can connect from now on and are answered once [`Server::serve`] was called.
    pub fn bind(config: ServerConfig, exports: Arc<dyn Exports>) -> Result<Server, BindError> {
        let socket = SocketPath::bind(&config.path, config.mode)?;
        let shared = Shared {
            socket,
            exports,
            limits: config.limits,
            stopping: AtomicBool::new(false),
            register: Mutex::new(Register::default()),
            ended: Condvar::new(),
        };
        Ok(Server { shared: Arc::new(shared), acceptor: Mutex::new(None) })
    }

    /// Begin to accept clients, on threads of the server. Calling it again does nothing.
    pub fn serve(&self) -> std::io::Result<()> {
        let mut acceptor = lock(&self.acceptor);
        if acceptor.is_none() {
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new().name("nbd-accept".into()).stack_size(128 << 10);
            *acceptor = Some(thread.spawn(move || shared.accept_clients())?);
        }
        Ok(())
    }

    pub fn path(&self) -> &Path {
        self.shared.socket.path()
    }

    pub fn report(&self) -> ServerReport {
        let register = lock(&self.shared.register);
        let connections = register.entries.values().map(|entry| report(entry)).collect();
        ServerReport {
            path: self.path().into(),
            accepted: register.accepted,
            refused: register.refused,
            evicted: register.evicted,
            connections,
        }
    }

    /// Accept nobody any more, remove the path, finish what clients have asked for, and wait for them to be gone, at
    /// most `patience`; then cut off the rest. Returns whether every client was gone in time. Requests that the disk
    /// still holds keep their threads until it completes them.
    pub fn shutdown(&self, patience: Duration) -> bool {
        self.stop();
        if let Some(acceptor) = lock(&self.acceptor).take() {
            let _panicked = acceptor.join();
        }
        if self.shared.wait_for_clients(patience) {
            return true;
        }
        for entry in lock(&self.shared.register).entries.values() {
            let _gone = rustix::net::shutdown(&*entry.socket, Shutdown::Both);
        }
        self.shared.wait_for_clients(Duration::from_secs(1));
        false
    }

    fn stop(&self) {
        if self.shared.stopping.swap(true, Ordering::AcqRel) {
            return;
        }
        self.shared.socket.unlink();
        // Wakes the accept loop, and the readers of all clients once they have read what was sent before.
        let _woken = rustix::net::shutdown(self.shared.socket.listener(), Shutdown::Read);
        for entry in lock(&self.shared.register).entries.values() {
            let _gone = rustix::net::shutdown(&*entry.socket, Shutdown::Read);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn report(entry: &Entry) -> ConnectionReport {
    let link = entry.link.get();
    let (outstanding_requests, outstanding_bytes) = link.map_or((0, 0), |link| link.outstanding());
    ConnectionReport {
        id: entry.id,
        export: lock(&entry.export).clone(),
        counters: link.map_or_else(Counters::default, |link| link.counters()),
        outstanding_requests,
        outstanding_bytes,
        blocked: link.and_then(|link| link.blocked_since()).map(|since| since.elapsed()),
    }
}

impl Shared {
    fn accept_clients(self: Arc<Self>) {
        while !self.stopping.load(Ordering::Acquire) {
            match self.socket.listener().accept() {
                Ok((socket, _)) => self.admit(socket),
                Err(_) if self.stopping.load(Ordering::Acquire) => {}
                Err(error) => {
                    tracing::warn!(path = %self.socket.path().display(), %error, "cannot accept an NBD client");
                    std::thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, socket: UnixStream) {
        let entry = Arc::new(Entry::new(NEXT_CONNECTION.fetch_add(1, Ordering::Relaxed), socket));
        if !self.enter(&entry) {
            tracing::warn!(limit = self.limits.connections, "all NBD connections are taken; a client was turned away");
            return;
        }
        let (shared, moved) = (self.clone(), entry.clone());
        let thread = std::thread::Builder::new().name(format!("nbd-{}", entry.id)).stack_size(STACK_BYTES);
        let spawned = thread.spawn(move || {
            let (at_end, gone) = (shared.clone(), moved.clone());
            let left = move || at_end.leave(&gone);
            connection::serve(&moved, &*shared.exports, &shared.limits, &shared.stopping, left);
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for an NBD client; it was turned away");
            self.leave(&entry);
        }
    }

    /// Register a newcomer, if need be in the place of one that shows no sign of life.
    fn enter(&self, entry: &Arc<Entry>) -> bool {
        let mut register = lock(&self.register);
        if register.entries.len() >= self.limits.connections
            && let Some(victim) = register.entries.values().find(|entry| self.lifeless(entry)).cloned()
        {
            register.evicted += 1;
            tracing::warn!(connection = victim.id, "an NBD client without a sign of life lost its place to another");
            let _gone = rustix::net::shutdown(&*victim.socket, Shutdown::Both);
            let full = |register: &mut Register| register.entries.len() >= self.limits.connections;
            let waited = self.ended.wait_timeout_while(register, EVICTION_WAIT, full);
            register = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if register.entries.len() >= self.limits.connections {
            register.refused += 1;
            return false;
        }
        register.accepted += 1;
        register.entries.insert(entry.id, entry.clone());
        drop(register);
        if self.stopping.load(Ordering::Acquire) {
            // It may have been registered after the round that told everybody.
            let _gone = rustix::net::shutdown(&*entry.socket, Shutdown::Read);
        }
        true
    }

    fn lifeless(&self, entry: &Entry) -> bool {
        let since = |at: Instant, limit: Duration| at.elapsed() >= limit;
        match entry.link.get() {
            None => since(entry.accepted, HANDSHAKE_GRACE),
            Some(link) => link.blocked_since().is_some_and(|at| since(at, self.limits.stalled_after)),
        }
    }

    fn leave(&self, entry: &Entry) {
        let _gone = rustix::net::shutdown(&*entry.socket, Shutdown::Both);
        lock(&self.register).entries.remove(&entry.id);
        self.ended.notify_all();
    }

    fn wait_for_clients(&self, patience: Duration) -> bool {
        let register = lock(&self.register);
        let some = |register: &mut Register| !register.entries.is_empty();
        let waited = self.ended.wait_timeout_while(register, patience, some);
        waited.unwrap_or_else(PoisonError::into_inner).0.entries.is_empty()
    }
}
