//! A local file or device as a [`GuestDisk`]: inline while that is fast, on a thread that may wait otherwise.
//!
//! Where a request runs:
//! ```text
//! submit ─ before() ─┬─ Refuse ────────────────────────────────────────────────────▶ complete
//!                    ├─ Go ─┬─ cached read, fast write ── on this thread ─ after() ─▶ complete
//!                    │      └─ anything slow ──────────┐
//!                    └─ Blocking ── before_blocking() ─┴─ on a thread that may wait ─ after() ─▶ complete
//! ```
//! A thread that may wait is this one if it can step aside (a reader whose colleague takes over), else one of the pool.
//! A flush, and a write with FUA once it is written, joins the group that waits for the next fdatasync.
//!
//! [`Around`] is how a wrapper does "mark, then write, then complete": its prologue runs before the I/O on whichever
//! thread the request is on, its epilogue on the thread that did the I/O, and what the one tells the other travels
//! inside the job. It is a type parameter: no boxing, no second dispatch, nothing at all for [`Plain`].
//!
//! Invariants: for every request exactly one of refuse or (prologue, I/O, epilogue), then exactly one completion; the
//! epilogue has run before the completion; a request is in the pool at most once at a time.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use watari_core::front::{Allocation, Detach, DiskInfo, Errno, GuestDisk, Op, Request};

use super::file::{LocalFile, OpenError, Zeroing};
use super::flush::FlushGroup;
use super::pace::Pace;
use super::pool::{IoPool, Job};
use crate::crew::{more_at_hand, step_aside};

/// An inline operation that takes longer than this (plus its copying) waited for something.
const SLOW_OPERATION: Duration = Duration::from_micros(150);
/// Handing a flush to the pool costs two thread switches; below this it is not worth it.
const SLOW_FLUSH: Duration = Duration::from_micros(50);
/// fdatasyncs of one disk at once: one that writes pages while another waits for the device, and some slack.
const FLUSHES_AT_ONCE: usize = 4;
/// A write from this length on is worth a second processor while more requests are at hand, in bytes: copying it
/// takes several times as long as passing the reading role on.
const LARGE_WRITE_BYTES: u64 = 32 << 10;
/// Threads per disk: as many as QEMU or fio keep requests in flight, so that a slow disk sees its queue depth.
const POOL_THREADS: usize = 32;

/// The answer of a prologue.
pub enum Prologue<T> {
    /// Do the I/O; `T` comes back in [`Around::after`].
    Go(T),
    /// Cannot be decided without waiting: call [`Around::before_blocking`] where waiting is allowed.
    Blocking,
    /// Complete with this error, no I/O, no epilogue.
    Refuse(Errno),
}

/// What a wrapper does around every request of a [`LocalDisk`]. The tracked disk marks in `before` and counts the write out
/// in `after`. All methods run on many threads at once.
pub trait Around: Send + Sync + Sized + 'static {
    /// Travels from prologue to epilogue with the request.
    type Ticket: Send + 'static;

    /// Prologue on the submitting thread. Must not block: others of the same connection wait behind it.
    fn before(&self, request: &Request) -> Prologue<Self::Ticket>;

    /// The prologue's slow path, on a thread that may wait, after [`Prologue::Blocking`]. May wait for local disks (a region
    /// log, old content to be preserved, read through `file`), never for the peer.
    fn before_blocking(&self, request: &Request, file: &LocalFile) -> Result<Self::Ticket, Errno>;

    /// Epilogue, before the completion is delivered; returns the result to deliver. `request.data` is still there.
    fn after(&self, request: &Request, ticket: Self::Ticket, result: Result<(), Errno>) -> Result<(), Errno>;
}

/// Around nothing: a disk that only does I/O.
pub struct Plain;

impl Around for Plain {
    type Ticket = ();
    fn before(&self, _: &Request) -> Prologue<()> {
        Prologue::Go(())
    }
    fn before_blocking(&self, _: &Request, _: &LocalFile) -> Result<(), Errno> {
        Ok(())
    }
    fn after(&self, _: &Request, (): (), result: Result<(), Errno>) -> Result<(), Errno> {
        result
    }
}

/// Shared with the rest of the engine.
impl<A: Around> Around for Arc<A> {
    type Ticket = A::Ticket;
    fn before(&self, request: &Request) -> Prologue<A::Ticket> {
        A::before(self, request)
    }
    fn before_blocking(&self, request: &Request, file: &LocalFile) -> Result<A::Ticket, Errno> {
        A::before_blocking(self, request, file)
    }
    fn after(&self, request: &Request, ticket: A::Ticket, result: Result<(), Errno>) -> Result<(), Errno> {
        A::after(self, request, ticket, result)
    }
}

