//! F10: how old the newest committed generation is while the guest writes at half the link's rate: what a disaster would lose.

use std::time::{Duration, Instant};

use super::{
    Effort, Figure, Outcome,
    fio::Job,
    load::{KIB, MIB},
    measure::{Bound, Row, Unit, percentile},
    peers,
    plot::{Lines, Plot, Series},
    runner::say,
};
use crate::{
    pair::{DiskSpec, Pair, PairOptions},
    site::TestBed,
    wan::Shape,
};

pub struct Lag;

const LINK: u64 = 100_000_000;
/// Half of the link.
const CHURN_BYTES_PER_SECOND: u64 = LINK / 8 / 2;
const DISK_BYTES: u64 = 512 * MIB;
const SAMPLE: Duration = Duration::from_millis(200);

impl Figure for Lag {
    fn id(&self) -> &'static str {
        "F10"
    }
    fn title(&self) -> &'static str {
        "lag (recovery point)"
    }
    fn target(&self) -> &'static str {
        "churn at half the link's rate, intervals of 10 s and 60 s: p95 of the age of the newest committed generation ≤ 1.5 × \
         interval + 5 s."
    }
    fn method(&self) -> &'static str {
        "100 Mbit/s, 40 ms; fio writes 50 Mbit/s of random incompressible 16 KiB blocks over 512 MiB. The age (now less the instant of \
         the newest committed cut) is read from the source's report five times a second, after two intervals of warming up, for \
         several intervals; the plot shows it over time."
    }

    fn run(&self, effort: Effort) -> anyhow::Result<Outcome> {
        let bed = TestBed::new("f10", Shape { queue_bytes: 16 * MIB, ..Shape::default() })?;
        let disks = vec![DiskSpec { name: "root", bytes: DISK_BYTES }];
        let mut pair = Pair::new(&bed, PairOptions { disks, interval: "10s".into(), ..PairOptions::default() })?;
        pair.start(1, "replica")?;
        pair.start(0, "primary")?;
        pair.cut(0)?;
        bed.wan.change_both(|shape| *shape = Shape::wan(LINK, Duration::from_millis(40)));
        let uri = peers::uri(&bed.a.dir.join("nbd/root.sock"), "root");
        let mut rows = Vec::new();
        let mut series = Vec::new();
        let mut marks = Vec::new();
        for (interval, rounds) in effort.of(vec![(10u64, 6u64), (60, 3)], vec![(2, 3)]) {
            pair.ctl(0, &["set", "--interval", &format!("{interval}s")])?;
            let seconds = (interval * (rounds + 2)) as f64;
            let load = Job::new(&uri, "randwrite", 16 * KIB, 4, seconds).with(format!("size={DISK_BYTES}"));
            let load = load.with(format!("rate={CHURN_BYTES_PER_SECOND}")).with("refill_buffers=1").start()?;
            std::thread::sleep(Duration::from_secs(interval * 2));
            let began = Instant::now();
            let mut ages = Vec::new();
            let sent = bed.wan.bytes_delivered();
            while began.elapsed() < Duration::from_secs(interval * rounds) {
                let report = pair.report(0)?;
                let age = report.now_unix_millis.saturating_sub(report.generations.committed_cut_unix_millis);
                ages.push((began.elapsed().as_secs_f64(), age as f64 / 1000.0));
                std::thread::sleep(SAMPLE);
            }
            let link_mbit = (bed.wan.bytes_delivered() - sent) as f64 * 8e-6 / began.elapsed().as_secs_f64();
            let churn = load.finish()?.bytes_per_second;
            let bound = 1.5 * interval as f64 + 5.0;
            let values: Vec<f64> = ages.iter().map(|sample| sample.1).collect();
            let remark = format!(
                "median {:.1} s, largest {:.1} s; guest wrote {:.0} Mbit/s, the link carried {link_mbit:.0} Mbit/s",
                percentile(&values, 50.0),
                percentile(&values, 100.0),
                churn * 8e-6
            );
            let p95 = percentile(&values, 95.0);
            say(format_args!("interval {interval} s: p95 {p95:.1} s ({remark})"));
            rows.push(
                Row::alone(format!("p95 of the age, interval {interval} s"), Unit::Seconds, vec![p95])
                    .bound(Bound::AtMost(bound))
                    .remark(remark),
            );
            series.push(Series { name: format!("interval {interval} s"), points: ages });
            marks.push((format!("target for {interval} s"), bound));
        }
        let lines =
            Lines { x: "seconds".into(), y: "age of the newest committed generation, seconds".into(), series, marks };
        Ok(Outcome { rows, notes: Vec::new(), plot: Plot::Lines(lines) })
    }
}
