//! Trust over real files and a real block device: who wrote in between is found, who only looked is not suspected.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;
use watari_core::geometry::DiskIndex;
use watari_core::regions::trust::{Phase, TrustRecord, TrustRefused};
use watari_core::regions::{PairId, REGION_BYTES, Region, RegionLayout};
use watari_store::maps::{BootId, MapIdentity, MapMemory};
use watari_store::regions::LogUnusable;
use watari_store::trust::{
    LogFact, MapFact, Marks, StartFacts, StartState, TRUST_NAME, TrustFact, TrustUnusable, TrustWriteError, Verdict,
    begin_start, check, decide, read_record, record_clean_stop,
};

const PAIR: PairId = PairId([2; 16]);
const SIZE: u64 = 40 << 20;

struct Site {
    folder: TempDir,
    images: Vec<PathBuf>,
}

impl Site {
    fn new(disks: usize) -> Site {
        let folder = tempfile::tempdir().expect("folder");
        let images: Vec<PathBuf> = (0..disks).map(|n| folder.path().join(format!("disk{n}.img"))).collect();
        for image in &images {
            let file = File::create(image).expect("image");
            file.set_len(SIZE).expect("size");
            for region in 0..SIZE / REGION_BYTES {
                file.write_all_at(&[region as u8 + 1; 8192], region * REGION_BYTES).expect("content");
            }
        }
        std::fs::create_dir(folder.path().join("meta")).expect("metadata folder");
        Site { folder, images }
    }
    fn meta(&self) -> PathBuf {
        self.folder.path().join("meta")
    }
    fn open(&self) -> Vec<File> {
        self.images.iter().map(|p| OpenOptions::new().read(true).write(true).open(p).expect("image")).collect()
    }
    fn start(&self, start_id: u64) -> Result<TrustRecord, TrustWriteError> {
        let files = self.open();
        let disks: Vec<&File> = files.iter().collect();
        begin_start(&self.meta(), PAIR, &read_record(&self.meta(), PAIR), 0, start_id, 1, &disks)
    }
    fn stop(&self, current: &TrustRecord, dirty: &[u64]) -> TrustRecord {
        let files = self.open();
        let disks: Vec<&File> = files.iter().collect();
        let layout = RegionLayout::new(&vec![SIZE; disks.len()]).expect("layout");
        let dirty: Vec<Region> = dirty.iter().map(|&index| Region { disk: DiskIndex(0), index }).collect();
        record_clean_stop(&self.meta(), current, &layout, &disks, &dirty, 99, false).expect("recorded")
    }
    fn check(&self) -> Verdict {
        let files = self.open();
        let disks: Vec<&File> = files.iter().collect();
        check(&read_record(&self.meta(), PAIR).expect("record"), &disks)
    }
}

fn untrusted(verdict: Verdict, because: &str) {
    match verdict {
        Verdict::Untrusted(reason) => assert!(reason.contains(because), "{reason:?} does not say {because:?}"),
        Verdict::Trusted => panic!("trusted in spite of: {because}"),
    }
}

/// Times of files are as fine as the kernel's tick; a writer within the same tick as the record would be a race of
/// milliseconds after a stop, which no start is near to.
fn a_moment_later() {
    std::thread::sleep(Duration::from_millis(20));
}

#[test]
fn disks_that_nobody_wrote_to_are_trusted_and_looking_is_no_writing() {
    let site = Site::new(2);
    assert!(matches!(read_record(&site.meta(), PAIR), Err(TrustUnusable::Missing)));
    let record = site.start(1).expect("started");
    assert_eq!((record.starts, record.phase), (1, Phase::Serving));
    let stopped = site.stop(&record, &[3]);
    assert_eq!(read_record(&site.meta(), PAIR).expect("record"), stopped);
    a_moment_later();
    for image in &site.images {
        std::fs::read(image).expect("somebody looks");
    }
    assert_eq!(site.check(), Verdict::Trusted);
}

