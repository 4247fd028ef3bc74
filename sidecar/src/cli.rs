//! The command line: what can be asked of `watari-sidecar`. Parsing only; `main.rs` acts.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    config::{Overrides, units},
    identity::{PairId, SiteName},
    throttle::Limit,
};

/// Refused before anything was touched: a bad command line, configuration or certificate. Not worth trying again.
pub const EXIT_REFUSED: u8 = 2;
/// It was tried and failed, or the running sidecar said no.
pub const EXIT_FAILED: u8 = 1;
/// Exit code of a worker that asks its supervisor for another start; it crashed not.
pub const EXIT_AGAIN: u8 = 75;

/// Watari keeps a VM's disks synchronised with a peer site, all day long and best effort, so that a move crosses the
/// WAN with only the last delta.
#[derive(Parser, Debug)]
#[command(name = "watari-sidecar", version, propagate_version = true, arg_required_else_help = true)]
#[command(after_help = "A configuration file is described by the samples in sidecar/examples-config/. \
    Exit codes: 0 done, 1 failed or declined, 2 refused before anything was touched.")]
pub struct Cli {
    /// How much is logged (to standard error): error, warn, info, debug, trace, or a filter such as `info,h2=warn`.
    #[arg(long, global = true, env = "WATARI_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
    /// How a log line looks.
    #[arg(long, global = true, env = "WATARI_LOG_FORMAT", default_value = "text", value_name = "FORMAT")]
    pub log_format: LogFormat,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Serve a VM's disks to its QEMU and send their changes to the peer.
    Primary(Run),
    /// Receive a VM's disks from the peer, commit generations, and take over when the VM moves here.
    Replica(Run),
    /// Look into the folder of a sidecar that is not running: list, verify, export, dump. Changes nothing.
    Inspect(Inspect),
    /// Show what a running sidecar is doing.
    Status(Status),
    /// Steer a running sidecar: cut, set, handover, failover.
    Ctl(Ctl),
    /// Make certificates for pairing two plain hosts by hand.
    Pki(Pki),
    /// Be a cluster's one address: pass connections of peers on to the sidecars of their pairs, by TLS server name.
    Gateway(Gateway),
}

#[derive(Args, Debug, Clone)]
pub struct Gateway {
    /// Where peers dial in.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:7443")]
    pub listen: SocketAddr,
    /// The routes file (sidecar/gateway/README.md); it is taken up again whenever its content changes.
    #[arg(long, value_name = "FILE")]
    pub routes: PathBuf,
    /// Serve metrics and health over HTTP here.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics: Option<SocketAddr>,
    /// How long connections may go on after SIGTERM.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub drain: Duration,
}

/// `primary` and `replica`.
#[derive(Args, Debug, Clone)]
pub struct Run {
    /// The configuration file (TOML).
    #[arg(long, short, value_name = "FILE")]
    pub config: PathBuf,
    /// Overrides `listen`: where the peer dials in.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<String>,
    /// Overrides `peer.addresses`; may be given several times.
    #[arg(long, value_name = "HOST:PORT")]
    pub peer: Vec<String>,
    /// Overrides `interval`: time between cuts, such as 10s.
    #[arg(long, value_name = "DURATION")]
    pub interval: Option<String>,
    /// Overrides `bandwidth` outside the windows: such as 100Mbit, or unlimited.
    #[arg(long, value_name = "RATE")]
    pub bandwidth: Option<String>,
    /// Check the configuration and the paths in it, print what will be done, and end.
    #[arg(long)]
    pub check: bool,
    /// Run without the supervisor, in this process (for debuggers; a crash then ends the VM's disks).
    #[arg(long)]
    pub no_supervisor: bool,
    #[command(flatten)]
    pub worker: WorkerFlags,
}

/// How the supervisor starts its worker; not for people.
#[derive(Args, Debug, Clone, Default)]
pub struct WorkerFlags {
    /// This process is the worker.
    #[arg(long, hide = true)]
    pub worker: bool,
    /// Serve without tracking: the worker crashed again and again.
    #[arg(long, hide = true, requires = "worker")]
    pub pass_through: bool,
    /// SIGTERM has come before this worker was started: end as soon as no guest is connected.
    #[arg(long, hide = true, requires = "worker")]
    pub draining: bool,
    /// Workers that crashed before this one.
    #[arg(long, hide = true, requires = "worker", default_value_t = 0)]
    pub restarts: u64,
    /// Start this program as the worker instead of ourselves (tests of the supervisor).
    #[arg(long, hide = true, value_name = "PROGRAM")]
    pub fake_worker: Option<PathBuf>,
}

impl Run {
    pub fn overrides(&self) -> Overrides {
        Overrides {
            listen: self.listen.clone(),
            peer: self.peer.clone(),
            interval: self.interval.clone(),
            bandwidth: self.bandwidth.clone(),
        }
    }
}

