//! Durable and semi-durable state: files in the metadata folder and memory that survives the worker.
//!
//! The formats are `watari-core`'s; this crate holds the files, maps, locks and threads.

pub mod folder;
pub mod lock;
pub mod maps;
pub mod regions;
pub mod replica;
pub mod trust;
pub mod whole_file;
