//! The manifest: the few facts that decide what the other files of a replica folder mean.
//!
//! It lives in a slot file ([`crate::slots`]). A generation is committed when a manifest that names it is durable (I4);
//! the image may be written only for a generation that a durable manifest names in `applying` or `rolling_back`, so that
//! undo is captured exactly once. The lists, the journal and the undo files are found by name from what it says.

use crate::{
    codec::{Put, Reader, Short},
    geometry::Generation,
    limits::{DISK_BYTES_MAX, DISKS_MAX},
    replica::list::{Mark, put_generation, take_generation},
};
use alloc::vec::Vec;

/// File name of the manifest.
pub const MANIFEST_NAME: &str = "manifest";
pub const MANIFEST_MAGIC: [u8; 8] = *b"WATMANIF";
pub const MANIFEST_VERSION: u16 = 1;

/// A generation whose image writes may have begun.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Applying {
    pub generation: Generation,
    /// Its undo file is complete and durable. False: application goes on without undo, and everything older is gone.
    pub undo: bool,
}

/// The decoded manifest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifest {
    /// Random identity of this folder; journal segments of another identity are foreign.
    pub identity: [u8; 16],
    /// The image was created empty by this pair and has never had a commit: frames may go straight into it.
    pub virgin: bool,
    /// Something may have been written straight into the image.
    pub direct_started: bool,
    /// Lowest epoch counter whose frames and commits are accepted (I6).
    pub floor: u64,
    pub newest: Option<Mark>,
    pub applied: Option<Mark>,
    pub applying: Option<Applying>,
    /// The image is being taken back to this kept generation.
    pub rolling_back: Option<Generation>,
    /// Newest generation that both sides are known to have (I7).
    pub shared: Option<Generation>,
    /// Recorded size of each disk in bytes.
    pub disk_bytes: Vec<u64>,
}

/// Why the manifest's bytes are not a manifest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("manifest: {0}")]
    Short(#[from] Short),
    #[error("manifest field {field} has the value {found}, which is not allowed")]
    Field { field: &'static str, found: u64 },
}

const VIRGIN: u32 = 1;
const DIRECT_STARTED: u32 = 2;
const NEWEST: u32 = 4;
const APPLIED: u32 = 8;
const APPLYING: u32 = 16;
const APPLYING_UNDO: u32 = 32;
const ROLLING_BACK: u32 = 64;
const SHARED: u32 = 128;

impl Manifest {
    pub fn encode(&self) -> Vec<u8> {
        let flag = |bit, set: bool| if set { bit } else { 0 };
        let flags = flag(VIRGIN, self.virgin)
            | flag(DIRECT_STARTED, self.direct_started)
            | flag(NEWEST, self.newest.is_some())
            | flag(APPLIED, self.applied.is_some())
            | flag(APPLYING, self.applying.is_some())
            | flag(APPLYING_UNDO, self.applying.is_some_and(|applying| applying.undo))
            | flag(ROLLING_BACK, self.rolling_back.is_some())
            | flag(SHARED, self.shared.is_some());
        let none = Mark { generation: Generation::default(), root: [0; 32], committed_at_seconds: 0 };
        let mut out = Vec::new();
        out.put(&self.identity);
        out.put_u32(flags);
        out.put_u32(self.disk_bytes.len() as u32);
        out.put_u64(self.floor);
        self.newest.unwrap_or(none).encode(&mut out);
        self.applied.unwrap_or(none).encode(&mut out);
        put_generation(&mut out, self.applying.map(|applying| applying.generation).unwrap_or_default());
        put_generation(&mut out, self.rolling_back.unwrap_or_default());
        put_generation(&mut out, self.shared.unwrap_or_default());
        for bytes in &self.disk_bytes {
            out.put_u64(*bytes);
        }
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        let mut reader = Reader::new(bytes);
        let identity = reader.array()?;
        let flags = reader.u32()?;
        if flags >= SHARED << 1 {
            return Err(ManifestError::Field { field: "flags", found: u64::from(flags) });
        }
        let disks = reader.u32()?;
        if disks == 0 || disks as usize > DISKS_MAX {
            return Err(ManifestError::Field { field: "disks", found: u64::from(disks) });
        }
        let floor = reader.u64()?;
        let given = |bit| flags & bit != 0;
        let newest = Mark::decode(&mut reader)?;
        let applied = Mark::decode(&mut reader)?;
        let applying = take_generation(&mut reader)?;
        let rolling_back = take_generation(&mut reader)?;
        let shared = take_generation(&mut reader)?;
        let mut disk_bytes = Vec::with_capacity(disks as usize);
        for _ in 0..disks {
            let size = reader.u64()?;
            if size == 0 || size > DISK_BYTES_MAX {
                return Err(ManifestError::Field { field: "disk_bytes", found: size });
            }
            disk_bytes.push(size);
        }
        let manifest = Manifest {
            identity,
            virgin: given(VIRGIN),
            direct_started: given(DIRECT_STARTED),
            floor,
            newest: given(NEWEST).then_some(newest),
            applied: given(APPLIED).then_some(applied),
            applying: given(APPLYING).then_some(Applying { generation: applying, undo: given(APPLYING_UNDO) }),
            rolling_back: given(ROLLING_BACK).then_some(rolling_back),
            shared: given(SHARED).then_some(shared),
            disk_bytes,
        };
        // Pair assertions on what the flags may say together.
        if manifest.virgin && manifest.newest.is_some() {
            return Err(ManifestError::Field { field: "virgin", found: 1 });
        }
        if manifest.applied.is_some() && manifest.newest.is_none() {
            return Err(ManifestError::Field { field: "applied", found: 1 });
        }
        Ok(manifest)
    }
}
