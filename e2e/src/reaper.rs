//! Nothing is left behind: whatever a harness process makes on the machine carries its process id, and a small shell that
//! outlives it takes that away again, however the process ended.
//!
//! - namespaces are named `watari-PID-…`, scratch folders are `target/e2e/run/PID`;
//! - [`arm`] starts the shell once per process; it does nothing until its standard input closes, which the kernel does
//!   for us on exit, panic, Ctrl-C and `kill -9` alike;
//! - [`sweep_stale`] does the same for processes whose shell died too (the machine was reset, both were killed).
//!
//! Child processes die on their own (see [`crate::process`]). Set `WATARI_E2E_KEEP=1` to keep the scratch folders.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// Prefix of every namespace of ours.
pub const PREFIX: &str = "watari-";

/// The cleanup itself: kill what still runs inside, drop mounts below the scratch folder, remove namespaces and folder.
const CLEANUP: &str = r#"
pid=$1 run=$2 keep=$3
for ns in /run/netns/watari-"$pid"-*; do
    [ -e "$ns" ] || continue
    name=${ns##*/}
    for member in $(ip netns pids "$name" 2>/dev/null); do kill -9 "$member" 2>/dev/null; done
    ip netns delete "$name"
done
while read -r _ mount _; do
    case $mount in "$run"/*) umount -l "$mount" ;; esac
done </proc/mounts
[ -n "$keep" ] || rm -rf "$run"
"#;

/// The workspace's folder for everything that the harness makes: `target/e2e`.
pub fn cache_folder() -> PathBuf {
    crate::build::target_folder().join("e2e")
}

/// This process's own scratch folder. Made on first use; removed when the process has ended.
pub fn run_folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        arm();
        let folder = cache_folder().join("run").join(std::process::id().to_string());
        std::fs::create_dir_all(&folder).expect("the target folder is writable: cargo has just built into it");
        folder
    })
}

/// Starts the cleaning shell for this process and sweeps what dead ones left. Any number of calls; the first counts.
pub fn arm() {
    static SHELL: OnceLock<Option<File>> = OnceLock::new();
    SHELL.get_or_init(|| {
        sweep_stale();
        let mut shell = cleanup(std::process::id(), "trap '' INT TERM HUP; cat >/dev/null");
        shell.stdin(Stdio::piped());
        // SAFETY: setsid only detaches the shell from our terminal, so that Ctrl-C does not reach it.
        unsafe {
            shell.pre_exec(|| {
                libc::setsid();
                Ok(())
            })
        };
        let stdin = shell.spawn().ok()?.stdin.take()?;
        Some(File::from(std::os::fd::OwnedFd::from(stdin)))
    });
}

fn cleanup(pid: u32, before: &str) -> Command {
    let keep = std::env::var("WATARI_E2E_KEEP").unwrap_or_default();
    let run = cache_folder().join("run").join(pid.to_string());
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(format!("{before}\n{CLEANUP}")).arg("watari-reaper").arg(pid.to_string()).arg(run).arg(keep);
    shell.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    shell
}

/// Removes namespaces and folders of ours whose process no longer exists. Returns the process ids that were swept.
pub fn sweep_stale() -> Vec<u32> {
    let names = |folder: PathBuf| {
        std::fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
    };
    let mut pids: Vec<u32> = names("/run/netns".into())
        .filter_map(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok())
        .chain(names(cache_folder().join("run")).filter_map(|name| name.parse().ok()))
        .filter(|pid| !Path::new(&format!("/proc/{pid}")).exists())
        .collect();
    pids.sort_unstable();
    pids.dedup();
    for &pid in &pids {
        // A failure is not ours to report: the next sweep tries again.
        let _ = cleanup(pid, "").status();
    }
    pids
}
