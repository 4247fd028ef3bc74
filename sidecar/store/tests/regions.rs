//! The region log against a metadata folder that is slow, full, failing or hung: what a guest write waits, and what is
//! remembered.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use watari_core::geometry::{Block, DiskIndex};
use watari_core::regions::log::{self, LogHeader};
use watari_core::regions::{PairId, REGION_BLOCKS, REGION_BYTES, RegionLayout, RegionSet};
use watari_store::regions::{
    FileMedium, LOG_NAME, LOG_WAIT, LOOK_AHEAD, LeaveError, LogUnusable, Logged, MarksProof, RegionLog, RegionMedium,
    UntrackedReason, UntrackedSink, read_log, within,
};

const PAIR: PairId = PairId([4; 16]);
const DISK: DiskIndex = DiskIndex(0);

fn layout() -> RegionLayout {
    RegionLayout::new(&[REGION_BYTES * 9000, REGION_BYTES * 100]).expect("layout")
}

fn header(log_id: u64) -> LogHeader {
    LogHeader { pair: PAIR, log_id, session: 1, sizes: layout().sizes().into() }
}

/// What the guest would see, and when `Untracked` was entered.
#[derive(Default)]
struct Sink {
    entered: Mutex<Vec<UntrackedReason>>,
    left: AtomicU64,
}

impl UntrackedSink for Sink {
    fn enter(&self, reason: &UntrackedReason) {
        self.entered.lock().expect("lock").push(reason.clone());
    }
    fn leave(&self) {
        self.left.fetch_add(1, SeqCst);
    }
}

/// A medium whose behaviour can be changed while it is used. Shared with the test.
#[derive(Default)]
struct Behaviour {
    hangs: AtomicBool,
    freed: Condvar,
    gate: Mutex<()>,
    /// errno for writes, for syncs; 0 is none.
    write_errno: AtomicU64,
    sync_errno: AtomicU64,
    sync_millis: AtomicU64,
    writes: AtomicU64,
    syncs: AtomicU64,
    invalidated: AtomicU64,
    bytes: Mutex<Vec<u8>>,
}

impl Behaviour {
    fn hang(&self) {
        let mut gate = self.gate.lock().expect("lock");
        while self.hangs.load(SeqCst) {
            gate = self.freed.wait(gate).expect("lock");
        }
    }
    fn free(&self) {
        let _gate = self.gate.lock().expect("lock");
        self.hangs.store(false, SeqCst);
        self.freed.notify_all();
    }
}

struct Faulty(Arc<Behaviour>);

fn errno(number: u64) -> io::Result<()> {
    if number == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(number as i32)) }
}

impl RegionMedium for Faulty {
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.writes.fetch_add(1, SeqCst);
        self.0.hang();
        errno(self.0.write_errno.load(SeqCst))?;
        self.0.bytes.lock().expect("lock")[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }
    fn sync(&mut self) -> io::Result<()> {
        self.0.syncs.fetch_add(1, SeqCst);
        self.0.hang();
        std::thread::sleep(Duration::from_millis(self.0.sync_millis.load(SeqCst)));
        errno(self.0.sync_errno.load(SeqCst))
    }
    fn invalidate(&mut self) {
        self.0.invalidated.fetch_add(1, SeqCst);
    }
}

struct Fixture {
    log: RegionLog,
    medium: Arc<Behaviour>,
    sink: Arc<Sink>,
}

fn medium(regions: &RegionSet, log_id: u64) -> Arc<Behaviour> {
    let bytes = log::encode_file(&header(log_id), &layout(), regions);
    Arc::new(Behaviour { bytes: Mutex::new(bytes), ..Behaviour::default() })
}

fn fixture() -> Fixture {
    let none = RegionSet::none(&layout());
    let medium = medium(&none, 1);
    let sink = Arc::new(Sink::default());
    let log = RegionLog::start(Box::new(Faulty(medium.clone())), 1, layout(), &none, sink.clone()).expect("log");
    Fixture { log, medium, sink }
}

