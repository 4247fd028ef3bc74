//! Clients that are wrong, slow, silent or gone: they get what the specification says, cost bounded memory, and
//! never hurt another client.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::Write;
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::{Client, MemoryDisk, Rig, eventually};
use proptest::prelude::*;
use watari_core::front::{Detach, Errno};
use watari_core::nbd::wire::*;
use watari_nbd::Limits;

const MIB: usize = 1 << 20;

#[test]
fn requests_out_of_step_are_cut_off_and_others_go_on() {
    let rig = Rig::new(MemoryDisk::new("disk", MIB));
    let mut good = rig.client();
    let mut wrong_magic = rig.client();
    wrong_magic.stream.write_all(&[0x42; 28]).unwrap();
    assert!(wrong_magic.closed());
    let mut endless = rig.client();
    endless.stream.write_all(&Client::header(0, CMD_WRITE, 1, 0, PAYLOAD_BYTES_MAX + 1)).unwrap();
    assert!(endless.closed());
    good.write(0, b"still here").unwrap();
    assert_eq!(good.read(0, 10).unwrap(), b"still here");
}

#[test]
fn refused_requests_are_answered_with_their_errno_and_the_connection_goes_on() {
    for structured in [true, false] {
        let rig = Rig::new(MemoryDisk::new("disk", MIB));
        let mut client = Client::enter(&rig.path, structured);
        let size = MIB as u64;
        let mut errno = |flags, kind, offset, length, payload: &[u8]| {
            client.call(flags, kind, offset, length, payload).result.unwrap_err()
        };
        assert_eq!(errno(0, CMD_READ, size, 1, &[]), 22);
        // The payload of a refused write is skipped, not taken for requests.
        assert_eq!(errno(0, CMD_WRITE, size - 1, 300, &[0x25; 300]), 28);
        assert_eq!(errno(1 << 15, CMD_WRITE, 0, 70_000, &vec![0x25; 70_000]), 22);
        assert_eq!(errno(0, 99, 0, 1, &[]), 22);
        assert_eq!(errno(0, CMD_FLUSH, 1, 0, &[]), 22);
        assert_eq!(errno(CMD_FLAG_FAST_ZERO, CMD_WRITE_ZEROES, 0, 10, &[]), 95);
        client.write(0, b"fine").unwrap();
        assert_eq!(client.read(0, 4).unwrap(), b"fine");
        assert_eq!(client.read(5, 0).unwrap(), b"");
        assert_eq!(rig.server.report().connections[0].counters.errors, 6);
    }
}

#[test]
fn a_read_only_export_refuses_every_change_with_eperm() {
    let rig = Rig::new(MemoryDisk::read_only("disk", MIB));
    let mut client = rig.client();
    assert_ne!(client.flags & TRANSMIT_READ_ONLY, 0);
    assert_eq!(client.write(0, b"no").unwrap_err(), 1);
    assert_eq!(client.call(0, CMD_TRIM, 0, 10, &[]).result.unwrap_err(), 1);
    assert_eq!(client.call(0, CMD_WRITE_ZEROES, 0, 10, &[]).result.unwrap_err(), 1);
    assert_eq!(client.read(0, 2).unwrap(), [0, 0]);
}

#[test]
fn errors_of_the_disk_reach_the_client_as_they_are() {
    let disk = MemoryDisk::new("disk", 4 * MIB);
    let rig = Rig::new(disk.clone());
    for structured in [true, false] {
        let mut client = Client::enter(&rig.path, structured);
        for (errno, number) in [(Errno::NoSpace, 28), (Errno::Io, 5), (Errno::ShuttingDown, 108)] {
            *disk.fail.lock().unwrap() = Some(errno);
            assert_eq!(client.write(0, b"x").unwrap_err(), number);
            assert_eq!(client.read(0, 512).unwrap_err(), number);
            // In several parts, all of which fail: one error.
            assert_eq!(client.read(100, 3 << 20).unwrap_err(), number);
            assert_eq!(client.call(0, CMD_FLUSH, 0, 0, &[]).result.unwrap_err(), number);
            *disk.fail.lock().unwrap() = None;
            assert_eq!(client.read(0, 3).unwrap(), [0; 3]);
        }
    }
}

