//! Looks at the machine before anything is made, and says everything that is wrong with it, with what to do about it.
//!
//! Pure but for [`Facts::gather`]: the judgement is a function of facts, and tested as one.

use std::ffi::CString;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::cgroups;
use crate::folders::{self, Folders};
use crate::images::BUSYBOX;
use crate::keeper;
use crate::network;
use crate::node::{self, CNI_PLUGINS};
use crate::plan::{NodePlan, Plan};
use crate::programs;

/// Programs of Debian packages that nodes run or we call.
const COMMANDS: [&str; 11] =
    ["containerd", "ctr", "runc", "iptables", "ip", "losetup", "nsenter", "unshare", "tar", "sha256sum", "mount"];
/// Resident memory of a node with a control plane when idle is about 620 MiB, of a further one about 200; Pods come on top.
const CONTROL_PLANE_BYTES: u64 = 800 << 20;
const NODE_BYTES: u64 = 300 << 20;
/// A node's images and containers.
const NODE_DISK_BYTES: u64 = 2 << 30;
/// The programs, their sources, and what Go keeps of building them.
const BUILD_DISK_BYTES: u64 = 10 << 30;

/// The machine cannot carry the clusters.
#[derive(Debug, thiserror::Error)]
#[error("the machine is not ready:\n{}", .0.iter().map(|problem| format!("  - {problem}")).collect::<Vec<_>>().join("\n"))]
pub struct NotReady(pub Vec<String>);

/// What matters about a machine.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    pub uid: u32,
    pub missing_commands: Vec<&'static str>,
    /// Other files that are needed and not there, with what brings them.
    pub missing_files: Vec<(PathBuf, &'static str)>,
    pub missing_controllers: Vec<&'static str>,
    pub overlay: bool,
    pub memory_available_bytes: u64,
    pub disk_available_bytes: u64,
    /// Of the plan's nodes, those that do not run.
    pub nodes_to_start: Vec<NodePlan>,
    pub programs_to_build: usize,
    /// Ports on loopback that somebody else listens on.
    pub ports_taken: Vec<u16>,
    /// Namespaces of ours although no plan of ours knows of any.
    pub foreign_namespaces: Vec<String>,
    /// Mounts below our folder, in this machine's own view.
    pub leftover_mounts: Vec<PathBuf>,
}

impl Facts {
    /// As things are now. Changes nothing.
    pub fn gather(folders: &Folders, plan: &Plan) -> Result<Facts, folders::Error> {
        let known = folders.read_plan()?;
        // Its doors are ours; it has one for each cluster that was planned before.
        let kept = known.iter().filter(|_| keeper::running(folders).is_some()).flat_map(|known| &known.clusters);
        let kept: Vec<u16> = kept.map(|cluster| cluster.api_port()).collect();
        let ports = plan.clusters.iter().map(|cluster| cluster.api_port());
        let missing_files = [
            (PathBuf::from(BUSYBOX), "e2e/setup.sh clusters (package busybox-static)"),
            (Path::new(CNI_PLUGINS).join("bridge"), "e2e/setup.sh clusters (package containernetworking-plugins)"),
            (PathBuf::from("/dev/net/tun"), "modprobe tun"),
            (PathBuf::from("/dev/loop-control"), "modprobe loop"),
        ];
        let programs = programs::folder(folders).map(|folder| programs::missing(&folder).len()).unwrap_or(usize::MAX);
        Ok(Facts {
            // SAFETY: reads a number.
            uid: unsafe { libc::geteuid() },
            missing_commands: COMMANDS.into_iter().filter(|command| !in_path(command)).collect(),
            missing_files: missing_files.into_iter().filter(|(path, _)| !path.exists()).collect(),
            missing_controllers: cgroups::missing(),
            overlay: read("/proc/filesystems").lines().any(|line| line.trim_start_matches("nodev").trim() == "overlay"),
            memory_available_bytes: memory_available_bytes(&read("/proc/meminfo")),
            disk_available_bytes: disk_available_bytes(folders.root()),
            nodes_to_start: plan.nodes().filter(|node| node::running(folders, node).is_none()).collect(),
            programs_to_build: programs,
            ports_taken: ports
                .filter(|port| !kept.contains(port) && TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_err())
                .collect(),
            foreign_namespaces: if known.is_some() { Vec::new() } else { network::found() },
            leftover_mounts: mounts_below(&read("/proc/self/mounts"), folders.root()),
        })
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn in_path(command: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).any(|folder| folder.join(command).exists())
}

fn memory_available_bytes(meminfo: &str) -> u64 {
    let kibibytes =
        meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse().ok());
    kibibytes.unwrap_or(0_u64) << 10
}

fn disk_available_bytes(path: &Path) -> u64 {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return 0 };
    // SAFETY: zeroes are valid for this plain struct, which the call fills.
    let mut facts: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: a terminated path and a struct that lives across the call.
    match unsafe { libc::statvfs(path.as_ptr(), &mut facts) } {
        0 => facts.f_bavail * facts.f_frsize,
        _ => 0,
    }
}

/// Mounts below `folder` in the text of `/proc/self/mounts`.
pub fn mounts_below(mounts: &str, folder: &Path) -> Vec<PathBuf> {
    let points = mounts.lines().filter_map(|line| line.split_whitespace().nth(1)).map(PathBuf::from);
    points.filter(|point| point.starts_with(folder)).collect()
}

