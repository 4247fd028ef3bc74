//! What the tests of this crate share: synchronised disks, fixtures, and a view of a domain's disks that does not use our parser.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::PathBuf;

use watari_hook::{RewriteOptions, SyncedDisk};

/// The disks of a test: volume, export and socket named alike, as the sidecar does it.
pub fn synced(volumes: &[&str]) -> Vec<SyncedDisk> {
    let disk = |v: &&str| SyncedDisk {
        volume: (*v).to_owned(),
        export: (*v).to_owned(),
        socket: format!("/var/run/watari/{v}.sock"),
    };
    volumes.iter().map(disk).collect()
}

/// Options with a marker.
pub fn with_marker() -> RewriteOptions {
    RewriteOptions { marker: Some("/var/lib/watari/marker.img".into()), ..RewriteOptions::default() }
}

pub fn tests_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests")
}

pub fn fixture(name: &str) -> String {
    let path = tests_folder().join("fixtures").join(format!("{name}.xml"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The inputs, and which of their volumes are synchronised. Every file in `fixtures/` is listed (a test checks it).
pub const FIXTURES: [(&str, &[&str], bool); 9] = [
    ("virtio_cloudinit_disk", &["root"], true),
    ("sata_cloudinit_cdrom", &["root"], false),
    ("scsi_block", &["data"], true),
    ("iothreads", &["root", "data"], false),
    ("two_disks_of_four", &["root", "data"], true),
    ("left_alone", &["root"], true),
    ("alone_needs_marker", &["root"], true),
    ("no_driver_no_source_content", &["root"], false),
    ("as_libvirt_writes_it", &["root"], true),
];

/// Options of a fixture.
pub fn options(marker: bool) -> RewriteOptions {
    if marker { with_marker() } else { RewriteOptions::default() }
}