impl Fixture {
    fn ensure(&self, region: u64) -> Logged {
        let block = Block(region * REGION_BLOCKS + 7);
        self.log.ensure_logged(DISK, block, block)
    }
    fn in_file(&self, region: u64) -> bool {
        let bytes = self.medium.bytes.lock().expect("lock");
        log::decode_file(&bytes, PAIR, &layout()).expect("valid").dirty.contains(region as usize)
    }
    fn wait_for(&self, what: &str, condition: impl Fn() -> bool) {
        let begin = Instant::now();
        while !condition() {
            assert!(begin.elapsed() < Duration::from_secs(15), "waited too long for: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn a_region_is_in_the_file_before_the_first_write_goes_on_and_costs_one_sync() {
    let f = fixture();
    assert!(!f.log.is_logged(DISK, Block(7), Block(7)));
    assert_eq!(f.ensure(0), Logged::Logged);
    assert!(f.in_file(0) && !f.in_file(3000));
    let syncs = f.medium.syncs.load(SeqCst);
    assert_eq!(syncs, 1);
    for _ in 0..1000 {
        assert_eq!(f.ensure(0), Logged::Logged);
    }
    assert_eq!(f.medium.syncs.load(SeqCst), syncs, "a hot region costs nothing");
    // A write over the border of two regions, and the other disk's regions, are others.
    let border = Block(5000 * REGION_BLOCKS);
    assert_eq!(f.log.ensure_logged(DISK, Block(border.0 - 1), border), Logged::Logged);
    assert!(f.in_file(4999) && f.in_file(5000));
    assert!(!f.log.is_logged(DiskIndex(1), Block(0), Block(0)));
    assert_eq!(f.log.ensure_logged(DiskIndex(1), Block(0), Block(0)), Logged::Logged);
    assert!(f.in_file(9000));
}

#[test]
fn a_sequential_writer_waits_once_per_many_regions() {
    let f = fixture();
    for region in 0..1000 {
        assert_eq!(f.ensure(region), Logged::Logged);
        assert!(f.in_file(region));
    }
    let syncs = f.medium.syncs.load(SeqCst);
    assert!(syncs <= 1000 / LOOK_AHEAD as u64 + 3, "{syncs} syncs for 1000 regions");
}

#[test]
fn writers_that_wait_together_share_a_sync() {
    let f = fixture();
    f.medium.sync_millis.store(20, SeqCst);
    std::thread::scope(|scope| {
        for writer in 0..64u64 {
            let f = &f;
            scope.spawn(move || {
                assert_eq!(f.ensure(writer * 131), Logged::Logged);
                assert!(f.in_file(writer * 131));
            });
        }
    });
    let syncs = f.medium.syncs.load(SeqCst);
    assert!(syncs <= 10, "{syncs} syncs for 64 writers at once");
}

/// The heart of I8: whatever the folder does, the guest loses one second once, and the state is entered before it goes on.
fn one_second_once(f: &Fixture, hung: bool) {
    let entered = || f.sink.entered.lock().expect("lock").len();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for writer in 0..8u64 {
            scope.spawn(move || {
                // The last ones come when the first have waited most of their second already.
                std::thread::sleep(Duration::from_millis(100 * writer));
                assert_eq!(f.ensure(100 + writer * 300), Logged::Untracked);
                assert_eq!(entered(), 1, "entered before the write goes on");
            });
        }
    });
    let waited = begin.elapsed();
    assert!(waited < LOG_WAIT + Duration::from_millis(400), "waited {waited:?}");
    if hung {
        assert!(waited >= LOG_WAIT, "a hung folder is given its second: {waited:?}");
    }
    let begin = Instant::now();
    for region in 0..9000 {
        assert_eq!(f.ensure(region), Logged::Untracked);
    }
    assert!(begin.elapsed() < Duration::from_millis(500), "once is once: {:?}", begin.elapsed());
    assert_eq!(f.log.regions().len(), layout().regions(), "everything counts as dirty");
    assert!(f.log.is_untracked() && f.log.is_logged(DISK, Block(0), Block(0)));
    assert_eq!(f.log.forget(&[1, 2], |_, _, _| true), 0, "nothing is forgotten");
}

#[test]
fn a_hung_folder_costs_one_second_once() {
    let f = fixture();
    assert_eq!(f.ensure(1), Logged::Logged);
    f.medium.hangs.store(true, SeqCst);
    assert_eq!(f.ensure(1), Logged::Logged, "a logged region needs no folder");
    one_second_once(&f, true);
    assert_eq!(f.medium.invalidated.load(SeqCst), 0, "it hangs");
    f.medium.free();
    f.wait_for("the log to be made unusable once the folder answers", || f.medium.invalidated.load(SeqCst) == 1);
    let reasons = f.sink.entered.lock().expect("lock").clone();
    assert!(matches!(&reasons[..], [UntrackedReason::Log(text)] if text.contains("1s")), "{reasons:?}");
}

#[test]
fn a_full_folder_and_failing_writes_and_syncs_cost_no_wait_at_all() {
    const ENOSPC: u64 = 28;
    const EIO: u64 = 5;
    for (write, sync) in [(ENOSPC, 0), (EIO, 0), (0, EIO)] {
        let f = fixture();
        assert_eq!(f.ensure(1), Logged::Logged);
        f.medium.write_errno.store(write, SeqCst);
        f.medium.sync_errno.store(sync, SeqCst);
        one_second_once(&f, false);
        let begin = Instant::now();
        f.wait_for("the log to be made unusable", || f.medium.invalidated.load(SeqCst) == 1);
        assert!(begin.elapsed() < Duration::from_secs(1));
        // A failed sync is never tried again (the page cache may have dropped what it could not write).
        let syncs = f.medium.syncs.load(SeqCst);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(f.medium.syncs.load(SeqCst), syncs);
    }
}

#[test]
fn a_failure_while_forgetting_hurts_only_when_a_cold_region_is_written() {
    let f = fixture();
    assert_eq!(f.ensure(1), Logged::Logged);
    assert_eq!(f.ensure(4000), Logged::Logged);
    f.medium.sync_errno.store(5, SeqCst);
    assert_eq!(f.log.forget(&[4000], |_, _, _| true), 1);
    f.wait_for("the background write to fail", || f.log.report().failed.is_some());
    assert_eq!(f.ensure(1), Logged::Logged, "logged is logged");
    assert!(!f.log.is_untracked());
    assert_eq!(f.log.forget(&[1], |_, _, _| true), 0, "nothing can be forgotten any more");
    assert_eq!(f.ensure(4000), Logged::Untracked, "what was being cleared cannot be relied on");
    f.wait_for("the log to be made unusable", || f.medium.invalidated.load(SeqCst) == 1);
}

#[test]
fn untracked_is_left_only_by_a_complete_new_log_also_while_the_old_folder_hangs() {
    let f = fixture();
    assert_eq!(
        f.log.leave_untracked(Box::new(Faulty(f.medium.clone())), 2, MarksProof::WereKept),
        Err(LeaveError::NotUntracked)
    );
    f.medium.hangs.store(true, SeqCst);
    assert_eq!(f.ensure(1), Logged::Untracked);
    let new = medium(&RegionSet::all(&layout()), 2);
    f.log.leave_untracked(Box::new(Faulty(new.clone())), 2, MarksProof::WereKept).expect("left");
    assert_eq!(f.sink.left.load(SeqCst), 1);
    assert!(!f.log.is_untracked());
    assert_eq!(f.ensure(5), Logged::Logged);
    assert_eq!(f.log.regions().len(), layout().regions());
    assert_eq!(new.syncs.load(SeqCst), 0, "everything is in the new log already");
    // The old writer comes back and must touch neither log.
    f.medium.free();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((f.medium.invalidated.load(SeqCst), new.invalidated.load(SeqCst)), (0, 0));
    // Now regions are proved clean, forgotten, and logged again on the new medium.
    assert_eq!(f.log.forget(&[5, 6], |_, _, _| true), 2);
    assert!(!f.log.is_logged(DISK, Block(5 * REGION_BLOCKS), Block(5 * REGION_BLOCKS)));
    assert_eq!(f.ensure(6), Logged::Logged);
    assert!(f.log.close());
    let read = log::decode_file(&new.bytes.lock().expect("lock"), PAIR, &layout()).expect("valid");
    assert!(!read.dirty.contains(5) && read.dirty.contains(6) && read.dirty.contains(7));
}

#[test]
fn missing_marks_are_not_healed_by_a_new_log_alone() {
    let f = fixture();
    f.log.enter_untracked(UntrackedReason::Log("first".into()));
    f.log.enter_untracked(UntrackedReason::MapMemory("tmpfs full".into()));
    f.log.enter_untracked(UntrackedReason::Log("later".into()));
    assert_eq!(f.log.report().untracked, Some(UntrackedReason::MapMemory("tmpfs full".into())), "the graver one stays");
    let new = || Box::new(Faulty(medium(&RegionSet::all(&layout()), 2)));
    assert_eq!(f.log.leave_untracked(new(), 2, MarksProof::WereKept), Err(LeaveError::MarksIncomplete));
    assert!(f.log.is_untracked());
    f.log.leave_untracked(new(), 2, MarksProof::Rebuilt).expect("left");
}

#[test]
fn a_beginning_that_hangs_costs_its_limit() {
    let stuck = Arc::new(Behaviour { hangs: AtomicBool::new(true), ..Behaviour::default() });
    let begin = Instant::now();
    let waits = Arc::clone(&stuck);
    assert_eq!(within(Duration::from_millis(100), move || waits.hang()), None);
    assert!(begin.elapsed() < Duration::from_secs(1));
    stuck.free();
    assert_eq!(within(Duration::from_secs(5), || 7), Some(7));
}

#[test]
fn a_worker_can_start_without_any_log() {
    let sink = Arc::new(Sink::default());
    let log = RegionLog::start_untracked(layout(), UntrackedReason::Log("hangs".into()), sink.clone());
    assert_eq!(log.ensure_logged(DISK, Block(0), Block(0)), Logged::Untracked);
    assert_eq!(sink.entered.lock().expect("lock").len(), 1);
    let new = medium(&RegionSet::all(&layout()), 2);
    log.leave_untracked(Box::new(Faulty(new)), 2, MarksProof::WereKept).expect("left");
    assert_eq!(log.ensure_logged(DISK, Block(0), Block(0)), Logged::Logged);
}

#[test]
fn hot_regions_stay_logged_and_cold_ones_are_swept_in_bounded_steps() {
    let f = fixture();
    for region in (0..9000).step_by(2) {
        assert_eq!(f.ensure(region), Logged::Logged);
    }
    let logged = f.log.report().logged;
    let round = || {
        let mut cold = Vec::new();
        loop {
            let (some, round) = f.log.sweep();
            assert!(some.len() <= 256);
            cold.extend(some);
            if round {
                return cold;
            }
        }
    };
    let first = round();
    assert!(first.iter().all(|n| n % 2 == 1), "only regions logged ahead were never touched");
    let second = round();
    assert_eq!(second.len(), logged, "nobody wrote since");
    assert_eq!(f.ensure(10), Logged::Logged);
    let third = round();
    assert!(!third.contains(&10) && third.contains(&12), "a region written to since is hot");
    assert_eq!(f.log.forget(&[12, 14], |_, first, _| first.0 != 14 * REGION_BLOCKS), 1, "a region with a mark stays");
    assert!(f.log.is_logged(DISK, Block(14 * REGION_BLOCKS), Block(14 * REGION_BLOCKS)));
    assert!(f.in_file(12), "the file follows later");
    let syncs = f.medium.syncs.load(SeqCst);
    assert_eq!(f.ensure(12), Logged::Logged, "wanted again before the file followed");
    assert_eq!(f.medium.syncs.load(SeqCst), syncs, "then it needs no write at all");
    assert_eq!(f.log.forget(&[20], |_, _, _| true), 1);
    f.wait_for("the file to follow by itself", || !f.in_file(20));
    assert!(f.in_file(12));
}

/// The forgetting protocol without a gate: marks by SeqCst operations before the question. A writer that goes on while
/// its region is not in the file (neither before nor after) has lost.
#[test]
fn forgetting_never_races_with_a_write() {
    const REGIONS: u64 = 64;
    let f = fixture();
    let marks: Vec<AtomicU64> = (0..REGIONS).map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicBool::new(false);
    let (writes, forgotten) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for writer in 0..3u64 {
            let (f, marks, stop, writes) = (&f, &marks, &stop, &writes);
            scope.spawn(move || {
                let mut n = writer;
                while !stop.load(SeqCst) {
                    n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let region = (n >> 33) % REGIONS;
                    // Far from each other, so that nothing is logged ahead; disk 0, sectors 0 to 2.
                    let at = region * 140;
                    marks[region as usize].fetch_add(1, SeqCst);
                    assert_eq!(f.ensure(at), Logged::Logged);
                    assert!(f.in_file(at), "a write to a region that the file does not hold");
                    writes.fetch_add(1, SeqCst);
                    marks[region as usize].fetch_sub(1, SeqCst);
                }
            });
        }
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(1500) {
            let all: Vec<usize> = (0..REGIONS as usize).map(|r| r * 140).collect();
            let clean = |_: DiskIndex, first: Block, _: Block| {
                marks[(first.0 / REGION_BLOCKS / 140) as usize].load(SeqCst) == 0
            };
            forgotten.fetch_add(f.log.forget(&all, clean) as u64, SeqCst);
        }
        stop.store(true, SeqCst);
    });
    let (writes, forgotten) = (writes.load(SeqCst), forgotten.load(SeqCst));
    println!("{writes} writes, {forgotten} regions forgotten meanwhile");
    assert!(writes > 100 && forgotten > 100);
}

