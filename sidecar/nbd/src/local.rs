//! A plain local disk: a regular file or a block device as a [`GuestDisk`](watari_core::front::GuestDisk).
//!
//! - [`LocalFile`]: blocking operations on the file or device, nothing else. What the engine's sender reads with, too.
//! - [`IoPool`]: a bounded pool of threads for one kind of job; no boxing, threads come and go with the load.
//! - [`Pace`]: is this kind of operation fast enough lately to be done on the submitting thread?
//! - [`LocalDisk`]: puts them together. [`Around`] is its one extension point: the prologue and the epilogue of a
//!   wrapper that tracks writes. [`FileDisk`] is the disk without any.

mod disk;
mod file;
mod flush;
mod pace;
mod pool;

pub use disk::{Around, FileDisk, LocalDisk, LocalDiskConfig, Plain, Prologue};
pub use file::{LocalFile, OpenError, Zeroing};
pub use pace::Pace;
pub use pool::{IoPool, Job};
