//! F9: a round in which nothing has changed, on a large disk.

use super::{
    Effort, Figure, Outcome,
    fio::Job,
    load::{GIB, KIB, MIB},
    measure::{Bound, Row, Unit, timed},
    peers,
    plot::Plot,
    runner::say,
};
use crate::{
    pair::{DiskSpec, Pair, PairOptions},
    site::TestBed,
    wan::Shape,
};

pub struct Idle;

const DISK_BYTES: u64 = 64 * GIB;

impl Figure for Idle {
    fn id(&self) -> &'static str {
        "F9"
    }
    fn title(&self) -> &'static str {
        "a round with nothing to do"
    }
    fn target(&self) -> &'static str {
        "nothing changed, 64 GiB disk: < 1 s and < 64 KiB on the wire per generation."
    }
    fn method(&self) -> &'static str {
        "`ctl cut --wait`, from the command to the committed generation, over the emulated WAN (100 Mbit/s, 170 ms, one round trip of it is \
         the link's), the disk holding 256 MiB of scattered data; bytes are IP packets both ways during the round. Idle: the same counted \
         over ten seconds in which nothing is asked for. `rsync` with its quick check would look at the file's time and compare nothing, so it is no peer."
    }

    fn run(&self, effort: Effort) -> anyhow::Result<Outcome> {
        let bed = TestBed::new("f9", Shape { queue_bytes: 16 * MIB, ..Shape::default() })?;
        let disks = vec![DiskSpec { name: "root", bytes: DISK_BYTES }];
        let mut pair = Pair::new(&bed, PairOptions { disks, interval: "5s".into(), ..PairOptions::default() })?;
        pair.start(1, "replica")?;
        pair.start(0, "primary")?;
        let uri = peers::uri(&bed.a.dir.join("nbd/root.sock"), "root");
        let job = Job::new(&uri, "randwrite", 64 * KIB, 16, 0.0).with(format!("size={DISK_BYTES}"));
        job.with(format!("number_ios={}", effort.of(256, 16) * MIB / (64 * KIB))).run()?;
        pair.cut(0)?;
        bed.wan.change_both(|shape| *shape = Shape::wan(100_000_000, std::time::Duration::from_millis(170)));
        std::thread::sleep(std::time::Duration::from_secs(5));
        let (mut seconds, mut bytes) = (Vec::new(), Vec::new());
        for _ in 0..effort.of(9, 2) {
            let before = bed.wan.bytes_delivered();
            let (took, _) = timed(|| pair.cut(0))?;
            seconds.push(took.as_secs_f64());
            bytes.push((bed.wan.bytes_delivered() - before) as f64);
            std::thread::sleep(std::time::Duration::from_millis(500));
        }
        let before = bed.wan.bytes_delivered();
        let idle = std::time::Duration::from_secs(effort.of(10, 2));
        std::thread::sleep(idle);
        let idle_rate = (bed.wan.bytes_delivered() - before) as f64 / idle.as_secs_f64();
        let rows = vec![
            Row::alone("a cut with nothing changed", Unit::Seconds, seconds).bound(Bound::AtMost(1.0)),
            Row::alone("… bytes on the wire", Unit::Bytes, bytes).bound(Bound::AtMost(64.0 * KIB as f64)),
            Row::alone("an idle pair's traffic, interval 5 s", Unit::BytesPerSecond, vec![idle_rate]),
        ];
        rows.iter().for_each(|row| say(format_args!("{}: {:.2}", row.what, row.result())));
        Ok(Outcome { rows, notes: Vec::new(), plot: Plot::Rows })
    }
}
