//! Retention: which generations stay, and how the others go (I7).
//!
//! The oldest goes by removing its undo file. One in the middle goes by merging the two files around it into one, which is complete
//! and durable before the two are removed; after a crash in between the longer step is taken for the decided one.

use super::{
    Event, Images, Mark, ReplicaError, ReplicaStore,
    store::remove_if_there,
    undo::{UndoEntry, UndoIndex, UndoWriter},
};
use crate::{
    geometry::{BLOCK_BYTES, Generation},
    storage::Storage,
};
use alloc::{collections::BTreeSet, sync::Arc, vec, vec::Vec};

/// Of generations older than `older_than_seconds` at most one in `every_seconds` stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Thin {
    pub older_than_seconds: u64,
    pub every_seconds: u64,
}

/// What to keep beyond the newest generation. A generation stays if any of the first two rules holds it and, if only the
/// second does, thinning does not remove it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Policy {
    /// The newest so many stay. 0 and 1 both mean: only the newest.
    pub keep_last: u32,
    /// Those younger than this stay. 0: no rule by age.
    pub keep_seconds: u64,
    /// Applied to what is kept by age only.
    pub thin: Vec<Thin>,
}

impl Policy {
    /// True if anything beside the newest generation is wanted.
    pub fn keeps_history(&self) -> bool {
        self.keep_last > 1 || self.keep_seconds > 0
    }

    /// The generations (newest first) that this policy keeps.
    pub fn select(&self, kept: &[Mark], now_seconds: u64) -> BTreeSet<Generation> {
        let mut selected = BTreeSet::new();
        // For each rule, the slots of `every_seconds` that already have their generation. Oldest first, so that a slot's
        // choice stays the same while newer generations arrive.
        let mut taken: BTreeSet<(usize, u64)> = BTreeSet::new();
        for (index, mark) in kept.iter().enumerate().rev() {
            let age = now_seconds.saturating_sub(mark.committed_at_seconds);
            let by_count = index < (self.keep_last.max(1)) as usize;
            let mut by_age = age < self.keep_seconds;
            for (number, rule) in self.thin.iter().enumerate() {
                if by_age && age >= rule.older_than_seconds && rule.every_seconds > 0 {
                    by_age = taken.insert((number, mark.committed_at_seconds / rule.every_seconds));
                }
            }
            if by_count || by_age {
                selected.insert(mark.generation);
            }
        }
        selected
    }
}

/// What a call of [`ReplicaStore::retain`] removed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Retained {
    pub removed: Vec<Generation>,
    /// True if there is more to remove; call again.
    pub more: bool,
}

impl<M: Storage, D: Images> ReplicaStore<M, D> {
    /// Change the policy; it acts at the next [`ReplicaStore::retain`] and application.
    pub fn set_policy(&mut self, policy: Policy) {
        self.options.policy = policy;
    }

    /// Someone reads this generation: it must not go until as many calls of `unpin`.
    pub fn pin(&mut self, generation: Generation) -> Result<(), ReplicaError> {
        if self.kept().iter().all(|mark| mark.generation != generation) {
            return Err(ReplicaError::UnknownGeneration(generation));
        }
        *self.pins.entry(generation).or_default() += 1;
        Ok(())
    }

    pub fn unpin(&mut self, generation: Generation) {
        if let Some(count) = self.pins.get_mut(&generation) {
            *count -= 1;
            if *count == 0 {
                self.pins.remove(&generation);
            }
        }
    }

    /// The newest generation that both sides are known to have; never removed. Durable when this returns.
    pub fn set_shared(&mut self, generation: Generation) -> Result<(), ReplicaError> {
        self.guard()?;
        if self.kept().iter().all(|mark| mark.generation != generation) {
            return Err(ReplicaError::UnknownGeneration(generation));
        }
        let outcome = self.write_manifest(|manifest| manifest.shared = Some(generation));
        self.note(outcome)
    }

    /// Newest, newest shared, or in use (I7).
    pub(crate) fn is_protected(&self, generation: Generation) -> bool {
        self.manifest.newest.is_some_and(|mark| mark.generation == generation)
            || self.manifest.shared == Some(generation)
            || self.pins.contains_key(&generation)
    }

    /// Remove what the policy does not keep: all that can go from the old end, and at most one in the middle (which costs copying).
    /// `now_seconds`: wall clock, seconds since 1970.
    pub fn retain(&mut self, now_seconds: u64) -> Result<Retained, ReplicaError> {
        self.guard()?;
        let outcome = self.retain_checked(now_seconds);
        self.note(outcome)
    }

