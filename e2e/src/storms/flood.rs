//! Writes faster than the link, for minutes: best effort must stay effort.
//!
//! fio writes over NBD at twice and more what the link carries, over a range that cannot be preserved. Then: in every window of time
//! new content becomes durable at the peer, the sidecar's memory stays in its bound, fio's latency is that of a paused
//! synchronisation, the condition names the bound; a commit follows once the writer slows down; and with slow-down a move
//! converges under the same writer. The judge of the content is `cmp` of the images.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::{replica_is_equal, start_pair};
use crate::{
    pair::{DiskSpec, Pair, PairOptions},
    process::Process,
    site::TestBed,
    wan::Shape,
};

/// fio writes at random places of a range of this size, in blocks of 16 KiB.
const RANGE: u64 = 64 << 20;
/// Preserved content: memory and spill together a fraction of the range, so that no generation of it all can be kept.
const PRESERVE: u64 = 8 << 20;
/// Resident memory that the worker may have: its window (64 MiB), what is preserved in memory, and the program with its buffers
/// and maps (an unoptimised build included).
const RESIDENT_BYTES_MAX: u64 = (64 + 8 + 160) << 20;
/// Latency that is still "near": this many times that of a paused synchronisation, and a scheduler's whim.
const LATENCY_FACTOR: f64 = 20.0;
const LATENCY_SLACK_MILLIS: f64 = 50.0;
/// A remainder that a move can take along.
const CONVERGED_BYTES: u64 = 8 << 20;

/// How a flood is made.
#[derive(Clone, Copy, Debug)]
pub struct Pressure {
    /// The link, bits per second.
    pub link: u64,
    /// What fio writes, bytes per second.
    pub writer: u64,
    pub windows: u32,
    pub window: Duration,
}

impl Pressure {
    /// A thin link, and minutes: the range is overwritten every 13 s while it takes the link 32 s.
    pub fn minutes(windows: u32) -> Pressure {
        Pressure { link: 16_000_000, writer: 5_000_000, windows, window: Duration::from_secs(60) }
    }

    /// The same three times as fast, for seconds.
    pub fn sample() -> Pressure {
        Pressure { link: 48_000_000, writer: 15_000_000, windows: 3, window: Duration::from_secs(5) }
    }

    /// What a commit may take once the writer has ended: the range crosses the link twice, and a busy machine.
    fn commit_after(&self) -> Duration {
        Duration::from_secs(2 * RANGE * 8 / self.link + 60)
    }
}

/// What one window of time brought.
#[derive(Clone, Debug)]
pub struct Window {
    /// Newly durable at the peer, bytes.
    pub durable_bytes: u64,
    /// Durable there and not overwritten since, at the end of the window.
    pub staged_bytes: u64,
    pub generations_given_up: u64,
    pub generations_committed: u64,
    pub resident_bytes: u64,
}

/// Completion latency of the writer, milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

/// What a flood was like.
#[derive(Clone, Debug)]
pub struct Flood {
    pub windows: Vec<Window>,
    /// With synchronisation paused, and during the flood.
    pub idle: Latency,
    pub flooded: Latency,
    /// The condition's words, where it held.
    pub churn: Option<String>,
    /// From the writer's end until everything was committed, seconds.
    pub commit_seconds: f64,
    /// From opening a handover under the same writer, slowed down, until the remainder was small, seconds.
    pub converge_seconds: f64,
}

/// fio on the first disk of the first end; its report goes to `out`.
fn writer(pair: &Pair, rate: u64, seconds: u64, out: &Path) -> anyhow::Result<Process> {
    let name = pair.options.disks[0].name;
    let uri = format!("nbd+unix:///{name}?socket={}", pair.socket(0, name).display());
    let fio = pair.site(0).command("fio", "fio").args(["--name=flood", "--ioengine=nbd", "--rw=randwrite", "--bs=16k"]);
    let fio = fio.args(["--iodepth=4", "--time_based", "--refill_buffers", "--norandommap", "--output-format=json"]);
    let fio = fio.arg(format!("--uri={uri}")).arg(format!("--rate={rate}")).arg(format!("--size={RANGE}"));
    let fio = fio.arg(format!("--runtime={seconds}")).arg(format!("--output={}", out.display()));
    Ok(fio.spawn()?)
}

/// What fio says about its writes.
fn latency(out: &Path) -> anyhow::Result<Latency> {
    let text = std::fs::read_to_string(out)?;
    let report: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let job = &report["jobs"][0];
    ensure!(job["error"] == 0 && job["write"]["total_ios"].as_u64() > Some(0), "fio failed: {job}");
    let nanos = |value: &Value| value.as_f64().map(|n| n / 1e6).context("fio reports latency in nanoseconds");
    let clat = &job["write"]["clat_ns"];
    let percentile = &clat["percentile"];
    let (p50, p99) = (nanos(&percentile["50.000000"])?, nanos(&percentile["99.000000"])?);
    Ok(Latency { p50, p99, max: nanos(&clat["max"])? })
}

