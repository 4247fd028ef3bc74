//! Kept generations of a replica, read-only over NBD, while synchronisation goes on (design §3.4: drills, looking back).
//!
//! An export is `disk@epoch.number`, `disk@number`, or `disk@latest`. Each connection pins its generation (I7), so retention waits for
//! it; a change of sides ends them all with EIO. Reads run on the connection's thread and touch local files only.

use std::sync::{Arc, Mutex, PoisonError};

use watari_core::{
    front::{Allocation, Detach, DiskInfo, Errno, GuestDisk, Op, Request},
    geometry::{DiskIndex, Generation},
    replica::ViewCache,
};
use watari_nbd::Exports;
use watari_store::replica::{SharedReplica, Snapshot};

use super::gate::finish;

/// The replica that is here now, if any.
pub struct Generations {
    disks: Vec<String>,
    replica: Mutex<Option<SharedReplica>>,
}

impl Generations {
    /// `disks`: the export names of the pair's disks, in order.
    pub fn new(disks: Vec<String>) -> Self {
        Generations { disks, replica: Mutex::new(None) }
    }

    pub fn set(&self, replica: Option<SharedReplica>) {
        *self.replica.lock().unwrap_or_else(PoisonError::into_inner) = replica;
    }

    fn replica(&self) -> Option<SharedReplica> {
        self.replica.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Newest first.
    fn kept(&self) -> Vec<Generation> {
        self.replica().map(|r| r.lock().kept().iter().map(|m| m.generation).collect()).unwrap_or_default()
    }
}

impl Exports for Generations {
    fn names(&self) -> Vec<String> {
        let kept = self.kept();
        self.disks.iter().flat_map(|d| kept.iter().map(move |g| format!("{d}@{g}"))).collect()
    }

    fn open(&self, name: &str) -> Option<Arc<dyn GuestDisk>> {
        let (disk, wanted) = name.rsplit_once('@')?;
        let index = self.disks.iter().position(|d| d == disk)?;
        let mut kept = self.kept().into_iter();
        let generation = match wanted {
            "latest" => kept.next(),
            wanted => kept.find(|g| g.to_string() == wanted || g.number.0.to_string() == wanted),
        }?;
        let snapshot = self.replica()?.snapshot(Some(generation)).ok()?;
        let disk = DiskIndex(index as u16);
        let size_bytes = snapshot.disk_bytes(disk)?;
        let info = DiskInfo { name: format!("{}@{generation}", self.disks[index]), size_bytes, read_only: true };
        Some(Arc::new(Kept { info, disk, snapshot, cache: Mutex::default() }))
    }
}

/// One disk of one kept generation, for one connection.
struct Kept {
    info: DiskInfo,
    disk: DiskIndex,
    snapshot: Snapshot,
    cache: Mutex<ViewCache>,
}

impl GuestDisk for Kept {
    fn info(&self) -> DiskInfo {
        self.info.clone()
    }

    fn attach(&self, _: u64) -> Result<(), String> {
        Ok(())
    }

    fn detach(&self, _: u64, _: Detach) {}

    fn submit(&self, mut request: Request) {
        let result = match request.op {
            Op::Read => {
                let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
                let read = self.snapshot.read(&mut cache, self.disk, request.offset, &mut request.data);
                read.map_err(|error| {
                    tracing::warn!(export = self.info.name, %error, "a kept generation cannot be read");
                    Errno::Io
                })
            }
            Op::Flush | Op::Cache => Ok(()),
            Op::Write | Op::Discard | Op::WriteZeroes { .. } => Err(Errno::Perm),
        };
        finish(request, result);
    }

    fn allocation(&self, _: u64, length: u64) -> Result<Vec<Allocation>, Errno> {
        Ok(vec![Allocation { length, hole: false, zero: false }])
    }
}
