//! The engine's state, how a folder is created, and how kept generations are read.

use super::{
    Claim, Event, Images, Mark, ReplicaError, View, ViewCache,
    apply::Work,
    commit::Committing,
    delta::DeltaMap,
    journal::{FrameKey, Journal, JournalLimits},
    list,
    manifest::{MANIFEST_MAGIC, MANIFEST_NAME, MANIFEST_VERSION, Manifest},
    open::Salvage,
    retention::Policy,
    staging::Unjournaled,
    undo::{self, UndoIndex, UndoInfo},
    view::Layer,
};
use crate::{
    frame::Decompress,
    geometry::{DiskIndex, Extent, Generation, Session, blocks_for},
    limits::DISK_BYTES_MAX,
    slots::SlotFile,
    storage::{Storage, StorageError},
};
use alloc::{
    boxed::Box,
    collections::{BTreeMap, BTreeSet, VecDeque},
    format,
    string::String,
    sync::{Arc, Weak},
    vec,
    vec::Vec,
};
use core::sync::atomic::{AtomicU64, Ordering};

/// Bytes read at a time when content is digested.
const DIGEST_CHUNK_BYTES: u64 = 1 << 20;

/// Most events kept for a caller who does not take them.
const EVENTS_MAX: usize = 1024;

/// How an engine behaves; nothing of it is durable.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    pub journal: JournalLimits,
    pub policy: Policy,
    /// Refuse every change and leave the folder untouched (`inspect`).
    pub read_only: bool,
    /// Where a committed generation that is not applied turns out to be damaged, go back to the newest one that is whole and
    /// say which were lost ([`Event::Salvaged`]), instead of refusing the folder. For a person's decision only (I7).
    pub salvage: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            journal: JournalLimits { segment_bytes_max: 64 << 20, journal_bytes_max: 8 << 30 },
            policy: Policy::default(),
            read_only: false,
            salvage: false,
        }
    }
}

/// A committed generation that is not in the image yet.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub mark: Mark,
    pub delta: Arc<DeltaMap>,
    pub list: String,
}

/// The replica engine. See the module documentation of [`crate::replica`].
pub struct ReplicaStore<M, D> {
    pub(crate) meta: M,
    pub(crate) images: D,
    pub(crate) decompress: Box<dyn Decompress + Send>,
    pub(crate) options: Options,
    slot: SlotFile,
    pub(crate) manifest: Manifest,
    pub(crate) journal: Journal,
    pub(crate) session: Option<Session>,
    /// Per disk: blocks whose content in the image a journal record of the current session vouches for (before the
    /// first commit only).
    pub(crate) claims: Vec<BTreeMap<u64, u64>>,
    /// The image may hold data that no claim names: left by an older session, a crash or a failed write.
    pub(crate) residue: bool,
    /// Frames whose content is in the image but not synced there; their records are written after that sync.
    pub(crate) unjournaled: BTreeMap<FrameKey, Unjournaled>,
    /// Disks whose image has unsynced writes that a record vouches for.
    pub(crate) dirty_disks: BTreeSet<u16>,
    /// Oldest first.
    pub(crate) pending: VecDeque<Pending>,
    /// Undo files from the image backwards.
    pub(crate) history: Vec<UndoInfo>,
    pub(crate) committing: Option<Committing>,
    pub(crate) work: Work,
    pub(crate) pins: BTreeMap<Generation, u32>,
    pub(crate) stamps: Arc<AtomicU64>,
    pub(crate) events: Vec<Event>,
    /// What the last refusal for want of room asked for.
    pub(crate) full: BTreeMap<Claim, (String, u64)>,
    poisoned: Option<String>,
    pub(crate) salvage: Option<Salvage>,
    undo_cache: BTreeMap<String, Weak<UndoIndex>>,
}

