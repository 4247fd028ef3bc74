//! Being a good neighbour: how many bytes may leave for the peer, and when.
//!
//! [`bucket`] (a token bucket), [`schedule`] (limits by time of day) and [`backoff`] (giving way to the guest's own
//! I/O) are pure: clocks come in as arguments. [`Throttle`] here is the one shell around the bucket, shared by all data
//! streams of a pair. It delays only the sender; no guest request ever passes through it (I8).

pub mod backoff;
pub mod bucket;
pub mod effort;
pub mod schedule;

use std::{
    fmt,
    sync::{Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use tokio::sync::{Mutex as TurnLock, Notify};

use bucket::TokenBucket;

/// How much may be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Limit {
    #[default]
    Unlimited,
    /// At least 1.
    BitsPerSecond(u64),
    /// Nothing at all.
    Paused,
}

impl Limit {
    /// As reports and the control protocol write it: 0 means unlimited.
    pub fn from_bits(bits_per_second: u64) -> Self {
        if bits_per_second == 0 { Limit::Unlimited } else { Limit::BitsPerSecond(bits_per_second) }
    }

    /// 0 for unlimited; a pause is 1 bit per second, the nearest a number can say.
    pub fn bits(self) -> u64 {
        match self {
            Limit::Unlimited => 0,
            Limit::BitsPerSecond(bits) => bits,
            Limit::Paused => 1,
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Limit::Unlimited => f.write_str("unlimited"),
            Limit::Paused => f.write_str("paused"),
            Limit::BitsPerSecond(bits) => {
                let units = [(1_000_000_000, "Gbit"), (1_000_000, "Mbit"), (1_000, "kbit")];
                match units.iter().find(|(scale, _)| bits >= scale && bits.is_multiple_of(*scale)) {
                    Some((scale, unit)) => write!(f, "{}{unit}/s", bits / scale),
                    None => write!(f, "{bits}bit/s"),
                }
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Wanted {
    limit: Limit,
    ceiling_bits_per_second: Option<u64>,
}

impl Wanted {
    fn effective(self) -> Limit {
        match (self.limit, self.ceiling_bits_per_second) {
            (limit, None) | (limit @ Limit::Paused, _) => limit,
            (Limit::Unlimited, Some(ceiling)) => Limit::BitsPerSecond(ceiling.max(1)),
            (Limit::BitsPerSecond(bits), Some(ceiling)) => Limit::BitsPerSecond(bits.min(ceiling).max(1)),
        }
    }
}

/// A token bucket with waiting. Waiters are served in the order in which they came, async and blocking ones each among
/// themselves; a change of the limit wakes them at once.
pub struct Throttle {
    origin: Instant,
    bucket: Mutex<TokenBucket>,
    /// What people allow, and what our own good manners make of it.
    wanted: Mutex<Wanted>,
    /// Async waiters queue here; only the first one sleeps on the bucket.
    turn: TurnLock<()>,
    changed: Notify,
    changed_blocking: Condvar,
}

impl Throttle {
    pub fn new(limit: Limit) -> Self {
        Throttle {
            origin: Instant::now(),
            bucket: Mutex::new(TokenBucket::new(limit, Duration::ZERO)),
            wanted: Mutex::new(Wanted { limit, ceiling_bits_per_second: None }),
            turn: TurnLock::new(()),
            changed: Notify::new(),
            changed_blocking: Condvar::new(),
        }
    }

    /// What people allow.
    pub fn limit(&self) -> Limit {
        self.wanted().limit
    }

    /// What holds now: the limit, or a ceiling below it.
    pub fn effective(&self) -> Limit {
        self.bucket().limit()
    }

    /// Takes effect for those who wait already.
    pub fn set_limit(&self, limit: Limit) {
        self.change(|w| w.limit = limit);
    }

    /// Give way: no more than this, whatever the limit allows; `None`: the limit alone.
    pub fn set_ceiling(&self, bits_per_second: Option<u64>) {
        self.change(|w| w.ceiling_bits_per_second = bits_per_second);
    }

    fn change(&self, change: impl FnOnce(&mut Wanted)) {
        let limit = {
            let mut wanted = self.wanted();
            change(&mut wanted);
            wanted.effective()
        };
        let now = self.now();
        let mut bucket = self.bucket();
        if bucket.limit() != limit {
            bucket.set_limit(limit, now);
            self.changed.notify_waiters();
            self.changed_blocking.notify_all();
        }
    }

    /// Returns once `bytes` may be sent. Cancel-safe: a dropped wait has taken nothing.
    pub async fn acquire(&self, bytes: u64) {
        let _turn = self.turn.lock().await;
        loop {
            // Registered before the bucket is asked, so that a change in between is not missed.
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let taken = self.bucket().take(bytes, self.now());
            match taken {
                Ok(()) => return,
                Err(wait) => tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = changed => {}
                },
            }
        }
    }

    /// The same for a thread of its own.
    pub fn acquire_blocking(&self, bytes: u64) {
        let mut bucket = self.bucket();
        while let Err(wait) = bucket.take(bytes, self.now()) {
            bucket = match self.changed_blocking.wait_timeout(bucket, wait) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The bucket holds plain numbers and is valid after any panic.
    fn bucket(&self) -> MutexGuard<'_, TokenBucket> {
        self.bucket.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
