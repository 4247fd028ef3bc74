//! What people and the operator ask for, and the answers they get.

use std::sync::atomic::Ordering::SeqCst;

use watari_core::{geometry::ActivationId, handover, record::Role};

use super::*;
use crate::{
    engine::steering::{Intent, Settings},
    throttle::Limit,
};

/// Longest that a promotion waits for the source to seal and send what remains.
const TAKE_OVER_WAIT: Duration = Duration::from_secs(20);
/// A source that says nothing for so long is not there (it sends a heartbeat each second).
const SOURCE_SILENT: Duration = Duration::from_secs(3);

impl Brain {
    pub(super) fn intent(&mut self, intent: Intent, answer: Answer) {
        match intent {
            Intent::Cut { wait } => self.cut(wait, answer),
            Intent::Configure(settings) => {
                self.settings.update(&settings);
                self.settings.keep(&self.parts.config.runtime_dir);
                let _ = answer.send(Ok(Outcome::Done(self.configure(&settings))));
            }
            Intent::OpenHandover { vmi_uid } => self.open_handover(&vmi_uid, answer),
            Intent::Acquire | Intent::MoveStopped => self.acquire(answer),
            Intent::Void => self.void(answer),
            Intent::Promote { generation } => self.promote(generation, answer),
            Intent::AcceptDivergence => {
                let text = "this side becomes a replica; its own later writes stay readable until they are overwritten";
                self.answer_with(handover::Event::AcceptDivergence, answer, text);
            }
            Intent::Release => {
                if self.parts.connections.count() > 0 && self.parts.site.record().role.accepts_writes() {
                    return Self::decline(answer, "a VM is running from this sidecar: stop or move it first");
                }
                self.parts.connections.forgive();
                let _ = answer.send(Ok(Outcome::Done("the folder is released".into())));
                self.exit = Some(0);
            }
        }
    }

    /// Apply an event; a refusal in its actions is the answer.
    fn answer_with(&mut self, event: handover::Event, answer: Answer, done: &str) {
        let actions = self.parts.site.apply(event);
        let refusal = actions.iter().find_map(|a| if let Action::Refuse(why) = a { Some(*why) } else { None });
        match refusal {
            Some(why) => {
                let role = self.parts.site.record().role.name();
                Self::decline(answer, format!("{why} (this side is {role})"));
            }
            None => {
                self.perform(actions);
                // Whoever was told may look at once: the report must not still show what was before.
                self.make_report();
                let _ = answer.send(Ok(Outcome::Done(done.to_owned())));
            }
        }
    }

    fn cut(&mut self, wait: Duration, answer: Answer) {
        let Some(source) = &mut self.source else {
            let role = self.parts.site.record().role.name();
            return Self::decline(answer, format!("only the active side makes cuts; this side is {role}"));
        };
        // A cut that is open already may lie before what the caller wants in it.
        let after = match source.primary.phase() {
            Phase::Idle => source.primary.next_number().0 - 1,
            Phase::Open { generation, .. }
            | Phase::Committing { generation, .. }
            | Phase::Forgetting { generation, .. } => generation.number.0,
        };
        source.primary.demand_cut();
        self.cuts.push(CutWaiter { answer, deadline: Instant::now() + wait, number: None, after });
    }

    pub(super) fn configure(&mut self, settings: &Settings) -> String {
        let Settings { interval, bandwidth_bits_per_second, paused, slow_down } = settings;
        if let Some(interval) = interval {
            self.limits.interval_millis = interval.as_millis() as u64;
        }
        if let Some(bits) = bandwidth_bits_per_second {
            self.parts.throttle.set_limit(Limit::from_bits(*bits));
        }
        if let Some(paused) = paused {
            self.limits.paused = *paused;
        }
        if let Some(slow) = slow_down {
            self.slow_down = *slow;
            if !slow {
                self.parts.shared.slow_down_micros.store(0, SeqCst);
            }
        }
        if let Some(source) = &mut self.source {
            source.primary.limits = self.limits.clone();
        }
        format!(
            "interval {} ms, bandwidth {}, {}",
            self.limits.interval_millis,
            self.parts.throttle.limit(),
            if self.limits.paused { "paused" } else { "running" }
        )
    }

