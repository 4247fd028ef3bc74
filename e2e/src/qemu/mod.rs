//! QEMU: one machine shape for both sites, started in a site's namespace, driven over QMP.
//!
//! Always `-accel tcg`: the test machines have no KVM, and figures are ratios. Disks are files or NBD exports on a unix
//! socket with `reconnect-delay` 120 s and `rerror`/`werror` `stop`, as the domain rewrite asks libvirt for.

mod migrate;
mod qmp;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

pub use migrate::start as start_migration;
pub use migrate::{Migration, Options as MigrationOptions, Report as MigrationReport, migrate, prepare_target};
pub use qmp::{Event, Qmp};

use crate::guest::{self, BootFiles, Control};
use crate::process::{self, Builder, Process, wait_until};
use crate::site::Site;

/// Why a machine does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Process(#[from] process::Error),
    #[error(transparent)]
    Guest(#[from] guest::Error),
    #[error("QMP of {machine}: {source}")]
    Connection { machine: String, source: std::io::Error },
    #[error("{machine} did not answer {command} within {seconds:.1} s")]
    NoAnswer { machine: String, command: String, seconds: f64 },
    #[error("{machine} refuses {command}: {class}: {message}")]
    Refused { machine: String, command: String, class: String, message: String },
    #[error("{machine} did not report {event} within {seconds:.1} s; it said: {said}")]
    NoEvent { machine: String, event: String, seconds: f64, said: String },
    #[error("the migration of {machine} ended as {status}: {reason}")]
    Migration { machine: String, status: String, reason: String },
}

/// Seconds that QEMU holds requests while an NBD server is away (design §3.1: 120 s or more).
pub const RECONNECT_DELAY_SECONDS: u32 = 120;
/// QEMU under TCG opens its QMP socket within a fraction of this.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// The program, as Debian names it.
const PROGRAM: &str = "qemu-system-x86_64";

/// What a machine looks like to its guest: identical at both sites, or migration is refused.
#[derive(Clone, Debug)]
pub struct Machine {
    pub memory_mib: u32,
    pub cpus: u32,
    /// Serial numbers of the virtio disks, in order.
    pub disks: Vec<String>,
    /// Settings of the guest (`rate=2500000`), see `watari-guest`'s `settings.rs`.
    pub guest: Vec<String>,
}

impl Machine {
    /// A small machine with `disks` disks, whose guest waits for `resume`.
    pub fn small(disks: usize) -> Machine {
        Machine {
            memory_mib: 192,
            cpus: 1,
            disks: (0..disks).map(|number| format!("disk{number}")).collect(),
            guest: Vec::new(),
        }
    }
    /// Adds a setting of the guest.
    pub fn with(mut self, setting: impl Into<String>) -> Machine {
        self.guest.push(setting.into());
        self
    }
}

/// Where a site keeps a disk's content.
#[derive(Clone, Debug)]
pub enum Backing {
    /// A raw file.
    File(PathBuf),
    /// An NBD server on a unix socket: our sidecar.
    Nbd { socket: PathBuf, export: String },
}

/// How a machine starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Boots at once.
    Boot,
    /// Waits for a migration to come in, then runs.
    Incoming,
    /// Waits for a migration to come in, then for `cont`, as libvirt has it.
    IncomingStopped,
}

/// A running QEMU. Killed when dropped.
pub struct Qemu {
    pub name: String,
    pub process: Process,
    pub qmp: Qmp,
    folder: PathBuf,
}

impl Qemu {
    /// Starts a machine at a site; `disks` in the order of `machine.disks`. Files go to `SITE/NAME.*`.
    pub fn start(site: &Site, name: &str, machine: &Machine, disks: &[Backing], start: Start) -> Result<Qemu, Error> {
        assert_eq!(disks.len(), machine.disks.len(), "one backing per disk");
        let boot = BootFiles::prepare()?;
        let folder = site.dir.clone();
        let path = |ending: &str| folder.join(format!("{name}.{ending}"));
        for ending in ["qmp", "control", "tty"] {
            let _ = std::fs::remove_file(path(ending));
        }
        let full_name = format!("{name}@{}", site.name);
        let mut command = Builder::new(&full_name, PROGRAM, path("log")).netns(&site.netns);
        command = command.args(arguments(machine, &boot, &folder, name));
        for (number, (serial, backing)) in machine.disks.iter().zip(disks).enumerate() {
            let blockdev = blockdev(&node(number), backing);
            command = command.arg("-blockdev").arg(blockdev.to_string()).arg("-device").arg(format!(
                "virtio-blk-pci,drive={},serial={serial},rerror=stop,werror=stop,id=virtio-{}",
                node(number),
                node(number)
            ));
        }
        command = match start {
            Start::Boot => command,
            Start::Incoming => command.args(["-incoming", "defer"]),
            Start::IncomingStopped => command.args(["-incoming", "defer", "-S"]),
        };
        let mut process = command.spawn()?;
        let connected = wait_until("QMP", START_TIMEOUT, || match process.check() {
            Err(error) => Some(Err(error.into())),
            Ok(()) => Qmp::connect(&full_name, &path("qmp")).ok().map(Ok::<Qmp, Error>),
        });
        let seconds = START_TIMEOUT.as_secs_f64();
        let no_answer = |_| Error::NoAnswer { machine: full_name.clone(), command: "its start".into(), seconds };
        let qmp = connected.map_err(no_answer)??;
        Ok(Qemu { name: full_name, process, qmp, folder: path("") })
    }

