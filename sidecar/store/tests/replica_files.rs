//! The replica engine over real files: stage, commit, apply, read, reopen.

use std::path::Path;
use watari_core::{
    frame::{Frame, FrameHeader, FrameId},
    geometry::{BLOCK_BYTES, DiskIndex, Extent, Generation, GenerationNumber, Sequence, Session},
    replica::{CommitAnswer, CommitList, Entry, Event, Options, Policy, ViewCache},
};
use watari_store::{
    folder::{DiskImages, Folder},
    replica::{FileReplica, SharedReplica, Zstd},
};

const DISK_BYTES: u64 = 40 * BLOCK_BYTES + 1000;
const DISK: DiskIndex = DiskIndex(0);

fn options() -> Options {
    Options { policy: Policy { keep_last: 8, ..Policy::default() }, ..Options::default() }
}

fn create(root: &Path, virgin: bool) -> FileReplica {
    let image = root.join("disk.img");
    DiskImages::create_file(&image, DISK_BYTES).expect("image");
    std::fs::create_dir(root.join("meta")).expect("folder");
    let folder = Folder::open(&root.join("meta")).expect("folder");
    let images = DiskImages::open(&[image], false).expect("images");
    let mut store =
        FileReplica::create(folder, images, Box::new(Zstd), options(), [7; 16], &[DISK_BYTES], virgin).expect("create");
    store.set_session(Session(1)).expect("session");
    store
}

fn reopen(root: &Path) -> FileReplica {
    let folder = Folder::open(&root.join("meta")).expect("folder");
    let images = DiskImages::open(&[root.join("disk.img")], false).expect("images");
    let mut store = FileReplica::open(folder, images, Box::new(Zstd), options()).expect("open").expect("a replica");
    store.set_session(Session(1)).expect("session");
    store
}

fn generation(number: u64) -> Generation {
    Generation { number: GenerationNumber(number), epoch: 0 }
}

/// Stage blocks filled with `fill`, compressed; returns the commit entry.
fn stage(store: &mut FileReplica, sequence: u64, start: u64, blocks: u32, fill: u8) -> Entry {
    let content = vec![fill; (u64::from(blocks) * BLOCK_BYTES) as usize];
    let compressed = zstd::bulk::compress(&content, 1).expect("zstd");
    let id = FrameId { epoch: 0, session: Session(1), sequence: Sequence(sequence) };
    let header =
        FrameHeader::data(id, DISK, vec![Extent::new(start, blocks)], &content, Some(&compressed)).expect("header");
    let (decoded, used) = FrameHeader::decode(&header.encode()).expect("decodes");
    assert_eq!((&decoded, used), (&header, header.encode().len()));
    let frame = Frame::check(decoded, &compressed, &Zstd).expect("good frame");
    store.stage(&frame).expect("staged");
    Entry {
        session: Session(1),
        sequence: Sequence(sequence),
        crc32: header.crc32,
        digest: header.digest,
        excluded: vec![],
    }
}

fn commit(store: &mut FileReplica, number: u64, parent: u64, entries: Vec<Entry>) -> CommitAnswer {
    let parent = if parent == 0 { Generation::default() } else { generation(parent) };
    store.commit(&CommitList::new(generation(number), parent, entries), 1000 + number).expect("commit")
}

fn block(store: &mut FileReplica, at: Option<u64>, block: u64) -> u8 {
    let mut buf = [0; 100];
    store.read_at(at.map(generation), DISK, block * BLOCK_BYTES + 7, &mut buf).expect("read");
    assert!(buf.iter().all(|byte| *byte == buf[0]), "block {block} is torn");
    buf[0]
}