/// Which running sidecar is meant: by its configuration, or by its control socket.
#[derive(Args, Debug, Clone)]
#[group(required = true, multiple = false)]
pub struct Target {
    /// Its configuration file.
    #[arg(long, short, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Its control socket.
    #[arg(long, short, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

#[derive(Args, Debug, Clone)]
pub struct Status {
    #[command(flatten)]
    pub target: Target,
    /// Print the report once and end. Without it a terminal gets a live view, anything else a line for each change.
    #[arg(long)]
    pub once: bool,
    /// Print the report as JSON: one object, or one a line while it goes on.
    #[arg(long)]
    pub json: bool,
    /// How often to look.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = duration)]
    pub every: Duration,
}

#[derive(Args, Debug, Clone)]
pub struct Ctl {
    #[command(flatten)]
    pub target: Target,
    /// Give up waiting for the sidecar's answer after this long (what was asked for may still happen).
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration, global = true)]
    pub timeout: Duration,
    #[command(subcommand)]
    pub intent: CtlIntent,
}

#[derive(Subcommand, Debug, Clone)]
pub enum CtlIntent {
    /// Make a cut now and wait until its generation is committed at the peer.
    Cut {
        /// How long to wait for the commit; 0s does not wait.
        #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
        wait: Duration,
    },
    /// Change what may change while running.
    #[command(group = clap::ArgGroup::new("setting").required(true).multiple(true))]
    Set {
        /// Time between cuts.
        #[arg(long, value_name = "DURATION", value_parser = duration, group = "setting")]
        interval: Option<Duration>,
        /// Limit outside the windows; `unlimited` lifts it.
        #[arg(long, value_name = "RATE", value_parser = rate, group = "setting")]
        bandwidth: Option<Limit>,
        /// Make no cuts and send nothing (writes are still tracked).
        #[arg(long, value_name = "true|false", group = "setting")]
        paused: Option<bool>,
        /// Slow guest writes down just enough to converge (only while moving).
        #[arg(long, value_name = "true|false", group = "setting")]
        slow_down: Option<bool>,
    },
    /// Source: open a handover and converge. From now on only this VM instance may connect.
    OpenHandover {
        /// UID of the VM instance that will be migrated.
        #[arg(long)]
        vmi_uid: String,
    },
    /// Target: ask for the right to write (the guest runs here already).
    Acquire,
    /// Target: the migration failed and its QEMU is gone; the source serves again.
    Void,
    /// Target: take over a VM that runs nowhere.
    MoveStopped,
    /// Target: fail over without the source.
    Promote {
        /// Number of the kept generation to promote; without it the newest committed one.
        #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
        generation: Option<u64>,
    },
    /// Old source after a failover: its own later writes may be overwritten.
    AcceptDivergence,
    /// Give the folder up and end.
    Release,
}

#[derive(Args, Debug, Clone)]
pub struct Pki {
    #[command(subcommand)]
    pub action: PkiAction,
}

#[derive(Subcommand, Debug, Clone)]
pub enum PkiAction {
    /// A new pair: an authority and a certificate for each site.
    New {
        /// Folder to make; it must not hold a pair already.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// A site's name; give it once for each site.
        #[arg(long, required = true, value_name = "NAME")]
        site: Vec<SiteName>,
        /// The pair's id; without it a random one.
        #[arg(long, value_name = "UUID")]
        pair: Option<PairId>,
        /// Days until the sites' certificates end.
        #[arg(long, default_value_t = crate::pki::SITE_DAYS, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
    },
    /// A new certificate and key for one site of an existing pair.
    Renew {
        /// Folder that `pki new` made.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        #[arg(long, value_name = "NAME")]
        site: SiteName,
        /// Days until the certificate ends.
        #[arg(long, default_value_t = crate::pki::SITE_DAYS, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
    },
}

#[derive(Args, Debug, Clone)]
pub struct Inspect {
    /// The sidecar's configuration file: it names the folder and the disks.
    #[arg(long, short, value_name = "FILE")]
    pub config: PathBuf,
    #[command(subcommand)]
    pub action: InspectAction,
}

#[derive(Subcommand, Debug, Clone)]
pub enum InspectAction {
    /// Generations, journal, undo, role and epoch.
    List,
    /// Check every checksum and every cross reference.
    Verify,
    /// Write one disk of one generation to a raw file.
    Export {
        #[arg(long)]
        disk: String,
        /// Number of the generation; without it the newest committed one.
        #[arg(long)]
        generation: Option<u64>,
        /// The raw file to make; it must not exist.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// What this side wrote alone before it was fenced: where, how much, and a copy of it.
    Divergence {
        /// Write what was written alone to DIR/<disk>.img, sparse: everything else reads as zeroes. Only while this side is
        /// Fenced; afterwards it is a kept generation, see `list`.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// The records as they are, for a bug report.
    Dump,
}

fn duration(text: &str) -> Result<Duration, String> {
    units::duration(text).map_err(|expected| format!("expected {expected}"))
}

fn rate(text: &str) -> Result<Limit, String> {
    units::rate(text).map_err(|expected| format!("expected {expected}"))
}
