//! A simulated medium: folders of files on one machine whose power can fail at every write and sync.
//!
//! What is written is visible at once and durable only after `sync`; names are durable only after `sync_folder`. When the power
//! fails ([`SimMedium::lose_power`]), what was not synced survives in any mixture: each 512-byte sector of each file
//! independently holds its synced content or that of any later write to it, a file has any of the lengths it had, and
//! created or removed names are any prefix-free mixture of old and new. Everything comes from one seed.
//!
//! It also knows folders that are full, operations that fail with an I/O error, and a killed process (nothing is lost, but what was not
//! synced still is not durable). A disk that lies about syncs is [`SimMedium::lie`], one that decays [`SimMedium::rot`].

use crate::storage::{Storage, StorageError};
use alloc::{
    collections::BTreeMap,
    format,
    rc::Rc,
    string::{String, ToString},
    vec,
    vec::Vec,
};
use core::cell::RefCell;

/// Bytes that a medium writes in one piece.
pub const SECTOR_BYTES: usize = 512;

/// A small deterministic generator (SplitMix64), for tests and simulators.
#[derive(Clone, Debug)]
pub struct SimRng(pub u64);

impl SimRng {
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// A number below `bound`, which is at least 1.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }
    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What survives a loss of power.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Survival {
    /// Nothing that was not synced.
    Nothing,
    /// All of it.
    Everything,
    /// Whole writes and names, each with a chance of one half.
    Writes,
    /// Each sector, length and name for itself.
    Sectors,
}

/// One change of a file that is not synced.
#[derive(Clone, Debug)]
enum Change {
    Write { offset: usize, data: Vec<u8> },
    Length(usize),
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Change::Write { offset, data } => {
                let end = offset + data.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*offset..end].copy_from_slice(data);
            }
            Change::Length(length) => content.resize(*length, 0),
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Inode {
    synced: Vec<u8>,
    current: Vec<u8>,
    changes: Vec<Change>,
}

impl Inode {
    fn change(&mut self, change: Change) {
        change.apply(&mut self.current);
        self.changes.push(change);
    }

    fn sync(&mut self) {
        // Replayed, not copied: most syncs follow a few small changes of a large file.
        for change in self.changes.drain(..) {
            change.apply(&mut self.synced);
        }
    }

    fn lose_power(&mut self, survival: Survival, rng: &mut SimRng) {
        let mut content = self.synced.clone();
        match survival {
            Survival::Nothing => {}
            Survival::Everything => content.clone_from(&self.current),
            Survival::Writes => {
                self.changes.iter().filter(|_| rng.one_in(2)).for_each(|change| change.apply(&mut content));
            }
            Survival::Sectors => content = self.mixed(rng),
        }
        self.synced.clone_from(&content);
        self.current = content;
        self.changes.clear();
    }

    /// Each sector takes one of the versions it had; the length is one of those the file had.
    fn mixed(&self, rng: &mut SimRng) -> Vec<u8> {
        let mut lengths = Vec::from([self.synced.len()]);
        for change in &self.changes {
            let last = lengths[lengths.len() - 1];
            lengths.push(match change {
                Change::Write { offset, data } => last.max(offset + data.len()),
                Change::Length(length) => *length,
            });
        }
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut content = self.synced.clone();
        content.resize(longest, 0);
        // How many of the changes each sector has seen.
        let seen: Vec<usize> =
            (0..longest.div_ceil(SECTOR_BYTES)).map(|_| rng.below(self.changes.len() as u64 + 1) as usize).collect();
        for (index, change) in self.changes.iter().enumerate() {
            let (from, to) = match change {
                Change::Write { offset, data } => (*offset, offset + data.len()),
                Change::Length(length) => (*length, longest),
            };
            let mut at = from;
            while at < to {
                let sector = at / SECTOR_BYTES;
                let end = ((sector + 1) * SECTOR_BYTES).min(to);
                if seen[sector] > index {
                    match change {
                        Change::Write { offset, data } => {
                            content[at..end].copy_from_slice(&data[at - offset..end - offset]);
                        }
                        Change::Length(_) => content[at..end].fill(0),
                    }
                }
                at = end;
            }
        }
        content.truncate(lengths[rng.below(lengths.len() as u64) as usize]);
        content
    }
}

/// A name that was made (`Some(inode)`) or removed since its folder was synced.
#[derive(Clone, Debug)]
struct NameChange {
    name: String,
    inode: Option<usize>,
}

#[derive(Clone, Debug, Default)]
struct SimFolder {
    synced: BTreeMap<String, usize>,
    current: BTreeMap<String, usize>,
    changes: Vec<NameChange>,
    /// Bytes that all files together may have.
    capacity: Option<u64>,
    /// Syncs of its files are answered and do nothing.
    lying: bool,
}

/// What a folder held at some instant: a backup that somebody may put back.
#[derive(Clone, Debug, Default)]
pub struct FolderCopy(BTreeMap<String, Vec<u8>>);

impl SimFolder {
    fn change(&mut self, name: &str, inode: Option<usize>) {
        match inode {
            Some(inode) => self.current.insert(name.into(), inode),
            None => self.current.remove(name),
        };
        self.changes.push(NameChange { name: name.into(), inode });
    }

