//! Blocking operations on a regular file or a block device.
//!
//! Invariants: the exported size is at most the size of the backing and never changes; after a failed fdatasync every
//! later one fails too (the kernel forgets pages that it could not write, so a later success would be a lie; QEMU's
//! file driver does the same). Ranges were checked by the front end.
//!
//! Does not order, track or schedule anything.

use std::fs::{File, OpenOptions};
use std::io::IoSliceMut;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::{Errno as Os, ReadWriteFlags};
use watari_core::front::{Allocation, Errno};

/// Zeroes for what cannot be punched, in bytes per write.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
/// Most runs of one allocation lookup: bounds the time of the lookup and the answer.
const RUNS_MAX: usize = 2048;
/// Most bytes of one prefetch: a hint must not flood the page cache.
const PREFETCH_BYTES_MAX: u64 = 32 << 20;

/// Why a backing cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot open {path}: {source}")]
    Open { path: PathBuf, source: std::io::Error },
    #[error("{0} is neither a regular file nor a block device")]
    Kind(PathBuf),
    /// Writing beyond its end would grow or fail; a disk smaller than recorded is another disk.
    #[error("{path} has {found} bytes, but {wanted} are recorded: not the disk that was recorded, or it was cut")]
    Smaller { path: PathBuf, found: u64, wanted: u64 },
}

/// How a range shall come to read as zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Zeroing {
    /// Deallocated where possible.
    Punch,
    /// Still allocated.
    Allocated,
}

/// Whether the file system can do something: learnt at the first try.
struct Can(AtomicU8);

impl Can {
    const UNKNOWN: u8 = 0;
    const YES: u8 = 1;
    const NO: u8 = 2;
    fn known(&self) -> u8 {
        self.0.load(Ordering::Relaxed)
    }
    fn learn(&self, yes: bool) {
        self.0.store(if yes { Self::YES } else { Self::NO }, Ordering::Relaxed);
    }
}

/// An open backing and what was learnt about it.
pub struct LocalFile {
    file: File,
    path: PathBuf,
    size_bytes: u64,
    read_only: bool,
    /// Alignment for deallocating, in bytes: a device's logical block; 1 for files, whose file system handles edges.
    zero_align: u64,
    device: bool,
    punch: Can,
    zero_range: Can,
    cached_reads: Can,
    flush_failed: AtomicBool,
}

impl LocalFile {
    /// Open `path`. `size_bytes` is the recorded size, at most the actual one; without it the actual size counts.
    pub fn open(path: &Path, size_bytes: Option<u64>, read_only: bool) -> Result<LocalFile, OpenError> {
        let opened = |source| OpenError::Open { path: path.into(), source };
        let file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(opened)?;
        let kind = file.metadata().map_err(opened)?.file_type();
        let device = kind.is_block_device();
        if !device && !kind.is_file() {
            return Err(OpenError::Kind(path.into()));
        }
        // Seeking to the end tells the size of files and of devices alike.
        let found = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| opened(e.into()))?;
        let wanted = size_bytes.unwrap_or(found);
        if wanted > found {
            return Err(OpenError::Smaller { path: path.into(), found, wanted });
        }
        let zero_align = match device {
            true => u64::from(rustix::fs::ioctl_blksszget(&file).unwrap_or(4096)),
            false => 1,
        };
        let unknown = || Can(AtomicU8::new(Can::UNKNOWN));
        let local = LocalFile {
            file,
            path: path.into(),
            size_bytes: wanted,
            read_only,
            zero_align,
            device,
            punch: unknown(),
            zero_range: unknown(),
            cached_reads: unknown(),
            flush_failed: AtomicBool::new(false),
        };
        if !device && !read_only {
            // Beyond the end there is nothing to lose: whether this file system punches can be asked without harm.
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let end = found.next_multiple_of(1 << 20);
            local.punch.learn(rustix::fs::fallocate(&local.file, flags, end, 4096).is_ok());
        }
        Ok(local)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    pub fn read_only(&self) -> bool {
        self.read_only
    }
    pub fn is_block_device(&self) -> bool {
        self.device
    }

