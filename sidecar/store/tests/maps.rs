//! The map memory as a worker, its successor and its supervisor see it: what survives, what is refused, what it costs.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Instant;

use tempfile::TempDir;
use watari_core::geometry::{Block, DiskIndex};
use watari_core::regions::PairId;
use watari_core::tracker::{Admission, MapName, Maps, Tracker};
use watari_store::maps::{BootId, LEAVES_MAX, MapError, MapIdentity, MapMemory, MapRefused, Opened};

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const DISK: DiskIndex = DiskIndex(0);

fn memory_folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a folder on tmpfs")
}

fn identity(sizes: &[u64]) -> MapIdentity {
    MapIdentity { pair: PairId([5; 16]), boot: BootId::current().expect("boot id"), sizes: sizes.into() }
}

fn mark(maps: &MapMemory, disk: DiskIndex, block: u64) {
    maps.ensure_leaf(disk, Block(block)).expect("memory");
    maps.bitmap(disk, MapName::First)[(block / 64) as usize].fetch_or(1 << (block % 64), SeqCst);
}

fn marked(maps: &MapMemory, disk: DiskIndex, block: u64) -> bool {
    maps.bitmap(disk, MapName::First)[(block / 64) as usize].load(SeqCst) >> (block % 64) & 1 == 1
}

#[test]
fn marks_and_facts_are_found_again_by_the_next_worker() {
    let folder = memory_folder();
    let id = identity(&[10 * GIB, 4096, 3 * GIB + 512]);
    let (maps, opened) = MapMemory::open_or_create(folder.path(), &id).expect("map");
    assert_eq!(opened, Opened::New(MapRefused::Missing));
    for (disk, block) in [(0, 0), (0, 2_621_439), (1, 0), (2, 786_432)] {
        mark(&maps, DiskIndex(disk), block);
    }
    maps.facts().set_session(77);
    maps.facts().set_untracked(true);
    drop(maps);
    let (maps, opened) = MapMemory::open_or_create(folder.path(), &id).expect("map");
    assert_eq!(opened, Opened::Existing);
    for (disk, block) in [(0, 0), (0, 2_621_439), (1, 0), (2, 786_432)] {
        assert!(marked(&maps, DiskIndex(disk), block));
    }
    let marks: u32 =
        (0..3).flat_map(|d| maps.bitmap(DiskIndex(d), MapName::First)).map(|w| w.load(SeqCst).count_ones()).sum();
    assert_eq!(marks, 4, "and nothing else");
    assert_eq!(maps.facts().session(), 77);
    assert!(maps.facts().untracked());
    MapMemory::remove(folder.path(), id.pair).expect("removed");
    MapMemory::remove(folder.path(), id.pair).expect("removing twice is fine");
    assert!(matches!(MapMemory::open(folder.path(), &id), Ok(Err(MapRefused::Missing))));
}

#[test]
fn a_file_that_is_not_this_map_is_refused_with_the_reason() {
    let folder = memory_folder();
    let id = identity(&[GIB, 2 * GIB]);
    let path = MapMemory::path(folder.path(), id.pair);
    let refused = |id: &MapIdentity| match MapMemory::open(folder.path(), id).expect("readable") {
        Err(refused) => refused,
        Ok(_) => panic!("believed"),
    };
    let damage = |at: u64, bytes: &[u8]| {
        MapMemory::create(folder.path(), &id).expect("map");
        let file = OpenOptions::new().write(true).open(&path).expect("file");
        file.write_all_at(bytes, at).expect("written");
        refused(&id)
    };
    assert_eq!(damage(0, b"x"), MapRefused::Magic);
    assert_eq!(damage(8, &9u64.to_le_bytes()), MapRefused::Version { found: 9 });
    assert_eq!(damage(16, b"other"), MapRefused::Checksum);
    assert_eq!(damage(64, &u64::MAX.to_le_bytes()), MapRefused::Checksum);

    MapMemory::create(folder.path(), &id).expect("map");
    let boot = BootId([1; 16]);
    assert_eq!(refused(&MapIdentity { boot, ..id.clone() }), MapRefused::Boot);
    let sizes = vec![GIB, 3 * GIB];
    assert!(matches!(refused(&MapIdentity { sizes, ..id.clone() }), MapRefused::Sizes { .. }));
    let other = PairId([6; 16]);
    std::fs::copy(&path, MapMemory::path(folder.path(), other)).expect("copied");
    let foreign = refused(&MapIdentity { pair: other, ..id.clone() });
    assert_eq!(foreign, MapRefused::Pair { found: id.pair, expected: other });

    let length = std::fs::metadata(&path).expect("file").len();
    OpenOptions::new().write(true).open(&path).expect("file").set_len(length - 4096).expect("cut");
    assert_eq!(refused(&id), MapRefused::Length { found: length - 4096, expected: length });
    OpenOptions::new().write(true).open(&path).expect("file").set_len(100).expect("cut");
    assert!(matches!(refused(&id), MapRefused::Length { found: 100, .. }));
    std::fs::remove_file(&path).expect("removed");
    assert_eq!(refused(&id), MapRefused::Missing);
    let (_, opened) = MapMemory::open_or_create(folder.path(), &id).expect("map");
    assert_eq!(opened, Opened::New(MapRefused::Missing));
    // A file that another user laid there, and a link to one of ours.
    std::os::unix::fs::chown(&path, Some(65_534), None).expect("tests run as root");
    assert_eq!(refused(&id), MapRefused::Owner);
    let elsewhere = folder.path().join("elsewhere");
    std::fs::rename(&path, &elsewhere).expect("moved");
    std::os::unix::fs::symlink(&elsewhere, &path).expect("link");
    assert!(matches!(MapMemory::open(folder.path(), &id), Err(MapError::Io(..))), "links are not followed");
}

