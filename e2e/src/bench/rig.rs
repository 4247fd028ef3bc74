//! Two sidecars without a VM and without a WAN: both ends on the loopback of one namespace, with their mTLS.
//!
//! For figures of the NBD server, the tracker and the stream themselves. [`crate::pair::Pair`] is the one with a link.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use watari_wire::report::Report;

use super::peers;
use crate::{
    build,
    netns::Netns,
    process::{Builder, Process},
    reaper,
};

/// Folders of ours on the tmpfs.
const RUNTIME_PREFIX: &str = "watari-bench";
const UUID: &str = "0b6f8c52-2f0e-4d6f-9a41-6f4f0a1be9c7";
const PORT: u16 = 7070;
const START: Duration = Duration::from_secs(60);

/// How a rig is made.
#[derive(Clone, Debug)]
pub struct RigOptions {
    /// Name, size, and the source's image if it is not a sparse file of the rig's own.
    pub disks: Vec<(&'static str, u64, Option<PathBuf>)>,
    pub interval: &'static str,
    pub bandwidth: &'static str,
    pub journal: &'static str,
    /// Further lines of the configuration, top level.
    pub extra: String,
    /// Tables after everything else.
    pub tables: String,
}

impl Default for RigOptions {
    fn default() -> Self {
        RigOptions {
            disks: Vec::new(),
            interval: "10s",
            bandwidth: "unlimited",
            journal: "2GiB",
            extra: String::new(),
            tables: String::new(),
        }
    }
}

/// The two ends: 0 is where the VM would run.
pub struct Rig {
    pub netns: Netns,
    pub dir: PathBuf,
    pub options: RigOptions,
    pub processes: [Option<Process>; 2],
    runtimes: [PathBuf; 2],
}

const NAMES: [&str; 2] = ["tokyo", "osaka"];

impl Rig {
    /// Certificates, configurations, a sparse image at the source for each disk. Nothing runs yet.
    pub fn new(label: &str, options: RigOptions) -> anyhow::Result<Rig> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let dir = reaper::run_folder().join(format!("{label}-rig{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir_all(&dir)?;
        let pki = dir.join("pki");
        let mut command = Command::new(build::binary("watari-sidecar")?);
        command.args(["pki", "new", "--pair", UUID, "--site", NAMES[0], "--site", NAMES[1], "--out"]).arg(&pki);
        let output = command.output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        sweep();
        let unique = dir.display().to_string().replace('/', "-");
        let runtimes = NAMES.map(|name| PathBuf::from(format!("/dev/shm/{RUNTIME_PREFIX}{unique}-{name}")));
        let rig = Rig { netns: Netns::create(label)?, dir, options, processes: [None, None], runtimes };
        for end in [0, 1] {
            std::fs::create_dir_all(rig.end_dir(end))?;
            std::fs::write(rig.config(end), rig.configuration(end, &pki))?;
        }
        for (disk, (_, bytes, image)) in rig.options.disks.iter().enumerate() {
            if image.is_none() {
                std::fs::File::create(rig.image(0, disk))?.set_len(*bytes)?;
            }
        }
        Ok(rig)
    }

    fn configuration(&self, end: usize, pki: &Path) -> String {
        let RigOptions { disks, interval, bandwidth, journal, extra, tables } = &self.options;
        let mut text = format!(
            "site = \"{name}\"\nfolder = \"{dir}/folder\"\nruntime_dir = \"{runtime}\"\nlisten = \"127.0.0.1:{port}\"\n\
             interval = \"{interval}\"\nbandwidth = \"{bandwidth}\"\njournal = \"{journal}\"\n{extra}\n\
             [pair]\nid = \"{UUID}\"\nname = \"bench/vm1\"\n[nbd]\ndir = \"{dir}/nbd\"\n\
             [peer]\naddresses = [\"127.0.0.1:{peer}\"]\n\
             [tls]\nca = \"{pki}/{name}/ca.crt\"\ncertificate = \"{pki}/{name}/tls.crt\"\nkey = \"{pki}/{name}/tls.key\"\n{tables}\n",
            name = NAMES[end],
            dir = self.end_dir(end).display(),
            runtime = self.runtimes[end].display(),
            port = PORT + end as u16,
            peer = PORT + 1 - end as u16,
            pki = pki.display(),
        );
        for (disk, (name, bytes, _)) in disks.iter().enumerate() {
            let (path, kib) = (self.image(end, disk), bytes >> 10);
            text += &format!("[[disk]]\nname = \"{name}\"\npath = \"{}\"\nsize = \"{kib}KiB\"\n", path.display());
        }
        text
    }

    pub fn end_dir(&self, end: usize) -> PathBuf {
        self.dir.join(NAMES[end])
    }
    pub fn config(&self, end: usize) -> PathBuf {
        self.end_dir(end).join("sidecar.toml")
    }
    pub fn image(&self, end: usize, disk: usize) -> PathBuf {
        let (name, _, image) = &self.options.disks[disk];
        image.clone().filter(|_| end == 0).unwrap_or_else(|| self.end_dir(end).join(format!("{name}.img")))
    }
    pub fn socket(&self, end: usize, disk: usize) -> PathBuf {
        self.end_dir(end).join("nbd").join(format!("{}.sock", self.options.disks[disk].0))
    }
    /// Where the guest would find the disk.
    pub fn uri(&self, disk: usize) -> String {
        peers::uri(&self.socket(0, disk), self.options.disks[disk].0)
    }

    /// A sidecar that is not yet started.
    pub fn command(&self, end: usize, role: &str, flags: &[&str]) -> anyhow::Result<Builder> {
        let binary = build::binary("watari-sidecar")?;
        let log = self.end_dir(end).join(format!("{role}.log"));
        let builder = Builder::new(format!("{role}@{}", NAMES[end]), binary, log).netns(&self.netns);
        Ok(builder.current_dir(self.end_dir(end)).args([role, "--config", "sidecar.toml"]).args(flags))
    }

    /// Starts one and waits until it answers.
    pub fn start(&mut self, end: usize, role: &str, flags: &[&str]) -> anyhow::Result<()> {
        let process = self.command(end, role, flags)?.spawn()?;
        self.processes[end] = Some(process);
        self.wait(end, "its start", START, |report| !report.role.is_empty()).map(drop)
    }

    /// Replica, primary, and the first generation committed.
    pub fn start_pair(&mut self) -> anyhow::Result<()> {
        self.start(1, "replica", &[])?;
        self.start(0, "primary", &[])?;
        self.cut().map(drop)
    }

    pub fn ctl(&self, end: usize, arguments: &[&str]) -> anyhow::Result<String> {
        let binary = build::binary("watari-sidecar")?;
        let output = Command::new(binary).args(["ctl", "--config"]).arg(self.config(end)).args(arguments).output()?;
        if !output.status.success() {
            bail!("ctl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// A generation cut from now on is committed.
    pub fn cut(&self) -> anyhow::Result<String> {
        let said = self.ctl(0, &["--timeout", "600s", "cut", "--wait", "590s"])?;
        ensure!(said.contains("is committed"), "{said}");
        Ok(said)
    }

    pub fn report(&self, end: usize) -> anyhow::Result<Report> {
        let binary = build::binary("watari-sidecar")?;
        let mut command = Command::new(binary);
        let output = command.args(["status", "--once", "--json", "--config"]).arg(self.config(end)).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Waits until a report satisfies `done`.
    pub fn wait(
        &mut self,
        end: usize,
        what: &str,
        timeout: Duration,
        done: impl Fn(&Report) -> bool,
    ) -> anyhow::Result<Report> {
        let deadline = Instant::now() + timeout;
        loop {
            self.processes[end].as_mut().context("it runs")?.check()?;
            let report = self.report(end);
            match &report {
                Ok(report) if done(report) => return Ok(report.clone()),
                _ if Instant::now() >= deadline => bail!("waited in vain for {what}: {report:#?}"),
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

/// Removes what rigs of killed processes left in memory; their folders' names hold the process id.
fn sweep() {
    for entry in std::fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(RUNTIME_PREFIX).and_then(|rest| rest.split("-e2e-run-").nth(1)?.split('-').next());
        if pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for (process, runtime) in self.processes.iter_mut().zip(&self.runtimes) {
            drop(process.take());
            let _ = std::fs::remove_dir_all(runtime);
        }
        if std::env::var_os("WATARI_E2E_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}
