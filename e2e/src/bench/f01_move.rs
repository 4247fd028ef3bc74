//! F1 and F2: a running VM moves over a WAN while it writes; how long that takes, and how long its guest stood still.
//!
//! Both come from the same moves, which are made once per run. The peer is the full block migration that KubeVirt's live
//! migration does ([`crate::baseline`]), of the same VM on the same link, after each repetition's moves.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, ensure};
use watari_guest::report::Gaps;
use watari_wire::report::Report;

use super::{
    Effort, Figure, Outcome,
    load::{self, GIB, MIB},
    measure::{Bound, Judged, Row, Unit},
    plot::Plot,
    runner::say,
};
use crate::{
    baseline, build,
    guest::Control,
    pair::{DiskSpec, Move, Pair, PairOptions},
    process::{Builder, Process},
    qemu::{Backing, Machine, Qemu, Start},
    site::TestBed,
    wan::Shape,
};

/// Time from "move" to "running at the target, source released".
pub struct Moves;
/// The guest's pause in those moves.
pub struct Pause;
/// The same journey where a full copy takes about an hour.
pub struct OneHour;

const RTT: Duration = Duration::from_millis(170);
/// The guest's workload has the first 64 MiB of each disk; the rest is data that lies there.
const WORKLOAD_BLOCKS: u64 = 16 << 10;
const WORKLOAD_BYTES: u64 = WORKLOAD_BLOCKS * 4096;
/// The guest rests while it is copied in full: what it may still write, bytes per second.
const REST_RATE: u64 = 4096;
/// The thin link of F1-hour; the guest writes at half of its rate.
const HOUR_MBIT: u64 = 20;
const BOOT: Duration = Duration::from_secs(240);
const ANSWER: Duration = Duration::from_secs(180);
/// Beyond QEMU's own pause: one round trip and 100 ms.
const PAUSE_EXTRA_MS: f64 = 270.0;

/// At which scale.
#[derive(Clone, Copy, Debug)]
struct Scale {
    mbit: u64,
    /// Incompressible data on the first disk.
    data_bytes: u64,
    memory_mib: u32,
    /// What the guest writes in distinct blocks, bytes per second.
    write_rate: u64,
    /// One holds the data; a second one shows that a cut is one point of both.
    disks: usize,
    repetitions: usize,
}

/// One of our moves: what it cost, what the guest felt, and the disk's share of the bytes.
#[derive(Clone, Debug)]
struct Ours {
    moved: Move,
    gaps: Gaps,
    disk_bytes: u64,
}

/// One repetition: there, back, and the copy.
#[derive(Clone, Debug)]
struct Repetition {
    moves: Vec<Ours>,
    copy: baseline::Report,
    copy_gaps: Gaps,
    /// In the seconds before the first move.
    rest_gaps: Gaps,
}

/// The moves of this process, made by whichever figure comes first.
fn measured(effort: Effort) -> anyhow::Result<Arc<Vec<Repetition>>> {
    static DONE: Mutex<Option<Arc<Vec<Repetition>>>> = Mutex::new(None);
    let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(done) = &*done {
        return Ok(done.clone());
    }
    let scale = Scale {
        mbit: 100,
        data_bytes: effort.of(512 * MIB, 64 * MIB),
        memory_mib: 512,
        write_rate: 2_500_000,
        disks: 2,
        repetitions: effort.of(3, 1),
    };
    Ok(done.insert(Arc::new(run(scale)?)).clone())
}

fn run(scale: Scale) -> anyhow::Result<Vec<Repetition>> {
    (0..scale.repetitions).map(|number| repetition(scale).with_context(|| format!("repetition {number}"))).collect()
}