/// A region forgotten while the write that logged it, together with a neighbour, is still on its way: when that write
/// settles the region must stay unlogged, since the file will lose it.
#[test]
fn a_region_forgotten_while_its_sector_is_being_written_stays_forgotten() {
    let f = fixture();
    assert_eq!(f.ensure(10), Logged::Logged);
    f.medium.hangs.store(true, SeqCst);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| f.ensure(500));
        f.wait_for("the write to be on its way", || f.medium.writes.load(SeqCst) >= 2);
        assert_eq!(f.log.forget(&[10], |_, _, _| true), 1);
        f.medium.free();
        assert_eq!(writer.join().expect("writer"), Logged::Logged);
    });
    let block = Block(10 * REGION_BLOCKS);
    assert!(!f.log.is_logged(DISK, block, block), "the file will lose it");
    f.wait_for("the file to lose it", || !f.in_file(10));
    assert!(f.in_file(500));
}

#[test]
fn heartbeats_show_until_when_the_log_worked() {
    // The interval is ten seconds, so this test lets one pass.
    let f = fixture();
    f.wait_for("the first heartbeat", || f.log.report().heartbeat == 1);
    let read = log::decode_file(&f.medium.bytes.lock().expect("lock"), PAIR, &layout()).expect("valid");
    assert_eq!((read.heartbeat, read.log_id), (Some(1), f.log.report().log_id));
}