    fn retain_checked(&mut self, now_seconds: u64) -> Result<Retained, ReplicaError> {
        let mut retained = Retained::default();
        if self.manifest.rolling_back.is_some() {
            return Ok(retained);
        }
        let kept = self.kept();
        let selected = self.options.policy.select(&kept, now_seconds);
        let keep = |store: &Self, generation| selected.contains(&generation) || store.is_protected(generation);
        while let Some(last) = self.history.last() {
            let oldest = last.older.generation;
            if keep(self, oldest) || self.undo_in_use(self.history.len() - 1) {
                break;
            }
            self.remove_oldest()?;
            retained.removed.push(oldest);
        }
        // A middle one: newer file i-1 leads to it, older file i leads on from it.
        let middle = (1..self.history.len()).find(|at| {
            let generation = self.history[*at].newer;
            !keep(self, generation) && !self.undo_in_use(at - 1) && !self.undo_in_use(*at)
        });
        if let Some(at) = middle {
            let generation = self.history[at].newer;
            self.merge(at)?;
            retained.removed.push(generation);
            retained.more = true;
        }
        Ok(retained)
    }

    /// The undo of a generation that is being applied must stay as the manifest knows it.
    fn undo_in_use(&self, at: usize) -> bool {
        at == 0 && self.manifest.applying.is_some_and(|applying| applying.undo)
    }

    fn remove_oldest(&mut self) -> Result<(), ReplicaError> {
        if let Some(info) = self.history.pop() {
            self.outdate_views();
            remove_if_there(&mut self.meta, &info.name)?;
        }
        Ok(())
    }

    /// For want of room: give up the oldest kept generation if it may go. False if none may.
    pub(crate) fn drop_oldest_undo(&mut self) -> Result<bool, ReplicaError> {
        let Some(last) = self.history.last() else {
            return Ok(false);
        };
        let generation = last.older.generation;
        let in_use = self.undo_in_use(self.history.len() - 1) || self.manifest.rolling_back.is_some();
        if in_use || self.is_protected(generation) {
            return Ok(false);
        }
        self.remove_oldest()?;
        self.report_event(Event::UndoDropped { lost: vec![generation] });
        Ok(true)
    }

    /// Merge history files `at - 1` (newer) and `at` (older) into one that skips the generation between them.
    fn merge(&mut self, at: usize) -> Result<(), ReplicaError> {
        let (newer, older) = (self.history[at - 1].clone(), self.history[at].clone());
        let (first, second) = (self.undo_index(&newer)?, self.undo_index(&older)?);
        let mut writer = UndoWriter::new(newer.newer, older.older);
        let merged = match self.copy_merged(&mut writer, &first, &second) {
            Ok(()) => writer.finish(&mut self.meta)?,
            Err(error) => {
                remove_if_there(&mut self.meta, writer.name())?;
                return Err(error);
            }
        };
        self.outdate_views();
        self.history.splice(at - 1..=at, [merged.info]);
        // The shorter steps must go oldest first: alone, the older one leads nowhere.
        remove_if_there(&mut self.meta, &older.name)?;
        remove_if_there(&mut self.meta, &newer.name)?;
        Ok(())
    }

    /// Where both files have a block the older file's content counts: it is the one at the older generation.
    fn copy_merged(
        &mut self,
        writer: &mut UndoWriter,
        newer: &Arc<UndoIndex>,
        older: &Arc<UndoIndex>,
    ) -> Result<(), ReplicaError> {
        let mut runs: Vec<(&UndoIndex, UndoEntry, u64, u64)> = Vec::new();
        for entry in &older.entries {
            runs.push((older, *entry, entry.start, entry.end()));
        }
        for entry in &newer.entries {
            let mut at = entry.start;
            for hidden in older.touching(entry.disk, entry.start, entry.end()) {
                if hidden.start > at {
                    runs.push((newer, *entry, at, hidden.start));
                }
                at = at.max(hidden.end());
            }
            if at < entry.end() {
                runs.push((newer, *entry, at, entry.end()));
            }
        }
        runs.sort_unstable_by_key(|(_, entry, from, _)| (entry.disk, *from));
        for (index, entry, from, to) in runs {
            if entry.zero {
                writer.add_zero(&mut self.meta, entry.disk, from, to - from)?;
                continue;
            }
            let data = index.data(&self.meta, &entry)?;
            let bytes = |block: u64| ((block - entry.start) * BLOCK_BYTES) as usize;
            writer.add(&mut self.meta, entry.disk, from, &data[bytes(from)..bytes(to)])?;
        }
        Ok(())
    }
}
