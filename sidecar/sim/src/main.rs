//! `watari-sim soak` runs histories for as long as it is told, `watari-sim replay` shows one.

use std::{
    cell::Cell,
    collections::BTreeSet,
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use clap::{Parser, Subcommand};
use watari_sim::{
    history::{self, Outcome},
    mutations,
};

#[derive(Parser)]
#[command(about = "Deterministic simulation of two Watari sites")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Histories one after the other, until the seeds or the minutes are used up or one fails.
    Soak {
        /// How many seeds.
        #[arg(long, default_value_t = u64::MAX)]
        seeds: u64,
        /// The first seed.
        #[arg(long, default_value_t = 0)]
        first: u64,
        /// How long, minutes.
        #[arg(long, default_value_t = 5.0)]
        minutes: f64,
        #[arg(long, default_value_t = 2)]
        threads: usize,
        /// Stop after so many failures.
        #[arg(long, default_value_t = 1)]
        failures: usize,
        /// Runs that shrinking a failure may take.
        #[arg(long, default_value_t = 150)]
        tries: u32,
    },
    /// Deliberate errors in a copy of the core, each of which must be caught.
    Mutate {
        /// Only those whose name contains this.
        #[arg(long, default_value = "")]
        only: String,
        /// Histories for at most so many minutes each.
        #[arg(long, default_value_t = 0.5)]
        minutes: f64,
    },
    /// One history, with everything that happened if it fails.
    Replay {
        #[arg(long)]
        seed: u64,
        /// Events to leave out, as `1-3,7`.
        #[arg(long, default_value = "")]
        without: String,
        /// Shrink it first.
        #[arg(long)]
        shrink: bool,
    },
}

thread_local! {
    /// The history that this thread runs.
    static SEED: Cell<u64> = const { Cell::new(0) };
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Soak { seeds, first, minutes, threads, failures, tries } => {
            soak(first, seeds, minutes, threads, failures, tries)
        }
        Command::Mutate { only, minutes } => mutate(&only, minutes),
        Command::Replay { seed, without, shrink } => replay(seed, &history::parse_ranges(&without), shrink),
    }
}

fn mutate(only: &str, minutes: f64) -> ExitCode {
    let told = |v: &mutations::Verdict| {
        let why = mutations::REDUNDANT.iter().find(|(name, _)| *name == v.name);
        let survived = why.map_or_else(|| "SURVIVED".to_owned(), |(_, why)| format!("redundant: {why}"));
        let by = v.caught.clone().unwrap_or(survived);
        println!("{:<62} {:>6}  {by}", v.name, v.histories);
    };
    println!("{:<62} {:>6}  caught by", "mutation", "after");
    let work = std::env::temp_dir().join(format!("watari-mutations-{}", std::process::id()));
    let verdicts = mutations::run(&work, |name| name.contains(only), minutes, told);
    let _ = std::fs::remove_dir_all(&work);
    match verdicts {
        Ok(verdicts) => {
            let excused = |name: &str| mutations::REDUNDANT.iter().any(|(n, _)| *n == name);
            let survived = verdicts.iter().filter(|v| v.caught.is_none() && !excused(v.name)).count();
            println!("{} mutations, {survived} survived", verdicts.len());
            if survived == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn replay(seed: u64, without: &BTreeSet<u64>, shrink: bool) -> ExitCode {
    if shrink {
        std::panic::set_hook(Box::new(|_| {}));
        let Err(what) = history::attempt(seed, without) else { return ExitCode::SUCCESS };
        let failure = history::shrink(seed, &what, 2000);
        println!("{}\n{}", failure.what, failure.command());
        return ExitCode::FAILURE;
    }
    let Outcome { coverage, events, faults } = history::run(seed, without, true);
    println!("{}seed {seed}: {events} events, {faults} faults, no violation", coverage.table());
    ExitCode::SUCCESS
}

fn soak(first: u64, seeds: u64, minutes: f64, threads: usize, failures: usize, tries: u32) -> ExitCode {
    // Where a panic aborts (release) it cannot be caught and shrunk: the hook says what is needed before the end.
    std::panic::set_hook(Box::new(|panic| {
        if cfg!(panic = "abort") {
            let seed = SEED.with(Cell::get);
            eprintln!(
                "seed {seed} FAILED: {panic}\n  cargo run --profile soak -p watari-sim -- replay --seed {seed} --shrink"
            );
        }
    }));
    let (next, ran, events) = (AtomicU64::new(first), AtomicU64::new(0), AtomicU64::new(0));
    let total = Mutex::new(Outcome::default());
    let failed = Mutex::new(Vec::new());
    let stop = AtomicBool::new(false);
    let end = Instant::now() + Duration::from_secs_f64(minutes * 60.0);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut mine = Outcome::default();
                while !stop.load(SeqCst) && Instant::now() < end {
                    let seed = next.fetch_add(1, SeqCst);
                    if seed - first >= seeds {
                        break;
                    }
                    SEED.with(|s| s.set(seed));
                    match history::attempt(seed, &BTreeSet::new()) {
                        Ok(outcome) => {
                            mine.coverage.add(&outcome.coverage);
                            mine.faults += outcome.faults;
                            events.fetch_add(outcome.events, SeqCst);
                        }
                        Err(what) => {
                            let failure = history::shrink(seed, &what, tries);
                            println!("seed {seed} FAILED: {}\n  {}", failure.what, failure.command());
                            let mut failed = failed.lock().expect("no thread panics with it");
                            failed.push(failure);
                            stop.fetch_or(failed.len() >= failures, SeqCst);
                        }
                    }
                    ran.fetch_add(1, SeqCst);
                }
                let mut total = total.lock().expect("no thread panics with it");
                total.coverage.add(&mine.coverage);
                total.faults += mine.faults;
            });
        }
    });
    let total = total.into_inner().expect("no thread panics with it");
    let (ran, seconds) = (ran.into_inner(), began.elapsed().as_secs_f64());
    print!("{}", total.coverage.table());
    println!(
        "{ran} histories, {} events, {} faults in {seconds:.1} s ({:.0} histories/s), {} violations",
        events.into_inner(),
        total.faults,
        ran as f64 / seconds,
        failed.lock().map_or(0, |f| f.len())
    );
    if failed.into_inner().is_ok_and(|f| f.is_empty()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
