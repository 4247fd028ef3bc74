//! In steady state a request allocates nothing: not for reading, not for writing, not at depth 32, not on the pool.

#![allow(clippy::unwrap_used)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Client, Rig};
use watari_core::nbd::wire::*;
use watari_nbd::FileDisk;
use watari_nbd::local::LocalDiskConfig;

/// Counts allocations of the whole process; the client below makes none of its own.
struct Counting;
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_request_in_steady_state_allocates_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    std::fs::write(&image, vec![7; 16 << 20]).unwrap();
    let disk = FileDisk::open(&image, LocalDiskConfig::new("disk")).unwrap();
    let rig = Rig::new(Arc::new(disk));
    for (kind, length) in [(CMD_READ, 4096u32), (CMD_READ, 65536), (CMD_WRITE, 4096), (CMD_WRITE, 65536)] {
        let mut client = Client::enter(&rig.path, true);
        let mut batch = Vec::new();
        for i in 0..32u64 {
            batch.extend(Client::header(0, kind, i, i * 65536, length));
            if kind == CMD_WRITE {
                batch.resize(batch.len() + length as usize, 9);
            }
        }
        let reply = if kind == CMD_READ { 28 + length as usize } else { 16 };
        let mut replies = vec![0u8; 32 * reply];
        let mut rounds = |count: usize| {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            for _ in 0..count {
                // The sending side needs a thread of its own only if the server stopped reading; it does not.
                client.stream.write_all(&batch).unwrap();
                client.stream.read_exact(&mut replies).unwrap();
            }
            ALLOCATIONS.load(Ordering::Relaxed) - before
        };
        // Warm up: buffers, slots and queues reach their size.
        rounds(50);
        let allocations = rounds(200);
        // 6400 requests. A handful may come from threads that start when the machine makes the disk look slow.
        assert!(allocations < 100, "{allocations} allocations for 6400 requests of command {kind}, {length} bytes");
    }
}
