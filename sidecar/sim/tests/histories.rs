//! Short budget of the deterministic simulator; `watari-sim soak` goes on. A failing seed prints the command that
//! replays it.

#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeSet,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use watari_sim::{coverage::REQUIRED, history};

/// Wall clock that histories take, whatever the machine: `make soak` is where many are run.
const BUDGET: Duration = Duration::from_secs(20);
/// And the most that they may take, until everything that must be reached was.
const BUDGET_MAX: Duration = Duration::from_secs(240);
/// Seeds that reach what hardly one history in ten thousand does, run first: without them the budget is used up on most machines.
/// A change of the simulator's dice may take that from them; then the test says what is not reached, and a soak finds others.
const RARE: [u64; 1] = [1_013_059];
/// Seeds that failed once and still draw the same events, run first too.
/// 2005698: a person reclaimed a sealed source after its grant; the target's late activation, in a lower epoch, was called a planned move.
/// 7000295: a folder was restored from an old copy, and what the images held beyond it was vouched for before it was synced.
/// 10080485: a fenced side that restarted opened what a loss of power had left of its removed replica.
/// 30000071: a side that wrote without a log sealed for a take-over, since its record never said that it had lost track.
const REGRESSIONS: [u64; 4] = [2_005_698, 7_000_295, 10_080_485, 30_000_071];

#[test]
fn random_histories_keep_every_invariant_and_come_to_rest() {
    let (seeds, first) = (AtomicU64::new(1_000_000), Mutex::new([&RARE[..], &REGRESSIONS].concat()));
    let total = Mutex::new(history::Outcome::default());
    let failed = Mutex::new(Vec::new());
    let (ran, began) = (AtomicU64::new(0), Instant::now());
    std::panic::set_hook(Box::new(|_| {}));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let more = || {
                    let reached = || total.lock().unwrap().coverage.missing(REQUIRED).is_empty();
                    began.elapsed() < BUDGET || began.elapsed() < BUDGET_MAX && !reached()
                };
                while more() && failed.lock().unwrap().is_empty() {
                    let seed = first.lock().unwrap().pop().unwrap_or_else(|| seeds.fetch_add(1, SeqCst));
                    match history::attempt(seed, &BTreeSet::new()) {
                        Ok(outcome) => {
                            assert!(outcome.events >= 200, "seed {seed} is too short: {} events", outcome.events);
                            let mut total = total.lock().unwrap();
                            total.coverage.add(&outcome.coverage);
                            (total.events, total.faults) =
                                (total.events + outcome.events, total.faults + outcome.faults);
                        }
                        Err(what) => failed.lock().unwrap().push(history::shrink(seed, &what, 100)),
                    }
                    ran.fetch_add(1, SeqCst);
                }
            });
        }
    });
    let _ = std::panic::take_hook();
    let total = total.into_inner().unwrap();
    let (ran, seconds) = (ran.into_inner(), began.elapsed().as_secs_f64());
    println!("{ran} histories, {} events, {} faults in {seconds:.0} s", total.events, total.faults);
    if let Some(failure) = failed.into_inner().unwrap().first() {
        panic!("{}\nreplay: {}", failure.what, failure.command());
    }
    let missing = total.coverage.missing(REQUIRED);
    assert!(missing.is_empty(), "never reached: {missing:#?}\n{}", total.coverage.table());
}

#[test]
fn a_seed_is_one_history() {
    let none = BTreeSet::new();
    let (a, b) = (history::run(4, &none, false), history::run(4, &none, false));
    assert_eq!(a.coverage.table(), b.coverage.table());
    assert_eq!(a.events, b.events);
}

#[test]
fn ranges_are_read_as_they_are_written() {
    let set = BTreeSet::from([1, 2, 3, 7, 9, 10]);
    assert_eq!(history::ranges(&set), "1-3,7,9-10");
    assert_eq!(history::parse_ranges("1-3,7,9-10"), set);
}
