//! F3: guest I/O through the sidecar's NBD server, beside nbdkit and qemu-nbd on the same file; what tracking costs; what
//! replicating costs.
//!
//! "Tracking off" is the same binary as a pass-through worker. "Cold" is the first write into each 4 MiB region, which
//! waits for the durable region log.

use std::{path::Path, time::Instant};

use anyhow::Context;

use super::{
    Effort, Figure, Outcome,
    fio::{self, Job, Measured},
    load::{self, GIB, KIB, MIB},
    measure::{Bound, Row, Unit, median},
    peers,
    plot::Plot,
    quota::Quota,
    rig::{Rig, RigOptions},
    runner::say,
};
use crate::reaper;

pub struct NbdServer;

/// Sparse disk on which each write of a measurement falls into a region that nobody has touched.
const COLD_BYTES: u64 = 512 * GIB;
const REGION_BYTES: u64 = 4 * MIB;
/// The peer's share of a processor while replicating: it has a machine of its own in real life.
const TARGET_SHARE: f64 = 0.25;

/// One row: pattern, block, depth, and fio's fsync.
struct Shape {
    name: &'static str,
    pattern: &'static str,
    block: u64,
    depth: u32,
    fsync: u32,
}

const fn shape(name: &'static str, pattern: &'static str, block: u64, depth: u32, fsync: u32) -> Shape {
    Shape { name, pattern, block, depth, fsync }
}

const AGAINST_PEERS: [Shape; 10] = [
    shape("4k read, depth 1", "randread", 4 * KIB, 1, 0),
    shape("4k read, depth 32", "randread", 4 * KIB, 32, 0),
    shape("4k write, depth 1", "randwrite", 4 * KIB, 1, 0),
    shape("4k write, depth 32", "randwrite", 4 * KIB, 32, 0),
    shape("64k read, depth 1", "randread", 64 * KIB, 1, 0),
    shape("64k read, depth 32", "randread", 64 * KIB, 32, 0),
    shape("64k write, depth 1", "randwrite", 64 * KIB, 1, 0),
    shape("64k write, depth 32", "randwrite", 64 * KIB, 32, 0),
    shape("4k write, flush after each, depth 1", "randwrite", 4 * KIB, 1, 1),
    shape("4k write, flush after 8, depth 32", "randwrite", 4 * KIB, 32, 8),
];
/// What tracking and replicating could slow down.
const OWN: [Shape; 4] = [
    shape("4k write, depth 1", "randwrite", 4 * KIB, 1, 0),
    shape("4k write, depth 32", "randwrite", 4 * KIB, 32, 0),
    shape("64k write, depth 32", "randwrite", 64 * KIB, 32, 0),
    shape("4k read, depth 32", "randread", 4 * KIB, 32, 0),
];

impl Shape {
    fn job(&self, uri: &str, seconds: f64, bytes: u64) -> Job {
        let mut job = Job::new(uri, self.pattern, self.block, self.depth, seconds).with(format!("size={bytes}"));
        job = job.with("norandommap=1");
        if self.fsync > 0 {
            job = job.with(format!("fsync={}", self.fsync));
        }
        job
    }
}

/// What a sitting uses.
struct Sizes {
    seconds: f64,
    repetitions: usize,
    bytes: u64,
    cold_writes: u64,
}

impl Figure for NbdServer {
    fn id(&self) -> &'static str {
        "F3"
    }
    fn title(&self) -> &'static str {
        "guest I/O through the NBD server"
    }
    fn target(&self) -> &'static str {
        "at least the best peer in every row; tracking on / off ≥ 0.98; replicating (capped at 100 Mbit/s, target in a quota \
         of its own) / off ≥ 0.95; p99 shown."
    }
    fn method(&self) -> &'static str {
        "fio's nbd engine and `qemu-img bench` over a unix socket against the sidecar (tracking, replica away), nbdkit's file \
         plugin and qemu-nbd, all three on the same file, which lies in the page cache; options as packaged. The row's peer \
         is the better of the two. \"Tracking off\" is the same binary as a pass-through. Replicating: both sidecars on this \
         machine, the target limited to a quarter of one processor; cuts every 2 s while fio writes as fast as it can. \
         Cold: each write is the first in its 4 MiB region, so that the region log is written first."
    }

    fn run(&self, effort: Effort) -> anyhow::Result<Outcome> {
        let sizes = Sizes {
            seconds: effort.of(3.0, 0.5),
            repetitions: effort.of(5, 1),
            bytes: effort.of(512 * MIB, 64 * MIB),
            cold_writes: effort.of(8192, 256),
        };
        let folder = reaper::run_folder().join("f3");
        std::fs::create_dir_all(&folder)?;
        let image = folder.join("disk.img");
        load::noise(&image, 0, sizes.bytes, 3)?;

        let options = |image: &Path| RigOptions {
            disks: vec![("hot", sizes.bytes, Some(image.to_owned())), ("cold", COLD_BYTES, None)],
            interval: "2s",
            bandwidth: "100Mbit",
            ..RigOptions::default()
        };
        let mut tracked = Rig::new("f3", options(&image))?;
        tracked.start_and_rest()?;
        let mut plain = Rig::new("f3-off", options(&image))?;
        plain.start(0, "primary", &["--worker", "--pass-through"])?;

        let mut rows = against_peers(&sizes, &folder, &image, &tracked)?;
        rows.extend(tracking(&sizes, &tracked, &plain)?);
        rows.extend(cold(&sizes, &tracked, &plain)?);
        rows.extend(replicating(&sizes, &tracked)?);
        let _ = std::fs::remove_dir_all(&folder);
        Ok(Outcome { rows, notes: Vec::new(), plot: Plot::Rows })
    }
}

