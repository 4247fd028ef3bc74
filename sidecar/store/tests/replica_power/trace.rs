//! What the replica engine asks of its real files, recorded beside doing it; and what of that may lie on the medium when
//! the power fails after any prefix of it.
//!
//! The model of the medium is not the simulator's (`watari_core::storage::sim`): it is made from the record alone.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use watari_core::{
    geometry::DiskIndex,
    replica::Images,
    storage::{
        Storage, StorageError,
        sim::{SECTOR_BYTES, SimRng},
    },
};

/// The name that the only disk's image goes by; the folder's files have their own.
pub const IMAGE: &str = "disk.img";

/// One change of a file that a sync would make durable.
#[derive(Clone, Debug)]
pub enum Change {
    Write { offset: u64, data: Vec<u8> },
    Zero { offset: u64, length: u64 },
    Length(u64),
}

/// What was asked of the files, in order, and what the test knows in between.
#[derive(Clone, Debug)]
pub enum Event<N> {
    Change(String, Change),
    Synced(String),
    Removed(String),
    FolderSynced,
    /// The call that failed, by request.
    Failed,
    Note(N),
}

struct Record<N> {
    events: Vec<Event<N>>,
    calls: usize,
    /// The changing call with this number fails with an I/O error, from 0.
    fails_at: Option<usize>,
}

/// The record that all recorders of one life share.
pub struct Trace<N>(Arc<Mutex<Record<N>>>);

impl<N> Clone for Trace<N> {
    fn clone(&self) -> Self {
        Trace(self.0.clone())
    }
}

impl<N: Clone> Trace<N> {
    pub fn new(fails_at: Option<usize>) -> Self {
        Trace(Arc::new(Mutex::new(Record { events: Vec::new(), calls: 0, fails_at })))
    }

    fn lock(&self) -> MutexGuard<'_, Record<N>> {
        self.0.lock().expect("no test panics with it")
    }

    pub fn note(&self, note: N) {
        self.lock().events.push(Event::Note(note));
    }

    pub fn events(&self) -> Vec<Event<N>> {
        self.lock().events.clone()
    }

    /// `event` is asked for. What fails may have reached the medium in part, unless it is a sync or a removal.
    fn ask(&self, event: Event<N>) -> Result<(), StorageError> {
        let mut record = self.lock();
        let fails = record.fails_at == Some(record.calls);
        record.calls += 1;
        if !fails || matches!(event, Event::Change(..)) {
            record.events.push(event);
        }
        if fails {
            record.events.push(Event::Failed);
            return Err(StorageError::Io("by request".into(), "EIO".into()));
        }
        Ok(())
    }
}

/// A real folder or real images, and the record of what was asked of them.
#[derive(Clone)]
pub struct Recorder<T, N> {
    pub real: T,
    pub trace: Trace<N>,
}

fn change<N>(name: &str, change: Change) -> Event<N> {
    Event::Change(name.into(), change)
}

impl<T: Storage, N: Clone> Storage for Recorder<T, N> {
    fn list(&self) -> Result<Vec<String>, StorageError> {
        self.real.list()
    }
    fn len(&self, name: &str) -> Result<u64, StorageError> {
        self.real.len(name)
    }
    fn read(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<usize, StorageError> {
        self.real.read(name, offset, buf)
    }
    fn write(&mut self, name: &str, offset: u64, data: &[u8]) -> Result<(), StorageError> {
        self.trace.ask(change(name, Change::Write { offset, data: data.to_vec() }))?;
        self.real.write(name, offset, data)
    }
    fn zero(&mut self, name: &str, offset: u64, length: u64) -> Result<(), StorageError> {
        self.trace.ask(change(name, Change::Zero { offset, length }))?;
        self.real.zero(name, offset, length)
    }
    fn sync(&mut self, name: &str) -> Result<(), StorageError> {
        self.trace.ask(Event::Synced(name.into()))?;
        self.real.sync(name)
    }
    fn truncate(&mut self, name: &str, length: u64) -> Result<(), StorageError> {
        self.trace.ask(change(name, Change::Length(length)))?;
        self.real.truncate(name, length)
    }
    fn remove(&mut self, name: &str) -> Result<(), StorageError> {
        self.trace.ask(Event::Removed(name.into()))?;
        self.real.remove(name)
    }
    fn sync_folder(&mut self) -> Result<(), StorageError> {
        self.trace.ask(Event::FolderSynced)?;
        self.real.sync_folder()
    }
}

impl<T: Images, N: Clone> Images for Recorder<T, N> {
    fn size_bytes(&self, disk: DiskIndex) -> Result<u64, StorageError> {
        self.real.size_bytes(disk)
    }
    fn read(&self, disk: DiskIndex, offset: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        self.real.read(disk, offset, buf)
    }
    fn write(&mut self, disk: DiskIndex, offset: u64, data: &[u8]) -> Result<(), StorageError> {
        self.trace.ask(change(IMAGE, Change::Write { offset, data: data.to_vec() }))?;
        self.real.write(disk, offset, data)
    }
    fn zero(&mut self, disk: DiskIndex, offset: u64, length: u64) -> Result<(), StorageError> {
        self.trace.ask(change(IMAGE, Change::Zero { offset, length }))?;
        self.real.zero(disk, offset, length)
    }
    fn sync(&mut self, disk: DiskIndex) -> Result<(), StorageError> {
        self.trace.ask(Event::Synced(IMAGE.into()))?;
        self.real.sync(disk)
    }
    fn grow(&mut self, disk: DiskIndex, bytes: u64) -> Result<(), StorageError> {
        self.trace.ask(change(IMAGE, Change::Length(bytes)))?;
        self.real.grow(disk, bytes)
    }
}

/// What survives of all that was not synced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Survives {
    Nothing,
    Everything,
    /// Whole changes and names, each or not.
    Changes,
    /// Every sector of every write for itself: torn.
    Sectors,
}

