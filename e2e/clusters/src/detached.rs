//! Processes that outlive the command that started them: the nodes and the keeper.
//!
//! A process is remembered by its id *and* the instant it began, so that an id which the kernel has given to somebody else since is
//! never taken for ours, let alone killed.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::folders;

/// How often a wait looks again.
const POLL: Duration = Duration::from_millis(20);

/// A process as it can be found again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    pub pid: u32,
    /// Clock ticks after boot (field 22 of `/proc/PID/stat`).
    started: u64,
}

impl Detached {
    /// The process that has this id now. One whose first thread has ended still holds its ports while others of its threads end.
    pub fn find(pid: u32) -> Option<Detached> {
        let Stat { state, threads, started } = stat(pid)?;
        let ended = state == 'X' || state == 'Z' && threads <= 1;
        (!ended).then_some(Detached { pid, started })
    }

    /// As recorded, whether or not it still runs.
    pub fn read(path: &Path) -> Option<Detached> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    pub fn write(&self, path: &Path) -> Result<(), folders::Error> {
        folders::write(path, &serde_json::to_vec(self).expect("plain data"))
    }

    pub fn alive(&self) -> bool {
        Detached::find(self.pid) == Some(*self)
    }

    /// `kill -9`, and waits until the kernel is done with it.
    pub fn kill(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while self.alive() {
            if Instant::now() >= deadline {
                return false;
            }
            // SAFETY: the id was ours a moment ago; ids are not given out again that quickly.
            unsafe { libc::kill(self.pid as libc::pid_t, libc::SIGKILL) };
            std::thread::sleep(POLL);
        }
        true
    }
}

/// What `/proc/PID/stat` says (proc_pid_stat(5)): fields 3, 20 and 22.
struct Stat {
    state: char,
    threads: u32,
    /// Clock ticks after boot.
    started: u64,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may hold anything.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some(Stat { state, threads: fields.nth(16)?.parse().ok()?, started: fields.nth(1)?.parse().ok()? })
}

/// Where a detached process lives.
pub struct Place<'a> {
    /// Its output is appended here.
    pub log: &'a Path,
    /// The file that stands for its network namespace; none is the caller's own.
    pub netns: Option<&'a Path>,
    /// Control groups that it and all its descendants belong to.
    pub cgroups: &'a [PathBuf],
}

/// Starts `command` in a session of its own.
pub fn spawn(mut command: Command, place: &Place) -> io::Result<Detached> {
    let log = OpenOptions::new().create(true).append(true).open(place.log)?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir("/");
    let netns = place.netns.map(File::open).transpose()?;
    let groups = place
        .cgroups
        .iter()
        .map(|group| CString::new(group.join("cgroup.procs").as_os_str().as_bytes()).map_err(io::Error::other))
        .collect::<io::Result<Vec<_>>>()?;
    // SAFETY: between fork and exec only system calls are made, on data that was prepared before and lives in the closure.
    unsafe {
        command.pre_exec(move || {
            if libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            for group in &groups {
                let file = libc::open(group.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                // "0" is the writing process itself.
                if file < 0 || libc::write(file, b"0".as_ptr().cast(), 1) != 1 {
                    return Err(io::Error::last_os_error());
                }
                libc::close(file);
            }
            match &netns {
                Some(netns) if libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) != 0 => {
                    Err(io::Error::last_os_error())
                }
                _ => Ok(()),
            }
        });
    }
    let child = command.spawn()?;
    // It may have ended already; then it is a zombie of ours, which counts as not alive.
    Ok(Detached::find(child.id()).unwrap_or(Detached { pid: child.id(), started: 0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_process_with_the_same_id_is_not_ours() {
        let own = Detached::find(std::process::id()).expect("we run");
        assert!(own.alive());
        assert!(!Detached { started: own.started + 1, ..own }.alive());
    }

    #[test]
    fn what_is_started_can_be_found_again_and_ended() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let log = folder.path().join("log");
        let mut command = Command::new("sleep");
        command.arg("600");
        let process = spawn(command, &Place { log: &log, netns: None, cgroups: &[] })?;
        process.write(&folder.path().join("p.json"))?;
        let found = Detached::read(&folder.path().join("p.json")).expect("just written");
        assert!(found.alive());
        assert!(found.kill(Duration::from_secs(5)));
        assert!(!found.alive());
        Ok(())
    }
}
