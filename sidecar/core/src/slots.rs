//! A small record that is replaced atomically: two 4 KiB slots in one file, written alternately.
//!
//! The manifest of a replica folder and the role record are kept so. A write goes to the slot that does *not* hold the
//! newest valid record and is synced before it counts, so a torn write costs only the slot that was to be replaced.
//! `FORMAT.md` ("Slot file") has the bytes, the crash cases and what the medium must promise.
//!
//! Sticky failure: after a failed write or sync every further write is refused. It does not interpret the payload and
//! takes no lock; whoever holds the folder's lock is the only writer.

use crate::{
    codec::{Put, Reader, Short, crc32},
    storage::{Storage, StorageError},
};
use alloc::{string::String, vec, vec::Vec};

/// Bytes of one slot: one page, so that file systems and devices with 4 KiB sectors write it in one piece.
pub const SLOT_BYTES: usize = 4096;
/// Bytes before the payload.
pub const SLOT_HEADER_BYTES: usize = 32;
/// Largest payload in bytes.
pub const SLOT_PAYLOAD_BYTES_MAX: usize = SLOT_BYTES - SLOT_HEADER_BYTES;

/// Why a slot file could not be read or written.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SlotError {
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Written by a newer Watari; nothing was touched.
    #[error("{file} has format version {found}, this program knows up to {supported}; use the newer program")]
    NewerVersion { file: String, found: u16, supported: u16 },
    /// Neither slot holds a valid record although the file was once complete.
    #[error("{file} is damaged: neither of its two slots holds a valid record")]
    Corrupt { file: String },
    /// Not a slot file of the expected kind.
    #[error("{file} is not what it should be: expected magic {expected:?}, found {found:?}")]
    Foreign { file: String, expected: [u8; 8], found: [u8; 8] },
    /// The payload does not fit a slot.
    #[error("a record of {bytes} bytes does not fit a slot of {SLOT_PAYLOAD_BYTES_MAX}")]
    TooLarge { bytes: usize },
    /// An earlier write or sync failed.
    #[error("{file} is closed to writing since an earlier failure")]
    Poisoned { file: String },
}

/// What one slot holds.
enum Slot {
    Valid {
        sequence: u64,
        version: u16,
        payload: Vec<u8>,
    },
    /// Never written: all zero.
    Blank,
    /// Another file's magic, with its checksum right.
    Foreign([u8; 8]),
    /// Torn or damaged.
    Invalid,
}

/// A slot file: its place, its newest sequence and which slot holds it. The payload lives with the caller.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlotFile {
    name: String,
    magic: [u8; 8],
    version: u16,
    /// Sequence of the newest durable record.
    sequence: u64,
    /// Slot (0 or 1) of the newest durable record.
    newest: u64,
    poisoned: bool,
}

impl SlotFile {
    /// Make the file with its first record, durable when this returns. Both slots are written, one after the other,
    /// so that later a blank slot always means "creation was interrupted".
    pub fn create<S: Storage>(
        storage: &mut S,
        name: &str,
        magic: [u8; 8],
        version: u16,
        payload: &[u8],
    ) -> Result<SlotFile, SlotError> {
        let mut file = SlotFile { name: name.into(), magic, version, sequence: 0, newest: 1, poisoned: false };
        file.write(storage, payload)?;
        file.write(storage, payload)?;
        storage.sync_folder()?;
        Ok(file)
    }

