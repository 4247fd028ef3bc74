//! The transmission phase of one connection, on the connection's own thread: requests in, in batches.
//!
//! ```text
//!  ┌▶ all complete requests at hand ─▶ verify ─▶ submit each (completes here when fast, elsewhere later)
//!  │                                      └─ refuse, say goodbye, or cut
//!  └── wait for more ◀── send the replies collected meanwhile
//! ```
//! Requests and payloads longer than a part become several disk requests, admitted one by one, so that 32 MiB in one
//! request cost no more memory than the connection's limit.
//!
//! Invariant: before this thread waits for the client, everything that could be sent has been sent.

use std::sync::Arc;

use rustix::event::PollFlags;
use rustix::io::Errno as Os;
use watari_core::front::{Completion, Detach, Errno, GuestDisk, Op, Request};
use watari_core::nbd::wire::{CMD_READ, REQUEST_BYTES};
use watari_core::nbd::{Command, RequestHeader, Session, Verdict, reply};

use crate::inbox::Inbox;
use crate::limits::{CORK_BYTES, Limits};
use crate::link::{Admitted, Flushed, Link, ReplyKind, Role, SCAN, part_count, part_range};

/// Attempts to get the rest of a payload without sleeping: the client is in the middle of sending it.
const PAYLOAD_SPINS: u32 = 64;

/// The connection is over.
struct Ended(Detach);

pub(crate) struct Transmission<'a> {
    link: &'a Arc<Link>,
    reply: Arc<dyn Completion>,
    disk: &'a dyn GuestDisk,
    session: Session,
    inbox: Inbox,
    limits: &'a Limits,
}

impl<'a> Transmission<'a> {
    /// `inbox` may hold requests that came right behind the handshake.
    pub fn new(
        link: &'a Arc<Link>,
        disk: &'a dyn GuestDisk,
        session: Session,
        inbox: Inbox,
        limits: &'a Limits,
    ) -> Self {
        Transmission { link, reply: link.clone(), disk, session, inbox, limits }
    }

    /// Serve until the client leaves; returns how. Nothing of the connection is outstanding then.
    pub fn run(mut self) -> Detach {
        self.link.adopt_reader();
        let how = loop {
            if let Err(Ended(how)) = self.requests_at_hand().and_then(|()| self.receive(&mut [])) {
                break how;
            }
        };
        self.link.drain(self.limits.linger);
        how
    }

    fn requests_at_hand(&mut self) -> Result<(), Ended> {
        while let Some(bytes) = self.inbox.received().first_chunk::<REQUEST_BYTES>() {
            // Out of step with the client: nothing that follows could be understood.
            let header = RequestHeader::decode(bytes).ok_or(Ended(Detach::Lost))?;
            self.inbox.consume(REQUEST_BYTES);
            self.inbox.expect_more_like(0);
            match header.verify(&self.session) {
                Verdict::Run(command) => self.start(&header, command)?,
                Verdict::Done => {
                    // A read must be answered with chunks once they were negotiated.
                    let chunks = self.session.structured && header.kind == CMD_READ;
                    let write = |out: &mut Vec<u8>| match chunks {
                        true => reply::none(out, header.cookie),
                        false => reply::simple(out, header.cookie, Ok(())),
                    };
                    self.answer(write, false)?;
                }
                Verdict::Refuse { errno, why, skip_bytes } => {
                    self.skip(skip_bytes)?;
                    self.refuse(&header, errno, why)?;
                }
                Verdict::Goodbye => return Err(Ended(Detach::Clean)),
                Verdict::Cut => return Err(Ended(Detach::Lost)),
            }
            if self.link.corked_bytes() >= CORK_BYTES {
                self.link.flush(Role::Reader);
            }
        }
        Ok(())
    }

