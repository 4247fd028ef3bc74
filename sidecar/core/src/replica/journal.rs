//! The staging journal: arriving frames, appended to segment files until a commit lists them and application retires them.
//!
//! A record counts only if everything before it in its segment does, so a scan stops at the first bad one. A segment is never appended
//! to after a failed append or a restart: what lies behind its last good record can only be the beginning of one torn
//! record, never bytes that a guest chose. Nothing is reported durable before its segment and the folder were synced.
//! Segments go away whole, when no frame in them is needed any more; [`Journal::compact`] moves stragglers.
//!
//! It does not know generations; which frames are needed is said by whoever holds the lists.

mod record;

use crate::{
    frame::{Decompress, Encoding, FRAME_HEADER_BYTES_MAX, FrameHeader, FrameKind},
    geometry::{Sequence, Session},
    replica::{ReplicaError, read_exact},
    storage::{Storage, StorageError},
};
use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    string::String,
    sync::Arc,
    vec,
    vec::Vec,
};

pub use record::{RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES, fuzz_decode};
use record::{SEGMENT_VERSION, Scanned, decode_segment_header, encode_record, encode_segment_header, scan_record};

/// Identifies a frame within a folder.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrameKey {
    pub session: Session,
    pub sequence: Sequence,
}

/// A frame as it lies in the journal.
#[derive(Debug)]
pub struct StoredFrame {
    pub header: FrameHeader,
    /// The content went straight into the image; the record has no payload.
    pub in_image: bool,
    /// For a `Same` frame: number of the newest committed generation it was checked against.
    pub base: u64,
    segment: u64,
    /// Offset of the payload in its segment.
    payload_at: u64,
    /// Bytes of the whole record.
    record_bytes: u64,
}

impl StoredFrame {
    pub fn key(&self) -> FrameKey {
        FrameKey { session: self.header.session, sequence: self.header.sequence }
    }
    /// Segment file that holds it.
    pub fn segment_name(&self) -> String {
        segment_name(self.segment)
    }
    /// Read the payload, check its CRC and decode it. Journaled data frames only.
    pub fn content<M: Storage>(&self, meta: &M, decompress: &dyn Decompress) -> Result<Vec<u8>, ReplicaError> {
        assert!(!self.in_image && self.header.kind == FrameKind::Data, "only journaled data has content here");
        let name = self.segment_name();
        let mut payload = vec![0; self.header.payload_bytes as usize];
        read_exact(meta, &name, self.payload_at, &mut payload)?;
        self.header.check_crc(&payload).map_err(|error| ReplicaError::corrupt(&name, &format!("{error}")))?;
        if self.header.encoding == Encoding::Raw {
            return Ok(payload);
        }
        let mut content = Vec::new();
        let good = decompress.decompress(&payload, self.header.content_bytes as usize, &mut content);
        if !good || content.len() as u64 != self.header.content_bytes {
            return Err(ReplicaError::corrupt(&name, "a payload that does not decode"));
        }
        Ok(content)
    }
}

impl StoredFrame {
    /// Did all of the payload reach the medium?
    fn payload_is_whole<M: Storage>(&self, meta: &M) -> Result<bool, ReplicaError> {
        if self.in_image {
            return Ok(true);
        }
        let mut payload = vec![0; self.header.payload_bytes as usize];
        read_exact(meta, &self.segment_name(), self.payload_at, &mut payload)?;
        Ok(self.header.check_crc(&payload).is_ok())
    }

