//! A handover broken at each of its steps, in each way: steps × faults, each followed by the operator's judgement.
//!
//! After each cell: exactly one end serves, at the highest epoch that was ever seen; the guest, or whoever boots after it, finds
//! every acknowledged write; a generation makes the replica equal byte for byte. In between nobody writes beside the other.

use std::{fmt, time::Instant};

use anyhow::Context;

use super::{
    Dice,
    scene::{Outcome, Scene, usual_link},
};
use crate::{
    pair::{DiskSpec, Pair, PairOptions},
    site::TestBed,
};

/// How far the handover has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Recorded at the source, told to the target.
    Opened,
    /// The target's QEMU is connected and has read through the source.
    Attached,
    /// Memory is on its way.
    Migrating,
    /// The target has asked; the source admits no writes any more, and nothing of the remainder has arrived.
    Sealed,
    /// The remainder is on its way.
    Sending,
    /// The target serves; the source does not know it yet.
    Activated,
    /// The source is the replica.
    Released,
}

/// What breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    SourceWorker,
    TargetWorker,
    SourceSupervisor,
    TargetSupervisor,
    /// The cable: no carrier.
    LinkCut,
    /// Silence in both directions.
    BlackHole,
    TargetQemu,
    SourceQemu,
    /// The memory migration is cancelled (before it began: the move is called off; after its end: too late).
    Cancel,
}

pub const STEPS: [Step; 7] =
    [Step::Opened, Step::Attached, Step::Migrating, Step::Sealed, Step::Sending, Step::Activated, Step::Released];

pub const FAULTS: [Fault; 9] = [
    Fault::SourceWorker,
    Fault::TargetWorker,
    Fault::SourceSupervisor,
    Fault::TargetSupervisor,
    Fault::LinkCut,
    Fault::BlackHole,
    Fault::TargetQemu,
    Fault::SourceQemu,
    Fault::Cancel,
];

/// One broken handover.
#[derive(Clone, Copy, Debug)]
pub struct Cell {
    pub step: Step,
    pub fault: Fault,
    /// The step was seen to hold when the fault came. Where it is over in an instant a busy machine may miss it.
    pub hit: bool,
    pub outcome: Outcome,
    pub seconds: f64,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cell { step, fault, hit, outcome, seconds } = self;
        let (step, fault, outcome) = (format!("{step:?}"), format!("{fault:?}"), format!("{outcome:?}"));
        write!(f, "{step:<10} {fault:<17} {} {outcome:<15} {seconds:>6.1} s", if *hit { "hit " } else { "late" })
    }
}

/// Every combination.
pub fn all() -> Vec<(Step, Fault)> {
    STEPS.into_iter().flat_map(|step| FAULTS.into_iter().map(move |fault| (step, fault))).collect()
}

/// `count` cells of which no two share a step or a fault (at most seven).
pub fn sample(count: usize, seed: u64) -> Vec<(Step, Fault)> {
    let mut dice = Dice::new(seed);
    let (mut steps, mut faults) = (STEPS.to_vec(), FAULTS.to_vec());
    let mut cells = Vec::new();
    while cells.len() < count && !steps.is_empty() {
        let step = steps.remove(dice.below(steps.len() as u64) as usize);
        cells.push((step, faults.remove(dice.below(faults.len() as u64) as usize)));
    }
    cells
}

/// Breaks one handover after the other of one VM, which moves, stays or boots again as it comes.
pub fn run(cells: &[(Step, Fault)], seed: u64) -> anyhow::Result<Vec<Cell>> {
    let bed = TestBed::new("matrix", usual_link())?;
    let disk = |name| DiskSpec { name, bytes: 32 << 20 };
    let options = PairOptions { disks: vec![disk("root"), disk("data")], interval: "1s".into(), ..Default::default() };
    let mut scene = Scene::open(Pair::new(&bed, options)?)?;
    let mut dice = Dice::new(seed);
    let mut done = Vec::new();
    for (n, &(step, fault)) in cells.iter().enumerate() {
        let context = || format!("cell {n}: {step:?} × {fault:?}, seed {seed}");
        let began = Instant::now();
        let cell = (|| {
            let (mut attempt, hit) = scene.reach(step, &format!("c{n}")).context("on the way to the step")?;
            scene.inject(&mut attempt, fault).context("the fault")?;
            scene.endure(step, fault, &mut dice).context("while it is broken")?;
            scene.repair().context("the repair")?;
            let outcome = scene.resolve(attempt, fault).context("after the repair")?;
            let seconds = began.elapsed().as_secs_f64();
            anyhow::Ok(Cell { step, fault, hit, outcome, seconds })
        })();
        let cell = cell.with_context(context)?;
        println!("{n:>3}  {cell}");
        done.push(cell);
    }
    scene.close()?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_the_same_for_the_same_seed_and_repeats_neither_step_nor_fault() {
        let cells = sample(5, 3);
        assert_eq!(cells.len(), 5);
        assert_eq!(cells, sample(5, 3));
        for (i, a) in cells.iter().enumerate() {
            assert!(cells[i + 1..].iter().all(|b| a.0 != b.0 && a.1 != b.1));
        }
        assert_eq!(all().len(), 63);
    }
}