#[test]
fn each_start_voids_the_last_proof_and_raises_the_counter_above_what_the_peer_knows() {
    let site = Site::new(1);
    let first = site.start(1).expect("started");
    site.stop(&first, &[]);
    let second = site.start(2).expect("started");
    assert_eq!((second.starts, second.start_id, second.phase), (2, 2, Phase::Serving));
    assert_eq!(read_record(&site.meta(), PAIR).expect("record").phase, Phase::Serving);
    let files = site.open();
    let previous = read_record(&site.meta(), PAIR);
    let third = begin_start(&site.meta(), PAIR, &previous, 41, 3, 1, &[&files[0]]).expect("started");
    assert_eq!(third.starts, 42, "the peer had seen 41");
    // Damage is not a reason to stay down: the counter goes on from the peer's echo.
    std::fs::write(site.meta().join(TRUST_NAME), b"rubbish").expect("damaged");
    let previous = read_record(&site.meta(), PAIR);
    assert!(matches!(previous, Err(TrustUnusable::Refused(TrustRefused::Length(7)))));
    let fourth = begin_start(&site.meta(), PAIR, &previous, 42, 4, 1, &[&files[0]]).expect("started");
    assert_eq!(fourth.starts, 43);
}

#[test]
fn a_folder_of_a_newer_build_or_another_pair_is_not_written_to() {
    let site = Site::new(1);
    site.start(1).expect("started");
    let path = site.meta().join(TRUST_NAME);
    let mut bytes = std::fs::read(&path).expect("record");
    bytes.truncate(bytes.len() - 32);
    bytes[8] = 2;
    let digest = blake3::hash(&bytes);
    bytes.extend_from_slice(digest.as_bytes());
    std::fs::write(&path, &bytes).expect("a newer format");
    let refused = site.start(2).expect_err("refused");
    assert!(matches!(refused, TrustWriteError::NotOurs(TrustRefused::NewerVersion { found: 2 })), "{refused}");
    assert_eq!(std::fs::read(&path).expect("record"), bytes);

    let other = Site::new(1);
    other.start(1).expect("started");
    let files = other.open();
    let stranger = PairId([8; 16]);
    let previous = read_record(&other.meta(), stranger);
    let refused = begin_start(&other.meta(), stranger, &previous, 0, 2, 1, &[&files[0]]).expect_err("refused");
    assert!(matches!(refused, TrustWriteError::NotOurs(TrustRefused::Pair { .. })), "{refused}");
    assert!(read_record(&other.meta(), PAIR).is_ok());
}

#[test]
fn every_kind_of_foreign_change_to_a_file_is_found() {
    type Change = fn(&Site);
    let changes: [(&str, Change); 6] = [
        ("was written to", |site| {
            // Anywhere, also where no digest lies: the time tells.
            OpenOptions::new()
                .write(true)
                .open(&site.images[1])
                .expect("image")
                .write_all_at(b"x", 30_000_001)
                .expect("written");
        }),
        ("another file", |site| {
            let copy = site.folder.path().join("copy");
            std::fs::copy(&site.images[1], &copy).expect("copied");
            std::fs::rename(&copy, &site.images[1]).expect("replaced");
        }),
        ("shrank", |site| {
            File::options().write(true).open(&site.images[1]).expect("image").set_len(SIZE - 1).expect("cut")
        }),
        ("content changed", |site| {
            // A writer that sets the modification time back, in a region that was proved.
            let file = File::options().write(true).open(&site.images[0]).expect("image");
            let before = file.metadata().expect("metadata").modified().expect("time");
            file.write_all_at(b"x", 5 * REGION_BYTES + 1000).expect("written");
            file.set_modified(before).expect("set back");
        }),
        ("content changed", |site| {
            // Growing is normal, writing as well is not.
            let file = File::options().write(true).open(&site.images[0]).expect("image");
            file.set_len(SIZE + 4096).expect("grown");
            file.write_all_at(b"x", 1024).expect("written");
        }),
        ("of 2 disks", |_| {}),
    ];
    for (because, change) in changes {
        let site = Site::new(2);
        let record = site.start(1).expect("started");
        site.stop(&record, &[5]);
        a_moment_later();
        change(&site);
        if because == "of 2 disks" {
            let files = site.open();
            untrusted(check(&read_record(&site.meta(), PAIR).expect("record"), &[&files[0]]), because);
        } else {
            untrusted(site.check(), because);
        }
    }
}

#[test]
fn relabelling_and_growing_are_no_foreign_writes() {
    let site = Site::new(1);
    let record = site.start(1).expect("started");
    site.stop(&record, &[5]);
    a_moment_later();
    // What the kubelet does when it relabels a volume: the change time moves, the content does not.
    let mode = std::fs::metadata(&site.images[0]).expect("metadata").permissions().mode();
    std::fs::set_permissions(&site.images[0], std::fs::Permissions::from_mode(mode ^ 0o010)).expect("mode");
    assert_eq!(site.check(), Verdict::Trusted);
    // What KubeVirt does when the claim was expanded.
    File::options().write(true).open(&site.images[0]).expect("image").set_len(SIZE * 2).expect("grown");
    assert_eq!(site.check(), Verdict::Trusted);
}