fn repetition(scale: Scale) -> anyhow::Result<Repetition> {
    // Seeded without the WAN; it is there from the first move on.
    let bed = TestBed::new("f1", Shape { queue_bytes: 16 << 20, ..Shape::default() })?;
    let mut disks = vec![
        DiskSpec { name: "root", bytes: WORKLOAD_BYTES + scale.data_bytes },
        DiskSpec { name: "data", bytes: WORKLOAD_BYTES },
    ];
    disks.truncate(scale.disks);
    let options = PairOptions { disks, interval: "5s".into(), ..PairOptions::default() };
    let mut pair = Pair::new(&bed, options)?;
    load::noise(&pair.image(0, 0), WORKLOAD_BYTES, scale.data_bytes, 1)?;
    pair.start(1, "replica")?;
    pair.start(0, "primary")?;
    while pair.report(0)?.generations.committed_number == 0 {
        std::thread::sleep(Duration::from_millis(500));
    }
    let machine = Machine { memory_mib: scale.memory_mib, ..Machine::small(scale.disks) };
    let machine = machine
        .with(format!("rate={}", scale.write_rate))
        .with(format!("blocks={WORKLOAD_BLOCKS}"))
        .with("zero=0")
        .with("start=1");
    let mut here = Qemu::start(&bed.a, "vm", &machine, &pair.backings(0), Start::Boot)?;
    let mut guest = here.control();
    guest.hello(BOOT).context("the guest boots")?;
    pair.cut(0)?;
    let wan = Shape::wan(scale.mbit * 1_000_000, RTT);
    bed.wan.change_both(|shape| *shape = wan);
    // The pair learns the link's latency, and the guest writes a few intervals; what it feels of a busy machine meanwhile is
    // no pause of ours.
    guest.reset_gaps()?;
    std::thread::sleep(Duration::from_secs(12));
    let rest_gaps = guest.stats()?.gaps;

    let mut moves = Vec::new();
    for from in [0, 1] {
        pair.cut(from)?;
        let (there, ours) = one_move(&mut pair, from, here, &machine, &mut guest)?;
        here = there;
        say(format_args!(
            "moved in {:.1} s ({:.1} s converging, {:.1} s memory), pause {:.0} ms (QEMU's own {:.0} ms)",
            ours.moved.seconds,
            ours.moved.converge_seconds,
            ours.moved.memory.total_seconds,
            ours.gaps.pause_ms,
            ours.moved.memory.pause_ms
        ));
        moves.push(ours);
    }
    pair.cut(0)?;
    let (copy, copy_gaps) = full_copy(&mut pair, here, &machine, &mut guest, scale)?;
    say(format_args!("copied in full in {:.1} s (disks {:.1} s)", copy.total_seconds, copy.disks_seconds));
    Ok(Repetition { moves, copy, copy_gaps, rest_gaps })
}

fn one_move(
    pair: &mut Pair,
    from: usize,
    here: Qemu,
    machine: &Machine,
    guest: &mut Control,
) -> anyhow::Result<(Qemu, Ours)> {
    guest.reset_gaps()?;
    let watch = Watch::start(pair, from)?;
    let (there, moved) = pair.move_vm(from, &here, machine, &format!("from-{from}"))?;
    let disk_bytes = watch.wire_bytes()?;
    guest.move_to(there.control_socket());
    here.quit()?;
    // Stops are told by the machine's clock once a second.
    std::thread::sleep(Duration::from_millis(2500));
    let gaps = guest.stats()?.gaps;
    let verdict = guest.verify(ANSWER)?;
    ensure!(verdict.clean(), "the guest misses data: {verdict:?}");
    guest.resume()?;
    Ok((there, Ours { moved, gaps, disk_bytes }))
}

/// Follows one end's report, whose counters begin anew when it becomes the replica.
struct Watch(Process);

impl Watch {
    fn start(pair: &Pair, end: usize) -> anyhow::Result<Watch> {
        let log = pair.site(end).dir.join(format!("watch-{}.log", pair.bed.wan.bytes_delivered()));
        let builder = Builder::new("status", build::binary("watari-sidecar")?, log);
        let builder = builder.args(["status", "--json", "--every", "200ms", "--config"]).arg(&pair.ends[end].config);
        Ok(Watch(builder.spawn()?))
    }

    /// Frames handed to the stream, from the first look to the last of the same counter.
    fn wire_bytes(self) -> anyhow::Result<u64> {
        let text = std::fs::read_to_string(self.0.log())?;
        let reports = text.lines().filter_map(|line| serde_json::from_str::<Report>(line).ok());
        let counts: Vec<u64> = reports.map(|report| report.transfer.wire_bytes).collect();
        let first = counts.first().context("the watch has seen a report")?;
        Ok(counts.iter().max().unwrap_or(first) - first)
    }
}

fn full_copy(
    pair: &mut Pair,
    here: Qemu,
    machine: &Machine,
    guest: &mut Control,
    scale: Scale,
) -> anyhow::Result<(baseline::Report, Gaps)> {
    pair.ctl(0, &["set", "--paused", "true"])?;
    drop(pair.ends[1].sidecar.take());
    // At the large scale there is no room for a third copy of the data.
    pair.images(1).iter().for_each(|image| drop(std::fs::remove_file(image)));
    // The mirror begins by waiting for writes in flight: not behind gigabytes of the seed's own write-back.
    // SAFETY: sync has no arguments and cannot fail.
    unsafe { libc::sync() };
    let mut backings = Vec::new();
    for (disk, spec) in pair.options.disks.iter().enumerate() {
        let path = pair.site(1).dir.join(format!("copy{disk}.img"));
        std::fs::File::create(&path)?.set_len(spec.bytes)?;
        backings.push(Backing::File(path));
    }
    let there = Qemu::start(pair.site(1), "vm-copy", machine, &backings, Start::IncomingStopped)?;
    guest.set_rate(REST_RATE)?;
    guest.reset_gaps()?;
    let expected = scale.data_bytes as f64 * 8.0 / (scale.mbit as f64 * 1e6);
    let limit = Duration::from_secs_f64(600.0 + 2.0 * expected);
    let report = baseline::migrate(pair.bed, &here, &there, backings.len(), limit)?;
    guest.move_to(there.control_socket());
    here.quit()?;
    std::thread::sleep(Duration::from_millis(2500));
    let gaps = guest.stats()?.gaps;
    let verdict = guest.verify(ANSWER)?;
    ensure!(verdict.clean(), "the guest misses data: {verdict:?}");
    there.quit()?;
    Ok((report, gaps))
}

