//! KubeVirt, the operator and people: boots, moves with every way to fail, voids, promotions, consent. They follow the
//! rules of design §3.5 and §3.6 and are as slow, late and repetitive as they may be.

use watari_core::{geometry::ActivationId, handover::Event, record::Role};

use crate::{
    guest::Ask,
    intents::Wish,
    world::{Qemu, World},
};

/// How far a live migration is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// The handover is open (or being opened).
    Opened,
    /// The target's QEMU exists.
    TargetUp,
    /// The source's QEMU finishes its requests and flushes.
    Stopping,
    /// It is stopped and flushed; nobody executes the guest.
    Stopped,
    /// The target's QEMU executes.
    Resumed,
    /// It failed before that; the target voids.
    Failed,
}

/// A move under way.
#[derive(Clone, Copy, Debug)]
pub struct Move {
    pub from: usize,
    pub phase: Phase,
    pub handover: [u8; 16],
    /// The guest wrote nothing since it was opened.
    pub idle: bool,
}

impl World {
    /// One thing that somebody decides.
    pub fn operates(&mut self) -> bool {
        let s = self.some_site();
        match self.ctx.rng.below(12) {
            0 | 1 => self.boots(s),
            2 => self.ctx.setup.moves && self.opens(s),
            3..=6 => self.moves_on(),
            7 => self.ctx.rng.one_in(12) && self.migration_fails(),
            8 => self.asks_again(),
            9 => self.ctx.setup.failovers && self.promotes(s),
            10 if self.ctx.setup.failovers && self.ctx.rng.one_in(4) => self.reclaims(s),
            10 => self.accepts(s),
            _ => self.cleans_up(s),
        }
    }

    pub fn event(&mut self, s: usize, event: Event) -> bool {
        let Some(p) = &mut self.nodes[s].process else { return false };
        p.apply(&mut self.ctx, event);
        true
    }

    /// A VM that does not run boots where its site serves.
    pub fn boots(&mut self, s: usize) -> bool {
        let serves = matches!(self.role(s), Some(Role::Serving));
        let elsewhere = self.qemus[1 - s].as_ref().is_some_and(|q| !q.condemned)
            && matches!(self.role(1 - s), Some(Role::Serving | Role::HandoverOpen { .. }) | None);
        let moving = self.moving.is_some_and(|m| m.phase != Phase::Failed);
        if !serves || self.qemus[s].is_some() || moving || elsewhere && !self.ctx.net.partitioned {
            return false;
        }
        self.ctx.cov.hit("a VM boots");
        self.boot(s);
        true
    }

    fn opens(&mut self, s: usize) -> bool {
        let running = self.qemus[s].as_ref().is_some_and(|q| q.running && q.connected && !q.condemned);
        let tracked = self.nodes[s].process.as_ref().is_some_and(|p| !p.counts_as_untracked());
        let ready =
            tracked && matches!(self.role(s), Some(Role::Serving)) && matches!(self.role(1 - s), Some(Role::Replica));
        if self.moving.is_some() || !running || !ready || self.qemus[1 - s].is_some() {
            return false;
        }
        let Some(handover) = self.handover_of(s) else { return false };
        self.note(|| format!("a handover of site {s} is opened"));
        self.remember(s, Wish::Open(handover));
        self.moving =
            Some(Move { from: s, phase: Phase::Opened, handover, idle: self.step >= self.ctx.setup.trouble.idle_from });
        self.ctx.cov.hit("move: opened");
        self.event(s, Event::OpenHandover { handover })
    }

    fn phase(&mut self, phase: Phase) -> bool {
        self.ctx.cov.hit(format!("move: {phase:?}"));
        self.note(|| format!("move: {phase:?}"));
        if let Some(m) = &mut self.moving {
            m.phase = phase;
        }
        true
    }

