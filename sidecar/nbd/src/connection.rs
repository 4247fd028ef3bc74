//! One client from accept to goodbye, on a thread of its own: handshake under a deadline, then transmission.
//!
//! Invariants: a disk that was attached is detached exactly once, after the last of the connection's requests; a
//! handshake ends by its deadline whatever the client does or does not send, read or write.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::io::Errno as Os;
use watari_core::front::{Detach, GuestDisk};
use watari_core::nbd::{Catalogue, CloseReason, ExportShape, Handshake, Negotiated, Progress, Session};

use crate::crew::Crew;
use crate::exports::Exports;
use crate::inbox::Inbox;
use crate::limits::{Limits, PART_BYTES};
use crate::link::Link;
use crate::lock;
use crate::transmission::Transmission;

/// Send buffer asked of the kernel, in bytes (it gives at most `net.core.wmem_max`): a larger one means fewer wake-ups
/// per byte for a client that reads much.
const SEND_BUFFER_BYTES: usize = 1 << 20;

/// A connection as the server keeps it in its register.
pub(crate) struct Entry {
    pub id: u64,
    pub socket: Arc<UnixStream>,
    pub accepted: Instant,
    /// Export name, once transmission began.
    pub export: Mutex<Option<String>>,
    pub link: OnceLock<Arc<Link>>,
}

impl Entry {
    pub fn new(id: u64, socket: UnixStream) -> Self {
        Entry {
            id,
            socket: Arc::new(socket),
            accepted: Instant::now(),
            export: Mutex::new(None),
            link: OnceLock::new(),
        }
    }
}

/// Serve one client; `left` runs when it is gone, perhaps on another thread of the connection.
pub(crate) fn serve(
    entry: &Entry,
    exports: &dyn Exports,
    limits: &Limits,
    stopping: &AtomicBool,
    left: impl FnOnce() + Send + 'static,
) {
    let mut client = Client { exports, stopping, connection: entry.id, disk: None };
    let mut inbox = Inbox::new();
    let negotiated = negotiate(entry, &mut client, &mut inbox, limits);
    let Some(disk) = client.disk else { return left() };
    match negotiated.and_then(|negotiated| prepare(entry, &negotiated, limits)) {
        Ok((link, session)) => transmit(link, disk, session, inbox, limits.linger, left),
        // Attached, but the last reply of the handshake did not reach the client.
        Err(_) => {
            disk.detach(entry.id, Detach::Lost);
            left();
        }
    }
}

fn prepare(entry: &Entry, negotiated: &Negotiated, limits: &Limits) -> Result<(Arc<Link>, Session), Unfinished> {
    let socket = &entry.socket;
    socket.set_write_timeout(None).map_err(|_| Unfinished::Gone)?;
    socket.set_read_timeout(Some(limits.trim_after)).map_err(|_| Unfinished::Gone)?;
    let _larger_if_allowed = rustix::net::sockopt::set_socket_send_buffer_size(&**socket, SEND_BUFFER_BYTES);
    *lock(&entry.export) = Some(negotiated.export.name.clone());
    let link = entry.link.get_or_init(|| Link::new(entry.id, socket.clone(), limits));
    let session = Session {
        size_bytes: negotiated.export.size_bytes,
        read_only: negotiated.export.read_only,
        structured: negotiated.structured,
        base_allocation: negotiated.base_allocation,
        unfragmented_bytes_max: PART_BYTES,
    };
    Ok((link.clone(), session))
}

fn transmit(
    link: Arc<Link>,
    disk: Arc<dyn GuestDisk>,
    session: Session,
    inbox: Inbox,
    linger: Duration,
    left: impl FnOnce() + Send + 'static,
) {
    let crew = Crew::new(link.id);
    let (id, attached) = (link.id, disk.clone());
    let at_end = Box::new(move |how| {
        attached.detach(id, how);
        left();
    });
    let role = Transmission::new(link, disk, session, inbox, linger, crew.clone(), at_end);
    crew.work(Some(Box::new(role)));
}

