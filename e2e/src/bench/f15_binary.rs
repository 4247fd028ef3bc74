//! F15: how large the image is, and how long a sidecar takes from its start until its NBD server is ready.

use std::{
    io::Read,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use super::{
    Effort, Figure, Outcome,
    load::MIB,
    measure::{Bound, Row, Unit},
    peers,
    plot::Plot,
    rig::{Rig, RigOptions},
    runner::say,
};
use crate::{build, process::Builder, reaper};

pub struct Binary;

/// What an NBD server says first (NBD protocol, "Newstyle negotiation").
const NBD_MAGIC: &[u8] = b"NBDMAGIC";
const TARGET: &str = "x86_64-unknown-linux-gnu";

impl Figure for Binary {
    fn id(&self) -> &'static str {
        "F15"
    }
    fn title(&self) -> &'static str {
        "size and start"
    }
    fn target(&self) -> &'static str {
        "compressed image ≤ 15 MiB; ≤ 200 ms from start to NBD ready."
    }
    fn method(&self) -> &'static str {
        "The image holds the static binary and nothing else, so its size is that of the stripped binary, compressed as \
         registries do (gzip). Ready: a client that connects reads the server's greeting; looked at every 0.2 ms. A fresh pair, and one \
         that starts again with its folder; peers: nbdkit and qemu-nbd on the same file."
    }

    fn run(&self, effort: Effort) -> anyhow::Result<Outcome> {
        let mut rows = size()?;
        rows.extend(start(effort)?);
        Ok(Outcome { rows, notes: Vec::new(), plot: Plot::Rows })
    }
}

fn size() -> anyhow::Result<Vec<Row>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    say("the static binary is built, if it is not there yet (some minutes)");
    let arguments = ["build", "--release", "--quiet", "--target", TARGET, "-p", "watari-sidecar"];
    let mut command = Command::new(cargo);
    // The same flags as `make static`.
    command.args(arguments).env("RUSTFLAGS", "-C target-feature=+crt-static").current_dir(build::workspace());
    ensure!(command.status()?.success(), "the static binary cannot be built");
    let binary = build::target_folder().join(TARGET).join("release").join("watari-sidecar");
    let folder = reaper::run_folder();
    let stripped = folder.join("stripped");
    let status = Command::new("strip").arg("-o").arg(&stripped).arg(&binary).status().context("strip (binutils)")?;
    ensure!(status.success(), "strip: {status}");
    let packed = Command::new("gzip").args(["-9", "-c"]).arg(&stripped).output()?;
    ensure!(packed.status.success(), "gzip: {}", packed.status);
    let plain = std::fs::metadata(&stripped)?.len() as f64;
    let _ = std::fs::remove_file(stripped);
    Ok(vec![
        Row::alone("static binary, stripped and compressed", Unit::Bytes, vec![packed.stdout.len() as f64])
            .bound(Bound::AtMost(15.0 * MIB as f64)),
        Row::alone("static binary, stripped", Unit::Bytes, vec![plain]),
    ])
}

/// From the start of the process until a client reads the greeting.
fn until_ready(builder: Builder, socket: &Path) -> anyhow::Result<(f64, crate::process::Process)> {
    let _ = std::fs::remove_file(socket);
    let began = Instant::now();
    let mut process = builder.spawn()?;
    let deadline = began + Duration::from_secs(30);
    loop {
        if greeted(socket) {
            return Ok((began.elapsed().as_secs_f64() * 1000.0, process));
        }
        process.check()?;
        ensure!(Instant::now() < deadline, "no greeting at {}: {}", socket.display(), process.tail());
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn greeted(socket: &Path) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket) else { return false };
    let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
    let mut greeting = [0; NBD_MAGIC.len()];
    stream.read_exact(&mut greeting).is_ok() && greeting == NBD_MAGIC
}

fn start(effort: Effort) -> anyhow::Result<Vec<Row>> {
    let folder = reaper::run_folder().join("f15");
    std::fs::create_dir_all(&folder)?;
    let image = folder.join("disk.img");
    std::fs::File::create(&image)?.set_len(1 << 30)?;
    let (mut fresh, mut again) = (Vec::new(), Vec::new());
    let mut peers: [Vec<f64>; 2] = Default::default();
    for _ in 0..effort.of(9, 2) {
        let disks = vec![("disk", 1 << 30, Some::<PathBuf>(image.clone()))];
        let mut rig = Rig::new("f15", RigOptions { disks, ..RigOptions::default() })?;
        rig.start(1, "replica", &[])?;
        for found in [&mut fresh, &mut again] {
            let (millis, process) = until_ready(rig.command(0, "primary", &[])?, &rig.socket(0, 0))?;
            found.push(millis);
            rig.processes[0] = Some(process);
            rig.cut()?;
            rig.ctl(0, &["release"])?;
            rig.processes[0].take().context("just started")?.wait(Duration::from_secs(20))?;
        }
        for ((_, socket, builder), found) in peers::builders(&folder, &image).into_iter().zip(&mut peers) {
            found.push(until_ready(builder, &socket)?.0);
        }
    }
    let best = if super::measure::median(&peers[0]) <= super::measure::median(&peers[1]) { 0 } else { 1 };
    let name = ["nbdkit file", "qemu-nbd"][best];
    let row = |what: &str, ours: Vec<f64>| {
        let mut row = Row::alone(what, Unit::Millis, ours).bound(Bound::AtMost(200.0));
        row.theirs = peers[best].clone();
        row.peer = name.to_owned();
        row
    };
    let rows = vec![row("start to NBD ready, first time", fresh), row("start to NBD ready, again", again)];
    rows.iter().for_each(|row| say(format_args!("{}: {:.0} ms", row.what, row.result())));
    Ok(rows)
}