    /// The host's end of the guest's control line.
    pub fn control_socket(&self) -> PathBuf {
        self.folder.with_extension("control")
    }
    /// The host's end of the guest's serial line (a control line too, with the guest's setting `control=ttyS0`).
    pub fn serial_socket(&self) -> PathBuf {
        self.folder.with_extension("tty")
    }
    /// What the guest's kernel and program print.
    pub fn serial_log(&self) -> PathBuf {
        self.folder.with_extension("serial")
    }
    /// A client of the guest.
    pub fn control(&self) -> Control {
        Control::new(self.control_socket())
    }

    /// `query-status`: running, paused, io-error, inmigrate, postmigrate …
    pub fn status(&self) -> Result<String, Error> {
        let answer = self.qmp.execute("query-status", json!({}))?;
        Ok(answer.get("status").and_then(Value::as_str).unwrap_or_default().to_owned())
    }

    /// Ends the process in good order: QEMU flushes and closes its disks.
    pub fn quit(mut self) -> Result<(), Error> {
        // The answer may be lost with the process; what counts is that it ends.
        let _ = self.qmp.execute("quit", json!({}));
        self.process.wait(Duration::from_secs(20))?;
        self.process.kill9();
        Ok(())
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        self.process.kill9();
    }
}

/// The block node of disk `number`.
pub fn node(number: usize) -> String {
    format!("disk{number}")
}

fn arguments(machine: &Machine, boot: &BootFiles, folder: &Path, name: &str) -> Vec<String> {
    let path = |ending: &str| folder.join(format!("{name}.{ending}")).display().to_string();
    let settings: String = machine.guest.iter().map(|setting| format!(" watari.{setting}")).collect();
    // panic=-1 with -no-reboot turns a panic into QEMU's end; the second line spares work that costs half a second here.
    let append = format!(
        "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on \
         nokaslr no_timer_check lsm=capability audit=0 cryptomgr.notests{settings}"
    );
    [
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-machine",
        "q35,accel=tcg,usb=off,vmport=off",
        "-cpu",
        "qemu64,+rdrand",
        "-smp",
        &machine.cpus.to_string(),
        "-m",
        &format!("{}M", machine.memory_mib),
        "-rtc",
        "base=utc,clock=host",
        "-kernel",
        &boot.kernel.display().to_string(),
        "-initrd",
        &boot.initramfs.display().to_string(),
        "-append",
        &append,
        "-chardev",
        &format!("socket,id=serial,path={},server=on,wait=off,logfile={}", path("tty"), path("serial")),
        "-serial",
        "chardev:serial",
        "-qmp",
        &format!("unix:{},server=on,wait=off", path("qmp")),
        "-device",
        "virtio-serial-pci",
        "-chardev",
        &format!("socket,id=control,path={},server=on,wait=off", path("control")),
        "-device",
        "virtserialport,chardev=control,name=io.watari.control",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// The block node of a disk: always raw, always with discards passed on, caches left to whoever holds the data.
pub fn blockdev(node: &str, backing: &Backing) -> Value {
    match backing {
        Backing::File(path) => json!({
            "driver": "file", "node-name": node, "filename": path, "discard": "unmap", "aio": "threads",
            "cache": { "direct": false, "no-flush": false },
        }),
        Backing::Nbd { socket, export } => json!({
            "driver": "nbd", "node-name": node, "export": export, "discard": "unmap",
            "server": { "type": "unix", "path": socket }, "reconnect-delay": RECONNECT_DELAY_SECONDS,
        }),
    }
}
