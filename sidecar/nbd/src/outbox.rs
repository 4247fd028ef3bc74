//! Replies on their way out, collected so that one system call sends many.
//!
//! A [`Batch`] is headers in one arena, payloads in their own buffers, and the order of both. It knows nothing of
//! requests beyond two counts: replies that are complete in it, and bytes that its buffers are accounted with.

use std::io::IoSlice;
use std::os::unix::net::UnixStream;

use rustix::io::Errno as Os;
use rustix::net::{SendAncillaryBuffer, SendFlags};

use crate::buffers::Buffers;

/// Pieces per system call: 64 reads, header and data each.
const PIECES_PER_CALL: usize = 128;

/// How far [`Batch::send`] came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Sent {
    All,
    /// The client does not take more for now.
    Blocked,
    /// The client is gone.
    Broken,
}

#[derive(Clone, Copy)]
struct Piece {
    /// Which payload, or [`HEADERS`].
    buffer: u32,
    start: u32,
    end: u32,
}

/// Marks a piece of the arena.
const HEADERS: u32 = u32::MAX;

struct Payload {
    data: Vec<u8>,
    accounted_bytes: usize,
    /// Index of the last piece that needs it.
    last_piece: usize,
}

#[derive(Default)]
pub(crate) struct Batch {
    arena: Vec<u8>,
    pieces: Vec<Piece>,
    payloads: Vec<Payload>,
    /// Replies that end in this batch.
    pub replies: usize,
    /// First piece that is not fully sent, and how much of it is.
    next_piece: usize,
    sent_of_piece: usize,
    released_payloads: usize,
    bytes: usize,
}

impl Batch {
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Bytes to send, in total.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Append header bytes through `write`.
    pub fn header(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.arena.len();
        write(&mut self.arena);
        let end = self.arena.len();
        self.bytes += end - start;
        match self.pieces.last_mut() {
            Some(last) if last.buffer == HEADERS => last.end = end as u32,
            _ if end > start => self.pieces.push(Piece { buffer: HEADERS, start: start as u32, end: end as u32 }),
            _ => {}
        }
    }

    /// Add a payload; [`Batch::data`] refers to it by the number returned.
    pub fn payload(&mut self, data: Vec<u8>, accounted_bytes: usize) -> u32 {
        self.payloads.push(Payload { data, accounted_bytes, last_piece: self.pieces.len() });
        (self.payloads.len() - 1) as u32
    }

    /// Append `[start, end)` of a payload.
    pub fn data(&mut self, payload: u32, start: u32, end: u32) {
        self.bytes += (end - start) as usize;
        self.payloads[payload as usize].last_piece = self.pieces.len();
        self.pieces.push(Piece { buffer: payload, start, end });
    }

    fn slice(&self, piece: Piece) -> &[u8] {
        let bytes = match piece.buffer {
            HEADERS => &self.arena,
            payload => &self.payloads[payload as usize].data,
        };
        &bytes[piece.start as usize..piece.end as usize]
    }

    /// Send what is left without waiting.
    pub fn send(&mut self, socket: &UnixStream) -> Sent {
        while self.next_piece < self.pieces.len() {
            let mut slices = [IoSlice::new(&[]); PIECES_PER_CALL];
            let mut count = 0;
            for piece in self.pieces[self.next_piece..].iter().take(PIECES_PER_CALL) {
                let skip = if count == 0 { self.sent_of_piece } else { 0 };
                slices[count] = IoSlice::new(&self.slice(*piece)[skip..]);
                count += 1;
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::sendmsg(socket, &slices[..count], &mut SendAncillaryBuffer::default(), flags) {
                Ok(sent) => self.advance(sent),
                Err(Os::INTR) => {}
                Err(Os::AGAIN) => return Sent::Blocked,
                Err(_) => return Sent::Broken,
            }
        }
        Sent::All
    }

    fn advance(&mut self, mut sent: usize) {
        while sent > 0 {
            let piece = self.pieces[self.next_piece];
            let left = (piece.end - piece.start) as usize - self.sent_of_piece;
            if sent < left {
                self.sent_of_piece += sent;
                return;
            }
            sent -= left;
            self.sent_of_piece = 0;
            self.next_piece += 1;
        }
    }

    /// Give back the payloads that are fully sent, and once everything is, reset for reuse. Returns (replies, accounted
    /// bytes) that this frees.
    pub fn release(&mut self, buffers: &mut Buffers) -> (usize, usize) {
        let mut bytes = 0;
        while let Some(payload) = self.payloads.get_mut(self.released_payloads) {
            if payload.last_piece >= self.next_piece {
                break;
            }
            bytes += payload.accounted_bytes;
            buffers.give(std::mem::take(&mut payload.data));
            self.released_payloads += 1;
        }
        if self.next_piece < self.pieces.len() {
            return (0, bytes);
        }
        let replies = self.replies;
        self.reset();
        (replies, bytes)
    }

    /// Drop everything unsent (the client is gone). Returns (replies, accounted bytes) that this frees.
    pub fn discard(&mut self) -> (usize, usize) {
        let bytes = self.payloads[self.released_payloads..].iter().map(|p| p.accounted_bytes).sum();
        let replies = self.replies;
        self.reset();
        (replies, bytes)
    }

    fn reset(&mut self) {
        self.arena.clear();
        self.pieces.clear();
        self.payloads.clear();
        self.replies = 0;
        self.next_piece = 0;
        self.sent_of_piece = 0;
        self.released_payloads = 0;
        self.bytes = 0;
    }
}