impl Rig {
    /// Both ends, the first generation committed without a limit, then resting: tracked, but nothing is sent.
    fn start_and_rest(&mut self) -> anyhow::Result<()> {
        self.start(1, "replica", &[])?;
        self.start(0, "primary", &["--bandwidth", "unlimited"])?;
        self.cut()?;
        self.ctl(0, &["set", "--bandwidth", "100Mbit"])?;
        self.ctl(0, &["set", "--paused", "true"])?;
        let report = self.report(0)?;
        anyhow::ensure!(report.trust == "Tracked", "marks are not trusted: {report:?}");
        Ok(())
    }
}

fn p99(values: &[Measured]) -> f64 {
    median(&values.iter().map(|m| m.p99_ms).collect::<Vec<_>>())
}

fn rates(values: &[Measured]) -> Vec<f64> {
    values.iter().map(|m| m.per_second).collect()
}

/// Zips two columns into pairs.
fn pairs(ours: &[f64], theirs: &[f64]) -> Vec<(f64, f64)> {
    ours.iter().copied().zip(theirs.iter().copied()).collect()
}

/// Runs `measure` for each side in turn, the order turning with the repetitions.
fn alternate<T>(
    sides: usize,
    repetitions: usize,
    mut measure: impl FnMut(usize, usize) -> anyhow::Result<T>,
) -> anyhow::Result<Vec<Vec<T>>> {
    let mut found: Vec<Vec<T>> = (0..sides).map(|_| Vec::new()).collect();
    for repetition in 0..repetitions {
        for turn in 0..sides {
            let side = (turn + repetition) % sides;
            found[side].push(measure(side, repetition)?);
        }
    }
    Ok(found)
}

fn against_peers(sizes: &Sizes, folder: &Path, image: &Path, tracked: &Rig) -> anyhow::Result<Vec<Row>> {
    let servers = peers::servers(folder, image)?;
    let mut uris = vec![tracked.uri(0)];
    uris.extend(servers.iter().map(peers::NbdPeer::uri));
    let mut rows = Vec::new();
    for shape in AGAINST_PEERS {
        let found = alternate(uris.len(), sizes.repetitions, |side, _| {
            shape.job(&uris[side], sizes.seconds, sizes.bytes).run().with_context(|| shape.name)
        })?;
        let best = (1..uris.len())
            .max_by(|&x, &y| median(&rates(&found[x])).total_cmp(&median(&rates(&found[y]))))
            .expect("there are two peers");
        let row = Row::ratio(
            shape.name,
            Unit::PerSecond,
            servers[best - 1].name,
            &pairs(&rates(&found[0]), &rates(&found[best])),
        );
        let remark = format!("p99 {:.2} ms, peer {:.2} ms", p99(&found[0]), p99(&found[best]));
        say(format_args!("{}: {:.2} ({remark})", shape.name, row.result()));
        rows.push(row.bound(Bound::AtLeast(1.0)).remark(remark));
    }
    for (write, block, depth) in [(false, 4 * KIB, 32), (true, 4 * KIB, 32), (false, 64 * KIB, 8), (true, 64 * KIB, 8)]
    {
        let name = format!("qemu-img bench, {}k {}, depth {depth}", block / KIB, if write { "write" } else { "read" });
        let rough = fio::qemu_img_bench(&uris[0], write, block, depth, 2000)?;
        let count = ((rough * sizes.seconds * 0.7) as u64).clamp(1000, 500_000);
        let found = alternate(uris.len(), sizes.repetitions, |side, _| {
            fio::qemu_img_bench(&uris[side], write, block, depth, count).with_context(|| name.clone())
        })?;
        let best = (1..uris.len())
            .max_by(|&x, &y| median(&found[x]).total_cmp(&median(&found[y])))
            .expect("there are two peers");
        let row = Row::ratio(&name, Unit::PerSecond, servers[best - 1].name, &pairs(&found[0], &found[best]));
        say(format_args!("{name}: {:.2}", row.result()));
        rows.push(row.bound(Bound::AtLeast(1.0)));
    }
    Ok(rows)
}

