//! The words of the transition table: what happens, what the sites tell each other, what must be done, what people see.
//! It decides nothing: [`super::Site::apply`] does.

use crate::{
    geometry::{ActivationId, Epoch, Generation},
    primary::Pace,
    record::{Id, RoleRecord},
};

/// What one side tells the other about the right to write. Each carries what makes it stale-proof.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Message {
    /// Source: `HandoverOpen` is durable at this epoch.
    Open { handover: Id, epoch: Epoch },
    /// Target: the incoming QEMU is connected.
    Attached { handover: Id },
    /// Source: the outgoing QEMU flushed and left.
    QemuLeft { handover: Id },
    /// Target: asks for the right to write. Only a grant with this nonce and session counts.
    Acquire { handover: Id, nonce: Id, session: u64 },
    /// Target: a person promotes it while the source can be reached: seal, whatever you serve, and give everything over.
    /// Counts only at exactly `epoch`: a source that rose meanwhile would take the target's own promotion for an activation.
    TakeOver { handover: Id, nonce: Id, session: u64, epoch: Epoch },
    /// Source: sealed at `epoch`; everything it ever acknowledged is in `generation`.
    Grant { handover: Id, nonce: Id, session: u64, epoch: Epoch, generation: Generation },
    /// Target: it is the active side now, at `epoch`, beginning from `generation`.
    Activated { handover: Id, epoch: Epoch, generation: Generation },
    /// Source: `Released` is durable.
    Released { handover: Id },
    /// Target: this handover is void; no Activate at `epoch` will ever be accepted by it.
    Void { handover: Id, epoch: u64 },
    /// Source: it serves on, at this epoch.
    Voided { handover: Id, epoch: Epoch },
}

/// What happened. Random bits come in with the events that need them.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Event {
    /// The operator (or a person) opens a handover at the source.
    OpenHandover {
        handover: Id,
    },
    /// A QEMU connected at a side that does not serve.
    GuestAttached,
    /// The last QEMU left (source: after a flush, cleanly; target: for any reason).
    GuestLeft,
    /// The attached guest wants to write, or to read after the source's QEMU left, or the operator saw it running here,
    /// or a stopped VM shall start here (`handover` is then made up by the caller and opened by the peer on request).
    WantWrite {
        nonce: Id,
    },
    /// The operator says that the migration failed and no QEMU runs here.
    WantVoid {
        activation: ActivationId,
    },
    /// A person or the operator promotes this side to the newest state, and the source may be within reach: ask it to
    /// seal first, so that nothing is lost and nobody else serves (design §3.6). Ends in an activation, or, when no grant
    /// comes in time, in [`Event::Promote`].
    TakeOver {
        handover: Id,
        nonce: Id,
    },
    /// A person or the operator promotes this side to a kept generation (already chosen).
    Promote {
        generation: Generation,
    },
    /// The image equals the generation that `Promoting` names.
    Rolled {
        activation: ActivationId,
    },
    /// A person decides that this active side serves on, whatever an open handover may still lead to (its target is
    /// gone), or that it wins over a diverged one.
    Reclaim {
        activation: ActivationId,
    },
    /// A person lets the divergent writes of this fenced side be overwritten.
    AcceptDivergence,
    /// Sealed: no guest write is in flight, and everything is in `generation`, whose commit list has been sent.
    RemainderSent {
        generation: Generation,
    },
    /// Target: `generation` is committed, fully applied, durable, the journal retired.
    Applied {
        generation: Generation,
        activation: ActivationId,
    },
    /// `Released`: the folder is a replica's now.
    Adopted,
    /// A connection to the peer stands and its record is known.
    Met {
        peer: Peer,
        activation: ActivationId,
    },
    /// The connection is gone.
    Parted,
    Received(Message, ActivationId),
}

/// The peer's durable record as far as it matters here.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Peer {
    pub epoch: Epoch,
    pub floor: u64,
    pub role: PeerRole,
    /// Newest generation committed there, or from which it serves.
    pub generation: Generation,
}

/// The peer's role with the names that tie it to ours.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PeerRole {
    Active { handover: Option<Id> },
    Sealed { handover: Id },
    Replica,
    Voided { handover: Id },
    Fenced,
    Released { handover: Id },
}

/// What the guest's front end does with requests.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Gate {
    /// Local disk, tracked.
    Serve,
    /// No front end request is taken to the disk: held up to 20 s, then EIO. FLUSH succeeds.
    Hold,
    /// Attached: reads are served by the peer, writes are held and cause an Acquire.
    Remote,
    /// EIO for good, to every connection that was made before; no write that passed the gate is admitted any more.
    Dead,
}

/// What must be done, in this order.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Action {
    /// Write the record durably; nothing after this happens before it is.
    Persist(RoleRecord),
    Send(Message),
    Gate(Gate),
    /// How generations follow each other from now on.
    Converge(Pace),
    /// Stop admitting writes, drain, cut, send the rest and its commit list, then [`Event::RemainderSent`].
    SealAndSend,
    /// Admit writes again.
    Unseal,
    /// Wait for the writes that were admitted before a seal or fence, then fdatasync every disk; nothing after this
    /// happens before it returned.
    SyncDisks,
    /// Commit and apply up to exactly this generation, then [`Event::Applied`].
    ApplyUpTo(Generation),
    /// Make the image equal to this kept generation, then [`Event::Rolled`].
    RollTo(Generation),
    /// Source duties begin here: fresh maps, everything equal to `base` at the peer (`None`: the peer must be compared).
    BecomeSource {
        base: Option<Generation>,
    },
    /// Replica duties begin here: the disks hold `generation` (plus listed divergence), then [`Event::Adopted`].
    BecomeReplica {
        generation: Generation,
    },
    /// The peer is too old or too new to talk to; say so and close.
    Refuse(&'static str),
    /// A condition for people.
    Report(Condition),
}

/// What a person should know (I9).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Condition {
    /// Two sides raised the same counter apart from each other.
    Diverged,
    /// This side was replaced by a promotion it did not see.
    Fenced,
    /// Promoted without the former source's consent.
    Unfenced,
    /// This side asked for the right to write and has no answer.
    WaitingForGrant,
}
