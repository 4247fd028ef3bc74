//! The NBD front end: a server on unix sockets for [`GuestDisk`]s, and a plain local disk behind the same seam.
//!
//! Where is what:
//! - [`server`]: one socket, its accept loop, the connections on it, clean shutdown. [`exports`] says what it serves.
//! - [`listener`]: how a socket path is taken and given back.
//! - `connection` → `crew` → `transmission` → `link`: one client, from handshake to goodbye. `transmission` reads requests
//!   in batches; `crew` is the threads that take turns at it; `link` is where completions arrive, from any thread, and
//!   leave as replies.
//! - [`local`]: [`local::LocalDisk`], a regular file or block device with inline I/O while that is fast and a bounded pool
//!   while it is not; [`local::Around`] is how tracking wraps it without a second dispatch.
//!
//! Invariants: a client costs bounded memory whatever it does ([`Limits`]); no client can delay another one, but for
//! the disk they share; no allocation per request in steady state; no thread waits for a client while it holds
//! anything that another client needs.
//!
//! Not here: TLS (the sockets are local to a Pod or host), the protocol's bytes (`watari_core::nbd`), tracking.
//!
//! [`GuestDisk`]: watari_core::front::GuestDisk
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod buffers;
mod connection;
mod crew;
pub mod exports;
mod inbox;
mod limits;
mod link;
pub mod listener;
pub mod local;
mod outbox;
mod parts;
pub mod server;
mod transmission;
mod zeroes;

pub use crew::{more_at_hand, step_aside};
pub use exports::{ExportTable, Exports};
pub use limits::Limits;
pub use local::{FileDisk, LocalDisk};
pub use server::{ConnectionReport, Server, ServerConfig, ServerReport};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Lock, and go on after a panic elsewhere: the state behind our locks is valid at every unlock, and release builds
/// abort on panic anyway.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
