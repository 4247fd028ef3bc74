//! One node: a machine made of namespaces, started, entered and ended from outside.
//!
//! `NODE/process.json` names its process 1 as this machine sees it. A node without a living one is down, whatever else is left of
//! it; starting it again is a reboot: etcd's and containerd's data are still there, processes and mounts are not.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use watari_e2e::build;

use crate::cgroups;
use crate::detached::{self, Detached};
use crate::folders::{self, Folders, VOLUMES_IN_NODE};
use crate::images::PAUSE_IMAGE;
use crate::network;
use crate::plan::NodePlan;

/// Debian's folder of CNI plug-ins.
pub const CNI_PLUGINS: &str = "/usr/lib/cni";
/// From the start to the node's own view of the machine: mounts only, so seconds even on a busy machine.
const INIT_PATIENCE: Duration = Duration::from_secs(30);
/// containerd's start.
const RUNTIME_PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);

/// Why a node is not up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Folder(#[from] folders::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroups::Error),
    #[error("node {node} cannot be started: {source}")]
    Spawn { node: String, source: std::io::Error },
    #[error("node {node} did not come up; the end of {log}:\n{tail}")]
    Init { node: String, log: PathBuf, tail: String },
    #[error("node {0} is not up; `make clusters` starts it")]
    Down(String),
    #[error("{what} on node {node}: {message}")]
    Inside { node: String, what: String, message: String },
}

fn record(folders: &Folders, node: &NodePlan) -> PathBuf {
    folders.node(node).join("process.json")
}

/// The node's process 1, if it lives.
pub fn running(folders: &Folders, node: &NodePlan) -> Option<Detached> {
    Detached::read(&record(folders, node)).filter(Detached::alive)
}

/// Starts the node unless it runs (then it answers false). Returns as soon as it can be entered; its programs are starting then.
pub fn ensure(folders: &Folders, node: &NodePlan, programs: &Path) -> Result<bool, Error> {
    if running(folders, node).is_some() {
        return Ok(false);
    }
    // What an earlier one left (its start was interrupted, its process 1 alone was killed) would meet the new one.
    cgroups::remove(Some(&node.name()))?;
    let (own, logs) = (folders.node(node), folders.node_logs(node));
    for folder in [&own, &logs, &folders.volumes(&node.cluster)] {
        std::fs::create_dir_all(folder).map_err(folders::at(folder))?;
    }
    let announced = own.join("pid1");
    let _ = std::fs::remove_file(&announced);

    let groups = cgroups::ensure(&node.name())?;
    let log = logs.join("init.log");
    let netns = network::path(&node.netns());
    let place = detached::Place { log: &log, netns: Some(&netns), cgroups: &groups };
    let wrapper = detached::spawn(init_command(folders, node, programs), &place)
        .map_err(|source| Error::Spawn { node: node.name(), source })?;
    let deadline = Instant::now() + INIT_PATIENCE;
    loop {
        let pid = std::fs::read_to_string(&announced).ok().and_then(|text| text.trim().parse().ok());
        if let Some(process) = pid.and_then(Detached::find) {
            process.write(&record(folders, node))?;
            return Ok(true);
        }
        if !wrapper.alive() || Instant::now() > deadline {
            let tail = tail(&log);
            cgroups::remove(Some(&node.name()))?;
            return Err(Error::Init { node: node.name(), log, tail });
        }
        std::thread::sleep(POLL);
    }
}

fn init_command(folders: &Folders, node: &NodePlan, programs: &Path) -> Command {
    let role = if node.is_control_plane() { "control-plane" } else { "worker" };
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--uts", "--ipc", "--cgroup", "--kill-child=KILL", "--", "/bin/bash"]);
    command.arg(build::workspace().join("e2e/clusters/node-init.sh"));
    command
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("NODE", node.name())
        .env("ROLE", role)
        .env("NODE_DIR", folders.node(node))
        .env("LOGS", folders.node_logs(node))
        .env("VOLUMES", folders.volumes(&node.cluster))
        .env("VOLUMES_IN_NODE", VOLUMES_IN_NODE)
        .env("PROGRAMS", programs)
        .env("CNI_PLUGINS", CNI_PLUGINS)
        .env("PAUSE_IMAGE", PAUSE_IMAGE)
        .env("ADDRESS", node.address().to_string())
        .env("POD_NET", node.pod_net())
        .env("POD_RANGE", node.cluster.pod_range())
        .env("SERVICE_RANGE", node.cluster.service_range())
        .env("DNS", node.cluster.dns_address().to_string());
    command
}

/// `program` inside the node: all its namespaces, as its root.
pub fn command(folders: &Folders, node: &NodePlan, program: &str) -> Result<Command, Error> {
    let process = running(folders, node).ok_or_else(|| Error::Down(node.name()))?;
    let mut command = Command::new("nsenter");
    command.args(["-t", &process.pid.to_string(), "-m", "-u", "-i", "-n", "-p", "-C", "--", program]);
    command.env("KUBECONFIG", crate::pki::ADMIN_IN_NODE);
    Ok(command)
}

/// Runs a program inside to its end; answers what it printed.
pub fn run(folders: &Folders, node: &NodePlan, program: &str, arguments: &[&str]) -> Result<String, Error> {
    let what = format!("{program} {}", arguments.join(" "));
    let fail = |message: String| Error::Inside { node: node.name(), what: what.clone(), message };
    let output = command(folders, node, program)?.args(arguments).output().map_err(|error| fail(error.to_string()))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(fail(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

/// Waits until the container runtime answers.
pub fn await_runtime(folders: &Folders, node: &NodePlan) -> Result<(), Error> {
    let deadline = Instant::now() + RUNTIME_PATIENCE;
    loop {
        match run(folders, node, "ctr", &["version"]) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

/// `kill -9` of the whole node at once: process 1 and everything with it, Pods included. Its disks stay.
///
/// Only processes end; the machine's page cache survives, so this proves nothing about fsync.
pub fn kill(folders: &Folders, node: &NodePlan) -> Result<(), Error> {
    let _ = std::fs::remove_file(record(folders, node));
    Ok(cgroups::remove(Some(&node.name()))?)
}

/// The last lines of a log, for error messages.
pub fn tail(log: &Path) -> String {
    const LINES: usize = 20;
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
