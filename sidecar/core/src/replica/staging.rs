//! Staging: frames arrive, are checked against the replica's state, and become durable in groups.
//!
//! Before the first commit onto an image that this pair created empty, content goes straight into the image as long as
//! no record vouches for any of the frame's blocks; the record, without payload, is written to the journal only after the image
//! was synced, so a record never vouches for content that a crash can take away. A block that a record vouches for
//! is not overwritten: a newer frame for it goes through the journal like any other.

use super::{
    Claim, Images, ReplicaError, ReplicaStore,
    journal::{FrameKey, Journal},
};
use crate::{
    frame::{Frame, FrameError, FrameHeader, FrameKind},
    geometry::{BLOCK_BYTES, DiskIndex, Extent, Sequence, Session},
    storage::Storage,
};
use alloc::{collections::BTreeMap, vec::Vec};

/// Which frames of a session are in the journal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Staged {
    pub session: Session,
    /// First and last sequence of each run, inclusive, rising.
    pub ranges: Vec<(Sequence, Sequence)>,
}

/// A frame whose content is in the image and whose record is still to be written.
#[derive(Clone, Debug)]
pub(crate) struct Unjournaled {
    header: FrameHeader,
    in_image: bool,
    base: u64,
}

impl<M: Storage, D: Images> ReplicaStore<M, D> {
    /// From now on only frames of this session count. Staged frames of other sessions are dropped; what is committed
    /// stays. (Keeping them as candidates for a digest comparison is possible later; the source compares the committed content anyway.)
    pub fn set_session(&mut self, session: Session) -> Result<(), ReplicaError> {
        self.guard()?;
        if self.session == Some(session) {
            return Ok(());
        }
        let outcome = self.change_session(session);
        self.note(outcome)
    }

    fn change_session(&mut self, session: Session) -> Result<(), ReplicaError> {
        self.abort_commit()?;
        self.unjournaled.clear();
        self.journal.close_segment();
        let others: Vec<FrameKey> =
            self.journal.staged().map(|frame| frame.key()).filter(|key| key.session != session).collect();
        self.journal.drop_frames(others);
        // Durably, since blocks that the old records vouch for may be overwritten in the image from now on.
        self.journal.reclaim_durably(&mut self.meta)?;
        self.claims.iter_mut().for_each(BTreeMap::clear);
        if self.manifest.virgin {
            self.residue |= self.manifest.direct_started;
            let vouching: Vec<FrameHeader> = self
                .journal
                .staged()
                .filter(|frame| frame.in_image || frame.header.kind == FrameKind::Same)
                .map(|frame| frame.header.clone())
                .collect();
            vouching.iter().for_each(|header| self.claim(header.disk, &header.extents));
        }
        self.session = Some(session);
        Ok(())
    }

    /// Refuse frames and commits below this epoch counter from now on, durably (I6).
    pub fn raise_floor(&mut self, counter: u64) -> Result<(), ReplicaError> {
        self.guard()?;
        if counter <= self.manifest.floor {
            return Ok(());
        }
        let outcome = self.write_manifest(|manifest| manifest.floor = counter);
        self.note(outcome)
    }

    /// Take a checked frame. It counts as durable when [`ReplicaStore::sync_staged`] names it. A frame that is here
    /// already is accepted again and not named again.
    pub fn stage(&mut self, frame: &Frame<'_>) -> Result<(), ReplicaError> {
        self.guard()?;
        let outcome = self.stage_checked(frame);
        self.note(outcome)
    }

    fn stage_checked(&mut self, frame: &Frame<'_>) -> Result<(), ReplicaError> {
        let header = frame.header();
        self.admit(header)?;
        self.check_padding(frame)?;
        let key = FrameKey { session: header.session, sequence: header.sequence };
        let known = self.journal.get(key).or_else(|| self.journal.get_committed(key)).map(|frame| &frame.header);
        if let Some(known) = known.or_else(|| self.unjournaled.get(&key).map(|frame| &frame.header)) {
            if known == header {
                return Ok(());
            }
            return Err(ReplicaError::FrameConflict(header.sequence));
        }
        self.make_room(Journal::record_bytes(header))?;
        let base = self.manifest.newest.map_or(0, |mark| mark.generation.number.0);
        if header.kind == FrameKind::Same && self.blocks_digest(header.disk, &header.extents)? != header.digest {
            return Err(ReplicaError::NotSame(header.sequence));
        }
        if self.manifest.virgin {
            if header.kind == FrameKind::Same {
                return self.stage_in_image(header, false, base);
            }
            if !self.claimed(header.disk, &header.extents) {
                self.write_direct(frame)?;
                return self.stage_in_image(header, true, base);
            }
        }
        self.with_meta_room(|store| store.journal.append(&mut store.meta, frame.header(), frame.payload(), false, base))
    }