    /// Read part of a raw payload, unchecked: the record's CRC was checked when it arrived or was loaded.
    pub fn read_raw<M: Storage>(&self, meta: &M, offset: u64, part: &mut [u8]) -> Result<(), ReplicaError> {
        read_exact(meta, &self.segment_name(), self.payload_at + offset, part)
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Segment {
    /// Where the next record would go.
    end: u64,
    /// Frames in it that are still needed, and their bytes.
    live: u64,
    live_bytes: u64,
}

/// Bounds of a journal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JournalLimits {
    /// A segment is closed when it holds this many bytes.
    pub segment_bytes_max: u64,
    /// All segments together, in bytes.
    pub journal_bytes_max: u64,
}

/// The journal: its segments and the frames in them.
#[derive(Debug)]
pub(crate) struct Journal {
    identity: [u8; 16],
    limits: JournalLimits,
    segments: BTreeMap<u64, Segment>,
    /// The segment that takes appends.
    open: Option<u64>,
    next_segment: u64,
    next_record: u64,
    /// Records with lower numbers were durable at the last sync.
    synced_below: u64,
    /// Staged: not in any commit.
    frames: BTreeMap<FrameKey, Arc<StoredFrame>>,
    /// Listed by a committed generation that is not applied.
    committed: BTreeMap<FrameKey, Arc<StoredFrame>>,
    /// Appended since the last sync.
    unsynced: Vec<FrameKey>,
    dirty: BTreeSet<u64>,
    folder_dirty: bool,
    /// Segments with torn records behind their last good one, found when they were loaded.
    torn: Vec<u64>,
}

/// File name of a segment.
pub fn segment_name(segment: u64) -> String {
    format!("journal-{segment:016x}")
}

fn parse_segment_name(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("journal-")?;
    if digits.len() != 16 {
        return None;
    }
    u64::from_str_radix(digits, 16).ok()
}

/// A segment file that holds nothing that counts: its creation was interrupted.
pub(crate) struct Unfinished(pub String);

impl Journal {
    pub fn new(identity: [u8; 16], limits: JournalLimits) -> Self {
        Journal {
            identity,
            limits,
            segments: BTreeMap::new(),
            open: None,
            next_segment: 1,
            next_record: 1,
            synced_below: 1,
            frames: BTreeMap::new(),
            committed: BTreeMap::new(),
            unsynced: Vec::new(),
            dirty: BTreeSet::new(),
            folder_dirty: false,
            torn: Vec::new(),
        }
    }

    /// Read all segments. Writes nothing. All frames found count as staged until told otherwise.
    ///
    /// Each record says which records were durable when it was written. Only the payloads of those that no record says so
    /// of are read and checked here; decay of older ones is found when they are applied, read or verified.
    pub fn load<M: Storage>(
        meta: &M,
        names: &[String],
        identity: [u8; 16],
        limits: JournalLimits,
    ) -> Result<(Journal, Vec<Unfinished>), ReplicaError> {
        let mut journal = Journal::new(identity, limits);
        let mut unfinished = Vec::new();
        let mut found: Vec<(u64, &String)> =
            names.iter().filter_map(|name| Some((parse_segment_name(name)?, name))).collect();
        found.sort_unstable();
        let mut scanned = Vec::new();
        for (segment, name) in found {
            journal.next_segment = journal.next_segment.max(segment + 1);
            match journal.scan_segment(meta, segment, name)? {
                Some(records) => scanned.push((segment, records)),
                None => unfinished.push(Unfinished(name.clone())),
            }
        }
        let records = scanned.iter().flat_map(|(_, records)| records);
        let synced_below = records.map(|record| record.synced_below).max().unwrap_or(1);
        for (segment, records) in scanned {
            journal.take_records(meta, segment, records, synced_below)?;
        }
        Ok((journal, unfinished))
    }

