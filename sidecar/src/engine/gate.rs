//! The disk that the guest sees: served here, served through the peer, held, or refused ([`Gate`], design §3.5).
//!
//! Invariants: **I6** outside [`Gate::Serve`] no guest write reaches the local disk; **I8** only here does a guest
//! request wait on the peer, and at most [`HOLD`], then EIO (QEMU pauses and retries); FLUSH always succeeds.
//! It does not decide gates; the role thread does.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::SeqCst},
    },
    time::Instant,
};

use watari_core::{
    front::{Allocation, Detach, DiskInfo, Errno, GuestDisk, Op, Request},
    geometry::DiskIndex,
    handover::Gate,
};
use watari_nbd::local::LocalDisk;

use super::{connections::Connections, tracking::Tracking};
use crate::config::HOLD;

/// What the guest's behaviour tells the role thread.
pub trait GuestEvents: Send + Sync {
    /// A QEMU wants to attach while this side does not serve; `Err` is the reason for refusing.
    fn may_attach(&self) -> Result<(), String>;
    /// The first connection to any disk.
    fn attached(&self);
    /// The last connection to any disk is gone.
    fn left(&self, how: Detach);
    /// A request that needs the right to write.
    fn wants_write(&self);
    /// The source's QEMU has left, so a read here comes from a running guest.
    fn source_left(&self) -> bool;
    /// Fetch bytes from the peer; the request comes back completed, or through [`GateDisk::retry`] when it broke.
    fn read_remote(&self, disk: DiskIndex, request: Request, deadline: Instant);
}

const DEAD: &str = "this side must not serve this VM: see `watari-sidecar status` for its role and the next step";

fn encode(gate: Gate) -> u8 {
    match gate {
        Gate::Serve => 0,
        Gate::Hold => 1,
        Gate::Remote => 2,
        Gate::Dead => 3,
    }
}

fn decode(gate: u8) -> Gate {
    match gate {
        0 => Gate::Serve,
        1 => Gate::Hold,
        2 => Gate::Remote,
        _ => Gate::Dead,
    }
}

/// See the module's header.
pub struct GateDisk {
    index: DiskIndex,
    local: LocalDisk<Tracking>,
    gate: AtomicU8,
    /// How often the gate was closed for good: a connection made before stays dead, whatever follows (design §3.6).
    deaths: AtomicU64,
    held: Mutex<Vec<(Instant, Request)>>,
    connections: Arc<Connections>,
    clients: AtomicU32,
    events: Arc<dyn GuestEvents>,
}

impl GateDisk {
    pub fn new(
        index: DiskIndex,
        local: LocalDisk<Tracking>,
        gate: Gate,
        connections: Arc<Connections>,
        events: Arc<dyn GuestEvents>,
    ) -> Self {
        GateDisk {
            index,
            local,
            gate: AtomicU8::new(encode(gate)),
            deaths: AtomicU64::new(0),
            held: Mutex::default(),
            connections,
            clients: AtomicU32::new(0),
            events,
        }
    }

    pub fn local(&self) -> &LocalDisk<Tracking> {
        &self.local
    }

    pub fn gate(&self) -> Gate {
        decode(self.gate.load(SeqCst))
    }

    /// To be remembered by a connection when it is made and compared at each of its requests.
    pub fn deaths(&self) -> u64 {
        self.deaths.load(SeqCst)
    }

    pub fn clients(&self) -> u32 {
        self.clients.load(SeqCst)
    }

    /// Change the gate and send what was held through it again.
    pub fn set_gate(&self, gate: Gate) {
        if gate == Gate::Dead {
            self.deaths.fetch_add(1, SeqCst);
        }
        self.gate.store(encode(gate), SeqCst);
        let held = std::mem::take(&mut *self.held());
        for (deadline, request) in held {
            self.route(request, deadline);
        }
    }

