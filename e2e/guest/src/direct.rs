//! Disk access that goes to the device: aligned buffers, O_DIRECT, zeroing.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use watari_guest::block::BLOCK_BYTES;

/// Bytes per read while scanning or verifying: large enough to be quick under emulation.
pub const CHUNK_BYTES: usize = 256 * 1024;

/// A zeroed buffer aligned for O_DIRECT.
pub struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub fn new(len: usize) -> Aligned {
        let bytes = vec![0; len + BLOCK_BYTES];
        let start = bytes.as_ptr().align_offset(BLOCK_BYTES);
        Aligned { bytes, start, len }
    }
    pub fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// One disk of a group: a block device, or a file on one.
pub struct Target {
    pub name: String,
    /// For writing: direct on a raw disk, through the page cache on a file.
    pub writer: File,
    /// For reading back: always O_DIRECT.
    pub reader: File,
    pub is_block_device: bool,
    pub bytes: u64,
}

impl Target {
    /// A whole disk, read and written with O_DIRECT.
    pub fn disk(name: &str) -> io::Result<Target> {
        let path = PathBuf::from("/dev").join(name);
        Ok(Target {
            name: name.to_owned(),
            writer: open(&path, libc::O_DIRECT)?,
            reader: open(&path, libc::O_DIRECT)?,
            is_block_device: true,
            bytes: disk_bytes(name),
        })
    }

    /// A file of `bytes` on the ext4 file system of a disk; made when missing, never shrunk.
    pub fn file(name: &str, bytes: u64) -> io::Result<Target> {
        let folder = format!("/mnt/{name}");
        crate::boot::mount(&format!("/dev/{name}"), &folder, "ext4")?;
        let path = Path::new(&folder).join("blocks");
        let writer = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        if writer.metadata()?.len() < bytes {
            writer.set_len(bytes)?;
            writer.sync_all()?;
        }
        let reader = open(&path, libc::O_DIRECT)?;
        Ok(Target { name: name.to_owned(), bytes: writer.metadata()?.len(), writer, reader, is_block_device: false })
    }

    /// Discards 4 KiB at `offset`; true when the disk reads as zeroes afterwards. A disk that cannot discard says false.
    pub fn discard(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        const BLKDISCARD: libc::c_ulong = 0x1277; // linux/fs.h: _IO(0x12, 119), no binding in libc
        let range = [offset, BLOCK_BYTES as u64];
        // SAFETY: BLKDISCARD reads two u64 from the pointer, which lives across the call.
        if !self.is_block_device || unsafe { libc::ioctl(self.writer.as_raw_fd(), BLKDISCARD, range.as_ptr()) } != 0 {
            return Ok(false);
        }
        std::os::unix::fs::FileExt::read_exact_at(&self.reader, buffer, offset)?;
        Ok(buffer.iter().all(|&byte| byte == 0))
    }

    /// Makes 4 KiB at `offset` zero: a WRITE ZEROES request on a raw disk, plain zeroes in a file.
    pub fn zero(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if !self.is_block_device {
            buffer.fill(0);
            return std::os::unix::fs::FileExt::write_all_at(&self.writer, buffer, offset);
        }
        const BLKZEROOUT: libc::c_ulong = 0x127f; // linux/fs.h: _IO(0x12, 127), no binding in libc
        let range = [offset, BLOCK_BYTES as u64];
        // SAFETY: BLKZEROOUT reads two u64 from the pointer, which lives across the call.
        let result = unsafe { libc::ioctl(self.writer.as_raw_fd(), BLKZEROOUT, range.as_ptr()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

fn open(path: &Path, flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
}

/// Size of a disk in bytes, 0 when there is no such disk.
pub fn disk_bytes(name: &str) -> u64 {
    crate::boot::read_or_empty(format!("/sys/block/{name}/size")).trim().parse::<u64>().unwrap_or(0) * 512
}

/// The virtio disks, in the order of their names.
pub fn virtio_disks() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("vd"))
        .collect();
    names.sort();
    names
}
