//! Control groups (version 1) of the nodes: `HIERARCHY/watari-clusters/NODE`.
//!
//! Everything that a node runs, its Pods included, is in its group or below, whichever process started it and whatever namespace it
//! hides in. So ending a node, and finding what a killed one left, is reading a file.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::plan::PREFIX;

/// What kubelet 1.34 and containerd want to find.
pub const CONTROLLERS: [&str; 8] = ["cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids"];
/// Where the hierarchies are mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// How long the kernel may take to end killed processes.
const PATIENCE: Duration = Duration::from_secs(10);

/// A group cannot be made or emptied.
#[derive(Debug, thiserror::Error)]
#[error("control group {path}: {source}")]
pub struct Error {
    pub path: PathBuf,
    pub source: io::Error,
}

fn hierarchies() -> impl Iterator<Item = PathBuf> {
    // "systemd" is a named hierarchy that containers expect; not every machine has it.
    CONTROLLERS.into_iter().chain(["systemd"]).map(|name| Path::new(ROOT).join(name)).filter(|path| mounted(path))
}

fn mounted(hierarchy: &Path) -> bool {
    hierarchy.join("cgroup.procs").exists()
}

/// Controllers that are not there.
pub fn missing() -> Vec<&'static str> {
    CONTROLLERS.into_iter().filter(|name| !mounted(&Path::new(ROOT).join(name))).collect()
}

/// The groups of one node, made if need be.
pub fn ensure(node: &str) -> Result<Vec<PathBuf>, Error> {
    let fail = |path: &Path| {
        let path = path.to_owned();
        move |source| Error { path, source }
    };
    let mut groups = Vec::new();
    for hierarchy in hierarchies() {
        let mut above = hierarchy;
        for name in [PREFIX, node] {
            let group = above.join(name);
            if !group.exists() {
                std::fs::create_dir(&group).map_err(fail(&group))?;
            }
            // A new cpuset is empty and takes no process until it has been given what its parent has.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let (from, to) = (above.join(file), group.join(file));
                if from.exists() {
                    let value = std::fs::read_to_string(&from).map_err(fail(&from))?;
                    std::fs::write(&to, value.trim()).map_err(fail(&to))?;
                }
            }
            above = group;
        }
        groups.push(above);
    }
    Ok(groups)
}

/// Does anything run in the groups of this node?
pub fn occupied(node: &str) -> bool {
    roots(Some(node)).iter().any(|root| !members(root).is_empty())
}

/// Kills everything in the groups of one node (or of all: `None`) and removes them.
pub fn remove(node: Option<&str>) -> Result<(), Error> {
    let roots = roots(node);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let alive: Vec<libc::pid_t> = roots.iter().flat_map(|root| members(root)).collect();
        if alive.is_empty() {
            break;
        }
        for pid in alive {
            // SAFETY: a process that the kernel has just named as a member of our group.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        if Instant::now() > deadline {
            let path = roots.into_iter().find(|root| !members(root).is_empty()).unwrap_or_default();
            return Err(Error { path, source: io::Error::other("processes in it do not end") });
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    for root in roots {
        // A group whose last process is being taken down is busy for another moment.
        while let Err(source) = remove_tree(&root) {
            if Instant::now() > deadline {
                return Err(Error { path: root, source });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

fn roots(node: Option<&str>) -> Vec<PathBuf> {
    hierarchies()
        .map(|hierarchy| match node {
            Some(node) => hierarchy.join(PREFIX).join(node),
            None => hierarchy.join(PREFIX),
        })
        .filter(|root| root.exists())
        .collect()
}

fn below(group: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(group)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect()
}

fn members(group: &Path) -> Vec<libc::pid_t> {
    let text = std::fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    let mut pids: Vec<libc::pid_t> = text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).collect();
    pids.extend(below(group).iter().flat_map(|group| members(group)));
    pids
}

fn remove_tree(group: &Path) -> io::Result<()> {
    for group in below(group) {
        remove_tree(&group)?;
    }
    match std::fs::remove_dir(group) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
