//! `kubectl watari`: parses the command line and prints; see [`watari_operator::kubectl`].

use std::{io::Write, process::ExitCode};

use clap::Parser;
use watari_operator::kubectl::{
    self, Outcome,
    cli::{Cli, EXIT_FAILED, EXIT_NOT_WELL},
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error),
    };
    let mut out = std::io::stdout().lock();
    match runtime.block_on(kubectl::run(&cli, &mut out)).and_then(|outcome| Ok(out.flush().map(|()| outcome)?)) {
        Ok(Outcome::Well) => ExitCode::SUCCESS,
        Ok(Outcome::NotWell) => ExitCode::from(EXIT_NOT_WELL),
        Err(error) => failed(&error),
    }
}

fn failed(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::from(EXIT_FAILED)
}
