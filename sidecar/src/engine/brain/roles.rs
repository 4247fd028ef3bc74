//! Becoming what the record says: source, replica, promoted, fenced. Each is entered once per change of role, in the order that
//! `Site::apply` gave; what they do from then on is in `source.rs` and `target.rs`.

use super::*;

impl Brain {
    /// After a start: go on from the durable record.
    pub(super) fn take_up(&mut self) {
        let role = self.parts.site.record().role.clone();
        if role.is_active_side() && !matches!(role, Role::Promoting { .. }) {
            let baseline = self.parts.baseline.clone();
            self.become_source(None, baseline);
        } else if matches!(role, Role::Replica | Role::Voided { .. } | Role::Promoting { .. }) {
            // Not as Fenced: its disks are no replica's, and what may lie there is what a loss of power left of a removal.
            self.open_target();
        }
        if matches!(role, Role::Fenced { .. }) {
            match divergence::read(&self.parts.config.folder, self.parts.config.pair.id.0) {
                Ok(list) => self.divergence = list,
                Err(error) => tracing::error!(%error, "what this side wrote alone is not known"),
            }
        }
        let actions = self.parts.site.resume();
        self.perform(actions);
        if self.parts.fresh_boot && self.parts.site.record().role == Role::Serving {
            self.confirm_until = Some(Instant::now() + pace::CONFIRM_WAIT);
            self.set_gate(Gate::Hold);
        }
        self.dial();
    }

    /// What this side wrote and its peer lacks, durable before anything says that this side is fenced.
    pub(super) fn list_divergence(&mut self, record: &RoleRecord, by: u64) {
        let Some(source) = &self.source else { return };
        self.parts.shared.tracker.seal();
        self.drain();
        let list = divergence::list(&self.parts.shared, record, by, source.primary.base());
        if let Err(error) = divergence::write(&self.parts.config.folder, &list) {
            tracing::error!(%error, "the list of what this side wrote alone cannot be kept: the worker starts over");
            std::process::exit(crate::engine::EXIT_RECORD);
        }
        self.divergence = Some(list);
    }

    /// `base`: a fresh beginning at this generation (handover, promotion); `None`: a start of the process.
    pub(super) fn become_source(&mut self, base: Option<Generation>, baseline: Baseline) {
        self.set_target(None);
        self.frames.clear();
        self.parts.shared.tracker.unseal();
        if base.is_some() {
            // The disks equal the base at both sites: nothing is marked. The journal, undo and manifest have served.
            self.parts.shared.tracker.clear_all();
            if let Err(error) = self.parts.replica.remove() {
                tracing::warn!(%error, "the former replica's files are left behind");
            }
        }
        let record = self.parts.site.record().clone();
        let begin = Begin {
            limits: self.limits.clone(),
            epoch: record.epoch.counter,
            session: self.parts.session,
            base: base.unwrap_or(record.base),
            next_number: record.numbers_reserved,
            numbers_reserved: record.numbers_reserved,
            level: Some(pace::FIRST_LEVEL),
        };
        let mut source =
            Source::new(begin, self.parts.shared.clone(), self.parts.disks.clone(), self.parts.post.clone());
        match baseline {
            Baseline::Marks | Baseline::Unproven => {}
            Baseline::Compare(ranges) => {
                for (disk, first, blocks) in ranges {
                    source.must_compare(disk, first, blocks);
                }
            }
            Baseline::Everything(why) => {
                tracing::warn!(reason = why, "everything will be compared by digest");
                source.compare_everything(&why);
            }
        }
        self.source = Some(source);
    }

    /// Those who read kept generations see the same store, and none when there is none.
    pub(super) fn set_target(&mut self, target: Option<Target>) {
        self.parts.generations.set(target.as_ref().map(|t| t.store.clone()));
        self.target = target;
    }

    pub(super) fn become_replica(&mut self, generation: Generation) {
        self.source = None;
        self.parts.shared.preserve.clear();
        let adopted = self.parts.replica.create(false).and_then(|mut store| {
            store.adopt(adopted_mark(generation))?;
            store.raise_floor(self.parts.site.record().epoch.counter)?;
            Ok(store)
        });
        match adopted {
            Ok(store) => {
                self.set_target(Some(Target::new(store)));
                self.parts.shared.tracker.clear_all();
                // What it wrote alone is a kept generation of this replica now.
                self.divergence = None;
                if let Err(error) = divergence::remove(&self.parts.config.folder) {
                    tracing::warn!(%error, "the list of divergent blocks is left behind");
                }
                self.apply(handover::Event::Adopted);
            }
            Err(error) => self.conditions.set(
                "ReplicaFailed",
                "CannotAdopt",
                &error.to_string(),
                "make room in the folder, then restart this sidecar",
            ),
        }
    }

    pub(super) fn open_target(&mut self) {
        let opened = self.parts.replica.open_or_create().and_then(|mut store| {
            self.grow_replica(&mut store)?;
            Ok(store)
        });
        match opened {
            Ok(store) => {
                self.set_target(Some(Target::new(store)));
                self.conditions.clear("ReplicaFailed");
            }
            Err(error) => {
                tracing::error!(%error, "the replica cannot be opened");
                self.conditions.set(
                    "ReplicaFailed",
                    "CannotOpen",
                    &error.to_string(),
                    "`watari-sidecar inspect` shows what is there",
                );
            }
        }
    }

    /// Promotion: make the image equal to a kept generation, then serve.
    pub(super) fn roll_to(&mut self, generation: Generation) {
        let Some(target) = &mut self.target else { return };
        let rolled = (|| {
            if target.committed() != generation {
                target.store.lock().promote_to(generation)?;
            }
            target.finish_applying()
        })();
        match rolled {
            Ok(()) => {
                self.apply(handover::Event::Rolled { activation: watari_core::geometry::ActivationId(random_id()) })
            }
            Err(error) => self.conditions.set(
                "PromotionFailed",
                "CannotRoll",
                &error.to_string(),
                "make room, then promote again",
            ),
        }
    }
}
