//! The receive side of one connection: one system call brings in many requests, and a large payload goes straight
//! into its own buffer.
//!
//! Invariant: memory is one fixed buffer. How far ahead it reads follows the traffic: far for small requests, a little
//! after large writes, whose bytes would only be copied once more.

use std::io::IoSliceMut;
use std::os::unix::net::UnixStream;

use rustix::io::Errno as Os;
use rustix::net::{RecvAncillaryBuffer, RecvFlags};

use crate::limits::INBOX_BYTES;

/// Writes from this length on are large, in bytes.
const LARGE_WRITE_BYTES: u32 = 16 << 10;
/// How far to read ahead among large writes, in bytes: the next header, and what else may come.
const WINDOW_AMONG_LARGE: usize = 4 << 10;

pub(crate) struct Inbox {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    window: usize,
}

impl Inbox {
    pub fn new() -> Self {
        Inbox { buffer: vec![0; INBOX_BYTES].into_boxed_slice(), start: 0, end: 0, window: INBOX_BYTES }
    }

    /// What was received and not consumed.
    pub fn received(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    pub fn consume(&mut self, bytes: usize) {
        self.start += bytes;
        debug_assert!(self.start <= self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Move as much as there is into `target`; returns how much.
    pub fn take(&mut self, target: &mut [u8]) -> usize {
        let bytes = target.len().min(self.end - self.start);
        target[..bytes].copy_from_slice(&self.buffer[self.start..self.start + bytes]);
        self.consume(bytes);
        bytes
    }

    /// The client just began a write of this length (0: something without payload).
    pub fn expect_more_like(&mut self, payload_bytes: u32) {
        self.window = if payload_bytes >= LARGE_WRITE_BYTES { WINDOW_AMONG_LARGE } else { INBOX_BYTES };
    }

    /// Receive into `payload` first and, once that is full, into the buffer. Returns the bytes that went into
    /// `payload` and the bytes in total (0: the client has closed its side).
    pub fn receive(&mut self, socket: &UnixStream, payload: &mut [u8], wait: bool) -> Result<(usize, usize), Os> {
        let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        if self.start > 0 {
            // At most a partial header, or a partial handshake option, is left over.
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let until = self.buffer.len().min(self.end + self.window);
        let space = &mut self.buffer[self.end..until];
        if payload.is_empty() {
            let (_, received) = rustix::net::recv(socket, space, flags)?;
            self.end += received;
            return Ok((0, received));
        }
        let wanted = payload.len();
        let mut parts = [IoSliceMut::new(payload), IoSliceMut::new(space)];
        let message = rustix::net::recvmsg(socket, &mut parts, &mut RecvAncillaryBuffer::default(), flags)?;
        let into_payload = message.bytes.min(wanted);
        self.end += message.bytes - into_payload;
        Ok((into_payload, message.bytes))
    }
}
