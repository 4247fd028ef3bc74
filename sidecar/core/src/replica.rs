//! The replica's durable side: staging journal, atomic commit, undo, application, retention, roll-back.
//!
//! [`ReplicaStore`] is a synchronous, deterministic engine over two seams: [`crate::storage::Storage`] for the metadata
//! folder and [`Images`] for the data claims. It does no other I/O, has no clock and no randomness, so that a simulator
//! can cut the power at every write and sync. Bytes, their order and what each crash leaves behind: `FORMAT.md`.
//!
//! Invariants kept here:
//! - **I4** A commit is complete (every listed frame present), checked (CRC, digest, root, one supplier per block), durable before it
//!   is answered, and follows its parent; repeated with the same root it is a no-op, with another a conflict.
//! - **I6** Frames and commits below the durable floor are refused.
//! - **I7** The newest committed and the newest shared generation and those in use are never removed.
//! - **I10** Undo is captured once, before the first image write; a replay rewrites the same bytes.
//!
//! It does not: talk to a peer, decide roles, lock the folder, or schedule itself. Sticky failure: after a failed write
//! or sync other than for want of room, every change is refused until the folder is opened again.

mod apply;
mod commit;
pub mod delta;
pub mod images;
pub mod inspect;
pub mod journal;
pub mod list;
pub mod manifest;
mod open;
mod retention;
mod rollback;
mod staging;
mod store;
pub mod undo;
pub mod view;

pub use apply::{Phase, Progress};
pub use commit::CommitAnswer;
pub use images::{Images, StorageImages};
pub use journal::{FrameKey, JournalLimits};
pub use list::{CommitList, Entry, Mark, RootHasher};
pub use retention::{Policy, Retained, Thin};
pub use staging::Staged;
pub use store::{Options, ReplicaStore};
pub use view::{View, ViewCache};

use crate::{
    frame::FrameError,
    geometry::{Generation, Sequence, Session},
    slots::SlotError,
    storage::{Storage, StorageError},
};
use alloc::{string::String, vec::Vec};

/// What a caller can do about an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrorClass {
    /// Try again later, after making room or finishing what is under way.
    Retry,
    /// The request is wrong and stays so.
    Permanent,
    /// The sender has no right to this any more (I6).
    Fenced,
    /// Durable bytes are not what they were, or the medium failed.
    Corrupt,
}

/// Which of a side's claims.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Claim {
    /// The metadata folder: journal, undo, lists.
    Metadata,
    /// A disk's image.
    Data,
}

/// Why the replica refused or failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReplicaError {
    /// No room on a claim. Nothing committed is harmed; it goes on when there is room.
    #[error("no room in {claim:?} ({place}): about {needed} more bytes are needed")]
    Full { claim: Claim, place: String, needed: u64 },
    /// The journal is at its limit because committed generations wait for their application.
    #[error("the journal is full of committed generations that wait for their application")]
    ApplyFirst,
    /// The staged delta does not fit the journal at all.
    #[error("the journal is too small for this delta: at least {needed} bytes are needed, {limit} are allowed")]
    JournalTooSmall { needed: u64, limit: u64 },
    /// The metadata folder.
    #[error("{0}")]
    Storage(StorageError),
    /// A data claim.
    #[error("image: {0}")]
    Image(StorageError),
    #[error(transparent)]
    Slot(SlotError),
    #[error("{file} has format version {found}, this program knows up to {supported}; use the newer program")]
    NewerVersion { file: String, found: u16, supported: u16 },
    #[error("{file} is damaged: {what}")]
    Corrupt { file: String, what: String },
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("epoch {found} is below the floor {floor}")]
    BelowFloor { found: u64, floor: u64 },
    #[error("epoch {found} is above the floor {floor}, which must be raised first")]
    AboveFloor { found: u64, floor: u64 },
    #[error("the frame belongs to session {found:?}, the current one is {current:?}")]
    OtherSession { found: Session, current: Option<Session> },
    #[error("disk {disk} does not have block {block}")]
    OutOfRange { disk: u16, block: u64 },
    /// A `Same` frame whose digest is not that of the committed content: send the content.
    #[error("the committed content is not what frame {0:?} asserts")]
    NotSame(Sequence),
    #[error("frame {0:?} was staged before with another content")]
    FrameConflict(Sequence),
    #[error("generation {0} is not kept here")]
    UnknownGeneration(Generation),
    #[error("no commit was begun")]
    NoCommit,
    #[error("the commit list is wrong: {0}")]
    BadList(String),
    #[error("a roll-back is under way")]
    RollingBack,
    #[error("image of disk {disk} has {found} bytes, {expected} are recorded; restore or grow the claim")]
    DiskSmaller { disk: u16, found: u64, expected: u64 },
    #[error("this folder was opened for reading only")]
    ReadOnly,
    #[error("closed to changes since an earlier failure: {0}")]
    Poisoned(String),
}

