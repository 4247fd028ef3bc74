//! One client in the transmission phase: which requests are outstanding, and the way of their replies out.
//!
//! Completions arrive here from any thread. Who sends:
//! ```text
//!   Free ── somebody has replies ──▶ Busy ── all sent ──▶ Free
//!    ▲                                │ the socket is full
//!    │                                ├── it was the reader ──▶ Reader: polls for room among its other duties
//!    └──────── all sent ◀─────────────┴── it was anybody else ▶ Writer: a thread that exists only for slow clients
//! ```
//! The connection's own thread (the reader) collects the replies of a whole batch of requests and sends them together;
//! every other thread sends at once, unless somebody is sending already, who then takes the new replies along.
//!
//! Invariants: no thread ever waits for the client inside a completion; requests and bytes stay within
//! [`Limits`] from admission until the client took the reply; the steady state allocates nothing.

use std::cell::Cell;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use watari_core::front::{Completion, Errno};
use watari_core::nbd::reply;

use crate::buffers::Buffers;
use crate::limits::{CORK_WEIGHT_MAX, CORK_WEIGHT_REPLY, Limits, PART_BYTES};
use crate::lock;
use crate::outbox::{Batch, Sent};
use crate::parts::{SCAN, part_range, slot_and_part};
use crate::zeroes::Runs;

thread_local! {
    /// The connection whose reader this thread is.
    static READER_OF: Cell<u64> = const { Cell::new(0) };
}

/// How long the reader sleeps at most before it looks at the state of things again.
const TICK: Duration = Duration::from_millis(500);

/// Idle time after which the writer thread of a slow client ends.
const WRITER_IDLE: Duration = Duration::from_secs(10);

/// How the reply to a request looks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ReplyKind {
    /// Structured content chunks, one or more per part; zeroes as holes unless `unfragmented`.
    Content { unfragmented: bool },
    /// Simple header, then the data; parts run one after another.
    SimpleContent,
    /// Only success or failure.
    Status { structured: bool },
}

/// A request as admitted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Admitted {
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
    /// Its parts carry data, either way, and are accounted for it.
    pub payload: bool,
    pub kind: ReplyKind,
}

#[derive(Clone, Copy)]
struct Slot {
    request: Admitted,
    parts_left: u32,
    failed: Option<Errno>,
}

/// Who is responsible for sending.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Owner {
    Free,
    Busy,
    Reader,
    Writer,
}

/// On whose behalf [`Link::flush`] is called.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    Reader,
    Writer,
    Other,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flushed {
    Drained,
    /// Somebody else is responsible.
    Elsewhere,
    /// The socket is full; the caller (or the writer thread for `Role::Other`) must come back when there is room.
    Blocked,
    Broken,
}

/// Counted for reports.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Counters {
    pub requests: u64,
    pub errors: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
}

struct State {
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Requests admitted whose reply the client has not taken.
    requests: usize,
    /// Accounted bytes of their payloads.
    bytes: usize,
    /// Parts that the disk has.
    in_disk: usize,
    pending: Batch,
    sending: Batch,
    owner: Owner,
    /// The socket failed: completions only free what they held.
    dead: bool,
    reader_waits: bool,
    writer_runs: bool,
    closed: bool,
    blocked_since: Option<Instant>,
    buffers: Buffers,
    counters: Counters,
}

/// See the module.
pub(crate) struct Link {
    me: Weak<Link>,
    pub id: u64,
    pub socket: Arc<UnixStream>,
    requests_max: usize,
    bytes_max: usize,
    state: Mutex<State>,
    /// The reader waits here for room, or for the disk to finish.
    room: Condvar,
    /// The writer thread waits here for something to do.
    writer: Condvar,
    /// Weight of `pending`, readable without the lock.
    corked: AtomicUsize,
}

