//! Application: a committed generation goes into the image, in steps that the caller paces.
//!
//! ```text
//!             undo wanted                manifest: applying, undo           images synced, manifest: applied
//!  committed ────────────▶ capturing ───────────────────────▶ writing ──────────────────────────▶ applied, retired
//!      │  no undo wanted, or no room for it                      ▲
//!      └─────────────────────────────────────────────────────────┘ manifest: applying, no undo (history is gone)
//! ```
//! A crash while capturing starts the capture again: the image was not touched. A crash while writing writes everything
//! again, from the journal, and captures nothing (I10). Readers are told *before* the first image write and before the journal goes.

use super::{
    Event, Images, ReplicaError, ReplicaStore,
    delta::{DeltaMap, Supply, for_runs},
    journal::FrameKey,
    manifest::Applying,
    rollback::RollBack,
    store::remove_if_there,
    undo::{UNDO_ENTRY_BLOCKS_MAX, UndoWriter},
};
use crate::{
    geometry::{BLOCK_BYTES, DiskIndex, Generation},
    storage::Storage,
};
use alloc::{collections::BTreeSet, string::String, sync::Arc, vec::Vec};

/// Zeroing costs little per byte; it is paced as if it were this many times smaller.
const ZERO_COST_DIVISOR: u64 = 64;

/// What the engine is doing to the image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Reading the old content of what will be overwritten.
    Capturing,
    /// Writing the image.
    Writing,
    /// Taking the image back to an older generation.
    RollingBack,
}

/// What one step did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// The image is at the newest committed generation.
    Idle,
    /// There is more to do.
    Working {
        generation: Generation,
        phase: Phase,
    },
    /// A generation was finished in this step.
    Applied(Generation),
    RolledBack(Generation),
}

/// Work between two steps. Lost in a crash; begun again from the manifest.
#[derive(Debug, Default)]
pub(crate) enum Work {
    #[default]
    Idle,
    Capture(Capture),
    Write(Write),
    RollBack(RollBack),
}

#[derive(Debug)]
pub(crate) struct Capture {
    generation: Generation,
    delta: Arc<DeltaMap>,
    writer: UndoWriter,
    piece: usize,
    /// Blocks of the current piece that are captured.
    done: u32,
}

#[derive(Debug)]
pub(crate) struct Write {
    generation: Generation,
    delta: Arc<DeltaMap>,
    frame: usize,
    /// Next piece to look at among those that no frame supplies.
    piece: usize,
    touched: BTreeSet<u16>,
}

impl<M: Storage, D: Images> ReplicaStore<M, D> {
    /// Do about `budget_bytes` of what there is to do (at least one frame). `Full` leaves everything as it is; call again
    /// when there is room.
    pub fn apply_step(&mut self, budget_bytes: u64) -> Result<Progress, ReplicaError> {
        self.guard()?;
        let outcome = self.step(budget_bytes);
        self.note(outcome)
    }

    /// Steps until the image is at the newest committed generation.
    pub fn apply_all(&mut self) -> Result<(), ReplicaError> {
        while self.apply_step(u64::MAX)? != Progress::Idle {}
        Ok(())
    }

    fn step(&mut self, budget: u64) -> Result<Progress, ReplicaError> {
        if matches!(self.work, Work::Idle) && !self.begin_work()? {
            return Ok(Progress::Idle);
        }
        match core::mem::take(&mut self.work) {
            Work::Idle => Ok(Progress::Idle),
            Work::Capture(capture) => self.capture_step(capture, budget),
            Work::Write(write) => self.write_step(write, budget),
            Work::RollBack(roll_back) => self.roll_back_step(roll_back, budget),
        }
    }

    /// Decide what comes next from the manifest alone. False: nothing.
    fn begin_work(&mut self) -> Result<bool, ReplicaError> {
        if let Some(to) = self.manifest.rolling_back {
            self.work = Work::RollBack(self.plan_roll_back(to));
            return Ok(true);
        }
        let Some(next) = self.pending.front() else {
            return Ok(false);
        };
        let generation = next.mark.generation;
        let delta = next.delta.clone();
        let begun = self.manifest.applying.is_some_and(|applying| applying.generation == generation);
        match self.manifest.applied {
            Some(applied) if !begun && self.wants_undo() => {
                let writer = UndoWriter::new(generation, applied);
                self.work = Work::Capture(Capture { generation, delta, writer, piece: 0, done: 0 });
            }
            _ => self.begin_writing(generation, delta)?,
        }
        Ok(true)
    }

    /// Is the parent of what comes next wanted after it is applied?
    fn wants_undo(&self) -> bool {
        self.options.policy.keeps_history() || self.needs_undo()
    }

