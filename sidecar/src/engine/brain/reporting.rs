//! The report: everything that status, metrics and the operator read. Made here, decided from nowhere.

use std::sync::PoisonError;

use watari_core::{geometry::BLOCK_BYTES, primary::Phase, regions::REGION_BYTES, tracker::MapName};
use watari_wire::report::{
    DiskReport, DivergenceReport, GenerationsReport, LinkReport, ReplicaReport, Report, TransferReport,
    VerificationReport,
};

use super::*;

/// A certificate of which less than this share of its life is left should have been renewed.
const CERTIFICATE_LATE_SHARE: i64 = 5;

impl Brain {
    pub(super) fn make_report(&mut self) {
        self.follow_conditions();
        let record = self.parts.site.record();
        let role = match record.role.name() {
            "Replica" if self.parts.site.offered() && self.parts.connections.count() > 0 => "Attached",
            name => name,
        };
        let report = Report {
            pair: self.parts.config.pair.name.clone(),
            site: self.parts.config.site.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            role: role.to_owned(),
            attachable: self.parts.site.attachable(),
            epoch: record.epoch.counter,
            floor: record.floor,
            disks: self.disk_reports(),
            link: self.link_report(),
            generations: self.generations_report(),
            replica: self.replica_report(),
            transfer: self.transfer_report(),
            divergence: self.divergence.as_ref().map(|list| DivergenceReport {
                bytes: list.bytes(),
                extents: list.extents.len() as u64,
                after: name(list.base),
                anything: list.anything,
            }),
            verification: self.verification_report(),
            trust: self.trust().to_owned(),
            logged_bytes: self.logged_bytes(),
            conditions: self.conditions.list(),
            worker_restarts: self.parts.restarts,
            now_unix_millis: unix_millis(),
        };
        *self.parts.report.lock().unwrap_or_else(PoisonError::into_inner) = report;
    }

