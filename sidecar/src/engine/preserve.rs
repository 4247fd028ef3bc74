//! Old content of frozen blocks that the guest overwrote while a generation is open (I3).
//!
//! Bounded: memory first, then a spill file that a thread of its own fills, so that no guest request ever waits for the
//! metadata folder (I8). When neither has room the generation is given up as a consistent point; that is the caller's
//! decision. Volatile: after a worker restart the generation is given up, the spill file is truncated at each start.

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use watari_core::geometry::{BLOCK_BYTES, Block, DiskIndex};

/// Most blocks written to the spill file in one go (1 MiB).
const SPILL_BATCH_BLOCKS: usize = 256;

type Key = (DiskIndex, Block);
type Content = Arc<[u8]>;

/// There is no room for another block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full;

#[derive(Default)]
struct Inner {
    memory: BTreeMap<Key, Content>,
    /// Slot numbers in the spill file.
    spilled: BTreeMap<Key, u64>,
    free_slots: Vec<u64>,
    slots: u64,
    /// The spill file failed once; it is not used again (style item 6).
    spill_broken: bool,
    /// Content of the open generation could not be read back.
    lost: bool,
    closing: bool,
    /// Raised by `clear`: a spill under way belongs to a former generation.
    round: u64,
}

/// See the module's header.
pub struct PreserveStore {
    shared: Arc<Shared>,
    memory_blocks_max: usize,
    spiller: Option<thread::JoinHandle<()>>,
}

struct Shared {
    inner: Mutex<Inner>,
    work: Condvar,
    file: Option<File>,
    slots_max: u64,
    spill_from_blocks: usize,
}

fn lock(shared: &Shared) -> MutexGuard<'_, Inner> {
    shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PreserveStore {
    /// `spill`: file and its bound in bytes. The file is made anew; if that fails the store lives in memory alone.
    pub fn new(memory_bytes: u64, spill: Option<(&Path, u64)>) -> Self {
        let made = spill.and_then(|(path, bytes)| {
            let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
            file.inspect_err(
                |e| tracing::warn!(path = %path.display(), error = %e, "no spill file: preserving in memory only"),
            )
            .ok()
            .map(|f| (f, bytes / BLOCK_BYTES))
        });
        let memory_blocks_max = (memory_bytes / BLOCK_BYTES) as usize;
        let (file, slots_max) = made.map_or((None, 0), |(f, n)| (Some(f), n));
        let shared = Arc::new(Shared {
            inner: Mutex::default(),
            work: Condvar::new(),
            file,
            slots_max,
            spill_from_blocks: memory_blocks_max / 2,
        });
        let spiller = shared.file.is_some().then(|| {
            let shared = shared.clone();
            thread::Builder::new().name("spill".into()).spawn(move || run_spiller(&shared)).ok()
        });
        PreserveStore { shared, memory_blocks_max, spiller: spiller.flatten() }
    }

    /// Keep the content of a block, if `claim` (called under the store's lock) says it is ours to keep.
    pub fn keep(
        &self,
        disk: DiskIndex,
        block: Block,
        content: &[u8],
        claim: impl FnOnce() -> bool,
    ) -> Result<(), Full> {
        let mut inner = lock(&self.shared);
        if inner.memory.len() >= self.memory_blocks_max {
            return Err(Full);
        }
        if claim() {
            inner.memory.insert((disk, block), content.into());
        }
        if inner.memory.len() > self.shared.spill_from_blocks {
            self.shared.work.notify_one();
        }
        Ok(())
    }

    pub fn blocks(&self) -> u64 {
        let inner = lock(&self.shared);
        (inner.memory.len() + inner.spilled.len()) as u64
    }

    /// Something that was kept cannot be read back: the generation cannot become a point in time any more.
    pub fn lost(&self) -> bool {
        lock(&self.shared).lost
    }

    /// Remove one block. `None`: it is not here (or its spilled copy cannot be read, which loses the generation).
    pub fn take(&self, disk: DiskIndex, block: Block) -> Option<Content> {
        let mut inner = lock(&self.shared);
        self.take_locked(&mut inner, (disk, block))
    }

    /// Remove up to `max` blocks of one disk, in order.
    pub fn take_some(&self, max: usize) -> Vec<(DiskIndex, Block, Content)> {
        let mut inner = lock(&self.shared);
        let first = [inner.memory.keys().next(), inner.spilled.keys().next()].into_iter().flatten().min().copied();
        let Some((disk, from)) = first else { return Vec::new() };
        let range = (disk, from)..=(disk, Block(u64::MAX));
        let mut keys: Vec<Key> = inner.memory.range(range.clone()).map(|(k, _)| *k).take(max).collect();
        keys.extend(inner.spilled.range(range).map(|(k, _)| *k).take(max));
        keys.sort_unstable();
        keys.truncate(max);
        keys.into_iter().filter_map(|k| self.take_locked(&mut inner, k).map(|c| (k.0, k.1, c))).collect()
    }

    fn take_locked(&self, inner: &mut Inner, key: Key) -> Option<Content> {
        if let Some(content) = inner.memory.remove(&key) {
            return Some(content);
        }
        let slot = inner.spilled.remove(&key)?;
        inner.free_slots.push(slot);
        let mut buffer = vec![0; BLOCK_BYTES as usize];
        let file = self.shared.file.as_ref().expect("slots exist only with a file");
        match file.read_exact_at(&mut buffer, slot * BLOCK_BYTES) {
            Ok(()) => Some(buffer.into()),
            Err(error) => {
                tracing::error!(%error, "preserved content cannot be read back from the spill file");
                inner.spill_broken = true;
                inner.lost = true;
                None
            }
        }
    }

    /// Forget everything: the generation is given up.
    pub fn clear(&self) {
        let mut inner = lock(&self.shared);
        inner.memory.clear();
        inner.spilled.clear();
        inner.free_slots.clear();
        inner.slots = 0;
        inner.lost = false;
        inner.round += 1;
    }
}

