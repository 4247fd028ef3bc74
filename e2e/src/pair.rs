//! Two sidecars and one VM: the pair that Watari keeps, on the two sites of a [`TestBed`].
//!
//! Everything goes through the command line and the configuration files that users have; reports are read as JSON.
//! A move is what the operator will do: open the handover, start the target, migrate memory, wait for the role to change.

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use watari_wire::report::Report;

use crate::{
    build,
    libvirt::LibvirtSite,
    process::{Process, wait_until},
    qemu::{Backing, Machine, MigrationOptions, MigrationReport, Qemu, Start, migrate},
    site::{Site, TestBed},
};

const UUID: &str = "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10";
const PORT: u16 = 7070;
const GATEWAY_PORT: u16 = 7443;

/// A disk of the VM.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    pub name: &'static str,
    pub bytes: u64,
}

/// How the pair is configured.
#[derive(Clone, Debug)]
pub struct PairOptions {
    pub disks: Vec<DiskSpec>,
    /// As in the configuration file.
    pub interval: String,
    pub bandwidth: String,
    pub journal: String,
    /// Each site has a gateway, and its sidecar is reached through that alone.
    pub gateways: bool,
    /// Further lines of the configuration, top level first.
    pub extra: String,
    /// Tables after everything else.
    pub tables: String,
}

impl Default for PairOptions {
    fn default() -> Self {
        let disk = |name| DiskSpec { name, bytes: 128 << 20 };
        PairOptions {
            disks: vec![disk("root"), disk("data")],
            interval: "2s".into(),
            bandwidth: "unlimited".into(),
            journal: "1GiB".into(),
            gateways: false,
            extra: String::new(),
            tables: String::new(),
        }
    }
}

/// One end of the pair.
pub struct End {
    pub name: &'static str,
    pub config: PathBuf,
    pub sidecar: Option<Process>,
    gateway: Option<Process>,
    runtime: PathBuf,
    starts: u32,
}

/// Both ends.
pub struct Pair<'a> {
    pub bed: &'a TestBed,
    pub ends: [End; 2],
    pub options: PairOptions,
    /// The namespaces that the sidecars run in, where there are more than those of the network: as in a virt-launcher Pod.
    pods: Option<[&'a LibvirtSite; 2]>,
}

/// Where the sidecars of [`Pair::in_pods`] serve their disks, as seen inside; our webhook's emptyDir.
const POD_NBD_FOLDER: &str = "/run/watari";

/// What one move was like.
#[derive(Clone, Debug)]
pub struct Move {
    /// From "move" until the guest runs at the target and the source has released, seconds.
    pub seconds: f64,
    /// From opening the handover until memory migration began.
    pub converge_seconds: f64,
    pub memory: MigrationReport,
    /// Bytes that crossed the link in both directions.
    pub link_bytes: u64,
}

impl<'a> Pair<'a> {
    /// Certificates, images at site A, configurations at both. Nothing runs yet.
    pub fn new(bed: &'a TestBed, options: PairOptions) -> anyhow::Result<Self> {
        Pair::make(bed, options, None)
    }

