//! The only unsafe code of the maps: one reserved range of addresses onto which pieces of one file are attached.
//!
//! The whole range can always be *read*: where nothing is attached it is anonymous memory, which reads as the shared
//! zero page and costs nothing. It can be *written* only where a piece of the file is attached; a store elsewhere ends
//! the process with SIGSEGV, which is wanted: a mark in memory that does not survive would be a lost mark.
//! An attached piece must have been allocated in the file first, or a full tmpfs would answer a store with SIGBUS.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::AtomicU64;

use rustix::fs::{FallocateFlags, fallocate, fstat};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// A range of addresses as long as a file, both with the same offsets.
pub(super) struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
    file: File,
}

// SAFETY: the range belongs to this value alone until it is dropped, and all access to it goes through `AtomicU64`.
unsafe impl Send for Mapping {}
// SAFETY: as above; `attach` and `detach` replace pages of a range that stays mapped and readable throughout.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserve addresses for the first `bytes` of `file`; nothing is attached yet. `bytes` is a multiple of the page size.
    pub(super) fn reserve(file: File, bytes: usize) -> io::Result<Mapping> {
        assert!(bytes > 0 && bytes.is_multiple_of(rustix::param::page_size()));
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let base =
            unsafe { mmap_anonymous(null_mut(), bytes, ProtFlags::READ, MapFlags::PRIVATE | MapFlags::NORESERVE)? };
        let base = NonNull::new(base.cast()).expect("mmap never returns the null page without MAP_FIXED");
        Ok(Mapping { base, bytes, file })
    }

    fn check(&self, range: &Range<usize>) {
        let page = rustix::param::page_size();
        assert!(range.start < range.end && range.end <= self.bytes, "{range:?} of {}", self.bytes);
        assert!(range.start.is_multiple_of(page) && range.end.is_multiple_of(page), "{range:?} is not whole pages");
    }

    /// Let the file hold memory for `range`. `ENOSPC` when the file system is full, `ENOMEM` at a memory limit.
    pub(super) fn allocate(&self, range: Range<usize>) -> io::Result<()> {
        self.check(&range);
        loop {
            match fallocate(&self.file, FallocateFlags::KEEP_SIZE, range.start as u64, range.len() as u64) {
                Err(rustix::io::Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    /// Give the file's memory for `range` back; it reads as zeroes afterwards.
    pub(super) fn punch(&self, range: Range<usize>) -> io::Result<()> {
        self.check(&range);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&self.file, flags, range.start as u64, range.len() as u64)?)
    }

    /// Make `range` of the file, which must be allocated, visible and writable at its place.
    pub(super) fn attach(&self, range: Range<usize>) -> io::Result<()> {
        self.check(&range);
        // SAFETY: the target lies within our own reservation (checked), which nobody else manages. The references
        // handed out by `words` stay valid: the kernel replaces the pages under its lock, so a concurrent load sees
        // the zero page or the file's page, never a hole.
        unsafe {
            let at = self.base.as_ptr().add(range.start).cast();
            let prot = ProtFlags::READ | ProtFlags::WRITE;
            mmap(at, range.len(), prot, MapFlags::SHARED | MapFlags::FIXED, self.file.as_fd(), range.start as u64)?;
        }
        Ok(())
    }

    /// Put the zero page back at `range`. Nobody may store into it any more.
    pub(super) fn detach(&self, range: Range<usize>) -> io::Result<()> {
        self.check(&range);
        // SAFETY: as in `attach`.
        unsafe {
            let at = self.base.as_ptr().add(range.start).cast();
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
            mmap_anonymous(at, range.len(), ProtFlags::READ, flags)?;
        }
        Ok(())
    }

    /// `count` words from byte `offset` on. Storing is allowed only where the file is attached (see the module's header).
    #[inline]
    pub(super) fn words(&self, offset: usize, count: usize) -> &[AtomicU64] {
        assert!(offset.is_multiple_of(8) && count <= self.bytes / 8 && offset <= self.bytes - count * 8);
        // SAFETY: in bounds and aligned (checked); mapped and readable as long as `self` lives; every bit pattern is an
        // `AtomicU64`; all access, also by other processes that map the file, is by atomics of this width.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(offset).cast::<AtomicU64>(), count) }
    }

    /// Bytes of memory that the file holds.
    pub(super) fn resident_bytes(&self) -> io::Result<u64> {
        Ok(fstat(&self.file)?.st_blocks as u64 * 512)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the whole range is ours, and `words` ties every reference into it to the life of `self`.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}
