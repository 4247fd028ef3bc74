//! The commit list: which frames supply a generation, and its root.
//!
//! A generation is an exact list of frames with the blocks excluded from each (design §3.2). The same entry bytes travel on
//! the wire, lie in the replica's list file and feed the root, so that source and replica hash the same thing. Lists of
//! millions of entries are appended in parts; a decoder holds one entry at a time.

use crate::{
    codec::{Put, Reader, Short, crc32},
    frame::FRAME_RANGE_BLOCKS_MAX,
    geometry::{Generation, GenerationNumber, Sequence, Session},
    replica::{ReplicaError, read_exact},
    storage::Storage,
};
use alloc::{format, string::String, vec, vec::Vec};

/// Largest exclusion bitmap in bytes: one bit per block of the largest frame.
pub const EXCLUDED_BYTES_MAX: usize = (FRAME_RANGE_BLOCKS_MAX / 8) as usize;
/// Bytes of an encoded entry without its bitmap.
pub const ENTRY_FIXED_BYTES: usize = 54;
/// Bytes of the root hash.
pub type Root = [u8; 32];

/// One frame of a generation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub session: Session,
    pub sequence: Sequence,
    /// The frame's CRC and digest as its header carries them.
    pub crc32: u32,
    pub digest: [u8; 32],
    /// Bit `i` (least significant first) set: the frame's `i`-th block is *not* taken from it. Empty: all are. No
    /// trailing zero bytes, so that one list has one root.
    pub excluded: Vec<u8>,
}

/// Why an entry's bytes were refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ListError {
    #[error("commit entry: {0}")]
    Short(#[from] Short),
    #[error("an exclusion bitmap of {bytes} bytes is over the limit or ends in a zero byte")]
    Bitmap { bytes: usize },
}

impl Entry {
    /// True if the frame's block with this index is not taken from it.
    pub fn excludes(&self, index: u64) -> bool {
        excludes(&self.excluded, index)
    }

    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.session.0);
        out.put_u64(self.sequence.0);
        out.put_u32(self.crc32);
        out.put(&self.digest);
        out.put_u16(self.excluded.len() as u16);
        out.put(&self.excluded);
    }

    pub fn decode(reader: &mut Reader<'_>) -> Result<Entry, ListError> {
        let session = Session(reader.u64()?);
        let sequence = Sequence(reader.u64()?);
        let crc32 = reader.u32()?;
        let digest = reader.array()?;
        let bytes = usize::from(reader.u16()?);
        if bytes > EXCLUDED_BYTES_MAX {
            return Err(ListError::Bitmap { bytes });
        }
        let excluded = reader.take(bytes)?.to_vec();
        if excluded.last() == Some(&0) {
            return Err(ListError::Bitmap { bytes });
        }
        Ok(Entry { session, sequence, crc32, digest, excluded })
    }

    /// Decode entries that fill `bytes` exactly.
    pub fn decode_all(bytes: &[u8]) -> Result<Vec<Entry>, ListError> {
        let mut reader = Reader::new(bytes);
        let mut entries = Vec::new();
        while reader.left() > 0 {
            entries.push(Entry::decode(&mut reader)?);
        }
        Ok(entries)
    }
}

/// True if bit `index` of the bitmap is set; bits beyond it are clear.
pub fn excludes(bitmap: &[u8], index: u64) -> bool {
    bitmap.get((index / 8) as usize).is_some_and(|byte| byte & (1 << (index % 8)) != 0)
}

/// Set bit `index`, growing the bitmap.
pub fn exclude(bitmap: &mut Vec<u8>, index: u64) {
    let byte = (index / 8) as usize;
    if bitmap.len() <= byte {
        bitmap.resize(byte + 1, 0);
    }
    bitmap[byte] |= 1 << (index % 8);
}

/// Accumulates the root of a list: BLAKE3 over (generation, parent, encoded entries in order). The leaves are the frames' own
/// digests, so the root covers the content.
#[derive(Clone, Debug)]
pub struct RootHasher(blake3::Hasher);

