//! The role record: what one side durably knows about who may write. Read first at every start, written before every
//! step that other promises stand on (I6). Its bytes go into a two-slot file (`role.rec`, see `FORMAT.md`).
//!
//! It does not decide anything: [`crate::handover`] does.

use alloc::{string::String, vec::Vec};

use crate::{
    geometry::{ActivationId, Epoch, Generation, GenerationNumber},
    limits,
};

/// 128 bits that name something: a pair, a folder, a shared history, a handover, a nonce.
pub type Id = [u8; 16];

/// What this side is. The data of a state is what must survive a restart in it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    /// The active side: guest writes are accepted, tracked and sent.
    Serving,
    /// Active, and a live migration may be under way: only the QEMU of this handover may connect.
    HandoverOpen { handover: Id },
    /// No guest write is accepted any more; the right to write goes to whoever sent this nonce.
    Sealed { handover: Id, nonce: Id, session: u64 },
    /// The other side is active at `epoch`; every write of ours is on our disks, which are at `generation`.
    Released { handover: Id, generation: Generation },
    /// Receives, commits, applies.
    Replica,
    /// A replica whose attached QEMU must never be served: the migration failed (Void) or the side was promoted past it.
    Voided { handover: Id },
    /// A promotion has begun: roll to `generation`, then serve. No frame is accepted.
    Promoting { generation: Generation },
    /// Was active, and another side was promoted meanwhile: serves nothing until a person accepts that the blocks in
    /// the divergence list are overwritten.
    Fenced { by: Epoch },
}

impl Role {
    /// May accept guest writes now.
    pub fn accepts_writes(&self) -> bool {
        matches!(self, Role::Serving | Role::HandoverOpen { .. })
    }
    /// Believes that the right to write is here, whether or not it may be used at the moment.
    pub fn is_active_side(&self) -> bool {
        matches!(self, Role::Serving | Role::HandoverOpen { .. } | Role::Sealed { .. } | Role::Promoting { .. })
    }
    /// Takes frames from an active peer.
    pub fn receives(&self) -> bool {
        matches!(self, Role::Replica | Role::Voided { .. })
    }
    /// The word for reports; `Active` and `Serving` are the same role, `Converging` is an open handover.
    pub fn name(&self) -> &'static str {
        match self {
            Role::Serving => "Serving",
            Role::HandoverOpen { .. } => "Converging",
            Role::Sealed { .. } => "Sealed",
            Role::Released { .. } => "Released",
            Role::Replica => "Replica",
            Role::Voided { .. } => "Voided",
            Role::Promoting { .. } => "Promoting",
            Role::Fenced { .. } => "Fenced",
        }
    }
    /// What [`Role::tag`] gives for a fenced side.
    pub const FENCED_TAG: u32 = 8;
    /// Number on disk and on the wire.
    pub fn tag(&self) -> u32 {
        match self {
            Role::Serving => 1,
            Role::HandoverOpen { .. } => 2,
            Role::Sealed { .. } => 3,
            Role::Released { .. } => 4,
            Role::Replica => 5,
            Role::Voided { .. } => 6,
            Role::Promoting { .. } => 7,
            Role::Fenced { .. } => Role::FENCED_TAG,
        }
    }
}

/// A disk as both sides agreed on it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct DiskRecord {
    pub name: String,
    /// The size the guest sees, bytes.
    pub size_bytes: u64,
}

/// Everything of the role record.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct RoleRecord {
    pub pair: Id,
    /// This folder.
    pub site: Id,
    /// The history both sites share; another identity means: compare everything.
    pub identity: Id,
    /// Raised at each start.
    pub starts: u64,
    /// Of the newest active side we durably know.
    pub epoch: Epoch,
    /// Nothing below this counter is accepted.
    pub floor: u64,
    pub role: Role,
    /// Newest generation known to be at both sites.
    pub base: Generation,
    /// Generation numbers below this may have been used.
    pub numbers_reserved: GenerationNumber,
    /// A promotion that could not seal the former source.
    pub unfenced: bool,
    /// Marks may be missing: everything counts as dirty until proven.
    pub untracked: bool,
    pub disks: Vec<DiskRecord>,
}

/// Why bytes are not a role record.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RecordError {
    #[error(
        "role record is of format version {found}, this binary knows {known}: use a newer binary, nothing was changed"
    )]
    Version { found: u16, known: u16 },
    #[error("role record is damaged: {0}")]
    Damaged(&'static str),
}

/// Version of the encoding below.
pub const RECORD_VERSION: u16 = 1;

