//! Under which conditions something was measured.

use std::process::Command;

use serde::{Deserialize, Serialize};

/// Everything a reader needs to judge a figure, and no name of a machine.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Conditions {
    pub date: String,
    pub commit: String,
    /// Load average over one minute before the figure began.
    pub load: String,
    pub processor: String,
    pub cores: usize,
    pub memory: String,
    pub kernel: String,
    /// "QEMU 10.0.2", …
    pub versions: Vec<String>,
}

/// Programs whose versions matter, and how they say it.
const PROGRAMS: [(&str, &[&str]); 7] = [
    ("qemu-system-x86_64", &["--version"]),
    ("nbdkit", &["--version"]),
    ("nbdcopy", &["--version"]),
    ("fio", &["--version"]),
    ("rsync", &["--version"]),
    ("ssh", &["-V"]),
    ("rustc", &["--version"]),
];

/// What a program prints first, trimmed; empty when it cannot be run.
fn said(program: &str, arguments: &[&str]) -> String {
    let Ok(output) = Command::new(program).args(arguments).current_dir(crate::build::workspace()).output() else {
        return String::new();
    };
    let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
    String::from_utf8_lossy(&text).lines().next().unwrap_or_default().trim().to_owned()
}

fn file_line(path: &str, key: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
    line.split_once(':').map_or(line, |(_, value)| value).trim().to_owned()
}

impl Conditions {
    /// As they are now.
    pub fn now() -> Conditions {
        let dirty = if said("git", &["status", "--porcelain", "--untracked-files=no"]).is_empty() { "" } else { "+" };
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Conditions {
            date: said("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
            commit: format!("{}{dirty}", said("git", &["rev-parse", "--short", "HEAD"])),
            load: load.split_whitespace().next().unwrap_or_default().to_owned(),
            processor: file_line("/proc/cpuinfo", "model name"),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory: file_line("/proc/meminfo", "MemTotal"),
            kernel: said("uname", &["-sr"]),
            versions: PROGRAMS.iter().map(|(program, arguments)| said(program, arguments)).collect(),
        }
    }

    /// Machine and versions, in a sentence or two.
    pub fn machine(&self) -> String {
        format!(
            "Machine: {} cores of {}, {} of memory, {}; no KVM (QEMU runs under TCG, so a guest needs a core of its own); shared with \
             other work, whose share the load tells. Versions: {}.",
            self.cores,
            self.processor,
            self.memory,
            self.kernel,
            self.versions.join("; ")
        )
    }
}