impl RootHasher {
    pub fn new(generation: Generation, parent: Generation) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"watari generation 1");
        for part in [generation, parent] {
            hasher.update(&part.epoch.to_le_bytes());
            hasher.update(&part.number.0.to_le_bytes());
        }
        RootHasher(hasher)
    }
    pub fn entry(&mut self, entry: &Entry) {
        let mut bytes = Vec::with_capacity(ENTRY_FIXED_BYTES + entry.excluded.len());
        entry.encode(&mut bytes);
        self.0.update(&bytes);
    }
    pub fn finish(&self) -> Root {
        *self.0.finalize().as_bytes()
    }
}

/// A whole commit request in memory; for lists that fit. Longer ones are appended in parts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CommitList {
    pub generation: Generation,
    /// The newest generation before this one; the default value for the first.
    pub parent: Generation,
    /// In (session, sequence) order, each frame once.
    pub entries: Vec<Entry>,
    pub root: Root,
}

impl CommitList {
    /// Make a list and its root.
    pub fn new(generation: Generation, parent: Generation, entries: Vec<Entry>) -> CommitList {
        let mut hasher = RootHasher::new(generation, parent);
        entries.iter().for_each(|entry| hasher.entry(entry));
        CommitList { generation, parent, root: hasher.finish(), entries }
    }
}

/// A generation with what proves it and when it was committed here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark {
    pub generation: Generation,
    pub root: Root,
    /// The replica's wall clock, seconds since 1970, at the commit.
    pub committed_at_seconds: u64,
}

/// Bytes of an encoded [`Mark`].
pub const MARK_BYTES: usize = 56;

impl Mark {
    pub fn encode(&self, out: &mut Vec<u8>) {
        put_generation(out, self.generation);
        out.put(&self.root);
        out.put_u64(self.committed_at_seconds);
    }
    pub fn decode(reader: &mut Reader<'_>) -> Result<Mark, Short> {
        Ok(Mark { generation: take_generation(reader)?, root: reader.array()?, committed_at_seconds: reader.u64()? })
    }
}

/// Epoch counter, then number.
pub fn put_generation(out: &mut Vec<u8>, generation: Generation) {
    out.put_u64(generation.epoch);
    out.put_u64(generation.number.0);
}

pub fn take_generation(reader: &mut Reader<'_>) -> Result<Generation, Short> {
    let epoch = reader.u64()?;
    Ok(Generation { number: GenerationNumber(reader.u64()?), epoch })
}

const LIST_MAGIC: [u8; 8] = *b"WATLIST\0";
const LIST_VERSION: u16 = 1;
/// Bytes before the entries.
const LIST_HEADER_BYTES: usize = 128;
/// Bytes read at a time when a list file is scanned.
const LIST_CHUNK_BYTES: usize = 1 << 20;

/// Name of the list file of a generation.
pub fn list_name(generation: Generation) -> String {
    format!("list-{:016x}-{:016x}", generation.epoch, generation.number.0)
}

/// True for a name that [`list_name`] makes.
pub fn is_list_name(name: &str) -> bool {
    name.starts_with("list-")
}

/// Writes a list file front to back; the header goes last, so an unfinished file never decodes.
#[derive(Debug)]
pub(crate) struct ListWriter {
    name: String,
    end: u64,
    count: u64,
    crc: crc32fast::Hasher,
    buffer: Vec<u8>,
}

impl ListWriter {
    pub fn new(generation: Generation) -> Self {
        ListWriter {
            name: list_name(generation),
            end: LIST_HEADER_BYTES as u64,
            count: 0,
            crc: crc32fast::Hasher::new(),
            buffer: Vec::new(),
        }
    }
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Buffer an entry. True when the buffer should be flushed.
    pub fn push(&mut self, entry: &Entry) -> bool {
        entry.encode(&mut self.buffer);
        self.count += 1;
        self.buffer.len() >= LIST_CHUNK_BYTES
    }
    /// Write out what is buffered. After a failure the same call may be repeated.
    pub fn flush<M: Storage>(&mut self, meta: &mut M) -> Result<(), ReplicaError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        meta.write(&self.name, self.end, &self.buffer)?;
        self.crc.update(&self.buffer);
        self.end += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
    /// Write the header, last, and make the file durable (its name needs a `sync_folder` after this).
    pub fn finish<M: Storage>(
        &mut self,
        meta: &mut M,
        mark: &Mark,
        parent: Generation,
        clear_rest: bool,
    ) -> Result<(), ReplicaError> {
        self.flush(meta)?;
        let mut header = Vec::with_capacity(LIST_HEADER_BYTES);
        header.put(&LIST_MAGIC);
        header.put_u16(LIST_VERSION);
        header.put_u16(u16::from(clear_rest));
        header.put_u32(0);
        mark.encode(&mut header);
        put_generation(&mut header, parent);
        header.put_u64(self.count);
        header.put_u64(self.end - LIST_HEADER_BYTES as u64);
        header.put_u32(self.crc.clone().finalize());
        header.resize(LIST_HEADER_BYTES, 0);
        let crc = crc32(&[&header[..12], &header[16..]]);
        header[12..16].copy_from_slice(&crc.to_le_bytes());
        meta.write(&self.name, 0, &header)?;
        meta.sync(&self.name)?;
        Ok(())
    }
}

