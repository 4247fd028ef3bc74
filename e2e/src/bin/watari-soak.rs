//! `make soak`: the long proofs, on real QEMU, real libvirt and real sidecars. Prints the seed first; a failing run is repeated
//! with it. Ends in a table.

use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Parser;
use watari_e2e::storms::{self, Flood, Pace, Pressure, Tally, matrix};

/// Kill storms, moves in a row, broken handovers.
#[derive(Parser)]
struct Options {
    /// `kill -9` at random instants of source worker, source supervisor and replica; 0 leaves the storm out.
    #[arg(long, default_value_t = 200)]
    kills: u32,
    /// Moves in a row on the QEMU pair, there and back, with cut links in between; 0 leaves them out.
    #[arg(long, default_value_t = 20)]
    moves: u32,
    /// Moves in a row on the libvirt pair; 0 leaves them out.
    #[arg(long, default_value_t = 20)]
    libvirt_moves: u32,
    /// The same with a guest that writes faster than the link, and slow-down; 0 leaves them out.
    #[arg(long, default_value_t = 20)]
    fast_moves: u32,
    /// Handovers without a VM, each broken at a random instant around its seal; 0 leaves them out.
    #[arg(long, default_value_t = 60)]
    handovers: u32,
    /// Broken handovers with a VM: `all` steps × faults, `none`, a number for a sample, or STEP:FAULT,… as the table names
    /// them (`Sealed:LinkCut`).
    #[arg(long, default_value = "all")]
    cells: String,
    /// Minutes of writes faster than the link; 0 leaves them out.
    #[arg(long, default_value_t = 5)]
    flood: u32,
    /// Bytes per second that the guest writes while moving on the QEMU pair.
    #[arg(long, default_value_t = 2_500_000)]
    rate: u64,
    /// Repeats a run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// The lines of the table at the end. A storm that fails does not keep the others from running.
#[derive(Default)]
struct Table {
    lines: Vec<String>,
    failed: usize,
}

impl Table {
    fn run(&mut self, what: String, storm: impl FnOnce() -> anyhow::Result<String>) {
        println!("▸ {what}");
        let began = Instant::now();
        let result = storm().unwrap_or_else(|error| {
            self.failed += 1;
            println!("{error:?}");
            let causes: Vec<String> =
                error.chain().map(|c| c.to_string().lines().next().unwrap_or_default().into()).collect();
            format!("FAILED: {}", causes.join(": "))
        });
        let seconds = began.elapsed().as_secs();
        println!("  {result} ({seconds} s)");
        self.lines.push(format!("| {what} | {result} | {seconds} s |"));
    }
}

fn moved(tally: &Tally) -> String {
    let Tally { moves, cuts_of_the_link, called_off, blocks_right, longest_move_seconds, .. } = tally;
    format!(
        "{moves} moves, {cuts_of_the_link} cut links, {called_off} called off before, the longest move {longest_move_seconds:.1} s, {blocks_right} blocks right, none wrong"
    )
}

fn main() -> anyhow::Result<()> {
    let Options { kills, moves, libvirt_moves, fast_moves, handovers, cells, flood, rate, seed } = Options::parse();
    println!("seed {seed}");
    let cells = cells_of(&cells, seed)?;
    let mut table = Table::default();
    if kills > 0 {
        table.run(format!("{kills} × kill -9"), || {
            let tally = storms::kills(kills, seed, 10)?;
            let Tally { source_workers, source_supervisors, replicas, comparisons, blocks_right, .. } = tally;
            Ok(format!(
                "{source_workers} source workers, {source_supervisors} source supervisors, {replicas} at the replica; {comparisons} \
                 comparisons byte for byte; {blocks_right} blocks right, none wrong"
            ))
        });
    }
    if moves > 0 {
        table.run(format!("{moves} moves, QEMU"), || Ok(moved(&storms::moves(moves, seed, rate)?)));
    }
    if libvirt_moves > 0 {
        let storm = || Ok(moved(&storms::libvirt_moves(libvirt_moves, seed, Pace::Modest)?));
        table.run(format!("{libvirt_moves} moves, libvirt"), storm);
    }
    if fast_moves > 0 {
        let storm = || Ok(moved(&storms::libvirt_moves(fast_moves, seed, Pace::FasterThanTheLink)?));
        table.run(format!("{fast_moves} moves, libvirt, guest faster than the link"), storm);
    }
    if handovers > 0 {
        table.run(format!("{handovers} handovers broken around the seal"), || {
            let Tally { moves, source_workers, replicas, cuts_of_the_link, .. } = storms::handovers(handovers, seed)?;
            Ok(format!(
                "{moves} ended at the target: {source_workers} source and {replicas} target workers killed, {cuts_of_the_link} cut links"
            ))
        });
    }
    if !cells.is_empty() {
        table.run(format!("{} cells of step × fault", cells.len()), || {
            let done = matrix::run(&cells, seed)?;
            let hit = done.iter().filter(|cell| cell.hit).count();
            let mut outcomes = std::collections::BTreeMap::new();
            done.iter().for_each(|cell| *outcomes.entry(format!("{:?}", cell.outcome)).or_insert(0) += 1);
            Ok(format!("{hit} hit their step; {outcomes:?}"))
        });
    }
    if flood > 0 {
        table.run(format!("{flood} minutes of writes faster than the link"), || {
            let Flood { windows, idle, flooded, churn, commit_seconds, converge_seconds } =
                storms::flood(Pressure::minutes(flood))?;
            let least = windows.iter().map(|w| w.durable_bytes).min().unwrap_or(0) >> 20;
            let resident = windows.iter().map(|w| w.resident_bytes).max().unwrap_or(0) >> 20;
            let churn = churn.unwrap_or_else(|| "no generation was given up".into());
            Ok(format!(
                "each minute at least {least} MiB newly durable; at most {resident} MiB resident; latency p50/p99 {:.2}/{:.2} ms, idle \
                 {:.2}/{:.2} ms; committed {commit_seconds:.0} s after the writer's end; slowed down it converged in \
                 {converge_seconds:.0} s; {churn}",
                flooded.p50, flooded.p99, idle.p50, idle.p99
            ))
        });
    }
    println!("\n| storm | result | time |\n| --- | --- | --- |\n{}", table.lines.join("\n"));
    ensure!(table.failed == 0, "{} of {} storms failed", table.failed, table.lines.len());
    Ok(())
}

/// What `--cells` names.
fn cells_of(text: &str, seed: u64) -> anyhow::Result<Vec<(matrix::Step, matrix::Fault)>> {
    match text {
        "all" => Ok(matrix::all()),
        "none" => Ok(Vec::new()),
        text => match text.parse() {
            Ok(count) => Ok(matrix::sample(count, seed)),
            Err(_) => text.split(',').map(cell).collect(),
        },
    }
}

fn cell(text: &str) -> anyhow::Result<(matrix::Step, matrix::Fault)> {
    let found = matrix::all().into_iter().find(|(step, fault)| format!("{step:?}:{fault:?}") == text);
    found.with_context(|| {
        format!("{text}: no such step and fault; known are {:?} and {:?}", matrix::STEPS, matrix::FAULTS)
    })
}