    /// Find the records of a segment by their headers. `None` if the segment has no valid header.
    fn scan_segment<M: Storage>(
        &self,
        meta: &M,
        segment: u64,
        name: &str,
    ) -> Result<Option<Vec<Scanned>>, ReplicaError> {
        let length = meta.len(name)?;
        let mut header = [0; SEGMENT_HEADER_BYTES as usize];
        if length < SEGMENT_HEADER_BYTES {
            return Ok(None);
        }
        read_exact(meta, name, 0, &mut header)?;
        match decode_segment_header(&header) {
            None => return Ok(None),
            Some((version, ..)) if version > SEGMENT_VERSION => {
                return Err(ReplicaError::newer(name, version, SEGMENT_VERSION));
            }
            Some((_, found, _)) if found != segment => return Err(ReplicaError::corrupt(name, "segment number")),
            Some((_, _, identity)) if identity != self.identity => {
                return Err(ReplicaError::corrupt(name, "it belongs to another folder"));
            }
            Some(_) => {}
        }
        let mut records: Vec<Scanned> = Vec::new();
        let mut at = SEGMENT_HEADER_BYTES;
        while let Some(record) = scan_record(meta, name, segment, at, length)? {
            if records.last().is_some_and(|last| last.number >= record.number) {
                break;
            }
            at += record.frame.record_bytes;
            records.push(record);
        }
        Ok(Some(records))
    }

    /// Take a segment's records up to the first whose payload is torn.
    fn take_records<M: Storage>(
        &mut self,
        meta: &M,
        segment: u64,
        records: Vec<Scanned>,
        synced_below: u64,
    ) -> Result<(), ReplicaError> {
        self.segments.insert(segment, Segment { end: SEGMENT_HEADER_BYTES, ..Segment::default() });
        for record in records {
            if record.number >= synced_below && !record.frame.payload_is_whole(meta)? {
                self.torn.push(segment);
                break;
            }
            self.next_record = self.next_record.max(record.number + 1);
            self.segments.entry(segment).or_default().end += record.frame.record_bytes;
            self.insert(record.frame);
        }
        Ok(())
    }

    /// Put a frame into the index; a second copy of a frame (compaction was interrupted) replaces the first.
    fn insert(&mut self, frame: StoredFrame) {
        let key = frame.key();
        let segment = self.segments.entry(frame.segment).or_default();
        segment.live += 1;
        segment.live_bytes += frame.record_bytes;
        if let Some(old) = self.frames.insert(key, Arc::new(frame)) {
            self.unaccount(&old);
        }
    }

    fn unaccount(&mut self, frame: &StoredFrame) {
        if let Some(segment) = self.segments.get_mut(&frame.segment) {
            segment.live -= 1;
            segment.live_bytes -= frame.record_bytes;
        }
    }

    /// A staged frame.
    pub fn get(&self, key: FrameKey) -> Option<&Arc<StoredFrame>> {
        self.frames.get(&key)
    }
    /// A frame that a committed generation holds.
    pub fn get_committed(&self, key: FrameKey) -> Option<&Arc<StoredFrame>> {
        self.committed.get(&key)
    }
    /// Staged frames by session and sequence.
    pub fn staged(&self) -> impl Iterator<Item = &Arc<StoredFrame>> {
        self.frames.values()
    }
    /// A commit holds this staged frame from now on.
    pub fn hold(&mut self, key: FrameKey) {
        if let Some(frame) = self.frames.remove(&key) {
            self.committed.insert(key, frame);
        }
    }
    /// The commit that held it is given up: the frame is staged again.
    pub fn release(&mut self, key: FrameKey) {
        if let Some(frame) = self.committed.remove(&key) {
            self.frames.insert(key, frame);
        }
    }
    /// No append goes to a segment that was written before this.
    pub fn close_segment(&mut self) {
        self.open = None;
    }
    /// Bytes that this frame's record takes.
    pub fn record_bytes(header: &FrameHeader) -> u64 {
        (RECORD_HEADER_BYTES + FRAME_HEADER_BYTES_MAX) as u64 + u64::from(header.payload_bytes)
    }
    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.segments.values().map(|segment| segment.end).sum()
    }
    /// Bytes of the records that are still needed.
    pub fn live_bytes(&self) -> u64 {
        self.segments.values().map(|segment| segment.live_bytes).sum()
    }
    pub fn limits(&self) -> JournalLimits {
        self.limits
    }