impl<M: Storage, D: Images> ReplicaStore<M, D> {
    /// Make a fresh folder for disks of these sizes. `virgin`: the images were just created empty by this pair, so frames may
    /// go straight into them until the first commit.
    pub fn create(
        mut meta: M,
        images: D,
        decompress: Box<dyn Decompress + Send>,
        options: Options,
        identity: [u8; 16],
        disk_bytes: &[u64],
        virgin: bool,
    ) -> Result<Self, ReplicaError> {
        let manifest = Manifest {
            identity,
            virgin,
            direct_started: false,
            floor: 0,
            newest: None,
            applied: None,
            applying: None,
            rolling_back: None,
            shared: None,
            disk_bytes: disk_bytes.to_vec(),
        };
        check_images(&images, &manifest)?;
        if meta.list()?.iter().any(|name| is_ours(name)) {
            return Err(ReplicaError::corrupt(MANIFEST_NAME, "the folder already holds a replica"));
        }
        let encoded = manifest.encode();
        Manifest::decode(&encoded).map_err(|error| ReplicaError::corrupt(MANIFEST_NAME, &format!("{error}")))?;
        let slot = SlotFile::create(&mut meta, MANIFEST_NAME, MANIFEST_MAGIC, MANIFEST_VERSION, &encoded)?;
        let journal = Journal::new(identity, options.journal);
        let mut store = Self::assemble(meta, images, decompress, options, slot, manifest, journal);
        // What lies in the images may be in the page cache only: written by a killed process, or by somebody who brought a
        // copy. It is synced before a record or a commit vouches for it.
        store.dirty_disks = (0..disk_bytes.len() as u16).collect();
        Ok(store)
    }

    pub(crate) fn assemble(
        meta: M,
        images: D,
        decompress: Box<dyn Decompress + Send>,
        options: Options,
        slot: SlotFile,
        manifest: Manifest,
        journal: Journal,
    ) -> Self {
        ReplicaStore {
            meta,
            images,
            decompress,
            options,
            slot,
            claims: vec![BTreeMap::new(); manifest.disk_bytes.len()],
            manifest,
            journal,
            session: None,
            residue: false,
            unjournaled: BTreeMap::new(),
            dirty_disks: BTreeSet::new(),
            pending: VecDeque::new(),
            history: Vec::new(),
            committing: None,
            work: Work::Idle,
            pins: BTreeMap::new(),
            stamps: Arc::new(AtomicU64::new(0)),
            events: Vec::new(),
            full: BTreeMap::new(),
            poisoned: None,
            salvage: None,
            undo_cache: BTreeMap::new(),
        }
    }

    /// Refuse a change to a poisoned or read-only engine.
    pub(crate) fn guard(&self) -> Result<(), ReplicaError> {
        if self.options.read_only {
            return Err(ReplicaError::ReadOnly);
        }
        match &self.poisoned {
            Some(reason) => Err(ReplicaError::Poisoned(reason.clone())),
            None => Ok(()),
        }
    }

    /// Remember what an operation's outcome means for the next one: want of room is a state that passes, a failed medium is not.
    pub(crate) fn note<T>(&mut self, outcome: Result<T, ReplicaError>) -> Result<T, ReplicaError> {
        match outcome {
            Ok(value) => Ok(value),
            Err(error) => Err(self.note_error(error)),
        }
    }

    fn note_error(&mut self, error: ReplicaError) -> ReplicaError {
        if let Some((claim, place)) = error.no_space() {
            let (place, needed) = (String::from(place), self.room_needed());
            self.full.insert(claim, (place.clone(), needed));
            return ReplicaError::Full { claim, place, needed };
        }
        match &error {
            ReplicaError::Storage(_)
            | ReplicaError::Image(_)
            | ReplicaError::Slot(_)
            | ReplicaError::Corrupt { .. } => {
                self.poisoned = Some(format!("{error}"));
            }
            ReplicaError::Full { .. }
            | ReplicaError::ApplyFirst
            | ReplicaError::JournalTooSmall { .. }
            | ReplicaError::NewerVersion { .. }
            | ReplicaError::Frame(_)
            | ReplicaError::BelowFloor { .. }
            | ReplicaError::AboveFloor { .. }
            | ReplicaError::OtherSession { .. }
            | ReplicaError::OutOfRange { .. }
            | ReplicaError::NotSame(_)
            | ReplicaError::FrameConflict(_)
            | ReplicaError::UnknownGeneration(_)
            | ReplicaError::NoCommit
            | ReplicaError::BadList(_)
            | ReplicaError::RollingBack
            | ReplicaError::DiskSmaller { .. }
            | ReplicaError::ReadOnly
            | ReplicaError::Poisoned(_) => {}
        }
        error
    }

    /// An estimate of the room that lets work go on: what is still to be applied, at least one segment's slack.
    fn room_needed(&self) -> u64 {
        let pending: u64 = self
            .pending
            .iter()
            .flat_map(|pending| &pending.delta.pieces)
            .map(|piece| u64::from(piece.blocks) * crate::geometry::BLOCK_BYTES)
            .sum();
        pending.max(1 << 20)
    }

