//! The transmission phase of one connection, on whichever of its threads reads: requests in, in batches.
//!
//! ```text
//!  ┌▶ all complete requests at hand ─▶ verify ─▶ submit each (completes here when fast, elsewhere later)
//!  │                                      └─ refuse, say goodbye, or cut
//!  └── wait for more ◀── send the replies collected meanwhile
//! ```
//! Requests and payloads longer than a part become several disk requests, admitted one by one, so that 32 MiB in one
//! request cost no more memory than the connection's limit.
//!
//! Invariant: before the reader waits for the client, everything that could be sent has been sent.

use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno as Os;
use watari_core::front::{Completion, Detach, Errno, GuestDisk, Op, Request};
use watari_core::nbd::wire::{CMD_READ, REQUEST_BYTES};
use watari_core::nbd::{Command, RequestHeader, Session, Verdict, reply};

use crate::crew::Crew;
use crate::inbox::Inbox;
use crate::link::{Admitted, Flushed, Link, ReplyKind, Role};
use crate::parts::{SCAN, part_count, part_id, part_range};

/// Attempts to get the rest of a payload without sleeping, since the client is in the middle of sending it. Each lets
/// others run first: on a busy machine the client may be waiting for this very processor.
const PAYLOAD_YIELDS: u32 = 2;

/// The connection is over.
struct Ended(Detach);

/// What the reader does next.
pub(crate) enum Next {
    /// Submit this to the disk.
    Submit(Request),
    /// Call [`Transmission::end`].
    Ended(Detach),
}

/// The reading role of one connection; see [`crate::crew`] for who holds it.
pub(crate) struct Transmission {
    link: Arc<Link>,
    reply: Arc<dyn Completion>,
    disk: Arc<dyn GuestDisk>,
    session: Session,
    inbox: Inbox,
    linger: Duration,
    crew: Arc<Crew>,
    /// Runs when nothing of the connection is outstanding any more.
    at_end: Box<dyn FnOnce(Detach) + Send>,
}

