//! The map memory against what ends processes: `kill -9` at any instant, and a full tmpfs.
//!
//! Each test runs this same binary again as a child that plays the worker; the child's part is the test function itself,
//! told apart by a variable in its environment.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use watari_core::geometry::{Block, DiskIndex};
use watari_core::regions::PairId;
use watari_core::tracker::MapName;
use watari_store::maps::{BootId, MapError, MapIdentity, MapMemory};

const CHILD_FOLDER: &str = "WATARI_TEST_CHILD_FOLDER";
const DISK: DiskIndex = DiskIndex(0);
const DISK_BYTES: u64 = 1 << 40;

fn identity() -> MapIdentity {
    MapIdentity { pair: PairId([5; 16]), boot: BootId::current().expect("boot id"), sizes: vec![DISK_BYTES] }
}

fn child_folder() -> Option<PathBuf> {
    std::env::var_os(CHILD_FOLDER).map(PathBuf::from)
}

/// This binary again, running one test as the child.
fn child_command(test: &str, folder: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(CHILD_FOLDER, folder);
    command
}

fn marks_of(maps: &MapMemory) -> u64 {
    maps.bitmap(DISK, MapName::First).iter().map(|w| u64::from(w.load(SeqCst).count_ones())).sum()
}

fn mark(maps: &MapMemory, block: u64) -> Result<(), MapError> {
    maps.ensure_leaf(DISK, Block(block))?;
    maps.bitmap(DISK, MapName::First)[(block / 64) as usize].fetch_or(1 << (block % 64), SeqCst);
    Ok(())
}

struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn kill_9_at_any_instant_loses_no_mark_that_was_made() {
    if let Some(folder) = child_folder() {
        let (maps, _) = MapMemory::open_or_create(&folder, &identity()).expect("map");
        // Scattered over the disk, so that the kill also meets leaves that are just being allocated and released.
        let mut n = marks_of(&maps);
        loop {
            let block = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (DISK_BYTES / 4096);
            mark(&maps, block).expect("memory");
            println!("\nmarked {block}");
            n += 1;
            if n.is_multiple_of(64) {
                let spare = Block((block + 40_000_000) % (DISK_BYTES / 4096));
                maps.ensure_leaf(DISK, spare).expect("memory");
                let clean = maps.find_clean_leaves();
                maps.release_clean_leaves(&clean, |_, _, _| true).expect("released");
            }
        }
    }
    let folder = tempfile::tempdir_in("/dev/shm").expect("folder");
    let mut acknowledged = std::collections::BTreeSet::new();
    for round in 0..20u64 {
        let mut command = child_command("kill_9_at_any_instant_loses_no_mark_that_was_made", folder.path());
        let mut child = Reaped(command.stdout(Stdio::piped()).spawn().expect("child"));
        let lines = BufReader::new(child.0.stdout.take().expect("piped")).lines();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(20_000 + round * 4_371));
            child.0.kill().expect("killed");
            child.0.wait().expect("reaped")
        });
        for line in lines {
            let line = line.expect("text");
            // A line is one write of less than a pipe's atomic size: it comes whole or not at all.
            if let Some(block) = line.strip_prefix("marked ") {
                acknowledged.insert((round, block.parse::<u64>().expect("number")));
            }
        }
        assert_eq!(killer.join().expect("killer").signal(), Some(9));
        let maps = MapMemory::open(folder.path(), &identity()).expect("readable").expect("believed");
        for &(_, block) in &acknowledged {
            let word = maps.bitmap(DISK, MapName::First)[(block / 64) as usize].load(SeqCst);
            assert!(word >> (block % 64) & 1 == 1, "round {round}: the mark of block {block} is lost");
        }
    }
    assert!(acknowledged.len() > 200, "the children got somewhere: {} marks", acknowledged.len());
    println!("{} marks survived 20 kills", acknowledged.len());
}

#[test]
fn a_store_to_memory_that_was_not_ensured_ends_the_process_instead_of_losing_a_mark() {
    if let Some(folder) = child_folder() {
        let maps = MapMemory::create(&folder, &identity()).expect("map");
        assert_eq!(maps.bitmap(DISK, MapName::Staged)[1].load(SeqCst), 0, "reading is fine");
        maps.bitmap(DISK, MapName::Staged)[1].store(1, SeqCst);
        std::process::exit(0);
    }
    let folder = tempfile::tempdir_in("/dev/shm").expect("folder");
    let test = "a_store_to_memory_that_was_not_ensured_ends_the_process_instead_of_losing_a_mark";
    let ended = child_command(test, folder.path()).stdout(Stdio::null()).status().expect("child");
    assert_eq!(ended.signal(), Some(11), "{ended}");
}

