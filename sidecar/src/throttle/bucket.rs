//! A token bucket of bytes. Pure: time is a duration since any fixed origin and never taken from a clock here.
//!
//! A request is let through as soon as the bucket is not in debt, and may leave it in debt: so a frame larger than the
//! burst still passes, and the mean rate is exact. Time that runs backwards counts as no time.

use std::time::Duration;

use super::Limit;

/// What may leave at once after idling: this much time's worth of the limit. Small, so that a shared link sees no
/// bursts that its queue would drop, but above timer granularity.
pub const BURST: Duration = Duration::from_millis(50);
/// Longest single wait handed out, so that an error in the caller's clock cannot stall the stream for long.
pub const WAIT_MAX: Duration = Duration::from_secs(1);

/// Credit is kept in bit-nanoseconds (bits × 10⁹), so that no rate loses anything to rounding.
const SCALE: i128 = 1_000_000_000;

#[derive(Clone, Debug)]
pub struct TokenBucket {
    limit: Limit,
    /// Bits × 10⁹; negative is debt.
    credit: i128,
    refilled_at: Duration,
}

impl TokenBucket {
    pub fn new(limit: Limit, now: Duration) -> Self {
        let mut bucket = TokenBucket { limit, credit: 0, refilled_at: now };
        bucket.credit = bucket.burst();
        bucket
    }

    pub fn limit(&self) -> Limit {
        self.limit
    }

    /// Debt stays: what was sent under the old limit is paid back at the new one, credit shrinks to the new burst.
    /// Leaving `Unlimited` begins with an empty bucket.
    pub fn set_limit(&mut self, limit: Limit, now: Duration) {
        self.refill(now);
        self.limit = limit;
        self.credit = self.credit.min(self.burst());
    }

    /// Takes `bytes`, or says how long to wait before asking again (at most [`WAIT_MAX`]; nothing was taken).
    pub fn take(&mut self, bytes: u64, now: Duration) -> Result<(), Duration> {
        self.refill(now);
        match self.limit {
            Limit::Unlimited => Ok(()),
            Limit::Paused => Err(WAIT_MAX),
            Limit::BitsPerSecond(bits) => {
                if self.credit >= 0 {
                    self.credit -= i128::from(bytes) * 8 * SCALE;
                    return Ok(());
                }
                let nanos = (-self.credit).div_euclid(i128::from(bits.max(1))) + 1;
                Err(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).min(WAIT_MAX))
            }
        }
    }

    fn refill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.refilled_at);
        self.refilled_at = self.refilled_at.max(now);
        match self.limit {
            Limit::Unlimited => self.credit = 0,
            Limit::Paused => {}
            Limit::BitsPerSecond(bits) => {
                let nanos = i128::try_from(elapsed.as_nanos()).unwrap_or(i128::MAX);
                let earned = i128::from(bits).saturating_mul(nanos);
                self.credit = self.credit.saturating_add(earned).min(self.burst());
            }
        }
    }

    fn burst(&self) -> i128 {
        match self.limit {
            Limit::BitsPerSecond(bits) => i128::from(bits) * BURST.as_nanos() as i128,
            Limit::Unlimited | Limit::Paused => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that pass between `from` and `to` when somebody always wants to send `frame` bytes.
    fn drain(bucket: &mut TokenBucket, frame: u64, from: Duration, to: Duration) -> u64 {
        let (mut now, mut passed) = (from, 0);
        while now < to {
            match bucket.take(frame, now) {
                Ok(()) => passed += frame,
                Err(wait) => now += wait,
            }
        }
        passed
    }

    #[test]
    fn the_mean_rate_is_exact_for_any_frame_size() {
        for (mbit, frame) in [(5, 1 << 20), (5, 4096), (100, 1 << 20), (1000, 65536), (10_000, 1 << 20)] {
            let bits = mbit * 1_000_000;
            let mut bucket = TokenBucket::new(Limit::BitsPerSecond(bits), Duration::ZERO);
            let passed = drain(&mut bucket, frame, Duration::ZERO, Duration::from_secs(60));
            let expected = bits * 60 / 8;
            let slack = frame + bits * 50 / 1000 / 8;
            assert!(passed.abs_diff(expected) <= slack, "{mbit} Mbit, frames of {frame}: {passed} of {expected}");
        }
    }

    #[test]
    fn idling_earns_no_more_than_the_burst() {
        let mut bucket = TokenBucket::new(Limit::BitsPerSecond(8_000_000), Duration::ZERO);
        let passed = drain(&mut bucket, 1000, Duration::from_secs(3600), Duration::from_millis(3_600_001));
        assert!(passed <= 50_000 + 2 * 1000, "{passed}");
        assert!(passed >= 50_000);
    }

    #[test]
    fn debt_outlives_a_change_of_the_limit_and_is_paid_at_the_new_one() {
        let mut bucket = TokenBucket::new(Limit::BitsPerSecond(8_000), Duration::ZERO);
        assert_eq!(bucket.take(1_000_000, Duration::ZERO), Ok(()));
        assert_eq!(bucket.take(1, Duration::ZERO), Err(WAIT_MAX), "almost 1000 s of debt, asked for in steps");
        bucket.set_limit(Limit::BitsPerSecond(80_000_000), Duration::ZERO);
        let wait = bucket.take(1, Duration::ZERO).expect_err("still in debt");
        assert!(wait > Duration::from_millis(90) && wait <= Duration::from_millis(100), "{wait:?}");
        assert_eq!(bucket.take(1, wait), Ok(()));
    }

    #[test]
    fn a_pause_lets_nothing_through_and_saves_nothing_up() {
        let mut bucket = TokenBucket::new(Limit::Paused, Duration::ZERO);
        assert_eq!(bucket.take(1, Duration::from_secs(1)), Err(WAIT_MAX));
        bucket.set_limit(Limit::BitsPerSecond(8_000), Duration::from_secs(3600));
        assert_eq!(bucket.take(1000, Duration::from_secs(3600)), Ok(()));
        assert!(bucket.take(1000, Duration::from_secs(3600)).is_err(), "an hour of pause earned no burst");
    }

    #[test]
    fn unlimited_lets_all_through_and_leaves_neither_credit_nor_debt() {
        let mut bucket = TokenBucket::new(Limit::Unlimited, Duration::ZERO);
        for _ in 0..1000 {
            assert_eq!(bucket.take(u64::MAX, Duration::ZERO), Ok(()));
        }
        bucket.set_limit(Limit::BitsPerSecond(8_000), Duration::from_secs(10));
        assert_eq!(bucket.take(1, Duration::from_secs(10)), Ok(()));
        assert!(bucket.take(1, Duration::from_secs(10)).is_err());
    }

    #[test]
    fn time_that_runs_backwards_counts_as_no_time() {
        let mut bucket = TokenBucket::new(Limit::BitsPerSecond(8_000), Duration::from_secs(100));
        assert_eq!(bucket.take(10_000, Duration::from_secs(100)), Ok(()));
        assert!(bucket.take(1, Duration::ZERO).is_err());
        assert!(bucket.take(1, Duration::from_secs(101)).is_err(), "one second is paid once");
        assert_eq!(bucket.take(1, Duration::from_secs(110)), Ok(()));
    }
}
