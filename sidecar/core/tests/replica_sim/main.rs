//! The replica on a medium whose power fails at every write and sync.
//!
//! A failing run prints its seed; `REPLICA_SEED=<n> cargo test -p watari-core --test replica_sim` replays that one, `REPLICA_SEEDS=<n>`
//! runs so many random histories.

mod harness;

use harness::{Harness, Setup, Step};
use std::panic::{AssertUnwindSafe, catch_unwind};
use watari_core::{
    geometry::Extent,
    replica::{JournalLimits, Policy, Thin},
    storage::sim::{SimRng, Survival},
};

const SURVIVALS: [Survival; 4] = [Survival::Nothing, Survival::Everything, Survival::Writes, Survival::Sectors];

fn write(disk: usize, start: u64, blocks: u32) -> Step {
    Step::Write { disk, extents: vec![Extent::new(start, blocks)], compress: start.is_multiple_of(2) }
}

/// Everything the engine does, once: staging, commits, application in small steps, thinning, roll-back.
fn script() -> Vec<Step> {
    use Step::*;
    let mut steps = vec![
        write(0, 0, 6),
        write(1, 14, 3),
        Sync,
        write(0, 3, 4),
        Zero { disk: 0, extent: Extent::new(8, 4) },
        Sync,
        Commit,
        Apply { blocks: 2 },
        write(0, 2, 5),
        Sync,
        ApplyAll,
        Share,
        write(1, 0, 4),
        Commit,
        Apply { blocks: 2 },
        Apply { blocks: 0 },
        Apply { blocks: 1 },
        write(1, 2, 6),
        Session,
        Commit,
        Restart,
        ApplyAll,
        Zero { disk: 1, extent: Extent::new(3, 2) },
        Same { disk: 0, extent: Extent::new(10, 3) },
        Commit,
        ApplyAll,
        write(0, 0, 2),
        Commit,
        write(0, 1, 2),
        Commit,
        Share,
        ApplyAll,
        Retain,
    ];
    steps.extend([write(0, 20, 4), Commit, Apply { blocks: 4 }, Promote { back: 2 }, ApplyAll, write(0, 5, 3), Commit]);
    steps.extend([RaiseFloor, write(1, 16, 1), Supersede, Commit, ApplyAll, Retain]);
    steps
}

fn run_script(setup: &Setup, seed: u64, power_off_at: Option<u64>, survival: Survival) -> Harness {
    let mut harness = Harness::new(setup.clone(), seed);
    harness.medium.power_off_at(power_off_at);
    for step in script() {
        harness.run(&step, survival);
    }
    harness.finish();
    harness
}

/// Run `body`; on a panic say how to replay it.
fn replayable(what: &str, body: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(body)) {
        eprintln!("failed: {what}");
        std::panic::resume_unwind(panic);
    }
}

fn crash_everywhere(setup: &Setup) -> u64 {
    let start = Harness::new(setup.clone(), 1).medium.operations();
    let operations = run_script(setup, 1, None, Survival::Nothing).medium.operations();
    let mut crashes = 0;
    for at in start + 1..=operations {
        for survival in SURVIVALS {
            replayable(&format!("power lost at operation {at} of {operations}, {survival:?} survives"), || {
                crashes += run_script(setup, at, Some(at), survival).crashes;
            });
        }
    }
    crashes
}

#[test]
fn a_loss_of_power_at_every_operation_harms_no_committed_generation() {
    let crashes = crash_everywhere(&Setup::new(false, 3));
    assert!(crashes > 400, "only {crashes} crash points were reached");
}

#[test]
fn a_loss_of_power_at_every_operation_harms_nothing_in_direct_mode() {
    let crashes = crash_everywhere(&Setup::new(true, 3));
    assert!(crashes > 400, "only {crashes} crash points were reached");
}

#[test]
fn a_loss_of_power_at_every_operation_harms_nothing_without_history() {
    let crashes = crash_everywhere(&Setup::new(false, 1));
    assert!(crashes > 400, "only {crashes} crash points were reached");
}

/// Thinning merges two undo files; of the merged one any part may be lost with the power (seed 9 lost its data, kept its trailer, and
/// the files it was made of were taken away).
#[test]
fn a_loss_of_power_while_undo_files_are_merged_harms_no_kept_generation() {
    let setup = Setup::new(false, 1);
    let whole = run_script(&setup, 1, None, Survival::Nothing);
    let operations = whole.medium.operations();
    for seed in 1..30 {
        for at in operations - 30..=operations {
            for survival in [Survival::Writes, Survival::Sectors] {
                replayable(&format!("seed {seed}, power lost at operation {at} of {operations}, {survival:?}"), || {
                    run_script(&setup, seed, Some(at), survival);
                });
            }
        }
    }
}

/// Histories drawn from one seed each, with several losses of power.
fn random_history(seed: u64) -> (u64, u64) {
    let mut rng = SimRng(seed);
    let mut setup = Setup::new(rng.one_in(2), [1, 2, 4][rng.below(3) as usize]);
    if rng.one_in(2) {
        let thin = vec![Thin { older_than_seconds: 600, every_seconds: 300 }];
        setup.policy = Policy { keep_seconds: 3000, thin, ..setup.policy };
    }
    if rng.one_in(3) {
        setup.capacity = Some(8192 + 60_000 + rng.below(400_000));
    }
    if rng.one_in(3) {
        setup.journal = JournalLimits { segment_bytes_max: 20 << 10, journal_bytes_max: 100 << 10 };
    }
    let mut harness = Harness::new(setup, seed);
    let mut next_crash = rng.below(120);
    for _ in 0..200 {
        if next_crash == 0 {
            let at = harness.medium.operations() + 1 + rng.below(40);
            harness.medium.power_off_at(Some(at));
            next_crash = 10 + rng.below(80);
        }
        next_crash -= 1;
        let survival = SURVIVALS[rng.below(4) as usize];
        if rng.one_in(60) {
            harness.power_cycle(survival);
        }
        let step = Harness::random_step(&mut rng);
        harness.run(&step, survival);
    }
    harness.finish();
    (harness.crashes, harness.commits)
}

#[test]
fn random_histories_with_losses_of_power_keep_every_committed_generation() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seeds = match number("REPLICA_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("REPLICA_SEEDS").unwrap_or(150),
    };
    let (mut crashes, mut commits) = (0, 0);
    let histories = seeds.end - seeds.start;
    for seed in seeds {
        replayable(&format!("REPLICA_SEED={seed}"), || {
            let (more_crashes, more_commits) = random_history(seed);
            crashes += more_crashes;
            commits += more_commits;
        });
    }
    eprintln!("{histories} histories, {crashes} losses of power, {commits} commits");
    assert!(histories < 10 || (crashes > histories && commits > histories), "{crashes} crashes, {commits} commits");
}

#[test]
fn a_disk_that_lies_about_syncs_is_found_by_these_tests() {
    let caught = (0..10).filter(|seed| {
        catch_unwind(AssertUnwindSafe(|| {
            let mut harness = Harness::new(Setup::new(false, 3), *seed);
            harness.medium.lie();
            for step in script().into_iter().take(20) {
                harness.run(&step, Survival::Nothing);
            }
            harness.power_cycle(Survival::Nothing);
        }))
        .is_err()
    });
    assert_eq!(caught.count(), 10, "the harness cannot fail, so it proves nothing");
}
