//! Samples of what `make soak` runs in full, with fixed seeds.

use watari_e2e::storms::{self, matrix};

#[test]
fn kill_9_of_worker_supervisor_and_replica_costs_no_acknowledged_write_and_no_mark() -> anyhow::Result<()> {
    let tally = storms::kills(8, 7, 4)?;
    println!("{tally:?}");
    anyhow::ensure!(tally.comparisons == 2 && tally.blocks_right > 200);
    Ok(())
}

#[test]
fn moves_in_a_row_with_a_cut_link_in_between_lose_nothing() -> anyhow::Result<()> {
    let tally = storms::moves(3, 3, 2_000_000)?;
    println!("{tally:?}");
    anyhow::ensure!(tally.moves == 3 && tally.cuts_of_the_link == 1);
    Ok(())
}

#[test]
fn a_handover_broken_around_its_seal_ends_with_exactly_the_target_serving_everything_acknowledged() -> anyhow::Result<()>
{
    let tally = storms::handovers(6, 5)?;
    println!("{tally:?}");
    anyhow::ensure!(tally.moves == 6);
    Ok(())
}

#[test]
fn a_writing_vm_under_libvirt_crosses_there_and_back_with_its_deltas_through_a_cut_link() -> anyhow::Result<()> {
    let tally = storms::libvirt_moves(2, 11, storms::Pace::Modest)?;
    println!("{tally:?}");
    anyhow::ensure!(
        tally.moves == 2 && tally.cuts_of_the_link == 1 && tally.called_off == 1 && tally.blocks_right > 200
    );
    Ok(())
}

#[test]
fn a_handover_broken_at_a_step_ends_with_one_side_that_runs_with_everything_acknowledged() -> anyhow::Result<()> {
    let cells = matrix::run(&matrix::sample(5, 3), 3)?;
    // A busy machine may be late for a step that is over in an instant; not for most of them.
    anyhow::ensure!(cells.len() == 5 && cells.iter().filter(|cell| cell.hit).count() >= 3, "{cells:?}");
    Ok(())
}

#[test]
fn writes_faster_than_the_link_cost_neither_progress_nor_memory_and_slowed_down_they_let_a_move_converge()
-> anyhow::Result<()> {
    let flood = storms::flood(storms::Pressure::sample())?;
    println!("{flood:?}");
    anyhow::ensure!(flood.windows.len() == 3);
    Ok(())
}