    fn lose_power(&mut self, survival: Survival, rng: &mut SimRng) {
        let mut names = self.synced.clone();
        for change in &self.changes {
            let survives = match survival {
                Survival::Nothing => false,
                Survival::Everything => true,
                Survival::Writes | Survival::Sectors => rng.one_in(2),
            };
            if survives {
                match change.inode {
                    Some(inode) => names.insert(change.name.clone(), inode),
                    None => names.remove(&change.name),
                };
            }
        }
        self.current = names;
        self.synced.clone_from(&self.current);
        self.changes.clear();
    }
}

#[derive(Debug, Default)]
struct World {
    inodes: Vec<Inode>,
    folders: BTreeMap<String, SimFolder>,
    /// Changing operations so far: writes, syncs, truncations, removals.
    operations: u64,
    /// The power fails during this operation.
    power_off_at: Option<u64>,
    /// This operation fails with an I/O error, power stays on.
    fail_at: Option<u64>,
    powered_off: bool,
    /// Syncs are answered and do nothing.
    lying: bool,
    /// What each operation was, when asked for.
    trace: Option<Vec<String>>,
}

/// A machine's storage: some folders, one power supply.
#[derive(Clone, Debug, Default)]
pub struct SimMedium(Rc<RefCell<World>>);

/// One folder of a [`SimMedium`]. Clones are handles on the same folder.
#[derive(Clone, Debug)]
pub struct SimStorage {
    medium: SimMedium,
    folder: String,
}

impl SimMedium {
    pub fn new() -> SimMedium {
        SimMedium::default()
    }

    /// A folder by name, made if it is not there.
    pub fn folder(&self, name: &str) -> SimStorage {
        self.0.borrow_mut().folders.entry(name.into()).or_default();
        SimStorage { medium: self.clone(), folder: name.into() }
    }

    /// Bytes that the files of a folder may have together; `None`: no bound.
    pub fn set_capacity(&self, folder: &str, bytes: Option<u64>) {
        self.0.borrow_mut().folders.entry(folder.into()).or_default().capacity = bytes;
    }

    /// Bytes that the files of a folder have together.
    pub fn used(&self, folder: &str) -> u64 {
        let world = self.0.borrow();
        let files = world.folders.get(folder).into_iter().flat_map(|folder| folder.current.values());
        files.map(|inode| world.inodes[*inode].current.len() as u64).sum()
    }

    /// Changing operations so far.
    pub fn operations(&self) -> u64 {
        self.0.borrow().operations
    }

    /// The power fails during the operation with this number (counted as by [`SimMedium::operations`], from 1).
    pub fn power_off_at(&self, operation: Option<u64>) {
        self.0.borrow_mut().power_off_at = operation;
    }

    /// The operation with this number fails with an I/O error and changes nothing durable.
    pub fn fail_at(&self, operation: Option<u64>) {
        self.0.borrow_mut().fail_at = operation;
    }

    /// From now on syncs are answered and do nothing: a disk that lies. What stands on syncs must then fail its tests.
    pub fn lie(&self) {
        self.0.borrow_mut().lying = true;
    }

