//! Long proofs in a form that a test can run a sample of: kill storms and moves in a row. `make soak` runs them in full.
//!
//! Judges are never our own digests: `cmp` of the images at a cut for which the guest was paused, the guest's own
//! memory of what each block must hold, and the offline checker with the guest's acknowledged counts.

use std::{
    fs::File,
    io::Read,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};

use crate::{
    guest::Control,
    image,
    pair::{Pair, PairOptions},
    qemu::{Machine, Qemu, Start},
    site::TestBed,
    wan::Shape,
};

const BOOT: Duration = Duration::from_secs(180);
const ANSWER: Duration = Duration::from_secs(120);
/// A supervisor makes its worker a pass-through after five crashes in a minute; before that the storm kills the
/// supervisor itself, which starts the count anew (as a restart of the container does).
const WORKER_KILLS_MAX: u32 = 4;

/// Repeatable choices.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
}

/// What a storm did.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub source_workers: u32,
    pub source_supervisors: u32,
    pub replicas: u32,
    pub comparisons: u32,
    pub moves: u32,
    pub cuts_of_the_link: u32,
    pub blocks_right: u64,
}

/// The worker below a supervisor.
fn worker_of(supervisor: u32) -> Option<i32> {
    let children = std::fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

fn kill_worker(supervisor: u32) -> bool {
    // The supervisor is ours and alive, so its child's number cannot have been given to somebody else.
    worker_of(supervisor).is_some_and(|pid| unsafe { libc::kill(pid, libc::SIGKILL) } == 0)
}

/// Byte for byte, as `cmp` does it.
fn same(a: &Path, b: &Path) -> anyhow::Result<()> {
    let (mut left, mut right) = (File::open(a)?, File::open(b)?);
    let (mut x, mut y) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0u64;
    loop {
        let n = left.read(&mut x)?;
        if n == 0 {
            return Ok(());
        }
        right.read_exact(&mut y[..n])?;
        if x[..n] != y[..n] {
            let first = x[..n].iter().zip(&y[..n]).position(|(p, q)| p != q).unwrap_or(0) as u64;
            bail!("{} and {} differ from byte {} on", a.display(), b.display(), at + first);
        }
        at += n as u64;
    }
}

/// Pause the guest, cut, wait until the replica has applied it, compare, go on.
fn compare(pair: &mut Pair, source: usize, guest: &mut Control) -> anyhow::Result<()> {
    guest.pause(ANSWER)?;
    pair.wait(source, "the link", Duration::from_secs(60), |r| r.link.connected)?;
    pair.cut(source)?;
    replica_is_equal(pair, source)?;
    guest.resume()?;
    Ok(())
}

/// Everything that `source` has committed is applied at the other end, and the images are the same.
fn replica_is_equal(pair: &mut Pair, source: usize) -> anyhow::Result<()> {
    let committed = pair.report(source)?.generations.committed_number;
    pair.wait(1 - source, "the replica to apply it", Duration::from_secs(60), |r| {
        let applied = r.replica.as_ref().and_then(|p| p.applied.split('.').nth(1).and_then(|n| n.parse::<u64>().ok()));
        applied.is_some_and(|n| n >= committed)
    })?;
    for disk in 0..pair.options.disks.len() {
        same(&pair.image(source, disk), &pair.image(1 - source, disk))?;
    }
    Ok(())
}

/// `kills` times `kill -9` at random instants of source worker, source supervisor and replica, under a writing guest.
pub fn kills(kills: u32, seed: u64, every: u32) -> anyhow::Result<Tally> {
    let bed = TestBed::new("kills", Shape::wan(300_000_000, Duration::from_millis(20)))?;
    let mut pair = Pair::new(&bed, PairOptions { interval: "500ms".into(), ..PairOptions::default() })?;
    pair.start(1, "replica")?;
    pair.start(0, "primary")?;
    let machine = Machine::small(2).with("rate=3000000").with("start=1");
    let vm = Qemu::start(&bed.a, "vm", &machine, &pair.backings(0), Start::Boot)?;
    let mut guest = vm.control();
    guest.hello(BOOT)?;
    pair.cut(0)?;
    let mut dice = Dice::new(seed);
    let mut tally = Tally::default();
    let mut worker_kills = [0u32; 2];
    for n in 1..=kills {
        std::thread::sleep(Duration::from_millis(100 + dice.below(1400)));
        let end = usize::from(dice.below(3) == 0);
        let role = ["primary", "replica"][end];
        let supervisor = pair.ends[end].sidecar.as_ref().context("a sidecar runs at each end")?.pid();
        if dice.below(3) == 0 || worker_kills[end] >= WORKER_KILLS_MAX {
            worker_kills[end] = 0;
            if let Some(mut process) = pair.ends[end].sidecar.take() {
                process.kill9();
            }
            pair.start(end, role).with_context(|| format!("kill {n}, seed {seed}"))?;
            tally.source_supervisors += u32::from(end == 0);
        } else if kill_worker(supervisor) {
            worker_kills[end] += 1;
            tally.source_workers += u32::from(end == 0);
        }
        tally.replicas += u32::from(end == 1);
        if n % every == 0 {
            compare(&mut pair, 0, &mut guest).with_context(|| format!("after kill {n}, seed {seed}"))?;
            tally.comparisons += 1;
        }
    }
    finish(&mut pair, 0, vm, guest, &mut tally)?;
    Ok(tally)
}

/// `moves` moves in a row, there and back, the guest writing at `rate` bytes per second; every third time the link is cut
/// while the pair converges.
pub fn moves(moves: u32, seed: u64, rate: u64) -> anyhow::Result<Tally> {
    let bed = TestBed::new("moves", Shape::wan(200_000_000, Duration::from_millis(40)))?;
    let mut pair = Pair::new(&bed, PairOptions { interval: "1s".into(), ..PairOptions::default() })?;
    pair.start(1, "replica")?;
    pair.start(0, "primary")?;
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
        let (there, _) =
            pair.move_vm(at, &here, &machine, &format!("m{n}")).with_context(|| format!("move {n}, seed {seed}"))?;
        guest.move_to(there.control_socket());
        here.quit()?;
        here = there;
        at = 1 - at;
        tally.moves += 1;
        let verdict = guest.verify(ANSWER)?;
        ensure!(verdict.clean(), "after move {n}, seed {seed}: {verdict:?}");
        guest.resume()?;
        pair.cut(at)?;
    }
    compare(&mut pair, at, &mut guest)?;
    finish(&mut pair, at, here, guest, &mut tally)?;
    Ok(tally)
}

