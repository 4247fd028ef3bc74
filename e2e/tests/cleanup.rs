//! However a harness process ends, nothing of it stays on the machine.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use watari_e2e::process::{Builder, wait_until};
use watari_e2e::{netns, reaper};

/// The kernel and the reaper need a moment; this is far more.
const GONE: Duration = Duration::from_secs(10);

struct Running {
    child: Child,
    made: HashMap<String, String>,
}

/// Starts the test bed program with a guest and reads what it made.
fn start() -> anyhow::Result<Running> {
    netns::require_root()?;
    // In a group of its own, so that a Ctrl-C can be imitated by a signal to the group.
    let mut command = Command::new(env!("CARGO_BIN_EXE_watari-testbed"));
    command.args(["--vm", "1", "rate=1G", "delay=1ms"]).stdout(Stdio::piped()).process_group(0);
    // SAFETY: one system call between fork and exec.
    unsafe {
        command.pre_exec(|| {
            // As at a terminal: what a shell starts in the background, these tests for one, ignores it.
            libc::signal(libc::SIGINT, libc::SIG_DFL);
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    let out = BufReader::new(child.stdout.take().context("piped")?);
    let mut made = HashMap::new();
    for line in out.lines() {
        let line = line?;
        match line.split_once(' ') {
            Some((name, value)) => drop(made.insert(name.to_owned(), value.to_owned())),
            None => break,
        }
    }
    ensure!(made.contains_key("vm-pid"), "the test bed did not come up: {made:?}");
    Ok(Running { child, made })
}

impl Running {
    fn paths(&self) -> Vec<PathBuf> {
        let netns = |site: &str| Path::new("/run/netns").join(&self.made[&format!("netns-{site}")]);
        let run = reaper::cache_folder().join("run").join(self.child.id().to_string());
        vec![netns("a"), netns("b"), Path::new("/proc").join(&self.made["vm-pid"]), run]
    }

    fn end_by(&mut self, signal: libc::c_int) -> anyhow::Result<()> {
        let paths = self.paths();
        for path in &paths {
            ensure!(path.exists(), "{} should exist before the end", path.display());
        }
        // SAFETY: signals the process group that was made for this child, which has not been reaped.
        unsafe { libc::kill(-(self.child.id() as libc::pid_t), signal) };
        self.child.wait()?;
        wait_until("everything to be gone", GONE, || paths.iter().all(|path| !path.exists()).then_some(()))?;
        Ok(())
    }
}

#[test]
fn ctrl_c_leaves_no_process_namespace_or_folder() -> anyhow::Result<()> {
    start()?.end_by(libc::SIGINT)
}

#[test]
fn sigterm_leaves_no_process_namespace_or_folder() -> anyhow::Result<()> {
    start()?.end_by(libc::SIGTERM)
}

#[test]
fn kill_9_leaves_no_process_namespace_or_folder() -> anyhow::Result<()> {
    start()?.end_by(libc::SIGKILL)
}

#[test]
fn a_contained_daemon_takes_its_children_with_it() -> anyhow::Result<()> {
    netns::require_root()?;
    let log = reaper::run_folder().join("daemon.log");
    // A daemon that makes a child in a session of its own, as libvirtd does with QEMU. The odd number finds it again.
    let mut daemon =
        Builder::new("daemon", "sh", &log).args(["-c", "setsid sleep 98765 & sleep 98764"]).contained().spawn()?;
    let running = || {
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let lines = processes.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
        lines.filter(|line| line.starts_with(b"sleep\09876")).count()
    };
    wait_until("both to run", GONE, || (running() == 2).then_some(()))?;
    daemon.kill9();
    wait_until("both to be gone", GONE, || (running() == 0).then_some(()))?;
    Ok(())
}

#[test]
fn what_even_the_reaper_left_is_swept_by_the_next_run() -> anyhow::Result<()> {
    netns::require_root()?;
    // A process id that existed and is gone: a child that has been reaped.
    let mut child = Command::new("true").spawn()?;
    child.wait()?;
    let stale = format!("{}{}-0-a", reaper::PREFIX, child.id());
    netns::ip(&["netns", "add", &stale])?;
    let folder = reaper::cache_folder().join("run").join(child.id().to_string());
    std::fs::create_dir_all(folder.join("a"))?;
    let swept = reaper::sweep_stale();
    ensure!(swept.contains(&child.id()), "{swept:?}");
    ensure!(!Path::new("/run/netns").join(&stale).exists() && !folder.exists());
    Ok(())
}
