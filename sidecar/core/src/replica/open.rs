//! Opening a replica folder after whatever happened to it.
//!
//! Everything is read and checked before anything is changed: a damaged or newer folder is left as it was. What interrupted
//! work left behind (unfinished files, retired lists, orphaned undo, torn records) is removed only after that.
//! A person may ask to salvage: damaged generations that are not applied are then given up, by name.

use super::{
    Event, Images, Mark, Options, ReplicaError, ReplicaStore,
    delta::DeltaMap,
    journal::{FrameKey, Journal, Unfinished},
    list::{self, ListHeader},
    manifest::{MANIFEST_MAGIC, MANIFEST_NAME, MANIFEST_VERSION, Manifest},
    store::{Pending, check_images, is_ours, remove_if_there},
    undo::{self, UndoInfo},
};
use crate::{frame::Decompress, geometry::Generation, slots::SlotFile, storage::Storage};
use alloc::{boxed::Box, collections::BTreeSet, format, string::String, sync::Arc, vec::Vec};

/// What salvaging decided; written when everything else was read.
#[derive(Clone, Debug)]
pub(crate) struct Salvage {
    newest: Option<Mark>,
    roll_back: Option<Generation>,
    lost: Vec<Generation>,
}

impl<M: Storage, D: Images> ReplicaStore<M, D> {
    /// Open a folder. `Ok(None)` if there is no replica in it (or its creation was interrupted).
    pub fn open(
        meta: M,
        images: D,
        decompress: Box<dyn Decompress + Send>,
        options: Options,
    ) -> Result<Option<Self>, ReplicaError> {
        let names = meta.list()?;
        let Some((slot, payload)) = SlotFile::open(&meta, MANIFEST_NAME, MANIFEST_MAGIC, MANIFEST_VERSION)? else {
            // Nothing else is written before the manifest is complete.
            if names.iter().any(|name| is_ours(name) && name != MANIFEST_NAME) {
                return Err(ReplicaError::corrupt(MANIFEST_NAME, "it is missing although other files are there"));
            }
            return Ok(None);
        };
        let manifest = Manifest::decode(&payload.bytes)
            .map_err(|error| ReplicaError::corrupt(MANIFEST_NAME, &format!("{error}")))?;
        check_images(&images, &manifest)?;
        let (journal, unfinished) = Journal::load(&meta, &names, manifest.identity, options.journal)?;
        let mut store = Self::assemble(meta, images, decompress, options, slot, manifest, journal);
        match store.load_pending(&names) {
            Err(ReplicaError::Corrupt { .. }) if store.options.salvage => store.load_what_is_whole(&names)?,
            loaded => loaded?,
        }
        let merged = store.load_history(&names)?;
        if !store.manifest.virgin {
            // Unlisted frames that went into the image were dropped by the first commit.
            let dropped: Vec<FrameKey> =
                store.journal.staged().filter(|frame| frame.in_image).map(|frame| frame.key()).collect();
            store.journal.drop_frames(dropped);
        } else {
            store.residue = store.manifest.direct_started;
            // A killed process leaves image writes in the page cache; they are synced before a record of them counts.
            store.dirty_disks = (0..store.manifest.disk_bytes.len() as u16).collect();
        }
        if !store.options.read_only {
            store.write_salvage()?;
            store.clean_up(&names, unfinished, &merged)?;
            // So they are before a commit rests on what a former life left there, whose folder this may not be: "you have
            // this" writes nothing (`create` has the same rule).
            store.dirty_disks = (0..store.manifest.disk_bytes.len() as u16).collect();
        }
        Ok(Some(store))
    }