/// Everything that is wrong.
pub fn judge(facts: &Facts) -> Result<(), NotReady> {
    let mut problems = Vec::new();
    if facts.uid != 0 {
        problems.push(format!("namespaces, mounts and loop devices need root (this is uid {}): use sudo", facts.uid));
    }
    if !facts.missing_commands.is_empty() {
        problems.push(format!("not installed: {}; run e2e/setup.sh clusters", facts.missing_commands.join(", ")));
    }
    for (path, remedy) in &facts.missing_files {
        problems.push(format!("{} is missing: {remedy}", path.display()));
    }
    if !facts.missing_controllers.is_empty() {
        problems.push(format!(
            "no control group hierarchy (version 1) for {}: boot with `systemd.unified_cgroup_hierarchy=0 \
             SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1`, or mount each (mount -t cgroup -o NAME cgroup {}/NAME)",
            facts.missing_controllers.join(", "),
            "/sys/fs/cgroup"
        ));
    }
    if !facts.overlay {
        problems.push("the kernel has no overlayfs: modprobe overlay".to_owned());
    }
    let memory = facts
        .nodes_to_start
        .iter()
        .map(|node| if node.is_control_plane() { CONTROL_PLANE_BYTES } else { NODE_BYTES })
        .sum();
    if facts.memory_available_bytes < memory {
        problems.push(format!(
            "{} MiB of memory are available, {} nodes need {} MiB: end something, or ask for fewer",
            facts.memory_available_bytes >> 20,
            facts.nodes_to_start.len(),
            memory >> 20
        ));
    }
    let build = if facts.programs_to_build > 0 { BUILD_DISK_BYTES } else { 0 };
    let disk = NODE_DISK_BYTES * facts.nodes_to_start.len() as u64 + build;
    if facts.disk_available_bytes < disk {
        problems.push(format!(
            "{} MiB of disk are free, {} MiB are needed: make room, or set WATARI_CLUSTERS_DIR (and GOCACHE, GOMODCACHE) to a larger one",
            facts.disk_available_bytes >> 20,
            disk >> 20
        ));
    }
    for port in &facts.ports_taken {
        problems.push(format!(
            "port {port} on 127.0.0.1 is taken, an API server is to answer there: see who has it with `ss -tlnp`"
        ));
    }
    if !facts.foreign_namespaces.is_empty() {
        problems.push(format!(
            "clusters of another WATARI_CLUSTERS_DIR are on this machine ({}): take them down there, or `make clusters-down` here",
            facts.foreign_namespaces.join(", ")
        ));
    }
    if !facts.leftover_mounts.is_empty() {
        let points: Vec<_> = facts.leftover_mounts.iter().map(|path| path.display().to_string()).collect();
        problems.push(format!("left mounted: {}; `make clusters-down` takes them away", points.join(", ")));
    }
    if problems.is_empty() { Ok(()) } else { Err(NotReady(problems)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Facts {
        Facts {
            overlay: true,
            memory_available_bytes: 4 << 30,
            disk_available_bytes: 100 << 30,
            nodes_to_start: Plan::new(2, 1).unwrap().nodes().collect(),
            ..Facts::default()
        }
    }

    #[test]
    fn a_good_machine_is_taken() {
        judge(&good()).unwrap();
    }

    #[test]
    fn each_bad_state_is_named_with_its_remedy() {
        let cases: [(Facts, &str, &str); 9] = [
            (Facts { uid: 1000, ..good() }, "root", "sudo"),
            (Facts { missing_commands: vec!["runc"], ..good() }, "runc", "setup.sh clusters"),
            (Facts { missing_files: vec![("/dev/net/tun".into(), "modprobe tun")], ..good() }, "tun", "modprobe"),
            (Facts { missing_controllers: vec!["memory"], ..good() }, "memory", "mount -t cgroup"),
            (Facts { overlay: false, ..good() }, "overlayfs", "modprobe"),
            (Facts { memory_available_bytes: 1 << 30, ..good() }, "1024 MiB of memory", "fewer"),
            (Facts { disk_available_bytes: 1 << 30, ..good() }, "of disk", "WATARI_CLUSTERS_DIR"),
            (Facts { ports_taken: vec![16441], ..good() }, "16441", "ss -tlnp"),
            (Facts { leftover_mounts: vec!["/x/state".into()], ..good() }, "/x/state", "clusters-down"),
        ];
        for (facts, what, remedy) in cases {
            let NotReady(problems) = judge(&facts).expect_err(what);
            assert!(problems.len() == 1 && problems[0].contains(what) && problems[0].contains(remedy), "{problems:?}");
        }
    }

    #[test]
    fn clusters_that_run_need_no_more_room() {
        judge(&Facts { nodes_to_start: Vec::new(), memory_available_bytes: 0, disk_available_bytes: 0, ..good() })
            .unwrap();
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let NotReady(problems) = judge(&Facts { uid: 1, overlay: false, ..good() }).unwrap_err();
        assert_eq!(problems.len(), 2);
    }

    #[test]
    fn mounts_of_ours_are_found_among_others() {
        let text = "proc /proc proc rw 0 0\nx /c/state/a-1/kubelet tmpfs rw 0 0\ny /c/statement tmpfs rw 0 0\n";
        assert_eq!(mounts_below(text, Path::new("/c/state")), [PathBuf::from("/c/state/a-1/kubelet")]);
    }
}