/// Why a handshake did not lead to transmission; for the log.
#[derive(Debug, thiserror::Error)]
enum Unfinished {
    #[error("the client left during the handshake")]
    Gone,
    #[error("the handshake was not finished in time")]
    Timeout,
    #[error("the handshake ended: {0:?}")]
    Closed(CloseReason),
}

/// The catalogue as one client sees it; remembers the disk it entered.
struct Client<'a> {
    exports: &'a dyn Exports,
    stopping: &'a AtomicBool,
    connection: u64,
    disk: Option<Arc<dyn GuestDisk>>,
}

impl Catalogue for Client<'_> {
    fn names(&self) -> Vec<String> {
        self.exports.names()
    }

    fn find(&self, name: &str) -> Option<ExportShape> {
        let info = self.exports.open(name)?.info();
        Some(ExportShape { name: info.name, size_bytes: info.size_bytes, read_only: info.read_only })
    }

    fn enter(&mut self, name: &str) -> Result<(), String> {
        let disk = self.exports.open(name).ok_or_else(|| String::from("the export has just gone"))?;
        disk.attach(self.connection)?;
        self.disk = Some(disk);
        Ok(())
    }

    fn shutting_down(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

fn negotiate(
    entry: &Entry,
    client: &mut Client<'_>,
    inbox: &mut Inbox,
    limits: &Limits,
) -> Result<Negotiated, Unfinished> {
    let result = haggle(entry, client, inbox, entry.accepted + limits.handshake_timeout);
    match &result {
        Ok(negotiated) => {
            tracing::info!(connection = entry.id, export = negotiated.export.name, "NBD client entered transmission");
        }
        Err(reason) => tracing::debug!(connection = entry.id, %reason, "NBD handshake without transmission"),
    }
    result
}

fn haggle(
    entry: &Entry,
    client: &mut Client<'_>,
    inbox: &mut Inbox,
    deadline: Instant,
) -> Result<Negotiated, Unfinished> {
    let mut handshake = Handshake::new();
    let mut out = Vec::with_capacity(256);
    out.extend_from_slice(&Handshake::greeting());
    loop {
        send(&entry.socket, &out, deadline)?;
        out.clear();
        let (consumed, progress) = handshake.feed(inbox.received(), client, &mut out);
        inbox.consume(consumed);
        match progress {
            Progress::Continue if consumed == 0 && out.is_empty() => receive(&entry.socket, inbox, deadline)?,
            Progress::Continue => {}
            Progress::Enter(negotiated) => {
                send(&entry.socket, &out, deadline)?;
                return Ok(negotiated);
            }
            Progress::Close(reason) => {
                send(&entry.socket, &out, deadline)?;
                return Err(Unfinished::Closed(reason));
            }
        }
    }
}

fn remaining(deadline: Instant) -> Result<Duration, Unfinished> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(Unfinished::Timeout) } else { Ok(left) }
}

/// Write all of `out`, however slowly the client reads, until the deadline.
fn send(mut socket: &UnixStream, mut out: &[u8], deadline: Instant) -> Result<(), Unfinished> {
    while !out.is_empty() {
        socket.set_write_timeout(Some(remaining(deadline)?)).map_err(|_| Unfinished::Gone)?;
        match socket.write(out) {
            Ok(0) => return Err(Unfinished::Gone),
            Ok(sent) => out = &out[sent..],
            Err(error) => match Os::from_io_error(&error) {
                Some(Os::INTR) => {}
                Some(Os::AGAIN) => return Err(Unfinished::Timeout),
                _ => return Err(Unfinished::Gone),
            },
        }
    }
    Ok(())
}

fn receive(socket: &UnixStream, inbox: &mut Inbox, deadline: Instant) -> Result<(), Unfinished> {
    socket.set_read_timeout(Some(remaining(deadline)?)).map_err(|_| Unfinished::Gone)?;
    match inbox.receive(socket, &mut [], true) {
        Ok((_, 0)) => Err(Unfinished::Gone),
        Ok(_) | Err(Os::INTR) => Ok(()),
        Err(Os::AGAIN) => Err(Unfinished::Timeout),
        Err(_) => Err(Unfinished::Gone),
    }
}
