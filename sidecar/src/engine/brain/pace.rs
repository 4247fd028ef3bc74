//! What the brain does as time passes: a fresh boot's wait for the peer, time windows, giving way to the guest, slowing it
//! down for a move, how hard to compress, leaving `Untracked`.

use std::sync::atomic::Ordering::Relaxed;

use watari_core::geometry::BLOCK_BYTES;

use super::*;
use crate::throttle::{backoff, effort};

/// zstd level until something was measured.
pub(super) const FIRST_LEVEL: i32 = 1;
/// A second in which less than this share of the link was used shows how the guest fares without us.
const QUIET_SHARE: f64 = 0.15;
/// Threads' worth of CPU that compression may take: most of one core, the rest of the node belongs to VMs.
const COMPRESSION_THREADS: f64 = 0.75;

/// How long a fresh boot waits for the peer's word (design §3.6).
pub(super) const CONFIRM_WAIT: Duration = Duration::from_secs(5);
/// A move needs no slowing down once the link carries what is left within this time (seconds), or it is this little (2 MiB):
/// the guest waits that long at the seal.
const SLOW_DOWN_GOAL_SECONDS: f64 = 1.0;
const SLOW_DOWN_GOAL_BLOCKS_MIN: u64 = 512;
/// Bounds of the delay of one guest write, microseconds. The upper one holds 32 writes of 4 KiB at a time to 1.3 MB/s.
const SLOW_DOWN_MICROS_MIN: u64 = 200;
const SLOW_DOWN_MICROS_MAX: u64 = 100_000;
/// Pause between two attempts to leave `Untracked`: each writes a whole log.
const LEAVE_UNTRACKED_PAUSE: Duration = Duration::from_secs(10);

impl Brain {
    /// The peer has said what it is: what is still ours to serve is served.
    pub(super) fn confirmed(&mut self) {
        self.conditions.clear("EpochUnconfirmed");
        if self.confirm_until.take().is_some() && self.parts.site.record().role.accepts_writes() {
            self.set_gate(Gate::Serve);
        }
    }

    /// The peer is silent: the policy decides (design §3.6).
    pub(super) fn confirm_late(&mut self, now: Instant) {
        if self.confirm_until.is_none_or(|until| now < until) {
            return;
        }
        let text = "this VM boots although the peer does not answer: if it was promoted there, two of it run";
        match self.parts.config.start_without_peer {
            StartWithoutPeer::Allow => {
                self.confirmed();
                self.conditions.set(
                    "EpochUnconfirmed",
                    "PeerSilent",
                    text,
                    "make sure that the VM does not run at the peer",
                );
            }
            StartWithoutPeer::Deny => {
                let text =
                    "the peer does not answer and start_without_peer is deny: the VM's requests are held, then fail";
                self.conditions.set(
                    "EpochUnconfirmed",
                    "Denied",
                    text,
                    "bring the peer back, or set start_without_peer = \"allow\"",
                );
            }
        }
    }

    /// Time windows: the limit of this second, unless somebody set another one meanwhile.
    pub(super) fn follow_schedule(&mut self) {
        let limit = self.parts.config.bandwidth.limit_at((unix_millis() / 1000) as i64);
        if self.scheduled != Some(limit) {
            if self.scheduled.is_some() {
                self.parts.throttle.set_limit(limit);
                if self.settings.bandwidth_bits_per_second.take().is_some() {
                    self.settings.keep(&self.parts.config.runtime_dir);
                }
            }
            self.scheduled = Some(limit);
        }
    }

    /// When the guest's own I/O is slower than without us, take less of the link (design §3.3). Never during a move: then
    /// the guest is helped by an early end.
    pub(super) fn give_way(&mut self) {
        let recent = self.parts.shared.latency.take();
        let Some(source) = &self.source else { return };
        let sent = source.primary.counters.wire_bytes;
        let rate = source.primary.window.rate_bytes_per_second();
        let used = sent.saturating_sub(self.sent_before) as f64;
        self.sent_before = sent;
        let quiet = source.primary.bytes_in_flight() == 0 || used < rate * QUIET_SHARE;
        if let (true, Some(recent)) = (quiet, recent) {
            self.idle_latency = Some(self.idle_latency.map_or(recent, |idle| idle.mul_f64(0.8) + recent.mul_f64(0.2)));
        }
        if self.share == 1.0 {
            self.whole_rate = rate;
        }
        let moving = source.primary.converging() || !self.parts.site.record().role.accepts_writes();
        let before = self.share;
        self.share = if moving { 1.0 } else { backoff::next_factor(self.share, recent, self.idle_latency) };
        if self.share != before {
            let allowed = self.parts.throttle.limit().bits();
            let whole = if allowed > 0 { allowed as f64 } else { self.whole_rate * 8.0 };
            let ceiling = (self.share < 1.0 && whole > 0.0).then_some((whole * self.share) as u64);
            tracing::debug!(share = self.share, ?recent, idle = ?self.idle_latency, ?ceiling, "giving way to the guest");
            self.parts.throttle.set_ceiling(ceiling);
        }
    }

