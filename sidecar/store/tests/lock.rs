//! The folder's lock between real processes.

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use watari_store::lock::{FolderLock, LOCK_NAME, LockError, Owner};

const CHILD_FOLDER: &str = "WATARI_TEST_CHILD_FOLDER";

struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Another process that holds the folder until it is killed.
fn holder(folder: &Path) -> Reaped {
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command.args(["--exact", "a_second_process_is_refused_with_the_owners_name_and_gets_the_folder_of_a_killed_one"]);
    let child = command.env(CHILD_FOLDER, folder).stdout(Stdio::null()).spawn().expect("child");
    let pid = child.id();
    let child = Reaped(child);
    let begin = Instant::now();
    while FolderLock::holder(folder).is_none_or(|owner| owner.pid != pid) {
        assert!(begin.elapsed() < Duration::from_secs(10), "the child does not lock");
        std::thread::sleep(Duration::from_millis(2));
    }
    child
}

#[test]
fn a_second_process_is_refused_with_the_owners_name_and_gets_the_folder_of_a_killed_one() {
    if let Some(folder) = std::env::var_os(CHILD_FOLDER).map(PathBuf::from) {
        let _lock = FolderLock::acquire(&folder, "replica", Duration::from_secs(5)).expect("locked");
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    }
    let folder = tempfile::tempdir().expect("folder");
    let child = holder(folder.path());
    let begin = Instant::now();
    let refused = FolderLock::acquire(folder.path(), "primary", Duration::from_millis(200)).expect_err("held");
    assert!(begin.elapsed() >= Duration::from_millis(200) && begin.elapsed() < Duration::from_secs(2));
    let text = refused.to_string();
    for part in ["replica", &format!("pid {}", child.0.id()), &Owner::this_process("").host, "ask it to release"] {
        assert!(text.contains(part), "{text:?} does not name {part:?}");
    }
    let waiting = {
        let folder = folder.path().to_owned();
        std::thread::spawn(move || {
            let lock = FolderLock::acquire(&folder, "primary", Duration::from_secs(10));
            (lock, Instant::now())
        })
    };
    std::thread::sleep(Duration::from_millis(100));
    let killed = Instant::now();
    drop(child);
    let (lock, got) = waiting.join().expect("thread");
    let lock = lock.expect("a killed holder holds nothing");
    assert!(got - killed < Duration::from_millis(500), "{:?} after the kill", got - killed);
    assert_eq!(lock.owner().role, "primary");
    assert_eq!(FolderLock::holder(folder.path()).expect("held").pid, std::process::id());
    drop(lock);
    assert_eq!(FolderLock::holder(folder.path()), None);
    FolderLock::acquire(folder.path(), "primary", Duration::ZERO).expect("free again");
}

#[test]
fn of_many_processes_exactly_one_holds_the_folder() {
    let folder = tempfile::tempdir().expect("folder");
    let held = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            // Each acquire opens the file anew, which is what tells processes apart for flock.
            scope.spawn(|| {
                for _ in 0..10 {
                    let lock = FolderLock::acquire(folder.path(), "primary", Duration::from_secs(20)).expect("in turn");
                    let others = held.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    assert_eq!(others, 0, "two hold the folder");
                    std::thread::sleep(Duration::from_micros(300));
                    held.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                    drop(lock);
                }
            });
        }
    });
}

#[test]
fn a_lock_that_a_child_inherits_outlives_the_parent_and_needs_no_folder() {
    if let Some(folder) = std::env::var_os(CHILD_FOLDER).map(PathBuf::from) {
        let shared = std::io::stdin().as_fd().try_clone_to_owned().expect("standard input");
        let _lock = FolderLock::inherit(shared, &folder, "primary").expect("inherited");
        println!("\nholding");
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    }
    let folder = tempfile::tempdir().expect("folder");
    let parent = FolderLock::acquire(folder.path(), "supervisor", Duration::ZERO).expect("locked");
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command.args(["--exact", "a_lock_that_a_child_inherits_outlives_the_parent_and_needs_no_folder", "--nocapture"]);
    // The folder's name is only for its errors: the child gets one that does not exist.
    command.env(CHILD_FOLDER, folder.path().join("hung")).stdin(parent.share().expect("shared"));
    let mut child = Reaped(command.stdout(Stdio::piped()).spawn().expect("child"));
    drop(command);
    let lines = BufReader::new(child.0.stdout.take().expect("piped")).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "holding"), "the child holds the lock");
    drop(parent);
    assert!(FolderLock::acquire(folder.path(), "replica", Duration::ZERO).is_err(), "the child goes on holding");
    drop(child);
    FolderLock::acquire(folder.path(), "replica", Duration::ZERO).expect("free");
}

#[test]
fn a_stale_descriptor_is_not_a_lock() {
    let folder = tempfile::tempdir().expect("folder");
    let _held = FolderLock::acquire(folder.path(), "primary", Duration::ZERO).expect("locked");
    let stranger = std::fs::File::open(folder.path().join(LOCK_NAME)).expect("open");
    let refused = FolderLock::inherit(stranger.into(), folder.path(), "primary");
    assert!(matches!(refused, Err(LockError::Held { .. })));
}

#[test]
fn a_lock_on_a_removed_file_is_no_lock() {
    let folder = tempfile::tempdir().expect("folder");
    let old = FolderLock::acquire(folder.path(), "primary", Duration::ZERO).expect("locked");
    std::fs::remove_file(folder.path().join(LOCK_NAME)).expect("somebody tidies up");
    let new = FolderLock::acquire(folder.path(), "replica", Duration::ZERO).expect("a new file, a new lock");
    assert!(matches!(
        FolderLock::acquire(folder.path(), "inspect", Duration::ZERO),
        Err(LockError::Held { owner: Some(owner), .. }) if owner.role == "replica"
    ));
    drop((old, new));
}

#[test]
fn a_holder_that_has_not_said_who_it_is_still_holds() {
    let folder = tempfile::tempdir().expect("folder");
    let lock = FolderLock::acquire(folder.path(), "primary", Duration::ZERO).expect("locked");
    for record in ["", "role=primary\npid=12", "pid=x\nrole=a\nhost=b\nsince=1\nend\n", "\u{0}\u{0}"] {
        std::fs::write(folder.path().join(LOCK_NAME), record).expect("half a record");
        match FolderLock::acquire(folder.path(), "replica", Duration::ZERO) {
            Err(error @ LockError::Held { owner: None, .. }) => assert!(error.to_string().contains("another process")),
            other => panic!("{other:?}"),
        }
    }
    drop(lock);
}

#[test]
fn a_folder_that_is_not_there_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().expect("folder");
    let missing = folder.path().join("missing");
    let error = FolderLock::acquire(&missing, "primary", Duration::from_secs(5)).expect_err("no folder");
    assert!(matches!(error, LockError::Io { .. }));
    assert!(error.to_string().contains("missing"), "{error}");
}