fn tracking(sizes: &Sizes, tracked: &Rig, plain: &Rig) -> anyhow::Result<Vec<Row>> {
    let uris = [tracked.uri(0), plain.uri(0)];
    let mut rows = Vec::new();
    for shape in &OWN[..3] {
        let found =
            alternate(2, sizes.repetitions, |side, _| shape.job(&uris[side], sizes.seconds, sizes.bytes).run())?;
        let name = format!("tracking on / off: {}", shape.name);
        let row = Row::ratio(&name, Unit::PerSecond, "tracking off", &pairs(&rates(&found[0]), &rates(&found[1])));
        let remark = format!("p99 {:.2} ms, off {:.2} ms", p99(&found[0]), p99(&found[1]));
        say(format_args!("{name}: {:.2} ({remark})", row.result()));
        rows.push(row.bound(Bound::AtLeast(0.98)).remark(remark));
    }
    Ok(rows)
}

fn cold(sizes: &Sizes, tracked: &Rig, plain: &Rig) -> anyhow::Result<Vec<Row>> {
    let uris = [tracked.uri(1), plain.uri(1)];
    let mut rows = Vec::new();
    let span = sizes.cold_writes * REGION_BYTES;
    let mut base = 0;
    for depth in [1, 32] {
        let found = alternate(2, sizes.repetitions, |side, repetition| {
            let offset = base + repetition as u64 * span;
            let pattern = format!("write:{}", REGION_BYTES - 4 * KIB);
            let job = Job::new(&uris[side], &pattern, 4 * KIB, depth, 0.0);
            job.with(format!("offset={offset}")).with(format!("number_ios={}", sizes.cold_writes)).run()
        })?;
        base += sizes.repetitions as u64 * span;
        let name = format!("cold regions, tracking on / off: 4k write, depth {depth}");
        let row = Row::ratio(&name, Unit::PerSecond, "tracking off", &pairs(&rates(&found[0]), &rates(&found[1])));
        let remark = format!("p99 {:.2} ms, off {:.2} ms", p99(&found[0]), p99(&found[1]));
        say(format_args!("{name}: {:.2} ({remark})", row.result()));
        rows.push(row.remark(remark));
    }
    Ok(rows)
}

fn replicating(sizes: &Sizes, tracked: &Rig) -> anyhow::Result<Vec<Row>> {
    let quota = Quota::new(TARGET_SHARE).context("a control group for the target")?;
    quota.add(tracked.processes[1].as_ref().context("the replica runs")?.pid())?;
    let mut rows = Vec::new();
    for shape in OWN {
        let (mut sent, mut elapsed) = (0.0, 0.0);
        let found = alternate(2, sizes.repetitions, |side, _| {
            tracked.ctl(0, &["set", "--paused", if side == 0 { "false" } else { "true" }])?;
            let (began, before) = (Instant::now(), tracked.report(0)?.transfer.wire_bytes);
            if shape.pattern == "randread" && side == 0 {
                // Something to send while the guest reads.
                OWN[1].job(&tracked.uri(0), 0.3, sizes.bytes).run()?;
            }
            let measured = shape.job(&tracked.uri(0), sizes.seconds, sizes.bytes).run()?;
            if side == 0 {
                sent += (tracked.report(0)?.transfer.wire_bytes - before) as f64;
                elapsed += began.elapsed().as_secs_f64();
            }
            Ok(measured)
        })?;
        let mbit = sent * 8e-6 / elapsed;
        let name = format!("replicating / off: {}", shape.name);
        let row = Row::ratio(&name, Unit::PerSecond, "not replicating", &pairs(&rates(&found[0]), &rates(&found[1])));
        let remark = format!("p99 {:.2} ms, off {:.2} ms; sends {mbit:.0} Mbit/s", p99(&found[0]), p99(&found[1]));
        say(format_args!("{name}: {:.2} ({remark})", row.result()));
        rows.push(row.bound(Bound::AtLeast(0.95)).remark(remark));
    }
    Ok(rows)
}
