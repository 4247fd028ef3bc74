//! The engine: the pure core of `watari-core` joined to disks, sockets, clocks and the stream.
//!
//! - `start`: from a configuration to a running worker.
//! - `brain`: the one loop that owns role, link and duty; `source` and `target` are the two duties.
//! - `gate`, `connections`, `tracking`, `preserve`, `remote`, `latency`: what a guest's request meets.
//! - `divergence`: what a fenced side wrote alone. `generations`: what a replica keeps, read-only over NBD.
//! - `build`: from blocks to frames. `stream`: gRPC. `convert`: core types and wire types.
//! - `steering`: how the outside asks and looks; [`handle`] is its implementation. `settings`: what it changed, kept for the next worker.

pub mod awaiting;
pub mod brain;
pub mod build;
mod clock;
mod conditions;
pub mod connections;
mod convert;
pub mod divergence;
pub mod event;
pub mod folder;
pub mod gate;
pub mod generations;
pub mod handle;
pub mod hooking;
pub mod latency;
pub mod preserve;
pub mod remote;
pub mod settings;
pub mod source;
pub mod start;
pub mod steering;
pub mod stream;
pub mod target;
pub mod tracking;

/// Exit code of a worker whose role record or disks failed at a point where nothing may follow: the supervisor starts it
/// again, and it goes on from what is durable.
pub const EXIT_RECORD: i32 = 70;
/// Exit code of a worker that asks to be started again: nothing failed, something that it read at its start has changed.
pub const EXIT_AGAIN: i32 = crate::cli::EXIT_AGAIN as i32;
