//! Long proofs in a form that a test can run a sample of. `make soak` runs them in full.
//!
//! - `kills.rs`: `kill -9` of everything of ours, at random instants;
//! - `moves.rs`: moves in a row, on plain QEMU and on libvirt, with cut links and guests that outrun the link;
//! - `handovers.rs`: many handovers without a VM, broken around the seal;
//! - `matrix.rs` with `scene.rs`: a handover with a VM, broken at each of its steps in each way; `watch.rs` looks for two writers;
//! - `flood.rs`: writes faster than the link, for minutes.
//!
//! Judges are never our own digests: `cmp` of the images at a cut for which the guest was paused, the guest's own
//! memory of what each block must hold, and the offline checker with the guest's acknowledged counts.

use std::{
    fs::File,
    io::Read,
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure};

use crate::{
    guest::Control,
    image,
    pair::{Pair, PairOptions},
    site::TestBed,
};

mod flood;
mod handovers;
mod kills;
pub mod matrix;
mod moves;
mod scene;
mod watch;

pub use flood::{Flood, Latency, Pressure, Window, flood};
pub use handovers::handovers;
pub use kills::kills;
pub use moves::{Pace, libvirt_moves, moves};

const BOOT: Duration = Duration::from_secs(180);
const ANSWER: Duration = Duration::from_secs(120);

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
    pub called_off: u32,
    pub blocks_right: u64,
    /// The longest move, seconds.
    pub longest_move_seconds: f64,
}

/// A pair whose first end is the source, both running.
fn start_pair(bed: &TestBed, options: PairOptions) -> anyhow::Result<Pair<'_>> {
    let mut pair = Pair::new(bed, options)?;
    pair.start(1, "replica")?;
    pair.start(0, "primary")?;
    Ok(pair)
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

/// The guest's own verdict, then both sites offline, once `end` has ended the machine in good order.
fn finish(
    pair: &mut Pair,
    source: usize,
    mut guest: Control,
    tally: &mut Tally,
    end: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let verdict = guest.verify(ANSWER)?;
    ensure!(verdict.clean(), "{verdict:?}");
    tally.blocks_right = verdict.groups[0].right;
    pair.cut(source)?;
    end()?;
    both_sites_hold(pair, source, &verdict.groups[0].acknowledged)
}

/// Both sidecars end, and what lies on the images of both sites holds every write that was acknowledged.
fn both_sites_hold(pair: &mut Pair, source: usize, acknowledged: &[u64]) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    for end in [source, 1 - source] {
        while let Err(error) = pair.release(end) {
            ensure!(Instant::now() < deadline, "the sidecar of site {end} does not let go: {error:#}");
            std::thread::sleep(Duration::from_millis(200));
        }
        holds(pair, end, acknowledged)?;
    }
    Ok(())
}

/// Nothing acknowledged is missing on the images of one end.
fn holds(pair: &Pair, end: usize, acknowledged: &[u64]) -> anyhow::Result<()> {
    let tallies = image::check(&pair.images(end), Some(acknowledged))?;
    ensure!(tallies.iter().all(|t| t.clean()), "site {end}: {tallies:?}");
    Ok(())
}

/// Writes bytes that no compression makes smaller, the same for the same seed.
fn noise(path: &Path, from: u64, bytes: u64, seed: u64) -> anyhow::Result<()> {
    let file = File::options().write(true).open(path)?;
    let mut x = 0x9e37_79b9_7f4a_7c15u64 ^ seed.wrapping_mul(0x2545_f491_4f6c_dd1d);
    let mut chunk = vec![0u8; 1 << 20];
    for at in (from..from + bytes).step_by(chunk.len()) {
        for word in chunk.as_chunks_mut::<8>().0 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            *word = x.to_le_bytes();
        }
        let length = chunk.len().min((from + bytes - at) as usize);
        file.write_all_at(&chunk[..length], at)?;
    }
    Ok(())
}