impl RoleRecord {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Vec::with_capacity(256);
        w.extend_from_slice(&RECORD_VERSION.to_le_bytes());
        for id in [&self.pair, &self.site, &self.identity] {
            w.extend_from_slice(id);
        }
        w.extend_from_slice(&self.starts.to_le_bytes());
        put_epoch(&mut w, &self.epoch);
        w.extend_from_slice(&self.floor.to_le_bytes());
        put_generation(&mut w, self.base);
        w.extend_from_slice(&self.numbers_reserved.0.to_le_bytes());
        w.push(u8::from(self.unfenced) | u8::from(self.untracked) << 1);
        w.push(self.role.tag() as u8);
        match &self.role {
            Role::Serving | Role::Replica => {}
            Role::HandoverOpen { handover } | Role::Voided { handover } => w.extend_from_slice(handover),
            Role::Sealed { handover, nonce, session } => {
                w.extend_from_slice(handover);
                w.extend_from_slice(nonce);
                w.extend_from_slice(&session.to_le_bytes());
            }
            Role::Released { handover, generation } => {
                w.extend_from_slice(handover);
                put_generation(&mut w, *generation);
            }
            Role::Promoting { generation } => put_generation(&mut w, *generation),
            Role::Fenced { by } => put_epoch(&mut w, by),
        }
        w.extend_from_slice(&(self.disks.len() as u16).to_le_bytes());
        for d in &self.disks {
            w.extend_from_slice(&d.size_bytes.to_le_bytes());
            w.push(d.name.len() as u8);
            w.extend_from_slice(d.name.as_bytes());
        }
        w
    }

    /// Errors: another version, or damage (which a CRC below this layer should have caught).
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut r = Reader(bytes);
        let found = r.u16()?;
        if found != RECORD_VERSION {
            return Err(RecordError::Version { found, known: RECORD_VERSION });
        }
        let (pair, site, identity) = (r.id()?, r.id()?, r.id()?);
        let starts = r.u64()?;
        let epoch = r.epoch()?;
        let floor = r.u64()?;
        let base = r.generation()?;
        let numbers_reserved = GenerationNumber(r.u64()?);
        let flags = r.u8()?;
        let role = match r.u8()? {
            1 => Role::Serving,
            2 => Role::HandoverOpen { handover: r.id()? },
            3 => Role::Sealed { handover: r.id()?, nonce: r.id()?, session: r.u64()? },
            4 => Role::Released { handover: r.id()?, generation: r.generation()? },
            5 => Role::Replica,
            6 => Role::Voided { handover: r.id()? },
            7 => Role::Promoting { generation: r.generation()? },
            8 => Role::Fenced { by: r.epoch()? },
            _ => return Err(RecordError::Damaged("unknown role")),
        };
        let count = r.u16()?;
        if usize::from(count) > limits::DISKS_MAX {
            return Err(RecordError::Damaged("more disks than any pair has"));
        }
        let mut disks = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            let size_bytes = r.u64()?;
            let n = usize::from(r.u8()?);
            let name = core::str::from_utf8(r.take(n)?).map_err(|_| RecordError::Damaged("disk name is not UTF-8"))?;
            if size_bytes > limits::DISK_BYTES_MAX {
                return Err(RecordError::Damaged("disk larger than any disk"));
            }
            disks.push(DiskRecord { name: name.into(), size_bytes });
        }
        if !r.0.is_empty() {
            return Err(RecordError::Damaged("bytes after the end"));
        }
        let (unfenced, untracked) = (flags & 1 != 0, flags & 2 != 0);
        Ok(RoleRecord {
            pair,
            site,
            identity,
            starts,
            epoch,
            floor,
            role,
            base,
            numbers_reserved,
            unfenced,
            untracked,
            disks,
        })
    }
}

fn put_epoch(w: &mut Vec<u8>, e: &Epoch) {
    w.extend_from_slice(&e.counter.to_le_bytes());
    w.extend_from_slice(&e.activation.0);
}

fn put_generation(w: &mut Vec<u8>, g: Generation) {
    w.extend_from_slice(&g.epoch.to_le_bytes());
    w.extend_from_slice(&g.number.0.to_le_bytes());
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], RecordError> {
        if self.0.len() < n {
            return Err(RecordError::Damaged("ends too early"));
        }
        let (head, rest) = self.0.split_at(n);
        self.0 = rest;
        Ok(head)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N], RecordError> {
        let mut a = [0; N];
        a.copy_from_slice(self.take(N)?);
        Ok(a)
    }
    fn u8(&mut self) -> Result<u8, RecordError> {
        Ok(self.array::<1>()?[0])
    }
    fn u16(&mut self) -> Result<u16, RecordError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    fn u64(&mut self) -> Result<u64, RecordError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    fn id(&mut self) -> Result<Id, RecordError> {
        self.array()
    }
    fn epoch(&mut self) -> Result<Epoch, RecordError> {
        Ok(Epoch { counter: self.u64()?, activation: ActivationId(self.id()?) })
    }
    fn generation(&mut self) -> Result<Generation, RecordError> {
        Ok(Generation { epoch: self.u64()?, number: GenerationNumber(self.u64()?) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::vec;

    use super::*;

    pub(crate) fn sample(role: Role) -> RoleRecord {
        RoleRecord {
            pair: [1; 16],
            site: [2; 16],
            identity: [3; 16],
            starts: 4,
            epoch: Epoch { counter: 5, activation: ActivationId([6; 16]) },
            floor: 5,
            role,
            base: Generation { epoch: 4, number: GenerationNumber(70) },
            numbers_reserved: GenerationNumber(1000),
            unfenced: false,
            untracked: true,
            disks: vec![DiskRecord { name: "root".into(), size_bytes: 1 << 30 }],
        }
    }

    #[test]
    fn every_role_survives_encoding() {
        let g = Generation { epoch: 1, number: GenerationNumber(2) };
        for role in [
            Role::Serving,
            Role::HandoverOpen { handover: [9; 16] },
            Role::Sealed { handover: [9; 16], nonce: [8; 16], session: 7 },
            Role::Released { handover: [9; 16], generation: g },
            Role::Replica,
            Role::Voided { handover: [9; 16] },
            Role::Promoting { generation: g },
            Role::Fenced { by: Epoch { counter: 7, activation: ActivationId([1; 16]) } },
        ] {
            let r = sample(role);
            assert_eq!(RoleRecord::decode(&r.encode()), Ok(r));
        }
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let mut bytes = sample(Role::Serving).encode();
        bytes[0] = 2;
        assert_eq!(RoleRecord::decode(&bytes), Err(RecordError::Version { found: 2, known: 1 }));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = RoleRecord::decode(&bytes);
        }
        #[test]
        fn a_cut_record_is_never_accepted(n in 0usize..200) {
            let bytes = sample(Role::Replica).encode();
            if n < bytes.len() {
                prop_assert!(RoleRecord::decode(&bytes[..n]).is_err());
            }
        }
    }
}
