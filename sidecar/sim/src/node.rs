//! A site's machine: its medium, its mapped memory, its region log, and the process that runs on it, with what survives
//! a `kill -9` (everything but the heap) and a loss of power (what was synced, and any part of what was not).
//!
//! The region log here is a set that is durable at once; its own format and faults are tested in `watari-store`.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    rc::Rc,
    sync::Arc,
};

use watari_core::{
    geometry::{ActivationId, Block, DiskIndex, Epoch, Generation, GenerationNumber, Session},
    handover::Site,
    record::{DiskRecord, Role, RoleRecord},
    replica::{StorageImages, images::image_name},
    slots::SlotFile,
    storage::{
        Storage,
        sim::{FolderCopy, SimMedium, SimRng, SimStorage, Survival},
    },
    tracker::{HeapMaps, MapName, Maps, Tracker},
};

use crate::{
    content::{bytes_of, read_all, word},
    ctx::Ctx,
    process::Process,
    source::Baseline,
    truth::Live,
};

/// Blocks of a region of the simulated log: small, so that small disks have several.
pub const REGION_BLOCKS: u64 = 8;
const ROLE_MAGIC: [u8; 8] = *b"SIMUROLE";
const ROLE_NAME: &str = "role.rec";

/// Bitmaps that outlive the process.
#[derive(Clone)]
pub struct SharedMaps(pub Arc<HeapMaps>);

impl Maps for SharedMaps {
    fn disks(&self) -> u16 {
        self.0.disks()
    }
    fn blocks(&self, disk: DiskIndex) -> u64 {
        self.0.blocks(disk)
    }
    fn words(&self, disk: DiskIndex, map: MapName) -> &[std::sync::atomic::AtomicU64] {
        self.0.words(disk, map)
    }
    fn ensure(&self, disk: DiskIndex, first: Block, last: Block) -> bool {
        self.0.ensure(disk, first, last)
    }
    fn absent(&self, disk: DiskIndex, map: MapName, word: usize) -> bool {
        self.0.absent(disk, map, word)
    }
}

/// A region: disk and number.
pub type Region = (u16, u64);

/// Regions of a block range.
pub fn regions_of(disk: DiskIndex, first: Block, last: Block) -> impl Iterator<Item = Region> {
    (first.0 / REGION_BLOCKS..=last.0 / REGION_BLOCKS).map(move |r| (disk.0, r))
}

fn all_regions(blocks: &[u64]) -> BTreeSet<Region> {
    let of = |(d, n): (usize, &u64)| (0..n.div_ceil(REGION_BLOCKS)).map(move |r| (d as u16, r)).collect::<Vec<_>>();
    blocks.iter().enumerate().flat_map(of).collect()
}

/// See the module's header.
pub struct Node {
    pub index: usize,
    pub medium: SimMedium,
    /// Disk images: what the guest writes, or what the replica applies to.
    pub images: SimStorage,
    maps: Option<Arc<HeapMaps>>,
    pub region_log: Rc<RefCell<BTreeSet<Region>>>,
    /// Raised when a process dies, so that its connections are told from later ones.
    pub life: u64,
    pub process: Option<Process>,
    /// The durable record, as it was found when the last process ended.
    left: Option<RoleRecord>,
    /// In mapped memory, and known to the peer: marks may be missing.
    pub untracked: Rc<Cell<bool>>,
    /// The region log cannot be written.
    pub log_broken: bool,
    /// Somebody else wrote to the disks since the last process ended: their times or digests say so.
    pub tampered: bool,
    /// Its folder was lost: it begins as an empty replica.
    pub lost: bool,
    /// A backup of its folders, and the generations in it.
    pub backup: Option<Backup>,
}

/// A target's metadata folder as it was.
pub struct Backup {
    pub folders: [FolderCopy; 2],
    pub epoch: Epoch,
}