#[test]
fn a_folder_on_a_disk_is_refused_and_left_empty() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
    let made = MapMemory::create(folder.path(), &identity(&[GIB]));
    assert!(matches!(made, Err(MapError::NotMemory(_))), "the build folder is not on tmpfs");
    assert_eq!(std::fs::read_dir(folder.path()).expect("folder").count(), 0);
}

#[test]
fn a_map_belongs_to_its_start_also_when_killed_while_the_next_is_recorded() {
    let folder = memory_folder();
    let maps = MapMemory::create(folder.path(), &identity(&[GIB])).expect("map");
    maps.facts().confirm_start(11);
    assert!(maps.facts().belongs_to_start(11) && !maps.facts().belongs_to_start(12));
    maps.facts().begin_start(12);
    assert!(maps.facts().belongs_to_start(11), "killed before the record was written");
    assert!(maps.facts().belongs_to_start(12), "killed after");
    maps.facts().confirm_start(12);
    assert!(!maps.facts().belongs_to_start(11));
}

#[test]
fn memory_follows_what_is_dirty_and_is_given_back() {
    let folder = memory_folder();
    let maps = MapMemory::create(folder.path(), &identity(&[TIB])).expect("map");
    let resident = || maps.resident_bytes().expect("resident");
    let empty = resident();
    assert!(empty <= 16 << 10, "an empty map of 1 TiB holds {empty} bytes");
    // 1 % of the disk in ten clusters.
    let per_cluster = TIB / 4096 / 1000;
    for cluster in 0..10 {
        for block in 0..per_cluster {
            mark(&maps, DISK, cluster * 26_843_545 + block);
        }
    }
    let clustered = resident();
    assert!(clustered <= 2 << 20, "1 % of 1 TiB in ten clusters holds {clustered} bytes");
    // Reading everything takes no memory.
    let marks: u64 = maps.bitmap(DISK, MapName::First).iter().map(|w| u64::from(w.load(SeqCst).count_ones())).sum();
    assert_eq!(marks, 10 * per_cluster);
    maps.bitmap(DISK, MapName::Staged).iter().for_each(|w| assert_eq!(w.load(SeqCst), 0));
    assert_eq!(resident(), clustered);
    assert!(maps.find_clean_leaves().is_empty());
    for block in maps.present_leaves(DISK).collect::<Vec<_>>() {
        let words = &maps.bitmap(DISK, MapName::First)[(block.0 / 64) as usize..];
        words.iter().take(maps.leaf_blocks() as usize / 64).for_each(|w| w.store(0, SeqCst));
    }
    let busy = Block(0);
    loop {
        let clean = maps.find_clean_leaves();
        let released = maps.release_clean_leaves(&clean, |_, first, _| first != busy).expect("released");
        if released == 0 {
            break;
        }
    }
    assert_eq!(maps.present_leaves(DISK).collect::<Vec<_>>(), [busy], "a leaf with a write in flight stays");
    assert!(!maps.is_ensured(DISK, Block(0), Block(40_000)));
    assert_eq!(resident(), empty + 3 * 4096);
    mark(&maps, DISK, 26_843_545);
    assert!(marked(&maps, DISK, 26_843_545) && !marked(&maps, DISK, 26_843_546));
}