    /// Requests held for too long fail, so that QEMU pauses the guest (`werror=stop`) instead of hanging it.
    pub fn expire(&self, now: Instant) {
        let mut held = self.held();
        let (late, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut *held).into_iter().partition(|(d, _)| *d <= now);
        *held = rest;
        drop(held);
        for (_, request) in late {
            tracing::warn!(disk = self.index.0, op = ?request.op, "a guest request was held for {HOLD:?}: EIO");
            finish(request, Err(Errno::Io));
        }
    }

    /// A remote read that broke with its connection: whatever the gate says now.
    pub fn retry(&self, request: Request, deadline: Instant) {
        if Instant::now() >= deadline {
            return finish(request, Err(Errno::Io));
        }
        if self.gate() == Gate::Remote {
            // The connection is gone: wait in line for the next one, or for another gate.
            self.held().push((deadline, request));
        } else {
            self.route(request, deadline);
        }
    }

    /// The peer is back: send what waited for it again.
    pub fn release(&self) {
        self.set_gate(self.gate());
    }

    fn held(&self) -> MutexGuard<'_, Vec<(Instant, Request)>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hold(&self, request: Request, deadline: Instant) {
        let mut held = self.held();
        held.push((deadline, request));
        // The gate may have opened between the look and the push.
        if self.gate() == Gate::Serve {
            let held = std::mem::take(&mut *held);
            for (_, request) in held {
                self.local.submit(request);
            }
        }
    }

    fn route(&self, request: Request, deadline: Instant) {
        match (self.gate(), request.op) {
            (Gate::Serve, _) | (Gate::Hold, Op::Flush) => self.local.submit(request),
            (Gate::Remote | Gate::Dead, Op::Flush) | (Gate::Hold | Gate::Remote, Op::Cache) => finish(request, Ok(())),
            (Gate::Dead, _) => finish(request, Err(Errno::Io)),
            (Gate::Remote, Op::Read) => {
                if self.events.source_left() {
                    self.events.wants_write();
                }
                self.events.read_remote(self.index, request, deadline);
            }
            (Gate::Remote, Op::Write | Op::Discard | Op::WriteZeroes { .. }) => {
                self.hold(request, deadline);
                self.events.wants_write();
            }
            (Gate::Hold, Op::Read | Op::Write | Op::Discard | Op::WriteZeroes { .. }) => self.hold(request, deadline),
        }
    }
}

/// Complete a request.
pub fn finish(request: Request, result: Result<(), Errno>) {
    let Request { id, data, reply, .. } = request;
    reply.complete(id, result, data);
}

impl GuestDisk for GateDisk {
    fn info(&self) -> DiskInfo {
        self.local.info()
    }

    fn attach(&self, connection: u64) -> Result<(), String> {
        self.connections.admit()?;
        match self.gate() {
            Gate::Serve | Gate::Hold => {}
            Gate::Remote => self.events.may_attach()?,
            Gate::Dead => return Err(DEAD.into()),
        }
        let first = self.connections.opened((self.index, connection));
        if self.gate() == Gate::Dead {
            // It was closed for good between the look and the entry.
            self.connections.closed((self.index, connection), Detach::Clean);
            return Err(DEAD.into());
        }
        self.clients.fetch_add(1, SeqCst);
        if first {
            self.events.attached();
        }
        Ok(())
    }

    fn detach(&self, connection: u64, how: Detach) {
        self.clients.fetch_sub(1, SeqCst);
        if let Some(how) = self.connections.closed((self.index, connection), how) {
            self.events.left(how);
        }
    }

    fn submit(&self, request: Request) {
        if self.gate() == Gate::Serve {
            return self.local.submit(request);
        }
        self.route(request, Instant::now() + HOLD);
    }

    fn allocation(&self, offset: u64, length: u64) -> Result<Vec<Allocation>, Errno> {
        match self.gate() {
            Gate::Serve | Gate::Hold => self.local.allocation(offset, length),
            // What is a hole here may be data at the peer.
            Gate::Remote => Ok(vec![Allocation { length, hole: false, zero: false }]),
            Gate::Dead => Err(Errno::Io),
        }
    }

    fn zeroes_are_fast(&self, no_hole: bool) -> bool {
        self.local.zeroes_are_fast(no_hole)
    }
}
