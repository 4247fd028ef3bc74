//! The seam to the guest: what a front end (NBD now, vhost-user-blk later) asks of a disk.
//!
//! A front end owns its sockets or rings, its threads for them and its replay. It hands [`Request`]s to a
//! [`GuestDisk`], which completes them through the request's [`Completion`] from any thread, in any order, possibly
//! before `submit` returns. `submit` never waits for the peer: a request that must wait (a gate, a remote read) is kept by the
//! disk and completed later. A front end bounds the number and the bytes of its outstanding requests.

use alloc::{sync::Arc, vec::Vec};

/// What the guest wants. Lengths are in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Read,
    Write,
    Flush,
    /// Deallocate; content afterwards reads as zeroes here (we always punch, so that both sites agree).
    Discard,
    /// Write zeroes; `no_hole` asks to keep the range allocated.
    WriteZeroes {
        no_hole: bool,
    },
    /// Prefetch; may do nothing.
    Cache,
}

/// Errors that a guest can see, by their errno.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Errno {
    Perm,
    Io,
    NoMem,
    Invalid,
    NoSpace,
    Overflow,
    NotSupported,
    ShuttingDown,
}

/// Where a finished request goes.
pub trait Completion: Send + Sync {
    /// `data` is the request's buffer coming back: filled for a successful read, for reuse otherwise.
    fn complete(&self, id: u64, result: Result<(), Errno>, data: Vec<u8>);
}

/// One request. Its range has been checked against [`DiskInfo::size_bytes`] by the front end.
pub struct Request {
    /// The front end's own number, handed back on completion.
    pub id: u64,
    pub op: Op,
    pub offset: u64,
    /// Bytes; equals `data.len()` for reads and writes.
    pub length: u64,
    /// The effect must be durable before completion.
    pub fua: bool,
    /// Payload of a write, or the buffer that a read fills. Private to us: a guest cannot change it in flight.
    pub data: Vec<u8>,
    pub reply: Arc<dyn Completion>,
}

/// What a disk announces to its front end.
#[derive(Clone, Debug)]
pub struct DiskInfo {
    /// Export name (the KubeVirt volume name).
    pub name: alloc::string::String,
    /// Exported size in bytes: the recorded one, whatever the backing file has grown to.
    pub size_bytes: u64,
    pub read_only: bool,
}

/// A run of the allocation map, as NBD's `base:allocation` wants it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allocation {
    pub length: u64,
    /// Not allocated in the backing store.
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

/// How a connection ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Detach {
    /// The client said goodbye (NBD_CMD_DISC).
    Clean,
    /// The connection broke.
    Lost,
}

/// A disk as seen by a front end. All methods may be called from many threads at once.
pub trait GuestDisk: Send + Sync {
    fn info(&self) -> DiskInfo;
    /// A client connected and passed negotiation; `Err(reason)` refuses it (the text reaches the client's log).
    fn attach(&self, connection: u64) -> Result<(), alloc::string::String>;
    /// The connection is gone and none of its requests is outstanding any more.
    fn detach(&self, connection: u64, how: Detach);
    /// Start a request. Completion may happen inside this call.
    fn submit(&self, request: Request);
    /// Allocation of `[offset, offset + length)`, at least one run; may stop early. A blocking local lookup.
    fn allocation(&self, offset: u64, length: u64) -> Result<Vec<Allocation>, Errno>;
    /// Whether [`Op::WriteZeroes`] is known to be faster than writing (NBD's FAST_ZERO asks). `false` when in doubt.
    fn zeroes_are_fast(&self, no_hole: bool) -> bool {
        let _ = no_hole;
        false
    }
}
