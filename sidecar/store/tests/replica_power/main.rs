//! Loss of power of a replica and of a role record, from recorded traces of what was asked of real files.
//!
//! One seeded life of the real engine on a real folder and a real image is recorded, call by call. Then the power fails after
//! every call: what may lie on the medium (any subset of what was not synced, names too, torn at any sector) is put into
//! fresh files, and the real code opens those. What was answered before must be there, byte by byte, and the folder must go on.
//! Each call also fails once with an I/O error, and the power after it.
//!
//! `POWER_SEEDS=<n>` runs so many lives, each prefix in all ways of surviving; without it, six lives are sampled.
//! A failure names seed, call and way.

mod life;
mod trace;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use life::{Knows, Life};
use trace::{Event, Medium, SURVIVALS, Survives, Trace, lay_out};
use watari_core::{slots::SlotFile, storage::sim::SimRng};
use watari_store::folder::Folder;

fn wanted() -> Option<u64> {
    std::env::var("POWER_SEEDS").ok().and_then(|value| value.parse().ok())
}

/// Recover from one image of the medium; panics if something is missing.
fn recover(base: &Path, life: &Life, knows: &Knows, medium: &Medium, survives: Survives, random: &mut SimRng) {
    let root = tempfile::tempdir_in(base).expect("tempdir");
    lay_out(root.path(), &medium.after_power_loss(survives, random));
    life.check(root.path(), knows);
}

/// Where the files lie: memory if there is some, since the order of syncs is what counts here and not their cost.
fn base() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.expect("tempdir")
}

/// Power lost after every `step`-th event of a life; the number of recoveries, and the first words of a failure.
fn lose_power_everywhere(life: &Life, events: &[Event<life::Note>], seed: u64, step: usize) -> Result<usize, String> {
    let base = base();
    let mut random = SimRng(seed ^ 0x5eed);
    let (mut medium, mut knows) = (Medium::with_image(life.first_image()), Knows::default());
    let mut recoveries = 0;
    for (at, event) in events.iter().enumerate() {
        medium.feed(event);
        knows.hear(event);
        let ways: &[Survives] = match (at % step, step) {
            (0, 1) => &SURVIVALS,
            // A sample: torn in most places, the others in turn.
            (0, _) => {
                std::slice::from_ref(&SURVIVALS[if (at / step).is_multiple_of(2) { 0 } else { at / step / 2 % 4 }])
            }
            _ => &[],
        };
        for way in ways {
            let recovered = catch_unwind(AssertUnwindSafe(|| {
                recover(base.path(), life, &knows, &medium, *way, &mut random);
            }));
            recovered.map_err(|panic| {
                let words = panic.downcast_ref::<String>().cloned();
                let words = words.or(panic.downcast_ref::<&str>().map(|w| (*w).to_owned())).unwrap_or_default();
                format!("seed {seed}, power lost after event {at} of {}, {way:?} survives: {words}", events.len())
            })?;
            recoveries += 1;
        }
    }
    Ok(recoveries)
}

#[test]
fn a_replica_whose_power_fails_after_any_call_opens_with_all_that_it_answered() {
    let (seeds, step) = wanted().map_or((6, 2), |seeds| (seeds, 1));
    let (mut recoveries, mut commits) = (0, 0);
    for seed in 1..=seeds {
        let life = Life::live(seed, None);
        recoveries += lose_power_everywhere(&life, &life.events, seed, step).unwrap_or_else(|words| panic!("{words}"));
        commits += life.commits();
    }
    println!("{seeds} lives with {commits} commits, {recoveries} recoveries by the real code");
    let seeds = seeds as usize;
    assert!(commits >= 6 * seeds && recoveries >= 60 * seeds, "{commits} commits, {recoveries} recoveries");
}

#[test]
fn a_replica_whose_medium_fails_at_any_call_asks_it_nothing_more_and_opens_with_all_that_it_answered() {
    let (seeds, step) = wanted().map_or((4, 5), |seeds| (seeds, 1));
    let mut failures = 0;
    for seed in 1..=seeds {
        let calls = Life::live(seed, None).events.iter().filter(|e| !matches!(e, Event::Note(_))).count();
        let base = base();
        let mut random = SimRng(seed);
        for at in (0..calls).step_by(step) {
            let life = Life::live(seed, Some(at));
            let failed = life.events.iter().position(|e| matches!(e, Event::Failed));
            let Some(failed) = failed else { continue };
            failures += 1;
            let (mut medium, mut knows) = (Medium::with_image(life.first_image()), Knows::default());
            for event in &life.events[..=failed] {
                medium.feed(event);
                knows.hear(event);
            }
            let way = SURVIVALS[at / step % SURVIVALS.len()];
            recover(base.path(), &life, &knows, &medium, way, &mut random);
        }
    }
    println!("{failures} I/O errors, each followed by a loss of power");
    assert!(failures > 10, "{failures} failures were met");
}

/// A source's role record: what was answered as durable is what a start reads, or the one that was being written.
#[test]
fn a_role_record_whose_power_fails_after_any_call_is_the_last_one_answered_or_the_next() {
    const MAGIC: [u8; 8] = *b"WATAROLE";
    let base = base();
    let root = tempfile::tempdir_in(base.path()).expect("tempdir");
    let trace = Trace::<u64>::new(None);
    let mut folder = trace::Recorder { real: Folder::open(root.path()).expect("folder"), trace: trace.clone() };
    let payload = |n: u64| vec![n as u8; 100 + n as usize * 7];
    let mut slot = SlotFile::create(&mut folder, "role.rec", MAGIC, 1, &payload(0)).expect("create");
    trace.note(0);
    for n in 1..12 {
        slot.write(&mut folder, &payload(n)).expect("write");
        trace.note(n);
    }
    let mut random = SimRng(7);
    let (mut medium, mut answered, mut recoveries) = (Medium::default(), None, 0);
    for (at, event) in trace.events().iter().enumerate() {
        medium.feed(event);
        if let Event::Note(n) = event {
            answered = Some(*n);
        }
        for way in SURVIVALS.into_iter().cycle().take(12) {
            let root = tempfile::tempdir_in(base.path()).expect("tempdir");
            lay_out(root.path(), &medium.after_power_loss(way, &mut random));
            let folder = Folder::open(&root.path().join("meta")).expect("folder");
            let found = SlotFile::open(&folder, "role.rec", MAGIC, 1).expect("readable");
            let found = found.map(|(_, payload)| u64::from(payload.bytes[0]));
            let next = answered.map_or(0, |n| n + 1);
            assert!(
                found == answered || found == Some(next),
                "power lost after event {at}, {way:?} survives: {answered:?} was answered, {found:?} is read"
            );
            recoveries += 1;
        }
    }
    println!("{recoveries} recoveries of a role record");
}

#[test]
fn the_proof_can_fail() {
    // A medium that answers syncs and does nothing is found out, and so is a folder whose names are never synced.
    let life = Life::live(1, None);
    let without = |lies: fn(&Event<life::Note>) -> bool| {
        let events: Vec<_> = life.events.iter().filter(|e| !lies(e)).cloned().collect();
        lose_power_everywhere(&life, &events, 1, 3)
    };
    let _ = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let (syncs, names) = (without(|e| matches!(e, Event::Synced(_))), without(|e| matches!(e, Event::FolderSynced)));
    let _ = std::panic::take_hook();
    assert!(syncs.is_err() && names.is_err(), "without syncs {syncs:?}, without the folder's {names:?}");
}
