//! The guest boots, writes, judges itself and is not fooled. One machine, no network, no sidecar.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use watari_e2e::guest::Control;
use watari_e2e::image;
use watari_e2e::process::wait_until;
use watari_e2e::qemu::{Backing, Machine, Qemu, Start};
use watari_e2e::site::TestBed;
use watari_e2e::wan::Shape;
use watari_guest::block::BLOCK_BYTES;

const MIB: u64 = 1 << 20;
/// Booting takes 3 s of processor time; the rest is patience with a machine that is busy otherwise.
const BOOT: Duration = Duration::from_secs(120);
const ANSWER: Duration = Duration::from_secs(30);

fn disk(folder: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let path = folder.join(name);
    std::fs::File::create(&path)?.set_len(64 * MIB)?;
    Ok(path)
}

fn files(disks: &[PathBuf]) -> Vec<Backing> {
    disks.iter().cloned().map(Backing::File).collect()
}

/// Lets the guest write until it has done `operations` in every stream.
fn write(guest: &mut Control, operations: u64) -> anyhow::Result<()> {
    guest.resume()?;
    let deadline = Instant::now() + ANSWER;
    loop {
        let stats = guest.stats()?;
        if stats.streams.iter().all(|stream| stream.acknowledged >= operations) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{stats:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_guest_boots_writes_with_and_without_fsync_and_both_judges_agree() -> anyhow::Result<()> {
    let bed = TestBed::new("boot", Shape::default())?;
    let disks = [disk(&bed.dir, "0.img")?, disk(&bed.dir, "1.img")?];
    // A small working set at a high rate: every block is written several times.
    let machine = Machine::small(2).with("rate=8000000").with("blocks=512");
    let start = Instant::now();
    let vm = Qemu::start(&bed.a, "vm", &machine, &files(&disks), Start::Boot)?;
    let mut guest = vm.control();
    let hello = guest.hello(BOOT)?;
    println!("boot: {:.2} s outside, {:.2} s inside", start.elapsed().as_secs_f64(), hello.uptime_seconds);
    ensure!(hello.groups.len() == 1 && hello.groups[0].disks == ["vda", "vdb"], "{hello:?}");

    write(&mut guest, 400)?;
    let verdict = guest.verify(ANSWER)?;
    ensure!(verdict.clean() && verdict.groups[0].right > 900, "{verdict:?}");
    let stats = guest.stats()?;
    ensure!(stats.streams[1].durable && stats.gaps.fsync_ms > 0.0 && stats.gaps.heartbeat_ms > 0.0, "{stats:?}");

    // The same answer from outside, with the guest's own count and without.
    vm.quit()?;
    for acknowledged in [Some(verdict.groups[0].acknowledged.as_slice()), None] {
        let tallies = image::check(&disks, acknowledged)?;
        ensure!(tallies.len() == 1 && tallies[0].clean() && tallies[0].right > 900, "{tallies:?}");
        ensure!(tallies[0].acknowledged == verdict.groups[0].acknowledged, "{tallies:?}");
    }
    Ok(())
}

#[test]
fn every_kind_of_damage_behind_the_guests_back_is_found_by_both_judges() -> anyhow::Result<()> {
    let bed = TestBed::new("damage", Shape::default())?;
    let disks = [disk(&bed.dir, "0.img")?];
    let machine = Machine::small(1).with("rate=8000000").with("blocks=512").with("zero=0");
    let vm = Qemu::start(&bed.a, "vm", &machine, &files(&disks), Start::Boot)?;
    let mut guest = vm.control();
    let layout = guest.hello(BOOT)?.groups[0].layout;
    write(&mut guest, 100)?;
    ensure!(guest.verify(ANSWER)?.clean());
    let old = std::fs::read(&disks[0])?;
    guest.set_rate(100_000_000)?;
    write(&mut guest, 400)?;
    let verdict = guest.verify(ANSWER)?;
    ensure!(verdict.clean(), "{verdict:?}");
    let done = verdict.groups[0].acknowledged.clone();

    // Five blocks that were written in both phases: four are damaged in four ways, one block never written is disturbed.
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&disks[0])?;
    let (before, now) = (layout.newest(0, 100), layout.newest(0, done[0]));
    let rewritten: Vec<u64> = (0..layout.slots())
        .filter(|&slot| before[slot as usize] > 0 && now[slot as usize] > before[slot as usize])
        .collect();
    ensure!(rewritten.len() >= 4, "only {} blocks were rewritten", rewritten.len());
    let offset = |slot: u64| layout.place(0, slot).block * BLOCK_BYTES as u64;
    let old_block = |slot: u64| old[offset(slot) as usize..offset(slot) as usize + BLOCK_BYTES].to_vec();
    file.write_all_at(&[0; BLOCK_BYTES], offset(rewritten[0]))?; // lost
    file.write_all_at(&old_block(rewritten[1]), offset(rewritten[1]))?; // resurrected
    file.write_all_at(&old_block(rewritten[2])[2048..], offset(rewritten[2]) + 2048)?; // torn
    file.write_all_at(&old_block(rewritten[1]), offset(rewritten[3]))?; // foreign

    let verdict = guest.verify(ANSWER)?;
    let tally = &verdict.groups[0];
    println!("{tally:?}");
    let kinds = (tally.missing, tally.resurrected, tally.torn, tally.foreign);
    ensure!(kinds == (1, 1, 1, 1) && !verdict.clean(), "{tally:?}");
    vm.quit()?;
    let tally = &image::check(&disks, Some(&done))?[0];
    let kinds = (tally.missing, tally.resurrected, tally.torn, tally.foreign);
    ensure!(kinds == (1, 1, 1, 1), "{tally:?}");
    Ok(())
}

#[test]
fn shifted_blocks_and_discards_are_written_and_verified_too() -> anyhow::Result<()> {
    let bed = TestBed::new("shift", Shape::default())?;
    for (shift, discards_expected) in [(0, true), (1536, false)] {
        let disks = [disk(&bed.dir, &format!("{shift}.img"))?];
        let machine = Machine::small(1)
            .with(format!("shift={shift}"))
            .with("zero=40")
            .with("rate=8000000")
            .with("blocks=512")
            .with("churn=4000000");
        let vm = Qemu::start(&bed.a, "vm", &machine, &files(&disks), Start::Boot)?;
        let mut guest = vm.control();
        guest.hello(BOOT)?;
        write(&mut guest, 300)?;
        let verdict = guest.verify(ANSWER)?;
        ensure!(verdict.clean() && verdict.groups[0].right > 450, "{verdict:?}");
        let streams = guest.stats()?.streams;
        ensure!((streams[0].discards > 20) == discards_expected && streams[0].discards_kept == 0, "{streams:?}");
        vm.quit()?;
        let tallies = image::check(&disks, Some(&verdict.groups[0].acknowledged))?;
        ensure!(tallies.len() == 1 && tallies[0].clean() && tallies[0].right == verdict.groups[0].right, "{tallies:?}");
    }
    Ok(())
}

#[test]
fn a_pause_of_the_machine_is_measured_from_inside() -> anyhow::Result<()> {
    let bed = TestBed::new("pause", Shape::default())?;
    let disks = [disk(&bed.dir, "0.img")?];
    let machine = Machine::small(1).with("rate=1000000").with("start=1");
    let vm = Qemu::start(&bed.a, "vm", &machine, &files(&disks), Start::Boot)?;
    let mut guest = vm.control();
    guest.hello(BOOT)?;
    for asked_ms in [120, 700, 2300] {
        std::thread::sleep(Duration::from_millis(2500));
        guest.reset_gaps()?;
        // A gap lies between two durable writes: the first must be there before the stop (seen missing once).
        wait_until("a durable write", ANSWER, || guest.stats().ok().filter(|stats| stats.gaps.fsync_ms > 0.0))?;
        let mark = vm.qmp.mark();
        vm.qmp.execute("stop", serde_json::json!({}))?;
        std::thread::sleep(Duration::from_millis(asked_ms));
        vm.qmp.execute("cont", serde_json::json!({}))?;
        let at =
            |name: &str| vm.qmp.wait_event(name, mark, ANSWER, |event| event.name == name).map(|event| event.seconds);
        let real_ms = (at("RESUME")? - at("STOP")?) * 1000.0;
        std::thread::sleep(Duration::from_millis(2500));
        let gaps = guest.stats()?.gaps;
        println!("stopped for {real_ms:.1} ms: {gaps:?}");
        ensure!((gaps.stopped_ms - real_ms).abs() < 25.0, "stopped for {real_ms} ms: {gaps:?}");
        // The felt pause contains the stop, once.
        for felt_ms in [gaps.pause_ms, gaps.fsync_ms] {
            ensure!((gaps.stopped_ms - 5.0..gaps.stopped_ms + 600.0).contains(&felt_ms), "{gaps:?}");
        }
    }
    ensure!(guest.verify(ANSWER)?.clean());
    Ok(())
}

#[test]
fn a_guest_stopped_at_random_instants_loses_neither_its_mind_nor_a_block() -> anyhow::Result<()> {
    let bed = TestBed::new("stops", Shape::default())?;
    let disks = [disk(&bed.dir, "0.img")?];
    let machine = Machine::small(1).with("rate=8000000").with("blocks=512").with("start=1");
    let vm = Qemu::start(&bed.a, "vm", &machine, &files(&disks), Start::Boot)?;
    let mut guest = vm.control();
    guest.hello(BOOT)?;
    // Lengths that look random and are the same in every run.
    for turn in 0..60u64 {
        vm.qmp.execute("stop", serde_json::json!({}))?;
        std::thread::sleep(Duration::from_millis(turn * 37 % 61));
        vm.qmp.execute("cont", serde_json::json!({}))?;
        std::thread::sleep(Duration::from_millis(turn * 53 % 47));
    }
    let verdict = guest.verify(ANSWER)?;
    ensure!(verdict.clean() && verdict.groups[0].right > 300, "{verdict:?}");
    ensure!(guest.stats()?.clock_anomalies == 0);
    Ok(())
}

#[test]
fn the_serial_line_serves_as_control_line_too() -> anyhow::Result<()> {
    let bed = TestBed::new("serial", Shape::default())?;
    let disks = [disk(&bed.dir, "0.img")?];
    let machine = Machine::small(1).with("control=ttyS0").with("start=1");
    let vm = Qemu::start(&bed.a, "vm", &machine, &files(&disks), Start::Boot)?;
    let mut guest = Control::new(vm.serial_socket());
    guest.hello(BOOT)?;
    write(&mut guest, 30)?;
    ensure!(guest.verify(ANSWER)?.clean());
    let log = std::fs::read_to_string(vm.serial_log())?;
    ensure!(log.contains("WATARI-GUEST ready"), "the log has what the guest printed: {log}");
    Ok(())
}

#[test]
fn a_workload_on_ext4_runs_beside_the_one_on_raw_disks() -> anyhow::Result<()> {
    let bed = TestBed::new("ext4", Shape::default())?;
    let disks = [disk(&bed.dir, "0.img")?, disk(&bed.dir, "1.img")?];
    let made =
        Command::new("/sbin/mkfs.ext4").args(["-q", "-F"]).arg(&disks[1]).status().context("mkfs.ext4 (e2fsprogs)")?;
    ensure!(made.success());
    let machine = Machine::small(2).with("ext4=vdb").with("blocks=1024").with("rate=4000000");
    let vm = Qemu::start(&bed.a, "vm", &machine, &files(&disks), Start::Boot)?;
    let mut guest = vm.control();
    let hello = guest.hello(BOOT)?;
    let names: Vec<_> = hello.groups.iter().map(|group| (group.name.as_str(), group.disks.as_slice())).collect();
    ensure!(names == [("raw", ["vda".to_owned()].as_slice()), ("ext4", ["vdb".to_owned()].as_slice())], "{names:?}");
    write(&mut guest, 60)?;
    let verdict = guest.verify(ANSWER)?;
    println!("{verdict:?}");
    ensure!(verdict.clean() && verdict.groups.len() == 2 && verdict.groups.iter().all(|tally| tally.right > 100));
    guest.power_off();
    Ok(())
}

#[test]
fn a_second_boot_finds_what_the_first_left_and_guards_it() -> anyhow::Result<()> {
    let bed = TestBed::new("reboot", Shape::default())?;
    let disks = [disk(&bed.dir, "0.img")?];
    let machine = Machine::small(1).with("rate=4000000").with("blocks=1024");
    let vm = Qemu::start(&bed.a, "vm", &machine, &files(&disks), Start::Boot)?;
    let mut guest = vm.control();
    let first = guest.hello(BOOT)?.groups[0].layout;
    write(&mut guest, 100)?;
    // Killed while writing: what the page cache of the host holds is the point in time.
    vm.kill();
    let vm = Qemu::start(&bed.a, "vm", &machine, &files(&disks), Start::Boot)?;
    let mut guest = vm.control();
    let hello = guest.hello(BOOT)?;
    let found = &hello.groups[0].found;
    ensure!(found.len() == 1 && found[0].run == first.run && found[0].clean(), "{found:?}");
    ensure!(found[0].acknowledged.iter().all(|&count| count >= 100), "{found:?}");
    write(&mut guest, 20)?;
    ensure!(guest.verify(ANSWER)?.clean());
    // A block that only the first run wrote is changed behind the second run's back.
    let tallies = image::check(&disks, None)?;
    ensure!(tallies.len() == 2 && tallies.iter().all(|tally| tally.clean()), "{tallies:?}");
    let second = hello.groups[0].layout;
    let done = &guest.stats()?.streams;
    let (ours, theirs) = (second.newest(0, done[0].acknowledged), first.newest(0, found[0].acknowledged[0]));
    let slot = (0..second.slots())
        .find(|&slot| {
            ours[slot as usize] == 0 && theirs[slot as usize] > 0 && !first.operation(0, theirs[slot as usize]).zero
        })
        .context("the first run wrote more than the second")?;
    let file = std::fs::OpenOptions::new().write(true).open(&disks[0])?;
    file.write_all_at(&[0; BLOCK_BYTES], second.place(0, slot).block * BLOCK_BYTES as u64)?;
    let verdict = guest.verify(ANSWER)?;
    ensure!(verdict.groups[0].disturbed == 1, "{verdict:?}");
    Ok(())
}