    /// The migration takes its next step, if it can.
    pub fn moves_on(&mut self) -> bool {
        let Some(m) = self.moving else { return false };
        let (from, to) = (m.from, 1 - m.from);
        let open = matches!(self.role(from), Some(Role::HandoverOpen { handover }) if handover == m.handover);
        match m.phase {
            Phase::Opened => {
                if !open {
                    return self.migration_fails();
                }
                self.next_request += 1;
                self.qemus[to] = Some(Qemu {
                    id: self.next_request,
                    running: false,
                    incoming: true,
                    draining: false,
                    connected: false,
                    condemned: false,
                    outstanding: Default::default(),
                });
                self.phase(Phase::TargetUp)
            }
            Phase::TargetUp => {
                let attached = self.qemus[to].as_ref().is_some_and(|q| q.connected && !q.condemned);
                if self.qemus[from].is_none() || self.qemus[to].is_none() {
                    return self.migration_fails();
                }
                if attached && let Some(q) = &mut self.qemus[from] {
                    q.draining = true;
                    return self.phase(Phase::Stopping);
                }
                false
            }
            Phase::Stopping => {
                let Some(q) = &mut self.qemus[from] else { return self.migration_fails() };
                if !q.outstanding.is_empty() || !q.connected {
                    return false;
                }
                if q.running {
                    q.running = false;
                    (0..self.ctx.setup.sizes.len()).for_each(|disk| self.submit(from, disk, 0, Ask::Flush));
                    return true;
                }
                self.phase(Phase::Stopped)
            }
            Phase::Stopped => {
                let Some(q) = self.qemus[to].as_mut().filter(|q| q.connected && !q.condemned) else { return false };
                q.running = true;
                self.phase(Phase::Resumed)
            }
            Phase::Resumed => {
                if self.qemus[from].is_some() && self.ctx.rng.one_in(2) {
                    self.ctx.cov.hit("move: the source's QEMU leaves");
                    self.qemu_gone(from, true);
                    return true;
                }
                if matches!(self.role(to), Some(Role::Serving)) {
                    if let Some(q) = &mut self.qemus[to] {
                        q.incoming = false;
                    }
                    if self.qemus[from].is_some() {
                        self.qemu_gone(from, true);
                    }
                    self.ctx.cov.hit("move: done");
                    if m.idle {
                        self.ctx.cov.hit("a guest that never writes again has moved");
                    }
                    self.moving = None;
                    return true;
                }
                false
            }
            Phase::Failed => {
                let settled = !matches!(self.role(from), Some(Role::HandoverOpen { .. } | Role::Sealed { .. }) | None);
                if settled {
                    self.moving = None;
                    return true;
                }
                self.remember(to, Wish::Void);
                self.event(to, Event::WantVoid { activation: ActivationId([0; 16]) })
            }
        }
    }

    /// The migration fails before the guest executes at the target: that QEMU goes, the source's goes on.
    pub fn migration_fails(&mut self) -> bool {
        let Some(m) = self.moving.filter(|m| !matches!(m.phase, Phase::Resumed | Phase::Failed)) else { return false };
        if self.qemus[1 - m.from].is_some() {
            self.qemu_gone(1 - m.from, false);
        }
        if let Some(q) = &mut self.qemus[m.from] {
            (q.running, q.draining) = (true, false);
        }
        self.phase(Phase::Failed)
    }

    /// The target's operator sees the guest executing there: it asks for the right to write.
    pub fn asks(&mut self) -> bool {
        self.asks_again()
    }

    /// In peace: a handover that nobody pursues is voided, one whose guest is lost after the seal is finished.
    pub fn voids_leftovers(&mut self) {
        for s in 0..2 {
            if matches!(self.role(s), Some(Role::HandoverOpen { .. } | Role::Sealed { .. })) && self.one_in(4) {
                self.event(1 - s, Event::WantVoid { activation: ActivationId([0; 16]) });
            }
        }
    }

    fn asks_again(&mut self) -> bool {
        let Some(m) = self.moving.filter(|m| m.phase == Phase::Resumed) else { return false };
        let nonce = self.ctx.id();
        matches!(self.role(1 - m.from), Some(Role::Replica)) && self.event(1 - m.from, Event::WantWrite { nonce })
    }

