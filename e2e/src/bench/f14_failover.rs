//! F14: the source dies at full load; how long until the replica serves, and is it exactly a committed generation?

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::{
    Effort, Figure, Outcome,
    measure::{Bound, Row, Unit},
    peers,
    plot::Plot,
    runner::say,
};
use crate::{
    image,
    pair::{Pair, PairOptions},
    process::wait_until,
    qemu::{Machine, Qemu, Start},
    site::TestBed,
    wan::Shape,
};

pub struct Failover;

const BOOT: Duration = Duration::from_secs(240);
/// As fast as an emulated processor writes.
const RATE: u64 = 50_000_000;

impl Figure for Failover {
    fn id(&self) -> &'static str {
        "F14"
    }
    fn title(&self) -> &'static str {
        "failover"
    }
    fn target(&self) -> &'static str {
        "source killed with -9 at full load: replica active ≤ 5 s after the decision, exactly at a committed generation."
    }
    fn method(&self) -> &'static str {
        "A guest writes as fast as it can to two disks over 1 Gbit/s, 20 ms; its QEMU and its sidecar are killed, the link is cut, and \
         `ctl promote` is the decision. Active: the report says Serving and a client reads the disk over NBD. Then both images are judged \
         offline: all blocks of both disks must be one point in time of every writer."
    }

    fn run(&self, effort: Effort) -> anyhow::Result<Outcome> {
        let (mut seconds, mut lost) = (Vec::new(), Vec::new());
        for repetition in 0..effort.of(3, 1) {
            let (took, age) = failover().with_context(|| format!("repetition {repetition}"))?;
            say(format_args!("active after {took:.2} s, at a generation cut {age:.1} s before the kill; exact"));
            seconds.push(took);
            lost.push(age);
        }
        let exact = seconds.len();
        let rows = vec![
            Row::alone("decision to active", Unit::Seconds, seconds)
                .bound(Bound::AtMost(5.0))
                .remark(format!("{exact} of {exact} exactly at the committed generation")),
            Row::alone("age of that generation at the kill (interval 2 s)", Unit::Seconds, lost),
        ];
        Ok(Outcome { rows, notes: Vec::new(), plot: Plot::Rows })
    }
}

fn failover() -> anyhow::Result<(f64, f64)> {
    let bed = TestBed::new("f14", Shape::wan(1_000_000_000, Duration::from_millis(20)))?;
    let mut pair = Pair::new(&bed, PairOptions::default())?;
    pair.start(1, "replica")?;
    pair.start(0, "primary")?;
    pair.cut(0)?;
    // Ready for a guest, still a replica by its record.
    pair.release(1)?;
    pair.start(1, "primary")?;
    pair.wait(0, "the link", Duration::from_secs(30), |r| r.link.connected)?;
    let machine = Machine::small(2).with(format!("rate={RATE}")).with("blocks=16384").with("start=1");
    let vm = Qemu::start(&bed.a, "vm", &machine, &pair.backings(0), Start::Boot)?;
    vm.control().hello(BOOT)?;
    pair.cut(0)?;
    std::thread::sleep(Duration::from_secs(8));
    let last = pair.report(0)?;
    let age = last.now_unix_millis.saturating_sub(last.generations.committed_cut_unix_millis) as f64 / 1000.0;
    vm.kill();
    pair.ends[0].sidecar.take().context("it runs")?.kill9();
    bed.wan.cut();
    let decision = Instant::now();
    pair.ctl(1, &["promote"])?;
    pair.wait(1, "the promoted side to serve", Duration::from_secs(60), |r| r.role == "Serving")?;
    let uri = peers::uri(&bed.b.dir.join("nbd/root.sock"), "root");
    wait_until("a read over NBD", Duration::from_secs(60), || {
        let mut qemu_io = std::process::Command::new("qemu-io");
        let output = qemu_io.args(["-f", "raw", "-r", "-c", "read 1M 64k"]).arg(&uri).output().ok()?;
        (output.status.success() && !String::from_utf8_lossy(&output.stdout).contains("failed")).then_some(())
    })?;
    let took = decision.elapsed().as_secs_f64();
    let committed = pair.report(1)?.replica.map(|replica| replica.applied).unwrap_or_default();
    pair.release(1)?;
    let tallies = image::check(&pair.images(1), None)?;
    ensure!(
        !tallies.is_empty() && tallies.iter().all(|t| t.clean()),
        "not one point in time ({committed}): {tallies:?}"
    );
    Ok((took, age))
}