    /// The same for the files of one folder only: one disk of several lies.
    pub fn lie_in(&self, folder: &str) {
        self.0.borrow_mut().folders.entry(folder.into()).or_default().lying = true;
    }

    /// A copy of a folder as it is now.
    pub fn copy_folder(&self, folder: &str) -> FolderCopy {
        let world = self.0.borrow();
        let files = world.folders.get(folder).into_iter().flat_map(|folder| &folder.current);
        FolderCopy(files.map(|(name, inode)| (name.clone(), world.inodes[*inode].current.clone())).collect())
    }

    /// The folder holds exactly what the copy holds, durably.
    pub fn restore_folder(&self, folder: &str, copy: &FolderCopy) {
        let world = &mut *self.0.borrow_mut();
        let mut names = BTreeMap::new();
        for (name, content) in &copy.0 {
            names.insert(name.clone(), world.inodes.len());
            world.inodes.push(Inode { synced: content.clone(), current: content.clone(), changes: Vec::new() });
        }
        let folder = world.folders.entry(folder.into()).or_default();
        folder.current = names;
        folder.synced.clone_from(&folder.current);
        folder.changes.clear();
    }

    /// True from the failing operation until [`SimMedium::lose_power`].
    pub fn is_off(&self) -> bool {
        self.0.borrow().powered_off
    }

    /// Forget what does not survive, and switch on again.
    pub fn lose_power(&self, survival: Survival, rng: &mut SimRng) {
        let world = &mut *self.0.borrow_mut();
        world.inodes.iter_mut().for_each(|inode| inode.lose_power(survival, rng));
        world.folders.values_mut().for_each(|folder| folder.lose_power(survival, rng));
        world.powered_off = false;
        world.power_off_at = None;
    }

    /// Flip one bit of a durable file, as a decaying medium does.
    pub fn rot(&self, folder: &str, name: &str, offset: u64, bit: u8) {
        let world = &mut *self.0.borrow_mut();
        if let Some(inode) = world.folders.get(folder).and_then(|folder| folder.current.get(name)) {
            let inode = &mut world.inodes[*inode];
            inode.current[offset as usize] ^= 1 << (bit % 8);
            inode.synced.clone_from(&inode.current);
            inode.changes.clear();
        }
    }

    /// Keep a line for each changing operation from now on.
    pub fn start_trace(&self) {
        self.0.borrow_mut().trace = Some(Vec::new());
    }

    /// The lines since [`SimMedium::start_trace`].
    pub fn trace(&self) -> Vec<String> {
        self.0.borrow().trace.clone().unwrap_or_default()
    }
}

impl World {
    /// Count an operation. `Ok(false)`: the power fails during it, so it may happen but must not be answered.
    fn operate(&mut self, what: &str, folder: &str, name: &str) -> Result<bool, StorageError> {
        if self.powered_off {
            return Err(StorageError::Io(name.into(), "power is off".into()));
        }
        self.operations += 1;
        let line = || format!("{}: {what} {folder}/{name}", self.operations);
        let line = self.trace.is_some().then(line);
        if let (Some(trace), Some(line)) = (&mut self.trace, line) {
            trace.push(line);
        }
        if self.fail_at == Some(self.operations) {
            return Err(StorageError::Io(name.into(), "injected failure".into()));
        }
        self.powered_off = self.power_off_at == Some(self.operations);
        Ok(!self.powered_off)
    }

    fn answer(on: bool, name: &str) -> Result<(), StorageError> {
        if on { Ok(()) } else { Err(StorageError::Io(name.into(), "power lost".into())) }
    }
}

impl SimStorage {
    fn with_inode<T>(&self, name: &str, read: impl FnOnce(&Inode) -> T) -> Result<T, StorageError> {
        let world = self.medium.0.borrow();
        if world.powered_off {
            return Err(StorageError::Io(name.into(), "power is off".into()));
        }
        let inode = world.folders.get(&self.folder).and_then(|folder| folder.current.get(name));
        inode.map(|inode| read(&world.inodes[*inode])).ok_or_else(|| StorageError::Missing(name.into()))
    }

