//! Two sidecars without a VM: what can be seen with NBD clients and the command line alone.

use std::time::Duration;

use anyhow::ensure;
use watari_e2e::{
    nbd::qemu_io as io,
    pair::{Pair, PairOptions},
    site::TestBed,
    wan::Shape,
};

const WAIT: Duration = Duration::from_secs(60);

fn pair(bed: &TestBed) -> anyhow::Result<Pair<'_>> {
    let mut pair = Pair::new(bed, PairOptions { interval: "300ms".into(), ..PairOptions::default() })?;
    pair.start(1, "replica")?;
    pair.start(0, "primary")?;
    pair.cut(0)?;
    Ok(pair)
}

#[test]
fn a_kept_generation_is_read_over_nbd_while_newer_ones_arrive() -> anyhow::Result<()> {
    let bed = TestBed::new("kept", Shape::wan(1_000_000_000, Duration::from_millis(2)))?;
    let pair = pair(&bed)?;
    let root = pair.socket(0, "root");
    io(&root, "root", &["write -P 1 0 4M", "flush"])?;
    pair.cut(0)?;
    let first = pair.report(0)?.generations.committed;
    io(&root, "root", &["write -P 2 1M 1M", "discard 3M 512k", "flush"])?;
    pair.cut(0)?;
    let kept = pair.socket(1, "generations");
    io(&kept, &format!("root@{first}"), &["read -P 1 0 4M"])?;
    io(&kept, "root@latest", &["read -P 1 0 1M", "read -P 2 1M 1M", "read -P 0 3M 512k"])?;
    ensure!(io(&kept, "root@latest", &["write 0 4k"]).is_err(), "a kept generation is read-only");
    ensure!(io(&kept, "root@99999", &["read 0 4k"]).is_err(), "one that does not exist is refused");
    Ok(())
}

#[test]
fn an_idle_pair_makes_no_generations_and_its_lag_stays_small() -> anyhow::Result<()> {
    let bed = TestBed::new("idle", Shape::wan(1_000_000_000, Duration::from_millis(2)))?;
    let pair = pair(&bed)?;
    std::thread::sleep(Duration::from_secs(1));
    let before = pair.report(0)?;
    std::thread::sleep(Duration::from_secs(3));
    let after = pair.report(0)?;
    ensure!(before.generations.committed == after.generations.committed, "{before:?}\n{after:?}");
    ensure!(after.generations.lag_seconds < 1.5, "{after:?}");
    Ok(())
}

#[test]
fn a_returning_source_is_fenced_before_it_serves_and_comes_back_with_consent() -> anyhow::Result<()> {
    let bed = TestBed::new("return", Shape::wan(1_000_000_000, Duration::from_millis(2)))?;
    let mut pair = pair(&bed)?;
    io(&pair.socket(0, "root"), "root", &["write -P 5 0 1M", "flush"])?;
    pair.cut(0)?;
    pair.release(0)?;
    // Nobody is there to ask: the replica is promoted alone, and goes on as a primary.
    pair.ctl(1, &["promote"])?;
    pair.release(1)?;
    pair.start(1, "primary")?;
    pair.wait(1, "the promoted side to serve", WAIT, |r| r.role == "Serving" && r.epoch > 1)?;
    std::thread::sleep(Duration::from_secs(6));
    io(&pair.socket(1, "root"), "root", &["read -P 5 0 1M", "write -P 6 0 64k", "flush"])?;
    // A fresh boot of the old side asks the peer first, and never serves.
    pair.start(0, "primary")?;
    pair.wait(0, "the old side to be fenced", WAIT, |r| r.role == "Fenced")?;
    ensure!(io(&pair.socket(0, "root"), "root", &["write 0 4k"]).is_err(), "a fenced side serves nothing");
    pair.ctl(0, &["accept-divergence"])?;
    pair.wait(0, "the old side to be a replica", WAIT, |r| r.role == "Replica")?;
    pair.wait(1, "the link", WAIT, |r| r.link.connected)?;
    pair.cut(1)?;
    io(&pair.socket(0, "generations"), "root@latest", &["read -P 6 0 64k", "read -P 5 64k 900k"])?;
    Ok(())
}

