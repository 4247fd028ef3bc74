//! What the brain does as time passes: a fresh boot's wait for the peer, time windows, slowing down, leaving `Untracked`.

use super::*;

/// How long a fresh boot waits for the peer's word (design §3.6).
pub(super) const CONFIRM_WAIT: Duration = Duration::from_secs(5);
/// Below this lag (32 MiB) a move needs no slowing down.
const SLOW_DOWN_BELOW_BLOCKS: u64 = 8192;
/// Bounds of the delay of one guest write, microseconds.
const SLOW_DOWN_MICROS_MIN: u64 = 200;
const SLOW_DOWN_MICROS_MAX: u64 = 20_000;
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
            }
            self.scheduled = Some(limit);
        }
    }

    /// While converging, and only if allowed: slow guest writes down until the lag shrinks.
    pub(super) fn slow_down(&mut self) {
        let Some(source) = &self.source else { return };
        let tracker = &self.parts.shared.tracker;
        let lag = tracker.current_blocks() + tracker.frozen_blocks();
        let slow = &self.parts.shared.slow_down_micros;
        let now = slow.load(SeqCst);
        let next = if !self.slow_down || !source.primary.converging() || lag < SLOW_DOWN_BELOW_BLOCKS {
            0
        } else if lag >= self.lag_before {
            (now * 2).clamp(SLOW_DOWN_MICROS_MIN, SLOW_DOWN_MICROS_MAX)
        } else {
            now
        };
        self.lag_before = lag;
        if next != now {
            slow.store(next, SeqCst);
        }
    }

    /// A metadata folder that works again: a complete new log, and a comparison of everything.
    pub(super) fn leave_untracked(&mut self, now: Instant) {
        if !self.parts.shared.untracked() || self.parts.shared.pass_through || now < self.next_leave {
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
