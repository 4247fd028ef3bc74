//! F6: how fast the first synchronisation goes when no link is in the way: both ends on this machine's loopback.
//!
//! Every side ends with the data durable at the target (commit, `--fsync`, `--flush`), and every side but one encrypts.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::ensure;

use super::{
    Effort, Figure, Outcome,
    load::{self, GIB, MIB},
    measure::{Bound, Row, Unit, median},
    peers,
    plot::Plot,
    rig::{Rig, RigOptions},
    runner::say,
};
use crate::{
    netns::Netns,
    process::{Builder, Process, wait_until},
    reaper,
};

pub struct Stream;

const NBD_PORT: u16 = 10809;
const TLS_PORT: u16 = 10810;
/// A pre-shared key for qemu-nbd's TLS: what is measured is the encryption, not how trust is made.
const PSK: &str = "bench:6b65792d666f722d6d6561737572696e672d6f6e6c792d6e6f2d736563726574\n";

const PEERS: [&str; 4] =
    ["rsync over ssh", "qemu-img convert, NBD with TLS", "nbdcopy, NBD with TLS", "nbdcopy, plain"];
/// How many of them encrypt; they come first.
const ENCRYPTED: usize = 3;

impl Figure for Stream {
    fn id(&self) -> &'static str {
        "F6"
    }
    fn title(&self) -> &'static str {
        "stream throughput on one machine"
    }
    fn target(&self) -> &'static str {
        "first synchronisation of random data ≥ 1.0 × the best encrypted peer, ≥ 0.6 × plain nbdcopy."
    }
    fn method(&self) -> &'static str {
        "2 GiB of incompressible data in the page cache, loopback, everything durable at the end. Watari: from the start of the \
         primary (the replica waits, its image is made empty) until the first generation is committed. Peers: rsync over \
         ssh (an sshd of our own, its default cipher), `qemu-img convert -n` and nbdcopy to qemu-nbd over TLS, and nbdcopy \
         to a plain qemu-nbd."
    }

    fn run(&self, effort: Effort) -> anyhow::Result<Outcome> {
        let bytes = effort.of(2 * GIB, 64 * MIB);
        let folder = reaper::run_folder().join("f6");
        std::fs::create_dir_all(&folder)?;
        let image = folder.join("source.img");
        load::noise(&image, 0, bytes, 6)?;
        let netns = Netns::create("f6")?;
        let servers = Peers::start(&folder, &netns, bytes)?;
        let mut ours = Vec::new();
        let mut theirs: [Vec<f64>; PEERS.len()] = Default::default();
        for repetition in 0..effort.of(3, 1) {
            for turn in 0..=PEERS.len() {
                let side = (turn + repetition) % (PEERS.len() + 1);
                // What one side left to be written back is not the next one's business.
                // SAFETY: sync has no arguments and cannot fail.
                unsafe { libc::sync() };
                let seconds = match side.checked_sub(1) {
                    None => watari(&image, bytes)?,
                    Some(peer) => servers.copy(peer, &image)?,
                };
                let rate = bytes as f64 / seconds;
                side.checked_sub(1).map_or(&mut ours, |peer| &mut theirs[peer]).push(rate);
                let name = side.checked_sub(1).map_or("Watari", |peer| PEERS[peer]);
                say(format_args!("{name}: {:.0} MiB/s", rate / MIB as f64));
            }
        }
        drop(servers);
        let _ = std::fs::remove_dir_all(&folder);
        Ok(Outcome { rows: rows(&ours, &theirs), notes: Vec::new(), plot: Plot::Rows })
    }
}

fn rows(ours: &[f64], theirs: &[Vec<f64>; PEERS.len()]) -> Vec<Row> {
    let best =
        (0..ENCRYPTED).max_by(|&x, &y| median(&theirs[x]).total_cmp(&median(&theirs[y]))).expect("some peers encrypt");
    let row = |peer: usize| {
        let pairs: Vec<(f64, f64)> = ours.iter().copied().zip(theirs[peer].iter().copied()).collect();
        Row::ratio(format!("first synchronisation / {}", PEERS[peer]), Unit::BytesPerSecond, PEERS[peer], &pairs)
    };
    (0..PEERS.len())
        .map(|peer| match peer {
            _ if peer == best => row(peer).bound(Bound::AtLeast(1.0)).remark("the best that encrypts"),
            _ if peer >= ENCRYPTED => row(peer).bound(Bound::AtLeast(0.6)).remark("does not encrypt"),
            _ => row(peer),
        })
        .collect()
}

