//! Live migration between two QEMUs over the WAN, without a sidecar: shared files, disks served over NBD, cancelling, and
//! the full block migration that the figures are compared with.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use watari_e2e::process::{Process, wait_until};
use watari_e2e::qemu::{Backing, Machine, MigrationOptions, Qemu, Start, migrate, prepare_target, start_migration};
use watari_e2e::site::{Site, TestBed};
use watari_e2e::wan::Shape;
use watari_e2e::{baseline, image};

const MIB: u64 = 1 << 20;
/// Booting takes 3 s of processor time; the rest is patience with a machine that is busy otherwise.
const BOOT: Duration = Duration::from_secs(120);
const ANSWER: Duration = Duration::from_secs(30);

fn disk(folder: &Path, name: &str, bytes: u64) -> anyhow::Result<PathBuf> {
    let path = folder.join(name);
    std::fs::File::create(&path)?.set_len(bytes)?;
    Ok(path)
}

/// An NBD server in the sidecar's place.
fn nbd_server(site: &Site, file: &Path) -> anyhow::Result<(Process, Backing)> {
    let socket = site.dir.join("nbd.sock");
    let _ = std::fs::remove_file(&socket);
    let server = site
        .command("qemu-nbd", "qemu-nbd")
        .args(["--persistent", "--shared=4", "--format=raw", "--discard=unmap", "--export-name=disk0", "--socket"])
        .arg(&socket)
        .arg(file)
        .spawn()?;
    wait_until("the NBD socket", Duration::from_secs(5), || socket.exists().then_some(()))?;
    Ok((server, Backing::Nbd { socket, export: "disk0".into() }))
}

#[test]
fn a_writing_guest_moves_there_and_back_on_shared_files_and_loses_nothing() -> anyhow::Result<()> {
    let bed = TestBed::new("shared", Shape::wan(1_000_000_000, Duration::from_millis(10)))?;
    let disks = [disk(&bed.dir, "0.img", 64 * MIB)?, disk(&bed.dir, "1.img", 64 * MIB)?];
    let backing: Vec<_> = disks.iter().cloned().map(Backing::File).collect();
    let machine = Machine::small(2).with("rate=2500000").with("start=1");
    let mut here = Qemu::start(&bed.a, "vm", &machine, &backing, Start::Boot)?;
    let mut guest = here.control();
    guest.hello(BOOT)?;
    for (turn, site) in [&bed.b, &bed.a].into_iter().enumerate() {
        let there = Qemu::start(site, &format!("vm{turn}"), &machine, &backing, Start::Incoming)?;
        std::thread::sleep(Duration::from_millis(1500));
        guest.reset_gaps()?;
        // The way back takes several streams, as KubeVirt does.
        let options = MigrationOptions { channels: 4 * turn as u32, ..MigrationOptions::default() };
        let report = migrate(&here, &there, site, &options)?;
        guest.move_to(there.control_socket());
        std::thread::sleep(Duration::from_millis(2500));
        let gaps = guest.stats().context("the guest answers where it is now")?.gaps;
        println!("move {turn}: {report:?}\n  {gaps:?}");
        ensure!((gaps.stopped_ms - report.pause_ms).abs() < 50.0, "inside {gaps:?}, outside {report:?}");
        here.quit()?;
        here = there;
    }
    let verdict = guest.verify(ANSWER)?;
    ensure!(verdict.clean() && verdict.groups[0].right > 2000, "{verdict:?}");
    here.quit()?;
    let tallies = image::check(&disks, Some(&verdict.groups[0].acknowledged))?;
    ensure!(tallies.len() == 1 && tallies[0].clean(), "{tallies:?}");
    Ok(())
}

#[test]
fn disks_behind_nbd_move_and_survive_the_servers_death() -> anyhow::Result<()> {
    let bed = TestBed::new("nbd", Shape::wan(1_000_000_000, Duration::from_millis(10)))?;
    let file = disk(&bed.dir, "0.img", 64 * MIB)?;
    let (mut server_a, backing_a) = nbd_server(&bed.a, &file)?;
    let machine = Machine::small(1).with("rate=2000000").with("start=1");
    let source = Qemu::start(&bed.a, "vm", &machine, &[backing_a], Start::Boot)?;
    let mut guest = source.control();
    guest.hello(BOOT)?;
    std::thread::sleep(Duration::from_secs(1));
    server_a.kill9();
    std::thread::sleep(Duration::from_millis(500));
    ensure!(guest.stats()?.streams.iter().all(|stream| stream.errors == 0), "requests wait for the server");
    let (_server_a, _) = nbd_server(&bed.a, &file)?;
    let written = guest.stats()?.streams[0].acknowledged;
    wait_until("writes to go on", ANSWER, || {
        (guest.stats().ok()?.streams[0].acknowledged > written + 50).then_some(())
    })?;

    let (_server_b, backing_b) = nbd_server(&bed.b, &file)?;
    let target = Qemu::start(&bed.b, "vm", &machine, &[backing_b], Start::Incoming)?;
    let report = migrate(&source, &target, &bed.b, &MigrationOptions::default())?;
    println!("{report:?}");
    source.quit()?;
    guest.move_to(target.control_socket());
    let verdict = guest.verify(ANSWER)?;
    ensure!(verdict.clean() && verdict.groups[0].right > 200, "{verdict:?}");
    target.quit()?;
    Ok(())
}