    /// Epoch, session and place.
    fn admit(&self, header: &FrameHeader) -> Result<(), ReplicaError> {
        let floor = self.manifest.floor;
        if header.epoch < floor {
            return Err(ReplicaError::BelowFloor { found: header.epoch, floor });
        }
        if header.epoch > floor {
            return Err(ReplicaError::AboveFloor { found: header.epoch, floor });
        }
        if self.session != Some(header.session) {
            return Err(ReplicaError::OtherSession { found: header.session, current: self.session });
        }
        if self.manifest.rolling_back.is_some() {
            return Err(ReplicaError::RollingBack);
        }
        self.check_extents(header.disk, &header.extents)
    }

    /// What lies beyond the disk's last byte must be zero, or digests of both sides would differ.
    fn check_padding(&self, frame: &Frame<'_>) -> Result<(), ReplicaError> {
        let header = frame.header();
        let bytes = self.manifest.disk_bytes[usize::from(header.disk.0)];
        let last = header.extents.last().map_or(0, |extent| extent.end().offset());
        if header.kind != FrameKind::Data || last <= bytes {
            return Ok(());
        }
        let content = frame.content();
        let padding = (last - bytes) as usize;
        if content[content.len() - padding..].iter().any(|byte| *byte != 0) {
            return Err(FrameError::Field { field: "padding", found: padding as u64 }.into());
        }
        Ok(())
    }

    /// Put content straight into the virgin image.
    fn write_direct(&mut self, frame: &Frame<'_>) -> Result<(), ReplicaError> {
        if !self.manifest.direct_started {
            self.write_manifest(|manifest| manifest.direct_started = true)?;
        }
        let header = frame.header();
        let written = self.write_extents(header, frame.content());
        match written {
            Ok(()) => self.full.remove(&Claim::Data),
            Err(_) => {
                self.residue = true;
                None
            }
        };
        written
    }

    fn write_extents(&mut self, header: &FrameHeader, content: &[u8]) -> Result<(), ReplicaError> {
        let mut at = 0;
        for extent in &header.extents {
            match header.kind {
                FrameKind::Data => {
                    let bytes = extent.bytes() as usize;
                    self.write_image(header.disk, extent.start.0, &content[at..at + bytes])?;
                    at += bytes;
                }
                FrameKind::Zero => self.zero_image(header.disk, extent.start.0, u64::from(extent.blocks))?,
                FrameKind::Same => {}
            }
        }
        Ok(())
    }

    fn stage_in_image(&mut self, header: &FrameHeader, in_image: bool, base: u64) -> Result<(), ReplicaError> {
        self.dirty_disks.insert(header.disk.0);
        self.claim(header.disk, &header.extents);
        let key = FrameKey { session: header.session, sequence: header.sequence };
        self.unjournaled.insert(key, Unjournaled { header: header.clone(), in_image, base });
        Ok(())
    }

    /// Write whole blocks of a disk, without the padding of its last one.
    pub(crate) fn write_image(&mut self, disk: DiskIndex, start: u64, content: &[u8]) -> Result<(), ReplicaError> {
        let offset = start * BLOCK_BYTES;
        let inside = (content.len() as u64).min(self.manifest.disk_bytes[usize::from(disk.0)].saturating_sub(offset));
        self.images.write(disk, offset, &content[..inside as usize]).map_err(ReplicaError::Image)
    }

    pub(crate) fn zero_image(&mut self, disk: DiskIndex, start: u64, blocks: u64) -> Result<(), ReplicaError> {
        let offset = start * BLOCK_BYTES;
        let inside = (blocks * BLOCK_BYTES).min(self.manifest.disk_bytes[usize::from(disk.0)].saturating_sub(offset));
        self.images.zero(disk, offset, inside).map_err(ReplicaError::Image)
    }

    pub(crate) fn sync_image(&mut self, disk: u16) -> Result<(), ReplicaError> {
        self.images.sync(DiskIndex(disk)).map_err(ReplicaError::Image)
    }

    /// Make everything staged so far durable; returns what became so. One sync for many frames.
    pub fn sync_staged(&mut self) -> Result<Vec<FrameKey>, ReplicaError> {
        self.guard()?;
        let outcome = self.sync_all_staged();
        self.note(outcome)
    }