impl Node {
    /// A machine with empty disks, or with somebody's old data on them.
    pub fn new(index: usize, ctx: &mut Ctx, filled: bool) -> Node {
        let medium = SimMedium::new();
        let images = StorageImages::create(medium.folder("images"), &ctx.setup.sizes).expect("a new medium has room");
        let mut images = images.storage;
        if filled {
            for (disk, size) in ctx.setup.sizes.clone().into_iter().enumerate() {
                let id = ctx.truth.write_id();
                let old = |s: u64| if ctx.setup.seed >> (s % 61) & 1 == 1 { word(id, disk, s) } else { 0 };
                let words: Vec<u64> = (0..size / 512).map(old).collect();
                let name = image_name(DiskIndex(disk as u16));
                images.write(&name, 0, &bytes_of(&words)).expect("a new medium has room");
                images.sync(&name).expect("the power is on");
            }
        }
        Node {
            index,
            medium,
            images,
            maps: None,
            region_log: Rc::default(),
            life: 0,
            process: None,
            left: None,
            untracked: Rc::default(),
            log_broken: false,
            tampered: false,
            lost: false,
            backup: None,
        }
    }

    /// The durable role record, if there is one.
    fn read_record(&self) -> Option<(SlotFile, RoleRecord)> {
        let meta = self.medium.folder("meta");
        let found =
            SlotFile::open(&meta, ROLE_NAME, ROLE_MAGIC, 1).expect("a role record is never damaged by a crash")?;
        let record = RoleRecord::decode(&found.1.bytes).expect("a role record decodes");
        Some((found.0, record))
    }

    /// What the durable record says, whether or not a process runs.
    pub fn record(&self) -> Option<&RoleRecord> {
        self.process.as_ref().map(|p| p.site.record()).or(self.left.as_ref())
    }

    fn first_record(&self, ctx: &mut Ctx) -> RoleRecord {
        let (role, epoch, identity) = if self.index == 0 && !self.lost {
            (Role::Serving, Epoch { counter: 1, activation: ActivationId(ctx.id()) }, ctx.id())
        } else {
            (Role::Replica, Epoch::default(), [0; 16])
        };
        let site = ctx.id();
        let disks = ctx.setup.sizes.iter().enumerate();
        RoleRecord {
            pair: [7; 16],
            site,
            identity,
            starts: 1,
            epoch,
            floor: epoch.counter,
            role,
            base: Generation::default(),
            numbers_reserved: GenerationNumber(1),
            unfenced: false,
            untracked: false,
            disks: disks.map(|(i, s)| DiskRecord { name: format!("disk{i}"), size_bytes: *s }).collect(),
        }
    }

    /// Start the process (engine/start.rs): role record, marks, then go on from the record.
    pub fn start(&mut self, ctx: &mut Ctx) {
        assert!(self.process.is_none(), "one process at a time holds the folder");
        let mut meta = self.medium.folder("meta");
        let (slot, record) = match self.read_record() {
            Some((mut slot, mut record)) => {
                record.starts += 1;
                if slot.write(&mut meta, &record.encode()).is_err() {
                    return;
                }
                (slot, record)
            }
            None => {
                let record = self.first_record(ctx);
                match SlotFile::create(&mut meta, ROLE_NAME, ROLE_MAGIC, 1, &record.encode()) {
                    Ok(slot) => (slot, record),
                    Err(_) => return,
                }
            }
        };
        let source = record.role.is_active_side();
        let blocks: Vec<u64> = ctx.setup.sizes.iter().map(|s| s.div_ceil(4096)).collect();
        let survived = self.maps.clone().filter(|_| source);
        let fresh = || Arc::new(HeapMaps::new(&blocks));
        let maps = survived.clone().unwrap_or_else(fresh);
        self.maps = Some(maps.clone());
        let tracker = Tracker::new(SharedMaps(maps));
        let mut baseline = Baseline::Marks;
        let tampered = std::mem::take(&mut self.tampered);
        let log: BTreeSet<Region> = if !source {
            BTreeSet::new()
        } else if record.starts == 1 {
            all_regions(&blocks)
        } else if tampered {
            baseline = Baseline::Everything("somebody else wrote to the disks");
            all_regions(&blocks)
        } else if self.untracked.get() {
            baseline = Baseline::Everything("writes were let through that no log holds");
            all_regions(&blocks)
        } else if survived.is_some() {
            ctx.cov.hit("start: marks survived in mapped memory");
            let marks = |d: DiskIndex| tracker.all_marks(d).into_iter().map(move |e| (d, e));
            let of = |(d, e): (DiskIndex, watari_core::geometry::Extent)| regions_of(d, e.start, Block(e.end().0 - 1));
            tracker.disk_indices().flat_map(marks).flat_map(of).collect()
        } else {
            ctx.cov.hit("start: regions of the log are compared");
            baseline = Baseline::Compare(self.region_log.borrow().clone());
            self.region_log.borrow().clone()
        };
        self.region_log.borrow_mut().clone_from(&log);
        tracker.adopt();
        if !source {
            tracker.clear_all();
        }
        let session = Session(ctx.rng.next_u64() | 1);
        ctx.cov.hit(format!("start as {}", record.role.name()));
        let often = ctx.setup.trouble.untracked && !ctx.peace && source && record.starts > 2;
        let pass_through = often && record.role.accepts_writes() && ctx.rng.one_in(6);
        let mut process = Process::new(self, Site::new(record, session.0), session, slot, tracker, log);
        process.pass_through = pass_through;
        process.speaks = ctx.versions();
        if pass_through {
            ctx.cov.hit("start as a pass-through");
        }
        if source {
            // Entered before the first write that no log holds; a complete new log ends it.
            self.untracked.set(pass_through || self.log_broken);
        }
        self.process = Some(process);
        self.learn_truth(ctx);
        if let Some(p) = &mut self.process {
            p.take_up(ctx, baseline);
        }
    }

