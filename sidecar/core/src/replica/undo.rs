//! Undo files: what the blocks that a generation overwrites held before, so that its parent can still be read.
//!
//! `undo-<newer>-<older>` turns the content at `newer` into the content at `older`. Header, data blocks, index, trailer, in the
//! order they are written; without its trailer a file counts for nothing, and one that nothing vouches for may have a trailer without its
//! data ([`is_whole`]). Complete files are never changed. A chain of
//! files leads from the applied generation back to the oldest kept one.
//!
//! The file says nothing of when the image may be written; that is the manifest's part.

use crate::{
    codec::{Put, Reader, crc32},
    geometry::{BLOCK_BYTES, Generation},
    limits::FRAME_BYTES_MAX,
    replica::{
        ReplicaError,
        list::{Mark, put_generation, take_generation},
        read_exact,
    },
    storage::Storage,
};
use alloc::{format, string::String, vec, vec::Vec};

const UNDO_MAGIC: [u8; 8] = *b"WATUNDO\0";
const UNDO_VERSION: u16 = 1;
/// Bytes before the first data block.
pub const UNDO_HEADER_BYTES: u64 = 4096;
const TRAILER_MAGIC: [u8; 8] = *b"WATUNEND";
const TRAILER_BYTES: u64 = 40;
const ENTRY_BYTES: u64 = 32;
/// Most blocks of one index entry: its checksum is over at most as much as a frame holds.
pub const UNDO_ENTRY_BLOCKS_MAX: u32 = (FRAME_BYTES_MAX / BLOCK_BYTES) as u32;

/// Name of the undo file that leads from `newer` to `older`.
pub fn undo_name(newer: Generation, older: Generation) -> String {
    format!("undo-{:016x}-{:016x}", newer.number.0, older.number.0)
}

/// True for a name that [`undo_name`] makes.
pub fn is_undo_name(name: &str) -> bool {
    name.starts_with("undo-")
}

/// A run of blocks with their old content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UndoEntry {
    pub start: u64,
    pub blocks: u32,
    pub disk: u16,
    /// The blocks were zero; no data is kept.
    pub zero: bool,
    /// Index of the first data block in the file.
    pub at: u64,
    /// CRC-32 over the data of all its blocks.
    pub crc32: u32,
}

impl UndoEntry {
    pub fn end(&self) -> u64 {
        self.start + u64::from(self.blocks)
    }
}

/// What an undo file is, without its index.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UndoInfo {
    pub name: String,
    pub newer: Generation,
    /// The generation that it leads back to.
    pub older: Mark,
    pub bytes: u64,
}

/// An undo file's index, sorted by (disk, start).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UndoIndex {
    pub info: UndoInfo,
    pub entries: Vec<UndoEntry>,
}

impl UndoIndex {
    /// Entries that touch `[start, end)` of a disk, in order.
    pub fn touching(&self, disk: u16, start: u64, end: u64) -> impl Iterator<Item = &UndoEntry> {
        let from = self.entries.partition_point(|entry| (entry.disk, entry.end()) <= (disk, start));
        self.entries[from..].iter().take_while(move |entry| entry.disk == disk && entry.start < end)
    }

    /// Read all data and answer what is wrong with it.
    pub fn damage<'a, M: Storage>(&'a self, meta: &'a M) -> impl Iterator<Item = ReplicaError> + 'a {
        self.entries.iter().filter(|entry| !entry.zero).filter_map(|entry| self.data(meta, entry).err())
    }

    /// Read one entry's data and check it.
    pub fn data<M: Storage>(&self, meta: &M, entry: &UndoEntry) -> Result<Vec<u8>, ReplicaError> {
        assert!(!entry.zero, "a zero entry has no data");
        let mut data = vec![0; (u64::from(entry.blocks) * BLOCK_BYTES) as usize];
        read_exact(meta, &self.info.name, data_offset(entry.at), &mut data)?;
        if crc32(&[&data]) != entry.crc32 {
            return Err(ReplicaError::corrupt(&self.info.name, "data checksum"));
        }
        Ok(data)
    }
}