    /// The same beside two libvirtd, as in virt-launcher Pods: sockets in a folder that both see under the same name, and
    /// our hook server where virt-launcher looks for it.
    pub fn in_pods(bed: &'a TestBed, pods: [&'a LibvirtSite; 2], options: PairOptions) -> anyhow::Result<Self> {
        for pod in pods {
            pod.folder_inside(POD_NBD_FOLDER)?;
            pod.sidecar_folder()?;
        }
        Pair::make(bed, options, Some(pods))
    }

    fn make(bed: &'a TestBed, options: PairOptions, pods: Option<[&'a LibvirtSite; 2]>) -> anyhow::Result<Self> {
        let pki = bed.dir.join("pki");
        let output = Command::new(build::binary("watari-sidecar")?)
            .args(["pki", "new", "--pair", UUID, "--site", "tokyo", "--site", "osaka", "--out"])
            .arg(&pki)
            .output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let unique = bed.dir.display().to_string().replace('/', "-");
        let end = |name| End {
            name,
            config: PathBuf::from("sidecar.toml"),
            sidecar: None,
            gateway: None,
            runtime: PathBuf::from(format!("/dev/shm/watari-e2e{unique}-{name}")),
            starts: 0,
        };
        let mut pair = Pair { bed, ends: [end("tokyo"), end("osaka")], options, pods };
        for index in [0, 1] {
            let text = pair.configuration(index, &pki)?;
            let path = pair.site(index).dir.join("sidecar.toml");
            std::fs::write(&path, text)?;
            pair.ends[index].config = path;
        }
        if pair.options.gateways {
            pair.start_gateway(0)?;
            pair.start_gateway(1)?;
        }
        for disk in &pair.options.disks {
            std::fs::File::create(bed.a.dir.join(format!("{}.img", disk.name)))?.set_len(disk.bytes)?;
        }
        Ok(pair)
    }

    fn configuration(&self, index: usize, pki: &std::path::Path) -> anyhow::Result<String> {
        let (site, peer) = (self.site(index), self.site(1 - index));
        let end = &self.ends[index];
        let dir = site.dir.display();
        let PairOptions { disks, interval, bandwidth, journal, gateways, extra, tables } = &self.options;
        let (listen, peer_port) =
            if *gateways { ("127.0.0.1".to_owned(), GATEWAY_PORT) } else { (site.address.to_string(), PORT) };
        let disks: String = disks
            .iter()
            .map(|d| {
                format!(
                    "[[disk]]\nname = \"{0}\"\npath = \"{dir}/{0}.img\"\nsize = \"{1}KiB\"\n",
                    d.name,
                    d.bytes >> 10
                )
            })
            .collect();
        let (nbd, hook) = match &self.pods {
            Some(pods) => {
                let hook = pods[index].sidecar_folder()?;
                (PathBuf::from(POD_NBD_FOLDER), format!("[hook]\ndir = \"{}\"\n", hook.display()))
            }
            None => (site.dir.join("nbd"), String::new()),
        };
        Ok(format!(
            "site = \"{name}\"\nfolder = \"{dir}/folder\"\nruntime_dir = \"{runtime}\"\nlisten = \"{listen}:{PORT}\"\n\
             interval = \"{interval}\"\nbandwidth = \"{bandwidth}\"\njournal = \"{journal}\"\n{extra}\n\
             [pair]\nid = \"{UUID}\"\nname = \"default/vm1\"\n{disks}[nbd]\ndir = \"{nbd}\"\n{hook}\
             [peer]\naddresses = [\"{peer}:{peer_port}\"]\n\
             [tls]\nca = \"{pki}/{name}/ca.crt\"\ncertificate = \"{pki}/{name}/tls.crt\"\nkey = \"{pki}/{name}/tls.key\"\n{tables}\n",
            nbd = nbd.display(),
            name = end.name,
            runtime = end.runtime.display(),
            peer = peer.address,
            pki = pki.display(),
        ))
    }

    fn start_gateway(&mut self, index: usize) -> anyhow::Result<()> {
        let site = self.site(index);
        let routes = site.dir.join("routes.json");
        let route = format!("{UUID}.pair.watari.internal");
        let text = serde_json::json!({"version": 1, "routes": {route: format!("127.0.0.1:{PORT}")}});
        std::fs::write(&routes, text.to_string())?;
        let listen = format!("{}:{GATEWAY_PORT}", site.address);
        let arguments = ["gateway", "--listen", &listen, "--routes", &routes.display().to_string()];
        self.ends[index].gateway = Some(site.sidecar("gateway", &arguments)?);
        Ok(())
    }

    /// The gateway of one site ends at once and another one takes its place.
    pub fn replace_gateway(&mut self, index: usize) -> anyhow::Result<()> {
        drop(self.ends[index].gateway.take().context("this pair has gateways")?);
        self.start_gateway(index)
    }

    pub fn site(&self, index: usize) -> &'a Site {
        if index == 0 { &self.bed.a } else { &self.bed.b }
    }

    pub fn image(&self, index: usize, disk: usize) -> PathBuf {
        self.site(index).dir.join(format!("{}.img", self.options.disks[disk].name))
    }

    pub fn images(&self, index: usize) -> Vec<PathBuf> {
        (0..self.options.disks.len()).map(|d| self.image(index, d)).collect()
    }

    /// The NBD exports of one end, for QEMU.
    pub fn backings(&self, index: usize) -> Vec<Backing> {
        let one = |d: &DiskSpec| Backing::Nbd { socket: self.socket(index, d.name), export: d.name.into() };
        self.options.disks.iter().map(one).collect()
    }

    /// Where the harness finds the NBD socket of a disk.
    pub fn socket(&self, index: usize, disk: &str) -> PathBuf {
        let folder = match &self.pods {
            Some(pods) => pods[index].inside(POD_NBD_FOLDER),
            None => self.site(index).dir.join("nbd"),
        };
        folder.join(format!("{disk}.sock"))
    }

    /// The control socket of one end.
    pub fn control_socket(&self, index: usize) -> PathBuf {
        self.site(index).dir.join("folder/control.sock")
    }

    /// Start `primary` or `replica` at one end and wait until it answers.
    pub fn start(&mut self, index: usize, role: &str) -> anyhow::Result<()> {
        let site = self.site(index);
        let end = &mut self.ends[index];
        end.starts += 1;
        let name = format!("{role}-{}", end.starts);
        let program = build::binary("watari-sidecar")?;
        let command = match &self.pods {
            Some(pods) => pods[index].command(site, &name, program),
            None => site.command(&name, program),
        };
        let process = command
            .args([role, "--log", "info,watari_sidecar=debug", "--config"])
            .arg(&end.config)
            .current_dir(&site.dir)
            .spawn()?;
        let process = end.sidecar.insert(process);
        let (deadline, config) = (Instant::now() + Duration::from_secs(90), end.config.clone());
        loop {
            process.check()?;
            if report(&config).is_ok_and(|r| !r.role.is_empty()) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{name} does not answer: {}", process.tail());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The process gives the folder up and ends, as a replica Pod does before the virt-launcher Pod takes over.
    pub fn release(&mut self, index: usize) -> anyhow::Result<()> {
        self.ctl(index, &["release"])?;
        if let Some(mut process) = self.ends[index].sidecar.take() {
            process.wait(Duration::from_secs(20))?;
        }
        Ok(())
    }

    /// The worker below the supervisor of one end, if there is one at this moment.
    pub fn worker(&self, index: usize) -> anyhow::Result<Option<i32>> {
        let supervisor = self.ends[index].sidecar.as_ref().context("no sidecar was started at this end")?.pid();
        let children = std::fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"))?;
        Ok(children.split_whitespace().next().map(str::parse).transpose()?)
    }

    /// `kill -9` of the worker; `false`: there was none at this moment.
    pub fn kill_worker(&self, index: usize) -> anyhow::Result<bool> {
        // The supervisor is ours and alive, so its child's number cannot have been given to somebody else.
        Ok(self.worker(index)?.is_some_and(|pid| unsafe { libc::kill(pid, libc::SIGKILL) } == 0))
    }

    /// `watari-sidecar ctl …`; its words, or why it was declined.
    pub fn ctl(&self, index: usize, arguments: &[&str]) -> anyhow::Result<String> {
        let output = Command::new(build::binary("watari-sidecar")?)
            .args(["ctl", "--config"])
            .arg(&self.ends[index].config)
            .args(arguments)
            .output()?;
        if !output.status.success() {
            bail!("ctl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    pub fn report(&self, index: usize) -> anyhow::Result<Report> {
        report(&self.ends[index].config)
    }

    /// Wait until a report satisfies `done`.
    pub fn wait(
        &mut self,
        index: usize,
        what: &str,
        timeout: Duration,
        mut done: impl FnMut(&Report) -> bool,
    ) -> anyhow::Result<Report> {
        let config = self.ends[index].config.clone();
        let mut last = None;
        let found = wait_until(what, timeout, || {
            let r = report(&config).ok()?;
            let ok = done(&r);
            last = Some(r.clone());
            ok.then_some(r)
        });
        if let Some(process) = &mut self.ends[index].sidecar {
            process.check()?;
        }
        found.with_context(|| format!("last report: {last:#?}"))
    }

    /// Wait until a generation cut from now on is committed.
    pub fn cut(&self, index: usize) -> anyhow::Result<String> {
        let said = self.ctl(index, &["--timeout", "300s", "cut", "--wait", "240s"])?;
        ensure!(said.contains("is committed"), "{said}");
        Ok(said)
    }

    /// Move the running VM from `from` to the other end: the replica gives way to a primary there, the handover is
    /// opened, memory migrates, the roles swap.
    pub fn move_vm(
        &mut self,
        from: usize,
        source: &Qemu,
        machine: &Machine,
        tag: &str,
    ) -> anyhow::Result<(Qemu, Move)> {
        let to = 1 - from;
        let began = Instant::now();
        let bytes = self.bed.wan.bytes_delivered();
        self.release(to)?;
        self.start(to, "primary")?;
        self.ctl(from, &["open-handover", "--vmi-uid", tag])?;
        self.wait(from, "the source to converge", Duration::from_secs(120), |r| {
            r.link.connected
                && r.role == "Converging"
                && r.generations.lag_bytes < 8 << 20
                && r.generations.committed_number > 0
        })?;
        self.wait(to, "the target to be attachable", Duration::from_secs(20), |r| r.attachable && r.link.connected)?;
        let converge_seconds = began.elapsed().as_secs_f64();
        let target = Qemu::start(self.site(to), &format!("vm-{tag}"), machine, &self.backings(to), Start::Incoming)?;
        let options = MigrationOptions::default();
        let memory = migrate(source, &target, self.site(to), &options)?;
        // An idle guest writes nothing by itself: the operator sees it running and asks.
        self.ctl(to, &["acquire"])?;
        self.wait(to, "the target to be active", Duration::from_secs(60), |r| r.role == "Serving")?;
        self.wait(from, "the source to be the replica", Duration::from_secs(60), |r| r.role == "Replica")?;
        let seconds = began.elapsed().as_secs_f64();
        let link_bytes = self.bed.wan.bytes_delivered() - bytes;
        Ok((target, Move { seconds, converge_seconds, memory, link_bytes }))
    }
}

impl Drop for Pair<'_> {
    fn drop(&mut self) {
        for end in &mut self.ends {
            drop(end.sidecar.take());
            drop(end.gateway.take());
            let _ = std::fs::remove_dir_all(&end.runtime);
        }
    }
}

fn report(config: &std::path::Path) -> anyhow::Result<Report> {
    let output = Command::new(build::binary("watari-sidecar")?)
        .args(["status", "--once", "--json", "--config"])
        .arg(config)
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(serde_json::from_slice(&output.stdout)?)
}
