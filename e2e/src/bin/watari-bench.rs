//! `make bench`: every figure beside its peers, in one run. Progress goes to standard error, the table to standard output.

use std::process::ExitCode;

use clap::Parser;
use watari_e2e::{
    bench::{self, Effort, runner},
    netns,
};

/// Measure Watari beside its peers: one Markdown table, docs/BENCHMARKS.md, and one plot for each figure.
#[derive(Parser)]
struct Options {
    /// Only these figures, such as F3,F5; the document keeps what earlier runs found of the others.
    #[arg(long, value_delimiter = ',', value_name = "FIGURES")]
    only: Vec<String>,
    /// A smoke run: everything small and once. Its figures mean nothing, and docs/ is left alone.
    #[arg(long)]
    quick: bool,
    /// F1-hour too, where a full copy takes about an hour (20 GB of free space, about 70 minutes).
    #[arg(long)]
    one_hour: bool,
    /// How long the full copy of F1-hour takes; its disk has the size for it.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=600))]
    minutes: u64,
    /// Say which figures there are, and end.
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let figures = bench::all();
    if options.list {
        figures.iter().for_each(|figure| println!("{:<4} {}: {}", figure.id(), figure.title(), figure.target()));
        return ExitCode::SUCCESS;
    }
    if let Some(unknown) = options.only.iter().find(|id| figures.iter().all(|figure| figure.id() != **id)) {
        let known: Vec<&str> = figures.iter().map(|figure| figure.id()).collect();
        eprintln!("there is no figure {unknown} (there are: {})", known.join(", "));
        return ExitCode::from(2);
    }
    if cfg!(debug_assertions) {
        eprintln!("figures of a debug build mean nothing: run `make bench`, or cargo with --release");
        return ExitCode::from(2);
    }
    if let Err(error) = netns::require_root() {
        eprintln!("{error}");
        return ExitCode::from(2);
    }
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("WATARI_E2E_PROFILE", "release") };
    let effort = Effort { quick: options.quick, copy_minutes: options.minutes };
    match runner::run(&figures, &runner::Plan { effort, only: options.only, everything: options.one_hour }) {
        Ok((table, failed)) => {
            println!("{table}");
            failed.iter().for_each(|failure| eprintln!("could not be measured: {failure}"));
            if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
