//! Judges raw disk images that the test guest wrote to.
//!
//! ```text
//! watari-image-check [--acknowledged 1200,150] disk0.img disk1.img
//! ```
//! Prints one JSON object per run found, newest first. Exit code 0: all clean; 1: something is wrong; 2: cannot tell.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use watari_guest::check::Tally;

#[derive(Parser)]
#[command(about = "Judges raw disk images that the test guest wrote to")]
struct Arguments {
    /// Per stream, how many operations the guest says were acknowledged. Without it the images need only be one point in time.
    #[arg(long, value_delimiter = ',')]
    acknowledged: Option<Vec<u64>>,
    /// All raw disks of the guest, in order.
    #[arg(required = true)]
    images: Vec<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match watari_e2e::image::check(&arguments.images, arguments.acknowledged.as_deref()) {
        Err(error) => {
            eprintln!("watari-image-check: {error}");
            ExitCode::from(2)
        }
        Ok(tallies) if tallies.is_empty() => {
            eprintln!("watari-image-check: no block of the test guest is on these images");
            ExitCode::from(2)
        }
        Ok(tallies) => {
            for tally in &tallies {
                println!("{}", serde_json::to_string(tally).expect("plain data"));
            }
            if tallies.iter().all(Tally::clean) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
    }
}
