//! A seeded life of the engine on real files, the model of what it must hold, and the judge of what a start finds.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use watari_core::{
    frame::{Frame, FrameHeader, FrameId},
    geometry::{BLOCK_BYTES, DiskIndex, Extent, Generation, GenerationNumber, Sequence, Session},
    replica::{CommitAnswer, CommitList, Entry, JournalLimits, Options, Policy, ReplicaError, ReplicaStore, list},
    storage::sim::SimRng,
};
use watari_store::{
    folder::{DiskImages, Folder},
    replica::{FileReplica, Zstd},
};

use crate::trace::{Change, Event, IMAGE, Recorder, Trace};

const BLOCKS: u64 = 24;
/// The disk ends within its last block.
const DISK_BYTES: u64 = (BLOCKS - 1) * BLOCK_BYTES + 1000;
const DISK: DiskIndex = DiskIndex(0);
const STEPS: u32 = 60;

/// What the test knows between two calls.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Note {
    Created,
    /// Frames of this session count from now on.
    Session(u64),
    /// These frames were answered as durable.
    Durable(Vec<u64>),
    /// A commit, a roll-back, a step that may drop generations begins.
    Commits(u64),
    RollsTo(u64),
    Retains,
    /// It is over, and this is what is kept, newest first.
    Keeps(Vec<u64>),
}

/// What must be found after a loss of power.
#[derive(Default)]
pub struct Knows {
    created: bool,
    kept: Vec<u64>,
    session: u64,
    durable: BTreeSet<u64>,
    under_way: Option<Note>,
}

impl Knows {
    pub fn hear(&mut self, event: &Event<Note>) {
        let Event::Note(note) = event else { return };
        match note {
            Note::Created => self.created = true,
            Note::Session(session) => {
                self.session = *session;
                self.durable.clear();
            }
            Note::Durable(sequences) => self.durable.extend(sequences),
            Note::Commits(_) | Note::RollsTo(_) | Note::Retains => self.under_way = Some(note.clone()),
            Note::Keeps(kept) => {
                if self.kept.first() != kept.first() {
                    self.durable.clear();
                }
                (self.kept, self.under_way) = (kept.clone(), None);
            }
        }
    }

    fn newest(&self) -> u64 {
        self.kept.first().copied().unwrap_or(0)
    }
}

/// One byte for each block.
type Content = Vec<u8>;

/// A life that was lived, with its record.
pub struct Life {
    seed: u64,
    model: BTreeMap<u64, Content>,
    pub events: Vec<Event<Note>>,
}

struct Living {
    store: ReplicaStore<Recorder<Folder, Note>, Recorder<DiskImages, Note>>,
    trace: Trace<Note>,
    content: Content,
    sent: BTreeMap<u64, (Entry, Vec<u64>)>,
    owner: BTreeMap<u64, u64>,
    model: BTreeMap<u64, Content>,
    session: u64,
    sequence: u64,
    next: u64,
}

fn virgin(seed: u64) -> bool {
    seed.is_multiple_of(2)
}

fn first_content(seed: u64) -> Content {
    (0..BLOCKS).map(|block| if virgin(seed) || block % 3 == 0 { 0 } else { 200 + block as u8 }).collect()
}

fn bytes(content: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = content.iter().flat_map(|fill| vec![*fill; BLOCK_BYTES as usize]).collect();
    bytes.truncate(DISK_BYTES as usize);
    bytes
}

fn options() -> Options {
    let journal = JournalLimits { segment_bytes_max: 24 << 10, journal_bytes_max: 4 << 20 };
    Options { journal, policy: Policy { keep_last: 3, ..Policy::default() }, ..Options::default() }
}

fn generation(number: u64) -> Generation {
    Generation { epoch: 0, number: GenerationNumber(number) }
}

impl Life {
    /// Live it; the call `fails_at` fails, and nothing may be asked after it.
    pub fn live(seed: u64, fails_at: Option<usize>) -> Life {
        let root = tempfile::tempdir().expect("tempdir");
        std::fs::write(root.path().join(IMAGE), bytes(&first_content(seed))).expect("image");
        let trace = Trace::new(fails_at);
        let meta = Recorder { real: Folder::open(root.path()).expect("folder"), trace: trace.clone() };
        let images = DiskImages::open(&[root.path().join(IMAGE)], false).expect("images");
        let images = Recorder { real: images, trace: trace.clone() };
        let created =
            ReplicaStore::create(meta, images, Box::new(Zstd), options(), [7; 16], &[DISK_BYTES], virgin(seed));
        let mut model = BTreeMap::from([(0, first_content(seed))]);
        if let Ok(store) = created {
            trace.note(Note::Created);
            let (content, next) = (first_content(seed), 1);
            let (sent, owner) = Default::default();
            let mut living =
                Living { store, trace: trace.clone(), content, sent, owner, model, session: 0, sequence: 1, next };
            let outcome = living.go_on(&mut SimRng(seed));
            assert_eq!(outcome.is_err(), fails_at.is_some(), "{outcome:?}");
            model = living.model;
        }
        let events = trace.events();
        if let Some(at) = events.iter().position(|event| matches!(event, Event::Failed)) {
            let taken =
                |e: &Event<Note>| matches!(e, Event::Note(_) | Event::Removed(_) | Event::Change(_, Change::Length(_)));
            let after = events[at + 1..].iter().find(|event| !taken(event));
            // What is not durable may still be taken away: the half-written end of a file, or the file. Nothing else is asked.
            assert!(after.is_none(), "asked after a failure: {after:?}");
        }
        Life { seed, model, events }
    }

