//! How much may be under way: flow control of the source, and the measured rate that reports and predictions use.
//!
//! Invariant: **I8** what is sent and not yet durable is bounded. It decides nothing else.

use alloc::vec::Vec;

use crate::limits;

/// Flow control: how many bytes may be sent and not yet durable. Two bandwidth-delay products as measured, so that a
/// cut link costs little to send again (F8) and a long fat one is filled (F7).
#[derive(Clone, Debug)]
pub struct Window {
    rate_bytes_per_second: f64,
    ack_delay_millis: f64,
    marks: Vec<(u64, u64)>,
    delivered: u64,
}

impl Window {
    pub(super) fn new() -> Self {
        Window { rate_bytes_per_second: 0.0, ack_delay_millis: 1000.0, marks: Vec::new(), delivered: 0 }
    }

    /// Bytes that may be in flight.
    pub fn bytes(&self) -> u64 {
        let bdp = self.rate_bytes_per_second * (self.ack_delay_millis + limits::ACK_SLACK_MILLIS) / 1000.0;
        ((2.0 * bdp) as u64).clamp(limits::WINDOW_BYTES_MIN, limits::WINDOW_BYTES_MAX)
    }

    pub fn rate_bytes_per_second(&self) -> f64 {
        self.rate_bytes_per_second
    }

    /// `bytes` became durable at `now`; the oldest of them was sent `delay` ago.
    pub(super) fn delivered(&mut self, now: u64, bytes: u64, delay: Option<u64>, limited: bool) {
        self.delivered += bytes;
        if let Some(delay) = delay {
            // The smallest delay seen lately is the path's. It may grow by a hundredth per second only: a queue of our own
            // making must not grow the window that makes it.
            let seconds = now.saturating_sub(self.marks.last().map_or(now, |(t, _)| *t)).min(10_000) as f64 / 1000.0;
            self.ack_delay_millis = (self.ack_delay_millis.max(1.0) * (1.0 + 0.01 * seconds)).min(delay as f64);
        }
        self.marks.push((now, self.delivered));
        // Marks of the future are from before the clock was set back.
        self.marks.retain(|(t, _)| *t <= now && t + limits::RATE_WINDOW_MILLIS >= now);
        let (t0, d0) = self.marks[0];
        if now > t0 + limits::RATE_SAMPLE_MILLIS_MIN {
            let rate = (self.delivered - d0) as f64 * 1000.0 / (now - t0) as f64;
            // Fast up, slow down: a pause in our own sending is not a slower link.
            if rate > self.rate_bytes_per_second {
                self.rate_bytes_per_second = rate;
            } else if limited {
                self.rate_bytes_per_second = self.rate_bytes_per_second * 0.9 + rate * 0.1;
            }
        } else if self.rate_bytes_per_second == 0.0 {
            self.rate_bytes_per_second = bytes as f64 * 2.0;
        }
    }
}
