//! Samples of what `make soak` runs in full, with fixed seeds.

use watari_e2e::storms;

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
    anyhow::ensure!(tally.moves == 2 && tally.cuts_of_the_link == 1 && tally.blocks_right > 200);
    Ok(())
}