/// Byte offset of a data block in an undo file.
pub fn data_offset(at: u64) -> u64 {
    UNDO_HEADER_BYTES + at * BLOCK_BYTES
}

/// Writes an undo file front to back. Runs must come in (disk, start) order.
#[derive(Debug)]
pub(crate) struct UndoWriter {
    name: String,
    newer: Generation,
    older: Mark,
    entries: Vec<UndoEntry>,
    data_blocks: u64,
    started: bool,
}

impl UndoWriter {
    pub fn new(newer: Generation, older: Mark) -> Self {
        let name = undo_name(newer, older.generation);
        UndoWriter { name, newer, older, entries: Vec::new(), data_blocks: 0, started: false }
    }
    pub fn name(&self) -> &str {
        &self.name
    }

    fn start<M: Storage>(&mut self, meta: &mut M) -> Result<(), ReplicaError> {
        if self.started {
            return Ok(());
        }
        // A leftover of an interrupted capture must not lend its tail to this file.
        meta.truncate(&self.name, 0)?;
        let mut header = Vec::with_capacity(UNDO_HEADER_BYTES as usize);
        header.put(&UNDO_MAGIC);
        header.put_u16(UNDO_VERSION);
        header.put_u16(0);
        header.put_u32(0);
        put_generation(&mut header, self.newer);
        self.older.encode(&mut header);
        header.resize(UNDO_HEADER_BYTES as usize, 0);
        let crc = crc32(&[&header[..12], &header[16..]]);
        header[12..16].copy_from_slice(&crc.to_le_bytes());
        meta.write(&self.name, 0, &header)?;
        self.started = true;
        Ok(())
    }

    /// Add consecutive blocks with their old content; runs of zero blocks are kept without data. After a failure nothing
    /// of it was added, so that the same call may be repeated when there is room.
    pub fn add<M: Storage>(&mut self, meta: &mut M, disk: u16, start: u64, content: &[u8]) -> Result<(), ReplicaError> {
        let before = (self.entries.len(), self.entries.last().copied(), self.data_blocks);
        let added = self.add_runs(meta, disk, start, content);
        if added.is_err() {
            self.entries.truncate(before.0);
            if let (Some(last), Some(entry)) = (self.entries.last_mut(), before.1) {
                *last = entry;
            }
            self.data_blocks = before.2;
        }
        added
    }

    fn add_runs<M: Storage>(
        &mut self,
        meta: &mut M,
        disk: u16,
        start: u64,
        content: &[u8],
    ) -> Result<(), ReplicaError> {
        self.start(meta)?;
        let is_zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
        let blocks: Vec<&[u8]> = content.chunks(BLOCK_BYTES as usize).collect();
        let mut from = 0;
        while from < blocks.len() {
            let zero = is_zero(blocks[from]);
            let mut to = from + 1;
            while to < blocks.len() && to - from < UNDO_ENTRY_BLOCKS_MAX as usize && is_zero(blocks[to]) == zero {
                to += 1;
            }
            let run = (to - from) as u32;
            let first = start + from as u64;
            let mut entry = UndoEntry { start: first, blocks: run, disk, zero, at: 0, crc32: 0 };
            if !zero {
                let data = &content[from * BLOCK_BYTES as usize..to * BLOCK_BYTES as usize];
                meta.write(&self.name, data_offset(self.data_blocks), data)?;
                entry.at = self.data_blocks;
                entry.crc32 = crc32(&[data]);
                self.data_blocks += u64::from(run);
            }
            self.push(entry);
            from = to;
        }
        Ok(())
    }

    /// Add consecutive blocks that were zero.
    pub fn add_zero<M: Storage>(
        &mut self,
        meta: &mut M,
        disk: u16,
        start: u64,
        blocks: u64,
    ) -> Result<(), ReplicaError> {
        self.start(meta)?;
        let mut at = start;
        while at < start + blocks {
            let run = (start + blocks - at).min(u64::from(u32::MAX)) as u32;
            self.push(UndoEntry { start: at, blocks: run, disk, zero: true, at: 0, crc32: 0 });
            at += u64::from(run);
        }
        Ok(())
    }