    /// A step of the continuous verification, unless the guest needs the disk.
    pub(super) fn verify(&mut self) {
        let bytes = self.parts.config.verify_bytes_per_second;
        if let Some(source) = self.source.as_mut().filter(|_| self.share == 1.0) {
            source.verify(bytes);
        }
    }

    /// How hard to compress, from what was measured in the last second.
    pub(super) fn choose_level(&mut self) {
        let Some(source) = &mut self.source else { return };
        let effort = &self.parts.shared.effort;
        let take = |n: &std::sync::atomic::AtomicU64| n.swap(0, Relaxed) as f64;
        let (content, payload, nanos) = (take(&effort.content_bytes), take(&effort.payload_bytes), take(&effort.nanos));
        let Some(level) = source.level.filter(|_| content > 0.0 && nanos > 0.0) else { return };
        let rate = source.primary.window.rate_bytes_per_second();
        let link = match self.parts.throttle.effective().bits() {
            0 => rate,
            bits => rate.min(bits as f64 / 8.0),
        };
        let (thread, ratio) = (content * 1e9 / nanos, content / payload.max(1.0));
        source.level =
            Some(effort::next_level(level, effort::Measured { link, thread, threads: COMPRESSION_THREADS, ratio }));
    }

    /// While converging, and only if allowed: slow guest writes down until the lag shrinks.
    pub(super) fn slow_down(&mut self) {
        let Some(source) = &self.source else { return };
        let tracker = &self.parts.shared.tracker;
        let lag = tracker.current_blocks() + tracker.frozen_blocks();
        let slow = &self.parts.shared.slow_down_micros;
        let now = slow.load(SeqCst);
        let goal = source.primary.window.rate_bytes_per_second() * SLOW_DOWN_GOAL_SECONDS / BLOCK_BYTES as f64;
        let next = match self.slow_down && source.primary.converging() {
            true => next_delay(now, lag, self.lag_before, (goal as u64).max(SLOW_DOWN_GOAL_BLOCKS_MIN)),
            false => 0,
        };
        self.lag_before = lag;
        if next != now {
            slow.store(next, SeqCst);
        }
    }

    /// A guest that stopped writing makes no commits, after which regions leave the log: look from time to time.
    pub(super) fn forget_cold_regions(&mut self, now: Instant) {
        if let Some(source) = self.source.as_mut() {
            source.forget_cold_regions(now);
        }
    }

    /// A metadata folder that works again: a complete new log, and a comparison of everything.
    pub(super) fn leave_untracked(&mut self, now: Instant) {
        let shared = &self.parts.shared;
        if !shared.untracked() || shared.unproven.load(SeqCst) || shared.pass_through || now < self.next_leave {
            return;
        }
        self.next_leave = now + LEAVE_UNTRACKED_PAUSE;
        let Some(source) = &mut self.source else { return };
        match crate::engine::start::new_log(&self.parts.config, &self.parts.shared, self.parts.session) {
            Ok(()) => source.compare_everything("changes were not logged for a while"),
            Err(error) => tracing::warn!(error, "the region log cannot be written yet"),
        }
    }
}

/// The delay of one guest write (microseconds) for the next second: more while the lag (blocks) does not shrink, less once it is
/// below the goal. It is let go step by step: let go at once, a writer faster than the link would undo it at once.
fn next_delay(now: u64, lag: u64, before: u64, goal: u64) -> u64 {
    if lag > goal && lag >= before {
        return (now * 2).clamp(SLOW_DOWN_MICROS_MIN, SLOW_DOWN_MICROS_MAX);
    }
    let next = if lag > goal { now } else { now / 2 };
    if next < SLOW_DOWN_MICROS_MIN { 0 } else { next }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A slow-down that ended at a lag of 32 MiB, whatever the link, left a thin one there for ever.
    #[test]
    fn a_writer_faster_than_a_thin_link_is_slowed_until_the_lag_is_what_the_link_carries_in_a_second() {
        let (link, writer, goal) = (512, 1280, 512);
        let (mut lag, mut before, mut delay) = (9000u64, 0, 0);
        for _ in 0..120 {
            delay = next_delay(delay, lag, before, goal);
            before = lag;
            // Four writes at a time, each as long as its delay.
            let slowed = 4_000_000u64.checked_div(delay).map_or(writer, |slowed| slowed.min(writer));
            lag = (lag + slowed).saturating_sub(link);
        }
        assert!(lag <= 2 * goal, "{lag} blocks are left");
    }

    #[test]
    fn a_guest_that_converges_by_itself_is_never_slowed() {
        assert_eq!(next_delay(0, 400, 100, 512), 0);
        assert_eq!(next_delay(0, 4000, 5000, 512), 0);
    }
}
