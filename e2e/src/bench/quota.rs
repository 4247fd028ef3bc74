//! A quota of processor time for some processes, by a control group: on one machine a peer site would otherwise eat the
//! processor that it has to itself in real life.
//!
//! Version 1 and 2 of control groups. The group is removed with its value; one whose owner was killed is empty by then and
//! goes at the next use.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The kernel's accounting period, microseconds.
const PERIOD_MICROS: u64 = 20_000;
const PREFIX: &str = "watari-bench-";

/// A group with a limit.
pub struct Quota {
    folder: PathBuf,
    parent: PathBuf,
}

impl Quota {
    /// `share` of one processor for all members together.
    pub fn new(share: f64) -> io::Result<Quota> {
        let one = Path::new("/sys/fs/cgroup/cpu");
        let parent = if one.exists() { one.to_owned() } else { PathBuf::from("/sys/fs/cgroup") };
        for stale in fs::read_dir(&parent)?.flatten() {
            if stale.file_name().to_string_lossy().starts_with(PREFIX) {
                // Only an empty one can be removed, so nobody else's is.
                let _ = fs::remove_dir(stale.path());
            }
        }
        let folder = parent.join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&folder)?;
        let quota = Quota { folder, parent };
        let micros = (share * PERIOD_MICROS as f64) as u64;
        if one.exists() {
            fs::write(quota.folder.join("cpu.cfs_period_us"), PERIOD_MICROS.to_string())?;
            fs::write(quota.folder.join("cpu.cfs_quota_us"), micros.to_string())?;
        } else {
            fs::write(quota.folder.join("cpu.max"), format!("{micros} {PERIOD_MICROS}"))?;
        }
        Ok(quota)
    }

    /// A process and its children so far; later children are born into the group.
    pub fn add(&self, pid: u32) -> io::Result<()> {
        for child in children(pid) {
            self.add(child)?;
        }
        fs::write(self.folder.join("cgroup.procs"), pid.to_string())
    }
}

/// The direct children of a process.
pub fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|child| child.parse().ok()).collect()
}

impl Drop for Quota {
    fn drop(&mut self) {
        let members = fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default();
        for member in members.split_whitespace() {
            let _ = fs::write(self.parent.join("cgroup.procs"), member);
        }
        let _ = fs::remove_dir(&self.folder);
    }
}
