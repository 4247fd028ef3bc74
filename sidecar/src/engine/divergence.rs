//! The list of what a fenced side wrote and its peer lacks: made from the marks, kept in the metadata folder, told to the peer.
//!
//! Durable before the role record says `Fenced` (the marks do not survive that start), removed once a person has let the
//! blocks go. Order of writing: a new file, synced, renamed, the folder synced; a crash leaves the old file or the new one.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use watari_core::{
    divergence::{Divergence, DivergenceError, EXTENTS_MAX, FILE_BYTES_MAX},
    geometry::Generation,
    record::RoleRecord,
};
use watari_store::whole_file;
use watari_wire::replication as wire;

use super::{clock::unix_millis, tracking::Shared};

/// Its name in the metadata folder.
pub const DIVERGENCE_NAME: &str = "divergence";
/// Extents per message: 10,000 of at most 20 bytes stay far below a message's limit.
const EXTENTS_PER_MESSAGE: usize = 10_000;

/// Why a list cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DivergenceUnusable {
    #[error("{DIVERGENCE_NAME}: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Refused(#[from] DivergenceError),
    #[error("{DIVERGENCE_NAME}: it belongs to another pair: is this the folder of this pair?")]
    OtherPair,
}

/// Everything that is marked now. `record` is the one that says `Fenced` next; no write may be admitted any more.
pub fn list(shared: &Shared, record: &RoleRecord, by: u64, base: Generation) -> Divergence {
    let tracker = &shared.tracker;
    let marks = |disk| tracker.all_marks(disk).into_iter().map(move |e| (disk, e));
    let mut list = Divergence {
        pair: record.pair,
        epoch: record.epoch.counter,
        by,
        base,
        found_unix_millis: unix_millis(),
        anything: shared.untracked(),
        extents: tracker.disk_indices().flat_map(marks).collect(),
    };
    list.coarsen(EXTENTS_MAX);
    list
}

/// Write it durably.
pub fn write(folder: &Path, list: &Divergence) -> io::Result<()> {
    whole_file::replace(folder, DIVERGENCE_NAME, &list.encode())
}

/// What is there; `None`: nothing.
pub fn read(folder: &Path, pair: [u8; 16]) -> Result<Option<Divergence>, DivergenceUnusable> {
    let file = match File::open(folder.join(DIVERGENCE_NAME)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut bytes = Vec::new();
    // One byte more than any list has, so that a longer file is seen to be none.
    file.take(FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    let list = Divergence::decode(&bytes)?;
    if list.pair != pair { Err(DivergenceUnusable::OtherPair) } else { Ok(Some(list)) }
}

/// A person has consented, or the list is of a former time.
pub fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_file(folder.join(DIVERGENCE_NAME)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(()) => File::open(folder)?.sync_all(),
    }
}

/// The list for the peer, one message per disk or several.
pub fn messages(list: &Divergence, disks: usize) -> Vec<wire::Divergence> {
    let mut out = Vec::new();
    for disk in 0..disks {
        let extents: Vec<u64> = list
            .extents
            .iter()
            .filter(|(d, _)| usize::from(d.0) == disk)
            .flat_map(|(_, e)| [e.start.0, u64::from(e.blocks)])
            .collect();
        for chunk in extents.chunks(2 * EXTENTS_PER_MESSAGE) {
            out.push(wire::Divergence {
                disk: disk as u32,
                extents: chunk.to_vec(),
                anything: list.anything,
                last: false,
            });
        }
    }
    match out.last_mut() {
        Some(message) => message.last = true,
        None => out.push(wire::Divergence { disk: 0, extents: Vec::new(), anything: list.anything, last: true }),
    }
    out
}

#[cfg(test)]
mod tests {
    use watari_core::geometry::{Block, DiskIndex, Extent, GenerationNumber};

    use super::*;

    fn sample() -> Divergence {
        Divergence {
            pair: [1; 16],
            epoch: 1,
            by: 3,
            base: Generation { epoch: 1, number: GenerationNumber(4) },
            found_unix_millis: 5,
            anything: false,
            extents: vec![
                (DiskIndex(0), Extent { start: Block(1), blocks: 2 }),
                (DiskIndex(1), Extent { start: Block(7), blocks: 1 }),
            ],
        }
    }

    #[test]
    fn what_is_written_is_read_until_it_is_removed_and_belongs_to_one_pair() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path(), [1; 16]).unwrap().is_none());
        write(dir.path(), &sample()).unwrap();
        assert_eq!(read(dir.path(), [1; 16]).unwrap(), Some(sample()));
        assert!(matches!(read(dir.path(), [2; 16]), Err(DivergenceUnusable::OtherPair)));
        remove(dir.path()).unwrap();
        remove(dir.path()).unwrap();
        assert!(read(dir.path(), [1; 16]).unwrap().is_none());
    }

    #[test]
    fn messages_name_every_extent_once_and_end() {
        let messages = messages(&sample(), 2);
        let all: Vec<(u32, Vec<u64>, bool)> = messages.into_iter().map(|m| (m.disk, m.extents, m.last)).collect();
        assert_eq!(all, [(0, vec![1, 2], false), (1, vec![7, 1], true)]);
        let none = super::messages(&Divergence { extents: Vec::new(), ..sample() }, 2);
        assert!(none.len() == 1 && none[0].last);
    }
}
