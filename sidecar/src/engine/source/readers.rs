//! Reader threads: read, compare, hash and compress, away from the brain.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, PoisonError, atomic::Ordering::SeqCst},
    thread,
};

use watari_core::primary::Read;

use super::{
    digests::DigestBook,
    verify::{self, Check},
};
use crate::engine::{
    build::{self, Naming, PeerDigests},
    event::Event,
    gate::GateDisk,
    stream::Post,
    tracking::Shared,
};

/// Threads that read, hash and compress. While comparing most of them wait for the peer's digests: so many round trips
/// are under way at once.
const READERS: usize = 8;

/// One read and what it is for. `compare`: the peer may have it already.
pub(super) enum Job {
    Frozen {
        read: Read,
        cut: u64,
        compare: bool,
    },
    Current {
        read: Read,
        compare: bool,
    },
    Preserved {
        read: Read,
    },
    /// Nothing is sent: does the peer have what is here?
    Verify(Check),
}

/// Jobs that wait for a reader thread.
#[derive(Default)]
struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Default)]
struct QueueState {
    jobs: VecDeque<(Job, Naming)>,
    closed: bool,
}

impl Queue {
    fn lock(&self) -> std::sync::MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wait for the next job; `None` at the end.
    fn next(&self) -> Option<(Job, Naming)> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            match state.jobs.pop_front() {
                Some(job) => return Some(job),
                None => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// Reader threads and their queue.
pub(super) struct Readers {
    queue: Arc<Queue>,
}

impl Readers {
    pub(super) fn start(
        shared: &Arc<Shared>,
        disks: &Arc<Vec<GateDisk>>,
        digests: &Arc<DigestBook>,
        post: &Post,
    ) -> Self {
        let queue: Arc<Queue> = Arc::default();
        for n in 0..READERS {
            let (queue, shared, disks) = (queue.clone(), shared.clone(), disks.clone());
            let (digests, post) = (digests.clone(), post.clone());
            let work = move || {
                while let Some((job, naming)) = queue.next() {
                    post(run(&shared, &disks, &digests, job, naming));
                }
            };
            let spawned = thread::Builder::new().name(format!("reader-{n}")).spawn(work);
            spawned.map(drop).expect("a thread at start: without it nothing can be sent");
        }
        Readers { queue }
    }

    pub(super) fn push(&self, job: Job, naming: Naming) {
        self.queue.lock().jobs.push_back((job, naming));
        self.queue.changed.notify_one();
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.queue.lock().closed = true;
        self.queue.changed.notify_all();
    }
}

fn run(shared: &Shared, disks: &[GateDisk], digests: &DigestBook, job: Job, naming: Naming) -> Event {
    let compared = |read: &Read, compare: bool| {
        let mut peer = PeerDigests::new();
        if compare {
            digests.ask(read.disk, &read.extents, &mut peer);
        }
        peer
    };
    let (read, frames) = match job {
        Job::Verify(check) => {
            let checked = verify::run(shared, disks, digests, &check);
            return Event::Verified { check, checked };
        }
        Job::Frozen { read, cut, compare } => {
            let peer = compared(&read, compare);
            let file = disks[usize::from(read.disk.0)].local().file();
            let frames = build::frozen(shared, file, &read, cut, naming, &peer);
            if frames.is_err() {
                // Some of it may be claimed already and is in no frame: all of it is dirty, and the cut is lost.
                give_back(shared, &read);
                shared.give_up.store(true, SeqCst);
            }
            (read.sequence, frames)
        }
        Job::Current { read, compare } => {
            let peer = compared(&read, compare);
            let file = disks[usize::from(read.disk.0)].local().file();
            let frames = build::current(shared, file, &read, naming, &peer);
            if frames.is_err() {
                // Nothing of it was sent: it is as dirty as before.
                give_back(shared, &read);
            }
            (read.sequence, frames)
        }
        Job::Preserved { read } => (read.sequence, build::preserved(shared, read.sequence, naming)),
    };
    Event::Built { read, frames }
}

fn give_back(shared: &Shared, read: &Read) {
    for e in &read.extents {
        shared.tracker.mark(read.disk, *e);
        shared.tracker.unstage(read.disk, *e);
    }
}
