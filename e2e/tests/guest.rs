//! The guest boots, writes, judges itself, and survives a plain live migration. No sidecar is involved.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use watari_e2e::image;
use watari_e2e::qemu::{Backing, Machine, MigrationOptions, Qemu, Start, migrate};
use watari_e2e::site::TestBed;
use watari_e2e::wan::Shape;

const MIB: u64 = 1 << 20;
const BOOT: Duration = Duration::from_secs(30);
const ANSWER: Duration = Duration::from_secs(30);

fn disk(folder: &std::path::Path, name: &str, bytes: u64) -> anyhow::Result<PathBuf> {
    let path = folder.join(name);
    std::fs::File::create(&path)?.set_len(bytes)?;
    Ok(path)
}

#[test]
fn a_guest_moves_between_two_qemus_on_shared_files_and_finds_every_block() -> anyhow::Result<()> {
    let bed = TestBed::new("shared", Shape::wan(1_000_000_000, Duration::from_millis(10)))?;
    let disks = [disk(&bed.dir, "0.img", 64 * MIB)?, disk(&bed.dir, "1.img", 64 * MIB)?];
    let backing: Vec<_> = disks.iter().cloned().map(Backing::File).collect();
    let machine = Machine::small(2).with("rate=2500000").with("start=1");
    let start = Instant::now();
    let source = Qemu::start(&bed.a, "vm", &machine, &backing, Start::Boot)?;
    let mut guest = source.control();
    let hello = guest.hello(BOOT)?;
    println!("up after {:.1} s: {hello:?}", start.elapsed().as_secs_f64());
    let target = Qemu::start(&bed.b, "vm", &machine, &backing, Start::Incoming)?;
    std::thread::sleep(Duration::from_secs(2));
    guest.reset_gaps()?;
    let report = migrate(&source, &target, &bed.b, &MigrationOptions::default())?;
    println!("{report:?}");
    guest.move_to(target.control_socket());
    std::thread::sleep(Duration::from_secs(3));
    let stats = guest.stats().context("the guest answers at the target")?;
    println!("{stats:?}");
    let verdict = guest.verify(ANSWER)?;
    println!("{verdict:?}");
    ensure!(verdict.clean(), "{verdict:?}");
    source.quit()?;
    target.quit()?;
    let tallies = image::check(&disks, Some(&verdict.groups[0].acknowledged))?;
    println!("{tallies:?}");
    Ok(())
}
