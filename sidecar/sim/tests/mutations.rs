//! The proof can fail: a sample of the deliberate errors in [`watari_sim::mutations`]. `watari-sim mutate` tries all of them.

use std::path::Path;

use watari_sim::mutations::{self, MUTATIONS, REDUNDANT};

/// Three rules in three parts of the core, each caught within some histories.
const SAMPLE: [&str; 3] = [
    "a write is not marked",
    "the void leaves the floor alone",
    "the image is not synced before the manifest says applied",
];

#[test]
fn every_mutation_has_its_place_in_todays_code() {
    mutations::check_places().expect("a mutation follows the code that it changes");
    let known = |name: &str| MUTATIONS.iter().any(|m| m.name == name);
    assert!(REDUNDANT.iter().all(|(name, _)| known(name)) && SAMPLE.iter().all(|name| known(name)));
}

#[test]
fn a_sample_of_deliberate_errors_is_caught() {
    // Kept from run to run, so that what the copy depends on is built once.
    let work = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mutations");
    let verdicts = mutations::run(
        &work,
        |name| SAMPLE.contains(&name),
        0.5,
        |verdict| {
            println!("{} after {}: {:?}", verdict.name, verdict.histories, verdict.caught);
        },
    )
    .expect("the copy builds");
    for verdict in &verdicts {
        assert!(verdict.caught.is_some(), "{} is not caught by {} histories", verdict.name, verdict.histories);
    }
    assert_eq!(verdicts.len(), SAMPLE.len());
}
