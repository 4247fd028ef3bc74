//! F5: bytes on the wire for bytes changed, at the level of IP packets, with everything that TCP, TLS and the protocol add.

use std::{path::Path, process::Command};

use anyhow::{Context, ensure};

use super::{
    Effort, Figure, Outcome,
    fio::Job,
    load::{self, GIB, KIB, MIB},
    measure::{Bound, Judged, Row, Unit},
    peers,
    plot::Plot,
    runner::say,
};
use crate::{
    pair::{DiskSpec, Pair, PairOptions},
    site::TestBed,
    wan::{Shape, Wan},
};

pub struct Wire;

const DISK_BYTES: u64 = 8 * GIB;
/// Links, bits per second. How hard is compressed depends on the link: what a fast one would wait for, a usual one gains by.
const FAST: u64 = 1_000_000_000;
const USUAL: u64 = 100_000_000;
/// A tree of real files: programs, libraries, texts, pictures, archives.
const REAL: &str = "/usr/share";

impl Figure for Wire {
    fn id(&self) -> &'static str {
        "F5"
    }
    fn title(&self) -> &'static str {
        "bytes on the wire"
    }
    fn target(&self) -> &'static str {
        "random 4 KiB writes of incompressible data over 8 GiB: bytes on the wire / bytes changed ≤ 1.05; mixed real data \
         at least 3 × smaller than raw."
    }
    fn method(&self) -> &'static str {
        "The emulated WAN (1 Gbit/s, 10 ms, MTU 1500) counts bytes of IP packets, headers included, in both directions. \
         Changed: distinct 4 KiB blocks, each once. Real data: an ext4 image of this machine's own files, first \
         synchronisation over 100 Mbit/s, against the bytes that are allocated in it; beside `rsync -z` on the same image."
    }

    fn run(&self, effort: Effort) -> anyhow::Result<Outcome> {
        let mut rows = changed(effort)?;
        rows.extend(real(effort)?);
        Ok(Outcome { rows, notes: Vec::new(), plot: Plot::Rows })
    }
}

fn bed(label: &str, rate: u64) -> anyhow::Result<TestBed> {
    Ok(TestBed::new(label, Shape::wan(rate, std::time::Duration::from_millis(10)))?)
}

fn both_ways(wan: &Wan) -> (f64, f64) {
    let report = wan.report();
    (report.a_to_b.counters.delivered_bytes as f64, report.b_to_a.counters.delivered_bytes as f64)
}

fn changed(effort: Effort) -> anyhow::Result<Vec<Row>> {
    let bed = bed("f5", FAST)?;
    let disks = vec![DiskSpec { name: "root", bytes: DISK_BYTES }];
    let options = PairOptions { disks, interval: "1h".into(), ..PairOptions::default() };
    let mut pair = Pair::new(&bed, options)?;
    pair.start(1, "replica")?;
    pair.start(0, "primary")?;
    pair.cut(0)?;
    let uri = peers::uri(&bed.a.dir.join("nbd/root.sock"), "root");
    let changed = effort.of(64 * MIB, 8 * MIB);
    let (mut all, mut there, mut stream) = (Vec::new(), Vec::new(), Vec::new());
    for repetition in 0..effort.of(5, 1) {
        let before = (both_ways(&bed.wan), pair.report(0)?.transfer.wire_bytes);
        let job = Job::new(&uri, "randwrite", 4 * KIB, 16, 0.0).with(format!("size={DISK_BYTES}"));
        let job = job.with(format!("number_ios={}", changed / (4 * KIB))).with("refill_buffers=1");
        let done = job.with(format!("randseed={}", repetition + 1)).run()?;
        ensure!(done.operations as u64 * 4 * KIB == changed, "fio wrote {} blocks", done.operations);
        pair.cut(0)?;
        let after = (both_ways(&bed.wan), pair.report(0)?.transfer.wire_bytes);
        let (a_to_b, b_to_a) = (after.0.0 - before.0.0, after.0.1 - before.0.1);
        all.push((a_to_b + b_to_a, changed as f64));
        there.push((a_to_b, changed as f64));
        stream.push(((after.1 - before.1) as f64, changed as f64));
        say(format_args!("{:.4} of what changed crossed the link", (a_to_b + b_to_a) / changed as f64));
    }
    let row = |what: &str, pairs: &[(f64, f64)]| Row::ratio(what, Unit::Bytes, "changed", pairs);
    Ok(vec![
        row("4 KiB random writes: IP bytes both ways / changed", &all).bound(Bound::AtMost(1.05)),
        row("… from source to target only", &there),
        row("… frames before TLS, TCP and IP", &stream),
    ])
}

