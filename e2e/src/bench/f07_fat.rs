//! F7: a long fat link: how much of it the stream fills, beside one plain TCP connection.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::Context;

use super::{
    Effort, Figure, Outcome,
    load::{self, MIB},
    measure::{Bound, Row, Unit, median, percentile},
    plot::{Lines, Plot, Series},
    runner::say,
};
use crate::{
    pair::{DiskSpec, Pair, PairOptions},
    site::TestBed,
    wan::Shape,
};

pub struct LongFat;

const LINK: u64 = 1_000_000_000;
const RTT: Duration = Duration::from_millis(200);
const SAMPLE: Duration = Duration::from_millis(250);
const PORT: u16 = 5001;

impl Figure for LongFat {
    fn id(&self) -> &'static str {
        "F7"
    }
    fn title(&self) -> &'static str {
        "long fat link: 1 Gbit/s, 200 ms"
    }
    fn target(&self) -> &'static str {
        "≥ 90 % of the link (or of what the emulator forwards on this machine, where that is less)."
    }
    fn method(&self) -> &'static str {
        "First synchronisation of incompressible data over the emulated link, beside one plain TCP connection over the same link in \
         the same repetition (no TLS, no disk: the emulator's own limit). Rate: IP bytes delivered per quarter of a second; steady is the \
         median over the samples between the first that reaches half of the largest and the last that does."
    }

    fn run(&self, effort: Effort) -> anyhow::Result<Outcome> {
        let bytes = effort.of(1536 * MIB, 128 * MIB);
        let bed = TestBed::new("f7", Shape { queue_bytes: 64 * MIB, ..Shape::default() })?;
        let limit = sampled(&bed, || plain_tcp(&bed, Duration::from_secs(3)))?.steady();
        say(format_args!(
            "the emulator forwards {:.0} Mbit/s of one TCP connection when nothing limits it",
            limit * 1e-6
        ));
        bed.wan.change_both(|shape| *shape = Shape::wan(LINK, RTT));
        let disk = DiskSpec { name: "root", bytes };
        let source = bed.dir.join("noise.img");
        load::noise(&source, 0, bytes, 7)?;
        let (mut steady, mut whole, mut series) = (Vec::new(), Vec::new(), Vec::new());
        for repetition in 0..effort.of(3, 1) {
            let plain = sampled(&bed, || plain_tcp(&bed, Duration::from_secs_f64(effort.of(8.0, 3.0))))?;
            let ours = {
                for site in [&bed.a, &bed.b] {
                    let _ = std::fs::remove_dir_all(site.dir.join("folder"));
                    let _ = std::fs::remove_file(site.dir.join("root.img"));
                }
                let _ = std::fs::remove_dir_all(bed.dir.join("pki"));
                let options = PairOptions {
                    disks: vec![disk.clone()],
                    interval: "1h".into(),
                    journal: "3GiB".into(),
                    ..PairOptions::default()
                };
                let mut pair = Pair::new(&bed, options)?;
                std::fs::hard_link(&source, pair.image(0, 0)).or_else(|_| {
                    std::fs::remove_file(pair.image(0, 0))?;
                    std::fs::hard_link(&source, pair.image(0, 0))
                })?;
                pair.start(1, "replica")?;
                sampled(&bed, || {
                    pair.start(0, "primary")?;
                    pair.cut(0).map(drop)
                })?
            };
            steady.push((ours.steady() / 8.0, plain.steady() / 8.0));
            whole.push((bytes as f64 / ours.seconds, plain.steady() / 8.0));
            say(format_args!("{:.0} Mbit/s; plain TCP {:.0} Mbit/s", ours.steady() * 1e-6, plain.steady() * 1e-6));
            if repetition == 0 {
                let named = |name: &str, run: &Run| Series { name: name.into(), points: run.megabits() };
                series = vec![named("Watari", &ours), named("plain TCP", &plain)];
            }
        }
        let link_bytes = LINK as f64 / 8.0;
        let share = median(&steady.iter().map(|pair| pair.0 / link_bytes).collect::<Vec<_>>());
        let rows = vec![
            Row::ratio("steady rate / plain TCP through the emulator", Unit::BytesPerSecond, "plain TCP", &steady)
                .bound(Bound::AtLeast(0.9))
                .remark(format!("{:.0} % of 1 Gbit/s", share * 100.0)),
            Row::ratio(
                "disk bytes / time until committed, start included",
                Unit::BytesPerSecond,
                "plain TCP, steady",
                &whole,
            ),
        ];
        let marks = vec![("the link".to_owned(), LINK as f64 * 1e-6)];
        let lines = Lines { x: "seconds".into(), y: "Mbit/s of IP packets".into(), series, marks };
        Ok(Outcome { rows, notes: Vec::new(), plot: Plot::Lines(lines) })
    }
}

/// Bits per second over time, from source to target.
struct Run {
    points: Vec<(f64, f64)>,
    seconds: f64,
}

impl Run {
    fn steady(&self) -> f64 {
        let rates: Vec<f64> = self.points.iter().map(|point| point.1).collect();
        let half = percentile(&rates, 100.0) / 2.0;
        let first = rates.iter().position(|rate| *rate >= half).unwrap_or(0);
        let last = rates.iter().rposition(|rate| *rate >= half).unwrap_or(0);
        median(&rates[first..=last.max(first)])
    }
    fn megabits(&self) -> Vec<(f64, f64)> {
        self.points.iter().map(|(x, y)| (*x, y * 1e-6)).collect()
    }
}

/// Watches the link while `job` runs.
fn sampled(bed: &TestBed, job: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Run> {
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let delivered = || bed.wan.report().a_to_b.counters.delivered_bytes;
            let (began, mut points) = (Instant::now(), Vec::new());
            let (mut last_at, mut last) = (began, delivered());
            while !done.load(std::sync::atomic::Ordering::SeqCst) {
                std::thread::sleep(SAMPLE);
                let (now, bytes) = (Instant::now(), delivered());
                let rate = (bytes - last) as f64 * 8.0 / (now - last_at).as_secs_f64();
                points.push(((now - began).as_secs_f64(), rate));
                (last_at, last) = (now, bytes);
            }
            points
        });
        let began = Instant::now();
        let result = job();
        let seconds = began.elapsed().as_secs_f64();
        done.store(true, std::sync::atomic::Ordering::SeqCst);
        let points = watching.join().map_err(|_| anyhow::anyhow!("the watcher panicked"))?;
        result.map(|()| Run { points, seconds })
    })
}

/// One TCP connection from A to B, written to for `time`.
fn plain_tcp(bed: &TestBed, time: Duration) -> anyhow::Result<()> {
    let address = SocketAddr::from((bed.b.address, PORT));
    let listener = bed.b.netns.enter(|| TcpListener::bind(address))??;
    let sink = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut buffer = vec![0; 1 << 20];
        while stream.read(&mut buffer)? > 0 {}
        Ok(())
    });
    let mut stream = bed.a.netns.enter(|| TcpStream::connect_timeout(&address, Duration::from_secs(10)))??;
    let buffer = vec![0x5a; 1 << 20];
    let began = Instant::now();
    while began.elapsed() < time {
        stream.write_all(&buffer).context("plain TCP")?;
    }
    drop(stream);
    sink.join().map_err(|_| anyhow::anyhow!("the sink panicked"))?.context("plain TCP")
}
