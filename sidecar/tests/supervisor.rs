//! The real binary as supervisor, with a shell script as a fake worker (`--fake-worker`): restarts, signals, ends.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant, SystemTime},
};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use support::{Folder, PAIR, authority, config_text, identity};
use watari_sidecar::pki::Validity;

const PATIENCE: Duration = Duration::from_secs(20);

/// A supervisor whose fake worker appends `<pid> <nanoseconds since 1970> <arguments>` to `starts`, then runs `body`.
struct Supervised {
    folder: Folder,
    child: Child,
}

impl Supervised {
    fn start(body: &str) -> Supervised {
        let ca = authority("both");
        let folder = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), Validity::days(1));
        fs::write(folder.path("config.toml"), config_text(folder.dir.path())).unwrap();
        fs::write(folder.path("root.img"), vec![0; 1 << 20]).unwrap();
        fs::write(folder.path("starts"), "").unwrap();
        let script = folder.path("fake-worker");
        let text =
            format!("#!/bin/sh\ncd {}\necho $$ $(date +%s%N) \"$@\" >> starts\n{body}\n", folder.dir.path().display());
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_watari-sidecar"))
            .args(["primary", "--log", "off", "--config"])
            .arg(folder.path("config.toml"))
            .arg("--fake-worker")
            .arg(&script)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Supervised { folder, child }
    }

    fn starts(&self) -> Vec<(Pid, u128, String)> {
        let text = fs::read_to_string(self.folder.path("starts")).unwrap();
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        complete
            .lines()
            .map(|line| {
                let mut parts = line.splitn(3, ' ');
                let pid = Pid::from_raw(parts.next().unwrap().parse().unwrap()).unwrap();
                (pid, parts.next().unwrap().parse().unwrap(), parts.next().unwrap().to_owned())
            })
            .collect()
    }

    /// Waits for the `count`-th start.
    fn started(&self, count: usize) -> (Pid, u128, String) {
        wait_for(|| self.starts().get(count - 1).cloned())
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn ended(&mut self) -> ExitStatus {
        wait_for(|| self.child.try_wait().unwrap())
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path(name)
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "it did not happen within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn now_nanos() -> u128 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos()
}

fn gone(pid: Pid) -> bool {
    let state = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    // A zombie is as good as gone: it runs nothing.
    test_kill_process(pid).is_err() || state.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
}

fn touch(path: &Path) {
    fs::write(path, "").unwrap();
}

#[test]
fn a_killed_worker_is_replaced_in_well_under_100_ms() {
    let supervised = Supervised::start("exec sleep 600");
    let mut pauses_ms = Vec::new();
    for round in 1..=4 {
        let (pid, _, arguments) = supervised.started(round);
        assert!(arguments.ends_with(&format!("--worker --restarts {}", round - 1)), "{arguments}");
        let killed = now_nanos();
        kill_process(pid, Signal::KILL).unwrap();
        let (_, started, _) = supervised.started(round + 1);
        pauses_ms.push(started.saturating_sub(killed) / 1_000_000);
    }
    // The script's own start (a shell and `date`) counts too, and the machine may be busy: the best of four must be good.
    assert!(*pauses_ms.iter().min().unwrap() < 100, "{pauses_ms:?} ms");
}

#[test]
fn after_five_crashes_the_next_worker_is_asked_to_be_a_pass_through() {
    let supervised = Supervised::start("case \"$*\" in *--pass-through*) exec sleep 600;; esac\nkill -ABRT $$");
    let (_, _, arguments) = supervised.started(6);
    assert!(arguments.ends_with("--worker --restarts 5 --pass-through"), "{arguments}");
    assert!(supervised.starts()[..5].iter().all(|(_, _, arguments)| !arguments.contains("--pass-through")));
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(supervised.starts().len(), 6, "the pass-through stays");
}

#[test]
fn a_failing_worker_is_replaced_and_a_deliberate_end_is_passed_on() {
    let mut supervised = Supervised::start("[ -e second ] && exit 0\ntouch second\nexit 70");
    assert_eq!(supervised.ended().code(), Some(0));
    assert_eq!(supervised.starts().len(), 2);
}

#[test]
fn a_refusal_of_the_first_worker_is_passed_on_and_not_tried_again() {
    let mut supervised = Supervised::start("exit 2");
    assert_eq!(supervised.ended().code(), Some(2));
    assert_eq!(supervised.starts().len(), 1);
}

#[test]
fn a_refusal_after_a_crash_is_tried_again_because_a_vm_may_depend_on_it() {
    let mut supervised =
        Supervised::start("[ -e crashed ] || { touch crashed; kill -9 $$; }\n[ -e repaired ] && exit 0\nexit 2");
    supervised.started(3);
    touch(&supervised.path("repaired"));
    assert_eq!(supervised.ended().code(), Some(0));
}

#[test]
fn a_signal_to_end_reaches_the_worker_which_decides_when() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let body = "trap 'touch asked' TERM\ntouch ready\nwhile ! [ -e guest-gone ]; do sleep 0.02; done\nexit 0";
        let mut supervised = Supervised::start(body);
        wait_for(|| supervised.path("ready").exists().then_some(()));
        supervised.signal(signal);
        wait_for(|| supervised.path("asked").exists().then_some(()));
        std::thread::sleep(Duration::from_millis(100));
        assert!(supervised.child.try_wait().unwrap().is_none(), "the guest is still there");
        touch(&supervised.path("guest-gone"));
        assert_eq!(supervised.ended().code(), Some(0));
        assert_eq!(supervised.starts().len(), 1);
    }
}

