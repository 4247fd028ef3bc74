//! Between the core's types and the wire's. The only place that knows both spellings.

use bytes::Bytes;
use watari_core::{
    geometry::{ActivationId, Epoch, Generation, GenerationNumber},
    handover::{Message, Peer, PeerRole},
    record::{Id, RoleRecord},
};
use watari_wire::replication::{self as wire, handover::Kind};

pub fn generation(g: wire::Generation) -> Generation {
    Generation { epoch: g.epoch, number: GenerationNumber(g.number) }
}

pub fn wire_generation(g: Generation) -> wire::Generation {
    wire::Generation { epoch: g.epoch, number: g.number.0 }
}

/// 16 bytes, or zeroes: an id of another length can never match ours.
pub fn id(bytes: &[u8]) -> Id {
    bytes.try_into().unwrap_or_default()
}

pub fn bytes(id: &Id) -> Bytes {
    Bytes::copy_from_slice(id)
}

pub fn epoch(e: Option<wire::Epoch>) -> Epoch {
    let e = e.unwrap_or_default();
    Epoch { counter: e.counter, activation: ActivationId(id(&e.activation)) }
}

pub fn wire_epoch(e: Epoch) -> wire::Epoch {
    wire::Epoch { counter: e.counter, activation: bytes(&e.activation.0) }
}

/// The handover and nonce that belong to a role, for Hello.
pub fn role_ids(record: &RoleRecord) -> (Id, Id) {
    use watari_core::record::Role;
    match record.role {
        Role::HandoverOpen { handover } | Role::Voided { handover } | Role::Released { handover, .. } => {
            (handover, [0; 16])
        }
        Role::Sealed { handover, nonce, .. } => (handover, nonce),
        Role::Serving | Role::Replica | Role::Promoting { .. } | Role::Fenced { .. } => ([0; 16], [0; 16]),
    }
}

/// What a Hello says of the peer's role. `Err`: a role that this version does not know.
pub fn peer(hello: &wire::Hello) -> Result<Peer, u32> {
    let handover = id(&hello.handover);
    let role = match hello.role {
        1 => PeerRole::Active { handover: None },
        2 => PeerRole::Active { handover: Some(handover) },
        3 => PeerRole::Sealed { handover },
        4 => PeerRole::Released { handover },
        5 => PeerRole::Replica,
        6 => PeerRole::Voided { handover },
        // A promotion under way is not active yet, and takes no frames.
        7 => PeerRole::Fenced,
        8 => PeerRole::Fenced,
        other => return Err(other),
    };
    Ok(Peer {
        epoch: epoch(hello.epoch.clone()),
        floor: hello.floor,
        role,
        generation: generation(hello.committed.unwrap_or_default()),
    })
}

pub fn handover(m: &Message) -> wire::Handover {
    let mut out = wire::Handover::default();
    let (kind, handover) = match m {
        Message::Open { handover, epoch } => {
            out.epoch = Some(wire_epoch(*epoch));
            (Kind::Open, handover)
        }
        Message::Attached { handover } => (Kind::Attached, handover),
        Message::QemuLeft { handover } => (Kind::QemuLeft, handover),
        Message::Acquire { handover, nonce, session } => {
            out.nonce = bytes(nonce);
            out.session = *session;
            (Kind::Acquire, handover)
        }
        Message::TakeOver { handover, nonce, session, epoch } => {
            out.nonce = bytes(nonce);
            out.session = *session;
            out.epoch = Some(wire_epoch(*epoch));
            (Kind::TakeOver, handover)
        }
        Message::Grant { handover, nonce, session, epoch, generation } => {
            out.nonce = bytes(nonce);
            out.session = *session;
            out.epoch = Some(wire_epoch(*epoch));
            out.generation = Some(wire_generation(*generation));
            (Kind::Grant, handover)
        }
        Message::Activated { handover, epoch, generation } => {
            out.epoch = Some(wire_epoch(*epoch));
            out.generation = Some(wire_generation(*generation));
            (Kind::Activated, handover)
        }
        Message::Released { handover } => (Kind::Released, handover),
        Message::Void { handover, epoch } => {
            out.epoch = Some(wire::Epoch { counter: *epoch, activation: Bytes::new() });
            (Kind::Void, handover)
        }
        Message::Voided { handover, epoch } => {
            out.epoch = Some(wire_epoch(*epoch));
            (Kind::Voided, handover)
        }
    };
    out.kind = kind.into();
    out.handover = bytes(handover);
    out
}

/// `None`: a kind that this version does not know; it is ignored, as the protocol says.
pub fn from_handover(m: &wire::Handover) -> Option<Message> {
    let handover = id(&m.handover);
    let epoch = epoch(m.epoch.clone());
    let generation = generation(m.generation.unwrap_or_default());
    let (nonce, session) = (id(&m.nonce), m.session);
    Some(match m.kind() {
        Kind::Open => Message::Open { handover, epoch },
        Kind::Attached => Message::Attached { handover },
        Kind::QemuLeft => Message::QemuLeft { handover },
        Kind::Acquire => Message::Acquire { handover, nonce, session },
        Kind::TakeOver => Message::TakeOver { handover, nonce, session, epoch },
        Kind::Grant => Message::Grant { handover, nonce, session, epoch, generation },
        Kind::Activated => Message::Activated { handover, epoch, generation },
        Kind::Released => Message::Released { handover },
        Kind::Void => Message::Void { handover, epoch: epoch.counter },
        Kind::Voided => Message::Voided { handover, epoch },
        Kind::Sealed | Kind::Unknown => return None,
    })
}
