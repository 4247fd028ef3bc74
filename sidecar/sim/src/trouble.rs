//! Trouble beside crashes and cuts: clocks that jump, Pods that go with their memory, metadata folders that are lost or
//! restored from an old copy, other people's hands on the disks, a region log that cannot be written.
//!
//! Each kind is drawn for some histories only ([`crate::ctx::Trouble`]). What is asked of the system afterwards is in the
//! truth: which site's disks cannot be believed, which generations an old folder only pretends to hold.

use watari_core::{record::Role, replica::images::image_name, storage::Storage};

use crate::{
    content::{SECTOR_BYTES, bytes_of, word},
    ctx::Liar,
    node::Backup,
    target::FOLDER,
    truth::Effect,
    world::World,
};

/// Most that a clock jumps at once, milliseconds: an hour.
const JUMP_MILLIS_MAX: u64 = 3_600_000;

impl World {
    /// One step of the continuous verification.
    pub fn verifies(&mut self) -> bool {
        let Some(s) = self.worker() else { return false };
        self.nodes[s].process.as_mut().is_some_and(|p| p.verify_step(&mut self.ctx))
    }

    /// Longer than anybody waits for anything.
    pub fn much_time_passes(&mut self) -> bool {
        self.ctx.now += 5_000 + self.ctx.rng.below(20_000);
        true
    }

    pub fn clock_jumps(&mut self) -> bool {
        if !self.ctx.setup.trouble.clocks || !self.strikes() {
            return false;
        }
        let (s, by) = (self.some_site(), self.ctx.rng.below(JUMP_MILLIS_MAX));
        let ahead = &mut self.ctx.ahead[s];
        let back = self.ctx.rng.one_in(2);
        *ahead = if back { ahead.saturating_sub(by) } else { *ahead + by };
        self.note(|| format!("the clock of site {s} jumps by {by} ms, back: {back}"));
        self.fault(if back { "a clock is set back" } else { "a clock is set forward" })
    }

    /// The virt-launcher Pod of a side goes with its QEMU, its worker and the memory that the marks were in: KubeVirt
    /// removes a source's about 20 s after it called the migration done, whatever we are at.
    pub fn pod_goes(&mut self) -> bool {
        let s = self.some_site();
        if self.nodes[s].process.is_none() || self.nodes[s].medium.is_off() || !self.one_in(3) || !self.strikes() {
            return false;
        }
        let name = self.role(s).map_or("none", |r| r.name());
        self.ctx.cov.hit(format!("a Pod goes as {name}"));
        let moved = self.moving.is_some_and(|m| m.from == s && m.phase == crate::operator::Phase::Resumed);
        if moved && matches!(self.role(s), Some(Role::HandoverOpen { .. } | Role::Sealed { .. })) {
            self.ctx.cov.hit("the source's Pod goes before Released");
        }
        self.process_gone(s);
        self.nodes[s].lose_maps();
        self.qemus[s] = None;
        self.fault("a Pod goes")
    }

    /// A site whose durable record says that it is a replica, and nothing is under way that a restored or lost folder
    /// would have promised.
    fn idle_replica(&mut self) -> Option<usize> {
        let s = self.some_site();
        let replica = self.nodes[s].record().is_some_and(|r| r.role == Role::Replica);
        (replica && self.ctx.setup.trouble.metadata && !self.nodes[s].medium.is_off()).then_some(s)
    }

    pub fn folder_is_copied(&mut self) -> bool {
        let Some(s) = self.idle_replica() else { return false };
        let epoch = self.nodes[s].record().map(|r| r.epoch).unwrap_or_default();
        let medium = &self.nodes[s].medium;
        let folders = [medium.copy_folder("meta"), medium.copy_folder(FOLDER)];
        self.nodes[s].backup = Some(Backup { folders, epoch });
        true
    }