    /// Change a file, creating it if need be; `grow_to` is checked against the folder's capacity.
    fn change(&mut self, what: &str, name: &str, grow_to: u64, change: Change) -> Result<(), StorageError> {
        let used = self.medium.used(&self.folder);
        let world = &mut *self.medium.0.borrow_mut();
        let on = world.operate(what, &self.folder, name)?;
        let World { inodes, folders, .. } = world;
        let folder = folders.entry(self.folder.clone()).or_default();
        let length = folder.current.get(name).map_or(0, |inode| inodes[*inode].current.len() as u64);
        let full = folder.capacity.is_some_and(|capacity| used + grow_to.saturating_sub(length) > capacity);
        if full && grow_to > length {
            // As much as fits may have been written.
            if let (Change::Write { offset, data }, Some(inode)) = (&change, folder.current.get(name)) {
                let fits = (folder.capacity.unwrap_or(0).saturating_sub(used) as usize).min(data.len());
                let part = Change::Write { offset: *offset, data: data[..fits].to_vec() };
                inodes[*inode].change(part);
            }
            return Err(StorageError::NoSpace(name.to_string()));
        }
        let inode = match folder.current.get(name) {
            Some(inode) => *inode,
            None => {
                inodes.push(Inode::default());
                folder.change(name, Some(inodes.len() - 1));
                inodes.len() - 1
            }
        };
        inodes[inode].change(change);
        World::answer(on, name)
    }
}

impl Storage for SimStorage {
    fn list(&self) -> Result<Vec<String>, StorageError> {
        let world = self.medium.0.borrow();
        Ok(world.folders.get(&self.folder).map(|folder| folder.current.keys().cloned().collect()).unwrap_or_default())
    }

    fn len(&self, name: &str) -> Result<u64, StorageError> {
        self.with_inode(name, |inode| inode.current.len() as u64)
    }

    fn read(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<usize, StorageError> {
        self.with_inode(name, |inode| {
            let from = (offset as usize).min(inode.current.len());
            let to = from.saturating_add(buf.len()).min(inode.current.len());
            buf[..to - from].copy_from_slice(&inode.current[from..to]);
            to - from
        })
    }

    fn write(&mut self, name: &str, offset: u64, data: &[u8]) -> Result<(), StorageError> {
        let change = Change::Write { offset: offset as usize, data: data.to_vec() };
        self.change("write", name, offset + data.len() as u64, change)
    }

    fn zero(&mut self, name: &str, offset: u64, length: u64) -> Result<(), StorageError> {
        let change = Change::Write { offset: offset as usize, data: vec![0; length as usize] };
        self.change("zero", name, offset + length, change)
    }

    fn sync(&mut self, name: &str) -> Result<(), StorageError> {
        let world = &mut *self.medium.0.borrow_mut();
        let on = world.operate("sync", &self.folder, name)?;
        let inode = world.folders.get(&self.folder).and_then(|folder| folder.current.get(name)).copied();
        let inode = inode.ok_or_else(|| StorageError::Missing(name.into()))?;
        let lies = world.lying || world.folders.get(&self.folder).is_some_and(|folder| folder.lying);
        if on && !lies {
            world.inodes[inode].sync();
        }
        World::answer(on, name)
    }

    fn truncate(&mut self, name: &str, length: u64) -> Result<(), StorageError> {
        self.change("truncate", name, length, Change::Length(length as usize))
    }

    fn remove(&mut self, name: &str) -> Result<(), StorageError> {
        let world = &mut *self.medium.0.borrow_mut();
        let folder = world.folders.get(&self.folder);
        if folder.is_none_or(|folder| !folder.current.contains_key(name)) {
            return Err(StorageError::Missing(name.into()));
        }
        let on = world.operate("remove", &self.folder, name)?;
        if let Some(folder) = world.folders.get_mut(&self.folder) {
            folder.change(name, None);
        }
        World::answer(on, name)
    }

    fn sync_folder(&mut self) -> Result<(), StorageError> {
        let world = &mut *self.medium.0.borrow_mut();
        let on = world.operate("sync_folder", &self.folder, "")?;
        if let (true, Some(folder)) = (on && !world.lying, world.folders.get_mut(&self.folder)) {
            folder.synced.clone_from(&folder.current);
            folder.changes.clear();
        }
        World::answer(on, "")
    }
}
