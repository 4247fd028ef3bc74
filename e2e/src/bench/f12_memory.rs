//! F12: memory of a sidecar with a very large disk of which 1 % is dirty.

use anyhow::{Context, ensure};

use super::{
    Effort, Figure, Outcome,
    fio::Job,
    load::{GIB, KIB, MIB},
    measure::{Bound, Row, Unit},
    plot::Plot,
    quota,
    rig::{Rig, RigOptions},
    runner::say,
};

pub struct Memory;

/// `preserve.memory` as configured by default, and the largest send window: "the configured buffers".
const BUFFERS_BYTES: f64 = (128 * MIB) as f64;
/// Random marks are made for at most this long; what was reached is said.
const MARKING_SECONDS: u64 = 150;

impl Figure for Memory {
    fn id(&self) -> &'static str {
        "F12"
    }
    fn title(&self) -> &'static str {
        "memory"
    }
    fn target(&self) -> &'static str {
        "1 TiB sparse disk, 1 % dirty: clustered ≤ 64 MiB + 16 MiB per TiB + the configured buffers; random ≤ 110 MiB per TiB + the \
         same. (Buffers: 64 MiB of preserved content, 64 MiB send window.)"
    }
    fn method(&self) -> &'static str {
        "Largest resident memory (VmHWM: heap, code and the shared map together) of supervisor and worker of the source, while 1 % of a \
         1 TiB sparse disk becomes dirty and again while it is sent and committed; the replica's beside it. Blocks are dirtied by discards, \
         which are marked like writes and need no 10 GiB of this machine's disk; random ones are 4 KiB each, anywhere."
    }

    fn run(&self, effort: Effort) -> anyhow::Result<Outcome> {
        let disk = effort.of(1024 * GIB, 16 * GIB);
        let tib = disk as f64 / (1024 * GIB) as f64;
        let mut rows = Vec::new();
        let mut notes = Vec::new();
        for random in [false, true] {
            let name = if random { "random" } else { "clustered" };
            let disks = vec![("disk", disk, None)];
            let mut rig = Rig::new("f12", RigOptions { disks, interval: "1h", ..RigOptions::default() })?;
            rig.start_pair()?;
            rig.ctl(0, &["set", "--paused", "true"])?;
            let before = peak(&rig, 0)?;
            let (pattern, block) = if random { ("randtrim", 4 * KIB) } else { ("trim", MIB) };
            let job = Job::new(&rig.uri(0), pattern, block, 32, 0.0).with(format!("size={disk}"));
            let done = job
                .with(format!("number_ios={}", disk / 100 / block))
                .with("norandommap=1")
                .with(format!("runtime={MARKING_SECONDS}s"))
                .run()?;
            // Reports are made from time to time.
            std::thread::sleep(std::time::Duration::from_secs(2));
            let dirty = rig.report(0)?.disks.first().context("one disk")?.dirty_bytes as f64;
            ensure!(dirty > 0.0, "discards are not marked: fio made {} of them", done.operations);
            let marked = peak(&rig, 0)?;
            rig.ctl(0, &["set", "--paused", "false"])?;
            rig.cut()?;
            let (source, target) = (peak(&rig, 0)?, peak(&rig, 1)?);
            let share = dirty / disk as f64 * 100.0;
            say(format_args!(
                "{name}: {share:.2} % dirty; {:.0} MiB at start, {:.0} marked, {:.0} sent; replica {:.0}",
                before / MIB as f64,
                marked / MIB as f64,
                source / MIB as f64,
                target / MIB as f64
            ));
            let allowed = match random {
                true => 110.0 * MIB as f64 * tib,
                false => 64.0 * MIB as f64 + 16.0 * MIB as f64 * tib,
            };
            let remark = format!("{share:.2} % dirty");
            rows.push(
                Row::alone(format!("source, {name}, while marked and sent"), Unit::Bytes, vec![source])
                    .bound(Bound::AtMost(allowed + BUFFERS_BYTES))
                    .remark(remark),
            );
            rows.push(Row::alone(format!("… {name}, marked only"), Unit::Bytes, vec![marked]));
            rows.push(Row::alone(format!("… {name}, the replica"), Unit::Bytes, vec![target]));
            if share < 0.95 {
                notes.push(format!(
                    "{name}: only {share:.2} % became dirty within {MARKING_SECONDS} s on this machine."
                ));
            }
        }
        Ok(Outcome { rows, notes, plot: Plot::Rows })
    }
}

/// Largest resident memory so far of a sidecar's processes, bytes.
fn peak(rig: &Rig, end: usize) -> anyhow::Result<f64> {
    let supervisor = rig.processes[end].as_ref().context("it runs")?.pid();
    let mut kib = 0.0;
    for pid in quota::children(supervisor).into_iter().chain([supervisor]) {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
        kib += line.trim().trim_end_matches("kB").trim().parse::<f64>()?;
    }
    Ok(kib * 1024.0)
}