impl Link {
    pub fn new(id: u64, socket: Arc<UnixStream>, limits: &Limits) -> Arc<Link> {
        let requests_max = limits.requests_per_connection.clamp(1, usize::from(u16::MAX));
        let bytes_max = limits.bytes_per_connection.max(2 * PART_BYTES as usize);
        Arc::new_cyclic(|me| Link {
            me: me.clone(),
            id,
            socket,
            requests_max,
            bytes_max,
            state: Mutex::new(State {
                slots: Vec::new(),
                free: Vec::new(),
                requests: 0,
                bytes: 0,
                in_disk: 0,
                pending: Batch::default(),
                sending: Batch::default(),
                owner: Owner::Free,
                dead: false,
                reader_waits: false,
                writer_runs: false,
                closed: false,
                blocked_since: None,
                buffers: Buffers::new(bytes_max),
                counters: Counters::default(),
            }),
            room: Condvar::new(),
            writer: Condvar::new(),
            corked: AtomicUsize::new(0),
        })
    }

    /// This thread is the connection's reader from now on.
    pub fn adopt_reader(&self) {
        READER_OF.set(self.id);
    }

    /// This thread gave the reading role away: what it collected leaves now, later completions here send at once.
    pub fn leave_reading(&self) {
        READER_OF.set(0);
        if self.corked.load(Ordering::Relaxed) > 0 {
            self.flush(Role::Other);
        }
    }

    /// Whether so many replies wait to be sent together that they should not wait any longer.
    pub fn corked_enough(&self) -> bool {
        self.corked.load(Ordering::Relaxed) >= CORK_WEIGHT_MAX
    }

    fn note_corked(&self, state: &State) {
        let weight = state.pending.bytes() + state.pending.replies * CORK_WEIGHT_REPLY;
        self.corked.store(weight, Ordering::Relaxed);
    }

    pub fn counters(&self) -> Counters {
        lock(&self.state).counters
    }

    /// Since when the client has taken nothing of a waiting reply.
    pub fn blocked_since(&self) -> Option<Instant> {
        lock(&self.state).blocked_since
    }

    /// (requests, accounted payload bytes) outstanding.
    pub fn outstanding(&self) -> (usize, usize) {
        let state = lock(&self.state);
        (state.requests, state.bytes)
    }

    /// Admit a request of `parts` parts, and the first of them with a payload of `bytes`. Waits for room, sending
    /// meanwhile. `None` if the client is gone. Only the reader calls this.
    pub fn admit(&self, request: Admitted, parts: u32, bytes: u32) -> Option<(u16, Vec<u8>)> {
        let mut state = self.wait_for_room(1, bytes)?;
        state.requests += 1;
        state.counters.requests += 1;
        let slot = Slot { request, parts_left: parts, failed: None };
        let index = match state.free.pop() {
            Some(index) => {
                state.slots[usize::from(index)] = slot;
                index
            }
            None => {
                state.slots.push(slot);
                (state.slots.len() - 1) as u16
            }
        };
        Some((index, Self::take_part(&mut state, bytes)))
    }

    /// Room and a buffer for the next part of an admitted request.
    pub fn admit_part(&self, bytes: u32) -> Option<Vec<u8>> {
        let mut state = self.wait_for_room(0, bytes)?;
        Some(Self::take_part(&mut state, bytes))
    }

    fn take_part(state: &mut State, bytes: u32) -> Vec<u8> {
        state.bytes += Buffers::accounted(bytes);
        state.in_disk += 1;
        state.buffers.take(bytes)
    }

    /// The last `parts` parts of a request will not be submitted: the client vanished. One of them may be admitted
    /// already, with a payload of `admitted` bytes.
    pub fn abandon(&self, index: u16, parts: u32, admitted: Option<u32>) {
        let mut state = lock(&self.state);
        if let Some(bytes) = admitted {
            state.in_disk -= 1;
            state.bytes -= Buffers::accounted(bytes);
        }
        let slot = &mut state.slots[usize::from(index)];
        slot.parts_left -= parts;
        if slot.parts_left == 0 {
            state.free.push(index);
            state.requests -= 1;
        }
    }