/// A list file's header, checked.
#[derive(Clone, Debug)]
pub(crate) struct ListHeader {
    pub mark: Mark,
    pub parent: Generation,
    /// Blocks that no entry supplies must read as zeroes (first commit onto an image whose leftovers are unknown).
    pub clear_rest: bool,
    count: u64,
    bytes: u64,
    crc: u32,
}

/// Read the header of the list file of `generation`.
pub(crate) fn read_list_header<M: Storage>(meta: &M, name: &str) -> Result<ListHeader, ReplicaError> {
    let corrupt = |what: &str| ReplicaError::corrupt(name, what);
    let mut header = [0; LIST_HEADER_BYTES];
    read_exact(meta, name, 0, &mut header)?;
    let mut reader = Reader::new(&header);
    let bad = |_: Short| corrupt("header");
    let magic: [u8; 8] = reader.array().map_err(bad)?;
    let version = reader.u16().map_err(bad)?;
    let flags = reader.u16().map_err(bad)?;
    let crc = reader.u32().map_err(bad)?;
    if magic != LIST_MAGIC || crc != crc32(&[&header[..12], &header[16..]]) {
        return Err(corrupt("header checksum"));
    }
    if version > LIST_VERSION {
        return Err(ReplicaError::newer(name, version, LIST_VERSION));
    }
    let mark = Mark::decode(&mut reader).map_err(bad)?;
    let parent = take_generation(&mut reader).map_err(bad)?;
    Ok(ListHeader {
        mark,
        parent,
        clear_rest: flags & 1 != 0,
        count: reader.u64().map_err(bad)?,
        bytes: reader.u64().map_err(bad)?,
        crc: reader.u32().map_err(bad)?,
    })
}

/// Hand every entry of a list file to `each`, then check count, checksum and root.
pub(crate) fn read_list<M: Storage>(
    meta: &M,
    name: &str,
    header: &ListHeader,
    mut each: impl FnMut(Entry) -> Result<(), ReplicaError>,
) -> Result<(), ReplicaError> {
    let corrupt = |what: &str| ReplicaError::corrupt(name, what);
    let mut root = RootHasher::new(header.mark.generation, header.parent);
    let mut crc = crc32fast::Hasher::new();
    let mut count = 0u64;
    let mut pending: Vec<u8> = Vec::new();
    let mut done = 0u64;
    loop {
        let mut reader = Reader::new(&pending);
        let mut used = 0;
        while let Ok(entry) = Entry::decode(&mut reader) {
            used = reader.used();
            root.entry(&entry);
            count += 1;
            if count > header.count {
                return Err(corrupt("more entries than the header says"));
            }
            each(entry)?;
        }
        pending.drain(..used);
        // What is left is shorter than the largest entry, or it will never decode.
        if pending.len() > ENTRY_FIXED_BYTES + EXCLUDED_BYTES_MAX {
            return Err(corrupt("an entry"));
        }
        if done == header.bytes {
            break;
        }
        let step = (header.bytes - done).min(LIST_CHUNK_BYTES as u64) as usize;
        let mut chunk = vec![0; step];
        read_exact(meta, name, LIST_HEADER_BYTES as u64 + done, &mut chunk)?;
        crc.update(&chunk);
        done += step as u64;
        pending.extend_from_slice(&chunk);
    }
    if !pending.is_empty() || count != header.count || crc.finalize() != header.crc {
        return Err(corrupt("entries checksum"));
    }
    if root.finish() != header.mark.root {
        return Err(corrupt("root"));
    }
    Ok(())
}
