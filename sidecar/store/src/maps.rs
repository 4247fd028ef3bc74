//! Memory that survives the worker: the fine dirty maps of a pair in a file on tmpfs.
//!
//! Invariant I1: a mark is one atomic operation on shared memory, so `kill -9` at any instant loses none that was made.
//! Invariant I8: the file is in memory, not on the metadata claim, and its pages are allocated *before* they are marked,
//! so a full tmpfs is an error to us ([`MapMemory::ensure_leaf`]), never a SIGBUS, and never a fault of the guest.
//!
//! ```text
//! | header page | present bits | First: disk 0, 1, … | Second: disk 0, 1, … | Staged: disk 0, 1, … |
//! ```
//!
//! A *leaf* is the piece of the three bitmaps that is allocated together: one page of each, 128 MiB of disk (larger
//! for pairs beyond 1 TiB, see [`LEAVES_MAX`]). All three at once, so that a cut, early staging and giving a generation
//! up move marks between the maps without ever needing memory. Absent leaves read as zero.
//!
//! It does not survive the node (that is the region log's part), and it does not know what the marks mean.

mod header;
mod mapping;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Release, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use watari_core::geometry::{Block, DiskIndex, blocks_for};
use watari_core::regions::{LayoutError, PairId, RegionLayout};
use watari_core::tracker::{MapName, Maps};

pub use header::{BootId, Facts, MAP_VERSION, MapIdentity, MapRefused};
use header::{HEADER_BYTES, HEADER_WORDS};
use mapping::Mapping;

/// Most leaves of a pair. Each may become three mappings of its own, and the kernel allows a process 65,530 by default;
/// beyond 8192 leaves of 128 MiB (1 TiB of disks) leaves are made larger instead of more.
pub const LEAVES_MAX: usize = 8192;
/// Smallest leaf: one page of a bitmap.
const LEAF_BYTES_MIN: usize = 4096;
/// Leaves released at one cut barrier at most: a few system calls each, together well under a millisecond of a guest
/// write held at the gate.
pub const RELEASE_LEAVES_MAX: usize = 32;
const MAPS: usize = 3;

/// Why there is no map memory.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The runtime folder is full (or its memory limit is reached). The pair must go `Untracked`; try again later.
    #[error("no memory left in the runtime folder for the dirty map: {0}")]
    NoSpace(io::Error),
    /// A disk on which pages are written back could make a guest write wait: only memory will do.
    #[error("the runtime folder {0} is not on tmpfs: name one that is, e.g. /dev/shm")]
    NotMemory(PathBuf),
    #[error("the runtime folder {0}: {1}")]
    Io(PathBuf, io::Error),
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// What [`MapMemory::open_or_create`] found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Opened {
    /// The marks of a former worker on this boot. They are believed only if [`Facts::belongs_to_start`] agrees.
    Existing,
    /// A new, empty map, because of this.
    New(MapRefused),
}

/// Where things lie in the file, from the sizes of the disks alone.
struct Plan {
    leaf_bytes: usize,
    leaf_words_shift: u32,
    /// Per disk: blocks, and the number of its first leaf.
    disks: Vec<(u64, usize)>,
    leaves: usize,
    present_at: usize,
    maps_at: usize,
    bytes: usize,
}

impl Plan {
    fn new(sizes: &[u64]) -> Result<Plan, LayoutError> {
        RegionLayout::new(sizes)?;
        let page = LEAF_BYTES_MIN.max(rustix::param::page_size());
        let leaves_of = |size: u64, leaf: usize| blocks_for(size).div_ceil(leaf as u64 * 8) as usize;
        let mut leaf_bytes = page;
        while sizes.iter().map(|&s| leaves_of(s, leaf_bytes)).sum::<usize>() > LEAVES_MAX {
            leaf_bytes *= 2;
        }
        let mut disks = Vec::new();
        let mut leaves = 0;
        for &size in sizes {
            disks.push((blocks_for(size), leaves));
            leaves += leaves_of(size, leaf_bytes);
        }
        let present_at = HEADER_BYTES.next_multiple_of(page);
        let maps_at = present_at + leaves.div_ceil(8).next_multiple_of(page);
        let bytes = maps_at + MAPS * leaves * leaf_bytes;
        let leaf_words_shift = (leaf_bytes / 8).trailing_zeros();
        Ok(Plan { leaf_bytes, leaf_words_shift, disks, leaves, present_at, maps_at, bytes })
    }

