//! Frames: how changed blocks travel from source to target and lie in the replica's journal.
//!
//! A frame says what some extents of one disk hold: bytes ([`FrameKind::Data`]), zeroes ([`FrameKind::Zero`]), or "what
//! you have committed already" ([`FrameKind::Same`], proved by digest). The same encoded header goes over the wire and
//! into the journal, so that the checksum made at the source is the one checked when the journal is applied.
//!
//! Bytes become a [`FrameHeader`] only through [`FrameHeader::decode`], which enforces every limit, and a [`Frame`] only
//! through [`Frame::check`], which has checked the CRC, the decoded length and the digest (style item 5). It does not
//! compress: the shell brings a [`Decompress`]. Byte diagram: `FORMAT.md`, "Frame".

use crate::{
    codec::{Put, Reader, Short, crc32},
    geometry::{BLOCK_BYTES, Block, DiskIndex, Extent, Sequence, Session},
    limits::{DISK_BYTES_MAX, DISKS_MAX, FRAME_BYTES_MAX, FRAME_EXTENTS_MAX},
};
use alloc::vec::Vec;

/// Version of the encoded frame header.
pub const FRAME_VERSION: u16 = 1;
/// Bytes of an encoded header without its extents.
pub const FRAME_HEADER_FIXED_BYTES: usize = 80;
/// Bytes of one encoded extent.
pub const EXTENT_BYTES: usize = 12;
/// Largest encoded header in bytes.
pub const FRAME_HEADER_BYTES_MAX: usize = FRAME_HEADER_FIXED_BYTES + FRAME_EXTENTS_MAX * EXTENT_BYTES;
/// Most blocks that one `Zero` or `Same` frame covers (256 MiB): bounds the exclusion bitmap of a commit entry (8 KiB)
/// and the time that checking one `Same` frame takes.
pub const FRAME_RANGE_BLOCKS_MAX: u64 = 1 << 16;

/// What a frame says about its extents.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum FrameKind {
    /// The payload is the content of all extents, one after the other.
    Data,
    /// The extents read as zeroes. No payload.
    Zero,
    /// The replica's committed content of these blocks is already right; the digest proves it. No payload.
    Same,
}

/// How the payload is stored.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Encoding {
    Raw,
    Zstd,
}

/// Why a frame is not accepted. All of these mean that the sender or the medium is at fault; nothing was changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    #[error("frame header: {0}")]
    Short(#[from] Short),
    #[error("frame version {found} is newer than {FRAME_VERSION}")]
    NewerVersion { found: u16 },
    #[error("frame field {field} has the value {found}, which is not allowed")]
    Field { field: &'static str, found: u64 },
    #[error("extent {index} overlaps its predecessor, is empty or lies beyond the largest disk")]
    Extent { index: usize },
    #[error("frame checksum: expected {expected:#010x}, found {found:#010x}")]
    Crc { expected: u32, found: u32 },
    #[error("the payload does not decode to {expected} bytes")]
    Payload { expected: u64 },
    #[error("the content does not have the digest that the frame names")]
    Digest,
}

/// Everything about a frame except its payload.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// Counter of the epoch in which the source may write.
    pub epoch: u64,
    pub session: Session,
    pub sequence: Sequence,
    pub disk: DiskIndex,
    pub kind: FrameKind,
    pub encoding: Encoding,
    /// Sorted, non-overlapping, 1 to [`FRAME_EXTENTS_MAX`].
    pub extents: Vec<Extent>,
    /// Bytes of the payload as sent.
    pub payload_bytes: u32,
    /// Bytes of the extents; the last block of a disk counts whole, padded with zeroes.
    pub content_bytes: u64,
    /// CRC-32 over the encoded header (without this field) and the payload as sent.
    pub crc32: u32,
    /// See [`content_digest`] and [`zero_digest`].
    pub digest: [u8; 32],
}

/// Who sends a frame and what it is called: the fields every constructor needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameId {
    pub epoch: u64,
    pub session: Session,
    pub sequence: Sequence,
}

