//! The replica engine on real files, shared between threads.
//!
//! [`SharedReplica`] is one engine behind a mutex; [`Snapshot`] reads a kept generation on any thread without that mutex, as long
//! as nothing changes underneath it (the rule is in `watari_core::replica::view`). [`Zstd`] decompresses frames.
//! It schedules nothing: who calls `apply_step` and when is the receiver's part.

use crate::folder::{DiskImages, Folder};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use watari_core::{
    frame::Decompress,
    geometry::{DiskIndex, Generation},
    replica::{ReplicaError, ReplicaStore, View, ViewCache},
};

/// The engine over files.
pub type FileReplica = ReplicaStore<Folder, DiskImages>;

/// zstd, with the output bounded by what the frame header says.
#[derive(Clone, Copy, Debug, Default)]
pub struct Zstd;

impl Decompress for Zstd {
    fn decompress(&self, payload: &[u8], content_bytes: usize, out: &mut Vec<u8>) -> bool {
        out.clear();
        match zstd::bulk::decompress(payload, content_bytes) {
            Ok(content) => *out = content,
            Err(_) => return false,
        }
        out.len() == content_bytes
    }
}

/// One engine, many threads.
#[derive(Clone)]
pub struct SharedReplica {
    store: Arc<Mutex<FileReplica>>,
    folder: Folder,
    images: DiskImages,
}

impl SharedReplica {
    pub fn new(store: FileReplica) -> SharedReplica {
        let (folder, images) = (store.meta().clone(), store.images().clone());
        SharedReplica { store: Arc::new(Mutex::new(store)), folder, images }
    }

    /// The engine. Held for as long as one of its methods runs, a sync included.
    pub fn lock(&self) -> MutexGuard<'_, FileReplica> {
        // A panic inside the engine aborts the process (panic = "abort"); in tests the state is what the panic left.
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A reader of a kept generation, pinned until it is dropped. `None`: the newest committed one.
    pub fn snapshot(&self, generation: Option<Generation>) -> Result<Snapshot, ReplicaError> {
        let mut store = self.lock();
        let view = store.view(generation)?;
        if let Some(generation) = view.generation {
            store.pin(generation)?;
        }
        drop(store);
        Ok(Snapshot { shared: self.clone(), view: Mutex::new(view) })
    }
}

/// A pinned generation that any thread may read while frames arrive and generations are applied.
pub struct Snapshot {
    shared: SharedReplica,
    view: Mutex<View>,
}

impl Snapshot {
    pub fn generation(&self) -> Option<Generation> {
        self.view().generation
    }

    pub fn disk_bytes(&self, disk: DiskIndex) -> Option<u64> {
        self.view().disk_bytes(disk)
    }

    fn view(&self) -> View {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Fill `buf` from byte `offset`. Keep one cache per reading thread. Fails with `UnknownGeneration` once the generation was
    /// dropped (a roll-back, or history given up at a change of sides).
    pub fn read(
        &self,
        cache: &mut ViewCache,
        disk: DiskIndex,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), ReplicaError> {
        let mut view = self.view();
        loop {
            let read = view.read(&self.shared.folder, &self.shared.images, &Zstd, cache, disk, offset, buf);
            if view.is_current() {
                return read;
            }
            // The engine began something meanwhile: what was read counts for nothing.
            view = self.shared.lock().view(view.generation)?;
            *self.view.lock().unwrap_or_else(PoisonError::into_inner) = view.clone();
        }
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        if let Some(generation) = self.generation() {
            self.shared.lock().unpin(generation);
        }
    }
}