impl Transmission {
    /// `inbox` may hold requests that came right behind the handshake.
    pub fn new(
        link: Arc<Link>,
        disk: Arc<dyn GuestDisk>,
        session: Session,
        inbox: Inbox,
        linger: Duration,
        crew: Arc<Crew>,
        at_end: Box<dyn FnOnce(Detach) + Send>,
    ) -> Self {
        Transmission { reply: link.clone(), link, disk, session, inbox, linger, crew, at_end }
    }

    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }
    pub fn disk(&self) -> &Arc<dyn GuestDisk> {
        &self.disk
    }
    /// Whether another request has been received already.
    pub fn has_more(&self) -> bool {
        self.inbox.received().len() >= REQUEST_BYTES
    }
    pub fn crew(&self) -> &Arc<Crew> {
        &self.crew
    }

    /// The next disk request, waiting for the client if need be.
    pub fn next(&mut self) -> Next {
        loop {
            let step = match self.request_at_hand() {
                Ok(Some(request)) => return Next::Submit(request),
                Ok(None) => self.receive_waiting(&mut []),
                Err(ended) => Err(ended),
            };
            if let Err(Ended(how)) = step {
                return Next::Ended(how);
            }
        }
    }

    /// Wait for everything outstanding, then report the end of the connection.
    pub fn end(self, how: Detach) {
        self.link.drain(self.linger);
        (self.at_end)(how);
    }

    /// The next disk request from what was received; `None` if more must be received first.
    fn request_at_hand(&mut self) -> Result<Option<Request>, Ended> {
        while let Some(bytes) = self.inbox.received().first_chunk::<REQUEST_BYTES>() {
            // Out of step with the client: nothing that follows could be understood.
            let header = RequestHeader::decode(bytes).ok_or(Ended(Detach::Lost))?;
            self.inbox.consume(REQUEST_BYTES);
            self.inbox.expect_more_like(0);
            if self.link.corked_enough() {
                self.link.flush(Role::Reader);
            }
            let request = match header.verify(&self.session) {
                Verdict::Run(command) => self.start(&header, command)?,
                Verdict::Done => self.done(&header)?,
                Verdict::Refuse { errno, why, skip_bytes } => {
                    self.skip(skip_bytes)?;
                    self.refuse(&header, errno, why)?
                }
                Verdict::Goodbye => return Err(Ended(Detach::Clean)),
                Verdict::Cut => return Err(Ended(Detach::Lost)),
            };
            if request.is_some() {
                return Ok(request);
            }
        }
        Ok(None)
    }

    /// Begin a command; what is left to submit, if anything, is returned.
    fn start(&mut self, header: &RequestHeader, command: Command) -> Result<Option<Request>, Ended> {
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

    /// Success of a request of length zero. A read must be answered with chunks once they were negotiated.
    fn done(&self, header: &RequestHeader) -> Result<Option<Request>, Ended> {
        let chunks = self.session.structured && header.kind == CMD_READ;
        let write = |out: &mut Vec<u8>| match chunks {
            true => reply::none(out, header.cookie),
            false => reply::simple(out, header.cookie, Ok(())),
        };
        self.answer(write, false)
    }

    /// An operation without payload: one disk request, whatever its length.
    fn plain(&mut self, header: &RequestHeader, op: Op, fua: bool) -> Result<Option<Request>, Ended> {
        let (index, data) = self.admit(header, self.status(), false, 1, 0)?;
        let (offset, length) = (header.offset, u64::from(header.length));
        let reply = self.reply.clone();
        Ok(Some(Request { id: part_id(index, 0), op, offset, length, fua, data, reply }))
    }

    fn read(&mut self, header: &RequestHeader, unfragmented: bool) -> Result<Option<Request>, Ended> {
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
            let (offset, data) = self.part(header, kind, part, parts, &mut index)?;
            let request = self.request(part_id(index, part) | scan, Op::Read, offset, false, data);
            if part + 1 == parts && !alone {
                return Ok(Some(request));
            }
            self.disk.submit(request);
            if alone {
                self.link.settle().ok_or(Ended(Detach::Lost))?;
                if self.link.stop_if_failed(index, part, parts - part - 1) {
                    break;
                }
            }
        }
        Ok(None)
    }

    fn write(&mut self, header: &RequestHeader, fua: bool) -> Result<Option<Request>, Ended> {
        self.inbox.expect_more_like(header.length);
        let parts = part_count(header.offset, header.length);
        let mut index = 0;
        for part in 0..parts {
            let (offset, mut data) = self.part(header, self.status(), part, parts, &mut index)?;
            if let Err(ended) = self.payload(&mut data) {
                self.link.abandon(index, parts - part, Some(data.len() as u32));
                return Err(ended);
            }
            let request = self.request(part_id(index, part), Op::Write, offset, fua, data);
            if part + 1 == parts {
                return Ok(Some(request));
            }
            self.disk.submit(request);
        }
        Ok(None)
    }

    /// Admit the request with its first part, or one more part of it: where it begins, and its buffer.
    fn part(
        &self,
        header: &RequestHeader,
        kind: ReplyKind,
        part: u32,
        parts: u32,
        index: &mut u16,
    ) -> Result<(u64, Vec<u8>), Ended> {
        let (offset, length) = part_range(header.offset, header.length, part);
        if part == 0 {
            let (slot, data) = self.admit(header, kind, true, parts, length)?;
            *index = slot;
            return Ok((offset, data));
        }
        match self.link.admit_part(length) {
            Some(data) => Ok((offset, data)),
            None => {
                self.link.abandon(*index, parts - part, None);
                Err(Ended(Detach::Lost))
            }
        }
    }

    fn request(&self, id: u64, op: Op, offset: u64, fua: bool, data: Vec<u8>) -> Request {
        Request { id, op, offset, length: data.len() as u64, fua, data, reply: self.reply.clone() }
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

    fn block_status(&mut self, header: &RequestHeader, one: bool) -> Result<Option<Request>, Ended> {
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

    /// Answer without the disk: nothing is left to submit.
    fn answer(&self, write: impl FnOnce(&mut Vec<u8>), failed: bool) -> Result<Option<Request>, Ended> {
        self.link.answer(write, failed).map(|()| None).ok_or(Ended(Detach::Lost))
    }

    fn refuse(&self, header: &RequestHeader, errno: Errno, why: &str) -> Result<Option<Request>, Ended> {
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
                self.receive_waiting(&mut [])?;
            }
        }
        Ok(())
    }

    /// Fill a payload. The client is sending it right now, so sleep only if it takes its time.
    fn payload(&mut self, data: &mut [u8]) -> Result<(), Ended> {
        let mut filled = self.inbox.take(data);
        let mut yields = 0;
        while filled < data.len() {
            match self.inbox.receive(&self.link.socket, &mut data[filled..], false) {
                Ok((_, 0)) => return Err(Ended(Detach::Lost)),
                Ok((payload, _)) => filled += payload,
                Err(Os::AGAIN) if yields < PAYLOAD_YIELDS => {
                    yields += 1;
                    std::thread::yield_now();
                }
                Err(Os::AGAIN) => filled += self.receive_waiting(&mut data[filled..])?,
                Err(Os::INTR) => {}
                Err(_) => return Err(Ended(Detach::Lost)),
            }
        }
        Ok(())
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
