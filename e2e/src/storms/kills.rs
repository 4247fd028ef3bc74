//! Kill storms: `kill -9` of source worker, source supervisor and replica under a writing guest.

use std::time::Duration;

use anyhow::Context;

use super::{BOOT, Dice, Tally, compare, finish, start_pair};
use crate::{
    pair::PairOptions,
    qemu::{Machine, Qemu, Start},
    site::TestBed,
    wan::Shape,
};

/// A supervisor makes its worker a pass-through after five crashes in a minute; before that the storm kills the
/// supervisor itself, which starts the count anew (as a restart of the container does).
const WORKER_KILLS_MAX: u32 = 4;

/// `kills` times `kill -9` at random instants of source worker, source supervisor and replica, under a writing guest.
pub fn kills(kills: u32, seed: u64, every: u32) -> anyhow::Result<Tally> {
    let bed = TestBed::new("kills", Shape::wan(300_000_000, Duration::from_millis(20)))?;
    let mut pair = start_pair(&bed, PairOptions { interval: "500ms".into(), ..PairOptions::default() })?;
    let machine = Machine::small(2).with("rate=3000000").with("start=1");
    let vm = Qemu::start(&bed.a, "vm", &machine, &pair.backings(0), Start::Boot)?;
    let mut guest = vm.control();
    guest.hello(BOOT)?;
    pair.cut(0)?;
    let mut dice = Dice::new(seed);
    let mut tally = Tally::default();
    let mut worker_kills = [0u32; 2];
    for n in 1..=kills {
        std::thread::sleep(Duration::from_millis(100 + dice.below(1400)));
        let end = usize::from(dice.below(3) == 0);
        let role = ["primary", "replica"][end];
        if dice.below(3) == 0 || worker_kills[end] >= WORKER_KILLS_MAX {
            worker_kills[end] = 0;
            if let Some(mut process) = pair.ends[end].sidecar.take() {
                process.kill9();
            }
            pair.start(end, role).with_context(|| format!("kill {n}, seed {seed}"))?;
            tally.source_supervisors += u32::from(end == 0);
        } else if pair.kill_worker(end)? {
            worker_kills[end] += 1;
            tally.source_workers += u32::from(end == 0);
        }
        tally.replicas += u32::from(end == 1);
        if n % every == 0 {
            compare(&mut pair, 0, &mut guest).with_context(|| format!("after kill {n}, seed {seed}"))?;
            tally.comparisons += 1;
        }
    }
    finish(&mut pair, 0, guest, &mut tally, || Ok(vm.quit()?))?;
    Ok(tally)
}