    /// Append an index entry; neighbouring zero runs become one.
    fn push(&mut self, entry: UndoEntry) {
        if let Some(last) = self.entries.last_mut() {
            assert!((last.disk, last.end()) <= (entry.disk, entry.start), "undo is captured in order");
            let joined = u64::from(last.blocks) + u64::from(entry.blocks);
            if last.zero
                && entry.zero
                && last.disk == entry.disk
                && last.end() == entry.start
                && let Ok(blocks) = u32::try_from(joined)
            {
                last.blocks = blocks;
                return;
            }
        }
        self.entries.push(entry);
    }

    /// Write index and trailer and make the file and its name durable.
    pub fn finish<M: Storage>(mut self, meta: &mut M) -> Result<UndoIndex, ReplicaError> {
        self.start(meta)?;
        let index_at = data_offset(self.data_blocks);
        let mut index = Vec::new();
        for entry in &self.entries {
            index.put_u16(entry.disk);
            index.put_u16(u16::from(entry.zero));
            index.put_u32(entry.blocks);
            index.put_u64(entry.start);
            index.put_u64(entry.at);
            index.put_u32(entry.crc32);
            index.put_u32(0);
        }
        let mut trailer = Vec::with_capacity(TRAILER_BYTES as usize);
        trailer.put(&TRAILER_MAGIC);
        trailer.put_u64(index_at);
        trailer.put_u64(self.entries.len() as u64);
        trailer.put_u64(self.data_blocks);
        trailer.put_u32(crc32(&[&index]));
        let crc = crc32(&[&trailer]);
        trailer.put_u32(crc);
        index.put(&trailer);
        meta.write(&self.name, index_at, &index)?;
        meta.sync(&self.name)?;
        meta.sync_folder()?;
        let info =
            UndoInfo { name: self.name, newer: self.newer, older: self.older, bytes: index_at + index.len() as u64 };
        Ok(UndoIndex { info, entries: self.entries })
    }
}

/// Read an undo file's header and trailer. `Ok(None)`: its writing was interrupted, it counts for nothing.
pub(crate) fn read_info<M: Storage>(meta: &M, name: &str) -> Result<Option<UndoInfo>, ReplicaError> {
    let bytes = meta.len(name)?;
    if bytes < UNDO_HEADER_BYTES + TRAILER_BYTES {
        return Ok(None);
    }
    let mut header = vec![0; UNDO_HEADER_BYTES as usize];
    read_exact(meta, name, 0, &mut header)?;
    let Some((version, newer, older)) = decode_header(&header) else {
        return Ok(None);
    };
    if version > UNDO_VERSION {
        return Err(ReplicaError::newer(name, version, UNDO_VERSION));
    }
    if read_trailer(meta, name, bytes)?.is_none() || name != undo_name(newer, older.generation) {
        return Ok(None);
    }
    Ok(Some(UndoInfo { name: name.into(), newer, older, bytes }))
}

fn decode_header(header: &[u8]) -> Option<(u16, Generation, Mark)> {
    let mut reader = Reader::new(header);
    let magic: [u8; 8] = reader.array().ok()?;
    let version = reader.u16().ok()?;
    reader.u16().ok()?;
    let crc = reader.u32().ok()?;
    let newer = take_generation(&mut reader).ok()?;
    let older = Mark::decode(&mut reader).ok()?;
    let good = magic == UNDO_MAGIC && crc == crc32(&[header.get(..12)?, header.get(16..)?]);
    good.then_some((version, newer, older))
}

struct Trailer {
    index_at: u64,
    entries: u64,
    data_blocks: u64,
    index_crc: u32,
}

