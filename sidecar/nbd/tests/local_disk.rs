//! The local disk behind the server: content against a model, holes, devices, full file systems, and the order that
//! a wrapper relies on.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use common::{Client, Rig, eventually};
use proptest::prelude::*;
use watari_core::front::{Completion, Errno, GuestDisk, Op, Request};
use watari_core::nbd::wire::*;
use watari_nbd::local::{Around, LocalDiskConfig, LocalFile, OpenError, Prologue};
use watari_nbd::{FileDisk, LocalDisk};

const MIB: u64 = 1 << 20;

fn sparse(folder: &Path, bytes: u64) -> std::path::PathBuf {
    let path = folder.join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

fn file_rig(bytes: u64) -> (Rig, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = sparse(folder.path(), bytes);
    let disk = FileDisk::open(&path, LocalDiskConfig::new("disk")).unwrap();
    let rig = Rig::new(Arc::new(disk));
    std::fs::rename(&path, rig.folder.path().join("disk.img")).unwrap();
    let path = rig.folder.path().join("disk.img");
    (rig, path)
}

#[derive(Clone, Debug)]
enum Step {
    Read(u64, u32),
    Write(u64, u32, u8),
    Zero(u64, u32, u16),
    Trim(u64, u32),
    Flush,
    Cache,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let size = 4 * MIB;
    let range =
        (0..size, prop_oneof![1u32..9000, Just(4096u32), 60_000u32..3_000_000]).prop_map(move |(at, length)| {
            let at = if length % 3 == 0 { at & !4095 } else { at };
            (at, (u64::from(length)).min(size - at).max(1) as u32)
        });
    let step = (0u8..10, range, any::<u8>()).prop_map(|(dice, (at, length), fill)| match dice {
        0..=3 => Step::Read(at, length),
        4..=6 => Step::Write(at, length, fill),
        7 => Step::Zero(at, length, u16::from(fill) & (CMD_FLAG_FUA | CMD_FLAG_NO_HOLE)),
        8 => Step::Trim(at, length),
        _ if fill & 1 == 0 => Step::Flush,
        _ => Step::Cache,
    });
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Any sequence of operations leaves and shows what a plain array would.
    #[test]
    fn content_is_that_of_a_model(steps in steps(), structured in any::<bool>()) {
        let (rig, path) = file_rig(4 * MIB);
        let mut client = Client::enter(&rig.path, structured);
        let mut model = vec![0u8; 4 * MIB as usize];
        for step in steps {
            let span = |at: u64, length: u32| at as usize..at as usize + length as usize;
            match step {
                Step::Read(at, length) => prop_assert_eq!(&client.read(at, length).unwrap(), &model[span(at, length)]),
                Step::Write(at, length, fill) => {
                    let data: Vec<u8> = (0..length).map(|i| fill.wrapping_add((i / 512) as u8)).collect();
                    client.write(at, &data).unwrap();
                    model[span(at, length)].copy_from_slice(&data);
                }
                Step::Zero(at, length, flags) => {
                    client.call(flags, CMD_WRITE_ZEROES, at, length, &[]).result.unwrap();
                    model[span(at, length)].fill(0);
                }
                Step::Trim(at, length) => {
                    client.call(0, CMD_TRIM, at, length, &[]).result.unwrap();
                    model[span(at, length)].fill(0);
                }
                Step::Flush => {
                    client.call(0, CMD_FLUSH, 0, 0, &[]).result.unwrap();
                }
                Step::Cache => {
                    client.call(0, CMD_CACHE, 0, 4 << 20, &[]).result.unwrap();
                }
            }
        }
        prop_assert!(std::fs::read(&path).unwrap() == model);
    }
}

#[test]
fn four_connections_with_many_requests_in_flight_each_see_their_own_writes() {
    let (rig, _path) = file_rig(16 * MIB);
    std::thread::scope(|scope| {
        for lane in 0..4u64 {
            let path = &rig.path;
            scope.spawn(move || {
                let mut client = Client::enter(path, lane % 2 == 0);
                for round in 0..8u8 {
                    for i in 0..64u64 {
                        let data = vec![round ^ i as u8; 16384];
                        client.send(0, CMD_WRITE, lane * 4 * MIB + i * 16384, 16384, &data);
                        if i % 16 == 15 {
                            client.send(0, CMD_FLUSH, 0, 0, &[]);
                        }
                    }
                    for _ in 0..68 {
                        client.answer().unwrap().result.unwrap();
                    }
                    let asked: HashMap<u64, u64> = (0..64)
                        .map(|i| (client.send(0, CMD_READ, lane * 4 * MIB + i * 16384, 16384, &[]), i))
                        .collect();
                    for _ in 0..64 {
                        let answer = client.answer().unwrap();
                        let expected = vec![round ^ asked[&answer.cookie] as u8; 16384];
                        assert!(answer.result.unwrap() == expected);
                    }
                }
            });
        }
    });
}

#[test]
fn a_payload_of_32_mib_goes_both_ways_within_the_memory_of_a_connection() {
    let (rig, path) = file_rig(64 * MIB);
    let data: Vec<u8> = (0..32 * MIB as u32).map(|i| (i >> 9) as u8 | 1).collect();
    for structured in [true, false] {
        let mut client = Client::enter(&rig.path, structured);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // The bound holds at every look; looking goes on as long as the transfer does.
            let watch = scope.spawn(|| {
                while !over.load(Ordering::SeqCst) {
                    for connection in rig.server.report().connections {
                        assert!(connection.outstanding_bytes <= 8 << 20, "{connection:?}");
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            client.write(777, &data).unwrap();
            assert!(client.read(777, data.len() as u32).unwrap() == data);
            over.store(true, Ordering::SeqCst);
            watch.join().unwrap();
        });
        assert!(std::fs::read(&path).unwrap()[777..777 + data.len()] == data);
    }
}

#[test]
fn holes_are_sent_as_holes_unless_the_client_forbids_it() {
    let (rig, _path) = file_rig(8 * MIB);
    let mut client = rig.client();
    client.write(64 << 10, &[1; 4096]).unwrap();
    let answer = client.call(0, CMD_READ, 0, 1 << 20, &[]);
    assert_eq!(answer.chunks, (1, 2), "zeroes, data, zeroes");
    assert_eq!(client.call(CMD_FLAG_DF, CMD_READ, 0, 1 << 20, &[]).chunks, (1, 0));
    assert_eq!(client.call(0, CMD_READ, 4 << 20, 512, &[]).chunks, (0, 1));
    assert_eq!(client.call(0, CMD_READ, 1 << 20, 3 << 20, &[]).chunks, (0, 3), "one per part");
    assert_eq!(client.call(CMD_FLAG_DF, CMD_READ, 0, (1 << 20) + 1, &[]).result.unwrap_err(), 75);
}

#[test]
fn block_status_follows_writes_trims_and_no_hole() {
    let (rig, _path) = file_rig(8 * MIB);
    let mut client = rig.client();
    let hole = STATE_HOLE | STATE_ZERO;
    let status = |client: &mut Client, flags| client.call(flags, CMD_BLOCK_STATUS, 0, 8 << 20, &[]).extents;
    assert_eq!(status(&mut client, 0), [(8 << 20, hole)]);
    client.write(MIB, &vec![1; MIB as usize]).unwrap();
    assert_eq!(status(&mut client, 0), [(1 << 20, hole), (1 << 20, 0), (6 << 20, hole)]);
    assert_eq!(status(&mut client, CMD_FLAG_REQ_ONE), [(1 << 20, hole)]);
    client.call(0, CMD_TRIM, MIB, 1 << 20, &[]).result.unwrap();
    assert_eq!(status(&mut client, 0), [(8 << 20, hole)]);
}

#[test]
fn fast_zeroes_are_granted_by_a_file_system_that_punches() {
    let (rig, path) = file_rig(8 * MIB);
    let mut client = rig.client();
    client.write(0, &vec![7; 4 << 20]).unwrap();
    client.call(CMD_FLAG_FAST_ZERO, CMD_WRITE_ZEROES, 0, 4 << 20, &[]).result.unwrap();
    assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn the_recorded_size_is_served_and_a_smaller_backing_is_refused_by_its_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let path = sparse(folder.path(), 3 * MIB);
    let with = |size| LocalDiskConfig { size_bytes: Some(size), ..LocalDiskConfig::new("disk") };
    let grown = FileDisk::open(&path, with(2 * MIB)).unwrap();
    assert_eq!(grown.info().size_bytes, 2 * MIB);
    let refused = FileDisk::open(&path, with(4 * MIB)).err().unwrap();
    assert!(matches!(refused, OpenError::Smaller { found, wanted, .. } if found == 3 * MIB && wanted == 4 * MIB));
    assert!(refused.to_string().contains("3145728") && refused.to_string().contains("4194304"));
    assert!(matches!(FileDisk::open(folder.path(), with(0)).err().unwrap(), OpenError::Open { .. }));
    assert!(matches!(
        FileDisk::open(Path::new("/dev/null"), LocalDiskConfig::new("x")).err().unwrap(),
        OpenError::Kind(_)
    ));
}

#[test]
fn a_backing_that_is_cut_while_in_use_is_an_io_error_not_a_short_read() {
    let (rig, path) = file_rig(4 * MIB);
    let mut client = rig.client();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(MIB).unwrap();
    assert_eq!(client.read(2 * MIB, 4096).unwrap_err(), 5);
    assert_eq!(client.read(MIB - 512, 1024).unwrap_err(), 5);
    assert_eq!(client.read(0, 4096).unwrap(), [0; 4096]);
}

/// Run a command as root would; a machine that cannot is not fit for these tests, and says so.
fn run(command: &str, arguments: &[&str]) -> String {
    let out = Command::new(command).args(arguments).output();
    let out = out.unwrap_or_else(|error| panic!("{command}: {error}; run e2e/setup.sh"));
    assert!(out.status.success(), "{command} {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap().trim().into()
}

/// Undo a mount or a loop device when a test ends, however it ends.
struct Undo(&'static str, Vec<String>);
impl Drop for Undo {
    fn drop(&mut self) {
        let _best_effort = Command::new(self.0).args(&self.1).status();
    }
}

#[test]
fn a_full_file_system_is_enospc_for_the_guest_and_nothing_else_breaks() {
    let folder = tempfile::tempdir().unwrap();
    let mount = folder.path().join("small");
    std::fs::create_dir(&mount).unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=2m", "none", mount.to_str().unwrap()]);
    let _undo = Undo("umount", vec!["-l".into(), mount.to_str().unwrap().into()]);
    let path = sparse(&mount, 16 * MIB);
    let rig = Rig::new(Arc::new(FileDisk::open(&path, LocalDiskConfig::new("disk")).unwrap()));
    let mut client = rig.client();
    assert_eq!(client.write(0, &vec![1; 4 << 20]).unwrap_err(), 28);
    assert_eq!(client.read(0, 1).unwrap(), [1]);
    client.call(0, CMD_TRIM, 0, 16 << 20, &[]).result.unwrap();
    client.write(0, &vec![2; 1 << 20]).unwrap();
    client.call(0, CMD_FLUSH, 0, 0, &[]).result.unwrap();
    // tmpfs cannot zero a range in place: written instead, never refused.
    client.call(CMD_FLAG_NO_HOLE, CMD_WRITE_ZEROES, 100, 100_000, &[]).result.unwrap();
    assert!(client.read(0, 1 << 20).unwrap()[100..100_100].iter().all(|byte| *byte == 0));
}

#[test]
fn a_block_device_is_served_zeroed_at_any_alignment_and_flushed() {
    let folder = tempfile::tempdir().unwrap();
    let backing = sparse(folder.path(), 8 * MIB);
    let device = run("losetup", &["--find", "--show", backing.to_str().unwrap()]);
    let _undo = Undo("losetup", vec!["--detach".into(), device.clone()]);
    let disk = FileDisk::open(Path::new(&device), LocalDiskConfig::new("disk")).unwrap();
    assert!(disk.file().is_block_device());
    assert_eq!(disk.info().size_bytes, 8 * MIB);
    let rig = Rig::new(Arc::new(disk));
    let mut client = rig.client();
    let mut model = vec![5u8; 8 * MIB as usize];
    client.write(0, &model).unwrap();
    let zeroing =
        [(0, 1 << 20, 0), (5000, 70_001, 0), (2 << 20, 100_000, CMD_FLAG_NO_HOLE), (511, 2, 0), (512, 512, 0)];
    for (at, length, flags) in zeroing {
        let kind = if flags == 0 && length > 1000 { CMD_TRIM } else { CMD_WRITE_ZEROES };
        client.call(flags | CMD_FLAG_FUA, kind, at, length, &[]).result.unwrap();
        model[at as usize..(at + u64::from(length)) as usize].fill(0);
    }
    assert!(client.read(0, 8 << 20).unwrap() == model);
    client.call(0, CMD_FLUSH, 0, 0, &[]).result.unwrap();
    assert!(std::fs::read(&backing).unwrap() == model, "flushed means on the medium below the device");
    assert_eq!(client.call(0, CMD_BLOCK_STATUS, 0, 8 << 20, &[]).extents, [(8 << 20, 0)]);
}

/// Collects completions.
#[derive(Default)]
struct Sink(Mutex<HashMap<u64, Result<(), Errno>>>, Condvar);
impl Completion for Sink {
    fn complete(&self, id: u64, result: Result<(), Errno>, _data: Vec<u8>) {
        assert!(self.0.lock().unwrap().insert(id, result).is_none(), "completed twice");
        self.1.notify_all();
    }
}
impl Sink {
    fn wait(&self, count: usize) -> HashMap<u64, Result<(), Errno>> {
        let done = self.0.lock().unwrap();
        let (done, timeout) =
            self.1.wait_timeout_while(done, Duration::from_secs(20), |done| done.len() < count).unwrap();
        assert!(!timeout.timed_out(), "only {} of {count}", done.len());
        done.clone()
    }
}

/// A wrapper that records its calls, and decides by offset: the first block is refused, odd blocks need waiting.
#[derive(Default)]
struct Recorder {
    calls: Mutex<Vec<(&'static str, u64)>>,
    blocking_threads: Mutex<Vec<std::thread::ThreadId>>,
    in_flight: AtomicUsize,
}

impl Around for Recorder {
    type Ticket = u64;
    fn before(&self, request: &Request) -> Prologue<u64> {
        let block = request.offset / 4096;
        self.calls.lock().unwrap().push(("before", request.id));
        match block {
            0 if request.op == Op::Write => Prologue::Refuse(Errno::Perm),
            block if block % 2 == 1 => Prologue::Blocking,
            _ => {
                self.in_flight.fetch_add(1, Ordering::SeqCst);
                Prologue::Go(request.id)
            }
        }
    }
    fn before_blocking(&self, request: &Request, file: &LocalFile) -> Result<u64, Errno> {
        let mut old = vec![0; request.length as usize];
        file.read_at(request.offset, &mut old).unwrap();
        assert!(old.iter().all(|byte| *byte == 0), "the prologue comes before the write");
        self.calls.lock().unwrap().push(("blocking", request.id));
        self.blocking_threads.lock().unwrap().push(std::thread::current().id());
        if request.offset == 3 * 4096 {
            return Err(Errno::Io);
        }
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        Ok(request.id)
    }
    fn after(&self, request: &Request, ticket: u64, result: Result<(), Errno>) -> Result<(), Errno> {
        assert_eq!(ticket, request.id);
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        self.calls.lock().unwrap().push(("after", request.id));
        result
    }
}

#[test]
fn a_wrapper_sees_every_request_before_its_io_and_after_it_and_before_the_client_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = sparse(folder.path(), MIB);
    let recorder = Arc::new(Recorder::default());
    let disk = LocalDisk::open_around(&path, LocalDiskConfig::new("disk"), recorder.clone()).unwrap();
    let sink = Arc::new(Sink::default());
    for id in 0..20u64 {
        let (op, fua) = (Op::Write, id % 4 == 2);
        let data = vec![1; 4096];
        disk.submit(Request { id, op, offset: id * 4096, length: 4096, fua, data, reply: sink.clone() });
    }
    disk.submit(Request { id: 20, op: Op::Flush, offset: 0, length: 0, fua: false, data: vec![], reply: sink.clone() });
    let done = sink.wait(21);
    for (id, result) in &done {
        let expected = match id {
            0 => Err(Errno::Perm),
            3 => Err(Errno::Io),
            _ => Ok(()),
        };
        assert_eq!(*result, expected, "request {id}");
    }
    assert_eq!(recorder.in_flight.load(Ordering::SeqCst), 0);
    let calls = recorder.calls.lock().unwrap();
    for id in 1..=20u64 {
        let seen: Vec<&str> = calls.iter().filter(|(_, of)| *of == id).map(|(what, _)| *what).collect();
        let expected: &[&str] = match id {
            3 => &["before", "blocking"],
            id if id % 2 == 1 => &["before", "blocking", "after"],
            _ => &["before", "after"],
        };
        assert_eq!(seen, expected, "request {id}");
    }
    let me = std::thread::current().id();
    assert!(recorder.blocking_threads.lock().unwrap().iter().all(|thread| *thread != me));
    let content = std::fs::read(&path).unwrap();
    assert!(content[..4096].iter().chain(&content[3 * 4096..4 * 4096]).all(|byte| *byte == 0), "refused");
    assert!(content[4096..3 * 4096].iter().chain(&content[4 * 4096..20 * 4096]).all(|byte| *byte == 1));
}

/// Waits in its blocking prologue until all of them are there.
struct Gathering(std::sync::Barrier);
impl Around for Gathering {
    type Ticket = ();
    fn before(&self, _: &Request) -> Prologue<()> {
        Prologue::Blocking
    }
    fn before_blocking(&self, _: &Request, _: &LocalFile) -> Result<(), Errno> {
        self.0.wait();
        Ok(())
    }
    fn after(&self, _: &Request, (): (), result: Result<(), Errno>) -> Result<(), Errno> {
        result
    }
}

#[test]
fn a_slow_disk_sees_the_whole_queue_depth_of_one_connection() {
    let folder = tempfile::tempdir().unwrap();
    let path = sparse(folder.path(), MIB);
    let around = Gathering(std::sync::Barrier::new(32));
    let disk = LocalDisk::open_around(&path, LocalDiskConfig::new("disk"), around).unwrap();
    let rig = Rig::new(Arc::new(disk));
    let mut client = rig.client();
    for i in 0..32 {
        client.send(0, CMD_WRITE, i * 4096, 4096, &[1; 4096]);
    }
    // Each waits for all the others: they only finish if all 32 are in their prologue at once.
    for _ in 0..32 {
        client.answer().unwrap().result.unwrap();
    }
    eventually("everything is accounted for", || {
        let connections = rig.server.report().connections;
        connections[0].outstanding_requests == 0 && connections[0].outstanding_bytes == 0
    });
}
