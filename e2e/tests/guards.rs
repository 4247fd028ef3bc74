//! What keeps a pair from harm: room for a handover, a replica that is proved, a VM that must not come back.

use std::{
    io::Write,
    os::unix::fs::FileExt,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use watari_e2e::{
    nbd::{qemu_io, socket},
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
    let mut pair = Pair::new(bed, options())?;
    pair.start(1, "replica")?;
    pair.start(0, "primary")?;
    pair.cut(0)?;
    Ok(pair)
}

#[test]
fn what_changed_in_the_replica_behind_our_back_is_found_and_sent_again() -> anyhow::Result<()> {
    let bed = TestBed::new("verify", Shape::wan(1_000_000_000, Duration::from_millis(2)))?;
    let mut pair = pair(&bed)?;
    let root = socket(&pair, 0, "root");
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
    qemu_io(&socket(&pair, 1, "generations"), "root@latest", &["read -P 3 0 8M"])?;
    Ok(())
}

#[test]
fn a_handover_is_not_opened_towards_a_target_without_room_for_what_is_dirty() -> anyhow::Result<()> {
    let bed = TestBed::new("reserve", Shape::wan(1_000_000_000, Duration::from_millis(2)))?;
    let mut pair = pair(&bed)?;
    pair.ctl(0, &["set", "--paused", "true"])?;
    // 200 MiB are dirty: twice that is more than a journal of 256 MiB takes.
    for name in ["root", "data"] {
        qemu_io(&socket(&pair, 0, name), name, &["write -P 9 0 100M", "flush"])?;
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

/// A client that stays connected, as a QEMU does.
struct Client(Child);

impl Client {
    fn connect(pair: &Pair, end: usize, name: &str) -> anyhow::Result<Self> {
        let url = format!("nbd+unix:///{name}?socket={}", socket(pair, end, name).display());
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
    pair.release(1)?;
    pair.start(1, "primary")?;
    pair.ctl(0, &["open-handover", "--vmi-uid", "u1"])?;
    pair.wait(1, "the offer", WAIT, |r| r.attachable)?;
    let attached = Client::connect(&pair, 1, "root")?;
    pair.wait(1, "a client", WAIT, |r| r.disks[0].clients == 1)?;
    pair.ctl(1, &["promote"])?;
    pair.wait(1, "the promoted side to serve", WAIT, |r| r.role == "Serving")?;
    let root = socket(&pair, 1, "root");
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
