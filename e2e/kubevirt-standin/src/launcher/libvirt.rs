//! libvirtd of this Pod, unprivileged, for the session of uid 107 as KubeVirt's, and virsh as its client.

use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};

use super::{Error, at};
use crate::render::PRIVATE_FOLDER;

/// libvirtd asks QEMU what it can; the first time that takes seconds.
const PATIENCE: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(300);
/// Of the session's libvirtd, below XDG_RUNTIME_DIR.
pub const SOCKET: &str = "/var/run/libvirt/libvirt-sock";

/// Starts libvirtd and waits for its first answer. It is killed with the value. Files below the folders of `shared` are the same on
/// both sides of a migration: libvirt takes everything else of a claim for local.
pub async fn start(shared: &[String]) -> Result<Child, Error> {
    let folder = format!("{PRIVATE_FOLDER}/libvirt");
    std::fs::create_dir_all(&folder).map_err(at(&folder))?;
    let write = |name: &str, text: &str| {
        let path = format!("{folder}/{name}");
        std::fs::write(&path, text).map_err(at(&path))
    };
    let shared = serde_json::to_string(shared).expect("a list of plain texts");
    write(
        "qemu.conf",
        &format!(
            "security_driver = \"none\"\nnamespaces = []\nstdio_handler = \"file\"\nshared_filesystems = {shared}\n"
        ),
    )?;
    // libvirt refuses to migrate a VM to the host that it is on, and knows hosts by this.
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(at("/proc/sys/kernel/random/uuid"))?;
    write("libvirtd.conf", &format!("host_uuid = \"{}\"\nlog_outputs = \"3:stderr\"\n", uuid.trim()))?;
    let child = Command::new("/usr/sbin/libvirtd").stdin(Stdio::null()).kill_on_drop(true).spawn();
    let child = child.map_err(at("libvirtd"))?;
    let begin = Instant::now();
    while virsh(&["list"]).await.is_err() {
        if begin.elapsed() > PATIENCE {
            return Err(Error::Libvirt(PATIENCE));
        }
        tokio::time::sleep(POLL).await;
    }
    tracing::info!(seconds = begin.elapsed().as_secs_f64(), "libvirtd answers");
    Ok(child)
}

pub async fn virsh(arguments: &[&str]) -> Result<String, Error> {
    let mut command = Command::new("virsh");
    let output = command.args(["-q", "-c", "qemu:///session"]).args(arguments).stdin(Stdio::null()).output();
    let output = output.await.map_err(at("virsh"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        false => Err(Error::Virsh {
            command: arguments.join(" "),
            message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        }),
    }
}

/// libvirt remembers the domain; one that is there already is replaced.
pub async fn define(xml: &str) -> Result<(), Error> {
    let path = write_domain("domain.xml", xml)?;
    virsh(&["define", &path]).await.map(drop)
}

/// For virsh, which reads files.
pub fn write_domain(name: &str, xml: &str) -> Result<String, Error> {
    let path = format!("{PRIVATE_FOLDER}/{name}");
    std::fs::write(&path, xml).map_err(at(&path))?;
    Ok(path)
}

/// What libvirt says of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// libvirt does not know it.
    Unknown,
    Running,
    /// Memory arrives.
    Incoming,
    Paused(String),
    /// With libvirt's reason: "shutdown", "destroyed", "migrated", "crashed", …
    Off(String),
}

pub async fn state(domain: &str) -> Result<State, Error> {
    match virsh(&["domstate", "--reason", domain]).await {
        Ok(text) => Ok(parse_state(&text)),
        Err(Error::Virsh { message, .. }) if message.contains("failed to get domain") => Ok(State::Unknown),
        Err(error) => Err(error),
    }
}

fn parse_state(text: &str) -> State {
    let (state, reason) = text.trim_end_matches(')').split_once(" (").unwrap_or((text, ""));
    match state {
        "running" => State::Running,
        "paused" if reason == "migrating" => State::Incoming,
        "paused" | "idle" | "pmsuspended" | "in shutdown" => State::Paused(reason.to_owned()),
        _ => State::Off(reason.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read_from_virshs_words() {
        assert_eq!(parse_state("running (booted)"), State::Running);
        assert_eq!(parse_state("paused (migrating)"), State::Incoming);
        assert_eq!(parse_state("paused (I/O error)"), State::Paused("I/O error".into()));
        assert_eq!(parse_state("shut off (migrated)"), State::Off("migrated".into()));
        assert_eq!(parse_state("crashed (panicked)"), State::Off("panicked".into()));
    }
}