/// Resident memory of the first end's worker, bytes.
fn resident(pair: &Pair) -> anyhow::Result<u64> {
    let worker = pair.worker(0)?.context("a worker runs")?;
    let status = std::fs::read_to_string(format!("/proc/{worker}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.split_whitespace().next().context("a number")?.parse::<u64>()? << 10)
}

/// See the module's header.
pub fn flood(pressure: Pressure) -> anyhow::Result<Flood> {
    let Pressure { link, writer: rate, windows, window } = pressure;
    let bed = TestBed::new("flood", Shape::wan(link, Duration::from_millis(40)))?;
    let options = PairOptions {
        disks: vec![DiskSpec { name: "root", bytes: 2 * RANGE }],
        interval: "2s".into(),
        tables: format!("[preserve]\nmemory = \"{0}MiB\"\nspill = \"{0}MiB\"\n", PRESERVE >> 21),
        ..PairOptions::default()
    };
    let mut pair = start_pair(&bed, options)?;
    pair.cut(0)?;
    let out = bed.dir.join("fio.json");

    // The same writer while nothing is sent: what the guest would feel on an idle link.
    pair.ctl(0, &["set", "--paused", "true"])?;
    writer(&pair, rate, window.as_secs().min(10), &out)?.wait(Duration::from_secs(60))?;
    let idle = latency(&out)?;
    pair.ctl(0, &["set", "--paused", "false"])?;

    let seconds = window.as_secs() * u64::from(windows);
    let mut fio = writer(&pair, rate, seconds, &out)?;
    let (mut seen, mut churn) = (Vec::new(), None);
    let mut before = pair.report(0)?;
    for number in 0..windows {
        let until = Instant::now() + window;
        while Instant::now() < until {
            let report = pair.report(0)?;
            churn =
                report.conditions.into_iter().find(|c| c.kind == "ChurnExceedsPreserve").map(|c| c.message).or(churn);
            std::thread::sleep(Duration::from_millis(200));
        }
        let now = pair.report(0)?;
        let w = Window {
            durable_bytes: now.transfer.durable_bytes - before.transfer.durable_bytes,
            staged_bytes: now.disks.iter().map(|d| d.staged_bytes).sum(),
            generations_given_up: now.generations.given_up_count - before.generations.given_up_count,
            generations_committed: now.generations.committed_count - before.generations.committed_count,
            resident_bytes: resident(&pair)?,
        };
        println!("  window {number}: {w:?}");
        ensure!(w.durable_bytes > 0, "no progress in window {number}: {w:?}\n{now:#?}");
        ensure!(
            w.staged_bytes > 0 || w.generations_committed > 0,
            "nothing that was sent is still worth something after window {number}: {w:?}\n{now:#?}"
        );
        ensure!(w.resident_bytes <= RESIDENT_BYTES_MAX, "memory without bound: {w:?}");
        seen.push(w);
        before = now;
    }
    fio.wait(Duration::from_secs(60))?;
    let flooded = latency(&out)?;
    for (idle, flooded) in [(idle.p50, flooded.p50), (idle.p99, flooded.p99)] {
        let bound = idle * LATENCY_FACTOR + LATENCY_SLACK_MILLIS;
        ensure!(flooded <= bound, "the guest waits for the network: {flooded} ms, idle {idle} ms");
    }
    let given_up: u64 = seen.iter().map(|w| w.generations_given_up).sum();
    if given_up > 0 {
        let words = churn.as_ref().context("generations were given up and no condition said so")?;
        ensure!(words.contains(&PRESERVE.to_string()), "the condition names the bound: {words}");
    }

    let began = Instant::now();
    pair.cut(0)?;
    let commit_seconds = began.elapsed().as_secs_f64();
    ensure!(began.elapsed() <= pressure.commit_after(), "a commit took {commit_seconds} s after the writer ended");
    replica_is_equal(&mut pair, 0)?;

    let converge_seconds = converge(&mut pair, rate, &out)?;
    Ok(Flood { windows: seen, idle, flooded, churn, commit_seconds, converge_seconds })
}

/// A move under the same writer: slowed down it converges; then the writer ends and the disk goes to the other end.
fn converge(pair: &mut Pair, rate: u64, out: &Path) -> anyhow::Result<f64> {
    let mut fio = writer(pair, rate, 600, out)?;
    pair.wait(0, "the writer to be ahead", Duration::from_secs(120), |r| {
        r.generations.lag_bytes > 3 * CONVERGED_BYTES
    })?;
    pair.release(1)?;
    pair.start(1, "primary")?;
    pair.wait(0, "the link", Duration::from_secs(60), |r| r.link.connected)?;
    let began = Instant::now();
    pair.ctl(0, &["set", "--slow-down", "true"])?;
    pair.ctl(0, &["open-handover", "--vmi-uid", "flood"])?;
    pair.wait(0, "a slowed writer's remainder to be small", Duration::from_secs(240), |r| {
        r.role == "Converging" && r.generations.lag_bytes < CONVERGED_BYTES
    })?;
    let seconds = began.elapsed().as_secs_f64();
    fio.kill9();
    pair.wait(1, "the offer", Duration::from_secs(60), |r| r.attachable)?;
    pair.ctl(1, &["move-stopped"])?;
    pair.wait(1, "the target to be active", Duration::from_secs(120), |r| r.role == "Serving")?;
    pair.wait(0, "the source to be the replica", Duration::from_secs(60), |r| r.role == "Replica")?;
    pair.wait(1, "the link", Duration::from_secs(60), |r| r.link.connected)?;
    pair.cut(1)?;
    replica_is_equal(pair, 1)?;
    Ok(seconds)
}