    /// Read what needs no waiting; returns how much of `buffer` is filled. `None` if this backing cannot say.
    pub fn read_cached_at(&self, offset: u64, buffer: &mut [u8]) -> Option<usize> {
        if self.cached_reads.known() == Can::NO {
            return None;
        }
        match rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(buffer)], offset, ReadWriteFlags::NOWAIT) {
            Ok(filled) => Some(filled),
            Err(Os::OPNOTSUPP | Os::NOSYS | Os::INVAL) => {
                self.cached_reads.learn(false);
                None
            }
            // Not cached, interrupted, or an error that the blocking read will see and report.
            Err(_) => Some(0),
        }
    }

    /// Fill `buffer` from `offset`. A backing that was cut meanwhile is an I/O error.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        self.file.read_exact_at(buffer, offset).map_err(|e| guest_errno(&e))
    }

    /// Write all of `data` at `offset`.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.file.write_all_at(data, offset).map_err(|e| guest_errno(&e))
    }

    /// Make `[offset, offset + length)` read as zeroes.
    pub fn zero_at(&self, offset: u64, length: u64, zeroing: Zeroing) -> Result<(), Errno> {
        let end = offset + length;
        let start = offset.next_multiple_of(self.zero_align).min(end);
        let stop = (end - end % self.zero_align).max(start);
        self.write_zeroes(offset, start)?;
        if stop > start && !self.deallocate(start, stop, zeroing)? {
            self.write_zeroes(start, stop)?;
        }
        self.write_zeroes(stop, end)
    }

    /// `Ok(false)` if neither way is supported here.
    fn deallocate(&self, start: u64, stop: u64, zeroing: Zeroing) -> Result<bool, Errno> {
        let keep = FallocateFlags::KEEP_SIZE;
        let ways = [
            (&self.punch, keep | FallocateFlags::PUNCH_HOLE, zeroing == Zeroing::Punch),
            (&self.zero_range, keep | FallocateFlags::ZERO_RANGE, true),
        ];
        for (can, flags, wanted) in ways {
            if !wanted || can.known() == Can::NO {
                continue;
            }
            match rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, start, stop - start)) {
                Ok(()) => {
                    can.learn(true);
                    return Ok(true);
                }
                Err(Os::OPNOTSUPP | Os::NOSYS | Os::NODEV) => can.learn(false),
                Err(error) => return Err(guest_errno(&error.into())),
            }
        }
        Ok(false)
    }

    fn write_zeroes(&self, from: u64, to: u64) -> Result<(), Errno> {
        let mut at = from;
        while at < to {
            let bytes = (to - at).min(ZEROES.len() as u64);
            self.write_at(at, &ZEROES[..bytes as usize])?;
            at += bytes;
        }
        Ok(())
    }

    /// Whether zeroing is known to be done by the file system or device rather than by writing.
    pub fn zeroes_are_fast(&self, zeroing: Zeroing) -> bool {
        let punches = zeroing == Zeroing::Punch && self.punch.known() == Can::YES;
        !self.read_only && (punches || self.zero_range.known() == Can::YES)
    }

    /// Make all writes that were finished before this call durable.
    pub fn flush(&self) -> Result<(), Errno> {
        if self.flush_failed.load(Ordering::Acquire) {
            return Err(Errno::Io);
        }
        self.file.sync_data().map_err(|error| {
            self.flush_failed.store(true, Ordering::Release);
            tracing::error!(path = %self.path.display(), %error, "fdatasync failed; the disk cannot be flushed any more");
            guest_errno(&error)
        })
    }

    /// Ask the kernel to read ahead; a hint that cannot fail.
    pub fn prefetch(&self, offset: u64, length: u64) {
        let length = NonZeroU64::new(length.min(PREFETCH_BYTES_MAX));
        if length.is_some() {
            let _hint = rustix::fs::fadvise(&self.file, offset, length, rustix::fs::Advice::WillNeed);
        }
    }

    /// Allocation from `offset` on, at most `length` bytes; may stop early, covers at least one byte. A device, and a
    /// file system that cannot say, report data.
    pub fn allocation(&self, offset: u64, length: u64) -> Result<Vec<Allocation>, Errno> {
        let end = offset + length;
        let data = |length| Allocation { length, hole: false, zero: false };
        let hole = |length| Allocation { length, hole: true, zero: true };
        if self.device {
            return Ok(vec![data(length)]);
        }
        let (mut runs, mut at) = (Vec::new(), offset);
        while at < end && runs.len() < RUNS_MAX {
            let start = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) => start.min(end),
                // No data up to the end of the file.
                Err(Os::NXIO) => end,
                Err(Os::INVAL | Os::OPNOTSUPP) => return Ok(vec![data(length)]),
                Err(error) => return Err(guest_errno(&error.into())),
            };
            if start > at {
                runs.push(hole(start - at));
            }
            at = start;
            if at < end {
                let stop = rustix::fs::seek(&self.file, SeekFrom::Hole(at)).map_or(end, |stop| stop.clamp(at, end));
                // A writer may have filled or punched in between: progress by at least one byte.
                let stop = stop.max(at + 1);
                runs.push(data(stop - at));
                at = stop;
            }
        }
        Ok(runs)
    }
}

/// What the guest sees of an operating system error ("Error values": EDQUOT and EFBIG are ENOSPC).
fn guest_errno(error: &std::io::Error) -> Errno {
    match Os::from_io_error(error) {
        Some(Os::NOSPC | Os::DQUOT | Os::FBIG) => Errno::NoSpace,
        Some(Os::PERM | Os::ACCESS | Os::ROFS | Os::BADF) => Errno::Perm,
        Some(Os::NOMEM) => Errno::NoMem,
        _ => Errno::Io,
    }
}