fn decode_trailer(bytes: &[u8], file_bytes: u64) -> Option<Trailer> {
    let mut reader = Reader::new(bytes);
    let magic: [u8; 8] = reader.array().ok()?;
    let index_at = reader.u64().ok()?;
    let entries = reader.u64().ok()?;
    let data_blocks = reader.u64().ok()?;
    let index_crc = reader.u32().ok()?;
    let crc = reader.u32().ok()?;
    if magic != TRAILER_MAGIC || crc != crc32(&[bytes.get(..TRAILER_BYTES as usize - 4)?]) {
        return None;
    }
    // The lengths must add up to the file's, so the index that is allocated for is really there.
    let index_bytes = entries.checked_mul(ENTRY_BYTES)?;
    let data = data_blocks.checked_mul(BLOCK_BYTES)?;
    let fits = index_at == UNDO_HEADER_BYTES.checked_add(data)?
        && index_at.checked_add(index_bytes)?.checked_add(TRAILER_BYTES)? == file_bytes;
    fits.then_some(Trailer { index_at, entries, data_blocks, index_crc })
}

fn read_trailer<M: Storage>(meta: &M, name: &str, file_bytes: u64) -> Result<Option<Trailer>, ReplicaError> {
    let mut bytes = [0; TRAILER_BYTES as usize];
    read_exact(meta, name, file_bytes - TRAILER_BYTES, &mut bytes)?;
    Ok(decode_trailer(&bytes, file_bytes))
}

/// Whether an undo file's index and all its data are what was written: a file that was not synced may have any of its parts.
pub(crate) fn is_whole<M: Storage>(meta: &M, info: &UndoInfo) -> Result<bool, ReplicaError> {
    match read_index(meta, info).and_then(|index| index.damage(meta).next().map_or(Ok(()), Err)) {
        Ok(()) => Ok(true),
        Err(ReplicaError::Corrupt { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Read and check the whole index of a complete undo file.
pub(crate) fn read_index<M: Storage>(meta: &M, info: &UndoInfo) -> Result<UndoIndex, ReplicaError> {
    let corrupt = || ReplicaError::corrupt(&info.name, "index");
    let trailer = read_trailer(meta, &info.name, info.bytes)?.ok_or_else(corrupt)?;
    let mut bytes = vec![0; (trailer.entries * ENTRY_BYTES) as usize];
    read_exact(meta, &info.name, trailer.index_at, &mut bytes)?;
    if crc32(&[&bytes]) != trailer.index_crc {
        return Err(corrupt());
    }
    let entries = decode_entries(&bytes, trailer.data_blocks).ok_or_else(corrupt)?;
    Ok(UndoIndex { info: info.clone(), entries })
}

fn decode_entries(bytes: &[u8], data_blocks: u64) -> Option<Vec<UndoEntry>> {
    let mut entries: Vec<UndoEntry> = Vec::with_capacity(bytes.len() / ENTRY_BYTES as usize);
    let mut reader = Reader::new(bytes);
    while reader.left() > 0 {
        let disk = reader.u16().ok()?;
        let zero = match reader.u16().ok()? {
            0 => false,
            1 => true,
            _ => return None,
        };
        let blocks = reader.u32().ok()?;
        let start = reader.u64().ok()?;
        let at = reader.u64().ok()?;
        let crc32 = reader.u32().ok()?;
        reader.u32().ok()?;
        start.checked_add(u64::from(blocks))?;
        let inside = zero || at.checked_add(u64::from(blocks))? <= data_blocks;
        if !inside || blocks == 0 || (!zero && blocks > UNDO_ENTRY_BLOCKS_MAX) {
            return None;
        }
        let entry = UndoEntry { start, blocks, disk, zero, at, crc32 };
        if entries.last().is_some_and(|last| (last.disk, last.end()) > (disk, start)) {
            return None;
        }
        entries.push(entry);
    }
    Some(entries)
}

/// Feed arbitrary bytes to the decoders of this file; for property tests and fuzzing.
pub fn fuzz_decode(bytes: &[u8]) {
    let _ = decode_header(bytes);
    let _ = decode_trailer(bytes, bytes.len() as u64);
    let _ = decode_entries(bytes, 1 << 20);
}
