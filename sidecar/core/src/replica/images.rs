//! The seam to the data claims: one raw image per disk, a file or a block device whose size is fixed.
//!
//! Nothing but guest content lies there (design §3.4). Durability contract as in [`crate::storage`]: nothing written is
//! durable before `sync` of that disk returned, and no sync is ever retried.

use crate::{
    geometry::DiskIndex,
    storage::{Storage, StorageError},
};
use alloc::{format, string::String, vec::Vec};

/// The disk images of one VM.
pub trait Images {
    /// Bytes that the image can hold now. Images larger than the recorded disk are normal.
    fn size_bytes(&self, disk: DiskIndex) -> Result<u64, StorageError>;
    /// Fill `buf` from `offset`. Bytes beyond the image's end read as zeroes.
    fn read(&self, disk: DiskIndex, offset: u64, buf: &mut [u8]) -> Result<(), StorageError>;
    /// Write all of `data`; the range lies inside the disk.
    fn write(&mut self, disk: DiskIndex, offset: u64, data: &[u8]) -> Result<(), StorageError>;
    /// Make the range read as zeroes, deallocating where that is possible.
    fn zero(&mut self, disk: DiskIndex, offset: u64, length: u64) -> Result<(), StorageError>;
    /// Make all earlier writes to this disk durable.
    fn sync(&mut self, disk: DiskIndex) -> Result<(), StorageError>;
    /// Grow the image to at least `bytes` (durable after `sync`). A block device that is too small refuses.
    fn grow(&mut self, disk: DiskIndex, bytes: u64) -> Result<(), StorageError>;
}

/// Images kept as files of a [`Storage`], named `disk-<index>`: what the simulator and small tests use.
#[derive(Clone, Debug)]
pub struct StorageImages<S> {
    pub storage: S,
}

/// The file name of a disk's image in a [`StorageImages`].
pub fn image_name(disk: DiskIndex) -> String {
    format!("disk-{}", disk.0)
}

impl<S: Storage> StorageImages<S> {
    /// Create empty images of these sizes, durably.
    pub fn create(mut storage: S, sizes: &[u64]) -> Result<Self, StorageError> {
        let disks: Vec<DiskIndex> = (0..sizes.len() as u16).map(DiskIndex).collect();
        for (disk, bytes) in disks.iter().zip(sizes) {
            storage.truncate(&image_name(*disk), *bytes)?;
            storage.sync(&image_name(*disk))?;
        }
        storage.sync_folder()?;
        Ok(StorageImages { storage })
    }
}

impl<S: Storage> Images for StorageImages<S> {
    fn size_bytes(&self, disk: DiskIndex) -> Result<u64, StorageError> {
        self.storage.len(&image_name(disk))
    }
    fn read(&self, disk: DiskIndex, offset: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        let read = self.storage.read(&image_name(disk), offset, buf)?;
        buf[read..].fill(0);
        Ok(())
    }
    fn write(&mut self, disk: DiskIndex, offset: u64, data: &[u8]) -> Result<(), StorageError> {
        self.storage.write(&image_name(disk), offset, data)
    }
    fn zero(&mut self, disk: DiskIndex, offset: u64, length: u64) -> Result<(), StorageError> {
        self.storage.zero(&image_name(disk), offset, length)
    }
    fn sync(&mut self, disk: DiskIndex) -> Result<(), StorageError> {
        self.storage.sync(&image_name(disk))
    }
    fn grow(&mut self, disk: DiskIndex, bytes: u64) -> Result<(), StorageError> {
        if self.storage.len(&image_name(disk))? < bytes {
            self.storage.truncate(&image_name(disk), bytes)?;
        }
        Ok(())
    }
}