    /// Make a changed manifest durable; in memory it changes only then.
    pub(crate) fn write_manifest(&mut self, change: impl FnOnce(&mut Manifest)) -> Result<(), ReplicaError> {
        let mut next = self.manifest.clone();
        change(&mut next);
        if next == self.manifest {
            return Ok(());
        }
        self.slot.write(&mut self.meta, &next.encode())?;
        self.manifest = next;
        Ok(())
    }

    /// Tell all views that they must not be trusted any more. Before an image write or a removal that they do not expect.
    pub(crate) fn outdate_views(&self) {
        self.stamps.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn disk_blocks(&self) -> Vec<u64> {
        self.manifest.disk_bytes.iter().map(|bytes| blocks_for(*bytes)).collect()
    }

    pub(crate) fn undo_index(&mut self, info: &UndoInfo) -> Result<Arc<UndoIndex>, ReplicaError> {
        if let Some(index) = self.undo_cache.get(&info.name).and_then(Weak::upgrade) {
            return Ok(index);
        }
        self.undo_cache.retain(|_, index| index.strong_count() > 0);
        let index = Arc::new(undo::read_index(&self.meta, info)?);
        self.undo_cache.insert(info.name.clone(), Arc::downgrade(&index));
        Ok(index)
    }

    /// All generations that can be read here, newest first.
    pub fn kept(&self) -> Vec<Mark> {
        let mut kept: Vec<Mark> = self.pending.iter().rev().map(|pending| pending.mark).collect();
        if let Some(to) = self.manifest.rolling_back {
            let older = self.history.iter().map(|info| info.older);
            return older.skip_while(|mark| mark.generation != to).collect();
        }
        // Without undo the parent is gone as soon as the image may be written.
        let overwritten = self.manifest.applying.is_some_and(|applying| !applying.undo);
        if let Some(applied) = self.manifest.applied.filter(|_| !overwritten) {
            kept.push(applied);
            kept.extend(self.history.iter().map(|info| info.older).filter(|mark| *mark != applied));
        }
        kept
    }

    /// The content of a kept generation; `None` for the newest committed one, or for the image as it is before any commit.
    pub fn view(&mut self, generation: Option<Generation>) -> Result<View, ReplicaError> {
        let newest = self.manifest.newest.map(|mark| mark.generation);
        let wanted = generation.or(newest);
        let Some(wanted) = wanted else {
            return Ok(View::new(None, Vec::new(), &self.manifest.disk_bytes, &self.stamps));
        };
        if self.kept().iter().all(|mark| mark.generation != wanted) {
            return Err(ReplicaError::UnknownGeneration(wanted));
        }
        let mut layers = Vec::new();
        if self.pending.iter().any(|pending| pending.mark.generation == wanted) {
            let older = self.pending.iter().rev().skip_while(|pending| pending.mark.generation != wanted);
            layers.extend(older.map(|pending| Layer::Delta(pending.delta.clone())));
        } else {
            let at = self.history.iter().position(|info| info.older.generation == wanted);
            let steps: Vec<UndoInfo> = at.map(|at| self.history[..=at].to_vec()).unwrap_or_default();
            for info in steps.iter().rev() {
                layers.push(Layer::Undo(self.undo_index(info)?));
            }
        }
        Ok(View::new(Some(wanted), layers, &self.manifest.disk_bytes, &self.stamps))
    }

    /// Read a kept generation (`None`: the newest committed content) through the engine itself.
    pub fn read_at(
        &mut self,
        generation: Option<Generation>,
        disk: DiskIndex,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), ReplicaError> {
        let view = self.view(generation)?;
        self.read_view(&view, &mut ViewCache::default(), disk, offset, buf)
    }

    /// Read a view that this engine made.
    pub fn read_view(
        &self,
        view: &View,
        cache: &mut ViewCache,
        disk: DiskIndex,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), ReplicaError> {
        view.read(&self.meta, &self.images, &*self.decompress, cache, disk, offset, buf)
    }

    /// Digest (as in a `Same` frame) of the newest committed content of these extents, or of the image before any commit.
    pub fn blocks_digest(&mut self, disk: DiskIndex, extents: &[Extent]) -> Result<[u8; 32], ReplicaError> {
        self.check_extents(disk, extents)?;
        let view = self.view(None)?;
        let size = self.manifest.disk_bytes[usize::from(disk.0)];
        let mut hasher = crate::frame::content_hasher(disk, extents);
        let mut cache = ViewCache::default();
        let mut buf = Vec::new();
        for extent in extents {
            let mut at = extent.start.offset();
            while at < extent.end().offset() {
                let step = (extent.end().offset() - at).min(DIGEST_CHUNK_BYTES);
                buf.clear();
                buf.resize(step as usize, 0);
                // The last block of a disk is padded with zeroes.
                let inside = step.min(size.saturating_sub(at)) as usize;
                self.read_view(&view, &mut cache, disk, at, &mut buf[..inside])?;
                hasher.update(&buf);
                at += step;
            }
        }
        Ok(*hasher.finalize().as_bytes())
    }

    /// Recorded size of a disk, bytes.
    pub fn disk_bytes(&self, disk: DiskIndex) -> Option<u64> {
        self.manifest.disk_bytes.get(usize::from(disk.0)).copied()
    }

    /// A disk has grown (the claim first, then this; growth is adopted at a VM start, replica first). Durable when this
    /// returns. Shrinking is refused.
    pub fn grow_disk(&mut self, disk: DiskIndex, bytes: u64) -> Result<(), ReplicaError> {
        self.guard()?;
        let outcome = self.grow(disk, bytes);
        self.note(outcome)
    }

    fn grow(&mut self, disk: DiskIndex, bytes: u64) -> Result<(), ReplicaError> {
        let at = usize::from(disk.0);
        let recorded = self.manifest.disk_bytes.get(at).copied().unwrap_or(u64::MAX);
        if bytes < recorded || bytes > DISK_BYTES_MAX {
            return Err(ReplicaError::OutOfRange { disk: disk.0, block: blocks_for(bytes) });
        }
        self.images.grow(disk, bytes).map_err(ReplicaError::Image)?;
        self.sync_image(disk.0)?;
        self.write_manifest(|manifest| manifest.disk_bytes[at] = bytes)?;
        self.outdate_views();
        Ok(())
    }

    /// Refuse extents that are not on the disk.
    pub(crate) fn check_extents(&self, disk: DiskIndex, extents: &[Extent]) -> Result<(), ReplicaError> {
        let Some(bytes) = self.manifest.disk_bytes.get(usize::from(disk.0)) else {
            return Err(ReplicaError::OutOfRange { disk: disk.0, block: 0 });
        };
        let blocks = blocks_for(*bytes);
        match extents
            .iter()
            .find(|extent| extent.start.0.checked_add(u64::from(extent.blocks)).is_none_or(|end| end > blocks))
        {
            Some(extent) => Err(ReplicaError::OutOfRange { disk: disk.0, block: extent.start.0 }),
            None => Ok(()),
        }
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }
    pub fn images(&self) -> &D {
        &self.images
    }
    pub fn meta(&self) -> &M {
        &self.meta
    }
    /// Take the seams back, for instance to open the folder again.
    pub fn into_parts(self) -> (M, D) {
        (self.meta, self.images)
    }
    /// Remember something to tell; the oldest is forgotten when nobody asks.
    pub(crate) fn report_event(&mut self, event: Event) {
        if self.events.len() == EVENTS_MAX {
            self.events.remove(0);
        }
        self.events.push(event);
    }
    /// What happened since the last call that a person or a metric should hear of.
    pub fn take_events(&mut self) -> Vec<Event> {
        core::mem::take(&mut self.events)
    }
    /// Why every change is refused, if it is.
    pub fn poisoned(&self) -> Option<&str> {
        self.poisoned.as_deref()
    }
}

/// True for names of files that this engine makes.
pub(crate) fn is_ours(name: &str) -> bool {
    name == MANIFEST_NAME || name.starts_with("journal-") || list::is_list_name(name) || undo::is_undo_name(name)
}

pub(crate) fn check_images<D: Images>(images: &D, manifest: &Manifest) -> Result<(), ReplicaError> {
    for (disk, expected) in (0u16..).zip(&manifest.disk_bytes) {
        let found = images.size_bytes(DiskIndex(disk)).map_err(ReplicaError::Image)?;
        if found < *expected {
            return Err(ReplicaError::DiskSmaller { disk, found, expected: *expected });
        }
    }
    Ok(())
}

pub(crate) fn remove_if_there<M: Storage>(meta: &mut M, name: &str) -> Result<(), ReplicaError> {
    match meta.remove(name) {
        Ok(()) | Err(StorageError::Missing(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
