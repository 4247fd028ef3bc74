//! What keeps a pair from harm: room for a handover, a replica that is proved, a VM that must not come back.

use std::{
    io::Write,
    os::unix::fs::FileExt,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use watari_e2e::{
    nbd::qemu_io,
    pair::{Pair, PairOptions},
    site::TestBed,
    wan::Shape,
};

const WAIT: Duration = Duration::from_secs(60);

fn options() -> PairOptions {
    PairOptions {
        interval: "300ms".into(),
        journal: "256MiB".into(),
        extra: "verify = \"64MiB\"\n".into(),
        ..PairOptions::default()
    }
}

fn pair(bed: &TestBed) -> anyhow::Result<Pair<'_>> {
    started(Pair::new(bed, options())?)
}

fn started(mut pair: Pair<'_>) -> anyhow::Result<Pair<'_>> {
    pair.start(1, "replica")?;
    pair.start(0, "primary")?;
    pair.cut(0)?;
    Ok(pair)
}

/// A handover is open and the target serves a VM's sockets, as its virt-launcher Pod would.
fn open_handover(pair: &mut Pair) -> anyhow::Result<()> {
    pair.release(1)?;
    pair.start(1, "primary")?;
    pair.ctl(0, &["open-handover", "--vmi-uid", "u1"])?;
    pair.wait(1, "the offer", WAIT, |r| r.attachable)?;
    Ok(())
}

#[test]
fn what_changed_in_the_replica_behind_our_back_is_found_and_sent_again() -> anyhow::Result<()> {
    let bed = TestBed::new("verify", Shape::wan(1_000_000_000, Duration::from_millis(2)))?;
    let mut pair = pair(&bed)?;
    let root = pair.socket(0, "root");
    qemu_io(&root, "root", &["write -P 3 0 8M", "flush"])?;
    pair.cut(0)?;
    let proved = |r: &watari_wire::report::Report| r.verification.as_ref().is_some_and(|v| v.proved_unix_millis > 0);
    pair.wait(0, "a pass that finds no difference", WAIT, proved)?;
    pair.wait(1, "everything to be applied", WAIT, |r| {
        r.replica.as_ref().is_some_and(|replica| replica.applied == replica.committed)
    })?;
    // A disk that loses what it acknowledged, or somebody who writes where nobody may.
    std::fs::File::options().write(true).open(pair.image(1, 0))?.write_all_at(&[0x55; 5000], (4 << 20) + 100)?;
    pair.wait(0, "the difference to be found", WAIT, |r| {
        r.verification.as_ref().is_some_and(|v| v.differed_blocks == 2)
    })?;
    let report = pair.report(0)?;
    ensure!(report.conditions.iter().any(|c| c.kind == "ReplicaDiffered" && c.status), "{:?}", report.conditions);
    pair.cut(0)?;
    qemu_io(&pair.socket(1, "generations"), "root@latest", &["read -P 3 0 8M"])?;
    Ok(())
}

#[test]
fn a_handover_is_not_opened_towards_a_target_without_room_for_what_is_dirty() -> anyhow::Result<()> {
    let bed = TestBed::new("reserve", Shape::wan(1_000_000_000, Duration::from_millis(2)))?;
    let mut pair = pair(&bed)?;
    pair.ctl(0, &["set", "--paused", "true"])?;
    // 200 MiB are dirty: twice that is more than a journal of 256 MiB takes.
    for name in ["root", "data"] {
        qemu_io(&pair.socket(0, name), name, &["write -P 9 0 100M", "flush"])?;
    }
    let declined = pair.ctl(0, &["open-handover", "--vmi-uid", "u1"]).err().context("it must be declined")?.to_string();
    ensure!(declined.contains("a handover needs") && declined.contains("journal"), "{declined}");
    ensure!(pair.report(0)?.role == "Serving");
    pair.ctl(0, &["set", "--paused", "false"])?;
    pair.cut(0)?;
    pair.ctl(0, &["open-handover", "--vmi-uid", "u1"])?;
    pair.wait(1, "the offer", WAIT, |r| r.attachable)?;
    Ok(())
}

#[test]
fn what_a_side_wrote_alone_before_it_was_fenced_is_listed_told_and_copied() -> anyhow::Result<()> {
    let bed = TestBed::new("alone", Shape::wan(1_000_000_000, Duration::from_millis(2)))?;
    let mut pair = pair(&bed)?;
    let after = pair.report(0)?.generations.committed;
    bed.wan.link_down()?;
    // Nobody but this side has these: 1 MiB at 2 MiB, and one block of the second disk.
    qemu_io(&pair.socket(0, "root"), "root", &["write -P 6 2M 1M", "flush"])?;
    qemu_io(&pair.socket(0, "data"), "data", &["write -P 7 64k 4k", "flush"])?;
    pair.ctl(1, &["promote"])?;
    bed.wan.restore()?;
    pair.wait(0, "the old side to be fenced", WAIT, |r| r.role == "Fenced")?;
    let alone = pair.report(0)?.divergence.context("the list")?;
    ensure!((alone.bytes, alone.after) == ((1 << 20) + 4096, after));
    let told = |r: &watari_wire::report::Report| {
        r.conditions.iter().any(|c| c.kind == "PeerFenced" && c.message.contains(&((1u64 << 20) + 4096).to_string()))
    };
    pair.wait(1, "the promoted side to be told", WAIT, told)?;
    pair.release(0)?;
    let copies = pair.site(0).dir.join("alone");
    let shown = Command::new(watari_e2e::build::binary("watari-sidecar")?)
        .args(["inspect", "--config"])
        .arg(&pair.ends[0].config)
        .args(["divergence", "--out"])
        .arg(&copies)
        .output()?;
    let shown = format!("{}{}", String::from_utf8_lossy(&shown.stdout), String::from_utf8_lossy(&shown.stderr));
    ensure!(shown.contains("at 2097152, 1048576 bytes") && shown.contains("at 65536, 4096 bytes"), "{shown}");
    let mut root = vec![0; 4 << 20];
    std::fs::File::open(copies.join("root.img"))?.read_exact_at(&mut root, 0)?;
    ensure!(root[2 << 20..3 << 20].iter().all(|b| *b == 6) && root[..2 << 20].iter().all(|b| *b == 0));
    // It survives a restart; consent ends it, and the content is a kept generation from then on.
    pair.start(0, "primary")?;
    pair.wait(0, "the list after a restart", WAIT, |r| r.divergence.as_ref().is_some_and(|d| d.bytes > 1 << 20))?;
    pair.ctl(0, &["accept-divergence"])?;
    pair.wait(0, "a replica", WAIT, |r| r.role == "Replica" && r.divergence.is_none())?;
    pair.wait(1, "the link", WAIT, |r| r.link.connected)?;
    let kept =
        pair.wait(0, "its own content to be kept", WAIT, |r| r.replica.as_ref().is_some_and(|k| !k.kept.is_empty()))?;
    let own = kept.replica.context("a replica")?.kept.last().cloned().context("a kept generation")?;
    pair.cut(1)?;
    qemu_io(&pair.socket(0, "generations"), &format!("root@{own}"), &["read -P 6 2M 1M"])?;
    qemu_io(&pair.socket(0, "generations"), "root@latest", &["read -P 0 2M 1M"])?;
    Ok(())
}

#[test]
fn a_vm_that_attaches_while_the_link_is_down_waits_for_its_source_instead_of_failing() -> anyhow::Result<()> {
    let bed = TestBed::new("attach", Shape::wan(1_000_000_000, Duration::from_millis(2)))?;
    let mut pair = pair(&bed)?;
    qemu_io(&pair.socket(0, "root"), "root", &["write -P 5 1M 64k", "flush"])?;
    open_handover(&mut pair)?;
    bed.wan.link_down()?;
    pair.wait(1, "the link to be gone", WAIT, |r| !r.link.connected && !r.attachable)?;
    // Lost: the migration failed here, refused at its connect, although a moment more would have served it.
    let socket = pair.socket(1, "root");
    let read = std::thread::spawn(move || qemu_io(&socket, "root", &["read -P 5 1M 64k"]));
    pair.wait(1, "the attached VM", WAIT, |r| r.role == "Attached" && r.disks[0].clients == 1)?;
    bed.wan.restore()?;
    read.join().expect("the reader does not panic")?;
    Ok(())
}

#[test]
fn what_was_set_survives_the_worker_and_a_guest_that_stopped_writing_leaves_the_region_log() -> anyhow::Result<()> {
    let bed = TestBed::new("kept", Shape::wan(1_000_000_000, Duration::from_millis(2)))?;
    let mut pair = pair(&bed)?;
    qemu_io(&pair.socket(0, "root"), "root", &["write -P 5 0 32M", "flush"])?;
    pair.cut(0)?;
    ensure!(pair.report(0)?.logged_bytes >= 32 << 20, "{}", pair.report(0)?.logged_bytes);
    pair.wait(0, "cold regions to leave the log without another commit", 2 * WAIT, |r| r.logged_bytes == 0)?;
    pair.ctl(0, &["set", "--bandwidth", "7Mbit/s"])?;
    ensure!(pair.kill_worker(0)?, "there was no worker");
    pair.wait(0, "the next worker", WAIT, |r| r.worker_restarts == 1)?;
    ensure!(pair.report(0)?.link.limit_bits_per_second == 7_000_000, "{:?}", pair.report(0)?.link);
    Ok(())
}

/// What the loss of a node does to a side: the memory that held its marks is gone.
fn forget_memory(pair: &Pair, end: usize) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(&pair.ends[end].config)?;
    let line = text.lines().find_map(|l| l.strip_prefix("runtime_dir = ")).context("a runtime_dir")?;
    Ok(std::fs::remove_dir_all(line.trim_matches('"'))?)
}

