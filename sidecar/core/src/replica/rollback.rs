//! Roll-back: the image goes back to an older kept generation; everything newer is dropped.
//!
//! The manifest names the goal, and it as the newest generation, before the first image write. Then the undo files between the image
//! and the goal are written into the image, newest first. They do not change meanwhile, so after a crash the same writes are done
//! again. Only when the images are synced and the manifest says so do the files go.

use super::{
    Event, Images, Mark, Phase, Progress, ReplicaError, ReplicaStore,
    apply::Work,
    journal::FrameKey,
    store::remove_if_there,
    undo::{UndoIndex, UndoInfo},
};
use crate::{
    geometry::{BLOCK_BYTES, DiskIndex, Generation},
    storage::Storage,
};
use alloc::{collections::BTreeSet, sync::Arc, vec::Vec};

#[derive(Debug)]
pub(crate) struct RollBack {
    to: Generation,
    /// Newest step first.
    steps: Vec<UndoInfo>,
    step: usize,
    index: Option<Arc<UndoIndex>>,
    entry: usize,
    touched: BTreeSet<u16>,
}

impl<M: Storage, D: Images> ReplicaStore<M, D> {
    /// Make an older kept generation the newest one. Returns what is dropped by it, newest first. Durable when this returns; the image
    /// follows in [`ReplicaStore::apply_step`], and until then frames and commits are refused. Pinned generations that are newer are
    /// dropped too; whoever uses them finds out at the next read.
    pub fn promote_to(&mut self, generation: Generation) -> Result<Vec<Generation>, ReplicaError> {
        self.guard()?;
        let outcome = self.begin_roll_back(generation);
        self.note(outcome)
    }

    fn begin_roll_back(&mut self, to: Generation) -> Result<Vec<Generation>, ReplicaError> {
        let kept = self.kept();
        let Some(at) = kept.iter().position(|mark| mark.generation == to) else {
            return Err(ReplicaError::UnknownGeneration(to));
        };
        let mark = kept[at];
        let dropped: Vec<Generation> = kept[..at].iter().map(|mark| mark.generation).collect();
        if dropped.is_empty() {
            return Ok(dropped);
        }
        self.abort_commit()?;
        self.abandon_work()?;
        let in_pending = self.pending.iter().position(|pending| pending.mark.generation == to);
        let applied = self.manifest.applied.map(|mark| mark.generation);
        // Back to what is applied, with no image write begun: nothing to undo.
        let in_image = applied == Some(to) && self.manifest.applying.is_none();
        self.write_manifest(|manifest| {
            manifest.newest = Some(mark);
            if in_pending.is_none() && !in_image {
                manifest.rolling_back = Some(to);
            }
            if manifest.shared.is_some_and(|shared| shared.number > to.number) {
                manifest.shared = None;
            }
        })?;
        self.outdate_views();
        let keep = in_pending.map_or(0, |at| at + 1);
        self.drop_pending(keep)?;
        Ok(dropped)
    }

    /// Drop committed generations that are not applied, all but the oldest `keep`.
    fn drop_pending(&mut self, keep: usize) -> Result<(), ReplicaError> {
        for pending in self.pending.split_off(keep) {
            remove_if_there(&mut self.meta, &pending.list)?;
            let keys: Vec<FrameKey> = pending.delta.frames.iter().map(|frame| frame.frame.key()).collect();
            self.journal.retire(keys);
        }
        self.journal.reclaim_durably(&mut self.meta)?;
        Ok(())
    }

    /// The steps from the image as it is to the goal.
    pub(crate) fn plan_roll_back(&self, to: Generation) -> RollBack {
        let last = self.history.iter().position(|info| info.older.generation == to);
        let steps = last.map(|last| self.history[..=last].to_vec()).unwrap_or_default();
        RollBack { to, steps, step: 0, index: None, entry: 0, touched: BTreeSet::new() }
    }

    pub(crate) fn roll_back_step(&mut self, mut work: RollBack, budget: u64) -> Result<Progress, ReplicaError> {
        let to = work.to;
        let written = self.roll_back_some(&mut work, budget);
        if !matches!(written, Ok(true)) {
            self.work = Work::RollBack(work);
            written?;
            return Ok(Progress::Working { generation: to, phase: Phase::RollingBack });
        }
        for disk in &work.touched {
            self.sync_image(*disk)?;
        }
        self.full.clear();
        self.finish_roll_back(work)?;
        Ok(Progress::RolledBack(to))
    }

    /// True when every step is written.
    fn roll_back_some(&mut self, work: &mut RollBack, budget: u64) -> Result<bool, ReplicaError> {
        let mut spent = 0;
        while let Some(info) = work.steps.get(work.step).cloned() {
            let index = match work.index.clone() {
                Some(index) => index,
                None => self.undo_index(&info)?,
            };
            work.index = Some(index.clone());
            while let Some(entry) = index.entries.get(work.entry) {
                if spent >= budget {
                    return Ok(false);
                }
                if entry.zero {
                    self.zero_image(DiskIndex(entry.disk), entry.start, u64::from(entry.blocks))?;
                    spent += BLOCK_BYTES;
                } else {
                    let data = index.data(&self.meta, entry)?;
                    self.write_image(DiskIndex(entry.disk), entry.start, &data)?;
                    spent += data.len() as u64;
                }
                work.touched.insert(entry.disk);
                work.entry += 1;
            }
            work.step += 1;
            work.entry = 0;
            work.index = None;
        }
        Ok(true)
    }

    fn finish_roll_back(&mut self, work: RollBack) -> Result<(), ReplicaError> {
        let mark: Option<Mark> = work.steps.last().map(|info| info.older);
        self.write_manifest(|manifest| {
            manifest.applied = mark;
            manifest.applying = None;
            manifest.rolling_back = None;
        })?;
        self.outdate_views();
        self.history.drain(..work.steps.len());
        for info in &work.steps {
            remove_if_there(&mut self.meta, &info.name)?;
        }
        self.report_event(Event::RolledBack(work.to));
        Ok(())
    }

    /// The disks are at `mark` by other means: this side was active, or a handover ended here. History and staging are dropped;
    /// returns the generations that are lost by it.
    pub fn adopt(&mut self, mark: Mark) -> Result<Vec<Generation>, ReplicaError> {
        self.guard()?;
        let outcome = self.adopt_mark(mark);
        self.note(outcome)
    }

    fn adopt_mark(&mut self, mark: Mark) -> Result<Vec<Generation>, ReplicaError> {
        let lost = self.kept().iter().map(|kept| kept.generation).filter(|kept| *kept != mark.generation).collect();
        self.abort_commit()?;
        self.abandon_work()?;
        self.write_manifest(|manifest| {
            manifest.virgin = false;
            manifest.newest = Some(mark);
            manifest.applied = Some(mark);
            manifest.applying = None;
            manifest.rolling_back = None;
            manifest.shared = None;
        })?;
        self.outdate_views();
        self.drop_pending(0)?;
        for info in core::mem::take(&mut self.history) {
            remove_if_there(&mut self.meta, &info.name)?;
        }
        self.leave_direct_mode();
        self.unjournaled.clear();
        let staged: Vec<FrameKey> = self.journal.staged().map(|frame| frame.key()).collect();
        self.journal.drop_frames(staged);
        self.journal.reclaim_durably(&mut self.meta)?;
        Ok(lost)
    }
}
