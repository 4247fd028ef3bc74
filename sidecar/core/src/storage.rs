//! The seam to durable bytes: a flat folder of named files. All crash and fault tests of the replica and of the role
//! record hang on these few methods.
//!
//! Durability contract: nothing written is durable before `sync` of that file returned; a created, renamed or removed name is durable
//! after `sync_folder`. Implementations poison a file after a failed write or sync (style item 6): no sync is ever retried.

#[cfg(feature = "sim")]
pub mod sim;

use alloc::{string::String, vec::Vec};

/// Why storage could not do it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StorageError {
    /// No room. Nothing was lost; try again when there is room.
    #[error("no space left in {0}")]
    NoSpace(String),
    /// The medium failed; the file is poisoned from now on.
    #[error("I/O error on {0}: {1}")]
    Io(String, String),
    /// The name does not exist.
    #[error("{0} does not exist")]
    Missing(String),
}

/// A folder of files. Handles are by name; implementations cache descriptors.
pub trait Storage {
    /// Names of all files in the folder, in any order.
    fn list(&self) -> Result<Vec<String>, StorageError>;
    /// Length in bytes; `Missing` if there is none.
    fn len(&self, name: &str) -> Result<u64, StorageError>;
    /// Fill `buf` from `offset`; returns the bytes read (short only at the end of the file).
    fn read(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<usize, StorageError>;
    /// Write all of `data` at `offset`, creating or growing the file.
    fn write(&mut self, name: &str, offset: u64, data: &[u8]) -> Result<(), StorageError>;
    /// Make `[offset, offset+length)` read as zeroes, deallocating where that is possible. Grows the file if needed.
    fn zero(&mut self, name: &str, offset: u64, length: u64) -> Result<(), StorageError>;
    /// Make all earlier writes to this file durable.
    fn sync(&mut self, name: &str) -> Result<(), StorageError>;
    fn truncate(&mut self, name: &str, length: u64) -> Result<(), StorageError>;
    fn remove(&mut self, name: &str) -> Result<(), StorageError>;
    /// Make creations and removals durable.
    fn sync_folder(&mut self) -> Result<(), StorageError>;
}
