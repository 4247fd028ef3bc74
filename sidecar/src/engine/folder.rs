//! The metadata folder of one side: what lies where, and how a replica in it is made, opened and removed.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use watari_core::{
    geometry::BLOCK_BYTES,
    replica::{JournalLimits, Options, Policy, ReplicaError},
};
use watari_store::{
    folder::{DiskImages, Folder},
    replica::{FileReplica, Zstd},
};

use super::clock::random_id;
use crate::config::{Config, Retention};

/// Magic of the role record's slot file.
pub const ROLE_MAGIC: [u8; 8] = *b"WATAROLE";
/// Its name in the folder.
pub const ROLE_NAME: &str = "role.rec";
/// Version of the slot file that holds it.
pub const ROLE_VERSION: u16 = 1;
/// The replica's files live in a folder of their own below the metadata folder, so that they go as one.
const REPLICA_DIR: &str = "replica";
/// Bytes of one journal segment.
const SEGMENT_BYTES: u64 = 64 << 20;

/// Free space of a side, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    pub folder_bytes: u64,
    pub images_bytes: u64,
}

/// What an unprivileged process may still write on the file system of this path.
fn free_bytes(path: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(path).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

/// How to reach the replica of this side.
#[derive(Clone, Debug)]
pub struct ReplicaFolder {
    dir: PathBuf,
    disks: Vec<(PathBuf, u64)>,
    options: Options,
}

impl ReplicaFolder {
    /// `sizes`: recorded size of each disk, bytes.
    pub fn new(config: &Config, sizes: &[u64]) -> Self {
        let journal = JournalLimits { segment_bytes_max: SEGMENT_BYTES, journal_bytes_max: config.journal_bytes };
        ReplicaFolder {
            dir: config.folder.join(REPLICA_DIR),
            disks: config.disks.iter().zip(sizes).map(|(d, s)| (d.path.clone(), *s)).collect(),
            options: Options { journal, policy: policy(&config.retention), ..Options::default() },
        }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn parts(&self) -> Result<(Folder, DiskImages), ReplicaError> {
        fs::create_dir_all(&self.dir).map_err(|e| io_error(&self.dir, &e))?;
        let meta = Folder::open(&self.dir).map_err(|e| io_error(&self.dir, &e))?;
        let paths: Vec<&PathBuf> = self.disks.iter().map(|(p, _)| p).collect();
        let images = DiskImages::open(&paths, false).map_err(|e| io_error(&self.dir, &e))?;
        Ok((meta, images))
    }

    /// A fresh replica. `virgin`: the images are empty and ours.
    pub fn create(&self, virgin: bool) -> Result<FileReplica, ReplicaError> {
        self.remove().map_err(|e| io_error(&self.dir, &e))?;
        let (meta, images) = self.parts()?;
        let sizes: Vec<u64> = self.disks.iter().map(|(_, s)| *s).collect();
        FileReplica::create(meta, images, Box::new(Zstd), self.options.clone(), random_id(), &sizes, virgin)
    }

    /// What is there, or a fresh replica where there is none. Images that hold nothing count as empty and ours.
    pub fn open_or_create(&self) -> Result<FileReplica, ReplicaError> {
        let (meta, images) = self.parts()?;
        match FileReplica::open(meta, images, Box::new(Zstd), self.options.clone())? {
            Some(store) => Ok(store),
            None => self.create(self.images_are_empty()),
        }
    }

    fn images_are_empty(&self) -> bool {
        self.disks.iter().all(|(path, _)| is_empty(path).unwrap_or(false))
    }

    /// Free space for the journal, and for the image that has least, bytes. A device has no space to run out of.
    pub fn room(&self) -> Room {
        let images = self.disks.iter().filter(|(path, _)| fs::metadata(path).is_ok_and(|m| m.is_file()));
        let meta = self.dir.parent().unwrap_or(&self.dir);
        Room {
            folder_bytes: free_bytes(meta).unwrap_or(0),
            images_bytes: images.filter_map(|(path, _)| free_bytes(path)).min().unwrap_or(u64::MAX),
        }
    }

    /// Remove the replica's files; the images stay.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => fs::File::open(self.dir.parent().unwrap_or(Path::new(".")))?.sync_all(),
        }
    }
}

fn policy(retention: &Retention) -> Policy {
    Policy { keep_last: retention.count, keep_seconds: retention.age.map_or(0, |a| a.as_secs()), thin: Vec::new() }
}

fn io_error(path: &Path, error: &io::Error) -> ReplicaError {
    ReplicaError::Storage(watari_core::storage::StorageError::Io(path.display().to_string(), error.to_string()))
}

/// A regular file without any allocated block. (A device is never believed to be empty.)
fn is_empty(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata(path)?;
    Ok(meta.is_file() && meta.blocks() * 512 < BLOCK_BYTES)
}
