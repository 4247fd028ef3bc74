//! Moves in a row, there and back, on the QEMU pair and on the libvirt pair.

use std::time::Duration;

use anyhow::{Context, ensure};
use watari_guest::report::Stats;

use super::{ANSWER, BOOT, Dice, Tally, both_sites_hold, compare, finish, noise, start_pair};
use crate::{
    libvirt::{LibvirtSite, SyncedVm, Trouble, VirtualMachine},
    pair::{DiskSpec, Pair, PairOptions},
    qemu::{Machine, Qemu, Start},
    site::TestBed,
    wan::Shape,
};

/// `moves` moves in a row, there and back, the guest writing at `rate` bytes per second; every third time the link is cut
/// while the pair converges.
pub fn moves(moves: u32, seed: u64, rate: u64) -> anyhow::Result<Tally> {
    let bed = TestBed::new("moves", Shape::wan(200_000_000, Duration::from_millis(40)))?;
    let mut pair = start_pair(&bed, PairOptions { interval: "1s".into(), ..PairOptions::default() })?;
    let machine = Machine::small(2).with(format!("rate={rate}")).with("start=1");
    let mut here = Qemu::start(&bed.a, "vm", &machine, &pair.backings(0), Start::Boot)?;
    let mut guest = here.control();
    guest.hello(BOOT)?;
    pair.cut(0)?;
    let mut dice = Dice::new(seed);
    let mut tally = Tally::default();
    let mut at = 0;
    for n in 0..moves {
        if n % 3 == 2 {
            bed.wan.link_down()?;
            std::thread::sleep(Duration::from_millis(500 + dice.below(3000)));
            bed.wan.restore()?;
            tally.cuts_of_the_link += 1;
        }
        let (there, moved) =
            pair.move_vm(at, &here, &machine, &format!("m{n}")).with_context(|| format!("move {n}, seed {seed}"))?;
        guest.move_to(there.control_socket());
        here.quit()?;
        here = there;
        at = 1 - at;
        tally.moves += 1;
        tally.longest_move_seconds = tally.longest_move_seconds.max(moved.seconds);
        let verdict = guest.verify(ANSWER)?;
        ensure!(verdict.clean(), "after move {n}, seed {seed}: {verdict:?}");
        guest.resume()?;
        pair.cut(at)?;
    }
    compare(&mut pair, at, &mut guest)?;
    finish(&mut pair, at, guest, &mut tally, || Ok(here.quit()?))?;
    Ok(tally)
}

/// How fast the guest of [`libvirt_moves`] writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// A fraction of what the link carries.
    Modest,
    /// More than the link carries, so that only slowing it down lets a move converge.
    FasterThanTheLink,
}

impl Pace {
    /// The link's bits per second and the guest's bytes per second.
    fn rates(self) -> (u64, u64) {
        match self {
            Pace::Modest => (200_000_000, 2_500_000),
            Pace::FasterThanTheLink => (32_000_000, 6_000_000),
        }
    }
}

/// Bytes that the guest was told are written.
fn written(stats: &Stats) -> u64 {
    stats.streams.iter().map(|s| s.bytes).sum()
}

/// Bytes of each disk.
const DISK_BYTES: u64 = 96 << 20;
/// The guest writes into the first 33 MiB of each disk. What lies from here on is data that nobody changes: were a disk copied,
/// it would be seen on the link.
const STILL_FROM: u64 = 40 << 20;
/// A crossing whose disks cost less than this beside what the guest wrote meanwhile sent a delta: half of the still data.
const DELTA_BYTES_MAX: u64 = DISK_BYTES - STILL_FROM;

/// `moves` moves in a row, there and back, between two libvirtd that are driven as virt-launcher and virt-handler drive theirs;
/// of three moves one has its link cut while it converges, one while its memory is on the way; before each fifth another is called
/// off in its middle. Each way is a delta.
pub fn libvirt_moves(moves: u32, seed: u64, pace: Pace) -> anyhow::Result<Tally> {
    let (link, rate) = pace.rates();
    let bed = TestBed::new("libvirt-moves", Shape::wan(link * 4, Duration::from_millis(40)))?;
    let pods = [LibvirtSite::start(&bed.a)?, LibvirtSite::start(&bed.b)?];
    let pods = [&pods[0], &pods[1]];
    let disk = |name| DiskSpec { name, bytes: DISK_BYTES };
    let options = PairOptions {
        disks: vec![disk("disk0"), disk("disk1")],
        interval: "1s".into(),
        tables: "[preserve]\nmemory = \"32MiB\"\n".into(),
        ..PairOptions::default()
    };
    let pair = Pair::in_pods(&bed, pods, options)?;
    for (number, image) in pair.images(0).iter().enumerate() {
        noise(image, STILL_FROM, DISK_BYTES - STILL_FROM, number as u64 + seed)?;
    }
    let machine = Machine::small(2).with(format!("rate={rate}")).with("blocks=8192").with("start=1");
    let mut vm = SyncedVm::boot(pair, pods, VirtualMachine::new("vm", machine))?;
    vm.pair.cut(0).context("the first synchronisation")?;
    bed.wan.change_both(|shape| *shape = Shape::wan(link, Duration::from_millis(40)));
    let mut dice = Dice::new(seed);
    let mut tally = Tally::default();
    for n in 0..moves {
        let time = Duration::from_millis(500 + dice.below(2500));
        let trouble = match n % 3 {
            0 => Trouble::None,
            1 => Trouble::WhileMigrating(time),
            _ => Trouble::WhileConverging(time),
        };
        tally.cuts_of_the_link += u32::from(trouble != Trouble::None);
        let context = || format!("move {n} ({trouble:?}), seed {seed}, {pace:?}");
        if n % 5 == 1 {
            vm.call_off(&format!("m{n} called off")).with_context(context)?;
            tally.called_off += 1;
        }
        let before = written(&vm.guest.stats()?);
        let crossing = vm.cross(&format!("m{n}"), pace == Pace::FasterThanTheLink, trouble).with_context(context)?;
        println!("move {n}: {crossing:?}");
        ensure!(crossing.attached_early, "{}: QEMU never read through the source", context());
        let written = written(&vm.guest.stats()?) - before;
        ensure!(crossing.disk_bytes < written + DELTA_BYTES_MAX, "{}: {written} written, {crossing:?}", context());
        tally.moves += 1;
        tally.longest_move_seconds = tally.longest_move_seconds.max(crossing.seconds);
        let verdict = vm.guest.verify(ANSWER)?;
        ensure!(verdict.clean(), "{}: {verdict:?}", context());
        vm.guest.resume()?;
    }
    let at = vm.at;
    compare(&mut vm.pair, at, &mut vm.guest)?;
    let verdict = vm.guest.verify(ANSWER)?;
    ensure!(verdict.clean(), "{verdict:?}");
    tally.blocks_right = verdict.groups[0].right;
    vm.pair.cut(at)?;
    let mut pair = vm.end()?;
    both_sites_hold(&mut pair, at, &verdict.groups[0].acknowledged)?;
    Ok(tally)
}
