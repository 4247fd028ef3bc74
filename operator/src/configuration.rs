//! `sidecar.toml` of a pair at a site: the same for the primary beside a VM and for a replica's Pod, because the two swap.
//!
//! Paths are those of `watari_crds::names::path`, where the webhooks and the replica's Pod mount things. Keys and units:
//! `sidecar/examples-config`.

use std::time::Duration;

use serde::Serialize;
use watari_crds::names::{path, port};
use watari_crds::wiring::VolumeMode;

/// What a sidecar is told.
#[derive(Clone, Debug, PartialEq)]
pub struct Sidecar {
    pub site: String,
    pub pair_id: String,
    /// namespace/name.
    pub pair_name: String,
    pub disks: Vec<Disk>,
    pub interval: Duration,
    /// Bits per second; `None`: no limit.
    pub bandwidth: Option<u64>,
    pub retention_count: u32,
    pub retention_age: Option<Duration>,
    pub metadata_bytes: u64,
    /// `host:port` of the peer's gateway.
    pub peers: Vec<String>,
}

/// One disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Disk {
    pub name: String,
    pub mode: VolumeMode,
    /// Where the image does not exist yet, it is made this large.
    pub size_bytes: Option<u64>,
}

#[derive(Serialize)]
struct File<'a> {
    site: &'a str,
    folder: String,
    runtime_dir: &'a str,
    listen: String,
    interval: String,
    bandwidth: String,
    journal: String,
    pair: Pair<'a>,
    disk: Vec<FileDisk<'a>>,
    nbd: Nbd<'a>,
    peer: Peer<'a>,
    tls: Tls,
    preserve: Preserve,
    retention: Retention,
    hook: Hook<'a>,
    metrics: Metrics,
}

#[derive(Serialize)]
struct Pair<'a> {
    id: &'a str,
    name: &'a str,
}

#[derive(Serialize)]
struct FileDisk<'a> {
    name: &'a str,
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<String>,
}

#[derive(Serialize)]
struct Nbd<'a> {
    dir: &'a str,
    mode: &'a str,
}

#[derive(Serialize)]
struct Peer<'a> {
    addresses: &'a [String],
}

#[derive(Serialize)]
struct Tls {
    ca: String,
    certificate: String,
    key: String,
}

#[derive(Serialize)]
struct Preserve {
    spill: String,
}

#[derive(Serialize)]
struct Retention {
    count: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    age: Option<String>,
}

#[derive(Serialize)]
struct Hook<'a> {
    dir: &'a str,
}

#[derive(Serialize)]
struct Metrics {
    listen: String,
}

impl Sidecar {
    /// The file's text.
    pub fn to_toml(&self) -> String {
        let file = File {
            site: &self.site,
            folder: format!("{}/folder", path::METADATA_DIR),
            runtime_dir: path::RUNTIME_DIR,
            listen: format!("0.0.0.0:{}", port::SIDECAR),
            interval: millis(self.interval),
            bandwidth: self.bandwidth.map_or("unlimited".to_owned(), |bits| format!("{bits}bit")),
            // Half for the largest delta; undo and spill share the rest.
            journal: bytes(self.metadata_bytes / 2),
            pair: Pair { id: &self.pair_id, name: &self.pair_name },
            disk: self.disks.iter().map(Disk::to_file).collect(),
            nbd: Nbd { dir: path::NBD_DIR, mode: "0666" },
            peer: Peer { addresses: &self.peers },
            tls: Tls {
                ca: format!("{}/ca.crt", path::TLS_DIR),
                certificate: format!("{}/tls.crt", path::TLS_DIR),
                key: format!("{}/tls.key", path::TLS_DIR),
            },
            preserve: Preserve { spill: bytes(self.metadata_bytes / 8) },
            retention: Retention { count: self.retention_count, age: self.retention_age.map(millis) },
            hook: Hook { dir: path::HOOKS_DIR },
            metrics: Metrics { listen: format!("0.0.0.0:{}", port::METRICS) },
        };
        toml::to_string(&file).expect("strings, numbers and tables have a TOML form")
    }
}

impl Disk {
    fn to_file(&self) -> FileDisk<'_> {
        let path = match self.mode {
            VolumeMode::Filesystem => format!("{}/{}/{}", path::DISKS_DIR, self.name, path::DISK_IMAGE),
            VolumeMode::Block => format!("{}/{}", path::DEVICES_DIR, self.name),
        };
        FileDisk { name: &self.name, path, size: self.size_bytes.map(bytes) }
    }
}

fn millis(duration: Duration) -> String {
    format!("{}ms", duration.as_millis())
}

fn bytes(count: u64) -> String {
    format!("{count}B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_says_where_everything_is_mounted() {
        let sidecar = Sidecar {
            site: "tokyo".to_owned(),
            pair_id: "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10".to_owned(),
            pair_name: "shop/ledger".to_owned(),
            disks: vec![
                Disk { name: "root".to_owned(), mode: VolumeMode::Filesystem, size_bytes: Some(4096) },
                Disk { name: "data".to_owned(), mode: VolumeMode::Block, size_bytes: None },
            ],
            interval: Duration::from_secs(10),
            bandwidth: Some(100_000_000),
            retention_count: 3,
            retention_age: Some(Duration::from_secs(60)),
            metadata_bytes: 4 << 30,
            peers: vec!["gateway.osaka.example:7443".to_owned()],
        };
        let text = sidecar.to_toml();
        let read: toml::Table = text.parse().expect("TOML");
        assert_eq!(read["disk"][0]["path"].as_str(), Some("/watari/disks/root/disk.img"));
        assert_eq!(read["disk"][1]["path"].as_str(), Some("/dev/watari/data"));
        assert!(read["disk"][1].get("size").is_none());
        assert_eq!(read["bandwidth"].as_str(), Some("100000000bit"));
        assert_eq!(read["journal"].as_str(), Some("2147483648B"));
    }
}