pub const SURVIVALS: [Survives; 4] = [Survives::Sectors, Survives::Nothing, Survives::Changes, Survives::Everything];

#[derive(Clone, Default)]
struct File {
    durable: Vec<u8>,
    unsynced: Vec<Change>,
}

/// The medium after a prefix of a record. Files are counted, since a name may go to another one.
#[derive(Clone, Default)]
pub struct Medium {
    files: Vec<File>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
}

impl Medium {
    /// A medium that holds only the image, durably.
    pub fn with_image(content: Vec<u8>) -> Medium {
        let names = BTreeMap::from([(IMAGE.to_owned(), 0)]);
        let image = File { durable: content, unsynced: Vec::new() };
        Medium { files: vec![image], durable_names: names.clone(), names }
    }

    pub fn feed<N>(&mut self, event: &Event<N>) {
        match event {
            Event::Change(name, change) => {
                let file = *self.names.entry(name.clone()).or_insert_with(|| {
                    self.files.push(File::default());
                    self.files.len() - 1
                });
                self.files[file].unsynced.push(change.clone());
            }
            Event::Synced(name) => {
                let file = &mut self.files[self.names[name]];
                for change in std::mem::take(&mut file.unsynced) {
                    put(&mut file.durable, &change, &mut |_| true);
                }
            }
            Event::Removed(name) => drop(self.names.remove(name)),
            Event::FolderSynced => self.durable_names = self.names.clone(),
            Event::Failed | Event::Note(_) => {}
        }
    }

    /// What a start may find: content by name.
    pub fn after_power_loss(&self, survives: Survives, random: &mut SimRng) -> BTreeMap<String, Vec<u8>> {
        let mut found = BTreeMap::new();
        let mut all: Vec<&String> = self.names.keys().chain(self.durable_names.keys()).collect();
        all.sort();
        all.dedup();
        for name in all {
            let (new, old) = (self.names.get(name), self.durable_names.get(name));
            let taken = match survives {
                Survives::Nothing => old,
                Survives::Everything => new,
                Survives::Changes | Survives::Sectors => {
                    if random.one_in(2) {
                        old
                    } else {
                        new
                    }
                }
            };
            if let Some(file) = taken {
                found.insert(name.clone(), self.files[*file].after_power_loss(survives, random));
            }
        }
        found
    }
}

impl File {
    fn after_power_loss(&self, survives: Survives, random: &mut SimRng) -> Vec<u8> {
        let mut content = self.durable.clone();
        for change in &self.unsynced {
            match survives {
                Survives::Nothing => {}
                Survives::Everything => put(&mut content, change, &mut |_| true),
                Survives::Changes => {
                    let kept = random.one_in(2);
                    put(&mut content, change, &mut |_| kept);
                }
                Survives::Sectors => put(&mut content, change, &mut |_| random.one_in(2)),
            }
        }
        content
    }
}

/// Make a change, as far as `keep` says of each sector (a new length is one sector).
fn put(content: &mut Vec<u8>, change: &Change, keep: &mut dyn FnMut(usize) -> bool) {
    let (offset, data) = match change {
        Change::Write { offset, data } => (*offset as usize, data.clone()),
        Change::Zero { offset, length } => (*offset as usize, vec![0; *length as usize]),
        Change::Length(length) => {
            if keep(0) {
                content.resize(*length as usize, 0);
            }
            return;
        }
    };
    let mut at = 0;
    while at < data.len() {
        let end = ((offset + at) / SECTOR_BYTES + 1) * SECTOR_BYTES - offset;
        let end = end.min(data.len());
        if keep(at) {
            if content.len() < offset + end {
                content.resize(offset + end, 0);
            }
            content[offset + at..offset + end].copy_from_slice(&data[at..end]);
        }
        at = end;
    }
}

/// Put what was found into real files below `root`, which must be empty.
pub fn lay_out(root: &Path, found: &BTreeMap<String, Vec<u8>>) {
    std::fs::create_dir(root.join("meta")).expect("folder");
    for (name, content) in found {
        let place = if name == IMAGE { root.join(IMAGE) } else { root.join("meta").join(name) };
        std::fs::write(place, content).expect("file");
    }
}
