//! Commit: from an exact list of staged frames to a durable generation (I4).
//!
//! Order on the medium: image (direct frames) → journal → list file → folder → manifest. Until the manifest slot is
//! synced nothing counts, and an interrupted commit leaves a list file that no manifest names; the next open removes it.

use super::{
    Images, Mark, ReplicaError, ReplicaStore,
    delta::DeltaMap,
    journal::FrameKey,
    list::{CommitList, Entry, ListWriter, Root, RootHasher},
    store::{Pending, remove_if_there},
};
use crate::{
    frame::FrameKind,
    geometry::{Generation, Sequence},
    storage::Storage,
};
use alloc::{format, string::String, sync::Arc, vec::Vec};

/// Most sequences named in one answer; the source sends those and asks again.
pub const LACKS_MAX: usize = 65_536;

/// The replica's answer to a commit request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CommitAnswer {
    /// Complete, checked and durable.
    Committed,
    /// It was committed before with this root.
    AlreadyCommitted,
    /// These listed frames are not here, or not what the list says; at most [`LACKS_MAX`] are named. Nothing was changed.
    Lacks(Vec<Sequence>),
    /// The generation does not follow the newest one here, or exists with another root.
    Conflict { newest: Option<Mark> },
}

/// A commit request that is being received.
#[derive(Debug)]
pub(crate) struct Committing {
    generation: Generation,
    parent: Generation,
    now_seconds: u64,
    root: RootHasher,
    last: Option<FrameKey>,
    lacks: Vec<Sequence>,
    /// A repetition only hashes; what matters is whether the root is the known one.
    fresh: bool,
    writer: ListWriter,
    delta: DeltaMap,
}

impl<M: Storage, D: Images> ReplicaStore<M, D> {
    /// Commit a list that is in memory. `now_seconds`: wall clock, seconds since 1970.
    pub fn commit(&mut self, list: &CommitList, now_seconds: u64) -> Result<CommitAnswer, ReplicaError> {
        self.begin_commit(list.generation, list.parent, now_seconds)?;
        self.append_entries(&list.entries)?;
        self.finish_commit(list.root)
    }

    /// Begin to receive a commit list. One that was begun before is forgotten.
    pub fn begin_commit(
        &mut self,
        generation: Generation,
        parent: Generation,
        now_seconds: u64,
    ) -> Result<(), ReplicaError> {
        self.guard()?;
        let outcome = self.abort_commit();
        self.note(outcome)?;
        let floor = self.manifest.floor;
        if generation.epoch < floor {
            return Err(ReplicaError::BelowFloor { found: generation.epoch, floor });
        }
        if generation.epoch > floor {
            return Err(ReplicaError::AboveFloor { found: generation.epoch, floor });
        }
        if self.manifest.rolling_back.is_some() {
            return Err(ReplicaError::RollingBack);
        }
        let newest = self.manifest.newest.map(|mark| mark.generation);
        let fresh = parent == newest.unwrap_or_default() && generation.number > parent.number;
        self.committing = Some(Committing {
            generation,
            parent,
            now_seconds,
            root: RootHasher::new(generation, parent),
            last: None,
            lacks: Vec::new(),
            fresh,
            writer: ListWriter::new(generation),
            delta: DeltaMap::default(),
        });
        Ok(())
    }

    /// Add the next entries, in (session, sequence) order over all calls.
    pub fn append_entries(&mut self, entries: &[Entry]) -> Result<(), ReplicaError> {
        self.guard()?;
        let outcome = self.append_all(entries);
        if outcome.is_err() {
            let aborted = self.abort_commit();
            self.note(aborted)?;
        }
        self.note(outcome)
    }

    fn append_all(&mut self, entries: &[Entry]) -> Result<(), ReplicaError> {
        for entry in entries {
            let key = FrameKey { session: entry.session, sequence: entry.sequence };
            let committing = self.committing.as_mut().ok_or(ReplicaError::NoCommit)?;
            if committing.last.is_some_and(|last| last >= key) {
                return Err(ReplicaError::BadList(format!("{key:?} is out of order")));
            }
            committing.last = Some(key);
            committing.root.entry(entry);
            if !committing.fresh {
                continue;
            }
            if committing.writer.push(entry) {
                self.with_meta_room(|store| match &mut store.committing {
                    Some(committing) => committing.writer.flush(&mut store.meta),
                    None => Err(ReplicaError::NoCommit),
                })?;
            }
            self.take_entry(key, entry)?;
        }
        Ok(())
    }

    /// Find the entry's frame and add its blocks to the delta, or note that it lacks.
    fn take_entry(&mut self, key: FrameKey, entry: &Entry) -> Result<(), ReplicaError> {
        if self.unjournaled.contains_key(&key) {
            self.sync_all_staged()?;
        }
        let floor = self.manifest.floor;
        let frame = self.journal.get(key).cloned().filter(|frame| {
            frame.header.crc32 == entry.crc32
                && frame.header.digest == entry.digest
                && frame.header.epoch >= floor
                && Some(key.session) == self.session
        });
        let mut good = frame.is_some();
        if let Some(frame) = &frame {
            if entry.excluded.len() as u64 > frame.header.blocks().div_ceil(8) {
                return Err(ReplicaError::BadList(format!("{key:?} excludes blocks that it does not have")));
            }
            // A generation may have been committed since the comparison.
            let base = self.manifest.newest.map_or(0, |mark| mark.generation.number.0);
            if frame.header.kind == FrameKind::Same && frame.base != base {
                good = self.blocks_digest(frame.header.disk, &frame.header.extents)? == frame.header.digest;
                if !good {
                    // Staged again under the same number it would be taken for a repetition.
                    self.journal.drop_frames([key]);
                }
            }
        }
        let committing = self.committing.as_mut().ok_or(ReplicaError::NoCommit)?;
        match frame.filter(|_| good) {
            Some(frame) => committing.delta.add(frame, entry.excluded.clone()),
            None if committing.lacks.len() < LACKS_MAX => committing.lacks.push(entry.sequence),
            None => {}
        }
        Ok(())
    }

