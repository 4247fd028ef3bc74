//! What the brain hears, from everywhere.

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc::UnboundedSender, oneshot};
use watari_core::{
    front::Detach,
    geometry::{Generation, Sequence},
};
use watari_wire::replication::{ControlMessage, Hello};

use super::{
    build::{BuildError, OutFrame},
    source::{Check, Checked},
    steering::{Declined, Intent, Outcome},
    stream::DataPool,
};

/// One connection to the peer, for as long as it lives.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LinkId(pub u64);

/// Where control messages go out; closed when the link ends.
pub type ControlSender = UnboundedSender<ControlMessage>;

pub type Answer = oneshot::Sender<Result<Outcome, Declined>>;

/// See the module's header.
pub enum Event {
    Intent(Intent, Answer),
    GuestAttached,
    GuestLeft(Detach),
    GuestWantsWrite,
    /// A connection stands and the peer said Hello. `data` exists where we dialled, with what we said of ourselves then.
    LinkOpened {
        link: LinkId,
        peer: String,
        hello: Box<Hello>,
        control: ControlSender,
        data: Option<(DataPool, Box<Hello>)>,
    },
    LinkMessage(LinkId, Box<ControlMessage>),
    LinkClosed(LinkId, String),
    /// Dialling failed; the text is for people.
    DialFailed(String),
    /// A frame from the peer; the permit bounds the bytes that wait here.
    Frame {
        header: Bytes,
        payload: Bytes,
        permit: OwnedSemaphorePermit,
    },
    /// A read became frames.
    Built {
        read: Sequence,
        frames: Result<Vec<OutFrame>, BuildError>,
    },
    /// A step of the continuous verification is done.
    Verified {
        check: Check,
        checked: Checked,
    },
    /// fdatasync of all disks after a commit.
    DisksSynced(Generation, Result<(), String>),
    /// Something is dirty, or a generation must be given up.
    Wake,
    /// Stop when no guest is connected.
    Terminate,
}