/// How to open a [`LocalDisk`].
#[derive(Clone, Debug)]
pub struct LocalDiskConfig {
    /// Export name.
    pub name: String,
    /// Recorded size in bytes, at most the actual one; `None` takes the actual one.
    pub size_bytes: Option<u64>,
    pub read_only: bool,
    /// Bound of the pool, at least 1.
    pub pool_threads: usize,
}

impl LocalDiskConfig {
    pub fn new(name: impl Into<String>) -> Self {
        LocalDiskConfig { name: name.into(), size_bytes: None, read_only: false, pool_threads: POOL_THREADS }
    }
}

/// A local disk without a wrapper.
pub type FileDisk = LocalDisk<Plain>;

/// A local disk, and what a wrapper does around its requests.
pub struct LocalDisk<A: Around = Plain> {
    core: Arc<Core<A>>,
    pool: IoPool<Task<A>>,
}

struct Core<A: Around> {
    name: String,
    file: LocalFile,
    around: A,
    reads: Pace,
    writes: Pace,
    zeroes: Pace,
    flushes: Pace,
    group: FlushGroup<(Request, A::Ticket)>,
}

/// What the pool does.
struct Task<A: Around> {
    core: Arc<Core<A>>,
    step: Step<A>,
}

enum Step<A: Around> {
    /// From the blocking prologue on.
    Prologue(Request),
    /// The I/O; of a read the first bytes may be there already.
    Io(Request, A::Ticket, usize),
    /// Lead the flush group.
    Lead,
}

impl FileDisk {
    /// Open a disk without a wrapper.
    pub fn open(path: &Path, config: LocalDiskConfig) -> Result<FileDisk, OpenError> {
        LocalDisk::open_around(path, config, Plain)
    }
}

impl<A: Around> LocalDisk<A> {
    /// Open `path` and put `around` around its requests.
    pub fn open_around(path: &Path, config: LocalDiskConfig, around: A) -> Result<Self, OpenError> {
        let file = LocalFile::open(path, config.size_bytes, config.read_only)?;
        Ok(Self::new(file, config, around))
    }

    /// The same over an open file; `size_bytes` and `read_only` of the configuration are the file's.
    pub fn new(file: LocalFile, config: LocalDiskConfig, around: A) -> Self {
        let pool = IoPool::new(&config.name, config.pool_threads);
        let core = Core {
            name: config.name,
            file,
            around,
            reads: Pace::new(SLOW_OPERATION),
            writes: Pace::new(SLOW_OPERATION),
            zeroes: Pace::new(SLOW_OPERATION),
            flushes: Pace::new(SLOW_FLUSH),
            group: FlushGroup::new(FLUSHES_AT_ONCE),
        };
        LocalDisk { core: Arc::new(core), pool }
    }

    /// The backing, for I/O that is not the guest's. No prologue or epilogue is run for it.
    pub fn file(&self) -> &LocalFile {
        &self.core.file
    }

    pub fn around(&self) -> &A {
        &self.core.around
    }

    /// Do a guest request. Returns without waiting for the disk, unless the disk turns out slow for the first time.
    pub fn submit(&self, request: Request) {
        match self.core.around.before(&request) {
            Prologue::Go(ticket) => self.start(request, ticket),
            Prologue::Blocking => self.push(Step::Prologue(request)),
            Prologue::Refuse(errno) => finish(request, Err(errno)),
        }
    }

    fn start(&self, mut request: Request, ticket: A::Ticket) {
        let core = &self.core;
        let inline = match request.op {
            Op::Read => match core.file.read_cached_at(request.offset, &mut request.data) {
                Some(filled) if filled == request.data.len() => return core.done(request, ticket, Ok(())),
                Some(filled) => return self.push(Step::Io(request, ticket, filled)),
                None => core.reads.inline(),
            },
            Op::Write if core.writes.inline() => {
                // The payload is in this processor's cache, so it is written here; let a colleague receive the next.
                if request.length >= LARGE_WRITE_BYTES && more_at_hand() {
                    let _with_or_without = step_aside();
                }
                true
            }
            Op::Write => false,
            Op::Discard | Op::WriteZeroes { .. } => core.zeroes.inline(),
            Op::Flush => return self.flush(request, ticket),
            Op::Cache => false,
        };
        if !inline {
            return self.push(Step::Io(request, ticket, 0));
        }
        let result = core.io(&mut request, 0);
        if request.fua && result.is_ok() {
            return self.flush(request, ticket);
        }
        core.done(request, ticket, result);
    }