#[test]
fn generations_survive_reopening_and_application() {
    let root = tempfile::tempdir().expect("tempdir");
    let mut store = create(root.path(), false);
    let first = stage(&mut store, 1, 0, 10, 1);
    assert_eq!(store.sync_staged().expect("sync").len(), 1);
    assert_eq!(commit(&mut store, 1, 0, vec![first.clone()]), CommitAnswer::Committed);
    assert_eq!(commit(&mut store, 1, 0, vec![first]), CommitAnswer::AlreadyCommitted);
    let second = stage(&mut store, 2, 5, 10, 2);
    assert_eq!(commit(&mut store, 2, 1, vec![second]), CommitAnswer::Committed);
    drop(store);

    let mut store = reopen(root.path());
    assert_eq!([block(&mut store, Some(1), 7), block(&mut store, Some(2), 7), block(&mut store, None, 0)], [1, 2, 1]);
    store.apply_all().expect("apply");
    assert_eq!(store.take_events(), [Event::Applied(generation(1)), Event::Applied(generation(2))]);
    drop(store);

    let mut store = reopen(root.path());
    assert_eq!(
        [block(&mut store, Some(1), 7), block(&mut store, Some(2), 7), block(&mut store, Some(1), 12)],
        [1, 2, 0]
    );
    assert_eq!(store.verify().expect("verify"), []);
    assert_eq!(store.report().journal_live_bytes, 0);
    let image = std::fs::read(root.path().join("disk.img")).expect("image");
    assert_eq!(image.len() as u64, DISK_BYTES);
    assert_eq!((image[0], image[14 * 4096], image[15 * 4096]), (1, 2, 0));

    assert_eq!(store.promote_to(generation(1)).expect("promote"), [generation(2)]);
    store.apply_all().expect("roll back");
    let image = std::fs::read(root.path().join("disk.img")).expect("image");
    assert_eq!((image[0], image[9 * 4096], image[14 * 4096]), (1, 1, 0));
}

#[test]
fn first_synchronisation_goes_straight_into_the_empty_image() {
    let root = tempfile::tempdir().expect("tempdir");
    let mut store = create(root.path(), true);
    let a = stage(&mut store, 1, 0, 10, 1);
    assert_eq!(store.sync_staged().expect("sync").len(), 1);
    assert!(store.report().journal_bytes < 4096, "the payload is not in the journal");
    // The same block again: a record vouches for it, so this one goes through the journal.
    let b = stage(&mut store, 2, 5, 1, 2);
    let a = Entry { excluded: vec![1 << 5], ..a };
    assert_eq!(commit(&mut store, 1, 0, vec![a, b]), CommitAnswer::Committed);
    assert_eq!([block(&mut store, None, 4), block(&mut store, None, 5), block(&mut store, None, 6)], [1, 2, 1]);
    drop(store);
    let mut store = reopen(root.path());
    store.apply_all().expect("apply");
    assert_eq!([block(&mut store, None, 4), block(&mut store, None, 5), block(&mut store, None, 6)], [1, 2, 1]);
}

#[test]
fn a_snapshot_reads_the_same_on_another_thread_while_newer_generations_are_applied() {
    let root = tempfile::tempdir().expect("tempdir");
    let mut store = create(root.path(), false);
    let entry = stage(&mut store, 1, 0, 40, 1);
    assert_eq!(commit(&mut store, 1, 0, vec![entry]), CommitAnswer::Committed);
    store.apply_all().expect("apply");
    let shared = SharedReplica::new(store);
    let snapshot = shared.snapshot(Some(generation(1))).expect("snapshot");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut cache = ViewCache::default();
            let mut buf = vec![0; 40 * BLOCK_BYTES as usize];
            for _ in 0..200 {
                snapshot.read(&mut cache, DISK, 0, &mut buf).expect("read");
                assert!(buf.iter().all(|byte| *byte == 1), "the snapshot changed");
            }
        });
        for number in 2..20 {
            let mut store = shared.lock();
            let entry = stage(&mut store, number, number, 20, number as u8);
            assert_eq!(commit(&mut store, number, number - 1, vec![entry]), CommitAnswer::Committed);
            drop(store);
            for _ in 0..6 {
                shared.lock().apply_step(8 * BLOCK_BYTES).expect("apply");
                std::thread::yield_now();
            }
        }
        reader.join().expect("reader");
    });
}