    /// Byte offset of a leaf in one of the maps.
    fn leaf_at(&self, map: usize, leaf: usize) -> usize {
        self.maps_at + (map * self.leaves + leaf) * self.leaf_bytes
    }
}

struct Inner {
    plan: Plan,
    mapping: Mapping,
    path: PathBuf,
    /// Serialises allocation and release; marks never take it.
    changing: Mutex<()>,
}

/// The mapped memory of one pair. Clones share it.
#[derive(Clone)]
pub struct MapMemory(Arc<Inner>);

fn map_index(map: MapName) -> usize {
    match map {
        MapName::First => 0,
        MapName::Second => 1,
        MapName::Staged => 2,
    }
}

impl MapMemory {
    /// The file of a pair in a runtime folder.
    pub fn path(folder: &Path, pair: PairId) -> PathBuf {
        folder.join(format!("watari-{pair}.map"))
    }

    /// Open the file of a former worker, or refuse it with the reason.
    pub fn open(folder: &Path, identity: &MapIdentity) -> Result<Result<MapMemory, MapRefused>, MapError> {
        let path = Self::path(folder, identity.pair);
        // Runtime folders such as /dev/shm are open to everybody: no links, no files of others (see `check`).
        let no_links = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
        let file = match OpenOptions::new().read(true).write(true).custom_flags(no_links).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Err(MapRefused::Missing)),
            Err(e) => return Err(MapError::Io(folder.into(), e)),
        };
        require_memory(&file, folder)?;
        let plan = Plan::new(&identity.sizes)?;
        if let Err(refused) = check(&file, identity, &plan) {
            return Ok(Err(refused));
        }
        let memory = Self::attach(file, plan, path).map_err(|e| classify(folder, e))?;
        memory.attach_present().map_err(|e| classify(folder, e))?;
        Ok(Ok(memory))
    }

    /// Make a new, empty file; one that is there is replaced. The file gets its name only when it is complete.
    pub fn create(folder: &Path, identity: &MapIdentity) -> Result<MapMemory, MapError> {
        let plan = Plan::new(&identity.sizes)?;
        let path = Self::path(folder, identity.pair);
        let new = path.with_extension("map.new");
        let io_error = |e| MapError::Io(folder.into(), e);
        let removed = fs::remove_file(&new);
        if let Err(e) = removed
            && e.kind() != io::ErrorKind::NotFound
        {
            return Err(io_error(e));
        }
        let open = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&new);
        let made = open.map_err(io_error).and_then(|file| {
            require_memory(&file, folder)?;
            let memory = Self::fill(file, plan, path.clone(), identity).map_err(|e| classify(folder, e))?;
            fs::rename(&new, &path).map_err(io_error)?;
            Ok(memory)
        });
        if made.is_err() {
            // Not being able to tidy up must not hide why the map could not be made.
            let _ = fs::remove_file(&new);
        }
        made
    }

    /// Open the file, or make a new one when it is refused.
    pub fn open_or_create(folder: &Path, identity: &MapIdentity) -> Result<(MapMemory, Opened), MapError> {
        match Self::open(folder, identity)? {
            Ok(memory) => Ok((memory, Opened::Existing)),
            Err(refused) => Ok((Self::create(folder, identity)?, Opened::New(refused))),
        }
    }

    /// Remove the file of a pair, after a clean stop or at the end of the pair. Missing is fine.
    pub fn remove(folder: &Path, pair: PairId) -> io::Result<()> {
        match fs::remove_file(Self::path(folder, pair)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    fn fill(mut file: File, plan: Plan, path: PathBuf, identity: &MapIdentity) -> io::Result<MapMemory> {
        file.set_len(plan.bytes as u64)?;
        let words = header::encode(identity, plan.leaf_bytes);
        let maps_at = plan.maps_at;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::KEEP_SIZE, 0, maps_at as u64)?;
        file.write_all(&words.map(u64::to_le_bytes).concat())?;
        Self::attach(file, plan, path)
    }

    /// Map header and present bits, which are allocated in every file that has a name.
    fn attach(file: File, plan: Plan, path: PathBuf) -> io::Result<MapMemory> {
        let mapping = Mapping::reserve(file, plan.bytes)?;
        mapping.attach(0..plan.maps_at)?;
        Ok(MapMemory(Arc::new(Inner { plan, mapping, path, changing: Mutex::new(()) })))
    }

    /// Map what a former worker allocated. Memory that it allocated without getting as far as saying so is given back.
    fn attach_present(&self) -> io::Result<()> {
        let Inner { plan, mapping, .. } = &*self.0;
        let mut leaf = 0;
        while leaf < plan.leaves {
            let present = self.is_present(leaf);
            let run = (leaf..plan.leaves).take_while(|&l| self.is_present(l) == present).count();
            for map in 0..MAPS {
                let range = plan.leaf_at(map, leaf)..plan.leaf_at(map, leaf) + run * plan.leaf_bytes;
                if present {
                    // A second allocation of allocated pages is a no-op; it proves that no store can meet a hole.
                    mapping.allocate(range.clone())?;
                    mapping.attach(range)?;
                } else {
                    mapping.punch(range)?;
                }
            }
            leaf += run;
        }
        Ok(())
    }

    fn present(&self) -> &[AtomicU64] {
        self.0.mapping.words(self.0.plan.present_at, self.0.plan.leaves.div_ceil(64))
    }

    #[inline]
    fn is_present(&self, leaf: usize) -> bool {
        self.present()[leaf / 64].load(Acquire) & (1 << (leaf % 64)) != 0
    }

    #[inline]
    fn leaf_of(&self, disk: DiskIndex, block: Block) -> usize {
        let (blocks, first) = self.0.plan.disks[usize::from(disk.0)];
        assert!(block.0 < blocks, "block {} of a disk of {blocks}", block.0);
        first + (block.0 >> (self.0.plan.leaf_words_shift + 6)) as usize
    }

    /// Make sure that the marks of `block` have memory in all three maps. On every guest write: one load when they have.
    ///
    /// `Err(NoSpace)`: the pair must go `Untracked` (through the region log, or [`Facts::set_untracked`]) before the
    /// write goes on.
    ///
    /// # Panics
    /// If the disk or the block does not exist.
    #[inline]
    pub fn ensure_leaf(&self, disk: DiskIndex, block: Block) -> Result<(), MapError> {
        let leaf = self.leaf_of(disk, block);
        if self.is_present(leaf) { Ok(()) } else { self.populate(leaf) }
    }

    /// [`MapMemory::ensure_leaf`] for all blocks `first..=last`.
    #[inline]
    pub fn ensure_range(&self, disk: DiskIndex, first: Block, last: Block) -> Result<(), MapError> {
        for leaf in self.leaf_of(disk, first)..=self.leaf_of(disk, last) {
            if !self.is_present(leaf) {
                self.populate(leaf)?;
            }
        }
        Ok(())
    }

    /// Whether the marks of all blocks `first..=last` have memory: loads of memory only. To be asked again *inside* the
    /// admission gate by everyone who uses [`MapMemory::release_clean_leaves`], since memory that was ensured outside may
    /// have been released before the gate was passed.
    #[inline]
    pub fn is_ensured(&self, disk: DiskIndex, first: Block, last: Block) -> bool {
        (self.leaf_of(disk, first)..=self.leaf_of(disk, last)).all(|leaf| self.is_present(leaf))
    }

    #[cold]
    fn populate(&self, leaf: usize) -> Result<(), MapError> {
        let Inner { plan, mapping, path, changing } = &*self.0;
        let _changing = changing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_present(leaf) {
            return Ok(());
        }
        let ranges: [_; MAPS] = std::array::from_fn(|map| {
            let at = plan.leaf_at(map, leaf);
            at..at + plan.leaf_bytes
        });
        // Allocate all before attaching any, so that a failure leaves no writable memory behind.
        let all = ranges.iter().try_for_each(|r| mapping.allocate(r.clone()));
        let all = all.and_then(|()| ranges.iter().try_for_each(|r| mapping.attach(r.clone())));
        if let Err(e) = all {
            for range in ranges {
                // Giving back what was taken is a courtesy to the next try; the reason is what counts.
                let _ = mapping.detach(range.clone()).and_then(|()| mapping.punch(range));
            }
            return Err(classify(path.parent().unwrap_or(path), e));
        }
        self.present()[leaf / 64].fetch_or(1 << (leaf % 64), Release);
        Ok(())
    }

    /// One bitmap of a disk: bit `b % 64` of word `b / 64` is block `b`. Loads are allowed anywhere; a store is allowed
    /// only to blocks for which [`MapMemory::ensure_leaf`] succeeded (elsewhere it ends the process, see `mapping`).
    #[inline]
    pub fn bitmap(&self, disk: DiskIndex, map: MapName) -> &[AtomicU64] {
        let Inner { plan, mapping, .. } = &*self.0;
        let (blocks, first) = plan.disks[usize::from(disk.0)];
        mapping.words(plan.leaf_at(map_index(map), first), blocks.div_ceil(64) as usize)
    }

    /// The first block of each leaf of `disk` that has memory, and the number of blocks that a leaf holds: what a scan
    /// must look at.
    pub fn present_leaves(&self, disk: DiskIndex) -> impl Iterator<Item = Block> + '_ {
        let blocks = self.0.plan.disks[usize::from(disk.0)].0;
        let per_leaf = self.leaf_blocks();
        (0..blocks.div_ceil(per_leaf)).map(move |l| Block(l * per_leaf)).filter(move |&b| {
            let leaf = self.leaf_of(disk, b);
            self.is_present(leaf)
        })
    }

    /// Blocks whose marks share a leaf.
    pub fn leaf_blocks(&self) -> u64 {
        self.0.plan.leaf_bytes as u64 * 8
    }

    fn leaf_is_zero(&self, leaf: usize) -> bool {
        let Inner { plan, mapping, .. } = &*self.0;
        (0..MAPS)
            .all(|map| mapping.words(plan.leaf_at(map, leaf), plan.leaf_bytes / 8).iter().all(|w| w.load(SeqCst) == 0))
    }

    /// Leaves without a mark, as (disk, first block), at most [`RELEASE_LEAVES_MAX`]: candidates for
    /// [`MapMemory::release_clean_leaves`]. May be called at any time; what it finds may be marked again at once.
    pub fn find_clean_leaves(&self) -> Vec<(DiskIndex, Block)> {
        (0..self.0.plan.disks.len())
            .map(|disk| DiskIndex(disk as u16))
            .flat_map(|disk| self.present_leaves(disk).map(move |block| (disk, block)))
            .filter(|&(disk, block)| self.leaf_is_zero(self.leaf_of(disk, block)))
            .take(RELEASE_LEAVES_MAX)
            .collect()
    }

    /// Give the memory of `leaves` back where they are still without a mark; returns how many were.
    ///
    /// To be called at a cut barrier only: the admission gate is closed, and the one task that stages and unstages is the
    /// caller. `idle(disk, first, last)` must say that no write to these blocks is in flight (a write that preserves
    /// frozen content still clears bits outside the gate). Whoever marks must ask [`MapMemory::is_ensured`] inside the
    /// gate. Then nobody stores into these words. Against that rule a store is a SIGSEGV, not a lost mark.
    /// Costs at most [`RELEASE_LEAVES_MAX`] times a few microseconds.
    pub fn release_clean_leaves(
        &self,
        leaves: &[(DiskIndex, Block)],
        idle: impl Fn(DiskIndex, Block, Block) -> bool,
    ) -> io::Result<usize> {
        let Inner { plan, mapping, changing, .. } = &*self.0;
        let _changing = changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut released = 0;
        for &(disk, block) in leaves.iter().take(RELEASE_LEAVES_MAX) {
            let leaf = self.leaf_of(disk, block);
            let end = (block.0 + self.leaf_blocks()).min(plan.disks[usize::from(disk.0)].0);
            if !self.is_present(leaf) || !self.leaf_is_zero(leaf) || !idle(disk, block, Block(end - 1)) {
                continue;
            }
            self.present()[leaf / 64].fetch_and(!(1 << (leaf % 64)), SeqCst);
            for map in 0..MAPS {
                let range = plan.leaf_at(map, leaf)..plan.leaf_at(map, leaf) + plan.leaf_bytes;
                mapping.detach(range.clone())?;
                mapping.punch(range)?;
            }
            released += 1;
        }
        Ok(released)
    }

    /// The facts in the header.
    #[inline]
    pub fn facts(&self) -> Facts<'_> {
        Facts(self.0.mapping.words(0, HEADER_WORDS))
    }

    /// Bytes of memory that the file holds now.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        self.0.mapping.resident_bytes()
    }
}