fn real(effort: Effort) -> anyhow::Result<Vec<Row>> {
    let bed = bed("f5-real", USUAL)?;
    let image = bed.dir.join("real.img");
    let folder = if effort.quick { "/usr/share/perl" } else { REAL };
    let output = Command::new("du").args(["-sb", folder]).output()?;
    let tree: u64 = String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap_or("0").parse()?;
    let bytes = (tree * 3 / 2).next_multiple_of(64 * MIB) + 64 * MIB;
    load::ext4_of(folder.as_ref(), &image, bytes).context("an image of real files")?;
    let raw = load::allocated_bytes(&image)? as f64;
    let (mut usual, mut fast) = (Vec::new(), Vec::new());
    for rate in effort.of(vec![USUAL, FAST, USUAL, FAST, USUAL], vec![USUAL]) {
        bed.wan.change_both(|shape| *shape = Shape::wan(rate, std::time::Duration::from_millis(10)));
        let disks = vec![DiskSpec { name: "root", bytes }];
        let options = PairOptions { disks, interval: "1h".into(), ..PairOptions::default() };
        for site in [&bed.a, &bed.b] {
            let _ = std::fs::remove_dir_all(site.dir.join("folder"));
            let _ = std::fs::remove_file(site.dir.join("root.img"));
        }
        let _ = std::fs::remove_dir_all(bed.dir.join("pki"));
        let mut pair = Pair::new(&bed, options)?;
        let copied = Command::new("cp").arg("--sparse=always").arg(&image).arg(pair.image(0, 0)).status()?;
        ensure!(copied.success(), "cp: {copied}");
        let before = both_ways(&bed.wan);
        pair.start(1, "replica")?;
        pair.start(0, "primary")?;
        pair.cut(0)?;
        let after = both_ways(&bed.wan);
        let found = if rate == USUAL { &mut usual } else { &mut fast };
        found.push((after.0 - before.0 + after.1 - before.1, raw));
    }
    let row = Row::ratio(format!("an ext4 image of {folder}, first synchronisation"), Unit::Bytes, "allocated", &usual);
    let row = row.judged(Judged::Inverse).bound(Bound::AtLeast(3.0));
    let sent = rsync_bytes(&bed.dir, &image)?;
    say(format_args!("real data: {:.2} × smaller; rsync -z: {:.2} ×", row.result(), raw / sent));
    let peer: Vec<(f64, f64)> = usual.iter().map(|pair| (pair.0, sent)).collect();
    let at_fast = Row::ratio("… the same over 1 Gbit/s", Unit::Bytes, "allocated", &fast).judged(Judged::Inverse);
    Ok(vec![
        row,
        at_fast,
        Row::ratio("… the same, beside rsync -z", Unit::Bytes, "rsync -z, before ssh and TCP", &peer),
    ])
}

/// What `rsync -z` sends for the first copy of a file, by its own account.
fn rsync_bytes(folder: &Path, image: &Path) -> anyhow::Result<f64> {
    use std::os::unix::fs::PermissionsExt;
    // Two local paths would be copied uncompressed; a "remote shell" that runs the command here makes it a transfer.
    let shell = folder.join("here.sh");
    std::fs::write(&shell, "#!/bin/sh\nshift\nexec \"$@\"\n")?;
    std::fs::set_permissions(&shell, PermissionsExt::from_mode(0o755))?;
    let target = folder.join("rsync.img");
    let mut rsync = Command::new("rsync");
    rsync.args(["-z", "--sparse", "--stats", "--rsh"]).arg(&shell).arg(image);
    let output = rsync.arg(format!("here:{}", target.display())).output().context("rsync (package rsync)")?;
    ensure!(output.status.success(), "rsync: {}", String::from_utf8_lossy(&output.stderr).trim());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = said.lines().find_map(|line| line.strip_prefix("Total bytes sent: "));
    let _ = std::fs::remove_file(target);
    Ok(line.context("rsync tells what it sent")?.replace([',', '.'], "").trim().parse()?)
}