    pub fn commits(&self) -> usize {
        self.model.len() - 1
    }

    pub fn first_image(&self) -> Vec<u8> {
        bytes(&first_content(self.seed))
    }

    /// Open what a loss of power left, by the code that a sidecar opens it with, and look at everything.
    pub fn check(&self, root: &Path, knows: &Knows) {
        let open = || {
            let folder = Folder::open(&root.join("meta")).expect("folder");
            let images = DiskImages::open(&[root.join(IMAGE)], false).expect("images");
            FileReplica::open(folder, images, Box::new(Zstd), options())
                .unwrap_or_else(|e| panic!("does not open: {e}"))
        };
        let image = || std::fs::read(root.join(IMAGE)).expect("image");
        let Some(mut store) = open() else {
            assert!(!knows.created, "the replica is gone");
            assert!(image() == self.first_image(), "there is no replica, and the image was written to");
            return;
        };
        store.set_session(Session(knows.session)).expect("session");
        let kept: Vec<u64> = store.kept().iter().map(|mark| mark.generation.number.0).collect();
        let newest = kept.first().copied().unwrap_or(0);
        let may_be = match knows.under_way {
            Some(Note::Commits(number) | Note::RollsTo(number)) => number,
            _ => knows.newest(),
        };
        assert!(newest == knows.newest() || newest == may_be, "newest is {newest}, not {} or {may_be}", knows.newest());
        let drops = matches!(knows.under_way, Some(Note::RollsTo(_) | Note::Retains));
        let lost: Vec<&u64> = knows.kept.iter().filter(|number| !kept.contains(number)).collect();
        assert!(lost.is_empty() || drops, "generations {lost:?} were kept and are gone");
        for number in &kept {
            assert!(
                self.reads(&mut store, Some(generation(*number))) == bytes(&self.model[number]),
                "generation {number}"
            );
        }
        if newest == 0 && !virgin(self.seed) {
            assert!(self.reads(&mut store, None) == self.first_image(), "before the first commit");
        }
        if newest == knows.newest() {
            let staged = store.staged();
            let of_ours = staged.iter().filter(|s| s.session == Session(knows.session));
            let staged: BTreeSet<u64> = of_ours.flat_map(|s| &s.ranges).flat_map(|(a, b)| a.0..=b.0).collect();
            let lost: Vec<_> = knows.durable.difference(&staged).collect();
            assert!(lost.is_empty(), "frames {lost:?} were answered as durable and are gone");
        }
        store.apply_all().expect("apply");
        assert_eq!(store.verify().expect("verify"), []);
        if newest != 0 {
            assert!(image() == bytes(&self.model[&newest]), "the image is not generation {newest}");
        }
        // And it goes on: one more generation, opened once more.
        let (next, id) = (newest + 1000, (knows.session, 1 << 40));
        let entry = stage(&mut store, id, Extent::new(3, 2), 99).expect("staged");
        let parent = if newest == 0 { Generation::default() } else { generation(newest) };
        let answer = store.commit(&CommitList::new(generation(next), parent, vec![entry]), next).expect("commit");
        assert_eq!(answer, CommitAnswer::Committed);
        drop(store);
        let mut store = open().expect("a replica");
        let mut content = self.model[&newest].clone();
        content[3..5].fill(99);
        assert!(self.reads(&mut store, None) == bytes(&content), "it does not go on");
    }

    fn reads(&self, store: &mut FileReplica, at: Option<Generation>) -> Vec<u8> {
        let mut found = vec![0; DISK_BYTES as usize];
        store.read_at(at, DISK, 0, &mut found).unwrap_or_else(|e| panic!("{at:?}: {e}"));
        found
    }
}

