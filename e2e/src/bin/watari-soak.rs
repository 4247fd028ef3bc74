//! `make soak`: the long proofs, on real QEMU and real sidecars. Prints the seed first; a failing run is repeated with it.

use clap::Parser;
use watari_e2e::storms;

/// Kill storms, broken handovers and moves in a row.
#[derive(Parser)]
struct Options {
    /// `kill -9` at random instants of source worker, source supervisor and replica; 0 leaves the storm out.
    #[arg(long, default_value_t = 200)]
    kills: u32,
    /// Moves in a row, there and back, with cut links in between; 0 leaves them out.
    #[arg(long, default_value_t = 20)]
    moves: u32,
    /// Handovers, each broken at a random instant around its seal; 0 leaves them out.
    #[arg(long, default_value_t = 60)]
    handovers: u32,
    /// Bytes per second that the guest writes while moving.
    #[arg(long, default_value_t = 2_500_000)]
    rate: u64,
    /// Repeats a run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> anyhow::Result<()> {
    let Options { kills, moves, handovers, rate, seed } = Options::parse();
    println!("seed {seed}");
    if kills > 0 {
        println!("{kills} kills: {:?}", storms::kills(kills, seed, 10)?);
    }
    if handovers > 0 {
        println!("{handovers} broken handovers: {:?}", storms::handovers(handovers, seed)?);
    }
    if moves > 0 {
        println!("{moves} moves: {:?}", storms::moves(moves, seed, rate)?);
    }
    Ok(())
}