    /// The same VMI at the same epoch always gives the same handover, so that asking twice is asking once.
    fn open_handover(&mut self, vmi_uid: &str, answer: Answer) {
        let record = self.parts.site.record();
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"watari handover 1");
        hasher.update(&record.pair);
        hasher.update(&record.epoch.counter.to_le_bytes());
        hasher.update(&record.epoch.activation.0);
        hasher.update(vmi_uid.as_bytes());
        let mut handover = [0; 16];
        handover.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        if self.parts.shared.untracked() {
            return Self::decline(
                answer,
                "this pair is Untracked: a handover could lose writes; wait until it is Tracked",
            );
        }
        if let Some(missing) = self.source.as_ref().and_then(Source::reserve_missing) {
            let next =
                "make room in its folder and beside its images, raise its `journal`, or wait until less is dirty";
            return Self::decline(answer, format!("{missing}: {next}"));
        }
        let text = "the handover is open: converging; only this VM may connect until it is moved or voided";
        self.answer_with(handover::Event::OpenHandover { handover }, answer, text);
    }

    fn acquire(&mut self, answer: Answer) {
        if self.parts.site.record().role.accepts_writes() {
            let _ = answer.send(Ok(Outcome::Done("this side is active already".into())));
            return;
        }
        let event = handover::Event::WantWrite { nonce: random_id() };
        self.answer_with(event, answer, "asked for the right to write");
    }

    /// At a target: give the handover up for good. At the active side, a person's decision: serve on here, above
    /// whatever the handover may still lead to.
    fn void(&mut self, answer: Answer) {
        let activation = ActivationId(random_id());
        let role = &self.parts.site.record().role;
        if *role == Role::Serving && !self.conditions.holds("Diverged") {
            return Self::decline(answer, "no handover is open here: there is nothing to void");
        }
        if role.is_active_side() {
            self.conditions.clear("Diverged");
            let text = "this side serves on at a higher epoch; if the target was activated meanwhile it is fenced at the next contact";
            self.answer_with(handover::Event::Reclaim { activation }, answer, text);
            // The peer learns the new epoch from a new Hello; on this link it would refuse every frame.
            return self.hang_up();
        }
        let text = "voided: this side will never activate in that handover";
        self.answer_with(handover::Event::WantVoid { activation }, answer, text);
    }

    /// The newest state (`None`) is taken from the source itself, if it can be reached; a named generation never is.
    fn promote(&mut self, number: Option<u64>, answer: Answer) {
        if self.taking_over.is_some() {
            return Self::decline(answer, "a promotion is under way");
        }
        if number.is_none() && self.link.is_some() && self.parts.site.record().role == Role::Replica {
            let event = handover::Event::TakeOver { handover: random_id(), nonce: random_id() };
            if self.apply_or_refuse(event).is_ok() {
                self.last_heard = Instant::now();
                self.taking_over = Some(TakingOver { answer, until: Instant::now() + TAKE_OVER_WAIT });
                return;
            }
        }
        self.promote_alone(number, answer, "");
    }

    /// The source gave everything over, or it did not in time: then this side goes on alone.
    pub(super) fn take_over_or_promote(&mut self, now: Instant) {
        let Some(TakingOver { until, .. }) = &self.taking_over else { return };
        let waits = self.parts.site.record().role == Role::Replica
            && self.link.is_some()
            && now < *until
            && now.duration_since(self.last_heard) < SOURCE_SILENT;
        let (false, Some(TakingOver { answer, .. })) = (waits, self.taking_over.take_if(|_| !waits)) else { return };
        if self.parts.site.record().role.accepts_writes() {
            let text = "promoted: the source was sealed first, everything that it acknowledged is here";
            let _ = answer.send(Ok(Outcome::Done(text.into())));
            return;
        }
        self.promote_alone(None, answer, "; the source did not give way in time, so what it wrote since is not here");
    }

    fn promote_alone(&mut self, number: Option<u64>, answer: Answer, why: &str) {
        let Some(target) = &self.target else {
            let role = self.parts.site.record().role.name();
            return Self::decline(answer, format!("only a replica can be promoted; this side is {role}"));
        };
        let kept: Vec<Generation> = target.store.lock().kept().iter().map(|m| m.generation).collect();
        let wanted = match number {
            None => kept.first(),
            Some(n) => kept.iter().find(|g| g.number.0 == n),
        };
        let Some(generation) = wanted.copied() else {
            let names: Vec<String> = kept.iter().map(ToString::to_string).collect();
            let found = number.map_or("no generation".to_owned(), |n| format!("generation {n}"));
            return Self::decline(answer, format!("{found} is not kept here; kept are [{}]", names.join(", ")));
        };
        if matches!(self.parts.site.record().role, Role::Promoting { .. }) {
            return Self::decline(answer, "a promotion is under way");
        }
        let text = format!("promoted at generation {generation}{why}");
        self.answer_with(handover::Event::Promote { generation }, answer, &text);
    }
}