impl Maps for MapMemory {
    fn disks(&self) -> u16 {
        self.0.plan.disks.len() as u16
    }
    fn blocks(&self, disk: DiskIndex) -> u64 {
        self.0.plan.disks[usize::from(disk.0)].0
    }
    #[inline]
    fn words(&self, disk: DiskIndex, map: MapName) -> &[AtomicU64] {
        self.bitmap(disk, map)
    }
    #[inline]
    fn ensure(&self, disk: DiskIndex, first: Block, last: Block) -> bool {
        self.ensure_range(disk, first, last).is_ok()
    }
    #[inline]
    fn absent(&self, disk: DiskIndex, _map: MapName, word: usize) -> bool {
        let first = self.0.plan.disks[usize::from(disk.0)].1;
        !self.is_present(first + (word >> self.0.plan.leaf_words_shift))
    }
}

/// Refuse a file that is not this pair's map of this boot.
fn check(file: &File, identity: &MapIdentity, plan: &Plan) -> Result<(), MapRefused> {
    let owned = |m: &fs::Metadata| m.is_file() && m.uid() == rustix::process::geteuid().as_raw();
    if !file.metadata().is_ok_and(|m| owned(&m)) {
        return Err(MapRefused::Owner);
    }
    let (found, leaf_bytes) = header::decode(file)?;
    if found.pair != identity.pair {
        return Err(MapRefused::Pair { found: found.pair, expected: identity.pair });
    }
    if found.boot != identity.boot {
        return Err(MapRefused::Boot);
    }
    if found.sizes != identity.sizes {
        return Err(MapRefused::Sizes { found: found.sizes, expected: identity.sizes.clone() });
    }
    if leaf_bytes != plan.leaf_bytes {
        return Err(MapRefused::Leaf);
    }
    let length = file.metadata().map_or(0, |m| m.len());
    if length != plan.bytes as u64 {
        return Err(MapRefused::Length { found: length, expected: plan.bytes as u64 });
    }
    Ok(())
}

fn require_memory(file: &File, folder: &Path) -> Result<(), MapError> {
    /// `TMPFS_MAGIC` of `linux/magic.h`.
    const TMPFS: i64 = 0x0102_1994;
    let found = rustix::fs::fstatfs(file).map_err(|e| MapError::Io(folder.into(), e.into()))?;
    // The width of the field differs between architectures.
    #[allow(clippy::unnecessary_cast)]
    let kind = found.f_type as i64;
    if kind == TMPFS { Ok(()) } else { Err(MapError::NotMemory(folder.into())) }
}

fn classify(folder: &Path, e: io::Error) -> MapError {
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::OutOfMemory | io::ErrorKind::QuotaExceeded => MapError::NoSpace(e),
        _ => MapError::Io(folder.into(), e),
    }
}
