//! The bytes of journal segments: segment header and records.
//!
//! A decoder here answers "this is no whole record" rather than failing: where good records end, the segment ends. It allocates
//! at most one frame header and never by a length it read.

use super::StoredFrame;
use crate::{
    codec::{Put, Reader, crc32},
    frame::{FRAME_HEADER_BYTES_MAX, FrameHeader},
    replica::ReplicaError,
    storage::Storage,
};
use alloc::{vec, vec::Vec};

const SEGMENT_MAGIC: [u8; 8] = *b"WATJOURN";
pub(super) const SEGMENT_VERSION: u16 = 1;
/// Bytes of a segment's header.
pub const SEGMENT_HEADER_BYTES: u64 = 64;
/// Bytes of a record's header, before the frame's own header.
pub const RECORD_HEADER_BYTES: usize = 56;
const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"WREC");

pub(super) fn encode_segment_header(segment: u64, identity: [u8; 16]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SEGMENT_HEADER_BYTES as usize);
    bytes.put(&SEGMENT_MAGIC);
    bytes.put_u16(SEGMENT_VERSION);
    bytes.put_u16(0);
    bytes.put_u32(0);
    bytes.put_u64(segment);
    bytes.put(&identity);
    bytes.resize(SEGMENT_HEADER_BYTES as usize, 0);
    let crc = crc32(&[&bytes[..12], &bytes[16..]]);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// (version, segment, identity), or `None` if these bytes are no complete header.
pub(super) fn decode_segment_header(bytes: &[u8]) -> Option<(u16, u64, [u8; 16])> {
    let mut reader = Reader::new(bytes);
    let magic: [u8; 8] = reader.array().ok()?;
    let version = reader.u16().ok()?;
    reader.u16().ok()?;
    let crc = reader.u32().ok()?;
    let segment = reader.u64().ok()?;
    let identity = reader.array().ok()?;
    (magic == SEGMENT_MAGIC && crc == crc32(&[&bytes[..12], &bytes[16..]])).then_some((version, segment, identity))
}

pub(super) fn encode_record(
    segment: u64,
    (number, synced_below): (u64, u64),
    header: &FrameHeader,
    payload: &[u8],
    in_image: bool,
    base: u64,
) -> Vec<u8> {
    let frame = header.encode();
    let mut bytes = Vec::with_capacity(RECORD_HEADER_BYTES + frame.len() + payload.len());
    bytes.put_u32(RECORD_MAGIC);
    bytes.put_u32(0);
    bytes.put_u64(segment);
    bytes.put_u64(number);
    bytes.put_u64(synced_below);
    bytes.put_u64(base);
    bytes.put_u32(u32::from(in_image));
    bytes.put_u32(frame.len() as u32);
    bytes.put_u32(payload.len() as u32);
    bytes.put_u32(0);
    bytes.put(&frame);
    let crc = crc32(&[&bytes[8..]]);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
    bytes.put(payload);
    bytes
}

/// A record's header, its own checksum checked. The payload is not.
struct RecordHeader {
    number: u64,
    synced_below: u64,
    frame: FrameHeader,
    in_image: bool,
    base: u64,
    /// Bytes before the payload.
    before_payload: u64,
}

/// Decode what lies before a payload. `None`: this is no record, the segment ends here.
fn decode_record(bytes: &[u8], segment: u64) -> Option<RecordHeader> {
    let mut reader = Reader::new(bytes);
    let magic = reader.u32().ok()?;
    let crc = reader.u32().ok()?;
    let found = reader.u64().ok()?;
    let number = reader.u64().ok()?;
    let synced_below = reader.u64().ok()?;
    let base = reader.u64().ok()?;
    let flags = reader.u32().ok()?;
    let header_bytes = reader.u32().ok()? as usize;
    let payload_bytes = reader.u32().ok()?;
    reader.u32().ok()?;
    if magic != RECORD_MAGIC || found != segment || flags > 1 || number == u64::MAX || synced_below > number {
        return None;
    }
    let encoded = reader.take(header_bytes).ok()?;
    if crc != crc32(&[bytes.get(8..reader.used())?]) {
        return None;
    }
    let (frame, used) = FrameHeader::decode(encoded).ok()?;
    let in_image = flags == 1;
    let expected = if in_image { 0 } else { frame.payload_bytes };
    if used != header_bytes || payload_bytes != expected {
        return None;
    }
    let before_payload = (RECORD_HEADER_BYTES + header_bytes) as u64;
    Some(RecordHeader { number, synced_below, frame, in_image, base, before_payload })
}

/// A record found by its header; its payload is there in full length but unchecked.
pub(super) struct Scanned {
    pub number: u64,
    pub synced_below: u64,
    pub frame: StoredFrame,
}

/// Read the header of the record at `at`. `Ok(None)` where the good records end.
pub(super) fn scan_record<M: Storage>(
    meta: &M,
    name: &str,
    segment: u64,
    at: u64,
    length: u64,
) -> Result<Option<Scanned>, ReplicaError> {
    let mut head = vec![0; RECORD_HEADER_BYTES + FRAME_HEADER_BYTES_MAX];
    let read = meta.read(name, at, &mut head)?;
    let Some(record) = decode_record(&head[..read], segment) else {
        return Ok(None);
    };
    let payload_at = at + record.before_payload;
    let payload_bytes = if record.in_image { 0 } else { u64::from(record.frame.payload_bytes) };
    if payload_at + payload_bytes > length {
        return Ok(None);
    }
    let frame = StoredFrame {
        header: record.frame,
        in_image: record.in_image,
        base: record.base,
        segment,
        payload_at,
        record_bytes: record.before_payload + payload_bytes,
    };
    Ok(Some(Scanned { number: record.number, synced_below: record.synced_below, frame }))
}

/// Feed arbitrary bytes to the decoders of this file; for property tests and fuzzing.
pub fn fuzz_decode(bytes: &[u8]) {
    let _ = decode_segment_header(bytes);
    let _ = decode_record(bytes, 1);
}
