//! Handovers of a pair without a VM, each broken at a random instant around its seal: many in little time.
//! [`matrix`](super::matrix) breaks fewer, with a VM, each at a chosen step.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::{Dice, Tally, replica_is_equal, start_pair};
use crate::{
    nbd::qemu_io,
    pair::{Pair, PairOptions},
    site::TestBed,
    wan::Shape,
};

/// `rounds` handovers of a VM-less pair, each broken at a random instant around the seal: a worker of either side is killed,
/// or the link is cut for a moment. In the end exactly the target serves, with everything that was acknowledged before.
pub fn handovers(rounds: u32, seed: u64) -> anyhow::Result<Tally> {
    let bed = TestBed::new("handovers", Shape::wan(300_000_000, Duration::from_millis(10)))?;
    let mut pair = start_pair(&bed, PairOptions { interval: "500ms".into(), ..PairOptions::default() })?;
    pair.cut(0)?;
    let mut dice = Dice::new(seed);
    let mut tally = Tally::default();
    let mut from = 0;
    for n in 0..rounds {
        let context = || format!("handover {n}, seed {seed}");
        let to = 1 - from;
        let pattern = 1 + n % 250;
        pair.release(to).with_context(context)?;
        pair.start(to, "primary").with_context(context)?;
        pair.wait(from, "the link", Duration::from_secs(60), |r| r.link.connected)?;
        pair.ctl(from, &["open-handover", "--vmi-uid", &format!("round-{n}")]).with_context(context)?;
        // Acknowledged and flushed at the source, at the last moment.
        nbd_io(&pair, from, &[&format!("write -P {pattern} {}k 256k", 64 * (n % 100)), "flush"])
            .with_context(context)?;
        pair.wait(to, "the offer", Duration::from_secs(60), |r| r.attachable).with_context(context)?;
        // It may answer or not: what follows breaks it.
        let _ = pair.ctl(to, &["acquire"]);
        std::thread::sleep(Duration::from_millis(dice.below(40)));
        match dice.below(4) {
            0 => {
                bed.wan.link_down()?;
                std::thread::sleep(Duration::from_millis(300 + dice.below(700)));
                bed.wan.restore()?;
                tally.cuts_of_the_link += 1;
            }
            1 => {
                tally.replicas += u32::from(pair.kill_worker(to)?);
            }
            _ => {
                tally.source_workers += u32::from(pair.kill_worker(from)?);
            }
        }
        // A target that was killed has forgotten that it asked; the operator asks again while it is not active.
        let deadline = Instant::now() + Duration::from_secs(60);
        while !pair.report(to).is_ok_and(|r| r.role == "Serving") {
            ensure!(Instant::now() < deadline, "{}: {:?}\n{:?}", context(), pair.report(from), pair.report(to));
            let _ = pair.ctl(to, &["acquire"]);
            std::thread::sleep(Duration::from_millis(200));
        }
        pair.wait(from, "the old side to be a replica", Duration::from_secs(60), |r| r.role == "Replica")
            .with_context(context)?;
        nbd_io(&pair, to, &[&format!("read -P {pattern} {}k 256k", 64 * (n % 100))]).with_context(context)?;
        tally.moves += 1;
        from = to;
    }
    pair.cut(from)?;
    replica_is_equal(&mut pair, from)?;
    Ok(tally)
}

/// qemu-io on the first disk of one end.
fn nbd_io(pair: &Pair, end: usize, commands: &[&str]) -> anyhow::Result<()> {
    let name = pair.options.disks[0].name;
    qemu_io(&pair.socket(end, name), name, commands)
}
