//! `inspect divergence`: what a fenced side wrote alone, shown and copied.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
};

use watari_core::{
    geometry::DiskIndex,
    record::{Role, RoleRecord},
};

use super::{CHUNK_BYTES, InspectError, progress};
use crate::{
    config::Config,
    engine::divergence::read,
    status::text::{bytes, date},
};

/// Extents shown per disk; the copy has all.
const SHOWN_MAX: usize = 20;

/// The list in words; with `out`, its content in sparse files there.
pub(super) fn show(config: &Config, record: &RoleRecord, out: Option<&Path>) -> Result<Vec<String>, InspectError> {
    let Some(list) = read(&config.folder, config.pair.id.0)? else {
        return Ok(vec!["this side has written nothing alone".to_owned()]);
    };
    let mut lines = vec![format!(
        "written here in epoch {} after generation {}, which is the newest that both sites have; epoch {} goes on (found {})",
        list.epoch,
        list.base,
        list.by,
        date(list.found_unix_millis)
    )];
    if list.anything {
        lines
            .push("changes were not tracked: any block may have been written, also where nothing is listed".to_owned());
    }
    for (index, disk) in record.disks.iter().enumerate() {
        let extents: Vec<(u64, u64)> = list
            .extents
            .iter()
            .filter(|(d, _)| *d == DiskIndex(index as u16))
            .map(|(_, e)| (e.start.offset(), e.end().offset().min(disk.size_bytes)))
            .filter(|(from, to)| from < to)
            .collect();
        let sum: u64 = extents.iter().map(|(from, to)| to - from).sum();
        lines.push(format!("{}: {} in {} places", disk.name, bytes(sum), extents.len()));
        for (from, to) in extents.iter().take(SHOWN_MAX) {
            lines.push(format!("  at {from}, {} bytes", to - from));
        }
        if extents.len() > SHOWN_MAX {
            lines.push(format!("  and {} more", extents.len() - SHOWN_MAX));
        }
        if let Some(dir) = out {
            if !matches!(record.role, Role::Fenced { .. }) {
                return Err(InspectError::NotFenced(record.role.name()));
            }
            let file = dir.join(format!("{}.img", disk.name));
            copy(&config.disks[index].path, &file, disk.size_bytes, &extents)?;
            lines.push(format!("  copied to {}", file.display()));
        }
    }
    Ok(lines)
}

/// These byte ranges of a disk into a new sparse file of the same size; durable when this returns.
fn copy(disk: &Path, file: &Path, size: u64, ranges: &[(u64, u64)]) -> Result<(), InspectError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |error| InspectError::Io { path, error }
    };
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir).map_err(io(dir))?;
    }
    let source = File::open(disk).map_err(io(disk))?;
    let target = OpenOptions::new().write(true).create_new(true).open(file).map_err(io(file))?;
    target.set_len(size).map_err(io(file))?;
    let progress = progress(ranges.iter().map(|(from, to)| to - from).sum());
    let mut chunk = vec![0; CHUNK_BYTES];
    for (from, to) in ranges {
        let mut at = *from;
        while at < *to {
            let length = CHUNK_BYTES.min((to - at) as usize);
            source.read_exact_at(&mut chunk[..length], at).map_err(io(disk))?;
            target.write_all_at(&chunk[..length], at).map_err(io(file))?;
            at += length as u64;
            progress.inc(length as u64);
        }
    }
    target.sync_all().map_err(io(file))?;
    progress.finish_and_clear();
    Ok(())
}
