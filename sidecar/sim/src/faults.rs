//! What goes wrong: connections that break, a network that is split, workers that are killed, machines that lose power
//! now or during one of their next writes and syncs; and how each is put right.

use watari_core::storage::sim::SimRng;

use crate::world::World;

impl World {
    /// Whether a fault that was drawn happens.
    pub fn strikes(&mut self) -> bool {
        let rarity = self.ctx.setup.rarity;
        self.faults && self.one_in(rarity)
    }

    pub fn fault(&mut self, what: &str) -> bool {
        self.faults_seen += 1;
        self.ctx.cov.hit(format!("fault: {what}"));
        self.note(|| format!("fault: {what}"));
        true
    }

    pub fn cuts_wire(&mut self) -> bool {
        let wires: Vec<u64> = self.ctx.net.wires.iter().filter(|(_, w)| !w.broken).map(|(id, _)| *id).collect();
        if wires.is_empty() || !self.strikes() {
            return false;
        }
        let wire = wires[self.ctx.rng.below(wires.len() as u64) as usize];
        let mut rng = SimRng(self.ctx.rng.next_u64());
        self.ctx.net.cut(wire, &mut rng);
        self.fault("a connection breaks")
    }

    pub fn kills(&mut self) -> bool {
        let Some(s) = self.worker() else { return false };
        if !self.strikes() {
            return false;
        }
        let role = self.nodes[s].process.as_ref().map_or("none", |p| p.role().name());
        self.ctx.cov.hit(format!("killed as {role}"));
        self.process_gone(s);
        self.fault("kill -9")
    }

    /// The worker of a site ended: its QEMU is without a connection.
    pub fn process_gone(&mut self, s: usize) {
        self.note(|| format!("the worker of site {s} ends"));
        self.nodes[s].kill(&mut self.ctx);
        if let Some(q) = &mut self.qemus[s] {
            q.connected = false;
        }
    }

    pub fn power_failed(&mut self, s: usize) {
        let role = self.nodes[s].process.as_ref().map_or("none", |p| p.role().name());
        self.ctx.cov.hit(format!("power lost as {role}"));
        self.note(|| format!("site {s} loses power"));
        self.qemus[s] = None;
        if s == 1 && self.ctx.setup.trouble.liar.is_some() {
            self.ctx.truth.distrusted[s] = true;
        }
        self.nodes[s].lose_power(&mut self.ctx);
        self.fault("power lost");
    }

    pub fn loses_power(&mut self) -> bool {
        if !self.ctx.setup.power || self.one_in(2) || !self.strikes() {
            return false;
        }
        let s = self.some_site();
        self.power_failed(s);
        true
    }

    /// The power fails during one of the next writes or syncs.
    pub fn loses_power_soon(&mut self) -> bool {
        if !self.ctx.setup.power || !self.strikes() {
            return false;
        }
        let s = self.some_site();
        let medium = &self.nodes[s].medium;
        medium.power_off_at(Some(medium.operations() + 1 + self.ctx.rng.below(12)));
        self.note(|| format!("site {s} will lose power at one of its next operations"));
        true
    }

    pub fn partitions(&mut self) -> bool {
        if self.ctx.net.partitioned || !self.strikes() {
            return false;
        }
        self.ctx.net.partitioned = true;
        self.fault("partition")
    }

    pub fn heals(&mut self) -> bool {
        if !self.ctx.net.partitioned || self.faults && !self.one_in(3) {
            return false;
        }
        self.ctx.net.partitioned = false;
        if self.one_in(2) {
            let wires: Vec<u64> = self.ctx.net.wires.keys().copied().collect();
            let mut rng = SimRng(self.ctx.rng.next_u64());
            wires.into_iter().for_each(|w| self.ctx.net.cut(w, &mut rng));
        }
        self.note(|| "the network is whole again".into());
        true
    }

    pub fn restarts(&mut self) -> bool {
        let s = self.some_site();
        self.restart(s)
    }

    pub fn restart(&mut self, s: usize) -> bool {
        if self.nodes[s].process.is_some() {
            return false;
        }
        self.note(|| format!("the worker of site {s} starts"));
        self.nodes[s].start(&mut self.ctx);
        true
    }
}