#[test]
fn after_the_loss_of_a_node_the_peer_proves_the_region_log_and_only_its_regions_are_compared() -> anyhow::Result<()> {
    // Long enough a way that a comparison of everything can be seen.
    let bed = TestBed::new("node", Shape::wan(1_000_000_000, Duration::from_millis(60)))?;
    let mut pair = pair(&bed)?;
    let root = pair.socket(0, "root");
    qemu_io(&root, "root", &["write -P 2 0 64M", "flush"])?;
    pair.cut(0)?;
    // Regions that are not written any more leave the log at later commits; and a heartbeat of it is heard.
    for _ in 0..4 {
        std::thread::sleep(Duration::from_secs(4));
        qemu_io(&root, "root", &["write -P 2 0 4k", "flush"])?;
        pair.cut(0)?;
    }
    std::thread::sleep(Duration::from_secs(12));
    pair.ctl(0, &["set", "--paused", "true"])?;
    qemu_io(&root, "root", &["write -P 3 40M 64k", "flush"])?;
    std::thread::sleep(Duration::from_secs(2));
    // The node is gone, with the memory that held the marks; the folder and the disks are not.
    drop(pair.ends[0].sidecar.take());
    forget_memory(&pair, 0)?;
    pair.start(0, "primary")?;
    pair.wait(0, "the pair to be proved", WAIT, |r| r.trust == "Tracked" && r.generations.committed_number > 0)?;
    let cut = pair.cut(0)?;
    let report = pair.report(0)?;
    ensure!(report.transfer.content_bytes > 0 && report.transfer.content_bytes < 32 << 20, "{cut}: {report:?}");
    qemu_io(&pair.socket(1, "generations"), "root@latest", &["read -P 3 40M 64k", "read -P 2 41M 23M"])?;
    // A peer that heard nothing proves nothing: then everything is compared, and it says why.
    pair.release(1)?;
    pair.start(1, "replica")?;
    drop(pair.ends[0].sidecar.take());
    pair.release(1)?;
    pair.start(1, "replica")?;
    forget_memory(&pair, 0)?;
    pair.start(0, "primary")?;
    pair.wait(0, "a full comparison with its reason", WAIT, |r| {
        r.conditions.iter().any(|c| c.kind == "FullCompare" && c.message.contains("heartbeat"))
    })?;
    pair.cut(0)?;
    Ok(())
}