#[test]
fn a_half_open_handshake_ends_by_its_deadline_whatever_the_client_does() {
    let limits = Limits { handshake_timeout: Duration::from_millis(300), ..Limits::default() };
    let disk = MemoryDisk::new("disk", MIB);
    let rig = Rig::with(disk.clone(), limits);
    let began = Instant::now();
    let mut silent = Client::greet(&rig.path);
    let mut chatty = Client::greet(&rig.path);
    assert!(silent.closed());
    while chatty.option(OPT_LIST, &[]).is_some() {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(began.elapsed() < Duration::from_secs(5));
    eventually("both are gone", || rig.server.report().connections.is_empty());
    assert!(disk.attached.lock().unwrap().is_empty());
}

#[test]
fn a_client_that_never_reads_costs_bounded_memory_and_nobody_elses_time() {
    let limits = Limits::default();
    let (requests_max, bytes_max) = (limits.requests_per_connection, limits.bytes_per_connection);
    let disk = MemoryDisk::new("disk", 4 * MIB);
    disk.data.lock().unwrap().fill(1);
    let rig = Rig::with(disk.clone(), limits);
    let mut greedy = rig.client();
    let flood: Vec<u8> = (0..4000).flat_map(|i| Client::header(0, CMD_READ, i, 0, 256 << 10)).collect();
    greedy.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let _blocked_at_some_point = greedy.stream.write_all(&flood);
    let mut errors = rig.client();
    let flood: Vec<u8> = (0..100_000).flat_map(|i| Client::header(1 << 14, CMD_READ, i, 0, 1)).collect();
    errors.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let _blocked_at_some_point = errors.stream.write_all(&flood);

    eventually("two clients are stuck", || {
        rig.server.report().connections.iter().filter(|c| c.blocked.is_some()).count() == 2
    });
    for connection in rig.server.report().connections {
        assert!(connection.outstanding_requests <= requests_max, "{connection:?}");
        assert!(connection.outstanding_bytes <= bytes_max, "{connection:?}");
    }
    let (began, mut good) = (Instant::now(), rig.client());
    for _ in 0..200 {
        good.read(0, 4096).unwrap();
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());

    // When it reads again, everything it asked for is there.
    greedy.structured = true;
    drop(errors);
    let mut seen = 0;
    let mut byte = vec![0; 1 << 20];
    greedy.stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    while let Ok(bytes @ 1..) = std::io::Read::read(&mut greedy.stream, &mut byte) {
        seen += bytes;
    }
    assert!(seen > 64 << 20, "only {seen} bytes came");
}

#[test]
fn a_client_that_reads_slowly_gets_everything_from_a_disk_that_answers_on_other_threads() {
    let disk = MemoryDisk::new("disk", 4 * MIB);
    for (at, byte) in disk.data.lock().unwrap().iter_mut().enumerate() {
        *byte = (at / 4096) as u8 | 1;
    }
    let rig = Rig::new(disk.clone());
    let mut client = rig.client();
    for _ in 0..5 {
        disk.hold.store(true, Ordering::SeqCst);
        let cookies: Vec<u64> = (0..20).map(|i| client.send(0, CMD_READ, i * 65536, 65536, &[])).collect();
        eventually("all requests are held", || disk.held.lock().unwrap().len() == 20);
        // Completions come from this thread; the socket takes a fraction of them.
        disk.release();
        std::thread::sleep(Duration::from_millis(20));
        let mut answered: Vec<u64> = cookies.iter().map(|_| client.answer().unwrap().cookie).collect();
        answered.sort_unstable();
        assert_eq!(answered, cookies);
    }
}

#[test]
fn a_client_that_vanishes_in_the_middle_of_a_payload_has_written_nothing_of_that_part() {
    let disk = MemoryDisk::new("disk", 4 * MIB);
    let rig = Rig::new(disk.clone());
    let mut client = rig.client();
    client.stream.write_all(&Client::header(0, CMD_WRITE, 1, 0, 100_000)).unwrap();
    client.stream.write_all(&[9; 50_000]).unwrap();
    drop(client);
    eventually("the connection is gone", || rig.server.report().connections.is_empty());
    assert!(disk.data.lock().unwrap().iter().all(|byte| *byte == 0));
    assert_eq!(disk.detached.lock().unwrap().len(), 1);
    assert_eq!(disk.detached.lock().unwrap()[0].1, Detach::Lost);
}

#[test]
fn detach_comes_once_after_the_last_request_and_says_how_it_ended() {
    let disk = MemoryDisk::new("disk", MIB);
    let rig = Rig::new(disk.clone());
    disk.hold.store(true, Ordering::SeqCst);
    let mut lost = rig.client();
    lost.send(0, CMD_WRITE, 0, 3, b"abc");
    eventually("the write is held", || disk.held.lock().unwrap().len() == 1);
    drop(lost);
    std::thread::sleep(Duration::from_millis(100));
    assert!(disk.detached.lock().unwrap().is_empty(), "a request is outstanding");
    disk.release();
    eventually("it is detached", || disk.detached.lock().unwrap().len() == 1);
    let mut clean = rig.client();
    clean.send(0, CMD_DISC, 0, 0, &[]);
    assert!(clean.closed());
    eventually("it is detached", || disk.detached.lock().unwrap().len() == 2);
    let detached = disk.detached.lock().unwrap().clone();
    let attached = disk.attached.lock().unwrap().clone();
    assert_eq!(detached, [(attached[0], Detach::Lost), (attached[1], Detach::Clean)]);
}

#[test]
fn requests_of_one_connection_overtake_each_other() {
    let disk = MemoryDisk::new("disk", MIB);
    let rig = Rig::new(disk.clone());
    let mut client = rig.client();
    disk.hold.store(true, Ordering::SeqCst);
    let slow = client.send(0, CMD_READ, 0, 512, &[]);
    eventually("the first is held", || disk.held.lock().unwrap().len() == 1);
    disk.hold.store(false, Ordering::SeqCst);
    let fast = client.send(0, CMD_READ, 512, 512, &[]);
    assert_eq!(client.answer().unwrap().cookie, fast);
    disk.release();
    assert_eq!(client.answer().unwrap().cookie, slow);
}

#[test]
fn a_goodbye_behind_many_requests_still_lets_their_answers_out() {
    let disk = MemoryDisk::new("disk", MIB);
    let rig = Rig::new(disk.clone());
    let mut client = rig.client();
    let mut stream = Vec::new();
    for i in 0..50u64 {
        stream.extend(client.ask(0, CMD_READ, i * 4096, 4096, &[]).1);
    }
    stream.extend(Client::header(0, CMD_DISC, 0, 0, 0));
    client.stream.write_all(&stream).unwrap();
    for _ in 0..50 {
        client.answer().unwrap();
    }
    assert!(client.closed());
    // The same for a client that only closes its sending side.
    let mut client = rig.client();
    client.send(0, CMD_READ, 0, 4096, &[]);
    client.stream.shutdown(Shutdown::Write).unwrap();
    client.answer().unwrap();
    assert!(client.closed());
}

#[test]
fn when_all_places_are_taken_the_lifeless_lose_theirs_and_the_living_keep_theirs() {
    let limits = Limits { connections: 3, stalled_after: Duration::from_millis(300), ..Limits::default() };
    let disk = MemoryDisk::new("disk", MIB);
    disk.data.lock().unwrap().fill(1);
    let rig = Rig::with(disk, limits);
    let mut living = [rig.client(), rig.client()];
    let mut stuck = rig.client();
    for _ in 0..100 {
        stuck.send(0, CMD_READ, 0, 64 << 10, &[]);
    }
    eventually("one client is stuck", || rig.server.report().connections.iter().any(|c| c.blocked.is_some()));
    // Too early to call it lifeless: the newcomer is turned away.
    let refused = rig.server.report().refused;
    let mut newcomer = std::os::unix::net::UnixStream::connect(&rig.path).unwrap();
    let _ = std::io::Read::read(&mut newcomer, &mut [0; 18]);
    eventually("the newcomer is turned away", || rig.server.report().refused == refused + 1);
    std::thread::sleep(Duration::from_millis(400));
    let mut newcomer = rig.client();
    newcomer.read(0, 512).unwrap();
    for client in &mut living {
        client.read(0, 512).unwrap();
    }
    let report = rig.server.report();
    assert_eq!((report.evicted, report.connections.len()), (1, 3));
}

#[test]
fn shutting_down_answers_what_is_outstanding_and_leaves_nothing_behind() {
    let disk = MemoryDisk::new("disk", MIB);
    let rig = Rig::new(disk.clone());
    let mut client = rig.client();
    let mut haggling = Client::greet(&rig.path);
    disk.hold.store(true, Ordering::SeqCst);
    client.send(0, CMD_WRITE, 0, 3, b"abc");
    eventually("the write is held", || disk.held.lock().unwrap().len() == 1);
    let releasing = disk.clone();
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        releasing.release();
    });
    assert!(rig.server.shutdown(Duration::from_secs(10)));
    assert_eq!(client.answer().unwrap().result, Ok(vec![]));
    assert!(client.closed() && haggling.closed());
    assert!(!rig.path.exists());
    assert_eq!(disk.detached.lock().unwrap().len(), 1);
    release.join().unwrap();
}