impl Drop for PreserveStore {
    fn drop(&mut self) {
        lock(&self.shared).closing = true;
        self.shared.work.notify_all();
        // A hung folder must not hang the end of the process: the thread is left alone.
        drop(self.spiller.take());
    }
}

fn run_spiller(shared: &Shared) {
    let file = shared.file.as_ref().expect("the spiller runs only with a file");
    loop {
        let mut inner = lock(shared);
        while !inner.closing && inner.memory.len() <= shared.spill_from_blocks {
            inner = shared.work.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        if inner.closing || inner.spill_broken {
            return;
        }
        let room = (shared.slots_max - inner.slots) as usize + inner.free_slots.len();
        let batch: Vec<(Key, Content)> =
            inner.memory.iter().take(SPILL_BATCH_BLOCKS.min(room)).map(|(k, c)| (*k, c.clone())).collect();
        let round = inner.round;
        if batch.is_empty() {
            // No room on disk: memory is the bound until something is taken.
            drop(shared.work.wait(inner).unwrap_or_else(PoisonError::into_inner));
            continue;
        }
        let mut placed = Vec::with_capacity(batch.len());
        for (key, content) in batch {
            let slot = inner.free_slots.pop().unwrap_or_else(|| {
                inner.slots += 1;
                inner.slots - 1
            });
            placed.push((key, content, slot));
        }
        drop(inner);
        let written = placed.iter().try_for_each(|(_, c, slot)| file.write_all_at(c, slot * BLOCK_BYTES));
        let mut inner = lock(shared);
        if inner.round != round {
            continue;
        }
        if let Err(error) = written {
            tracing::warn!(%error, "the spill file failed: preserving in memory only from now on");
            inner.spill_broken = true;
            return;
        }
        for (key, content, slot) in placed {
            // Taken meanwhile, or the same block of a later generation: then the slot is free again.
            if inner.memory.get(&key).is_some_and(|c| Arc::ptr_eq(c, &content)) {
                inner.memory.remove(&key);
                inner.spilled.insert(key, slot);
            } else {
                inner.free_slots.push(slot);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(n: u64) -> Vec<u8> {
        n.to_le_bytes().repeat(512)
    }

    #[test]
    fn content_comes_back_from_memory_and_from_the_spill_file() {
        let dir = tempfile::tempdir().unwrap();
        let store = PreserveStore::new(64 * BLOCK_BYTES, Some((&dir.path().join("spill"), 1 << 20)));
        let mut kept = 0;
        for n in 0..200 {
            while store.keep(DiskIndex(0), Block(n), &block(n), || true).is_err() {
                thread::sleep(std::time::Duration::from_millis(1));
            }
            kept += 1;
        }
        assert_eq!(store.blocks(), kept);
        assert_eq!(store.take(DiskIndex(0), Block(7)).as_deref(), Some(&block(7)[..]));
        let rest: Vec<_> =
            std::iter::from_fn(|| Some(store.take_some(50)).filter(|v| !v.is_empty())).flatten().collect();
        assert_eq!(rest.len(), 199);
        assert!(rest.iter().all(|(_, b, c)| **c == block(b.0)[..]));
        assert_eq!(store.blocks(), 0);
    }

    #[test]
    fn without_room_the_store_says_full_and_keeps_what_it_has() {
        let store = PreserveStore::new(2 * BLOCK_BYTES, None);
        assert_eq!(store.keep(DiskIndex(0), Block(1), &block(1), || true), Ok(()));
        assert_eq!(store.keep(DiskIndex(0), Block(2), &block(2), || false), Ok(()));
        assert_eq!(store.keep(DiskIndex(0), Block(2), &block(2), || true), Ok(()));
        assert_eq!(store.keep(DiskIndex(0), Block(3), &block(3), || true), Err(Full));
        assert_eq!(store.blocks(), 2);
        store.clear();
        assert_eq!(store.blocks(), 0);
    }
}