    /// The list is complete: check it and make the generation durable. Anything but `Committed` changed nothing.
    pub fn finish_commit(&mut self, root: Root) -> Result<CommitAnswer, ReplicaError> {
        self.guard()?;
        let committing = self.committing.take().ok_or(ReplicaError::NoCommit)?;
        let list = String::from(committing.writer.name());
        let fresh = committing.fresh;
        let outcome = self.finish(committing, root);
        let outcome = self.note(outcome);
        // After a failed sync the manifest may name the list all the same, so then it stays.
        let committed = matches!(outcome, Ok(CommitAnswer::Committed));
        if fresh && !committed && self.poisoned().is_none() {
            let removed = remove_if_there(&mut self.meta, &list);
            self.note(removed)?;
        }
        outcome
    }

    fn finish(&mut self, mut committing: Committing, root: Root) -> Result<CommitAnswer, ReplicaError> {
        let generation = committing.generation;
        if committing.root.finish() != root {
            return Err(ReplicaError::BadList("the root is not that of the entries".into()));
        }
        if !committing.fresh {
            let known = self.known_root(generation);
            return Ok(match known {
                Some(known) if known == root => CommitAnswer::AlreadyCommitted,
                _ => CommitAnswer::Conflict { newest: self.manifest.newest },
            });
        }
        if !committing.lacks.is_empty() {
            return Ok(CommitAnswer::Lacks(committing.lacks));
        }
        self.sync_all_staged()?;
        let delta = core::mem::take(&mut committing.delta);
        let (delta, clear_rest) = self.seal(delta)?;
        let mark = Mark { generation, root, committed_at_seconds: committing.now_seconds };
        let parent = committing.parent;
        self.with_meta_room(|store| committing.writer.finish(&mut store.meta, &mark, parent, clear_rest))?;
        self.meta.sync_folder()?;
        let was_virgin = self.manifest.virgin;
        self.with_meta_room(|store| {
            store.write_manifest(|manifest| {
                manifest.newest = Some(mark);
                manifest.virgin = false;
            })
        })?;
        delta.frames.iter().for_each(|frame| self.journal.hold(frame.frame.key()));
        if was_virgin {
            self.leave_direct_mode();
        }
        let list = String::from(committing.writer.name());
        self.pending.push_back(Pending { mark, delta: Arc::new(delta), list });
        Ok(CommitAnswer::Committed)
    }

    /// Check that each block has one supplier. Onto a virgin image, whatever may lie in it that the list does not supply
    /// becomes zero: before the first commit every disk is zero by definition.
    fn seal(&self, delta: DeltaMap) -> Result<(DeltaMap, bool), ReplicaError> {
        let bad = |overlap| ReplicaError::BadList(format!("{overlap}"));
        let delta = delta.seal(None).map_err(bad)?;
        if !self.manifest.virgin || !(self.residue || self.unlisted_claims(&delta)) {
            return Ok((delta, false));
        }
        Ok((delta.seal(Some(&self.disk_blocks())).map_err(bad)?, true))
    }

    /// True if a block was written straight into the image and no listed frame supplies it.
    fn unlisted_claims(&self, delta: &DeltaMap) -> bool {
        (0u16..).zip(&self.claims).any(|(disk, claims)| {
            claims.iter().any(|(start, end)| {
                let mut at = *start;
                for piece in delta.touching(crate::geometry::DiskIndex(disk), *start, *end) {
                    if piece.start > at {
                        break;
                    }
                    at = piece.end();
                }
                at < *end
            })
        })
    }

    /// After the first commit no record vouches for the image any more, and frames that it did not list are gone.
    pub(crate) fn leave_direct_mode(&mut self) {
        self.claims.iter_mut().for_each(|claims| claims.clear());
        self.residue = false;
        let dropped: Vec<FrameKey> =
            self.journal.staged().filter(|frame| frame.in_image).map(|frame| frame.key()).collect();
        self.journal.drop_frames(dropped);
    }

    /// Root of a generation that is kept here.
    fn known_root(&self, generation: Generation) -> Option<Root> {
        let newest = self.manifest.newest.iter().copied();
        newest.chain(self.kept()).find(|mark| mark.generation == generation).map(|mark| mark.root)
    }

    /// Forget a commit that was begun; its list file goes.
    pub(crate) fn abort_commit(&mut self) -> Result<(), ReplicaError> {
        match self.committing.take() {
            Some(committing) if committing.fresh => remove_if_there(&mut self.meta, committing.writer.name()),
            _ => Ok(()),
        }
    }
}
