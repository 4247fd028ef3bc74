//! F11: what a cut adds to the guest's latency.

use std::time::{Duration, Instant};

use super::{
    Effort, Figure, Outcome,
    fio::{Job, Measured},
    load::{self, KIB, MIB},
    measure::{Bound, Judged, Row, Unit},
    plot::Plot,
    rig::{Rig, RigOptions},
    runner::say,
};

pub struct CutStall;

const DISKS: [&str; 4] = ["root", "data", "log", "swap"];
const DISK_BYTES: u64 = 128 * MIB;
/// As often as the configuration allows; each of them meets thousands of writes in flight.
const BETWEEN_CUTS: Duration = Duration::from_millis(250);

impl Figure for CutStall {
    fn id(&self) -> &'static str {
        "F11"
    }
    fn title(&self) -> &'static str {
        "stall of a cut"
    }
    fn target(&self) -> &'static str {
        "guest latency added by a cut, 4 disks, depth 32: p99 ≤ 5 ms."
    }
    fn method(&self) -> &'static str {
        "Four disks, each written 4 KiB at random with depth 32 at a fixed 1,000 writes/s (an unpaced load would measure the \
         processor's queue and not the cut); with a cut every 250 ms (`ctl cut`), and without, in turn. A cut includes what follows \
         it: old content is kept before it is overwritten while the delta is read and sent over loopback."
    }

    fn run(&self, effort: Effort) -> anyhow::Result<Outcome> {
        let disks = DISKS.iter().map(|name| (*name, DISK_BYTES, None)).collect();
        let mut rig = Rig::new("f11", RigOptions { disks, interval: "1h", ..RigOptions::default() })?;
        (0..DISKS.len()).try_for_each(|disk| load::noise(&rig.image(0, disk), 0, DISK_BYTES, disk as u64))?;
        rig.start_pair()?;
        let seconds = effort.of(6.0, 1.0);
        let mut job = Job::new("", "randwrite", 4 * KIB, 32, seconds).with(format!("size={DISK_BYTES}"));
        job.uris = (0..DISKS.len()).map(|disk| rig.uri(disk)).collect();
        let job = job.with("norandommap=1").with("rate_iops=1000");
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for repetition in 0..effort.of(5, 1) {
            for turn in 0..2 {
                let cutting = (turn + repetition) % 2 == 0;
                let running = job.start()?;
                let mut cuts = 0;
                let end = Instant::now() + Duration::from_secs_f64(seconds);
                while cutting && Instant::now() < end {
                    std::thread::sleep(BETWEEN_CUTS);
                    // While a generation is still being sent the next cut waits for it.
                    cuts += u32::from(rig.ctl(0, &["cut", "--wait", "0s"]).is_ok());
                }
                let measured = running.finish()?;
                say(format_args!(
                    "{cuts} cuts: p50 {:.2} ms, p99 {:.2} ms, p99.9 {:.2} ms, largest {:.1} ms, {:.0}/s",
                    measured.p50_ms, measured.p99_ms, measured.p999_ms, measured.max_ms, measured.per_second
                ));
                if cutting { &mut with } else { &mut without }.push(measured);
            }
            rig.cut()?;
        }
        let row = |what: &str, value: fn(&Measured) -> f64| {
            let pairs: Vec<(f64, f64)> = with.iter().map(value).zip(without.iter().map(value)).collect();
            Row::ratio(what, Unit::Millis, "without cuts", &pairs).judged(Judged::Difference)
        };
        let rows = vec![
            row("p99 of a write, with cuts", |m| m.p99_ms).bound(Bound::AtMost(5.0)),
            row("p50", |m| m.p50_ms),
            row("p99.9", |m| m.p999_ms),
            row("largest", |m| m.max_ms),
        ];
        Ok(Outcome { rows, notes: Vec::new(), plot: Plot::Rows })
    }
}