#[test]
fn a_handover_that_is_voided_leaves_the_source_serving_and_replicating() -> anyhow::Result<()> {
    let bed = TestBed::new("void", Shape::wan(1_000_000_000, Duration::from_millis(2)))?;
    let mut pair = pair(&bed)?;
    pair.ctl(0, &["open-handover", "--vmi-uid", "u1"])?;
    pair.wait(1, "the offer", WAIT, |r| r.attachable)?;
    pair.ctl(1, &["void"])?;
    let report = pair.wait(0, "the source to serve on", WAIT, |r| r.role == "Serving")?;
    ensure!(report.epoch == 3, "{report:?}");
    io(&pair.socket(0, "root"), "root", &["write -P 9 0 1M", "flush"])?;
    pair.cut(0)?;
    io(&pair.socket(1, "generations"), "root@latest", &["read -P 9 0 1M"])?;
    Ok(())
}

#[test]
fn a_thin_link_that_is_cut_again_and_again_converges_and_sends_little_twice() -> anyhow::Result<()> {
    use std::os::unix::fs::FileExt;
    const CUT_BYTES_MAX: u64 = 4 << 20;
    let bed = TestBed::new("thin", Shape::wan(5_000_000, Duration::from_millis(300)))?;
    let mut pair = Pair::new(&bed, PairOptions { interval: "1s".into(), ..PairOptions::default() })?;
    // What no compression makes smaller: 12 MiB take about 20 s.
    let mut x = 88_172_645_463_325_252u64;
    let noise: Vec<u8> = (0..(12 << 20) / 8)
        .flat_map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x.to_le_bytes()
        })
        .collect();
    std::fs::File::options().write(true).open(pair.image(0, 0))?.write_all_at(&noise, 0)?;
    pair.start(1, "replica")?;
    pair.start(0, "primary")?;
    let mut cuts = 0;
    while pair.report(0)?.generations.committed_number == 0 {
        std::thread::sleep(Duration::from_secs(8));
        if pair.report(0)?.generations.committed_number > 0 {
            break;
        }
        bed.wan.link_down()?;
        // TCP outlives a short cut; the second one is longer than the stream's patience, so that it begins anew.
        std::thread::sleep(Duration::from_secs(if cuts == 1 { 18 } else { 2 }));
        bed.wan.restore()?;
        cuts += 1;
        ensure!(cuts < 15, "it does not converge: {:?}", pair.report(0)?);
    }
    let sent = pair.report(0)?.transfer;
    println!("{cuts} cuts, {} bytes a second time, {} in all", sent.resent_bytes, sent.wire_bytes);
    ensure!(cuts >= 2 && sent.resent_bytes <= CUT_BYTES_MAX * cuts, "{cuts} cuts: {sent:?}");
    pair.cut(0)?;
    io(&pair.socket(1, "generations"), "root@latest", &["read 0 12M"])?;
    Ok(())
}

#[test]
fn two_sites_that_see_only_each_others_gateway_pair_and_go_on_after_it_was_replaced() -> anyhow::Result<()> {
    let bed = TestBed::new("gateway", Shape::wan(1_000_000_000, Duration::from_millis(2)))?;
    let options = PairOptions { interval: "300ms".into(), gateways: true, ..PairOptions::default() };
    let mut pair = Pair::new(&bed, options)?;
    pair.start(1, "replica")?;
    pair.start(0, "primary")?;
    io(&pair.socket(0, "root"), "root", &["write -P 3 0 8M", "flush"])?;
    pair.cut(0)?;
    pair.replace_gateway(1)?;
    io(&pair.socket(0, "root"), "root", &["write -P 4 1M 1M", "flush"])?;
    pair.cut(0)?;
    io(&pair.socket(1, "generations"), "root@latest", &["read -P 3 0 1M", "read -P 4 1M 1M", "read -P 3 2M 6M"])?;
    Ok(())
}
