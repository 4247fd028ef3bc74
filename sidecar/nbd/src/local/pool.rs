//! A bounded pool of threads for blocking I/O jobs of one type.
//!
//! Invariants: at most `threads_max` jobs run at once; jobs start in the order they were pushed; a pushed job runs
//! even if no thread can be had (then on the pushing thread); threads end after a while without work. The queue is not
//! bounded here: its jobs are requests, and front ends bound those.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::lock;

/// How long a thread waits for work before it ends.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Stack of a pool thread, in bytes: jobs hold their data on the heap.
const STACK_BYTES: usize = 256 << 10;

/// Work for an [`IoPool`]: a concrete type, so that nothing is boxed and nothing is dispatched twice.
pub trait Job: Send + 'static {
    /// Do it; may block on local disks.
    fn run(self);
}

/// The pool. Dropping it lets the threads finish what is queued and end.
pub struct IoPool<J: Job> {
    shared: Arc<Shared<J>>,
}

struct Shared<J> {
    state: Mutex<State<J>>,
    work: Condvar,
    threads_max: usize,
    name: String,
}

struct State<J> {
    queue: VecDeque<J>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl<J: Job> IoPool<J> {
    /// A pool of at most `threads_max` (at least 1) threads; none is started before it is needed. `name` names them.
    pub fn new(name: &str, threads_max: usize) -> Self {
        let state = State { queue: VecDeque::with_capacity(64), threads: 0, idle: 0, closed: false };
        let shared = Shared {
            state: Mutex::new(state),
            work: Condvar::new(),
            threads_max: threads_max.max(1),
            name: name.into(),
        };
        IoPool { shared: Arc::new(shared) }
    }

    /// Queue a job. Does not wait.
    pub fn push(&self, job: J) {
        let mut state = lock(&self.shared.state);
        state.queue.push_back(job);
        if state.idle >= state.queue.len() || state.threads >= self.shared.threads_max {
            drop(state);
            self.shared.work.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let shared = self.shared.clone();
        let spawned = std::thread::Builder::new()
            .name(format!("io-{}", self.shared.name))
            .stack_size(STACK_BYTES)
            .spawn(move || shared.work_until_idle());
        if spawned.is_err() {
            self.without_a_thread();
        }
    }

    /// The system gives no further thread. Others may still run the job; if there are none, run what is queued here.
    fn without_a_thread(&self) {
        loop {
            let mut state = lock(&self.shared.state);
            if state.threads > 1 {
                state.threads -= 1;
                drop(state);
                return self.shared.work.notify_one();
            }
            // We stand in for the thread that could not start.
            let Some(job) = state.queue.pop_front() else {
                state.threads -= 1;
                return;
            };
            drop(state);
            job.run();
        }
    }

    /// Jobs waiting for a thread, and threads.
    pub fn load(&self) -> (usize, usize) {
        let state = lock(&self.shared.state);
        (state.queue.len(), state.threads)
    }
}

impl<J> Drop for IoPool<J>
where
    J: Job,
{
    fn drop(&mut self) {
        lock(&self.shared.state).closed = true;
        self.shared.work.notify_all();
    }
}

impl<J: Job> Shared<J> {
    fn work_until_idle(&self) {
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                job.run();
                state = lock(&self.state);
                continue;
            }
            if state.closed {
                break;
            }
            state.idle += 1;
            let (back, timeout) =
                self.work.wait_timeout(state, IDLE_TIMEOUT).unwrap_or_else(std::sync::PoisonError::into_inner);
            state = back;
            state.idle -= 1;
            if timeout.timed_out() && state.queue.is_empty() {
                break;
            }
        }
        state.threads -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    struct Meet(Arc<Barrier>, Arc<AtomicUsize>);
    impl Job for Meet {
        fn run(self) {
            self.0.wait();
            self.1.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn as_many_jobs_as_there_may_be_threads_run_at_once() {
        let (pool, done) = (IoPool::new("test", 8), Arc::new(AtomicUsize::new(0)));
        let barrier = Arc::new(Barrier::new(9));
        for _ in 0..8 {
            pool.push(Meet(barrier.clone(), done.clone()));
        }
        // Passes only if all eight wait at the barrier together.
        barrier.wait();
        while done.load(Ordering::SeqCst) < 8 {
            std::thread::yield_now();
        }
        assert!(pool.load().1 <= 8);
    }

    #[test]
    fn dropping_the_pool_still_runs_what_was_queued() {
        let done = Arc::new(AtomicUsize::new(0));
        let pool = IoPool::new("test", 1);
        let barrier = Arc::new(Barrier::new(2));
        pool.push(Meet(barrier.clone(), done.clone()));
        for _ in 0..10 {
            pool.push(Meet(Arc::new(Barrier::new(1)), done.clone()));
        }
        drop(pool);
        barrier.wait();
        while done.load(Ordering::SeqCst) < 11 {
            std::thread::yield_now();
        }
    }
}