impl ReplicaError {
    pub fn class(&self) -> ErrorClass {
        match self {
            ReplicaError::Full { .. } | ReplicaError::ApplyFirst | ReplicaError::RollingBack => ErrorClass::Retry,
            ReplicaError::BelowFloor { .. } | ReplicaError::OtherSession { .. } => ErrorClass::Fenced,
            ReplicaError::Storage(StorageError::NoSpace(_)) | ReplicaError::Image(StorageError::NoSpace(_)) => {
                ErrorClass::Retry
            }
            ReplicaError::Slot(SlotError::Storage(StorageError::NoSpace(_))) => ErrorClass::Retry,
            ReplicaError::Storage(_) | ReplicaError::Image(_) | ReplicaError::Slot(_) => ErrorClass::Corrupt,
            ReplicaError::Corrupt { .. } | ReplicaError::Poisoned(_) => ErrorClass::Corrupt,
            ReplicaError::JournalTooSmall { .. }
            | ReplicaError::NewerVersion { .. }
            | ReplicaError::Frame(_)
            | ReplicaError::AboveFloor { .. }
            | ReplicaError::OutOfRange { .. }
            | ReplicaError::NotSame(_)
            | ReplicaError::FrameConflict(_)
            | ReplicaError::UnknownGeneration(_)
            | ReplicaError::NoCommit
            | ReplicaError::BadList(_)
            | ReplicaError::DiskSmaller { .. }
            | ReplicaError::ReadOnly => ErrorClass::Permanent,
        }
    }

    /// The claim and the file for which there is no room, if that is what this is.
    pub(crate) fn no_space(&self) -> Option<(Claim, &str)> {
        match self {
            ReplicaError::Storage(StorageError::NoSpace(file)) => Some((Claim::Metadata, file)),
            ReplicaError::Slot(SlotError::Storage(StorageError::NoSpace(file))) => Some((Claim::Metadata, file)),
            ReplicaError::Image(StorageError::NoSpace(file)) => Some((Claim::Data, file)),
            _ => None,
        }
    }

    pub(crate) fn corrupt(file: &str, what: &str) -> Self {
        ReplicaError::Corrupt { file: file.into(), what: what.into() }
    }

    pub(crate) fn newer(file: &str, found: u16, supported: u16) -> Self {
        ReplicaError::NewerVersion { file: file.into(), found, supported }
    }
}

impl From<StorageError> for ReplicaError {
    fn from(error: StorageError) -> Self {
        ReplicaError::Storage(error)
    }
}

impl From<SlotError> for ReplicaError {
    fn from(error: SlotError) -> Self {
        match error {
            SlotError::NewerVersion { file, found, supported } => ReplicaError::NewerVersion { file, found, supported },
            other => ReplicaError::Slot(other),
        }
    }
}

/// Something a person or a metric should hear of (I9). Collected by [`ReplicaStore::take_events`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// History was given up for want of room; these generations can no longer be reached.
    UndoDropped {
        lost: Vec<Generation>,
    },
    /// A generation is in the image, synced, and its journal is retired.
    Applied(Generation),
    RolledBack(Generation),
    /// The folder was opened although these committed generations were damaged; they are gone, newest first.
    Salvaged {
        lost: Vec<Generation>,
    },
}

/// Fill `buf` or fail: a file that ends early is damaged.
pub(crate) fn read_exact<M: Storage>(meta: &M, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), ReplicaError> {
    if meta.read(name, offset, buf)? < buf.len() {
        return Err(ReplicaError::corrupt(name, "it ends early"));
    }
    Ok(())
}