/// `rounds` handovers of a VM-less pair, each broken at a random instant around the seal: a worker of either side is killed,
/// or the link is cut for a moment. In the end exactly the target serves, with everything that was acknowledged before.
pub fn handovers(rounds: u32, seed: u64) -> anyhow::Result<Tally> {
    let bed = TestBed::new("handovers", Shape::wan(300_000_000, Duration::from_millis(10)))?;
    let mut pair = Pair::new(&bed, PairOptions { interval: "500ms".into(), ..PairOptions::default() })?;
    pair.start(1, "replica")?;
    pair.start(0, "primary")?;
    pair.cut(0)?;
    let mut dice = Dice::new(seed);
    let mut tally = Tally::default();
    let mut from = 0;
    for n in 0..rounds {
        let context = || format!("handover {n}, seed {seed}");
        let to = 1 - from;
        let pattern = 1 + n % 250;
        pair.release(to).with_context(context)?;
        pair.start(to, "primary").with_context(context)?;
        pair.wait(from, "the link", Duration::from_secs(60), |r| r.link.connected)?;
        pair.ctl(from, &["open-handover", "--vmi-uid", &format!("round-{n}")]).with_context(context)?;
        // Acknowledged and flushed at the source, at the last moment.
        nbd_io(&pair, from, &[&format!("write -P {pattern} {}k 256k", 64 * (n % 100)), "flush"])
            .with_context(context)?;
        pair.wait(to, "the offer", Duration::from_secs(60), |r| r.attachable).with_context(context)?;
        let asked = pair.ctl(to, &["acquire"]);
        std::thread::sleep(Duration::from_millis(dice.below(40)));
        match dice.below(4) {
            0 => {
                bed.wan.link_down()?;
                std::thread::sleep(Duration::from_millis(300 + dice.below(700)));
                bed.wan.restore()?;
                tally.cuts_of_the_link += 1;
            }
            1 => {
                let supervisor = pair.ends[to].sidecar.as_ref().context("a sidecar runs at each end")?.pid();
                tally.replicas += u32::from(kill_worker(supervisor));
            }
            _ => {
                let supervisor = pair.ends[from].sidecar.as_ref().context("a sidecar runs at each end")?.pid();
                tally.source_workers += u32::from(kill_worker(supervisor));
            }
        }
        drop(asked);
        // A target that was killed has forgotten that it asked; the operator asks again while it is not active.
        let deadline = Instant::now() + Duration::from_secs(60);
        while !pair.report(to).is_ok_and(|r| r.role == "Serving") {
            ensure!(Instant::now() < deadline, "{}: {:?}\n{:?}", context(), pair.report(from), pair.report(to));
            let _ = pair.ctl(to, &["acquire"]);
            std::thread::sleep(Duration::from_millis(200));
        }
        pair.wait(from, "the old side to be a replica", Duration::from_secs(60), |r| r.role == "Replica")
            .with_context(context)?;
        nbd_io(&pair, to, &[&format!("read -P {pattern} {}k 256k", 64 * (n % 100))]).with_context(context)?;
        tally.moves += 1;
        from = to;
    }
    pair.cut(from)?;
    replica_is_equal(&mut pair, from)?;
    Ok(tally)
}

/// qemu-io on the first disk of one end.
fn nbd_io(pair: &Pair, end: usize, commands: &[&str]) -> anyhow::Result<()> {
    let name = pair.options.disks[0].name;
    let socket = pair.site(end).dir.join("nbd").join(format!("{name}.sock"));
    let mut qemu_io = std::process::Command::new("qemu-io");
    qemu_io.args(["-f", "raw"]);
    commands.iter().for_each(|c| {
        qemu_io.args(["-c", c]);
    });
    let output = qemu_io.arg(format!("nbd+unix:///{name}?socket={}", socket.display())).output()?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success() && !said.contains("failed"), "{commands:?}: {said}");
    Ok(())
}

/// The guest's own verdict, then both sites offline.
fn finish(pair: &mut Pair, source: usize, vm: Qemu, mut guest: Control, tally: &mut Tally) -> anyhow::Result<()> {
    let verdict = guest.verify(ANSWER)?;
    ensure!(verdict.clean(), "{verdict:?}");
    tally.blocks_right = verdict.groups[0].right;
    pair.cut(source)?;
    vm.quit()?;
    let deadline = Instant::now() + Duration::from_secs(60);
    for end in [source, 1 - source] {
        while pair.release(end).is_err() {
            ensure!(Instant::now() < deadline, "the sidecar of site {end} does not let go");
            std::thread::sleep(Duration::from_millis(200));
        }
        let tallies = image::check(&pair.images(end), Some(&verdict.groups[0].acknowledged))?;
        ensure!(tallies.iter().all(|t| t.clean()), "site {end}: {tallies:?}");
    }
    Ok(())
}