fn watari(image: &Path, bytes: u64) -> anyhow::Result<f64> {
    let disks = vec![("disk", bytes, Some(image.to_owned()))];
    let mut rig = Rig::new("f6", RigOptions { disks, interval: "1h", journal: "3GiB", ..RigOptions::default() })?;
    rig.start(1, "replica", &[])?;
    let began = Instant::now();
    rig.start(0, "primary", &[])?;
    rig.cut()?;
    Ok(began.elapsed().as_secs_f64())
}

/// The peers' servers, in a namespace of their own, so that any port is free.
struct Peers {
    folder: PathBuf,
    netns: PathBuf,
    target: PathBuf,
    bytes: u64,
    _servers: Vec<Process>,
}

impl Peers {
    fn start(folder: &Path, netns: &Netns, bytes: u64) -> anyhow::Result<Peers> {
        let target = folder.join("target.img");
        std::fs::File::create(&target)?.set_len(bytes)?;
        std::fs::create_dir_all(folder.join("psk"))?;
        std::fs::write(folder.join("psk/keys.psk"), PSK)?;
        let mut servers = vec![peers::sshd(folder, netns, "127.0.0.1")?];
        for (port, tls) in [(NBD_PORT, false), (TLS_PORT, true)] {
            let log = folder.join(format!("qemu-nbd-{port}.log"));
            let mut server = Builder::new("qemu-nbd", "qemu-nbd", log).netns(netns);
            server = server.args(["--persistent", "--shared=16", "--format=raw", "--bind=127.0.0.1"]);
            server = server.arg(format!("--port={port}"));
            if tls {
                let credentials = format!("tls-creds-psk,id=tls0,endpoint=server,dir={}/psk", folder.display());
                server = server.args(["--object", &credentials, "--tls-creds", "tls0"]);
            }
            servers.push(server.arg(&target).spawn()?);
        }
        for port in [NBD_PORT, TLS_PORT] {
            wait_until("a peer's port", Duration::from_secs(20), || {
                netns.enter(|| std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()).ok().filter(|open| *open)
            })?;
        }
        Ok(Peers { folder: folder.to_owned(), netns: netns.path(), target, bytes, _servers: servers })
    }

    /// Seconds for one copy to an empty target.
    fn copy(&self, peer: usize, image: &Path) -> anyhow::Result<f64> {
        let file = std::fs::File::options().write(true).open(&self.target)?;
        // In place, because the servers hold it open.
        file.set_len(0)?;
        file.set_len(self.bytes)?;
        drop(file);
        let folder = self.folder.display();
        let text = match peer {
            0 => {
                let _ = std::fs::remove_file(self.folder.join("rsync.img"));
                format!(
                    "exec rsync --whole-file --fsync -e '{}' {} root@127.0.0.1:{folder}/rsync.img",
                    peers::ssh(&self.folder),
                    image.display()
                )
            }
            1 => format!(
                "exec qemu-img convert -n -f raw -S 0 --object tls-creds-psk,id=tls0,endpoint=client,dir={folder}/psk,username=bench \
                 {} --target-image-opts driver=nbd,host=127.0.0.1,port={TLS_PORT},tls-creds=tls0",
                image.display()
            ),
            2 => format!(
                "exec nbdcopy --flush {} 'nbds://bench@127.0.0.1:{TLS_PORT}/?tls-psk-file={folder}/psk/keys.psk'",
                image.display()
            ),
            _ => format!("exec nbdcopy --flush {} nbd://127.0.0.1:{NBD_PORT}/", image.display()),
        };
        let began = Instant::now();
        let output = peers::shell_in(&self.netns, &text)?;
        ensure!(output.status.success(), "{}: {}", PEERS[peer], String::from_utf8_lossy(&output.stderr).trim());
        let seconds = began.elapsed().as_secs_f64();
        let copied = if peer == 0 { self.folder.join("rsync.img") } else { self.target.clone() };
        ensure!(load::allocated_bytes(&copied)? >= self.bytes * 9 / 10, "{} has copied too little", PEERS[peer]);
        Ok(seconds)
    }
}