    /// Follow the lists from the newest committed generation back to the applied one.
    fn load_pending(&mut self, names: &[String]) -> Result<(), ReplicaError> {
        let applied = self.manifest.applied.map(|mark| mark.generation);
        let Some(newest) = self.manifest.newest else {
            return Ok(());
        };
        if self.manifest.rolling_back.is_some() {
            return Ok(());
        }
        let mut next = newest.generation;
        while Some(next) != applied && next != Generation::default() {
            let name = list::list_name(next);
            if !names.contains(&name) {
                return Err(ReplicaError::corrupt(&name, "the list of a committed generation is missing"));
            }
            let header = list::read_list_header(&self.meta, &name)?;
            if header.mark.generation != next || header.parent.number >= next.number {
                return Err(ReplicaError::corrupt(&name, "it is not the list of this generation"));
            }
            let delta = self.load_delta(&name, &header)?;
            self.pending.push_front(Pending { mark: header.mark, delta: Arc::new(delta), list: name });
            next = header.parent;
        }
        if self.pending.back().is_some_and(|pending| pending.mark != newest) {
            return Err(ReplicaError::corrupt(MANIFEST_NAME, "its newest generation is not the one in the list"));
        }
        // A base that is not applied can only be the empty generation before the first commit.
        if next == Generation::default() && applied.is_some() {
            return Err(ReplicaError::corrupt(MANIFEST_NAME, "the applied generation is no ancestor of the newest"));
        }
        Ok(())
    }

    fn load_delta(&mut self, name: &str, header: &ListHeader) -> Result<DeltaMap, ReplicaError> {
        let mut delta = DeltaMap::default();
        let journal = &self.journal;
        list::read_list(&self.meta, name, header, |entry| {
            let key = FrameKey { session: entry.session, sequence: entry.sequence };
            let frame = journal
                .get(key)
                .filter(|frame| frame.header.crc32 == entry.crc32 && frame.header.digest == entry.digest);
            let Some(frame) = frame else {
                return Err(ReplicaError::corrupt(name, &format!("committed frame {key:?} is not in the journal")));
            };
            delta.add(frame.clone(), entry.excluded);
            Ok(())
        })?;
        let rest = header.clear_rest.then(|| self.disk_blocks());
        let delta = delta.seal(rest.as_deref());
        let delta = delta.map_err(|overlap| ReplicaError::corrupt(name, &format!("{overlap}")))?;
        delta.frames.iter().for_each(|frame| self.journal.hold(frame.frame.key()));
        Ok(delta)
    }

    /// Follow the undo files from the image back.
    /// Answers the merged files of an interrupted thinning: they are durable before what they replace goes.
    fn load_history(&mut self, names: &[String]) -> Result<Vec<String>, ReplicaError> {
        let mut merged = Vec::new();
        let mut infos = Vec::new();
        for name in names.iter().filter(|name| undo::is_undo_name(name)) {
            infos.extend(undo::read_info(&self.meta, name)?);
        }
        let applied = self.manifest.applied.map(|mark| mark.generation);
        let mut next = match self.manifest.applying {
            Some(applying) if applying.undo => Some(applying.generation),
            Some(_) => None,
            None => applied,
        };
        while let Some(newer) = next {
            // Where thinning was interrupted after it merged two files, the longer step is the decided one, if it is whole: after a
            // loss of power its trailer may be there without its data.
            let mut steps: Vec<&UndoInfo> = infos.iter().filter(|info| info.newer == newer).collect();
            steps.sort_by_key(|info| info.older.generation);
            while let [longest, _, ..] = steps[..] {
                if undo::is_whole(&self.meta, longest)? {
                    merged.push(longest.name.clone());
                    break;
                }
                steps.remove(0);
            }
            let found = steps.first().copied();
            next = found.map(|info| info.older.generation).filter(|older| *older < newer);
            self.history.extend(found.filter(|_| next.is_some()).cloned());
        }
        let needed = self.manifest.applying.is_some_and(|applying| applying.undo);
        if needed && self.history.first().map(|info| Some(info.older.generation)) != Some(applied) {
            return Err(ReplicaError::corrupt(MANIFEST_NAME, "the undo of the generation being applied is missing"));
        }
        if let Some(to) = self.manifest.rolling_back
            && self.history.iter().all(|info| info.older.generation != to)
        {
            return Err(ReplicaError::corrupt(MANIFEST_NAME, "the undo for the roll-back is missing"));
        }
        Ok(merged)
    }