    fn flush(&self, request: Request, ticket: A::Ticket) {
        if self.core.group.join((request, ticket)) {
            // More than one round is somebody else's wait: not on a thread that reads.
            if !self.core.flushes.inline() || self.core.lead_round() {
                self.push(Step::Lead);
            }
        }
    }

    /// Do the step where waiting holds up nobody.
    fn push(&self, step: Step<A>) {
        if step_aside() {
            self.core.step(step);
        } else {
            self.pool.push(Task { core: self.core.clone(), step });
        }
    }
}

impl<A: Around> Job for Task<A> {
    fn run(self) {
        self.core.step(self.step);
    }
}

impl<A: Around> Core<A> {
    /// On a thread that may wait.
    fn step(&self, step: Step<A>) {
        match step {
            Step::Prologue(request) => match self.around.before_blocking(&request, &self.file) {
                Ok(ticket) => self.io_and_done(request, ticket, 0),
                Err(errno) => finish(request, Err(errno)),
            },
            Step::Io(request, ticket, filled) => self.io_and_done(request, ticket, filled),
            Step::Lead => self.lead(),
        }
    }

    /// Everything from the I/O on.
    fn io_and_done(&self, mut request: Request, ticket: A::Ticket, filled: usize) {
        let flushes = request.op == Op::Flush;
        let result = if flushes { Ok(()) } else { self.io(&mut request, filled) };
        if (flushes || request.fua) && result.is_ok() {
            if self.group.join((request, ticket)) {
                self.lead();
            }
            return;
        }
        self.done(request, ticket, result);
    }

    /// The blocking operation itself, timed. `filled` bytes of a read are there already.
    fn io(&self, request: &mut Request, filled: usize) -> Result<(), Errno> {
        let began = Instant::now();
        let file = &self.file;
        let (pace, copied, result) = match request.op {
            Op::Read => {
                let result = file.read_at(request.offset + filled as u64, &mut request.data[filled..]);
                (&self.reads, request.length, result)
            }
            Op::Write => (&self.writes, request.length, file.write_at(request.offset, &request.data)),
            Op::Discard | Op::WriteZeroes { no_hole: false } => {
                (&self.zeroes, 0, file.zero_at(request.offset, request.length, Zeroing::Punch))
            }
            Op::WriteZeroes { no_hole: true } => {
                (&self.zeroes, 0, file.zero_at(request.offset, request.length, Zeroing::Allocated))
            }
            Op::Cache => {
                file.prefetch(request.offset, request.length);
                return Ok(());
            }
            // A flush has no I/O of its own; the group does it.
            Op::Flush => return Ok(()),
        };
        pace.record(began.elapsed(), copied);
        result
    }

    fn lead(&self) {
        while self.lead_round() {}
    }

    /// One fdatasync for everybody who waits; `true` if others wait for the next.
    fn lead_round(&self) -> bool {
        let sync = || {
            let began = Instant::now();
            let result = self.file.flush();
            self.flushes.record(began.elapsed(), 0);
            result
        };
        self.group.round(sync, |(request, ticket), result| self.done(request, ticket, result))
    }

    fn done(&self, request: Request, ticket: A::Ticket, result: Result<(), Errno>) {
        let result = self.around.after(&request, ticket, result);
        finish(request, result);
    }
}

fn finish(request: Request, result: Result<(), Errno>) {
    let Request { id, data, reply, .. } = request;
    reply.complete(id, result, data);
}

impl<A: Around> GuestDisk for LocalDisk<A> {
    fn info(&self) -> DiskInfo {
        DiskInfo {
            name: self.core.name.clone(),
            size_bytes: self.core.file.size_bytes(),
            read_only: self.core.file.read_only(),
        }
    }
    fn attach(&self, _connection: u64) -> Result<(), String> {
        Ok(())
    }
    fn detach(&self, _connection: u64, _how: Detach) {}
    fn submit(&self, request: Request) {
        LocalDisk::submit(self, request);
    }
    fn allocation(&self, offset: u64, length: u64) -> Result<Vec<Allocation>, Errno> {
        self.core.file.allocation(offset, length)
    }
    fn zeroes_are_fast(&self, no_hole: bool) -> bool {
        self.core.file.zeroes_are_fast(if no_hole { Zeroing::Allocated } else { Zeroing::Punch })
    }
}
