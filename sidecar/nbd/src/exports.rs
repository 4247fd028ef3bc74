//! What a server serves: names and the disks behind them.

use std::sync::{Arc, PoisonError, RwLock};

use watari_core::front::GuestDisk;

/// The exports of a server. Asked at every handshake, so that exports may come and go while the server runs.
pub trait Exports: Send + Sync {
    /// Names for NBD's LIST.
    fn names(&self) -> Vec<String>;
    /// The disk exported as `name`; the empty name asks for the default export. May be called often and must be
    /// cheap or at least local: a handshake waits for it.
    fn open(&self, name: &str) -> Option<Arc<dyn GuestDisk>>;
}

/// A table of exports. With exactly one entry that one is also the default export.
#[derive(Default)]
pub struct ExportTable {
    disks: RwLock<Vec<(String, Arc<dyn GuestDisk>)>>,
}

impl ExportTable {
    pub fn new() -> Self {
        Self::default()
    }

    /// A table with one disk under its own name.
    pub fn of(disk: Arc<dyn GuestDisk>) -> Self {
        let table = Self::new();
        table.insert(disk);
        table
    }

    /// Export `disk` under the name that it gives itself, replacing an export of the same name. Connected clients keep
    /// the disk they have.
    pub fn insert(&self, disk: Arc<dyn GuestDisk>) {
        let name = disk.info().name;
        let mut disks = self.disks.write().unwrap_or_else(PoisonError::into_inner);
        disks.retain(|(other, _)| *other != name);
        disks.push((name, disk));
    }

    /// Stop exporting `name` to new clients.
    pub fn remove(&self, name: &str) {
        self.disks.write().unwrap_or_else(PoisonError::into_inner).retain(|(other, _)| other != name);
    }
}

impl Exports for ExportTable {
    fn names(&self) -> Vec<String> {
        let disks = self.disks.read().unwrap_or_else(PoisonError::into_inner);
        disks.iter().map(|(name, _)| name.clone()).collect()
    }

    fn open(&self, name: &str) -> Option<Arc<dyn GuestDisk>> {
        let disks = self.disks.read().unwrap_or_else(PoisonError::into_inner);
        match disks.as_slice() {
            [(_, only)] if name.is_empty() => Some(only.clone()),
            disks => disks.iter().find(|(other, _)| other == name).map(|(_, disk)| disk.clone()),
        }
    }
}