#[test]
fn a_log_file_is_found_again_and_a_torn_sector_makes_its_regions_dirty() {
    let folder = tempfile::tempdir().expect("folder");
    assert!(matches!(read_log(folder.path(), PAIR, &layout()), Err(LogUnusable::Missing)));
    let none = RegionSet::none(&layout());
    let file = FileMedium::create(folder.path(), &header(3), &layout(), &none).expect("file");
    let log = RegionLog::start(Box::new(file), 3, layout(), &none, Arc::new(Sink::default())).expect("log");
    for region in [0u64, 4000, 8999] {
        let block = Block(region * REGION_BLOCKS);
        assert_eq!(log.ensure_logged(DISK, block, block), Logged::Logged);
    }
    let read = read_log(folder.path(), PAIR, &layout()).expect("usable");
    assert_eq!(read.dirty, log.regions());
    assert_eq!((read.bad_sectors, read.log_id), (0, 3));
    log.forget(&[4000], |_, _, _| true);
    assert!(log.close(), "closing writes what was forgotten");
    assert!(!read_log(folder.path(), PAIR, &layout()).expect("usable").dirty.contains(4000));

    let path = folder.path().join(LOG_NAME);
    let mut bytes = std::fs::read(&path).expect("bytes");
    let at = log::sector_offset(log::MAP_SECTOR + 1) as usize;
    bytes[at + 100..at + 200].fill(0xff);
    std::fs::write(&path, &bytes).expect("torn");
    let read = read_log(folder.path(), PAIR, &layout()).expect("usable");
    assert_eq!(read.bad_sectors, 1);
    assert!((3968..7936).all(|n| read.dirty.contains(n)) && !read.dirty.contains(100));
    assert!(matches!(read_log(folder.path(), PairId([0; 16]), &layout()), Err(LogUnusable::Refused(_))));
}