/// Undoes [`Encoding::Zstd`]. Implemented by the shell; must not produce more than `content_bytes`.
pub trait Decompress {
    /// Replace `out` by the decoded bytes; `false` if the payload is malformed or does not decode to `content_bytes`.
    fn decompress(&self, payload: &[u8], content_bytes: usize, out: &mut Vec<u8>) -> bool;
}

impl<F: Fn(&[u8], usize, &mut Vec<u8>) -> bool> Decompress for F {
    fn decompress(&self, payload: &[u8], content_bytes: usize, out: &mut Vec<u8>) -> bool {
        self(payload, content_bytes, out)
    }
}

/// A decoder for places where every frame is raw: refuses compressed ones.
#[derive(Clone, Copy, Debug, Default)]
pub struct RawOnly;

impl Decompress for RawOnly {
    fn decompress(&self, _: &[u8], _: usize, _: &mut Vec<u8>) -> bool {
        false
    }
}

fn place_hasher(domain: &[u8], disk: DiskIndex, extents: &[Extent]) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    hasher.update(domain);
    hasher.update(&disk.0.to_le_bytes());
    hasher.update(&(extents.len() as u32).to_le_bytes());
    for extent in extents {
        hasher.update(&extent.start.0.to_le_bytes());
        hasher.update(&extent.blocks.to_le_bytes());
    }
    hasher
}

/// Begin a digest over (disk, extents, content); feed it the content in order. For content that comes in pieces.
pub fn content_hasher(disk: DiskIndex, extents: &[Extent]) -> blake3::Hasher {
    place_hasher(b"watari content 1", disk, extents)
}

/// BLAKE3 over (disk, extents, content): the digest of a `Data` or `Same` frame.
pub fn content_digest(disk: DiskIndex, extents: &[Extent], content: &[u8]) -> [u8; 32] {
    let mut hasher = content_hasher(disk, extents);
    hasher.update(content);
    *hasher.finalize().as_bytes()
}

/// BLAKE3 over (disk, extents, kind): the digest of a `Zero` frame, whose content needs no hashing.
pub fn zero_digest(disk: DiskIndex, extents: &[Extent]) -> [u8; 32] {
    *place_hasher(b"watari zero 1", disk, extents).finalize().as_bytes()
}

impl FrameHeader {
    /// A data frame over `content` (whole blocks). `compressed` is its zstd form if that was worth it; the payload sent
    /// is then that one, else the content itself.
    pub fn data(
        id: FrameId,
        disk: DiskIndex,
        extents: Vec<Extent>,
        content: &[u8],
        compressed: Option<&[u8]>,
    ) -> Result<FrameHeader, FrameError> {
        let digest = content_digest(disk, &extents, content);
        let (encoding, payload) = match compressed {
            Some(bytes) => (Encoding::Zstd, bytes),
            None => (Encoding::Raw, content),
        };
        let header = Self::build(id, disk, FrameKind::Data, encoding, extents, payload, digest)?;
        if header.content_bytes != content.len() as u64 {
            return Err(FrameError::Payload { expected: header.content_bytes });
        }
        Ok(header)
    }

    /// A frame that says the extents read as zeroes.
    pub fn zero(id: FrameId, disk: DiskIndex, extents: Vec<Extent>) -> Result<FrameHeader, FrameError> {
        let digest = zero_digest(disk, &extents);
        Self::build(id, disk, FrameKind::Zero, Encoding::Raw, extents, &[], digest)
    }

    /// A frame that says the target's committed content of the extents has this digest ([`content_digest`]).
    pub fn same(
        id: FrameId,
        disk: DiskIndex,
        extents: Vec<Extent>,
        digest: [u8; 32],
    ) -> Result<FrameHeader, FrameError> {
        Self::build(id, disk, FrameKind::Same, Encoding::Raw, extents, &[], digest)
    }