    /// Read the newest valid record. `None` if the file does not exist or its creation was interrupted before anything
    /// counted. Writes nothing.
    pub fn open<S: Storage>(
        storage: &S,
        name: &str,
        magic: [u8; 8],
        version: u16,
    ) -> Result<Option<(SlotFile, UnverifiedPayload)>, SlotError> {
        let mut bytes = vec![0; 2 * SLOT_BYTES];
        match storage.read(name, 0, &mut bytes) {
            Ok(_) => {}
            Err(StorageError::Missing(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let slots = [decode(&bytes[..SLOT_BYTES], magic), decode(&bytes[SLOT_BYTES..], magic)];
        let mut best: Option<(u64, u64, u16, Vec<u8>)> = None;
        let mut blank = false;
        for (index, slot) in (0u64..).zip(slots) {
            match slot {
                Slot::Valid { version: found, .. } if found > version => {
                    return Err(SlotError::NewerVersion { file: name.into(), found, supported: version });
                }
                Slot::Valid { sequence, version, payload } => {
                    if best.as_ref().is_none_or(|(newest, ..)| sequence > *newest) {
                        best = Some((sequence, index, version, payload));
                    }
                }
                Slot::Foreign(found) => {
                    return Err(SlotError::Foreign { file: name.into(), expected: magic, found });
                }
                Slot::Blank => blank = true,
                Slot::Invalid => {}
            }
        }
        match best {
            Some((sequence, newest, found, payload)) => {
                let file = SlotFile { name: name.into(), magic, version, sequence, newest, poisoned: false };
                Ok(Some((file, UnverifiedPayload { version: found, bytes: payload })))
            }
            // Creation writes slot 0, syncs, then slot 1: with slot 1 still blank nothing was ever acknowledged.
            None if blank => Ok(None),
            None => Err(SlotError::Corrupt { file: name.into() }),
        }
    }

    /// Replace the record; durable when this returns.
    pub fn write<S: Storage>(&mut self, storage: &mut S, payload: &[u8]) -> Result<(), SlotError> {
        if self.poisoned {
            return Err(SlotError::Poisoned { file: self.name.clone() });
        }
        let bytes = encode(self.magic, self.version, self.sequence + 1, payload)?;
        let slot = 1 - self.newest;
        match storage.write(&self.name, slot * SLOT_BYTES as u64, &bytes) {
            Ok(()) => {}
            // The slot that counts was not touched, and a later write goes to the same victim again.
            Err(error @ StorageError::NoSpace(_)) => return Err(error.into()),
            Err(error) => {
                self.poisoned = true;
                return Err(error.into());
            }
        }
        // Whatever a sync's error says, it is not known whether the record is durable.
        if let Err(error) = storage.sync(&self.name) {
            self.poisoned = true;
            return Err(error.into());
        }
        self.sequence += 1;
        self.newest = slot;
        Ok(())
    }

    /// How many records this file has held, the newest included. Starts at 2 after creation.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }
}

/// A record whose checksum was right; its meaning has not been checked yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnverifiedPayload {
    /// Format version it was written with, at most the one that `open` was given.
    pub version: u16,
    pub bytes: Vec<u8>,
}

fn encode(magic: [u8; 8], version: u16, sequence: u64, payload: &[u8]) -> Result<Vec<u8>, SlotError> {
    if payload.len() > SLOT_PAYLOAD_BYTES_MAX {
        return Err(SlotError::TooLarge { bytes: payload.len() });
    }
    let mut bytes = Vec::with_capacity(SLOT_BYTES);
    bytes.put(&magic);
    bytes.put_u16(version);
    bytes.put_u16(0);
    bytes.put_u32(0); // The checksum's place.
    bytes.put_u64(sequence);
    bytes.put_u32(payload.len() as u32);
    bytes.put_u32(0);
    bytes.put(payload);
    bytes.resize(SLOT_BYTES, 0);
    let crc = crc32(&[&bytes[..12], &bytes[16..]]);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    Ok(bytes)
}

fn decode(bytes: &[u8], magic: [u8; 8]) -> Slot {
    if bytes.iter().all(|byte| *byte == 0) {
        return Slot::Blank;
    }
    parse(bytes, magic).unwrap_or(Slot::Invalid)
}

fn parse(bytes: &[u8], magic: [u8; 8]) -> Result<Slot, Short> {
    let mut reader = Reader::new(bytes);
    let found: [u8; 8] = reader.array()?;
    let version = reader.u16()?;
    reader.u16()?;
    let crc = reader.u32()?;
    let sequence = reader.u64()?;
    let length = reader.u32()? as usize;
    reader.u32()?;
    if crc != crc32(&[&bytes[..12], &bytes[16..]]) {
        return Ok(Slot::Invalid);
    }
    if found != magic {
        return Ok(Slot::Foreign(found));
    }
    Ok(Slot::Valid { sequence, version, payload: reader.take(length)?.to_vec() })
}