    fn start(&mut self, header: &RequestHeader, command: Command) -> Result<(), Ended> {
        match command {
            Command::Read { unfragmented } => self.read(header, unfragmented),
            Command::Write { fua } => self.write(header, fua),
            Command::Flush => self.plain(header, Op::Flush, false),
            Command::Trim { fua } => self.plain(header, Op::Discard, fua),
            Command::Cache => self.plain(header, Op::Cache, false),
            Command::WriteZeroes { no_hole, fast: true, .. } if !self.disk.zeroes_are_fast(no_hole) => {
                self.refuse(header, Errno::NotSupported, "not faster than writing")
            }
            Command::WriteZeroes { fua, no_hole, .. } => self.plain(header, Op::WriteZeroes { no_hole }, fua),
            Command::BlockStatus { one } => self.block_status(header, one),
        }
    }

    /// An operation without payload: one disk request, whatever its length.
    fn plain(&mut self, header: &RequestHeader, op: Op, fua: bool) -> Result<(), Ended> {
        let (index, data) = self.admit(header, self.status(), false, 1, 0)?;
        let (offset, length) = (header.offset, u64::from(header.length));
        let reply = self.reply.clone();
        self.disk.submit(Request { id: Link::part_id(index, 0), op, offset, length, fua, data, reply });
        Ok(())
    }

