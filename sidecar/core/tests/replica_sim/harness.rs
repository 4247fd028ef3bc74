//! A source, a model of the truth, and a replica on a simulated medium.
//!
//! The model knows what each generation must contain. After every loss of power the folder is opened again and everything
//! that is kept is compared with the model, block by block.

use std::collections::{BTreeMap, BTreeSet};
use watari_core::{
    frame::{Decompress, Frame, FrameHeader, FrameId, FrameKind, content_digest},
    geometry::{BLOCK_BYTES, DiskIndex, Extent, Generation, GenerationNumber, Sequence, Session},
    replica::{
        CommitAnswer, CommitList, Entry, Images, JournalLimits, Mark, Options, Policy, Progress, ReplicaError,
        ReplicaStore, StorageImages, inspect::ReplicaState, list::exclude,
    },
    storage::sim::{SimMedium, SimRng, SimStorage, Survival},
};

pub type Store = ReplicaStore<SimStorage, StorageImages<SimStorage>>;
type Outcome = Result<(), ReplicaError>;

const BLOCK: usize = BLOCK_BYTES as usize;
/// A disk of whole blocks and one that ends within a block.
pub const DISKS: [u64; 2] = [24 * BLOCK_BYTES, 16 * BLOCK_BYTES + 100];

fn blocks(disk: usize) -> u64 {
    DISKS[disk].div_ceil(BLOCK_BYTES)
}

