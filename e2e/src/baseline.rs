//! The yardstick: the full block migration that KubeVirt's live migration does for disks that are not shared.
//!
//! As libvirt drives QEMU for it (`VIR_MIGRATE_NON_SHARED_*`): the target exports its empty disks over NBD on the network,
//! the source mirrors each disk completely (`blockdev-mirror`, `sync=full`), then memory is migrated with a pause before the
//! switchover in which the mirrors are ended, and the target stops exporting and runs. libvirt would add TLS; this does not.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::json;

use crate::qemu::{Error, MigrationOptions, MigrationReport, Qemu, node, prepare_target, start_migration};
use crate::site::TestBed;

/// The TCP port of the target's NBD server, in the target's own namespace.
const PORT: u16 = 49153;

/// What the full block migration cost.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// From the command to the machine running at the target.
    pub total_seconds: f64,
    /// Until every disk was copied once and kept in step.
    pub disks_seconds: f64,
    pub memory: MigrationReport,
    /// IP bytes that crossed the WAN, both directions.
    pub link_bytes: u64,
}

/// Moves a machine with `disks` disks from `source` (at A) to `target` (at B, started as
/// [`crate::qemu::Start::IncomingStopped`] with empty disks of the same size).
pub fn migrate(bed: &TestBed, source: &Qemu, target: &Qemu, disks: usize, timeout: Duration) -> Result<Report, Error> {
    let started = Instant::now();
    let bytes_before = bed.wan.bytes_delivered();
    let options = MigrationOptions { pause_before_switchover: true, timeout, ..MigrationOptions::default() };
    let address = bed.b.address.to_string();
    let server = json!({ "host": address, "port": PORT.to_string() });

    target.qmp.execute("nbd-server-start", json!({ "addr": { "type": "inet", "data": server } }))?;
    for disk in 0..disks {
        let name = node(disk);
        let export =
            json!({ "id": format!("export-{name}"), "type": "nbd", "node-name": name, "name": name, "writable": true });
        target.qmp.execute("block-export-add", export)?;
    }

    let mark = source.qmp.mark();
    for disk in 0..disks {
        let name = node(disk);
        let mut inet = server.clone();
        inet["type"] = json!("inet");
        let client = json!({ "driver": "nbd", "node-name": format!("target-{name}"), "export": name, "server": inet });
        source.qmp.execute("blockdev-add", client)?;
        let mirror = json!({ "job-id": job(disk), "device": name, "target": format!("target-{name}"), "sync": "full" });
        source.qmp.execute("blockdev-mirror", mirror)?;
    }
    for disk in 0..disks {
        wait_job(source, mark, disk, &["ready"], timeout)?;
    }
    let disks_seconds = started.elapsed().as_secs_f64();

    prepare_target(target, &bed.b, &options)?;
    let migration = start_migration(source, target, &bed.b, &options)?;
    migration.wait_switchover()?;
    for disk in 0..disks {
        // Not forced: a mirror that is ready ends with both sides equal.
        source.qmp.execute("block-job-cancel", json!({ "device": job(disk), "force": false }))?;
    }
    for disk in 0..disks {
        wait_job(source, mark, disk, &["concluded", "null"], timeout)?;
    }
    migration.proceed()?;
    let memory = migration.finish_stopped(|target| target.qmp.execute("nbd-server-stop", json!({})).map(drop))?;
    let link_bytes = bed.wan.bytes_delivered() - bytes_before;
    Ok(Report { total_seconds: started.elapsed().as_secs_f64(), disks_seconds, memory, link_bytes })
}

fn job(disk: usize) -> String {
    format!("copy-{}", node(disk))
}

fn wait_job(source: &Qemu, mark: usize, disk: usize, statuses: &[&str], timeout: Duration) -> Result<(), Error> {
    let id = job(disk);
    let wanted = [statuses, &["aborting"]].concat();
    let event = source.qmp.wait_event(&format!("{id} {}", statuses.join(" or ")), mark, timeout, |event| {
        event.name == "JOB_STATUS_CHANGE"
            && event.data["id"] == json!(id)
            && event.data["status"].as_str().is_some_and(|status| wanted.contains(&status))
    })?;
    match event.data["status"].as_str() {
        Some("aborting") => Err(Error::Migration {
            machine: source.name.clone(),
            status: "aborting".into(),
            reason: format!("the mirror of {} failed", node(disk)),
        }),
        _ => Ok(()),
    }
}
