//! Conditions for people (I9): a type, why, and what to do next. Report, not state: nothing is decided from them.

use std::collections::BTreeMap;

use watari_core::handover;
use watari_wire::report::Condition;

use super::clock::unix_millis;

/// The conditions that hold now, by type.
#[derive(Default)]
pub struct Conditions(BTreeMap<String, Condition>);

impl Conditions {
    pub fn set(&mut self, kind: &str, reason: &str, message: &str, next_step: &str) {
        let old = self.0.get(kind);
        let same = old.is_some_and(|c| c.reason == reason);
        if !same {
            tracing::warn!(condition = kind, reason, message, next_step, "condition");
        }
        let since_unix_millis = if same { old.map_or(0, |c| c.since_unix_millis) } else { unix_millis() };
        self.0.insert(
            kind.to_owned(),
            Condition {
                kind: kind.to_owned(),
                status: true,
                reason: reason.to_owned(),
                message: message.to_owned(),
                next_step: next_step.to_owned(),
                since_unix_millis,
            },
        );
    }

    pub fn holds(&self, kind: &str) -> bool {
        self.0.contains_key(kind)
    }

    pub fn clear(&mut self, kind: &str) {
        if self.0.remove(kind).is_some() {
            tracing::info!(condition = kind, "condition ended");
        }
    }

    /// Set or clear by what is the case now.
    pub fn follow(&mut self, kind: &str, holds: Option<(&str, String, &str)>) {
        match holds {
            Some((reason, message, next_step)) => self.set(kind, reason, &message, next_step),
            None => self.clear(kind),
        }
    }

    pub fn refused(&mut self, why: &str) {
        self.set("IntentRefused", "NotNow", why, "look at the role of both sides");
    }

    pub fn handover(&mut self, condition: handover::Condition) {
        use handover::Condition as C;
        let (kind, reason, message, next) = match condition {
            C::Diverged => (
                "Diverged",
                "SameEpochTwice",
                "both sites raised the same epoch apart from each other; neither is stopped, no frames flow",
                "name the side that shall win: `watari-sidecar ctl void` there makes it serve on at a higher epoch",
            ),
            C::Fenced => (
                "Fenced",
                "Replaced",
                "another side was promoted while this one was active: it serves nothing any more",
                "`watari-sidecar inspect divergence` shows what it wrote alone and copies it; then `watari-sidecar ctl accept-divergence`",
            ),
            C::Unfenced => (
                "Unfenced",
                "PromotedAlone",
                "this side was promoted without the former source's consent, which may still be running",
                "make sure that the VM does not run at the old site",
            ),
            C::WaitingForGrant => (
                "WaitingForGrant",
                "Asked",
                "this side asked for the right to write and has no answer yet",
                "wait for the source; if it is gone: void, or promote at the last commit",
            ),
        };
        self.set(kind, reason, message, next);
    }

    pub fn list(&self) -> Vec<Condition> {
        self.0.values().cloned().collect()
    }
}