#[test]
fn a_log_of_a_newer_build_is_not_replaced() {
    let folder = tempfile::tempdir().expect("folder");
    let all = RegionSet::all(&layout());
    FileMedium::create(folder.path(), &header(1), &layout(), &all).expect("file");
    let path = folder.path().join(LOG_NAME);
    let mut bytes = std::fs::read(&path).expect("bytes");
    bytes[8] = 2;
    let crc = crc32fast::hash(&bytes[..1020]);
    bytes[1020..1024].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(&path, &bytes).expect("a newer format");
    let refused = FileMedium::create(folder.path(), &header(2), &layout(), &all).err().expect("refused");
    assert!(refused.to_string().contains("version 2"), "{refused}");
    assert_eq!(std::fs::read(&path).expect("bytes"), bytes);
}

#[test]
fn an_untracked_log_file_is_unusable_and_a_newer_one_under_its_name_is_not_touched() {
    let folder = tempfile::tempdir().expect("folder");
    let all = RegionSet::all(&layout());
    let mut old = FileMedium::create(folder.path(), &header(1), &layout(), &all).expect("file");
    let _new = FileMedium::create(folder.path(), &header(2), &layout(), &all).expect("file");
    old.invalidate();
    assert_eq!(read_log(folder.path(), PAIR, &layout()).expect("the newer one").log_id, 2);
    let log = RegionLog::start(Box::new(_new), 2, layout(), &all, Arc::new(Sink::default())).expect("log");
    log.enter_untracked(UntrackedReason::MapMemory("test".into()));
    let begin = Instant::now();
    while read_log(folder.path(), PAIR, &layout()).is_ok() {
        assert!(begin.elapsed() < Duration::from_secs(5), "the log of an Untracked pair is still believed");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_question_on_every_write_costs_nanoseconds() {
    let f = fixture();
    assert_eq!(f.ensure(0), Logged::Logged);
    const N: u64 = 5_000_000;
    let begin = Instant::now();
    for n in 0..N {
        let block = Block(std::hint::black_box(n % REGION_BLOCKS));
        assert_eq!(f.log.ensure_logged(DISK, block, block), Logged::Logged);
    }
    let each = begin.elapsed().as_nanos() as f64 / N as f64;
    println!("ensure_logged: {each:.1} ns");
    assert!(each < 500.0, "{each} ns; two cores shared with other builds still do better");
}
