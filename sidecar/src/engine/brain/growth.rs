//! A disk that became larger than recorded (an expanded claim): the replica grows first, then the source, between two
//! lives of the VM (design §3.2).
//!
//! 1. The source says in its Hello how large its disks could be (`capacity_bytes`).
//! 2. The target makes its images as large before it answers, and says how large they are.
//! 3. A source that serves nobody records the new sizes and ends; its next worker serves them. The disks were written by
//!    whoever made them larger, so trust is decided as at any start.
//! 4. A target that hears of a recorded size above its own records it, too, and starts again.
//!
//! A crash between any two leaves a larger image and the old size, and the next contact goes on. Nothing here makes a
//! disk smaller or changes what a connected QEMU sees: both sides export the recorded size, which a handover relies on.

use std::path::Path;

use watari_core::{geometry::DiskIndex, record::Role};

use super::*;
use crate::engine::EXIT_AGAIN;

/// Guests count sectors of 512 bytes: a file that ends inside one is used up to there.
const SECTOR_BYTES: u64 = 512;

/// How large each disk could be, bytes; what cannot be looked at stays as recorded. A size in the configuration is a
/// person's word that it shall not be larger.
pub(in crate::engine) fn capacities(config: &Config, recorded: &[u64]) -> Vec<u64> {
    let one = |(disk, recorded): (&crate::config::Disk, &u64)| {
        let actual = disk.actual_bytes().unwrap_or(0) / SECTOR_BYTES * SECTOR_BYTES;
        actual.min(disk.size_bytes.unwrap_or(u64::MAX)).max(*recorded)
    };
    config.disks.iter().zip(recorded).map(one).collect()
}

/// Make an image at least this large. A block device is as large as it is.
fn enlarge(path: &Path, bytes: u64) -> std::io::Result<()> {
    let file = std::fs::File::options().write(true).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("it is a block device: expand it"));
    }
    file.set_len(bytes)?;
    file.sync_all()
}

impl Brain {
    pub(super) fn recorded_sizes(&self) -> Vec<u64> {
        self.parts.site.record().disks.iter().map(|d| d.size_bytes).collect()
    }

    /// What the Hello says: at the source what its disks could be, at a target how large its images are.
    pub(super) fn our_capacities(&self) -> Vec<u64> {
        let recorded = self.recorded_sizes();
        if self.parts.site.record().role.is_active_side() {
            return capacities(&self.parts.config, &recorded);
        }
        let images = self.parts.config.disks.iter().zip(recorded);
        images.map(|(disk, recorded)| disk.actual_bytes().unwrap_or(recorded)).collect()
    }

    /// Target: follow the source's disks. `true`: the recorded sizes changed and the worker starts again.
    pub(super) fn follow_growth(&mut self, hello: &Hello) -> bool {
        let (record, disks) = (self.parts.site.record(), &self.parts.config.disks);
        let same = hello.disks.iter().map(|d| &d.name).eq(disks.iter().map(|d| &d.name));
        let epoch = convert::epoch(hello.epoch.clone()).counter;
        if !same || record.role != Role::Replica || epoch < record.epoch.counter {
            return false;
        }
        let recorded = self.recorded_sizes();
        let mut sizes = recorded.clone();
        for ((ours, theirs), size) in disks.iter().zip(&hello.disks).zip(&mut sizes) {
            let wanted = theirs.size_bytes.max(theirs.capacity_bytes).min(limits::DISK_BYTES_MAX);
            let found = ours.actual_bytes().unwrap_or(0);
            if found < wanted
                && let Err(error) = enlarge(&ours.path, wanted)
            {
                let (name, path) = (&ours.name, ours.path.display());
                let text = format!("disk {name}: found {found} bytes in {path}, the source's has {wanted}: {error}");
                self.conditions.set("DiskGrowth", "CannotGrow", &text, "expand the claim or device of this image");
                return false;
            }
            *size = (*size).max(theirs.size_bytes.min(limits::DISK_BYTES_MAX));
        }
        self.conditions.clear("DiskGrowth");
        if sizes == recorded || self.parts.connections.count() > 0 {
            return false;
        }
        self.record_sizes(&sizes);
        true
    }

    /// Once a second at the source: say what became possible, and take it when nobody is served and the peer is ready.
    pub(super) fn grow(&mut self) {
        if self.parts.site.record().role != Role::Serving || self.source.is_none() {
            return;
        }
        let wanted = self.our_capacities();
        if wanted == self.recorded_sizes() {
            return self.conditions.clear("DiskGrowth");
        }
        if self.said_capacities != wanted {
            // Said anew by a new Hello. The present one may hold them already and still not have been sent.
            self.said_capacities.clone_from(&wanted);
            self.refresh_hello();
            return self.hang_up();
        }
        if self.link.is_none() || self.peer_capacities.len() != wanted.len() {
            return self.growth_waits(
                "PeerAway",
                "the replica must grow first and is out of reach",
                "bring the link back",
            );
        }
        if let Some(i) = (0..wanted.len()).find(|i| self.peer_capacities[*i] < wanted[*i]) {
            let (name, peer) = (&self.parts.config.disks[i].name, self.peer_capacities[i]);
            let text =
                format!("disk {name}: found {} bytes here, {peer} bytes at the peer, which cannot grow", wanted[i]);
            return self.growth_waits("PeerTooSmall", &text, "expand the claim or device of the replica");
        }
        if self.parts.connections.count() > 0 {
            return self.growth_waits(
                "AtNextStart",
                "a disk is larger than the running VM sees",
                "stop and start the VM",
            );
        }
        self.record_sizes(&wanted);
    }

    fn growth_waits(&mut self, reason: &str, text: &str, next_step: &str) {
        let text = format!("{text}; the VM keeps the size that it has");
        self.conditions.set("DiskGrowth", reason, &text, next_step);
    }

    fn record_sizes(&mut self, sizes: &[u64]) {
        let action = self.parts.site.amend(|record| {
            for (disk, size) in record.disks.iter_mut().zip(sizes) {
                disk.size_bytes = *size;
            }
        });
        self.perform(vec![action]);
        tracing::info!(?sizes, "disks have grown: the worker starts again with them");
        self.exit = Some(EXIT_AGAIN);
    }

    /// A replica's own books follow the record, after the restart that took the new sizes up.
    pub(super) fn grow_replica(&self, store: &mut watari_store::replica::FileReplica) -> Result<(), ReplicaError> {
        for (i, size) in self.recorded_sizes().into_iter().enumerate() {
            let disk = DiskIndex(i as u16);
            if store.disk_bytes(disk).is_some_and(|known| known < size) {
                store.grow_disk(disk, size)?;
            }
        }
        Ok(())
    }
}
