//! The configuration of a sidecar: one TOML file per pair and site, parsed into a [`Config`] that is valid by type.
//!
//! Parse, don't validate: whoever holds a [`Config`] needs no further checks of its values. Every refusal is a
//! [`ConfigError`] that names file, line, field, what was found, what was expected and the remedy; all refusals of a
//! file are reported together. An unknown key is refused, because a misspelt limit that does nothing is worse than
//! none. Parsing touches nothing but the file itself; [`world`] looks at the paths that it names and opens none for writing.
//! `examples-config/` holds a commented sample of each role, parsed by a test.

mod raw;
mod read;
pub mod units;
pub mod world;

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    identity::{Identity, PairId, SiteName},
    throttle::schedule::Schedule,
};

/// How long a guest request that waits on the peer or meets a seal is held before EIO (design §3.5, 5): KubeVirt's own
/// callers give up after 20 s, and QEMU pauses the guest and retries at unpause.
pub const HOLD: Duration = Duration::from_secs(20);

/// Longest path of a unix socket in bytes, without its closing zero (`sun_path`, unix(7)).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Largest configuration file in bytes: 64 disks and as many windows stay far below.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// A whole, valid configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The file this came from, for messages.
    pub file: PathBuf,
    pub pair: Pair,
    /// This site's name. It must differ from the peer's.
    pub site: SiteName,
    /// Durable state (the metadata claim): journal, undo, manifest, region log, spill, epoch and role record.
    pub folder: PathBuf,
    /// Memory that survives the process but not the node (a tmpfs): the dirty map.
    pub runtime_dir: PathBuf,
    /// In the order that both sites share; 1 to [`watari_core::limits::DISKS_MAX`], names, paths and sockets distinct.
    pub disks: Vec<Disk>,
    pub nbd: Nbd,
    /// Where the peer's active side dials in, whatever our role.
    pub listen: SocketAddr,
    pub peer: Peer,
    pub tls: TlsFiles,
    /// Time between cuts (the recovery point objective).
    pub interval: Duration,
    pub bandwidth: Schedule,
    /// Data calls beside the control call.
    pub data_streams: u32,
    pub preserve: Preserve,
    /// Room for staged and unapplied frames at a replica; must hold the largest delta.
    pub journal_bytes: u64,
    /// How much of the disks is compared with the replica per second where nobody writes; 0: never.
    pub verify_bytes_per_second: u64,
    pub retention: Retention,
    pub hook: Option<Hook>,
    pub control_socket: PathBuf,
    pub metrics: Option<Metrics>,
    pub start_without_peer: StartWithoutPeer,
}

impl Config {
    /// Reads, parses and validates `file`, with `overrides` from the command line in place of the file's values.
    pub fn load(file: &Path, overrides: &Overrides) -> Result<Config, ConfigError> {
        let text = read::file_text(file)?;
        Config::parse(file, &text, overrides)
    }

    /// The same for a text at hand; `file` is only named in messages.
    pub fn parse(file: &Path, text: &str, overrides: &Overrides) -> Result<Config, ConfigError> {
        read::config(file, text, overrides)
    }

    /// What our own certificate must say.
    pub fn identity(&self) -> Identity {
        Identity { pair: self.pair.id, site: self.site.clone() }
    }

    pub fn disk(&self, name: &str) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.name == name)
    }
}

/// Which VM and which replica belong together; the same at both sites.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    pub id: PairId,
    /// For people: namespace/name in Kubernetes.
    pub name: String,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Disk {
    /// The NBD export's name, the same at both sites (the KubeVirt volume name).
    pub name: String,
    /// A raw image file or a block device.
    pub path: PathBuf,
    /// The size to record and export; `None`: what is recorded already, or else the size found.
    pub size_bytes: Option<u64>,
    /// The unix socket on which this disk is exported.
    pub socket: PathBuf,
}

impl Disk {
    /// Bytes of its file or device as it is now. A block device reports its size at its end, not in its metadata.
    pub fn actual_bytes(&self) -> io::Result<u64> {
        File::open(&self.path)?.seek(SeekFrom::End(0))
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Nbd {
    pub dir: PathBuf,
    /// Permission bits of the sockets (QEMU may run as another user).
    pub mode: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Peer {
    /// `host:port`, tried in order; names are resolved at each dial.
    pub addresses: Vec<String>,
    /// TLS server name: what the peer's gateway routes by and the peer's certificate must contain.
    pub server_name: String,
}

/// PEM files, read again whenever they change.
#[derive(Clone, Debug, PartialEq)]
pub struct TlsFiles {
    /// Certificates of the authorities that may vouch for a peer (several during a rotation).
    pub ca: PathBuf,
    /// Our own certificate and its chain.
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Bounds of the old content kept while a generation is open (I3, I8).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preserve {
    pub memory_bytes: u64,
    pub spill_bytes: u64,
}

/// How long generations are kept; both bounds hold, the newest is never removed (I7).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Retention {
    pub count: u32,
    pub age: Option<Duration>,
}

/// The KubeVirt hook server.
#[derive(Clone, Debug, PartialEq)]
pub struct Hook {
    pub dir: PathBuf,
    /// Outside Kubernetes no webhook adds a copyable disk: add the marker disk to the domain where one is needed.
    pub outside_kubernetes: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Metrics {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// Whether a VM may boot while the peer does not answer (design §3.6). It never applies while a handover is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartWithoutPeer {
    Allow,
    Deny,
}

/// Values from the command line, as typed there; each wins over the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Overrides {
    pub listen: Option<String>,
    pub peer: Vec<String>,
    pub interval: Option<String>,
    pub bandwidth: Option<String>,
}

/// Why a configuration is refused. Nothing was touched.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("configuration file {}: found {found}, expected {expected}; {remedy}", file.display())]
    File { file: PathBuf, found: String, expected: &'static str, remedy: &'static str },
    /// Not TOML, or an unknown key or a wrong kind of value.
    #[error("{}:{line}: {message}", file.display())]
    Syntax { file: PathBuf, line: usize, message: String },
    #[error("{}", join(.0))]
    Refused(Vec<Refusal>),
}

/// One field that cannot stand as it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: `{field}`: found {found}, expected {expected}; {remedy}")]
pub struct Refusal {
    /// `file:line`, or the flag.
    pub place: String,
    /// As written in the file: `tls.ca`, `disk[1].path`.
    pub field: String,
    pub found: String,
    pub expected: String,
    pub remedy: String,
}

fn join(refusals: &[Refusal]) -> String {
    refusals.iter().map(Refusal::to_string).collect::<Vec<_>>().join("\n")
}