    /// Would someone lose a generation that must not go (I7) if the next one were applied without undo?
    fn needs_undo(&self) -> bool {
        let pending =
            |generation: &Generation| self.pending.iter().any(|pending| pending.mark.generation == *generation);
        self.kept().iter().map(|mark| mark.generation).any(|kept| self.is_protected(kept) && !pending(&kept))
    }

    fn capture_step(&mut self, mut capture: Capture, budget: u64) -> Result<Progress, ReplicaError> {
        let generation = capture.generation;
        let captured = self.capture_some(&mut capture, budget);
        match captured {
            Ok(false) => {
                self.work = Work::Capture(capture);
                Ok(Progress::Working { generation, phase: Phase::Capturing })
            }
            Ok(true) => self.finish_capture(capture),
            Err(error) if error.no_space().is_some() => self.give_up_capture(capture, error),
            Err(error) => Err(error),
        }
    }

    /// True when everything is captured.
    fn capture_some(&mut self, capture: &mut Capture, budget: u64) -> Result<bool, ReplicaError> {
        let mut spent = 0;
        let mut content = Vec::new();
        let delta = capture.delta.clone();
        while let Some(piece) = delta.pieces.get(capture.piece) {
            if capture.done == piece.blocks || piece.supply == Supply::Keep {
                capture.piece += 1;
                capture.done = 0;
                continue;
            }
            if spent >= budget {
                return Ok(false);
            }
            let blocks = (piece.blocks - capture.done).min(UNDO_ENTRY_BLOCKS_MAX);
            let start = piece.start + u64::from(capture.done);
            self.read_image(piece.disk, start, blocks, &mut content)?;
            capture.writer.add(&mut self.meta, piece.disk, start, &content)?;
            capture.done += blocks;
            spent += u64::from(blocks) * BLOCK_BYTES;
        }
        Ok(true)
    }

    /// Read whole blocks of the image, the last one of a disk padded with zeroes.
    pub(crate) fn read_image(
        &self,
        disk: u16,
        start: u64,
        blocks: u32,
        content: &mut Vec<u8>,
    ) -> Result<(), ReplicaError> {
        let offset = start * BLOCK_BYTES;
        let bytes = u64::from(blocks) * BLOCK_BYTES;
        let inside = bytes.min(self.manifest.disk_bytes[usize::from(disk)].saturating_sub(offset));
        content.clear();
        content.resize(bytes as usize, 0);
        let content = &mut content[..inside as usize];
        self.images.read(DiskIndex(disk), offset, content).map_err(ReplicaError::Image)
    }

    /// Forget work that is not begun in the image; it starts again from the manifest, if at all.
    pub(crate) fn abandon_work(&mut self) -> Result<(), ReplicaError> {
        match core::mem::take(&mut self.work) {
            Work::Capture(capture) => remove_if_there(&mut self.meta, capture.writer.name()),
            Work::Idle | Work::Write(_) | Work::RollBack(_) => Ok(()),
        }
    }

    fn finish_capture(&mut self, capture: Capture) -> Result<Progress, ReplicaError> {
        let Capture { generation, delta, writer, .. } = capture;
        let name = String::from(writer.name());
        let index = match writer.finish(&mut self.meta) {
            Ok(index) => index,
            Err(error) if error.no_space().is_some() => {
                remove_if_there(&mut self.meta, &name)?;
                // With the room of an older file the capture is done again from the start.
                if self.drop_oldest_undo()? {
                    return Ok(Progress::Working { generation, phase: Phase::Capturing });
                }
                if self.needs_undo() {
                    return Err(error);
                }
                self.begin_writing(generation, delta)?;
                return Ok(Progress::Working { generation, phase: Phase::Writing });
            }
            Err(error) => return Err(error),
        };
        self.history.insert(0, index.info.clone());
        self.begin_writing(generation, delta)?;
        Ok(Progress::Working { generation, phase: Phase::Writing })
    }

    /// No room for undo: give up the oldest kept generation, else all history, but never one that must not go.
    fn give_up_capture(&mut self, capture: Capture, error: ReplicaError) -> Result<Progress, ReplicaError> {
        let generation = capture.generation;
        if self.drop_oldest_undo()? {
            self.work = Work::Capture(capture);
            return Ok(Progress::Working { generation, phase: Phase::Capturing });
        }
        if self.needs_undo() {
            self.work = Work::Capture(capture);
            return Err(error);
        }
        remove_if_there(&mut self.meta, capture.writer.name())?;
        self.begin_writing(generation, capture.delta)?;
        Ok(Progress::Working { generation, phase: Phase::Writing })
    }

