//! F8: a thin link that is cut again and again: it converges, and little is sent twice.

use std::{
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::ensure;

use super::{
    Effort, Figure, Outcome,
    load::{self, MIB},
    measure::{Bound, Judged, Row, Unit},
    peers,
    plot::Plot,
    runner::say,
};
use crate::{
    pair::{DiskSpec, Pair, PairOptions},
    site::TestBed,
    wan::Shape,
};

pub struct Thin;

const LINK: u64 = 5_000_000;
const RTT: Duration = Duration::from_millis(300);
const BETWEEN_CUTS: Duration = Duration::from_secs(20);
/// TCP outlives the first; the second is longer than any side's patience, so that the transfer begins anew.
const DOWN: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(35)];
const CUT_BYTES_MAX: f64 = (4 * MIB) as f64;
/// Both sides have this long.
const LIMIT: Duration = Duration::from_secs(600);

impl Figure for Thin {
    fn id(&self) -> &'static str {
        "F8"
    }
    fn title(&self) -> &'static str {
        "thin link, cut every 20 s"
    }
    fn target(&self) -> &'static str {
        "5 Mbit/s, 300 ms, cut every 20 s: converges; at most 4 MiB sent again per cut."
    }
    fn method(&self) -> &'static str {
        "First synchronisation of 24 MiB of noise; the link works for 20 s, is gone for 3 s, works for 20 s, is gone for 35 s, and so on. \
         Peer: `rsync --partial --inplace` over ssh on the same link with the same cuts, started again whenever it fails."
    }

    fn run(&self, effort: Effort) -> anyhow::Result<Outcome> {
        let bytes = effort.of(24 * MIB, 4 * MIB);
        let bed = TestBed::new("f8", Shape::wan(LINK, RTT))?;
        let disks = vec![DiskSpec { name: "root", bytes }];
        let mut pair = Pair::new(&bed, PairOptions { disks, interval: "1s".into(), ..PairOptions::default() })?;
        load::noise(&pair.image(0, 0), 0, bytes, 8)?;
        pair.start(1, "replica")?;
        let before = bed.wan.bytes_delivered();
        let (seconds, cuts) = with_cuts(&bed, || {
            pair.start(0, "primary")?;
            let began = Instant::now();
            while pair.report(0)?.generations.committed_number == 0 {
                ensure!(began.elapsed() < LIMIT, "it does not converge: {:?}", pair.report(0)?);
                std::thread::sleep(Duration::from_millis(200));
            }
            Ok(())
        })?;
        let ours_bytes = (bed.wan.bytes_delivered() - before) as f64;
        let again = pair.report(0)?.transfer.resent_bytes as f64;
        say(format_args!("Watari: {seconds:.0} s, {cuts} cuts, {:.2} MiB sent again", again / MIB as f64));
        pair.release(0)?;
        pair.release(1)?;

        let _sshd = peers::sshd(&bed.dir, &bed.b.netns, &bed.b.address.to_string())?;
        let before = bed.wan.bytes_delivered();
        let (peer_seconds, peer_cuts) = with_cuts(&bed, || {
            let text = format!(
                "rsync --partial --inplace --timeout=20 -e '{}' {} root@{}:{}/rsync.img",
                peers::ssh(&bed.dir),
                pair.image(0, 0).display(),
                bed.b.address,
                bed.b.dir.display()
            );
            let began = Instant::now();
            while !peers::shell_in(&bed.a.netns.path(), &text)?.status.success() {
                ensure!(began.elapsed() < LIMIT, "rsync does not converge");
                std::thread::sleep(Duration::from_millis(500));
            }
            Ok(())
        })?;
        let peer_bytes = (bed.wan.bytes_delivered() - before) as f64;
        say(format_args!("rsync: {peer_seconds:.0} s, {peer_cuts} cuts"));
        let per_cut = again / f64::from(cuts.max(1));
        let rows = vec![
            Row::alone("sent again per cut", Unit::Bytes, vec![per_cut])
                .bound(Bound::AtMost(CUT_BYTES_MAX))
                .remark(format!("{cuts} cuts")),
            Row::ratio("time until committed", Unit::Seconds, "rsync over ssh", &[(seconds, peer_seconds)])
                .judged(Judged::Inverse)
                .remark(format!("rsync met {peer_cuts} cuts")),
            Row::ratio("bytes on the wire", Unit::Bytes, "rsync over ssh", &[(ours_bytes, peer_bytes)]),
        ];
        Ok(Outcome { rows, notes: Vec::new(), plot: Plot::Rows })
    }
}

/// Runs `job` while the link comes and goes. Returns its seconds and the number of cuts it met.
fn with_cuts(bed: &TestBed, job: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<(f64, u32)> {
    let (done, cuts) = (AtomicBool::new(false), AtomicU32::new(0));
    let nap = |time: Duration| {
        let until = Instant::now() + time;
        while Instant::now() < until && !done.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(50));
        }
        !done.load(Ordering::SeqCst)
    };
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            for down in DOWN.into_iter().cycle() {
                if !nap(BETWEEN_CUTS) {
                    return;
                }
                bed.wan.cut();
                cuts.fetch_add(1, Ordering::SeqCst);
                let go_on = nap(down);
                // A carrier that cannot be set leaves the job to its own limit.
                let _ = bed.wan.restore();
                if !go_on {
                    return;
                }
            }
        });
        let began = Instant::now();
        let result = job();
        done.store(true, Ordering::SeqCst);
        result.map(|()| began.elapsed().as_secs_f64())
    });
    Ok((result?, cuts.load(Ordering::SeqCst)))
}