    fn build(
        id: FrameId,
        disk: DiskIndex,
        kind: FrameKind,
        encoding: Encoding,
        extents: Vec<Extent>,
        payload: &[u8],
        digest: [u8; 32],
    ) -> Result<FrameHeader, FrameError> {
        let content_bytes = extents.iter().map(|extent| extent.bytes()).sum();
        let mut header = FrameHeader {
            epoch: id.epoch,
            session: id.session,
            sequence: id.sequence,
            disk,
            kind,
            encoding,
            extents,
            payload_bytes: u32::try_from(payload.len())
                .map_err(|_| FrameError::Field { field: "payload_bytes", found: payload.len() as u64 })?,
            content_bytes,
            crc32: 0,
            digest,
        };
        header.validate()?;
        header.crc32 = crc32(&[&header.encode()[4..], payload]);
        Ok(header)
    }

    /// Blocks covered by all extents.
    pub fn blocks(&self) -> u64 {
        self.content_bytes / BLOCK_BYTES
    }

    /// The header's bytes, [`FRAME_HEADER_FIXED_BYTES`] + [`EXTENT_BYTES`] per extent.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FRAME_HEADER_FIXED_BYTES + self.extents.len() * EXTENT_BYTES);
        bytes.put_u32(self.crc32);
        bytes.put_u16(FRAME_VERSION);
        bytes.put_u8(match self.kind {
            FrameKind::Data => 1,
            FrameKind::Zero => 2,
            FrameKind::Same => 3,
        });
        bytes.put_u8(match self.encoding {
            Encoding::Raw => 0,
            Encoding::Zstd => 1,
        });
        bytes.put_u64(self.epoch);
        bytes.put_u64(self.session.0);
        bytes.put_u64(self.sequence.0);
        bytes.put_u16(self.disk.0);
        bytes.put_u16(self.extents.len() as u16);
        bytes.put_u32(self.payload_bytes);
        bytes.put_u64(self.content_bytes);
        bytes.put(&self.digest);
        for extent in &self.extents {
            bytes.put_u64(extent.start.0);
            bytes.put_u32(extent.blocks);
        }
        bytes
    }

    /// Decode and validate a header; returns it and the bytes it took. The CRC is checked by [`Frame::check`], which
    /// has the payload.
    pub fn decode(bytes: &[u8]) -> Result<(FrameHeader, usize), FrameError> {
        let mut reader = Reader::new(bytes);
        let crc32 = reader.u32()?;
        let version = reader.u16()?;
        if version > FRAME_VERSION {
            return Err(FrameError::NewerVersion { found: version });
        }
        if version == 0 {
            return Err(FrameError::Field { field: "version", found: 0 });
        }
        let kind = match reader.u8()? {
            1 => FrameKind::Data,
            2 => FrameKind::Zero,
            3 => FrameKind::Same,
            other => return Err(FrameError::Field { field: "kind", found: u64::from(other) }),
        };
        let encoding = match reader.u8()? {
            0 => Encoding::Raw,
            1 => Encoding::Zstd,
            other => return Err(FrameError::Field { field: "encoding", found: u64::from(other) }),
        };
        let epoch = reader.u64()?;
        let session = Session(reader.u64()?);
        let sequence = Sequence(reader.u64()?);
        let disk = DiskIndex(reader.u16()?);
        let count = usize::from(reader.u16()?);
        if count > FRAME_EXTENTS_MAX {
            return Err(FrameError::Field { field: "extents", found: count as u64 });
        }
        let payload_bytes = reader.u32()?;
        let content_bytes = reader.u64()?;
        let digest = reader.array()?;
        let mut extents = Vec::with_capacity(count);
        for _ in 0..count {
            let start = reader.u64()?;
            let blocks = reader.u32()?;
            extents.push(Extent { start: Block(start), blocks });
        }
        let header = FrameHeader {
            epoch,
            session,
            sequence,
            disk,
            kind,
            encoding,
            extents,
            payload_bytes,
            content_bytes,
            crc32,
            digest,
        };
        header.validate()?;
        Ok((header, reader.used()))
    }

    /// Every limit of the format. Arithmetic is safe because each extent is bounded before it is summed.
    fn validate(&self) -> Result<(), FrameError> {
        let field = |field, found| Err(FrameError::Field { field, found });
        if usize::from(self.disk.0) >= DISKS_MAX {
            return field("disk", u64::from(self.disk.0));
        }
        if self.sequence.0 == 0 {
            return field("sequence", 0);
        }
        if self.extents.is_empty() || self.extents.len() > FRAME_EXTENTS_MAX {
            return field("extents", self.extents.len() as u64);
        }
        let mut end = 0;
        let mut blocks = 0u64;
        for (index, extent) in self.extents.iter().enumerate() {
            let start = extent.start.0;
            if extent.blocks == 0 || start < end || start > DISK_BYTES_MAX / BLOCK_BYTES {
                return Err(FrameError::Extent { index });
            }
            end = start + u64::from(extent.blocks);
            if end > DISK_BYTES_MAX / BLOCK_BYTES {
                return Err(FrameError::Extent { index });
            }
            blocks += u64::from(extent.blocks);
        }
        if self.content_bytes != blocks * BLOCK_BYTES {
            return field("content_bytes", self.content_bytes);
        }
        match self.kind {
            FrameKind::Data => {
                if self.content_bytes > FRAME_BYTES_MAX {
                    return field("content_bytes", self.content_bytes);
                }
                let payload = u64::from(self.payload_bytes);
                let fits = match self.encoding {
                    Encoding::Raw => payload == self.content_bytes,
                    // A payload that did not shrink travels raw.
                    Encoding::Zstd => payload > 0 && payload < self.content_bytes,
                };
                if !fits {
                    return field("payload_bytes", payload);
                }
            }
            FrameKind::Zero | FrameKind::Same => {
                if blocks > FRAME_RANGE_BLOCKS_MAX {
                    return field("content_bytes", self.content_bytes);
                }
                if self.payload_bytes != 0 {
                    return field("payload_bytes", u64::from(self.payload_bytes));
                }
                if self.encoding != Encoding::Raw {
                    return field("encoding", 1);
                }
            }
        }
        Ok(())
    }

    /// Check the checksum over header and payload.
    pub fn check_crc(&self, payload: &[u8]) -> Result<(), FrameError> {
        if payload.len() as u64 != u64::from(self.payload_bytes) {
            return Err(FrameError::Field { field: "payload_bytes", found: payload.len() as u64 });
        }
        let found = crc32(&[&self.encode()[4..], payload]);
        if found != self.crc32 {
            return Err(FrameError::Crc { expected: self.crc32, found });
        }
        Ok(())
    }
}