#[test]
fn a_cancelled_migration_leaves_the_guest_running_at_the_source() -> anyhow::Result<()> {
    // So slow that it cannot finish before it is cancelled.
    let bed = TestBed::new("cancel", Shape::wan(20_000_000, Duration::from_millis(50)))?;
    let backing = [Backing::File(disk(&bed.dir, "0.img", 64 * MIB)?)];
    let machine = Machine::small(1).with("rate=1000000").with("start=1");
    let source = Qemu::start(&bed.a, "vm", &machine, &backing, Start::Boot)?;
    let mut guest = source.control();
    guest.hello(BOOT)?;
    let target = Qemu::start(&bed.b, "vm", &machine, &backing, Start::Incoming)?;
    let options = MigrationOptions::default();
    prepare_target(&target, &bed.b, &options)?;
    let migration = start_migration(&source, &target, &bed.b, &options)?;
    std::thread::sleep(Duration::from_secs(2));
    migration.cancel()?;
    ensure!(source.status()? == "running", "{}", source.status()?);
    target.kill();
    let written = guest.stats()?.streams[0].acknowledged;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(guest.stats()?.streams[0].acknowledged > written, "the guest goes on writing");
    ensure!(guest.verify(ANSWER)?.clean());
    source.quit()?;
    Ok(())
}

#[test]
fn the_full_block_migration_of_kubevirt_moves_everything_and_is_measured() -> anyhow::Result<()> {
    let bed = TestBed::new("full", Shape::wan(400_000_000, Duration::from_millis(20)))?;
    let machine = Machine::small(2).with("rate=1000000").with("start=1");
    let make = |site: &Site| -> anyhow::Result<[PathBuf; 2]> {
        Ok([disk(&site.dir, "0.img", 96 * MIB)?, disk(&site.dir, "1.img", 96 * MIB)?])
    };
    let (disks_a, disks_b) = (make(&bed.a)?, make(&bed.b)?);
    // Data that must cross as it is: half of the first disk, which the workload does not touch.
    let mut random = std::fs::File::open("/dev/urandom")?;
    let mut file = std::fs::OpenOptions::new().write(true).open(&disks_a[0])?;
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(48 * MIB))?;
    std::io::copy(&mut std::io::Read::take(&mut random, 48 * MIB), &mut file)?;

    let files = |disks: &[PathBuf; 2]| disks.clone().map(Backing::File);
    let source = Qemu::start(&bed.a, "vm", &machine, &files(&disks_a), Start::Boot)?;
    let mut guest = source.control();
    guest.hello(BOOT)?;
    let target = Qemu::start(&bed.b, "vm", &machine, &files(&disks_b), Start::IncomingStopped)?;
    guest.reset_gaps()?;
    let report = baseline::migrate(&bed, &source, &target, 2, Duration::from_secs(120))?;
    println!("{report:?}");
    guest.move_to(target.control_socket());
    std::thread::sleep(Duration::from_millis(2500));
    println!("{:?}", guest.stats()?.gaps);
    let verdict = guest.verify(ANSWER)?;
    ensure!(verdict.clean() && verdict.groups[0].right > 200, "{verdict:?}");
    ensure!(report.link_bytes > 48 * MIB + report.memory.ram_bytes, "{report:?}");
    source.quit()?;
    target.quit()?;
    let compared = |a: &PathBuf, b: &PathBuf| -> anyhow::Result<bool> {
        Ok(std::fs::read(a)?[48 * MIB as usize..] == std::fs::read(b)?[48 * MIB as usize..])
    };
    ensure!(compared(&disks_a[0], &disks_b[0])?, "what nobody wrote meanwhile is identical");
    let tallies = image::check(&disks_b, Some(&verdict.groups[0].acknowledged))?;
    ensure!(tallies.len() == 1 && tallies[0].clean(), "{tallies:?}");
    Ok(())
}
