//! The threads of one connection, and the role of reading that goes round among them.
//!
//! Exactly one thread reads the socket. It also does the disk requests that are fast. When one is about to wait for
//! the disk, the thread can give the reading role to a colleague and wait itself ([`step_aside`]): the request starts at
//! once, without a hand-off to another thread, and whoever sends next is still heard. So a lone flush or uncached
//! read costs no thread switch on its way, which on a busy machine is most of its latency.
//!
//! Invariants: the role is in one place at a time (a running reader, the thread-local of a thread inside
//! `submit`, or the crew's hands); a crew has at most [`CREW_THREADS_MAX`] threads, and more requests that must wait go to the
//! disk's own pool; the crew is over when the reader says so, and nobody waits for a role after that.

use std::cell::RefCell;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::lock;
use crate::transmission::{Next, Transmission};

/// One that reads and two that wait or copy; beyond that the disk's pool does the same job without a role to pass.
const CREW_THREADS_MAX: usize = 3;
/// Stack of a connection's thread, in bytes: buffers live on the heap, but a disk's prologue and epilogue run here.
pub(crate) const STACK_BYTES: usize = 512 << 10;
/// A member that is not needed for so long goes home.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

thread_local! {
    /// The reading role, while its holder is inside the disk's `submit`.
    static ROLE: RefCell<Option<Box<Transmission>>> = const { RefCell::new(None) };
}

/// For a disk, inside `submit`: "I am about to wait, or work for long, on this thread." If the thread reads a connection, it gives
/// that role to a colleague and the answer is `true`: waiting now holds up nobody. Otherwise `false`: use a pool.
pub fn step_aside() -> bool {
    let Some(role) = ROLE.take() else { return false };
    let crew = role.crew().clone();
    match crew.pass_on(role) {
        Ok(()) => true,
        Err(role) => {
            ROLE.set(Some(role));
            false
        }
    }
}

/// For a disk, inside `submit`: whether this thread reads a connection that has sent further requests already, so
/// that stepping aside for this one lets them be received meanwhile.
pub fn more_at_hand() -> bool {
    ROLE.with_borrow(|role| role.as_ref().is_some_and(|role| role.has_more()))
}

/// The crew of one connection.
pub(crate) struct Crew {
    connection: u64,
    state: Mutex<State>,
    change: Condvar,
}

struct State {
    role: Option<Box<Transmission>>,
    waiting: usize,
    threads: usize,
    over: bool,
}

impl Crew {
    /// A crew whose first member is the calling thread.
    pub fn new(connection: u64) -> Arc<Crew> {
        let state = State { role: None, waiting: 0, threads: 1, over: false };
        Arc::new(Crew { connection, state: Mutex::new(state), change: Condvar::new() })
    }

    /// Be a member: read while holding the role, wait for it otherwise, until the connection is over.
    pub fn work(self: &Arc<Self>, first: Option<Box<Transmission>>) {
        let mut role = first;
        while let Some(held) = role.take().or_else(|| self.wait_for_role()) {
            role = self.read(held);
        }
    }

    /// Read until the connection is over or the role was passed on.
    fn read(&self, mut role: Box<Transmission>) -> Option<Box<Transmission>> {
        role.link().adopt_reader();
        let disk = role.disk().clone();
        loop {
            match role.next() {
                Next::Submit(request) => {
                    ROLE.set(Some(role));
                    disk.submit(request);
                    // Empty: somebody else reads now, and this thread has waited for the disk meanwhile.
                    role = ROLE.take()?;
                }
                Next::Ended(how) => {
                    lock(&self.state).over = true;
                    self.change.notify_all();
                    role.end(how);
                    return None;
                }
            }
        }
    }

    fn wait_for_role(&self) -> Option<Box<Transmission>> {
        let mut state = lock(&self.state);
        state.waiting += 1;
        let mut idle = false;
        let role = loop {
            if let Some(role) = state.role.take() {
                break Some(role);
            }
            if state.over || idle {
                break None;
            }
            let waited = self.change.wait_timeout(state, IDLE_TIMEOUT).unwrap_or_else(PoisonError::into_inner);
            state = waited.0;
            idle = waited.1.timed_out();
        };
        state.waiting -= 1;
        if role.is_none() {
            state.threads -= 1;
        }
        role
    }

    /// Give the role to a colleague; it comes back if there is none to be had.
    fn pass_on(self: &Arc<Self>, role: Box<Transmission>) -> Result<(), Box<Transmission>> {
        let mut state = lock(&self.state);
        if state.waiting == 0 {
            if state.threads >= CREW_THREADS_MAX {
                return Err(role);
            }
            let crew = self.clone();
            let thread = std::thread::Builder::new().name(format!("nbd-{}", self.connection));
            if thread.stack_size(STACK_BYTES).spawn(move || crew.work(None)).is_err() {
                return Err(role);
            }
            state.threads += 1;
        }
        let link = role.link().clone();
        state.role = Some(role);
        drop(state);
        self.change.notify_one();
        link.leave_reading();
        Ok(())
    }
}