/// A frame whose checksum, length and digest were found right. Cheap to make on many threads, outside any lock.
#[derive(Debug)]
pub struct Frame<'a> {
    header: FrameHeader,
    payload: &'a [u8],
    /// The decoded content when that is not the payload itself.
    decoded: Option<Vec<u8>>,
}

impl<'a> Frame<'a> {
    /// Check everything that can be checked without the replica's state.
    pub fn check(header: FrameHeader, payload: &'a [u8], decompress: &dyn Decompress) -> Result<Frame<'a>, FrameError> {
        header.validate()?;
        header.check_crc(payload)?;
        let mut frame = Frame { header, payload, decoded: None };
        let header = &frame.header;
        let digest = match header.kind {
            FrameKind::Data => {
                if header.encoding == Encoding::Zstd {
                    let mut out = Vec::new();
                    let good = decompress.decompress(payload, header.content_bytes as usize, &mut out);
                    if !good || out.len() as u64 != header.content_bytes {
                        return Err(FrameError::Payload { expected: header.content_bytes });
                    }
                    frame.decoded = Some(out);
                }
                content_digest(frame.header.disk, &frame.header.extents, frame.content())
            }
            FrameKind::Zero => zero_digest(header.disk, &header.extents),
            // Only the replica can check this one: against what it has committed.
            FrameKind::Same => return Ok(frame),
        };
        if digest != frame.header.digest {
            return Err(FrameError::Digest);
        }
        Ok(frame)
    }

    pub fn header(&self) -> &FrameHeader {
        &self.header
    }
    /// Bytes as sent.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
    /// Content of all extents of a data frame; empty for the other kinds.
    pub fn content(&self) -> &[u8] {
        self.decoded.as_deref().unwrap_or(self.payload)
    }
}