#[test]
fn a_worker_that_crashes_while_it_drains_is_replaced_by_one_that_drains() {
    // It has no handler for SIGTERM yet, so the signal kills it.
    let mut supervised = Supervised::start("case \"$*\" in *--draining*) exit 0;; esac\nexec sleep 600");
    supervised.started(1);
    supervised.signal(Signal::TERM);
    assert_eq!(supervised.ended().code(), Some(0));
    let starts = supervised.starts();
    assert!(starts[1].2.ends_with("--worker --restarts 1 --draining"), "{}", starts[1].2);
}

#[test]
fn a_killed_supervisor_takes_its_worker_with_it() {
    let mut supervised = Supervised::start("exec sleep 600");
    let (worker, _, _) = supervised.started(1);
    assert!(!gone(worker));
    supervised.signal(Signal::KILL);
    supervised.ended();
    wait_for(|| gone(worker).then_some(()));
}

#[test]
fn as_first_process_of_a_container_it_reaps_orphans() {
    // `unshare` makes a process namespace in which the supervisor is process 1, as in a container.
    let ca = authority("both");
    let folder = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), Validity::days(1));
    fs::write(folder.path("config.toml"), config_text(folder.dir.path())).unwrap();
    fs::write(folder.path("root.img"), vec![0; 1 << 20]).unwrap();
    let script = folder.path("fake-worker");
    // Each subshell ends before its own child, which then belongs to process 1. Zombies are counted at the end.
    let body = "#!/bin/sh\nfor i in 1 2 3 4 5; do (sleep 0.05 &) ; done\nsleep 0.5\n\
                cat /proc/[0-9]*/stat | grep -c ' Z ' > \"$(dirname \"$0\")/zombies\"\nexit 0\n";
    fs::write(&script, body).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let status = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "--kill-child"])
        .arg(env!("CARGO_BIN_EXE_watari-sidecar"))
        .args(["primary", "--log", "off", "--config"])
        .arg(folder.path("config.toml"))
        .arg("--fake-worker")
        .arg(&script)
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
    assert_eq!(fs::read_to_string(folder.path("zombies")).unwrap().trim(), "0");
}

#[test]
fn with_json_logs_every_line_is_an_object_and_a_crash_is_one_of_them() {
    let supervised = Supervised::start("exec sleep 600");
    supervised.started(1);
    let script = supervised.path("crashes-once");
    fs::write(&script, "#!/bin/sh\n[ -e \"$0.done\" ] && exit 0\ntouch \"$0.done\"\nkill -9 $$\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_watari-sidecar"))
        .args(["primary", "--log-format", "json", "--config"])
        .arg(supervised.path("config.toml"))
        .arg("--fake-worker")
        .arg(&script)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let crash = lines.iter().find(|line| line["ended"] == "signal 9").unwrap_or_else(|| panic!("{text}"));
    assert_eq!((&crash["level"], &crash["crashes"]), (&"ERROR".into(), &1.into()));
}

#[test]
fn a_bad_configuration_starts_no_worker_at_all() {
    let supervised = Supervised::start("exec sleep 600");
    supervised.started(1);
    fs::write(supervised.path("bad.toml"), "site = 5\n").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_watari-sidecar"))
        .args(["replica", "--config"])
        .arg(supervised.path("bad.toml"))
        .arg("--fake-worker")
        .arg(supervised.path("fake-worker"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("bad.toml:1: `site`: found 5"));
    assert_eq!(supervised.starts().len(), 1);
}