    /// The worker ends and its folder is put back as it was some time ago; its disks are not.
    pub fn folder_is_restored(&mut self) -> bool {
        let Some(s) = self.idle_replica() else { return false };
        // A folder of another epoch says nothing of the rights of today; whoever restores it is told to make a new one.
        let epoch = self.nodes[s].record().map(|r| r.epoch);
        let Some(backup) = self.nodes[s].backup.take_if(|b| Some(b.epoch) == epoch) else { return false };
        if !self.strikes() {
            return false;
        }
        self.process_gone(s);
        self.nodes[s].medium.restore_folder("meta", &backup.folders[0]);
        self.nodes[s].medium.restore_folder(FOLDER, &backup.folders[1]);
        self.nodes[s].kill(&mut self.ctx);
        self.ctx.truth.promised[s] = None;
        // Whatever it names up to now, the disks went on without it.
        self.ctx.truth.outdated[s].extend(self.ctx.truth.generations.keys());
        self.fault("a folder is restored from an old copy")
    }

    pub fn folder_is_lost(&mut self) -> bool {
        let Some(s) = self.idle_replica() else { return false };
        if !self.strikes() {
            return false;
        }
        self.process_gone(s);
        self.nodes[s].medium.restore_folder("meta", &Default::default());
        self.nodes[s].medium.restore_folder(FOLDER, &Default::default());
        self.nodes[s].lost = true;
        self.nodes[s].kill(&mut self.ctx);
        self.ctx.truth.promised[s] = None;
        self.fault("a folder is lost")
    }

    /// Somebody who is not us writes a sector: to a serving site's disks while its worker is down, or (as its history
    /// says) to a replica's at any time.
    pub fn foreign_hand_writes(&mut self) -> bool {
        let trouble = self.ctx.setup.trouble;
        let s = if trouble.liar == Some(Liar::ForeignHand) { 1 } else { self.some_site() };
        let replica = trouble.liar == Some(Liar::ForeignHand);
        let serving = self.nodes[s].record().is_some_and(|r| r.role == Role::Serving);
        let down = trouble.foreign && self.nodes[s].process.is_none() && serving;
        if !replica && !down || self.nodes[s].medium.is_off() || !self.strikes() {
            return false;
        }
        let disk = self.ctx.rng.below(self.ctx.setup.sizes.len() as u64) as usize;
        let sector = self.ctx.rng.below(self.ctx.setup.sizes[disk] / SECTOR_BYTES);
        let words = vec![word(self.ctx.truth.write_id(), disk, sector)];
        let name = image_name(watari_core::geometry::DiskIndex(disk as u16));
        self.ctx.truth.distrusted[s] |= replica;
        self.nodes[s].tampered = !replica;
        let images = &mut self.nodes[s].images;
        let wrote = images.write(&name, sector * SECTOR_BYTES, &bytes_of(&words)).and_then(|()| images.sync(&name));
        if let Some(live) = &mut self.ctx.truth.live[s] {
            live.wrote(&Effect { disk, sector, words });
            if wrote.is_ok() {
                live.synced(disk);
            }
        }
        self.fault(if replica { "a foreign hand in the replica" } else { "a foreign writer while stopped" })
    }

    pub fn log_breaks(&mut self) -> bool {
        let s = self.some_site();
        if !self.ctx.setup.trouble.untracked || self.nodes[s].log_broken || !self.strikes() {
            return false;
        }
        self.log_is(s, true);
        self.fault("the region log cannot be written")
    }

    fn log_is(&mut self, s: usize, broken: bool) {
        self.nodes[s].log_broken = broken;
        if let Some(p) = &mut self.nodes[s].process {
            p.log_broken = broken;
        }
    }

    pub fn log_works(&mut self) -> bool {
        let s = self.some_site();
        self.log_works_at(s)
    }

    /// The log can be written (again): a complete new one ends `Untracked`, and everything is compared.
    pub fn log_works_at(&mut self, s: usize) -> bool {
        self.log_is(s, false);
        let Some(p) = self.nodes[s].process.as_mut().filter(|p| p.source.is_some()) else { return false };
        if !p.untracked.get() || p.pass_through {
            return false;
        }
        p.leave_untracked(&mut self.ctx);
        self.ctx.cov.hit("the pair is Tracked again");
        true
    }
}