    /// Append a frame; the payload is empty when the content is in the image. Not durable until [`Journal::sync`]. The
    /// caller has checked the journal's limit.
    pub fn append<M: Storage>(
        &mut self,
        meta: &mut M,
        header: &FrameHeader,
        payload: &[u8],
        in_image: bool,
        base: u64,
    ) -> Result<(), ReplicaError> {
        self.append_record(meta, header, payload, in_image, base)?;
        self.unsynced.push(FrameKey { session: header.session, sequence: header.sequence });
        Ok(())
    }

    fn append_record<M: Storage>(
        &mut self,
        meta: &mut M,
        header: &FrameHeader,
        payload: &[u8],
        in_image: bool,
        base: u64,
    ) -> Result<(), ReplicaError> {
        let segment = self.writable_segment(meta)?;
        let at = self.segments.get(&segment).expect("writable_segment inserts it").end;
        let numbers = (self.next_record, self.synced_below);
        let bytes = encode_record(segment, numbers, header, payload, in_image, base);
        let written = meta.write(&segment_name(segment), at, &bytes);
        self.dirty.insert(segment);
        if let Err(error) = written {
            self.close_torn(meta, segment, at);
            return Err(error.into());
        }
        self.next_record += 1;
        let record_bytes = bytes.len() as u64;
        self.segments.entry(segment).or_default().end = at + record_bytes;
        let payload_at = at + record_bytes - payload.len() as u64;
        self.insert(StoredFrame { header: header.clone(), in_image, base, segment, payload_at, record_bytes });
        Ok(())
    }

    /// An append failed: nothing may follow in this segment, and what was written of it must not keep the room that
    /// the next attempt needs.
    fn close_torn<M: Storage>(&mut self, meta: &mut M, segment: u64, end: u64) {
        self.open = None;
        let name = segment_name(segment);
        // If the medium itself failed, the engine is closed anyway and the next open does this.
        if end == SEGMENT_HEADER_BYTES {
            if meta.remove(&name).is_ok() {
                self.segments.remove(&segment);
                self.dirty.remove(&segment);
                self.folder_dirty = true;
            }
        } else {
            let _ = meta.truncate(&name, end);
        }
    }

    /// The open segment, or a fresh one.
    fn writable_segment<M: Storage>(&mut self, meta: &mut M) -> Result<u64, ReplicaError> {
        if let Some(open) = self.open {
            let end = self.segments.get(&open).map_or(u64::MAX, |segment| segment.end);
            if end < self.limits.segment_bytes_max {
                return Ok(open);
            }
            self.open = None;
        }
        let segment = self.next_segment;
        self.next_segment += 1;
        let name = segment_name(segment);
        if let Err(error) = meta.write(&name, 0, &encode_segment_header(segment, self.identity)) {
            // An empty leftover is removed at the next open if it cannot be removed now.
            let _ = meta.remove(&name);
            return Err(error.into());
        }
        self.segments.insert(segment, Segment { end: SEGMENT_HEADER_BYTES, ..Segment::default() });
        self.dirty.insert(segment);
        self.folder_dirty = true;
        self.open = Some(segment);
        Ok(segment)
    }

    /// Make every appended record durable; returns the frames that became so.
    pub fn sync<M: Storage>(&mut self, meta: &mut M) -> Result<Vec<FrameKey>, ReplicaError> {
        while let Some(segment) = self.dirty.first().copied() {
            meta.sync(&segment_name(segment))?;
            self.dirty.remove(&segment);
        }
        self.sync_folder(meta)?;
        self.synced_below = self.next_record;
        let mut durable = core::mem::take(&mut self.unsynced);
        durable.retain(|key| self.frames.contains_key(key) || self.committed.contains_key(key));
        Ok(durable)
    }

    fn sync_folder<M: Storage>(&mut self, meta: &mut M) -> Result<(), ReplicaError> {
        if self.folder_dirty {
            meta.sync_folder()?;
            self.folder_dirty = false;
        }
        Ok(())
    }