    fn trust(&self) -> &'static str {
        if self.parts.shared.pass_through {
            "PassThrough"
        } else if self.parts.shared.unproven.load(SeqCst) {
            "Comparing"
        } else if self.parts.shared.untracked() {
            "Untracked"
        } else if self.source.as_ref().is_some_and(|s| s.full_compare.is_some()) {
            "Comparing"
        } else {
            "Tracked"
        }
    }

    fn logged_bytes(&self) -> u64 {
        self.source.as_ref().map_or(0, |_| self.parts.shared.regions.report().logged as u64 * REGION_BYTES)
    }

    fn disk_reports(&self) -> Vec<DiskReport> {
        let tracker = &self.parts.shared.tracker;
        let reports = self.parts.disks.iter().zip(tracker.disk_indices()).map(|(disk, index)| {
            let staged = tracker.count(index, MapName::Staged);
            let marked = tracker.count(index, MapName::First) + tracker.count(index, MapName::Second) + staged;
            let local = disk.local().file();
            DiskReport {
                name: self.parts.config.disks[usize::from(index.0)].name.clone(),
                size_bytes: local.size_bytes(),
                dirty_bytes: marked * BLOCK_BYTES,
                staged_bytes: staged * BLOCK_BYTES,
                clients: disk.clients(),
            }
        });
        reports.collect()
    }

    fn link_report(&self) -> LinkReport {
        LinkReport {
            connected: self.link.is_some(),
            peer: self.link.as_ref().map_or_else(String::new, |l| l.peer.clone()),
            rtt_millis: self.link.as_ref().map_or(0.0, |l| l.rtt_millis),
            rate_bytes_per_second: self.source.as_ref().map_or(0.0, |s| s.primary.window.rate_bytes_per_second()),
            limit_bits_per_second: self.parts.throttle.effective().bits(),
            reconnects: self.reconnects.saturating_sub(1),
            last_error: self.last_link_error.clone(),
        }
    }

    fn generations_report(&self) -> GenerationsReport {
        let Some(source) = &self.source else {
            let committed = self.target.as_ref().map(Target::committed).unwrap_or_default();
            return GenerationsReport {
                committed: name(committed),
                committed_number: committed.number.0,
                ..GenerationsReport::default()
            };
        };
        let primary = &source.primary;
        let tracker = &self.parts.shared.tracker;
        let base = primary.base();
        let cut = primary.base_cut_millis();
        let lag_bytes =
            (tracker.current_blocks() + tracker.frozen_blocks() + self.parts.shared.preserve.blocks()) * BLOCK_BYTES;
        let rate = primary.window.rate_bytes_per_second();
        let (open, total) = match primary.phase() {
            Phase::Open { generation, total_blocks, .. } => (name(*generation), total_blocks * BLOCK_BYTES),
            Phase::Committing { generation, .. } | Phase::Forgetting { generation, .. } => (name(*generation), 0),
            Phase::Idle => (String::new(), 0),
        };
        let left = (tracker.frozen_blocks() + self.parts.shared.preserve.blocks()) * BLOCK_BYTES;
        GenerationsReport {
            committed: name(base),
            committed_number: base.number.0,
            committed_cut_unix_millis: cut,
            lag_seconds: if cut == 0 { 0.0 } else { unix_millis().saturating_sub(cut) as f64 / 1000.0 },
            lag_bytes,
            open,
            open_total_bytes: total,
            open_sent_bytes: total.saturating_sub(left),
            eta_seconds: (rate > 0.0 && lag_bytes > 0).then(|| lag_bytes as f64 / rate),
            committed_count: primary.counters.committed,
            given_up_count: primary.counters.given_up,
            behind_because: self.behind_because(),
        }
    }

    fn behind_because(&self) -> String {
        let Some(source) = &self.source else { return String::new() };
        if self.parts.shared.untracked() && !self.parts.shared.unproven.load(SeqCst) {
            return "changes are not tracked".into();
        }
        if self.limits.paused {
            return "synchronisation is paused".into();
        }
        if self.link.is_none() {
            return format!("no link to the peer: {}", self.last_link_error);
        }
        if !source.peer_full.is_empty() {
            return format!("the peer waits for room: {}", source.peer_full);
        }
        if self.share < 1.0 {
            return format!(
                "giving way to the guest, whose own requests got slower: {:.0} % of the link is used",
                self.share * 100.0
            );
        }
        match &source.full_compare {
            Some(why) => format!("comparing with the peer: {}", why.0),
            None if source.primary.counters.given_up > 0 && source.primary.base_cut_millis() == 0 => {
                "the guest writes faster than the link; generations were given up".into()
            }
            None => String::new(),
        }
    }

    fn replica_report(&self) -> Option<ReplicaReport> {
        let target = self.target.as_ref()?;
        let state = match (&target.poisoned, target.full.is_empty()) {
            (Some(_), _) => "Poisoned",
            (None, false) => "Full",
            (None, true) => "Ready",
        };
        let store = target.store.lock().report();
        Some(ReplicaReport {
            committed: name(target.committed()),
            committed_unix_millis: target.committed_at_seconds().saturating_mul(1000),
            applied: name(target.applied()),
            kept: target.store.lock().kept().iter().map(|m| name(m.generation)).collect(),
            journal_bytes: store.journal_bytes,
            journal_limit_bytes: self.parts.config.journal_bytes,
            free_bytes: target.room.folder_bytes,
            undo_bytes: store.undo_bytes,
            state: state.to_owned(),
        })
    }

    fn verification_report(&self) -> Option<VerificationReport> {
        let verification = &self.source.as_ref()?.verification;
        let total: u64 = self.parts.disks.iter().map(|d| d.local().file().size_bytes()).sum();
        Some(VerificationReport {
            pass_bytes: (verification.done_blocks * BLOCK_BYTES).min(total),
            pass_total_bytes: total,
            proved_unix_millis: verification.proved_unix_millis,
            differed_blocks: verification.differed,
        })
    }

    fn transfer_report(&self) -> TransferReport {
        let counters = self.source.as_ref().map(|s| s.primary.counters.clone()).unwrap_or_default();
        let preserve = self.parts.config.preserve;
        TransferReport {
            content_bytes: counters.content_bytes,
            wire_bytes: counters.wire_bytes,
            resent_bytes: counters.resent_bytes,
            durable_bytes: counters.durable_bytes,
            frames: counters.frames,
            preserve_bytes: self.parts.shared.preserve.blocks() * BLOCK_BYTES,
            preserve_limit_bytes: preserve.memory_bytes + preserve.spill_bytes,
        }
    }

    /// Our own certificate: the link ends with it, the VM does not.
    fn follow_certificate(&mut self) {
        let status = self.parts.tls.status();
        let next = "renew `tls.certificate` and its key: new files are taken up without a restart";
        let reload = status.reload_error.map(|error| ("ReloadFailed", format!("new files cannot be used: {error}")));
        let left = status.not_after_unix_seconds - (unix_millis() / 1000) as i64;
        let lifetime = status.not_after_unix_seconds - status.not_before_unix_seconds;
        let ends = if left <= 0 {
            Some(("Expired", "our certificate has expired: no new connection to the peer is made".to_owned()))
        } else {
            let short = left < lifetime / CERTIFICATE_LATE_SHARE;
            short.then(|| ("ExpiresSoon", format!("our certificate ends in {} hours", left / 3600)))
        };
        let found = reload.or(ends).map(|(reason, text)| (reason, text, next));
        self.conditions.follow("Certificate", found);
    }

    fn follow_conditions(&mut self) {
        self.follow_certificate();
        let full = self.target.as_ref().map(|t| t.full.clone()).filter(|f| !f.is_empty());
        self.conditions.follow(
            "TargetFull",
            full.map(|f| ("NoRoom", f, "make room on the claim named in the message; it goes on by itself")),
        );
        let poisoned = self.target.as_ref().and_then(|t| t.poisoned.clone());
        self.conditions.follow(
            "ReplicaPoisoned",
            poisoned.map(|p| ("WriteFailed", p, "check the medium, then restart this sidecar")),
        );
        let compare = self.source.as_ref().and_then(|s| s.full_compare.clone());
        self.conditions.follow("FullCompare", compare.map(|c| ("Comparing", c.0, "nothing: it ends by itself")));
        let unproven = self.parts.shared.unproven.load(SeqCst);
        let untracked = self.parts.shared.untracked() && !unproven && self.source.is_some();
        let (reason, text) = if self.parts.shared.pass_through {
            ("PassThrough", "this worker crashed too often and serves the VM without tracking")
        } else {
            ("Untracked", "changes cannot be logged; everything counts as dirty")
        };
        let next = "check the metadata folder; a restart of the sidecar compares everything with the peer";
        self.conditions.follow("TrackingLost", untracked.then(|| (reason, text.to_owned(), next)));
        if !self.parts.site.record().unfenced {
            self.conditions.clear("Unfenced");
        }
        if !self.parts.site.waiting_for_grant() {
            self.conditions.clear("WaitingForGrant");
        }
        let sealed =
            matches!(self.parts.site.record().role, watari_core::record::Role::Sealed { .. }) && self.link.is_none();
        let text = "this side is sealed for a handover and its target does not answer";
        let next = "wait for the target, or promote it at its last commit, or serve on here: `watari-sidecar ctl void`";
        self.conditions.follow("SealedWithoutTarget", sealed.then(|| ("NoLink", text.to_owned(), next)));
        let short = self.source.as_ref().filter(|s| s.primary.converging()).and_then(Source::reserve_missing);
        let next = "make room at the target, or cancel the migration and `watari-sidecar ctl void` there before the VM arrives";
        self.conditions.follow("TargetReserve", short.map(|text| ("TooLittleRoom", text, next)));
        let differed = self.source.as_ref().map_or(0, |s| s.verification.differed);
        self.conditions.follow(
            "ReplicaDiffered",
            (differed > 0).then(|| {
                let text =
                    format!("{differed} blocks of the replica were not what was sent; they have been sent again");
                (
                    "FoundByVerification",
                    text,
                    "check the media at both sites: one of them lost or changed what it had acknowledged",
                )
            }),
        );
        // From a generation that was given up until the next one that is committed.
        let counters = self.source.as_ref().map(|s| &s.primary.counters);
        if let Some(counters) = counters.filter(|c| c.given_up != self.given_up_before) {
            (self.given_up_before, self.committed_before) = (counters.given_up, counters.committed);
        }
        let churn = counters.filter(|c| c.given_up > 0 && c.committed == self.committed_before && self.link.is_some());
        let bound = self.parts.config.preserve.memory_bytes + self.parts.config.preserve.spill_bytes;
        let dirty = self.parts.shared.tracker.current_blocks() * BLOCK_BYTES;
        self.conditions.follow("ChurnExceedsPreserve", churn.map(|_| {
            let text = format!("what the guest overwrites during a generation does not fit {bound} bytes; about {dirty} bytes would be needed");
            ("GivenUp", text, "raise preserve.memory or preserve.spill, or give the pair more bandwidth")
        }));
    }
}

fn name(g: Generation) -> String {
    if g == Generation::default() { String::new() } else { g.to_string() }
}