    /// Make it durable that the image may be written, and tell readers.
    fn begin_writing(&mut self, generation: Generation, delta: Arc<DeltaMap>) -> Result<(), ReplicaError> {
        let begun = self.manifest.applying.is_some_and(|applying| applying.generation == generation);
        if !begun {
            let undo = self.history.first().is_some_and(|info| info.newer == generation);
            let written = self.write_manifest(|manifest| manifest.applying = Some(Applying { generation, undo }));
            if let Err(error) = written {
                self.history.retain(|info| info.newer != generation);
                return Err(error);
            }
            self.outdate_views();
            if !undo {
                self.lose_history()?;
            }
        }
        self.outdate_views();
        self.work = Work::Write(Write { generation, delta, frame: 0, piece: 0, touched: BTreeSet::new() });
        Ok(())
    }

    /// The image leaves the applied generation without undo: what was behind it is gone.
    fn lose_history(&mut self) -> Result<(), ReplicaError> {
        let mut lost: Vec<Generation> = self.manifest.applied.iter().map(|mark| mark.generation).collect();
        for info in core::mem::take(&mut self.history) {
            lost.push(info.older.generation);
            remove_if_there(&mut self.meta, &info.name)?;
        }
        lost.dedup();
        if self.options.policy.keeps_history() && !lost.is_empty() {
            self.report_event(Event::UndoDropped { lost });
        }
        Ok(())
    }

    fn write_step(&mut self, mut write: Write, budget: u64) -> Result<Progress, ReplicaError> {
        let generation = write.generation;
        let written = self.write_some(&mut write, budget);
        if !matches!(written, Ok(true)) {
            // Also after want of room: the frame at which it stopped is written again.
            self.work = Work::Write(write);
            written?;
            return Ok(Progress::Working { generation, phase: Phase::Writing });
        }
        for disk in &write.touched {
            self.sync_image(*disk)?;
        }
        self.full.clear();
        self.finish_writing(generation)?;
        Ok(Progress::Applied(generation))
    }

    /// True when everything is written.
    fn write_some(&mut self, write: &mut Write, budget: u64) -> Result<bool, ReplicaError> {
        let mut spent = 0;
        let delta = write.delta.clone();
        while let Some(entry) = delta.frames.get(write.frame) {
            if spent >= budget {
                return Ok(false);
            }
            spent += self.write_frame(entry, &mut write.touched)?;
            write.frame += 1;
        }
        while let Some(piece) = delta.pieces.get(write.piece) {
            if spent >= budget {
                return Ok(false);
            }
            if piece.frame == u32::MAX {
                self.zero_image(DiskIndex(piece.disk), piece.start, u64::from(piece.blocks))?;
                write.touched.insert(piece.disk);
                spent += u64::from(piece.blocks) * BLOCK_BYTES / ZERO_COST_DIVISOR;
            }
            write.piece += 1;
        }
        Ok(true)
    }

    /// Write one frame's un-excluded blocks; returns what it cost.
    fn write_frame(
        &mut self,
        entry: &super::delta::DeltaFrame,
        touched: &mut BTreeSet<u16>,
    ) -> Result<u64, ReplicaError> {
        let mut runs = Vec::new();
        for_runs(&entry.frame, &entry.excluded, |disk, start, blocks, at, supply| {
            runs.push((disk, start, blocks, at, supply));
        });
        runs.retain(|(.., supply)| *supply != Supply::Keep);
        if runs.is_empty() {
            return Ok(0);
        }
        let mut content = Vec::new();
        if runs.iter().any(|(.., supply)| *supply == Supply::Data) {
            content = entry.frame.content(&self.meta, &*self.decompress)?;
        }
        let mut cost = 0;
        for (disk, start, blocks, at, supply) in runs {
            let bytes = u64::from(blocks) * BLOCK_BYTES;
            touched.insert(disk);
            if supply == Supply::Data {
                let from = (u64::from(at) * BLOCK_BYTES) as usize;
                self.write_image(DiskIndex(disk), start, &content[from..from + bytes as usize])?;
                cost += bytes;
            } else {
                self.zero_image(DiskIndex(disk), start, u64::from(blocks))?;
                cost += bytes / ZERO_COST_DIVISOR;
            }
        }
        Ok(cost)
    }

    /// The images are synced: make it durable that the generation is in them, then let its journal go.
    fn finish_writing(&mut self, generation: Generation) -> Result<(), ReplicaError> {
        let Some(front) = self.pending.front().filter(|front| front.mark.generation == generation).cloned() else {
            return Ok(());
        };
        self.write_manifest(|manifest| {
            manifest.applied = Some(front.mark);
            manifest.applying = None;
        })?;
        self.pending.pop_front();
        // Views may still read the journal; they must learn of this before its files go.
        self.outdate_views();
        remove_if_there(&mut self.meta, &front.list)?;
        let keys: Vec<FrameKey> = front.delta.frames.iter().map(|frame| frame.frame.key()).collect();
        self.journal.retire(keys);
        self.journal.reclaim(&mut self.meta)?;
        self.report_event(Event::Applied(generation));
        Ok(())
    }
}