/// A value of each of our moves, beside one of the copy of the same repetition.
fn beside(found: &[Repetition], ours: fn(&Ours) -> f64, copy: fn(&Repetition) -> f64) -> Vec<(f64, f64)> {
    found.iter().flat_map(|r| r.moves.iter().map(move |m| (ours(m), copy(r)))).collect()
}

fn column(found: &[Repetition], value: fn(&Ours) -> f64) -> Vec<f64> {
    found.iter().flat_map(|r| &r.moves).map(value).collect()
}

fn protocol_bytes(ours: &Ours) -> f64 {
    ours.moved.link_bytes as f64 - ours.disk_bytes as f64 - ours.moved.memory.ram_bytes as f64
}

const RESTS: &str = "The copied guest rests (4 KiB/s of writes): QEMU's mirror never becomes ready at 170 ms while the guest writes \
                     20 Mbit/s, so a full copy of the writing guest does not end at all. Watari's guest writes throughout. \
                     This favours the peer.";

impl Figure for Moves {
    fn id(&self) -> &'static str {
        "F1"
    }
    fn title(&self) -> &'static str {
        "a running VM moves at 100 Mbit/s, 170 ms"
    }
    fn target(&self) -> &'static str {
        "floor ≤ 30 s, goal ≤ 10 s for a 512 MiB guest that writes 20 Mbit/s."
    }
    fn method(&self) -> &'static str {
        "From \"move\" (the replica gives way to a primary, the handover is opened) until the guest runs at the target and \
         the source has become the replica; two disks, 512 MiB of data, replica in step before. Each repetition moves there \
         and back, every block verified by the guest, then copies the same VM on the same link as KubeVirt's live \
         migration does it: `blockdev-mirror` of every disk (sync=full), then memory, without TLS. KubeVirt's own steps around it \
         (Pods, objects) are in neither."
    }
    fn run(&self, effort: Effort) -> anyhow::Result<Outcome> {
        let found = measured(effort)?;
        let seconds = column(&found, |m| m.moved.seconds);
        let rows = vec![
            Row::alone("move, floor", Unit::Seconds, seconds.clone()).bound(Bound::AtMost(30.0)),
            Row::alone("move, goal", Unit::Seconds, seconds).bound(Bound::AtMost(10.0)),
            Row::ratio(
                "move / full copy",
                Unit::Seconds,
                "full copy",
                &beside(&found, |m| m.moved.seconds, |r| r.copy.total_seconds),
            )
            .judged(Judged::Inverse),
            Row::ratio(
                "… of it, until memory begins / until the disks are copied",
                Unit::Seconds,
                "full copy",
                &beside(&found, |m| m.moved.converge_seconds, |r| r.copy.disks_seconds),
            )
            .judged(Judged::Inverse),
            Row::ratio(
                "… of it, memory",
                Unit::Seconds,
                "full copy",
                &beside(&found, |m| m.moved.memory.total_seconds, |r| r.copy.memory.total_seconds),
            ),
            Row::ratio(
                "bytes on the link",
                Unit::Bytes,
                "full copy",
                &beside(&found, |m| m.moved.link_bytes as f64, |r| r.copy.link_bytes as f64),
            )
            .judged(Judged::Inverse),
            Row::alone("… disk", Unit::Bytes, column(&found, |m| m.disk_bytes as f64)),
            Row::alone("… memory", Unit::Bytes, column(&found, |m| m.moved.memory.ram_bytes as f64)),
            Row::alone("… protocol (TCP, IP, TLS, control, remote reads)", Unit::Bytes, column(&found, protocol_bytes)),
        ];
        Ok(Outcome { rows, notes: vec![RESTS.to_owned()], plot: Plot::Rows })
    }
}

