//! Every bound of the server in one place, each with its unit and its reason.

use std::time::Duration;

/// Largest single disk request made of a client's request, in bytes. A payload of 32 MiB is served as a stream of parts of this
/// size, so that a connection needs little memory whatever it asks for. Also the alignment at which requests are cut.
pub const PART_BYTES: u32 = 1 << 20;

/// Replies are collected while more requests are at hand, up to this weight, in bytes: the client shall work on the
/// first replies while we work on the next requests, or both would take turns at sleeping.
pub const CORK_WEIGHT_MAX: usize = 128 << 10;
/// What a reply weighs beyond its bytes: eight small ones are enough to wake the client for.
pub const CORK_WEIGHT_REPLY: usize = 16 << 10;

/// Receive buffer of a connection, in bytes: 32 writes of 4 KiB and their headers come in with one system call.
pub const INBOX_BYTES: usize = 160 << 10;

/// What one server allows its clients.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at once. QEMU opens one per disk, copying tools four to eight.
    pub connections: usize,
    /// Requests of one connection that are in the disk or whose reply the client has not taken. QEMU keeps 16, fio's
    /// and libnbd's users up to 64 in flight.
    pub requests_per_connection: usize,
    /// Payload of these requests, in bytes (buffers rounded up to powers of two). At least two parts.
    pub bytes_per_connection: usize,
    /// From accepting to the end of the handshake.
    pub handshake_timeout: Duration,
    /// A client that takes no byte of a waiting reply for so long is cut off when its place is needed by another.
    pub stalled_after: Duration,
    /// After a goodbye or a half-closed socket: how long replies may wait for the client to take them.
    pub linger: Duration,
    /// A connection that was idle for so long gives its buffers back.
    pub trim_after: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 32,
            requests_per_connection: 128,
            bytes_per_connection: 8 << 20,
            handshake_timeout: Duration::from_secs(10),
            stalled_after: Duration::from_secs(10),
            linger: Duration::from_secs(10),
            trim_after: Duration::from_secs(5),
        }
    }
}