    /// Remove what interrupted work left, and make durable what counts from now on.
    fn clean_up(
        &mut self,
        names: &[String],
        unfinished: Vec<Unfinished>,
        merged: &[String],
    ) -> Result<(), ReplicaError> {
        for name in merged {
            self.meta.sync(name)?;
        }
        if !merged.is_empty() {
            self.meta.sync_folder()?;
        }
        let lists: BTreeSet<&str> = self.pending.iter().map(|pending| pending.list.as_str()).collect();
        let undo: BTreeSet<&str> = self.history.iter().map(|info| info.name.as_str()).collect();
        let mut orphans: Vec<String> = unfinished.into_iter().map(|Unfinished(name)| name).collect();
        for name in names {
            let orphan = (list::is_list_name(name) && !lists.contains(name.as_str()))
                || (undo::is_undo_name(name) && !undo.contains(name.as_str()));
            if orphan {
                orphans.push(name.clone());
            }
        }
        for name in &orphans {
            remove_if_there(&mut self.meta, name)?;
        }
        self.journal.recover(&mut self.meta)?;
        for disk in core::mem::take(&mut self.dirty_disks) {
            self.sync_image(disk)?;
        }
        Ok(())
    }

    /// Salvage: from the applied generation forwards, as far as the lists and their frames are whole.
    fn load_what_is_whole(&mut self, names: &[String]) -> Result<(), ReplicaError> {
        while let Some(pending) = self.pending.pop_back() {
            pending.delta.frames.iter().for_each(|frame| self.journal.release(frame.frame.key()));
        }
        let mut lists = Vec::new();
        for name in names.iter().filter(|name| list::is_list_name(name)) {
            if let Ok(header) = list::read_list_header(&self.meta, name) {
                lists.push((name.clone(), header));
            }
        }
        let mut newest = self.manifest.applied;
        loop {
            let parent = newest.map(|mark| mark.generation).unwrap_or_default();
            let Some((name, header)) = lists.iter().find(|(_, header)| header.parent == parent) else {
                break;
            };
            let Ok(delta) = self.load_delta(name, header) else {
                break;
            };
            newest = Some(header.mark);
            self.pending.push_back(Pending { mark: header.mark, delta: Arc::new(delta), list: name.clone() });
        }
        // An image in the middle of a damaged generation can only go back.
        let begun = self
            .manifest
            .applying
            .filter(|applying| self.pending.iter().all(|pending| pending.mark.generation != applying.generation));
        if begun.is_some_and(|applying| !applying.undo) {
            return Err(ReplicaError::corrupt(
                MANIFEST_NAME,
                "a damaged generation is partly in the image and there is no undo; compare all blocks with the peer",
            ));
        }
        let roll_back = begun.and(self.manifest.applied).map(|mark| mark.generation);
        let was = self.manifest.newest.map(|mark| mark.generation);
        let whole = newest.map(|mark| mark.generation);
        let known = lists.iter().map(|(_, header)| header.mark.generation).chain(was);
        let lost: BTreeSet<Generation> = known.filter(|found| Some(*found) > whole).collect();
        self.salvage = Some(Salvage { newest, roll_back, lost: lost.into_iter().rev().collect() });
        Ok(())
    }

    fn write_salvage(&mut self) -> Result<(), ReplicaError> {
        let Some(Salvage { newest, roll_back, lost }) = self.salvage.take() else {
            return Ok(());
        };
        self.write_manifest(|manifest| {
            manifest.newest = newest;
            manifest.rolling_back = roll_back;
            manifest.shared = manifest.shared.filter(|shared| !lost.contains(shared));
        })?;
        self.report_event(Event::Salvaged { lost });
        Ok(())
    }
}