/// A client that stays connected, as a QEMU does.
struct Client(Child);

impl Client {
    fn connect(pair: &Pair, end: usize, name: &str) -> anyhow::Result<Self> {
        let url = format!("nbd+unix:///{name}?socket={}", pair.socket(end, name).display());
        let mut child =
            Command::new("qemu-io").args(["-f", "raw", &url]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        // One request, so that the connection stands when this returns a little later.
        child.stdin.as_mut().context("a pipe")?.write_all(b"read 0 4k\n")?;
        Ok(Client(child))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_vm_that_was_promoted_past_is_not_served_by_the_next_worker_either() -> anyhow::Result<()> {
    let bed = TestBed::new("condemned", Shape::wan(1_000_000_000, Duration::from_millis(2)))?;
    let mut pair = pair(&bed)?;
    open_handover(&mut pair)?;
    let attached = Client::connect(&pair, 1, "root")?;
    pair.wait(1, "a client", WAIT, |r| r.disks[0].clients == 1)?;
    pair.ctl(1, &["promote"])?;
    pair.wait(1, "the promoted side to serve", WAIT, |r| r.role == "Serving")?;
    let root = pair.socket(1, "root");
    ensure!(qemu_io(&root, "root", &["read 0 4k"]).is_err(), "nobody, while the old VM is connected");
    // Killed, and started again: to the next worker a VM that comes back would look like any other.
    drop(pair.ends[1].sidecar.take());
    drop(attached);
    pair.start(1, "primary")?;
    pair.wait(1, "the next worker", WAIT, |r| r.role == "Serving" && r.disks[0].clients == 0)?;
    let refused = qemu_io(&root, "root", &["read 0 4k"]).err().context("it looks like the old one")?.to_string();
    ensure!(refused.contains("ctl release"), "{refused}");
    // A person has seen to it that it is gone.
    pair.release(1)?;
    pair.start(1, "primary")?;
    pair.wait(1, "the side to serve", WAIT, |r| r.role == "Serving")?;
    let deadline = std::time::Instant::now() + WAIT;
    while qemu_io(&root, "root", &["write -P 4 0 4k", "read -P 4 0 4k"]).is_err() {
        ensure!(std::time::Instant::now() < deadline, "a fresh boot is served");
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

#[test]
fn a_promotion_within_reach_of_the_source_seals_it_first_and_loses_nothing() -> anyhow::Result<()> {
    let bed = TestBed::new("takeover", Shape::wan(1_000_000_000, Duration::from_millis(2)))?;
    let mut pair = pair(&bed)?;
    pair.release(1)?;
    pair.start(1, "primary")?;
    pair.wait(0, "the link", WAIT, |r| r.link.connected)?;
    pair.wait(1, "the link", WAIT, |r| r.link.connected)?;
    pair.ctl(0, &["set", "--paused", "true"])?;
    // Acknowledged, and nowhere but at the source.
    qemu_io(&pair.socket(0, "root"), "root", &["write -P 8 1M 4M", "flush"])?;
    let said = pair.ctl(1, &["promote"])?;
    ensure!(said.contains("sealed first"), "{said}");
    let report = pair.wait(1, "the target to serve", WAIT, |r| r.role == "Serving")?;
    ensure!(report.epoch == 2 && !report.conditions.iter().any(|c| c.kind == "Unfenced"), "{report:?}");
    pair.wait(0, "the source to be a replica", WAIT, |r| r.role == "Replica")?;
    qemu_io(&pair.socket(1, "root"), "root", &["read -P 8 1M 4M"])?;
    Ok(())
}

#[test]
fn a_disk_grows_at_the_replica_first_and_never_under_a_running_vm() -> anyhow::Result<()> {
    let bed = TestBed::new("growth", Shape::wan(1_000_000_000, Duration::from_millis(2)))?;
    let pair = Pair::new(&bed, options())?;
    // A size in the configuration is a person's word that the disk shall not be larger.
    let config = &pair.ends[0].config;
    let text = std::fs::read_to_string(config)?;
    std::fs::write(config, text.lines().filter(|l| !l.starts_with("size = ")).collect::<Vec<_>>().join("\n"))?;
    let mut pair = started(pair)?;
    let (before, after) = (pair.report(0)?.disks[0].size_bytes, pair.report(0)?.disks[0].size_bytes + (8 << 20));
    let root = pair.socket(0, "root");
    qemu_io(&root, "root", &["write -P 3 0 1M", "flush"])?;
    let vm = Client::connect(&pair, 0, "root")?;
    pair.wait(0, "a client", WAIT, |r| r.disks[0].clients == 1)?;
    std::fs::File::options().write(true).open(pair.image(0, 0))?.set_len(after)?;
    let waits = |r: &watari_wire::report::Report| {
        r.conditions.iter().any(|c| c.kind == "DiskGrowth" && c.reason == "AtNextStart")
    };
    let report = pair.wait(0, "the growth to wait for the VM", WAIT, waits)?;
    ensure!(report.disks[0].size_bytes == before);
    ensure!(std::fs::metadata(pair.image(1, 0))?.len() == after, "the replica's image grows first");
    // What it does meanwhile is replicated as ever.
    pair.cut(0)?;
    drop(vm);
    pair.wait(0, "the new size", WAIT, |r| r.role == "Serving" && r.disks[0].size_bytes == after)?;
    pair.wait(1, "the new size at the replica", WAIT, |r| r.disks[0].size_bytes == after && r.link.connected)?;
    qemu_io(&root, "root", &[&format!("write -P 8 {before} 8M"), "flush"])?;
    pair.cut(0)?;
    qemu_io(&pair.socket(1, "generations"), "root@latest", &[&format!("read -P 8 {before} 8M"), "read -P 3 0 1M"])?;
    let report = pair.report(0)?;
    ensure!(report.worker_restarts == 0 && !report.conditions.iter().any(|c| c.kind == "DiskGrowth"), "{report:?}");
    Ok(())
}