/// The content of a block: zero for id 0, else a pattern of id and place, cut at the disk's end.
fn block_content(disk: usize, block: u64, id: u64) -> Vec<u8> {
    let mut content = vec![0; BLOCK];
    if id != 0 {
        for (word, bytes) in content.chunks_mut(8).enumerate() {
            let value = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (block << 32) ^ word as u64;
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        let inside = (DISKS[disk] - block * BLOCK_BYTES).min(BLOCK_BYTES) as usize;
        content[inside..].fill(0);
    }
    content
}

/// Stands for zstd: the payload is (disk, block, id) for each block, 24 bytes instead of 4096.
struct Short;

impl Decompress for Short {
    fn decompress(&self, payload: &[u8], content_bytes: usize, out: &mut Vec<u8>) -> bool {
        out.clear();
        for triple in payload.chunks(24) {
            let word = |at: usize| u64::from_le_bytes(triple[at..at + 8].try_into().expect("8 bytes"));
            out.extend(block_content(word(0) as usize, word(8), word(16)));
        }
        out.len() == content_bytes
    }
}

/// What all blocks of all disks hold, by id.
pub type Content = Vec<Vec<u64>>;

#[derive(Clone)]
struct Sent {
    header: FrameHeader,
    payload: Vec<u8>,
    blocks: Vec<(usize, u64)>,
}

/// One step of a history.
#[derive(Clone, Debug)]
pub enum Step {
    /// Write blocks and send them; `compress` says how.
    Write {
        disk: usize,
        extents: Vec<Extent>,
        compress: bool,
    },
    Zero {
        disk: usize,
        extent: Extent,
    },
    /// Assert that blocks that did not change since the last commit are the same.
    Same {
        disk: usize,
        extent: Extent,
    },
    Sync,
    Commit,
    Apply {
        blocks: u64,
    },
    ApplyAll,
    Retain,
    /// Go back so many kept generations.
    Promote {
        back: usize,
    },
    /// The process ends without a word; what it wrote is still there, synced or not.
    Restart,
    Session,
    RaiseFloor,
    Share,
    Pin {
        back: usize,
    },
    Unpin,
    Supersede,
}

/// How a history is set up.
#[derive(Clone)]
pub struct Setup {
    pub virgin: bool,
    pub policy: Policy,
    pub journal: JournalLimits,
    /// Bytes of the metadata folder.
    pub capacity: Option<u64>,
}

impl Setup {
    pub fn new(virgin: bool, keep_last: u32) -> Setup {
        let journal = JournalLimits { segment_bytes_max: 40 << 10, journal_bytes_max: 4 << 20 };
        Setup { virgin, policy: Policy { keep_last, ..Policy::default() }, journal, capacity: None }
    }
}

pub struct Harness {
    pub medium: SimMedium,
    setup: Setup,
    store: Option<Store>,
    rng: SimRng,
    now: u64,
    epoch: u64,
    session: u64,
    next_sequence: u64,
    next_id: u64,
    next_generation: u64,
    /// What the source's disks hold.
    content: Content,
    sent: BTreeMap<u64, Sent>,
    /// The frame that has a block's newest content.
    owner: BTreeMap<(usize, u64), u64>,
    /// Sequences that were acknowledged as durable.
    durable: BTreeSet<u64>,
    pub generations: BTreeMap<u64, Content>,
    kept: Vec<u64>,
    newest: u64,
    shared: Option<u64>,
    pinned: Option<u64>,
    /// Tell each step (when one seed is replayed).
    pub told: bool,
    /// Times that power was lost, for the summary.
    pub crashes: u64,
    pub commits: u64,
}

fn generation(mark: Option<Mark>) -> u64 {
    mark.map_or(0, |mark| mark.generation.number.0)
}

impl Harness {
    pub fn new(setup: Setup, seed: u64) -> Harness {
        let medium = SimMedium::new();
        let mut rng = SimRng(seed);
        let mut images = StorageImages::create(medium.folder("images"), &DISKS).expect("images");
        let mut content: Content = (0..DISKS.len()).map(|disk| vec![0; blocks(disk) as usize]).collect();
        let mut next_id = 1;
        if !setup.virgin {
            for disk in 0..DISKS.len() {
                for block in 0..blocks(disk) {
                    if rng.one_in(2) {
                        content[disk][block as usize] = next_id;
                        let bytes = block_content(disk, block, next_id);
                        let inside = (DISKS[disk] - block * BLOCK_BYTES).min(BLOCK_BYTES) as usize;
                        images.write(DiskIndex(disk as u16), block * BLOCK_BYTES, &bytes[..inside]).expect("seed");
                        next_id += 1;
                    }
                }
                images.sync(DiskIndex(disk as u16)).expect("sync");
            }
        }
        let mut harness = Harness {
            medium,
            setup,
            store: None,
            rng,
            now: 1_000_000,
            epoch: 0,
            session: 1,
            next_sequence: 1,
            next_id,
            next_generation: 1,
            generations: BTreeMap::from([(0, content.clone())]),
            content,
            sent: BTreeMap::new(),
            owner: BTreeMap::new(),
            durable: BTreeSet::new(),
            kept: Vec::new(),
            newest: 0,
            shared: None,
            pinned: None,
            told: std::env::var_os("REPLICA_SEED").is_some(),
            crashes: 0,
            commits: 0,
        };
        harness.medium.set_capacity("meta", harness.setup.capacity);
        harness.create();
        harness
    }

    fn options(&self) -> Options {
        Options { journal: self.setup.journal, policy: self.setup.policy.clone(), ..Options::default() }
    }

    fn seams(&self) -> (SimStorage, StorageImages<SimStorage>) {
        (self.medium.folder("meta"), StorageImages { storage: self.medium.folder("images") })
    }

    fn create(&mut self) {
        let (meta, images) = self.seams();
        let created = Store::create(meta, images, Box::new(Short), self.options(), [9; 16], &DISKS, self.setup.virgin);
        let mut store = created.expect("create");
        store.set_session(Session(self.session)).expect("session");
        self.store = Some(store);
    }

    fn store(&mut self) -> &mut Store {
        self.store.as_mut().expect("the replica is open")
    }

    /// Open the folder again, also if power is lost meanwhile, and check everything that must hold.
    fn reopen(&mut self, step: Option<&Step>, survival: Survival) {
        self.store = None;
        while let Err(error) = self.open() {
            assert!(self.medium.is_off(), "cannot open after {step:?}: {error}");
            self.crashes += 1;
            let medium = self.medium.clone();
            medium.lose_power(survival, &mut self.rng);
        }
        self.reconcile(step);
        self.check();
        let session = Session(self.session);
        if let Err(error) = self.store().set_session(session) {
            assert!(self.medium.is_off(), "no session after {step:?}: {error}");
            let medium = self.medium.clone();
            medium.lose_power(survival, &mut self.rng);
            return self.reopen(None, survival);
        }
        let has: BTreeSet<u64> = self.staged();
        for sequence in &self.durable {
            assert!(has.contains(sequence), "durable frame {sequence} is lost after {step:?}");
        }
        if let Some(pinned) = self.pinned.take()
            && self.kept.contains(&pinned)
        {
            self.pin(pinned);
        }
        if matches!(step, Some(Step::RaiseFloor)) {
            // Frames of a lower epoch are refused now. What there is no room for is sent at the commit.
            let _ = self.new_session();
        }
    }

    fn open(&mut self) -> Outcome {
        let (meta, images) = self.seams();
        let opened = Store::open(meta, images, Box::new(Short), self.options())?;
        self.store = Some(opened.expect("the manifest is there"));
        Ok(())
    }

    fn pin(&mut self, number: u64) {
        let mark = self.mark(number);
        self.store().pin(mark.generation).expect("pin");
        self.pinned = Some(number);
    }

    fn mark(&mut self, number: u64) -> Mark {
        let kept = self.store().kept();
        *kept.iter().find(|mark| mark.generation.number.0 == number).expect("kept")
    }

    fn staged(&mut self) -> BTreeSet<u64> {
        let session = self.session;
        let staged = self.store().staged();
        let own = staged.iter().filter(|staged| staged.session == Session(session));
        own.flat_map(|staged| &staged.ranges).flat_map(|(first, last)| first.0..=last.0).collect()
    }

    /// After a crash during `step`: what it was about to do may have happened or not.
    fn reconcile(&mut self, step: Option<&Step>) {
        let newest = generation(self.store().manifest().newest);
        let kept: Vec<u64> = self.store().kept().iter().map(|mark| mark.generation.number.0).collect();
        let shared = self.store().manifest().shared.map(|generation| generation.number.0);
        let before = std::mem::replace(&mut self.kept, kept.clone());
        match step {
            Some(Step::Commit) if newest == self.next_generation => self.committed(),
            Some(Step::Promote { .. }) if newest != self.newest => self.promoted(newest),
            Some(Step::RaiseFloor) => self.epoch = self.store().manifest().floor,
            Some(Step::Share) if shared != self.shared => {
                assert_eq!(shared, Some(self.newest), "shared generation after {step:?}");
                self.shared = shared;
            }
            _ => {}
        }
        assert_eq!(newest, self.newest, "newest generation after {step:?}");
        assert_eq!(shared, self.shared, "shared generation after {step:?}");
        let lost: Vec<u64> = before.iter().copied().filter(|number| !kept.contains(number)).collect();
        let bounded = self.setup.capacity.is_some() || !self.setup.policy.keeps_history();
        let may_lose = bounded || matches!(step, Some(Step::Retain | Step::Promote { .. }));
        assert!(lost.is_empty() || may_lose, "generations {lost:?} were lost by {step:?}");
        self.check_protected(&lost);
    }

    fn check_protected(&self, lost: &[u64]) {
        for number in lost {
            assert_ne!(Some(*number), self.shared, "the newest shared generation is gone");
            assert_ne!(Some(*number), self.pinned, "a generation in use is gone");
        }
    }

    /// Compare every kept generation with the model.
    pub fn check(&mut self) {
        let kept = self.store().kept();
        let numbers: Vec<u64> = kept.iter().map(|mark| mark.generation.number.0).collect();
        assert!(numbers.windows(2).all(|pair| pair[0] > pair[1]), "kept out of order: {numbers:?}");
        assert_eq!(numbers.first().copied().unwrap_or(0), self.newest, "the newest is readable");
        for mark in kept {
            let number = mark.generation.number.0;
            let expected = self.generations[&number].clone();
            self.compare(Some(mark.generation), &expected, number);
        }
        if self.newest == 0 && !self.setup.virgin {
            let expected = self.generations[&0].clone();
            self.compare(None, &expected, 0);
        }
    }

    fn compare(&mut self, at: Option<Generation>, expected: &Content, number: u64) {
        for (disk, ids) in expected.iter().enumerate() {
            let mut found = vec![0; DISKS[disk] as usize];
            let read = self.store().read_at(at, DiskIndex(disk as u16), 0, &mut found);
            read.unwrap_or_else(|error| panic!("generation {number}: {error}"));
            for (block, id) in ids.iter().enumerate() {
                let want = block_content(disk, block as u64, *id);
                let from = block * BLOCK;
                let to = (from + BLOCK).min(found.len());
                assert!(
                    found[from..to] == want[..to - from],
                    "generation {number}, disk {disk}, block {block}: not what was committed"
                );
            }
        }
    }

    /// Run one step; a loss of power within it is survived, other failures are the step's.
    pub fn run(&mut self, step: &Step, survival: Survival) {
        let outcome = self.perform(step, survival);
        if self.told {
            let newest = self.newest;
            eprintln!("{step:?}: {outcome:?}, {} operations, newest {newest}", self.medium.operations());
        }
        if self.medium.is_off() {
            if self.told {
                eprintln!("power lost, {survival:?} survives; source has {:?}", self.sent.keys());
            }
            self.crashes += 1;
            let medium = self.medium.clone();
            medium.lose_power(survival, &mut self.rng);
            self.reopen(Some(step), survival);
            return;
        }
        match outcome {
            Ok(()) => {}
            Err(ReplicaError::Full { .. } | ReplicaError::ApplyFirst | ReplicaError::RollingBack) => {
                assert_ne!(self.store().poisoned(), Some(""), "want of room must not poison");
            }
            Err(ReplicaError::JournalTooSmall { .. }) => {}
            Err(error) => panic!("{step:?}: {error}"),
        }
        let kept: Vec<u64> = self.store().kept().iter().map(|mark| mark.generation.number.0).collect();
        let lost: Vec<u64> = self.kept.iter().copied().filter(|number| !kept.contains(number)).collect();
        self.kept = kept;
        self.check_protected(&lost);
    }

    /// Lose power now, between two steps.
    pub fn power_cycle(&mut self, survival: Survival) {
        self.crashes += 1;
        let medium = self.medium.clone();
        medium.lose_power(survival, &mut self.rng);
        self.reopen(None, survival);
    }

    fn perform(&mut self, step: &Step, survival: Survival) -> Outcome {
        self.now += 60;
        let budget = |blocks: u64| blocks * BLOCK_BYTES;
        match step {
            Step::Write { disk, extents, compress } => self.write(*disk, extents, *compress),
            Step::Zero { disk, extent } => self.zero(*disk, *extent),
            Step::Same { disk, extent } => self.same(*disk, *extent),
            Step::Sync => self.sync(),
            Step::Commit => self.commit(),
            Step::Apply { blocks } => self.store().apply_step(budget(*blocks)).map(|_| ()),
            Step::ApplyAll => self.apply_all(),
            Step::Retain => self.retain(),
            Step::Promote { back } => self.promote(*back),
            Step::Restart => {
                self.reopen(Some(step), survival);
                Ok(())
            }
            Step::Session => self.new_session(),
            Step::RaiseFloor => self.raise_floor(),
            Step::Share => self.share(),
            Step::Pin { back } => {
                if self.pinned.is_none() && !self.kept.is_empty() {
                    self.pin(self.kept[back % self.kept.len()]);
                }
                Ok(())
            }
            Step::Unpin => {
                if let Some(number) = self.pinned.take() {
                    let unpinned =
                        Generation { number: GenerationNumber(number), epoch: self.mark(number).generation.epoch };
                    self.store().unpin(unpinned);
                }
                Ok(())
            }
            Step::Supersede => self.supersede(),
        }
    }

    fn id(&mut self) -> FrameId {
        let sequence = Sequence(self.next_sequence);
        self.next_sequence += 1;
        FrameId { epoch: self.epoch, session: Session(self.session), sequence }
    }

    fn write(&mut self, disk: usize, extents: &[Extent], compress: bool) -> Outcome {
        let mut triples = Vec::new();
        for extent in extents {
            for block in extent.start.0..extent.end().0 {
                let id = self.next_id;
                self.next_id += 1;
                self.content[disk][block as usize] = id;
                triples.push((block, id));
            }
        }
        self.send_data(disk, extents, &triples, compress)
    }

    fn send_data(&mut self, disk: usize, extents: &[Extent], triples: &[(u64, u64)], compress: bool) -> Outcome {
        let content: Vec<u8> = triples.iter().flat_map(|(block, id)| block_content(disk, *block, *id)).collect();
        let short: Vec<u8> =
            triples.iter().flat_map(|(block, id)| [disk as u64, *block, *id]).flat_map(u64::to_le_bytes).collect();
        let id = self.id();
        let compressed = compress.then_some(&short[..]);
        let header = FrameHeader::data(id, DiskIndex(disk as u16), extents.to_vec(), &content, compressed);
        let payload = if compress { short } else { content };
        self.send(header.expect("header"), payload)
    }

    fn zero(&mut self, disk: usize, extent: Extent) -> Outcome {
        for block in extent.start.0..extent.end().0 {
            self.content[disk][block as usize] = 0;
        }
        let header = FrameHeader::zero(self.id(), DiskIndex(disk as u16), vec![extent]).expect("header");
        self.send(header, Vec::new())
    }

    /// Sound only where nothing was staged since the last commit; elsewhere the replica must refuse.
    fn same(&mut self, disk: usize, extent: Extent) -> Outcome {
        let blocks: Vec<u64> = (extent.start.0..extent.end().0).collect();
        let content: Vec<u8> =
            blocks.iter().flat_map(|block| block_content(disk, *block, self.content[disk][*block as usize])).collect();
        let index = DiskIndex(disk as u16);
        let digest = content_digest(index, &[extent], &content);
        let header = FrameHeader::same(self.id(), index, vec![extent], digest).expect("header");
        let committed = &self.generations[&self.newest][disk];
        let changed = blocks.iter().any(|block| committed[*block as usize] != self.content[disk][*block as usize]);
        match self.send(header, Vec::new()) {
            Err(ReplicaError::NotSame(_)) => {
                assert!(changed || self.newest == 0, "the same content was refused");
                Ok(())
            }
            Ok(()) => {
                assert!(!changed || self.newest == 0, "another content was taken for the same");
                Ok(())
            }
            other => other,
        }
    }

    /// Stage a frame; the source believes it sent even if the answer never came.
    fn send(&mut self, header: FrameHeader, payload: Vec<u8>) -> Outcome {
        let sequence = header.sequence.0;
        let disk = usize::from(header.disk.0);
        let extents = header.extents.iter();
        let blocks: Vec<(usize, u64)> =
            extents.flat_map(|extent| extent.start.0..extent.end().0).map(|block| (disk, block)).collect();
        let sent = Sent { header, payload, blocks };
        let staged = self.stage(&sent);
        if matches!(staged, Err(ReplicaError::NotSame(_))) {
            return staged;
        }
        for place in &sent.blocks {
            self.owner.insert(*place, sequence);
        }
        self.sent.insert(sequence, sent);
        staged
    }

    fn stage(&mut self, sent: &Sent) -> Outcome {
        let (decoded, _) = FrameHeader::decode(&sent.header.encode()).expect("decodes");
        let frame = Frame::check(decoded, &sent.payload, &Short).expect("good frame");
        self.store().stage(&frame)
    }

    fn sync(&mut self) -> Outcome {
        let durable = self.store().sync_staged()?;
        for key in durable {
            if self.sent.contains_key(&key.sequence.0) && key.session.0 == self.session {
                self.durable.insert(key.sequence.0);
            }
        }
        Ok(())
    }

    fn list(&self) -> CommitList {
        let mut entries = Vec::new();
        for (sequence, sent) in &self.sent {
            let mut excluded = Vec::new();
            let mut owned = 0;
            for (index, place) in sent.blocks.iter().enumerate() {
                if self.owner.get(place) == Some(sequence) {
                    owned += 1;
                } else {
                    exclude(&mut excluded, index as u64);
                }
            }
            if owned > 0 {
                let header = &sent.header;
                entries.push(Entry {
                    session: header.session,
                    sequence: header.sequence,
                    crc32: header.crc32,
                    digest: header.digest,
                    excluded,
                });
            }
        }
        let next = Generation { number: GenerationNumber(self.next_generation), epoch: self.epoch };
        let parent = self.store.as_ref().and_then(|store| store.manifest().newest);
        CommitList::new(next, parent.map(|mark| mark.generation).unwrap_or_default(), entries)
    }

    /// Commit, sending again what the replica says it lacks.
    fn commit(&mut self) -> Outcome {
        if self.store().manifest().rolling_back.is_some() {
            return Ok(());
        }
        for _ in 0..6 {
            let list = self.list();
            let now = self.now;
            match self.store().commit(&list, now)? {
                CommitAnswer::Committed => {
                    self.committed();
                    let again = self.store().commit(&list, now)?;
                    assert_eq!(again, CommitAnswer::AlreadyCommitted, "a repetition is a no-op");
                    return Ok(());
                }
                CommitAnswer::Lacks(lacks) => self.send_again(&lacks)?,
                other => panic!("{other:?}"),
            }
        }
        panic!("the replica goes on lacking what it was sent");
    }

    fn send_again(&mut self, lacks: &[Sequence]) -> Outcome {
        let mut outcome = Ok(());
        for Sequence(sequence) in lacks {
            let sent = self.sent.get(sequence).expect("the list named it").clone();
            let is_same = sent.header.kind == FrameKind::Same;
            assert!(is_same || !self.durable.contains(sequence), "durable frame {sequence} lacks");
            match self.stage(&sent) {
                Err(ReplicaError::NotSame(_)) => {
                    // The comparison does not hold any more: the content itself goes, whatever becomes of it.
                    self.durable.remove(sequence);
                    self.sent.remove(sequence);
                    for (disk, block) in sent.blocks {
                        if self.owner.get(&(disk, block)) == Some(sequence) {
                            let id = self.content[disk][block as usize];
                            outcome = outcome.and(self.send_block(disk, block, id));
                        }
                    }
                }
                other => outcome = outcome.and(other),
            }
        }
        outcome
    }

    fn send_block(&mut self, disk: usize, block: u64, id: u64) -> Outcome {
        let extent = Extent::new(block, 1);
        if id == 0 { self.zero(disk, extent) } else { self.send_data(disk, &[extent], &[(block, id)], true) }
    }

    fn committed(&mut self) {
        self.generations.insert(self.next_generation, self.content.clone());
        self.newest = self.next_generation;
        self.next_generation += 1;
        self.sent.clear();
        self.owner.clear();
        self.durable.clear();
        self.commits += 1;
    }

    fn apply_all(&mut self) -> Outcome {
        while self.store().apply_step(8 * BLOCK_BYTES)? != Progress::Idle {}
        Ok(())
    }

    fn retain(&mut self) -> Outcome {
        let now = self.now;
        let kept = self.store().kept();
        let selected = self.setup.policy.select(&kept, now);
        let mut guard = 0;
        while self.store().retain(now)?.more {
            guard += 1;
            assert!(guard < 100, "retention does not end");
        }
        let kept = self.store().kept();
        assert!(
            selected.iter().all(|generation| kept.iter().any(|mark| mark.generation == *generation))
                || self.setup.capacity.is_some(),
            "retention removed what the policy keeps"
        );
        Ok(())
    }

    fn promote(&mut self, back: usize) -> Outcome {
        if self.kept.is_empty() || self.pinned.is_some() || self.store().manifest().rolling_back.is_some() {
            return Ok(());
        }
        let target = self.kept[back % self.kept.len()];
        let goal = self.mark(target).generation;
        let dropped = self.store().promote_to(goal)?;
        let newer: Vec<u64> = self.kept.iter().copied().take_while(|number| *number != target).collect();
        assert_eq!(dropped.iter().map(|generation| generation.number.0).collect::<Vec<u64>>(), newer);
        self.promoted(target);
        Ok(())
    }

    /// The source starts from the generation that the replica went back to.
    fn promoted(&mut self, target: u64) {
        self.newest = target;
        self.next_generation = self.next_generation.max(target + 1) + 1;
        self.content = self.generations[&target].clone();
        self.shared = self.shared.filter(|shared| *shared <= target);
        self.sent.clear();
        self.owner.clear();
        self.durable.clear();
        // A new life of the source; the old staging means nothing to it.
        self.session += 1;
        self.next_sequence = 1;
        let session = Session(self.session);
        if let Some(store) = &mut self.store {
            // May fail with the power off; then the reopening sets it.
            let _ = store.set_session(session);
        }
    }

    /// A new session: blocks that were staged go back to the source's books and are sent again.
    fn new_session(&mut self) -> Outcome {
        let owned: Vec<(usize, u64)> = self.owner.keys().copied().collect();
        self.session += 1;
        self.next_sequence = 1;
        self.sent.clear();
        self.owner.clear();
        self.durable.clear();
        let session = Session(self.session);
        let mut outcome = self.store().set_session(session);
        for (index, (disk, block)) in owned.iter().enumerate() {
            if index % 3 == 0 {
                outcome = outcome.and(self.same(*disk, Extent::new(*block, 1)));
            }
            if !self.owner.contains_key(&(*disk, *block)) {
                // Whatever became of it, the source's books say that it was sent.
                let id = self.content[*disk][*block as usize];
                outcome = outcome.and(self.send_block(*disk, *block, id));
            }
        }
        outcome
    }

    fn raise_floor(&mut self) -> Outcome {
        self.epoch += 1;
        let epoch = self.epoch;
        let raised = self.store().raise_floor(epoch);
        if raised.is_err() && !self.medium.is_off() {
            self.epoch -= 1;
            return raised;
        }
        if self.medium.is_off() {
            return raised;
        }
        self.new_session()
    }

    fn share(&mut self) -> Outcome {
        if self.newest == 0 || self.store().manifest().rolling_back.is_some() {
            return Ok(());
        }
        let newest = self.newest;
        let mark = self.mark(newest);
        self.store().set_shared(mark.generation)?;
        self.shared = Some(newest);
        Ok(())
    }

    fn supersede(&mut self) -> Outcome {
        let dead: Vec<u64> = self
            .sent
            .iter()
            .filter(|(sequence, sent)| sent.blocks.iter().all(|place| self.owner.get(place) != Some(sequence)))
            .map(|(sequence, _)| *sequence)
            .collect();
        for sequence in &dead {
            self.sent.remove(sequence);
            self.durable.remove(sequence);
        }
        let sequences: Vec<Sequence> = dead.into_iter().map(Sequence).collect();
        self.store().supersede(&sequences)
    }

    /// Left in peace, the replica applies everything, and the plain images are the newest generation.
    pub fn finish(&mut self) {
        self.medium.power_off_at(None);
        self.medium.set_capacity("meta", None);
        self.reopen(None, Survival::Nothing);
        self.apply_all().expect("apply");
        self.check();
        assert_eq!(self.store().verify().expect("verify"), []);
        assert_eq!(self.store().state(), ReplicaState::Ready);
        if self.newest == 0 {
            return;
        }
        let expected = self.generations[&self.newest].clone();
        let images = self.store().images().clone();
        for (disk, ids) in expected.iter().enumerate() {
            let mut found = vec![0; DISKS[disk] as usize];
            images.read(DiskIndex(disk as u16), 0, &mut found).expect("read");
            for (block, id) in ids.iter().enumerate() {
                let to = ((block + 1) * BLOCK).min(found.len());
                let want = block_content(disk, block as u64, *id);
                assert!(found[block * BLOCK..to] == want[..to - block * BLOCK], "image of disk {disk}, block {block}");
            }
        }
    }

    /// A random step.
    pub fn random_step(rng: &mut SimRng) -> Step {
        let disk = rng.below(DISKS.len() as u64) as usize;
        let extent = |rng: &mut SimRng| {
            let start = rng.below(blocks(disk));
            Extent::new(start, 1 + rng.below((blocks(disk) - start).min(6)) as u32)
        };
        match rng.below(40) {
            0..=11 => {
                let mut extents = vec![extent(rng)];
                let second = extent(rng);
                if second.start.0 >= extents[0].end().0 {
                    extents.push(second);
                }
                Step::Write { disk, extents, compress: rng.one_in(2) }
            }
            12..=13 => Step::Zero { disk, extent: extent(rng) },
            14..=15 => Step::Same { disk, extent: extent(rng) },
            16..=18 => Step::Sync,
            19..=23 => Step::Commit,
            24..=28 => Step::Apply { blocks: rng.below(6) },
            29..=30 => Step::ApplyAll,
            31..=32 => Step::Retain,
            33 => Step::Promote { back: rng.below(3) as usize },
            34 => Step::Restart,
            35 => Step::Session,
            36 => Step::Share,
            37 => Step::Pin { back: rng.below(3) as usize },
            38 => Step::Unpin,
            _ if rng.one_in(3) => Step::RaiseFloor,
            _ => Step::Supersede,
        }
    }
}