#[test]
fn a_disk_that_refuses_a_client_says_why() {
    let disk = MemoryDisk::new("disk", MIB);
    *disk.refuse.lock().unwrap() = Some("not in sync yet".into());
    let rig = Rig::new(disk.clone());
    let mut client = Client::greet(&rig.path);
    let replies = client.option(OPT_GO, &[0; 6]).unwrap();
    assert_eq!(replies, [(REP_ERR_POLICY, b"not in sync yet".to_vec())]);
    *disk.refuse.lock().unwrap() = None;
    assert_eq!(client.option(OPT_GO, &[0; 6]).unwrap().last().unwrap().0, REP_ACK);
}

#[test]
fn a_client_that_leaves_right_after_go_is_attached_and_detached() {
    let disk = MemoryDisk::new("disk", MIB);
    let rig = Rig::new(disk.clone());
    for _ in 0..50 {
        let mut client = Client::greet(&rig.path);
        let mut option = OPTION_MAGIC.to_be_bytes().to_vec();
        option.extend_from_slice(&OPT_GO.to_be_bytes());
        option.extend_from_slice(&[0, 0, 0, 6, 0, 0, 0, 0, 0, 0]);
        client.stream.write_all(&option).unwrap();
        drop(client);
    }
    eventually("all are gone", || rig.server.report().connections.is_empty());
    assert_eq!(disk.attached.lock().unwrap().len(), disk.detached.lock().unwrap().len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// Arbitrary bytes in either phase: the server closes or answers, and serves the next client.
    #[test]
    fn any_bytes_are_survived(
        transmission in any::<bool>(),
        pieces in proptest::collection::vec(
            prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..200),
                (any::<u16>(), 0u16..9, any::<u64>(), any::<u32>(), 0u8..3).prop_map(|(flags, kind, offset, length, tame)| {
                    let (offset, length) = if tame > 0 { (offset % MIB as u64, length % 9000) } else { (offset, length) };
                    let flags = if tame > 1 { flags & 0x1f } else { flags };
                    let mut bytes = Client::header(flags, kind, offset, offset, length);
                    if kind == CMD_WRITE && tame > 0 {
                        bytes.resize(bytes.len() + length as usize, 0x55);
                    }
                    bytes
                }),
            ],
            0..12,
        ),
    ) {
        static RIG: std::sync::OnceLock<Rig> = std::sync::OnceLock::new();
        let rig = RIG.get_or_init(|| Rig::new(MemoryDisk::new("disk", MIB)));
        let mut client = if transmission { rig.client() } else { Client::greet(&rig.path) };
        client.stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
        let _may_be_cut_off = client.stream.write_all(&pieces.concat());
        let _may_be_closed = client.stream.shutdown(Shutdown::Write);
        let mut sink = Vec::new();
        let _until_closed = std::io::Read::read_to_end(&mut client.stream, &mut sink);
        rig.client().read(0, 512).unwrap();
    }
}