    /// Wait until the disk has nothing of this connection. `None` if the client is gone.
    pub fn settle(&self) -> Option<()> {
        let mut state = lock(&self.state);
        while state.in_disk > 0 {
            state = self.send_or_wait(state);
        }
        (!state.dead).then_some(())
    }

    /// After part `part` of a simple read whose `left` later parts were not admitted: whether the read is over because
    /// that part failed. Then the reply is an error, or, if success was announced already, a hard disconnect.
    pub fn stop_if_failed(&self, index: u16, part: u32, left: u32) -> bool {
        let mut state = lock(&self.state);
        let Slot { request, failed: Some(errno), .. } = state.slots[usize::from(index)] else { return false };
        if left == 0 {
            // It was the last part: its completion has answered already.
            return true;
        }
        state.free.push(index);
        state.counters.errors += 1;
        if part == 0 && !state.dead {
            state.pending.header(|out| reply::simple(out, request.cookie, Err(errno)));
            state.pending.replies += 1;
        } else {
            state.requests -= 1;
            self.die(&mut state);
        }
        true
    }

    /// Queue a reply that needs no disk; it is bounded like any other. `None` if the client is gone.
    pub fn answer(&self, write: impl FnOnce(&mut Vec<u8>), failed: bool) -> Option<()> {
        let mut state = self.wait_for_room(1, 0)?;
        state.requests += 1;
        state.counters.requests += 1;
        state.counters.errors += u64::from(failed);
        state.pending.header(write);
        state.pending.replies += 1;
        self.note_corked(&state);
        Some(())
    }