impl Figure for Pause {
    fn id(&self) -> &'static str {
        "F2"
    }
    fn title(&self) -> &'static str {
        "pause of the guest in a move"
    }
    fn target(&self) -> &'static str {
        "p95 ≤ QEMU's own pause + 1 RTT + 100 ms, seen from inside the guest."
    }
    fn method(&self) -> &'static str {
        "In the moves of F1: largest gap of a 1 ms heartbeat and of fsync'd writes inside the guest (its clock compared with \
         the machine's real-time clock, which a pause does not stop), less the time between the source's STOP and the \
         target's RESUME as QEMU reports them. The result is the 95th percentile over all moves."
    }
    fn run(&self, effort: Effort) -> anyhow::Result<Outcome> {
        let found = measured(effort)?;
        let beyond = |what: &str, ours: fn(&Ours) -> f64| {
            let pairs: Vec<(f64, f64)> =
                found.iter().flat_map(|r| &r.moves).map(|m| (ours(m), m.moved.memory.pause_ms)).collect();
            Row::ratio(what, Unit::Millis, "QEMU's own pause", &pairs)
                .judged(Judged::Difference)
                .percentile(95.0)
                .bound(Bound::AtMost(PAUSE_EXTRA_MS))
        };
        let rows = vec![
            beyond("heartbeat, beyond QEMU's own pause", |m| m.gaps.pause_ms),
            beyond("fsync'd writes, beyond QEMU's own pause", |m| m.gaps.fsync_ms),
            Row::ratio(
                "heartbeat, beside 12 s without a move",
                Unit::Millis,
                "largest gap at rest",
                &beside(&found, |m| m.gaps.pause_ms - m.moved.memory.pause_ms, |r| r.rest_gaps.pause_ms),
            )
            .judged(Judged::Difference)
            .remark("ours: beyond QEMU's own pause; the machine is busy, and so is its guest"),
            Row::ratio(
                "heartbeat, beside the full copy",
                Unit::Millis,
                "full copy",
                &beside(&found, |m| m.gaps.pause_ms, |r| r.copy_gaps.pause_ms),
            ),
        ];
        Ok(Outcome { rows, notes: Vec::new(), plot: Plot::Rows })
    }
}

impl Figure for OneHour {
    fn id(&self) -> &'static str {
        "F1-hour"
    }
    fn title(&self) -> &'static str {
        "a running VM moves where a full copy takes an hour"
    }
    fn target(&self) -> &'static str {
        "disk part ≥ 120 × faster than the full copy (floor), ≥ 360 × (goal)."
    }
    fn method(&self) -> &'static str {
        "As F1, once: incompressible data at 20 Mbit/s, 170 ms, the guest writing 10 Mbit/s; the replica is seeded with the WAN off. Disk part: the whole \
         move less its memory migration, against the copy until all disks are in step."
    }
    fn only_on_demand(&self) -> bool {
        true
    }
    fn run(&self, effort: Effort) -> anyhow::Result<Outcome> {
        let bytes = effort.copy_minutes * 60 * HOUR_MBIT * 1_000_000 / 8;
        let data_bytes = effort.of(bytes.next_multiple_of(MIB), GIB / 16);
        let write_rate = HOUR_MBIT * 1_000_000 / 8 / 2;
        // One disk: QEMU starts a second mirror only once the first has nothing in flight, which a thin link never grants
        // within its monitor's patience.
        let found = run(Scale { mbit: HOUR_MBIT, data_bytes, memory_mib: 512, write_rate, disks: 1, repetitions: 1 })?;
        let disk = |m: &Ours| m.moved.seconds - m.moved.memory.total_seconds;
        let part = |what: &str, bound: f64| {
            Row::ratio(what, Unit::Seconds, "full copy", &beside(&found, disk, |r| r.copy.disks_seconds))
                .judged(Judged::Inverse)
                // The target speaks of an hour; a shorter copy is shown and not judged.
                .bound(if effort.copy_minutes >= 60 { Bound::AtLeast(bound) } else { Bound::Shown })
                .remark(format!("{:.1} GB of data", data_bytes as f64 / 1e9))
        };
        let rows = vec![
            part("disk part, floor", 120.0),
            part("disk part, goal", 360.0),
            Row::ratio(
                "whole move",
                Unit::Seconds,
                "full copy",
                &beside(&found, |m| m.moved.seconds, |r| r.copy.total_seconds),
            )
            .judged(Judged::Inverse),
            Row::ratio(
                "bytes on the link",
                Unit::Bytes,
                "full copy",
                &beside(&found, |m| m.moved.link_bytes as f64, |r| r.copy.link_bytes as f64),
            )
            .judged(Judged::Inverse),
        ];
        Ok(Outcome { rows, notes: vec![RESTS.to_owned()], plot: Plot::Rows })
    }
}
