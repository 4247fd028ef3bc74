//! Replies of the transmission phase ("Simple reply message", "Structured reply chunk message").
//!
//! Every function appends to a buffer that the caller reuses; payloads of reads are not copied here but sent by the
//! caller right after their header.

use alloc::vec::Vec;

use super::wire::*;
use crate::front::{Allocation, Errno};

/// Bytes of a simple reply without payload.
pub const SIMPLE_BYTES: usize = 16;
/// Bytes before the data of an OFFSET_DATA chunk.
pub const DATA_HEADER_BYTES: usize = 28;
/// Most extents in one BLOCK_STATUS reply: far below the 2^20 of the specification, so that a reply stays small.
pub const EXTENTS_MAX: usize = 4096;

/// Simple reply; the payload of a successful read follows it.
pub fn simple(out: &mut Vec<u8>, cookie: u64, result: Result<(), Errno>) {
    let mut bytes = [0u8; SIMPLE_BYTES];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&result.err().map_or(0, errno_on_wire).to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&bytes);
}

fn chunk(out: &mut Vec<u8>, cookie: u64, done: bool, kind: u16, payload_bytes: u32) {
    let mut bytes = [0u8; 20];
    bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&(if done { REPLY_FLAG_DONE } else { 0 }).to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&payload_bytes.to_be_bytes());
    out.extend_from_slice(&bytes);
}

/// NONE chunk: success, and the end of the reply.
pub fn none(out: &mut Vec<u8>, cookie: u64) {
    chunk(out, cookie, true, REPLY_TYPE_NONE, 0);
}

/// Header of an OFFSET_DATA chunk; `length` bytes of data must follow. `length` is not zero.
pub fn data_header(out: &mut Vec<u8>, cookie: u64, done: bool, offset: u64, length: u32) {
    chunk(out, cookie, done, REPLY_TYPE_OFFSET_DATA, length + 8);
    out.extend_from_slice(&offset.to_be_bytes());
}

/// OFFSET_HOLE chunk: `length` bytes from `offset` read as zeroes. `length` is not zero.
pub fn hole(out: &mut Vec<u8>, cookie: u64, done: bool, offset: u64, length: u32) {
    chunk(out, cookie, done, REPLY_TYPE_OFFSET_HOLE, 12);
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
}

/// ERROR chunk, the end of the reply. `why` is one of our own short texts.
pub fn error(out: &mut Vec<u8>, cookie: u64, errno: Errno, why: &str) {
    let text = &why.as_bytes()[..why.len().min(STRING_BYTES_MAX)];
    chunk(out, cookie, true, REPLY_TYPE_ERROR, 6 + text.len() as u32);
    out.extend_from_slice(&errno_on_wire(errno).to_be_bytes());
    out.extend_from_slice(&(text.len() as u16).to_be_bytes());
    out.extend_from_slice(text);
}

/// BLOCK_STATUS chunk for `base:allocation`, the end of the reply. `runs` start at the request's offset; the reply is
/// cut to the asked `length`, to one extent if `one`, to [`EXTENTS_MAX`] and to what a 32-bit length can say. `None`
/// (nothing appended) if there is no byte to describe.
pub fn block_status(out: &mut Vec<u8>, cookie: u64, length: u32, one: bool, runs: &[Allocation]) -> Option<()> {
    let start = out.len();
    chunk(out, cookie, true, REPLY_TYPE_BLOCK_STATUS, 0);
    out.extend_from_slice(&BASE_ALLOCATION_ID.to_be_bytes());
    let most = if one { 1 } else { EXTENTS_MAX };
    let (mut left, mut extents) = (length, 0usize);
    let mut last: Option<u32> = None;
    for run in runs {
        let run_bytes = u32::try_from(run.length).unwrap_or(u32::MAX).min(left);
        if run_bytes == 0 {
            continue;
        }
        let state = if run.hole { STATE_HOLE } else { 0 } | if run.zero { STATE_ZERO } else { 0 };
        if last == Some(state) {
            // "The server SHOULD use different status values between consecutive descriptors": grow the last one.
            let at = out.len() - 8;
            let grown = be32(out, at)? + run_bytes;
            out[at..at + 4].copy_from_slice(&grown.to_be_bytes());
        } else if extents == most {
            break;
        } else {
            out.extend_from_slice(&run_bytes.to_be_bytes());
            out.extend_from_slice(&state.to_be_bytes());
            extents += 1;
            last = Some(state);
        }
        left -= run_bytes;
        // A run cut short by a 32-bit length must not be followed by another one.
        if u64::from(run_bytes) < run.length || left == 0 {
            break;
        }
    }
    if extents == 0 {
        out.truncate(start);
        return None;
    }
    let payload_bytes = (out.len() - start - 20) as u32;
    out[start + 16..start + 20].copy_from_slice(&payload_bytes.to_be_bytes());
    Some(())
}