    /// Marks in mapped memory go with the Pod that had it.
    pub fn lose_maps(&mut self) {
        self.maps = None;
    }

    /// The worker is killed: its heap is gone, the machine goes on.
    pub fn kill(&mut self, ctx: &mut Ctx) {
        if self.process.take().is_some() {
            self.life += 1;
            ctx.net.died(self.index);
        }
        // With the power off the medium cannot be read; what a loss of power leaves is looked at after it.
        self.left = if self.medium.is_off() { None } else { self.read_record().map(|(_, r)| r) };
    }

    /// The power of the machine fails.
    pub fn lose_power(&mut self, ctx: &mut Ctx) {
        self.kill(ctx);
        self.maps = None;
        let survival = [Survival::Nothing, Survival::Everything, Survival::Writes, Survival::Sectors];
        let survival = survival[ctx.rng.below(4) as usize];
        let mut rng = SimRng(ctx.rng.next_u64());
        self.medium.lose_power(survival, &mut rng);
        self.left = self.read_record().map(|(_, r)| r);
        if let Some(live) = &mut ctx.truth.live[self.index] {
            live.power_lost(read_all(&self.images, &ctx.setup.sizes).expect("the power is on again"));
        }
        self.learn_truth(ctx);
    }

    /// After the durable record may have changed: what must this site's disks hold from now on?
    pub fn learn_truth(&self, ctx: &mut Ctx) {
        let Some(record) = self.record() else { return };
        let (me, other) = (self.index, 1 - self.index);
        let active = record.role.is_active_side() && !matches!(record.role, Role::Promoting { .. });
        if !active {
            ctx.truth.live[me] = None;
            return;
        }
        if ctx.truth.live[me].is_some() {
            return;
        }
        let Ok(found) = read_all(&self.images, &ctx.setup.sizes) else { return };
        ctx.truth.moves += 1;
        ctx.truth.consented[me] = false;
        if record.starts > 1 || record.epoch.counter > 1 {
            ctx.truth.check_generation(me, record.base, &found, "the disks of a new active side");
            // A person who reclaims a source after its grant overrules the activation that the grant still leads to: what is
            // written there from then on is in a higher epoch, which fences this side at the next contact.
            let decided = ctx.truth.unfenced.range(record.epoch.counter..).next().is_some();
            if decided {
                ctx.cov.hit("active by a person's decision, or overruled by one");
            }
            if !decided && let Some(theirs) = &ctx.truth.live[other] {
                for (d, (a, b)) in theirs.content.iter().zip(&found).enumerate() {
                    let differs = a.iter().zip(b).position(|(a, b)| a != b);
                    assert!(differs.is_none(), "a planned move lost a write: disk {d} sector {differs:?}");
                }
                ctx.cov.hit("planned move: the target's disks equal the source's");
            }
        }
        ctx.truth.live[me] = Some(Live::new(found));
    }
}