#[test]
fn after_an_unclean_stop_only_the_identity_is_asked() {
    let site = Site::new(1);
    site.start(1).expect("started");
    site.open()[0].write_all_at(b"the guest writes", 0).expect("written");
    assert_eq!(site.check(), Verdict::Trusted, "our own writes are no foreign ones");
    let copy = site.folder.path().join("copy");
    std::fs::copy(&site.images[0], &copy).expect("copied");
    std::fs::rename(&copy, &site.images[0]).expect("replaced");
    untrusted(site.check(), "another file");
}

#[test]
fn a_disk_that_changes_while_its_proof_is_taken_has_no_proof() {
    let site = Site::new(1);
    let record = site.start(1).expect("started");
    let path = site.images[0].clone();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let file = File::options().write(true).open(&path).expect("image");
            while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                file.write_all_at(b"y", 77).expect("written");
                file.set_modified(SystemTime::now()).expect("time");
            }
        });
        std::thread::sleep(Duration::from_millis(30));
        let files = site.open();
        let layout = RegionLayout::new(&[SIZE]).expect("layout");
        let stopped = record_clean_stop(&site.meta(), &record, &layout, &[&files[0]], &[], 1, false);
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        assert!(matches!(stopped, Err(TrustWriteError::Io(_))), "somebody still writes");
    });
    assert_eq!(read_record(&site.meta(), PAIR).expect("record").phase, Phase::Serving);
}

/// A loop device over a file, given back when dropped.
struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path) -> Loop {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output().expect("losetup");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Loop(PathBuf::from(String::from_utf8(made.stdout).expect("text").trim()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn on_a_block_device_the_content_is_the_proof() {
    let mut site = Site::new(1);
    let device = Loop::over(&site.images[0]);
    site.images = vec![device.0.clone()];
    let record = site.start(1).expect("started");
    assert_eq!((record.disks[0].file, record.disks[0].size), (None, SIZE), "no times, the device's size");
    site.stop(&record, &[5, 7]);
    assert_eq!(site.check(), Verdict::Trusted);
    let write = |at: u64, bytes: &[u8]| {
        let file = File::options().write(true).open(&device.0).expect("device");
        file.write_all_at(bytes, at).expect("written");
        file.sync_all().expect("synced");
    };
    // In the last dirty region, in the head (a superblock), in the tail.
    for at in [7 * REGION_BYTES + 99, 1024, SIZE - 512] {
        let mut before = [0];
        File::open(&device.0).expect("device").read_exact_at(&mut before, at).expect("read");
        write(at, &[before[0] ^ 1]);
        untrusted(site.check(), "content changed");
        write(at, &before);
        assert_eq!(site.check(), Verdict::Trusted);
    }
}

/// The whole way that a start goes, with real files for all three facts.
#[test]
fn a_start_finds_its_map_after_a_kill_and_its_disks_after_a_clean_stop() {
    let site = Site::new(1);
    let memory = tempfile::tempdir_in("/dev/shm").expect("folder");
    let id = MapIdentity { pair: PAIR, boot: BootId::current().expect("boot id"), sizes: vec![SIZE] };
    let state = |map: &MapMemory| {
        let files = site.open();
        let record = read_record(&site.meta(), PAIR);
        decide(StartFacts {
            trust: TrustFact::new(&record, |r| check(r, &[&files[0]])),
            map: MapFact::new(Ok(map.facts()), &record),
            log: LogFact::new(Err(LogUnusable::Missing)),
            heard: None,
        })
    };
    let map = MapMemory::create(memory.path(), &id).expect("map");
    assert!(matches!(state(&map), StartState::FullCompare(_)), "a first start");
    map.facts().begin_start(1);
    let record = site.start(1).expect("started");
    map.facts().confirm_start(1);
    site.open()[0].write_all_at(b"guest", 0).expect("written");
    assert_eq!(state(&map), StartState::UncleanWithMap, "killed while serving");
    map.facts().set_untracked(true);
    assert!(matches!(state(&map), StartState::FullCompare(_)));
    map.facts().set_untracked(false);
    site.stop(&record, &[0]);
    assert_eq!(state(&map), StartState::Clean(Marks::Map));
    // The VM runs on another node, which has no map of ours, and comes back.
    site.start(2).expect("started elsewhere");
    assert!(matches!(state(&map), StartState::FullCompare(reason) if reason.to_string().contains("ran elsewhere")));
}
