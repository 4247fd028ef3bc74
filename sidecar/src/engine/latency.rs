//! How long the guest's requests take, sampled: what tells us to give way (design §3.3).
//!
//! One request in [`SAMPLE_EVERY`] is timed, so that the fast path pays a counter and seldom a clock. It decides nothing;
//! `brain::pace` does.

use std::{
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// One request in this many is timed.
pub const SAMPLE_EVERY: u32 = 8;
/// Buckets of a quarter of a power of two, from 1 µs: the last one is beyond an hour.
const BUCKETS: usize = 128;
/// Fewer samples than this say nothing.
const SAMPLES_MIN: u32 = 8;
/// The percentile that counts: what most requests stay below.
const SHARE: f64 = 0.9;

/// Latencies since the last [`GuestLatency::take`].
pub struct GuestLatency {
    turn: AtomicU32,
    buckets: [AtomicU32; BUCKETS],
}

impl Default for GuestLatency {
    fn default() -> Self {
        GuestLatency { turn: AtomicU32::new(0), buckets: [const { AtomicU32::new(0) }; BUCKETS] }
    }
}

impl GuestLatency {
    /// A request begins: the time, if it is one that is timed.
    pub fn begin(&self) -> Option<Instant> {
        self.turn.fetch_add(1, Relaxed).is_multiple_of(SAMPLE_EVERY).then(Instant::now)
    }

    /// And ends.
    pub fn end(&self, began: Option<Instant>) {
        if let Some(began) = began {
            self.record(began.elapsed());
        }
    }

    fn record(&self, took: Duration) {
        let micros = took.as_micros().clamp(1, u128::from(u32::MAX)) as f64;
        let bucket = (micros.log2() * 4.0) as usize;
        self.buckets[bucket.min(BUCKETS - 1)].fetch_add(1, Relaxed);
    }

    /// The 90th percentile since the last call, as the upper end of its bucket (19 % wide); `None`: too few requests.
    pub fn take(&self) -> Option<Duration> {
        let counts: Vec<u32> = self.buckets.iter().map(|b| b.swap(0, Relaxed)).collect();
        let all: u32 = counts.iter().sum();
        if all < SAMPLES_MIN {
            return None;
        }
        let mut left = (f64::from(all) * SHARE).ceil() as u32;
        let bucket = counts.iter().position(|n| {
            left = left.saturating_sub(*n);
            left == 0
        })?;
        Some(Duration::from_secs_f64(((bucket + 1) as f64 / 4.0).exp2() / 1e6))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_percentile_is_that_of_the_samples_within_the_width_of_a_bucket() {
        let latency = GuestLatency::default();
        for n in 1..=1000u64 {
            latency.record(Duration::from_micros(n * 10));
        }
        let p90 = latency.take().expect("enough samples").as_micros();
        assert!((9_000..=10_900).contains(&p90), "{p90}");
        assert_eq!(latency.take(), None, "each sample counts once");
    }

    #[test]
    fn a_few_requests_say_nothing_and_extremes_do_not_harm() {
        let latency = GuestLatency::default();
        latency.record(Duration::ZERO);
        latency.record(Duration::from_secs(100_000));
        assert_eq!(latency.take(), None);
        (0..20).for_each(|_| latency.record(Duration::from_secs(100_000)));
        assert!(latency.take().expect("enough") > Duration::from_secs(1000));
    }

    #[test]
    fn one_request_in_eight_is_timed() {
        let latency = GuestLatency::default();
        assert_eq!((0..80).filter(|_| latency.begin().is_some()).count(), 10);
    }
}