    /// A person decides that the active side serves on: its target is gone, or both are active under one counter.
    pub fn reclaims(&mut self, s: usize) -> bool {
        let may = matches!(self.role(s), Some(Role::Serving | Role::HandoverOpen { .. } | Role::Sealed { .. }));
        if !may {
            return false;
        }
        self.note(|| format!("site {s} is told to serve on"));
        self.ctx.cov.hit("a person reclaims");
        self.ctx.truth.reclaims += 1;
        let activation = ActivationId(self.ctx.id());
        // The migration is over: what executes elsewhere is not served by this side any more.
        if let Some(m) = self.moving.filter(|m| m.from == s) {
            self.moving = None;
            match &mut self.qemus[s] {
                Some(q) if !matches!(m.phase, Phase::Resumed) => (q.running, q.draining) = (true, false),
                _ => {}
            }
        }
        self.event(s, Event::Reclaim { activation });
        if let Some(p) = self.nodes[s].process.as_mut().filter(|p| p.link.is_some()) {
            // The peer knows us under the old epoch: meet again.
            p.drop_link(&mut self.ctx);
        }
        if let Some(record) = self.nodes[s].record() {
            self.ctx.truth.unfenced.insert(record.epoch.counter);
        }
        true
    }

    /// A person promotes a replica to one of its generations.
    pub fn promotes(&mut self, s: usize) -> bool {
        if !matches!(self.role(s), Some(Role::Replica | Role::Voided { .. })) {
            return false;
        }
        let Some(target) = self.nodes[s].process.as_ref().and_then(|p| p.target.as_ref()) else { return false };
        let kept = target.store.kept();
        // Of a folder that was an old copy only what was committed since can be meant (its status says so).
        if kept.is_empty() || kept.iter().any(|m| !self.ctx.truth.believes(s, m.generation)) {
            return false;
        }
        let linked = self.nodes[s].process.as_ref().is_some_and(|p| p.link.is_some());
        if linked && matches!(self.role(s), Some(Role::Replica)) && self.ctx.rng.one_in(2) {
            return self.takes_over(s);
        }
        let older = self.ctx.rng.one_in(2);
        let which = if older { self.ctx.rng.below(kept.len() as u64) as usize } else { 0 };
        self.ctx.cov.hit(if which > 0 {
            "promoted to an older generation"
        } else {
            "promoted to the newest generation"
        });
        if self.qemus[s].as_ref().is_some_and(|q| q.connected) {
            self.ctx.cov.hit("promoted while a QEMU is attached");
        }
        self.note(|| format!("site {s} is promoted to {}", kept[which].generation));
        self.migration_is_over(s);
        self.remember(s, Wish::Promote(kept[which].generation));
        self.event(s, Event::Promote { generation: kept[which].generation })
    }

    /// A promotion that asks the source to seal first, because it is within reach.
    fn takes_over(&mut self, s: usize) -> bool {
        self.note(|| format!("site {s} takes over"));
        self.migration_is_over(s);
        let (handover, nonce) = (self.ctx.id(), self.ctx.id());
        self.event(s, Event::TakeOver { handover, nonce })
    }

    /// A QEMU attached at `s` must never be served again; what runs elsewhere goes on running there, if it executes there.
    pub fn migration_is_over(&mut self, s: usize) {
        if let Some(q) = &mut self.qemus[s] {
            q.condemned = true;
        }
        if let Some(m) = self.moving.take()
            && let Some(q) = &mut self.qemus[m.from]
            && matches!(m.phase, Phase::Opened | Phase::TargetUp | Phase::Stopping | Phase::Stopped | Phase::Failed)
        {
            (q.running, q.draining) = (true, false);
        }
    }

    /// A person lets a fenced side's writes be overwritten. No VM runs from it then.
    pub fn accepts(&mut self, s: usize) -> bool {
        if !matches!(self.role(s), Some(Role::Fenced { .. })) {
            return false;
        }
        if self.qemus[s].is_some() {
            self.qemu_gone(s, false);
        }
        self.ctx.truth.consented[s] = true;
        self.event(s, Event::AcceptDivergence)
    }

    /// QEMUs that can never be served go.
    pub fn cleans_up(&mut self, s: usize) -> bool {
        let dead = self.qemus[s].as_ref().is_some_and(|q| q.condemned);
        let stale = self.moving.is_none()
            && self.qemus[s].as_ref().is_some_and(|q| !q.running || q.incoming)
            && self.role(s).is_some();
        if !dead && !stale {
            return false;
        }
        self.qemu_gone(s, false);
        true
    }
}
