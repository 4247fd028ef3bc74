//! The peers' servers, started as their packages ship them: NBD, and an sshd for rsync.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context, ensure};

use crate::{
    netns::Netns,
    process::{Builder, Process, wait_until},
};

/// A server on a unix socket. Ended when dropped.
pub struct NbdPeer {
    pub name: &'static str,
    pub socket: PathBuf,
    pub process: Process,
}

/// The export's name, where a server wants one.
pub const EXPORT: &str = "disk";

impl NbdPeer {
    pub fn uri(&self) -> String {
        uri(&self.socket, EXPORT)
    }
}

pub fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

fn nbdkit(folder: &Path, file: &Path) -> (PathBuf, Builder) {
    let socket = folder.join("nbdkit.sock");
    let builder = Builder::new("nbdkit", "nbdkit", folder.join("nbdkit.log"));
    let builder = builder.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&socket).arg("file").arg(file);
    (socket, builder)
}

fn qemu_nbd(folder: &Path, file: &Path) -> (PathBuf, Builder) {
    let socket = folder.join("qemu-nbd.sock");
    let builder = Builder::new("qemu-nbd", "qemu-nbd", folder.join("qemu-nbd.log"));
    // Writable for several clients, and it stays when one has left; everything else by default.
    let builder = builder.args(["--persistent", "--shared=8", "--format=raw", "--export-name=disk", "--socket"]);
    (socket.clone(), builder.arg(socket).arg(file))
}

/// Both peers on one file.
pub fn servers(folder: &Path, file: &Path) -> anyhow::Result<Vec<NbdPeer>> {
    let named = [("nbdkit file", nbdkit(folder, file)), ("qemu-nbd", qemu_nbd(folder, file))];
    named
        .into_iter()
        .map(|(name, (socket, builder))| {
            let _ = std::fs::remove_file(&socket);
            let mut process = builder.spawn()?;
            wait_until(name, Duration::from_secs(20), || {
                std::os::unix::net::UnixStream::connect(&socket).ok().map(drop)
            })?;
            process.check()?;
            Ok(NbdPeer { name, socket, process })
        })
        .collect()
}

/// The same servers, not yet started: for measuring how long that takes.
pub fn builders(folder: &Path, file: &Path) -> [(&'static str, PathBuf, Builder); 2] {
    let ((nbdkit_socket, nbdkit), (qemu_socket, qemu)) = (nbdkit(folder, file), qemu_nbd(folder, file));
    [("nbdkit file", nbdkit_socket, nbdkit), ("qemu-nbd", qemu_socket, qemu)]
}

const SSH_PORT: u16 = 2222;

/// An sshd with keys of its own (in `folder/ssh`) on a port of its own; it reads nothing of the machine's configuration.
pub fn sshd(folder: &Path, netns: &Netns, address: &str) -> anyhow::Result<Process> {
    let keys = folder.join("ssh");
    std::fs::create_dir_all(&keys)?;
    for name in ["host", "client"] {
        let mut keygen = Command::new("ssh-keygen");
        let output = keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(keys.join(name)).output();
        let output = output.context("ssh-keygen (package openssh-client)")?;
        ensure!(output.status.success(), "ssh-keygen: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    // sshd drops its rights in this folder.
    std::fs::create_dir_all("/run/sshd")?;
    let keys = keys.display();
    let configuration = folder.join("sshd_config");
    std::fs::write(
        &configuration,
        format!(
            "Port {SSH_PORT}\nListenAddress {address}\nHostKey {keys}/host\nAuthorizedKeysFile {keys}/client.pub\nStrictModes no\n\
             PermitRootLogin prohibit-password\nPidFile none\nUsePAM no\n"
        ),
    )?;
    let server = Builder::new("sshd", "/usr/sbin/sshd", folder.join("sshd.log")).netns(netns).contained();
    let mut server = server.args(["-D", "-e", "-f"]).arg(&configuration).spawn()?;
    wait_until("sshd", Duration::from_secs(20), || {
        netns.enter(|| std::net::TcpStream::connect((address, SSH_PORT)).is_ok()).ok().filter(|open| *open)
    })?;
    server.check()?;
    Ok(server)
}

/// The remote shell that reaches it.
pub fn ssh(folder: &Path) -> String {
    format!(
        "ssh -p {SSH_PORT} -i {}/ssh/client -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR \
         -o ServerAliveInterval=5 -o ServerAliveCountMax=3",
        folder.display()
    )
}

/// Runs a shell command inside a namespace, to its end.
pub fn shell_in(netns: &Path, text: &str) -> anyhow::Result<Output> {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", netns.display())).args(["sh", "-c", text]);
    command.output().context("nsenter (package util-linux)")
}