#[test]
fn the_largest_pair_has_a_bounded_number_of_leaves() {
    let folder = memory_folder();
    let sizes = [16 * TIB; 64];
    let maps = MapMemory::create(folder.path(), &identity(&sizes)).expect("map");
    let leaves: u64 = (0..64).map(|d| maps.blocks(DiskIndex(d)).div_ceil(maps.leaf_blocks())).sum();
    assert!(leaves <= LEAVES_MAX as u64);
    let last = maps.blocks(DiskIndex(63)) - 1;
    mark(&maps, DiskIndex(63), last);
    mark(&maps, DiskIndex(0), 0);
    assert!(marked(&maps, DiskIndex(63), last));
    let words = maps.words(DiskIndex(63), MapName::First).len();
    assert!(!maps.absent(DiskIndex(63), MapName::First, words - 1));
    assert!(maps.absent(DiskIndex(62), MapName::First, words - 1));
}

#[test]
#[should_panic(expected = "of a disk of")]
fn a_block_beyond_the_disk_is_a_programmers_error() {
    let folder = memory_folder();
    let maps = MapMemory::create(folder.path(), &identity(&[4096 * 3])).expect("map");
    let _ = maps.ensure_leaf(DISK, Block(3));
}

/// The release protocol with the real tracker: guests mark inside the gate, one task takes marks away and releases.
/// A global clock orders them: a write that began after its block was last taken away must still have its mark.
#[test]
fn releasing_memory_under_load_loses_no_mark() {
    const LEAF: u64 = 32_768;
    const BLOCKS: u64 = 6 * LEAF;
    let folder = memory_folder();
    let tracker = Tracker::new(MapMemory::create(folder.path(), &identity(&[BLOCKS * 4096])).expect("map"));
    let numbers = || (0..BLOCKS).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
    let (clock, began, taken_at) = (AtomicU64::new(1), numbers(), numbers());
    // The guests write to two neighbouring leaves, which wander, so that leaves behind them become clean.
    let hot = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let (mut taken_blocks, mut released) = (0, 0);
    std::thread::scope(|scope| {
        for guest in 0..3u64 {
            let (tracker, stop, clock, began, hot) = (&tracker, &stop, &clock, &began, &hot);
            scope.spawn(move || {
                let mut n = guest;
                while !stop.load(SeqCst) {
                    n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let within = (n >> 33) % (2 * LEAF / 3) * 3 + guest;
                    let block = Block((hot.load(SeqCst) * LEAF + within) % BLOCKS);
                    let at = clock.fetch_add(1, SeqCst);
                    let ticket = loop {
                        tracker.maps().ensure_leaf(DISK, block).expect("memory");
                        match tracker.begin(DISK, block, block, || tracker.maps().is_ensured(DISK, block, block)) {
                            Admission::Go(ticket) => break ticket,
                            Admission::NotLogged => {}
                            Admission::Sealed => unreachable!("nobody seals"),
                        }
                    };
                    began[block.0 as usize].store(at, SeqCst);
                    tracker.finish(ticket);
                }
            });
        }
        let begin = Instant::now();
        while begin.elapsed().as_millis() < 1500 || (released < 30 && begin.elapsed().as_secs() < 30) {
            hot.fetch_add(1, SeqCst);
            for extent in tracker.current_from(DISK, Block(0), u64::MAX) {
                for taken in tracker.take_current(DISK, &[extent]) {
                    let now = clock.load(SeqCst);
                    (taken.start.0..taken.end().0).for_each(|b| taken_at[b as usize].store(now, SeqCst));
                    tracker.unstage(DISK, taken);
                    taken_blocks += u64::from(taken.blocks);
                }
            }
            let clean = tracker.maps().find_clean_leaves();
            released += tracker.with_gate_closed(|| {
                let idle = |disk, first, last| !tracker.any_mark(disk, first, last);
                tracker.maps().release_clean_leaves(&clean, idle).expect("released")
            });
        }
        stop.store(true, SeqCst);
    });
    assert!(
        taken_blocks > 100 && released >= 30,
        "{taken_blocks} taken, {released} released: too little to show anything"
    );
    let mut dirty = 0;
    for block in 0..BLOCKS {
        if began[block as usize].load(SeqCst) >= taken_at[block as usize].load(SeqCst).max(1) {
            assert!(marked(tracker.maps(), DISK, block), "the mark of block {block} is lost");
            dirty += 1;
        }
    }
    println!("{taken_blocks} blocks taken, {released} leaves released, {dirty} marks checked");
}

#[test]
fn the_check_on_every_write_costs_nanoseconds() {
    let folder = memory_folder();
    let maps = MapMemory::create(folder.path(), &identity(&[TIB])).expect("map");
    maps.ensure_leaf(DISK, Block(0)).expect("memory");
    const N: u64 = 5_000_000;
    let begin = Instant::now();
    for n in 0..N {
        maps.ensure_leaf(DISK, Block(std::hint::black_box(n % 32_768))).expect("memory");
    }
    let each = begin.elapsed().as_nanos() as f64 / N as f64;
    println!("ensure_leaf: {each:.1} ns");
    assert!(each < 500.0, "{each} ns; two cores shared with other builds still do better");
}