/// Stage blocks filled with `fill` (0: a zero frame) under a session and a sequence.
fn stage<M, D>(store: &mut ReplicaStore<M, D>, id: (u64, u64), extent: Extent, fill: u8) -> Result<Entry, ReplicaError>
where
    M: watari_core::storage::Storage,
    D: watari_core::replica::Images,
{
    let (session, sequence) = (Session(id.0), Sequence(id.1));
    let id = FrameId { epoch: 0, session, sequence };
    let last = extent.end().0 == BLOCKS;
    let mut content = vec![fill; (u64::from(extent.blocks) * BLOCK_BYTES) as usize];
    if last {
        let inside = content.len() - (BLOCKS * BLOCK_BYTES - DISK_BYTES) as usize;
        content[inside..].fill(0);
    }
    let compressed = (sequence.0 % 2 == 0).then(|| zstd::bulk::compress(&content, 1).expect("zstd"));
    let (header, payload) = if fill == 0 {
        (FrameHeader::zero(id, DISK, vec![extent]), Vec::new())
    } else {
        let header = FrameHeader::data(id, DISK, vec![extent], &content, compressed.as_deref());
        (header, compressed.unwrap_or(content))
    };
    let header = header.expect("header");
    let (decoded, _) = FrameHeader::decode(&header.encode()).expect("decodes");
    store.stage(&Frame::check(decoded, &payload, &Zstd).expect("good frame"))?;
    let (crc32, digest) = (header.crc32, header.digest);
    Ok(Entry { session, sequence, crc32, digest, excluded: Vec::new() })
}

impl Living {
    fn go_on(&mut self, random: &mut SimRng) -> Result<(), ReplicaError> {
        self.new_session()?;
        for _ in 0..STEPS {
            match random.below(16) {
                0..=5 => self.write(random)?,
                6..=7 => self.sync()?,
                8..=10 => self.commit()?,
                11..=12 => drop(self.store.apply_step(random.below(6) * BLOCK_BYTES)?),
                13 => self.store.apply_all()?,
                14 => self.retain()?,
                _ => self.roll_back(random)?,
            }
        }
        self.commit()?;
        self.store.apply_all()
    }

    fn new_session(&mut self) -> Result<(), ReplicaError> {
        self.session += 1;
        (self.sent, self.owner) = Default::default();
        self.trace.note(Note::Session(self.session));
        self.store.set_session(Session(self.session))
    }

    fn keeps(&self) {
        self.trace.note(Note::Keeps(self.kept()));
    }

    fn kept(&self) -> Vec<u64> {
        self.store.kept().iter().map(|mark| mark.generation.number.0).collect()
    }

    fn write(&mut self, random: &mut SimRng) -> Result<(), ReplicaError> {
        let start = random.below(BLOCKS);
        let extent = Extent::new(start, 1 + random.below((BLOCKS - start).min(6)) as u32);
        let fill = if random.below(6) == 0 { 0 } else { (self.sequence % 190) as u8 + 1 };
        let sequence = self.sequence;
        self.sequence += 1;
        let blocks: Vec<u64> = (extent.start.0..extent.end().0).collect();
        for block in &blocks {
            self.content[*block as usize] = fill;
            self.owner.insert(*block, sequence);
        }
        let entry = stage(&mut self.store, (self.session, sequence), extent, fill)?;
        self.sent.insert(sequence, (entry, blocks));
        Ok(())
    }

    fn sync(&mut self) -> Result<(), ReplicaError> {
        let durable = self.store.sync_staged()?;
        self.trace.note(Note::Durable(durable.iter().map(|key| key.sequence.0).collect()));
        Ok(())
    }

    fn commit(&mut self) -> Result<(), ReplicaError> {
        if self.store.manifest().rolling_back.is_some() {
            self.store.apply_all()?;
        }
        let mut entries = Vec::new();
        for (sequence, (entry, blocks)) in &self.sent {
            let mut entry = entry.clone();
            let foreign = |(_, block): &(usize, &u64)| self.owner.get(block) != Some(sequence);
            let excluded: Vec<usize> = blocks.iter().enumerate().filter(foreign).map(|(index, _)| index).collect();
            excluded.iter().for_each(|index| list::exclude(&mut entry.excluded, *index as u64));
            if excluded.len() < blocks.len() {
                entries.push(entry);
            }
        }
        let parent = self.store.manifest().newest.map(|mark| mark.generation).unwrap_or_default();
        let number = self.next;
        self.model.insert(number, self.content.clone());
        self.next += 1;
        self.trace.note(Note::Commits(number));
        let answer = self.store.commit(&CommitList::new(generation(number), parent, entries), 1000 + number)?;
        assert_eq!(answer, CommitAnswer::Committed);
        (self.sent, self.owner) = Default::default();
        self.keeps();
        Ok(())
    }

    fn retain(&mut self) -> Result<(), ReplicaError> {
        self.trace.note(Note::Retains);
        while self.store.retain(5000)?.more {}
        self.keeps();
        Ok(())
    }

    /// Back to an older kept generation; the source begins anew.
    fn roll_back(&mut self, random: &mut SimRng) -> Result<(), ReplicaError> {
        let kept = self.kept();
        if kept.is_empty() || self.store.manifest().rolling_back.is_some() {
            return Ok(());
        }
        let goal = kept[random.below(kept.len() as u64) as usize];
        self.trace.note(Note::RollsTo(goal));
        self.store.promote_to(generation(goal))?;
        self.keeps();
        self.store.apply_all()?;
        self.content = self.model[&goal].clone();
        self.new_session()
    }
}
