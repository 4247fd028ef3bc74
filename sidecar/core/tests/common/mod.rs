//! A replica with one small disk on a simulated medium, for tests of single rules.
#![allow(dead_code, clippy::unwrap_used)]

use watari_core::{
    frame::{Frame, FrameHeader, FrameId, RawOnly},
    geometry::{BLOCK_BYTES, DiskIndex, Extent, Generation, GenerationNumber, Sequence, Session},
    replica::{
        CommitAnswer, CommitList, Entry, Options, Policy, ReplicaError, ReplicaStore, StorageImages, list::exclude,
    },
    storage::sim::{SimMedium, SimStorage},
};

pub type Store = ReplicaStore<SimStorage, StorageImages<SimStorage>>;

pub const DISK: DiskIndex = DiskIndex(0);
pub const DISK_BLOCKS: u64 = 64;
pub const SESSION: Session = Session(1);

pub fn options(keep_last: u32) -> Options {
    Options { policy: Policy { keep_last, ..Policy::default() }, ..Options::default() }
}

pub fn seams(medium: &SimMedium) -> (SimStorage, StorageImages<SimStorage>) {
    (medium.folder("meta"), StorageImages { storage: medium.folder("images") })
}

pub fn create(medium: &SimMedium, options: Options, virgin: bool) -> Store {
    let bytes = [DISK_BLOCKS * BLOCK_BYTES];
    let images = StorageImages::create(medium.folder("images"), &bytes).unwrap();
    let meta = medium.folder("meta");
    let mut store = Store::create(meta, images, Box::new(RawOnly), options, [7; 16], &bytes, virgin).unwrap();
    store.set_session(SESSION).unwrap();
    store
}

pub fn try_open(medium: &SimMedium, options: Options) -> Result<Option<Store>, ReplicaError> {
    let (meta, images) = seams(medium);
    Store::open(meta, images, Box::new(RawOnly), options)
}

pub fn open(medium: &SimMedium, options: Options) -> Store {
    let mut store = try_open(medium, options).unwrap().unwrap();
    store.set_session(SESSION).unwrap();
    store
}

pub fn id(sequence: u64) -> FrameId {
    FrameId { epoch: 0, session: SESSION, sequence: Sequence(sequence) }
}

pub fn generation(number: u64) -> Generation {
    if number == 0 { Generation::default() } else { Generation { number: GenerationNumber(number), epoch: 0 } }
}

pub fn entry(header: &FrameHeader, excluded: &[u64]) -> Entry {
    let mut bitmap = Vec::new();
    excluded.iter().for_each(|index| exclude(&mut bitmap, *index));
    let FrameHeader { session, sequence, crc32, digest, .. } = header.clone();
    Entry { session, sequence, crc32, digest, excluded: bitmap }
}

pub fn data(id: FrameId, start: u64, blocks: u32, fill: u8) -> (FrameHeader, Vec<u8>) {
    let content = vec![fill; blocks as usize * BLOCK_BYTES as usize];
    (FrameHeader::data(id, DISK, vec![Extent::new(start, blocks)], &content, None).unwrap(), content)
}

pub fn try_stage(store: &mut Store, header: FrameHeader, payload: &[u8]) -> Result<(), ReplicaError> {
    store.stage(&Frame::check(header, payload, &RawOnly).unwrap())
}

/// Stage blocks filled with one byte and make them durable.
pub fn stage(store: &mut Store, sequence: u64, start: u64, blocks: u32, fill: u8) -> Entry {
    let (header, content) = data(id(sequence), start, blocks, fill);
    try_stage(store, header.clone(), &content).unwrap();
    entry(&header, &[])
}

pub fn commit(store: &mut Store, number: u64, entries: Vec<Entry>) -> CommitAnswer {
    let parent = store.manifest().newest.map(|mark| mark.generation).unwrap_or_default();
    store.commit(&CommitList::new(generation(number), parent, entries), 1000 * number).unwrap()
}

/// The byte that fills a block of a kept generation (0: the newest).
pub fn block(store: &mut Store, number: u64, block: u64) -> u8 {
    let at = (number > 0).then(|| generation(number));
    let mut buf = vec![0; BLOCK_BYTES as usize];
    store.read_at(at, DISK, block * BLOCK_BYTES, &mut buf).unwrap();
    assert!(buf.iter().all(|byte| *byte == buf[0]), "block {block} is torn");
    buf[0]
}

pub fn kept(store: &Store) -> Vec<u64> {
    store.kept().iter().map(|mark| mark.generation.number.0).collect()
}
