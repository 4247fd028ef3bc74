//! A client of one NBD export, as tests need it: qemu-io with a list of commands, judged by its words.

use std::{path::Path, process::Command};

use anyhow::ensure;

/// Run the commands on an export; an error with qemu-io's words when one of them failed.
pub fn qemu_io(socket: &Path, export: &str, commands: &[&str]) -> anyhow::Result<()> {
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-f", "raw"]);
    // Kept generations are announced as read-only, and qemu-io asks for writing unless told otherwise.
    if export.contains('@') && commands.iter().all(|c| c.starts_with("read")) {
        qemu_io.arg("-r");
    }
    commands.iter().for_each(|c| {
        qemu_io.args(["-c", c]);
    });
    let output = qemu_io.arg(format!("nbd+unix:///{export}?socket={}", socket.display())).output()?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success() && !said.contains("failed"), "{commands:?} on {export}: {said}");
    Ok(())
}
