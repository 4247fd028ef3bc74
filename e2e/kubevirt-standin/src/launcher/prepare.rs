//! Local files before any hook is called: virt-handler's work for claims (`host-disk.go:238`), virt-launcher's for emptyDisks. Both
//! happen at a boot and at a migration's target.

use std::path::Path;

use serde_json::Value;
use tokio::process::Command;

use super::{Error, at, domain};
use crate::render::DiskFile;

/// Makes what is missing; grows a file to its claim, and never shrinks one.
pub async fn local_disks(vmi: &Value, disks: &[DiskFile]) -> Result<(), Error> {
    for disk in disks.iter().filter(|disk| !disk.block) {
        let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(&disk.path);
        let file = file.map_err(at(&disk.path))?;
        if file.metadata().map_err(at(&disk.path))?.len() < disk.bytes {
            file.set_len(disk.bytes).map_err(at(&disk.path))?;
        }
    }
    for disk in domain::empty_disks(vmi) {
        let path = Path::new(&disk.path);
        if path.exists() {
            continue;
        }
        let folder = path.parent().expect("an absolute path of a file");
        std::fs::create_dir_all(folder).map_err(at(&disk.path))?;
        let size = disk.capacity.trim_end_matches('i');
        let output = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &disk.path, size]).output().await;
        let output = output.map_err(at("qemu-img"))?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(at(&disk.path)(std::io::Error::other(message)));
        }
    }
    Ok(())
}