    /// After a restart. What was read may still be in a page cache only, so it is synced before anybody is told of it. Torn
    /// records are cut off first: a later record will say that all before it are durable, and must not speak for them.
    pub fn recover<M: Storage>(&mut self, meta: &mut M) -> Result<(), ReplicaError> {
        for segment in core::mem::take(&mut self.torn) {
            meta.truncate(&segment_name(segment), self.segments[&segment].end)?;
        }
        self.dirty.extend(self.segments.keys());
        self.folder_dirty = true;
        self.sync(meta)?;
        Ok(())
    }

    /// These frames are not needed any more. Space comes back with [`Journal::reclaim`].
    pub fn drop_frames(&mut self, keys: impl IntoIterator<Item = FrameKey>) {
        for key in keys {
            if let Some(frame) = self.frames.remove(&key) {
                self.unaccount(&frame);
            }
        }
    }

    /// A generation was applied or dropped: its frames are not needed any more.
    pub fn retire(&mut self, keys: impl IntoIterator<Item = FrameKey>) {
        for key in keys {
            if let Some(frame) = self.committed.remove(&key) {
                self.unaccount(&frame);
            }
        }
    }

    /// Remove segments in which nothing is needed. The removals are durable after the next sync.
    pub fn reclaim<M: Storage>(&mut self, meta: &mut M) -> Result<u64, ReplicaError> {
        let dead: Vec<u64> =
            self.segments.iter().filter(|(_, segment)| segment.live == 0).map(|(number, _)| *number).collect();
        let mut freed = 0;
        for number in dead {
            // An open segment with nothing in it yet is not worth a new file.
            if self.open == Some(number) && self.segments[&number].end == SEGMENT_HEADER_BYTES {
                continue;
            }
            match meta.remove(&segment_name(number)) {
                Ok(()) | Err(StorageError::Missing(_)) => {}
                Err(error) => return Err(error.into()),
            }
            freed += self.segments.remove(&number).map_or(0, |segment| segment.end);
            self.dirty.remove(&number);
            self.folder_dirty = true;
            if self.open == Some(number) {
                self.open = None;
            }
        }
        Ok(freed)
    }

    /// Remove what can be removed and make the removals durable.
    pub fn reclaim_durably<M: Storage>(&mut self, meta: &mut M) -> Result<u64, ReplicaError> {
        let freed = self.reclaim(meta)?;
        self.sync_folder(meta)?;
        Ok(freed)
    }

    /// Move the staged frames out of the closed segment that wastes most, if it wastes more than half, so that it can be
    /// removed. Segments with committed frames are left alone: readers point at them, and they go soon. Returns the bytes freed.
    pub fn compact<M: Storage>(&mut self, meta: &mut M) -> Result<u64, ReplicaError> {
        let held: BTreeSet<u64> = self.committed.values().map(|frame| frame.segment).collect();
        let worst = self
            .segments
            .iter()
            .filter(|(number, segment)| self.open != Some(**number) && segment.live_bytes * 2 < segment.end)
            .filter(|(number, _)| !held.contains(number))
            .max_by_key(|(_, segment)| segment.end - segment.live_bytes)
            .map(|(number, _)| *number);
        let Some(worst) = worst else {
            return Ok(0);
        };
        let frames: Vec<Arc<StoredFrame>> =
            self.frames.values().filter(|frame| frame.segment == worst).cloned().collect();
        for frame in frames {
            let bytes = if frame.in_image { 0 } else { frame.header.payload_bytes as usize };
            let mut payload = vec![0; bytes];
            read_exact(meta, &segment_name(worst), frame.payload_at, &mut payload)?;
            self.append_record(meta, &frame.header, &payload, frame.in_image, frame.base)?;
        }
        // The copies must be durable before the originals go.
        let unsynced = core::mem::take(&mut self.unsynced);
        let synced = self.sync(meta);
        self.unsynced = unsynced;
        synced?;
        self.reclaim_durably(meta)
    }
}