/// Run a test of this binary as a child in a mount namespace of its own, with a tmpfs of `size` mounted on a folder.
/// The mount is gone with the child.
fn run_on_small_tmpfs(test: &str, size: &str) -> ExitStatus {
    let folder = tempfile::tempdir().expect("folder");
    let mut command = Command::new("unshare");
    if !is_root() {
        command.arg("--map-root-user");
    }
    command.args(["--mount", "--propagation", "private", "sh", "-ec"]);
    command.arg(r#"mount -t tmpfs -o "size=$2" watari-test "$1"; shift 2; exec "$@""#).arg("sh");
    command.arg(folder.path()).arg(size).arg(std::env::current_exe().expect("own path"));
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(CHILD_FOLDER, folder.path());
    command.status().expect("unshare of util-linux is needed for this test")
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn a_full_tmpfs_is_an_error_to_us_and_never_a_sigbus() {
    if let Some(folder) = child_folder() {
        let maps = MapMemory::create(&folder, &identity()).expect("map");
        let ballast = folder.join("ballast");
        std::fs::write(&ballast, vec![1; 64 << 10]).expect("ballast");
        let leaves = DISK_BYTES / 4096 / maps.leaf_blocks();
        let mut marked = 0;
        let refused = (0..leaves).find_map(|leaf| match mark(&maps, leaf * maps.leaf_blocks()) {
            Ok(()) => {
                marked += 1;
                None
            }
            Err(e) => Some(e),
        });
        assert!(matches!(refused, Some(MapError::NoSpace(_))), "{refused:?}");
        assert!(marked > 50, "{marked} leaves fitted");
        // Everything that was ensured can be written in all maps, everything can be read, the flag can be raised.
        for block in maps.present_leaves(DISK).collect::<Vec<_>>() {
            for map in [MapName::First, MapName::Second, MapName::Staged] {
                let from = (block.0 / 64) as usize;
                for word in &maps.bitmap(DISK, map)[from..from + maps.leaf_blocks() as usize / 64] {
                    word.fetch_or(1 << 63, SeqCst);
                }
            }
        }
        assert_eq!(maps.present_leaves(DISK).count() as u64, marked);
        assert_eq!(marks_of(&maps), marked * (1 + maps.leaf_blocks() / 64), "absent leaves read as zero");
        maps.facts().set_untracked(true);
        // A new worker finds the same on the full file system.
        drop(maps);
        let maps = MapMemory::open(&folder, &identity()).expect("readable").expect("believed");
        assert_eq!(marks_of(&maps), marked * (1 + maps.leaf_blocks() / 64));
        assert!(maps.facts().untracked());
        let next = marked * maps.leaf_blocks();
        assert!(matches!(mark(&maps, next), Err(MapError::NoSpace(_))), "still full");
        std::fs::remove_file(&ballast).expect("room");
        mark(&maps, next).expect("it goes on by itself when there is room");
        // No room for another pair's file: an error, nothing left behind.
        while mark(&maps, marked * maps.leaf_blocks()).is_ok() {
            marked += 1;
        }
        let mut file = std::fs::File::create(&ballast).expect("ballast");
        while file.write_all(&[1; 4096]).is_ok() {}
        let other = MapIdentity { pair: PairId([9; 16]), ..identity() };
        let made = MapMemory::create(&folder, &other);
        assert!(matches!(made, Err(MapError::NoSpace(_))), "no room for a second map");
        let names: Vec<_> =
            std::fs::read_dir(&folder).expect("folder").map(|e| e.expect("entry").file_name()).collect();
        assert!(names.iter().all(|n| !n.to_string_lossy().ends_with(".new")), "{names:?}");
        println!("{marked} leaves fitted");
        return;
    }
    let ended = run_on_small_tmpfs("a_full_tmpfs_is_an_error_to_us_and_never_a_sigbus", "1m");
    assert!(ended.success(), "signal {:?}, {ended}", ended.signal());
}