    pub(crate) fn sync_all_staged(&mut self) -> Result<Vec<FrameKey>, ReplicaError> {
        // The image first: a record must never vouch for content that is not durable.
        while let Some(disk) = self.dirty_disks.first().copied() {
            self.sync_image(disk)?;
            self.dirty_disks.remove(&disk);
        }
        while let Some((key, frame)) = self.unjournaled.first_key_value().map(|(key, frame)| (*key, frame.clone())) {
            self.with_meta_room(|store| {
                store.journal.append(&mut store.meta, &frame.header, &[], frame.in_image, frame.base)
            })?;
            self.unjournaled.remove(&key);
        }
        self.journal.sync(&mut self.meta)
    }

    /// The source will never list these frames: their room may be used for others.
    pub fn supersede(&mut self, sequences: &[Sequence]) -> Result<(), ReplicaError> {
        self.guard()?;
        let Some(session) = self.session else {
            return Ok(());
        };
        let keys = sequences.iter().map(|sequence| FrameKey { session, sequence: *sequence });
        // What a record in the image vouches for stays claimed, so it need not be dropped to be safe.
        let keys: Vec<FrameKey> =
            keys.filter(|key| self.journal.get(*key).is_some_and(|frame| !frame.in_image)).collect();
        self.journal.drop_frames(keys);
        let outcome = self.journal.reclaim(&mut self.meta).map(|_| ());
        self.note(outcome)
    }

    /// Everything staged that could still be listed, by session. Includes what is not durable yet; call
    /// [`ReplicaStore::sync_staged`] first where that matters.
    pub fn staged(&self) -> Vec<Staged> {
        let mut staged: Vec<Staged> = Vec::new();
        for frame in self.journal.staged() {
            let FrameKey { session, sequence } = frame.key();
            match staged.last_mut().filter(|last| last.session == session) {
                Some(last) => match last.ranges.last_mut() {
                    Some((_, end)) if end.0 + 1 == sequence.0 => *end = sequence,
                    _ => last.ranges.push((sequence, sequence)),
                },
                None => staged.push(Staged { session, ranges: [(sequence, sequence)].to_vec() }),
            }
        }
        staged
    }

    /// See that the journal may grow by `bytes`, reclaiming and compacting before it refuses.
    fn make_room(&mut self, bytes: u64) -> Result<(), ReplicaError> {
        let limit = self.options.journal.journal_bytes_max;
        if self.journal.bytes() + bytes <= limit {
            return Ok(());
        }
        self.journal.reclaim(&mut self.meta)?;
        while self.journal.bytes() + bytes > limit {
            let freed = self.with_meta_room(|store| store.journal.compact(&mut store.meta))?;
            if freed == 0 {
                break;
            }
        }
        if self.journal.bytes() + bytes <= limit {
            return Ok(());
        }
        if !self.pending.is_empty() {
            return Err(ReplicaError::ApplyFirst);
        }
        Err(ReplicaError::JournalTooSmall { needed: self.journal.live_bytes() + bytes, limit })
    }

    /// Do something that needs room in the metadata folder; while there is none, give up the oldest undo and try again.
    pub(crate) fn with_meta_room<T>(
        &mut self,
        mut work: impl FnMut(&mut Self) -> Result<T, ReplicaError>,
    ) -> Result<T, ReplicaError> {
        loop {
            match work(self) {
                Err(error) if error.no_space().is_some_and(|(claim, _)| claim == Claim::Metadata) => {
                    if !self.drop_oldest_undo()? {
                        return Err(error);
                    }
                }
                outcome => {
                    if outcome.is_ok() {
                        self.full.remove(&Claim::Metadata);
                    }
                    return outcome;
                }
            }
        }
    }

    fn claimed(&self, disk: DiskIndex, extents: &[Extent]) -> bool {
        let claims = &self.claims[usize::from(disk.0)];
        extents.iter().any(|extent| {
            let before = claims.range(..extent.end().0).next_back();
            before.is_some_and(|(_, end)| *end > extent.start.0)
        })
    }

    /// Add blocks to the claims of a disk, joining neighbours.
    fn claim(&mut self, disk: DiskIndex, extents: &[Extent]) {
        let claims = &mut self.claims[usize::from(disk.0)];
        for extent in extents {
            let (mut start, mut end) = (extent.start.0, extent.end().0);
            while let Some((from, to)) = claims.range(..=end).next_back().map(|(from, to)| (*from, *to)) {
                if to < start {
                    break;
                }
                start = start.min(from);
                end = end.max(to);
                claims.remove(&from);
            }
            claims.insert(start, end);
        }
    }
}