    fn read(&mut self, header: &RequestHeader, unfragmented: bool) -> Result<(), Ended> {
        let parts = part_count(header.offset, header.length);
        let kind = match self.session.structured {
            true => ReplyKind::Content { unfragmented },
            false => ReplyKind::SimpleContent,
        };
        // A simple reply is one piece on the wire. If it takes several parts they must leave in order and with nothing
        // in between: alone, one after another.
        let alone = kind == ReplyKind::SimpleContent && parts > 1;
        if alone {
            self.link.settle().ok_or(Ended(Detach::Lost))?;
        }
        let scan = if kind == (ReplyKind::Content { unfragmented: false }) { SCAN } else { 0 };
        let mut index = 0;
        for part in 0..parts {
            let (offset, length) = part_range(header.offset, header.length, part);
            let data = if part == 0 {
                let (slot, data) = self.admit(header, kind, true, parts, length)?;
                index = slot;
                data
            } else {
                match self.link.admit_part(length) {
                    Some(data) => data,
                    None => return self.give_up(index, parts - part),
                }
            };
            self.submit(Link::part_id(index, part) | scan, Op::Read, offset, false, data);
            if alone {
                self.link.settle().ok_or(Ended(Detach::Lost))?;
                if self.link.stop_if_failed(index, part, parts - part - 1) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, header: &RequestHeader, fua: bool) -> Result<(), Ended> {
        self.inbox.expect_more_like(header.length);
        let parts = part_count(header.offset, header.length);
        let mut index = 0;
        for part in 0..parts {
            let (offset, length) = part_range(header.offset, header.length, part);
            let mut data = if part == 0 {
                let (slot, data) = self.admit(header, self.status(), true, parts, length)?;
                index = slot;
                data
            } else {
                match self.link.admit_part(length) {
                    Some(data) => data,
                    None => return self.give_up(index, parts - part),
                }
            };
            if let Err(ended) = self.payload(&mut data) {
                self.link.abandon(index, parts - part, Some(length));
                return Err(ended);
            }
            self.submit(Link::part_id(index, part), Op::Write, offset, fua, data);
        }
        Ok(())
    }

    fn submit(&self, id: u64, op: Op, offset: u64, fua: bool, data: Vec<u8>) {
        let (length, reply) = (data.len() as u64, self.reply.clone());
        self.disk.submit(Request { id, op, offset, length, fua, data, reply });
    }

    fn status(&self) -> ReplyKind {
        ReplyKind::Status { structured: self.session.structured }
    }

    fn admit(
        &self,
        header: &RequestHeader,
        kind: ReplyKind,
        payload: bool,
        parts: u32,
        bytes: u32,
    ) -> Result<(u16, Vec<u8>), Ended> {
        let RequestHeader { cookie, offset, length, .. } = *header;
        self.link.admit(Admitted { cookie, offset, length, payload, kind }, parts, bytes).ok_or(Ended(Detach::Lost))
    }

    /// The client is gone and `parts` parts of the request were not admitted.
    fn give_up(&self, index: u16, parts: u32) -> Result<(), Ended> {
        self.link.abandon(index, parts, None);
        Err(Ended(Detach::Lost))
    }

    fn block_status(&mut self, header: &RequestHeader, one: bool) -> Result<(), Ended> {
        let runs = match self.disk.allocation(header.offset, u64::from(header.length)) {
            Ok(runs) => runs,
            Err(errno) => return self.refuse(header, errno, ""),
        };
        // A disk that describes nothing would leave the client without an answer.
        if runs.iter().all(|run| run.length == 0) {
            return self.refuse(header, Errno::Io, "allocation is unknown");
        }
        let write = |out: &mut Vec<u8>| {
            reply::block_status(out, header.cookie, header.length, one, &runs).expect("a run is not empty");
        };
        self.answer(write, false)
    }

    fn answer(&self, write: impl FnOnce(&mut Vec<u8>), failed: bool) -> Result<(), Ended> {
        self.link.answer(write, failed).ok_or(Ended(Detach::Lost))
    }

    fn refuse(&self, header: &RequestHeader, errno: Errno, why: &str) -> Result<(), Ended> {
        let structured = self.session.structured;
        let write = |out: &mut Vec<u8>| match structured {
            true => reply::error(out, header.cookie, errno, why),
            false => reply::simple(out, header.cookie, Err(errno)),
        };
        self.answer(write, true)
    }

    /// Discard the payload of a refused write.
    fn skip(&mut self, bytes: u32) -> Result<(), Ended> {
        let mut left = bytes as usize;
        while left > 0 {
            let at_hand = self.inbox.received().len().min(left);
            self.inbox.consume(at_hand);
            left -= at_hand;
            if left > 0 && at_hand == 0 {
                self.receive(&mut [])?;
            }
        }
        Ok(())
    }

    /// Fill a payload. The client is sending it right now, so sleep only if it takes its time.
    fn payload(&mut self, data: &mut [u8]) -> Result<(), Ended> {
        let mut filled = self.inbox.take(data);
        let mut spins = 0;
        while filled < data.len() {
            match self.inbox.receive(&self.link.socket, &mut data[filled..], false) {
                Ok((_, 0)) => return Err(Ended(Detach::Lost)),
                Ok((payload, _)) => filled += payload,
                Err(Os::AGAIN) if spins < PAYLOAD_SPINS => {
                    spins += 1;
                    std::hint::spin_loop();
                }
                Err(Os::AGAIN) => filled += self.receive_waiting(&mut data[filled..])?,
                Err(Os::INTR) => {}
                Err(_) => return Err(Ended(Detach::Lost)),
            }
        }
        Ok(())
    }

    fn receive(&mut self, payload: &mut [u8]) -> Result<(), Ended> {
        self.receive_waiting(payload).map(|_| ())
    }

    /// Send what is corked, then wait for bytes; returns how many of them went into `payload`.
    fn receive_waiting(&mut self, payload: &mut [u8]) -> Result<usize, Ended> {
        loop {
            let wait = match self.link.flush(Role::Reader) {
                Flushed::Broken => return Err(Ended(Detach::Lost)),
                // The socket's receive timeout bounds the wait, for trimming.
                Flushed::Drained | Flushed::Elsewhere => true,
                // The client does not take our replies for now, but may go on sending.
                Flushed::Blocked => {
                    self.link.poll(PollFlags::IN | PollFlags::OUT, None);
                    false
                }
            };
            match self.inbox.receive(&self.link.socket, payload, wait) {
                Ok((_, 0)) => return Err(Ended(Detach::Lost)),
                Ok((into_payload, _)) => return Ok(into_payload),
                Err(Os::AGAIN) if wait => self.link.trim(),
                Err(Os::AGAIN | Os::INTR) => {}
                Err(_) => return Err(Ended(Detach::Lost)),
            }
        }
    }
}