    fn wait_for_room(&self, requests: usize, bytes: u32) -> Option<MutexGuard<'_, State>> {
        let accounted = Buffers::accounted(bytes);
        let mut state = lock(&self.state);
        loop {
            if state.dead {
                return None;
            }
            if state.requests + requests <= self.requests_max && state.bytes + accounted <= self.bytes_max {
                return Some(state);
            }
            state = self.send_or_wait(state);
        }
    }

    /// The reader cannot go on: send what is corked, else sleep until something moves. The caller looks again.
    fn send_or_wait<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let ours = match state.owner {
            Owner::Free => !state.pending.is_empty(),
            Owner::Reader => true,
            Owner::Busy | Owner::Writer => false,
        };
        if !ours {
            state.reader_waits = true;
            let (mut state, _) = self.room.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner);
            state.reader_waits = false;
            return state;
        }
        let (state, flushed) = self.flush_locked(state, Role::Reader);
        if flushed != Flushed::Blocked {
            return state;
        }
        drop(state);
        self.poll(PollFlags::OUT, Some(TICK));
        lock(&self.state)
    }

    /// Wait until the disk has finished everything, then until the client took the replies, but not longer than
    /// `linger`. Afterwards nothing of this connection is outstanding.
    pub fn drain(&self, linger: Duration) {
        let mut state = lock(&self.state);
        while state.in_disk > 0 {
            state = self.send_or_wait(state);
        }
        let deadline = Instant::now() + linger;
        while !state.dead && state.requests > 0 && Instant::now() < deadline {
            state = self.send_or_wait(state);
        }
        self.die(&mut state);
        state.closed = true;
        state.buffers.trim();
        drop(state);
        self.writer.notify_all();
    }

    /// Give unused memory back; the connection has been idle.
    pub fn trim(&self) {
        lock(&self.state).buffers.trim();
    }

    /// Send what is queued, without waiting.
    pub fn flush(&self, role: Role) -> Flushed {
        let state = lock(&self.state);
        match state.owner {
            Owner::Free if state.pending.is_empty() => Flushed::Drained,
            Owner::Free => self.flush_locked(state, role).1,
            Owner::Reader if role == Role::Reader => self.flush_locked(state, role).1,
            Owner::Writer if role == Role::Writer => self.flush_locked(state, role).1,
            Owner::Busy | Owner::Reader | Owner::Writer => Flushed::Elsewhere,
        }
    }

    fn flush_locked<'a>(&'a self, mut state: MutexGuard<'a, State>, role: Role) -> (MutexGuard<'a, State>, Flushed) {
        if state.dead {
            return (state, Flushed::Broken);
        }
        state.owner = Owner::Busy;
        loop {
            if state.sending.is_empty() {
                if state.pending.is_empty() {
                    state.owner = Owner::Free;
                    state.blocked_since = None;
                    return (state, Flushed::Drained);
                }
                let State { pending, sending, .. } = &mut *state;
                std::mem::swap(pending, sending);
                self.corked.store(0, Ordering::Relaxed);
            }
            let mut batch = std::mem::take(&mut state.sending);
            drop(state);
            let sent = batch.send(&self.socket);
            state = lock(&self.state);
            let (replies, bytes) = batch.release(&mut state.buffers);
            state.requests -= replies;
            state.bytes -= bytes;
            state.sending = batch;
            if state.dead {
                // Declared dead while we were sending: what we held is dropped like the rest.
                self.die(&mut state);
                return (state, Flushed::Broken);
            }
            if replies + bytes > 0 {
                state.blocked_since = None;
                self.wake_reader(&mut state);
            }
            match sent {
                Sent::All => {}
                Sent::Blocked => {
                    state.blocked_since.get_or_insert_with(Instant::now);
                    if role == Role::Reader {
                        state.owner = Owner::Reader;
                    } else {
                        state.owner = Owner::Writer;
                        self.wake_writer(&mut state);
                    }
                    return (state, Flushed::Blocked);
                }
                Sent::Broken => {
                    self.die(&mut state);
                    return (state, Flushed::Broken);
                }
            }
        }
    }

    /// The socket failed: drop all replies, and make the reader notice.
    fn die(&self, state: &mut State) {
        state.dead = true;
        state.owner = Owner::Free;
        let State { pending, sending, .. } = state;
        let freed = [pending.discard(), sending.discard()];
        for (replies, bytes) in freed {
            state.requests -= replies;
            state.bytes -= bytes;
        }
        let _gone = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        self.wake_reader(state);
    }

    fn wake_reader(&self, state: &mut State) {
        if std::mem::take(&mut state.reader_waits) {
            self.room.notify_one();
        }
    }

    fn wake_writer(&self, state: &mut State) {
        if state.writer_runs {
            return self.writer.notify_one();
        }
        let Some(me) = self.me.upgrade() else { return };
        state.writer_runs = true;
        let spawned = std::thread::Builder::new()
            .name(format!("nbd-out-{}", self.id))
            .stack_size(128 << 10)
            .spawn(move || me.write_for_slow_client());
        if spawned.is_err() {
            // Without a thread nobody could wait for this client: it has to go.
            state.writer_runs = false;
            self.die(state);
        }
    }

    /// The writer thread.
    fn write_for_slow_client(&self) {
        let mut state = lock(&self.state);
        loop {
            if state.dead || (state.closed && state.owner != Owner::Writer) {
                break;
            }
            if state.owner == Owner::Writer {
                drop(state);
                self.poll(PollFlags::OUT, None);
                self.flush(Role::Writer);
                state = lock(&self.state);
                continue;
            }
            let (back, timeout) = self.writer.wait_timeout(state, WRITER_IDLE).unwrap_or_else(PoisonError::into_inner);
            state = back;
            if timeout.timed_out() && state.owner != Owner::Writer {
                break;
            }
        }
        state.writer_runs = false;
    }

    /// Wait for the socket; returns what is ready (also errors and hang-ups), empty after the timeout.
    pub fn poll(&self, wanted: PollFlags, timeout: Option<Duration>) -> PollFlags {
        let mut fds = [PollFd::new(&*self.socket, wanted)];
        let timeout = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) => fds[0].revents(),
            Err(_) => PollFlags::empty(),
        }
    }

    fn queue_part(state: &mut State, request: &Admitted, part: u32, data: Vec<u8>, runs: &Runs, last: bool) {
        let (offset, length) = part_range(request.offset, request.length, part);
        let payload = state.pending.payload(data, Buffers::accounted(length));
        state.counters.bytes_read += u64::from(length);
        if request.kind == ReplyKind::SimpleContent {
            if part == 0 {
                state.pending.header(|out| reply::simple(out, request.cookie, Ok(())));
            }
            return state.pending.data(payload, 0, length);
        }
        let runs = runs.as_slice();
        for (index, run) in runs.iter().enumerate() {
            let done = last && index + 1 == runs.len();
            let (at, bytes) = (offset + u64::from(run.start), run.end - run.start);
            if run.zero {
                state.pending.header(|out| reply::hole(out, request.cookie, done, at, bytes));
            } else {
                state.pending.header(|out| reply::data_header(out, request.cookie, done, at, bytes));
                state.pending.data(payload, run.start, run.end);
            }
        }
    }

    fn finish_part(&self, state: &mut State, id: u64, result: Result<(), Errno>, data: Vec<u8>, runs: &Runs) {
        let (index, part) = slot_and_part(id);
        state.in_disk -= 1;
        let slot = &mut state.slots[usize::from(index)];
        slot.parts_left -= 1;
        let (_, length) = part_range(slot.request.offset, slot.request.length, part);
        let content = !matches!(slot.request.kind, ReplyKind::Status { .. });
        if let Err(errno) = result {
            slot.failed.get_or_insert(errno);
        } else if content && data.len() != length as usize {
            // A disk that lost the buffer has nothing to show for its success.
            slot.failed.get_or_insert(Errno::Io);
        }
        let Slot { request, parts_left, failed } = *slot;
        let last = parts_left == 0;
        if content && failed.is_none() && !state.dead {
            Self::queue_part(state, &request, part, data, runs, last);
        } else {
            if request.payload {
                state.bytes -= Buffers::accounted(length);
            }
            state.buffers.give(data);
            if !content && result.is_ok() {
                state.counters.bytes_written += u64::from(length);
            }
        }
        if last {
            state.free.push(index);
            state.counters.errors += u64::from(failed.is_some());
            if state.dead {
                state.requests -= 1;
                return;
            }
            match (request.kind, failed) {
                (ReplyKind::Content { .. }, None) | (ReplyKind::SimpleContent, None) => {}
                (ReplyKind::SimpleContent, Some(errno)) if part == 0 => {
                    state.pending.header(|out| reply::simple(out, request.cookie, Err(errno)));
                }
                // The header said success and data followed: "MUST immediately initiate a hard disconnect".
                (ReplyKind::SimpleContent, Some(_)) => {
                    state.requests -= 1;
                    return self.die(state);
                }
                (ReplyKind::Content { .. }, Some(errno)) | (ReplyKind::Status { structured: true }, Some(errno)) => {
                    state.pending.header(|out| reply::error(out, request.cookie, errno, ""));
                }
                (ReplyKind::Status { .. }, None) => {
                    state.pending.header(|out| reply::simple(out, request.cookie, Ok(())));
                }
                (ReplyKind::Status { structured: false }, Some(errno)) => {
                    state.pending.header(|out| reply::simple(out, request.cookie, Err(errno)));
                }
            }
            state.pending.replies += 1;
        }
        self.note_corked(state);
    }
}

impl Completion for Link {
    fn complete(&self, id: u64, result: Result<(), Errno>, data: Vec<u8>) {
        // Looking for zeroes happens before the lock: it reads the data, and other completions need not wait for it.
        let runs = if id & SCAN != 0 && result.is_ok() { Runs::of(&data) } else { Runs::data(data.len()) };
        let mut state = lock(&self.state);
        self.finish_part(&mut state, id, result, data, &runs);
        self.wake_reader(&mut state);
        if state.owner == Owner::Free && READER_OF.get() != self.id {
            drop(self.flush_locked(state, Role::Other));
        }
    }
}
