//! Target duty: frames into the journal, commits, application, digests for the source.
//!
//! All durability and ordering is the core's ([`ReplicaStore`]); this shell batches syncs, paces application, and turns
//! answers into messages. Full claims become a state that is told to the source and goes away by itself.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use watari_core::{
    frame::{Frame, FrameHeader},
    geometry::{Block, DiskIndex, Extent, Generation, Sequence, Session},
    replica::{CommitAnswer, Entry, ErrorClass, Event as ReplicaEvent, Mark, Progress, ReplicaError},
};
use watari_store::replica::{FileReplica, SharedReplica, Zstd};
use watari_wire::replication::{
    CommitPart, CommitResult, DigestReply, DigestRequest, Durable, SequenceRange, Superseded, TargetState,
    commit_result::Outcome, control_message::Body,
};

use super::{convert, folder::Room};

/// Bytes staged before they are synced although more are waiting.
const SYNC_BYTES: u64 = 8 << 20;
/// Bytes applied between two looks at the inbox.
const APPLY_BYTES: u64 = 4 << 20;
/// A commit list may overtake its frames (they travel on other connections): so long they are waited for.
const FRAMES_WAIT: Duration = Duration::from_secs(5);
/// Pause after "no room" before it is tried again.
const FULL_PAUSE: Duration = Duration::from_secs(1);
/// Time between two retention passes.
const RETAIN_INTERVAL: Duration = Duration::from_secs(5);

struct Waiting {
    root: [u8; 32],
    generation: Generation,
    since: Instant,
}

/// See the module's header.
pub struct Target {
    /// Shared with those who read kept generations. Locked for one call at a time: what comes back is bound before it is
    /// looked at, so that no lock is held while something else is asked.
    pub store: SharedReplica,
    unsynced_bytes: u64,
    /// A complete list whose frames are not all here yet.
    waiting: Option<Waiting>,
    list: Vec<Entry>,
    parent: Generation,
    full_until: Option<Instant>,
    /// Why frames are not taken now; empty: they are.
    pub full: String,
    told_full: bool,
    more_to_apply: bool,
    next_retain: Instant,
    /// What can still be taken, as last measured.
    pub room: Room,
    /// Why this replica is closed to changes until a restart.
    pub poisoned: Option<String>,
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl Target {
    pub fn new(store: FileReplica) -> Self {
        Target {
            store: SharedReplica::new(store),
            unsynced_bytes: 0,
            waiting: None,
            list: Vec::new(),
            parent: Generation::default(),
            full_until: None,
            full: String::new(),
            told_full: false,
            more_to_apply: true,
            next_retain: Instant::now(),
            room: Room { folder_bytes: 0, images_bytes: 0 },
            poisoned: None,
        }
    }

    pub fn committed(&self) -> Generation {
        self.store.lock().manifest().newest.map(|m| m.generation).unwrap_or_default()
    }

    /// When the newest was committed here, seconds since 1970; 0: none is.
    pub fn committed_at_seconds(&self) -> u64 {
        self.store.lock().manifest().newest.map(|m| m.committed_at_seconds).unwrap_or_default()
    }

    pub fn applied(&self) -> Generation {
        self.store.lock().manifest().applied.map(|m| m.generation).unwrap_or_default()
    }

    /// Durable frames of a session, for Hello.
    pub fn staged(&mut self, session: u64) -> Vec<SequenceRange> {
        // What a dead process had staged is synced before it is named.
        let synced = self.store.lock().sync_staged();
        if let Err(error) = synced {
            self.note("staging", &error);
            return Vec::new();
        }
        let staged = self.store.lock().staged();
        staged
            .iter()
            .filter(|s| s.session.0 == session)
            .flat_map(|s| s.ranges.iter())
            .map(|(first, last)| SequenceRange { first: first.0, last: last.0 })
            .collect()
    }

    pub fn begin_session(&mut self, session: u64, epoch: u64) -> Result<(), ReplicaError> {
        self.waiting = None;
        self.list.clear();
        self.raise_floor(epoch)?;
        self.store.lock().set_session(Session(session))
    }

    /// Refuse what is below this epoch from now on (I6).
    pub fn raise_floor(&mut self, epoch: u64) -> Result<(), ReplicaError> {
        self.store.lock().raise_floor(epoch)
    }

    /// Frames are not read from the stream while there is no room; that is what slows the source down.
    pub fn has_room(&self) -> bool {
        self.full_until.is_none_or(|t| Instant::now() >= t)
    }

    /// A frame arrived. `false`: keep it and offer it again.
    pub fn frame(&mut self, header: &Bytes, payload: &Bytes) -> bool {
        let checked = FrameHeader::decode(header)
            .map_err(ReplicaError::from)
            .and_then(|(h, _)| Ok(Frame::check(h, payload, &Zstd)?));
        let frame = match checked {
            Ok(frame) => frame,
            Err(error) => {
                tracing::error!(%error, "a frame arrived damaged: it is dropped, the source will send it again");
                return true;
            }
        };
        let staged = self.store.lock().stage(&frame);
        match staged {
            Ok(()) => {
                self.unsynced_bytes += payload.len() as u64 + header.len() as u64;
                self.room();
                true
            }
            Err(ReplicaError::ApplyFirst) => {
                self.more_to_apply = true;
                false
            }
            Err(error) if error.class() == ErrorClass::Retry => {
                self.note("staging", &error);
                false
            }
            Err(error @ ReplicaError::JournalTooSmall { .. }) => {
                self.note("staging", &error);
                false
            }
            Err(error) => {
                self.note("staging", &error);
                true
            }
        }
    }

    fn room(&mut self) {
        if !self.full.is_empty() {
            tracing::info!("there is room again");
            self.full.clear();
            self.full_until = None;
        }
    }

    fn note(&mut self, doing: &str, error: &ReplicaError) {
        match error.class() {
            ErrorClass::Retry => {
                if self.full.is_empty() {
                    tracing::warn!(%error, doing, "the replica waits for room; nothing committed is harmed");
                }
                self.full = error.to_string();
                self.full_until = Some(Instant::now() + FULL_PAUSE);
            }
            ErrorClass::Fenced => tracing::debug!(%error, doing, "refused"),
            ErrorClass::Permanent if matches!(error, ReplicaError::JournalTooSmall { .. }) => {
                self.full = error.to_string();
                self.full_until = Some(Instant::now() + FULL_PAUSE);
            }
            ErrorClass::Permanent | ErrorClass::Corrupt => {
                tracing::error!(%error, doing, "the replica refused or failed");
                self.poisoned = self.store.lock().poisoned().map(str::to_owned);
            }
        }
    }

    /// A part of a commit list.
    pub fn commit_part(&mut self, part: &CommitPart) -> Option<Body> {
        let generation = convert::generation(part.generation.unwrap_or_default());
        self.parent = convert::generation(part.parent.unwrap_or_default());
        match Entry::decode_all(&part.entries) {
            Ok(entries) => self.list.extend(entries),
            Err(error) => {
                self.list.clear();
                return Some(result(generation, Outcome::Conflict, &error.to_string()));
            }
        }
        if !part.last {
            return None;
        }
        let root = part.root.as_ref().try_into().unwrap_or_default();
        self.waiting = Some(Waiting { root, generation, since: Instant::now() });
        self.try_commit()
    }

    /// Commit the waiting list if its frames are here (or have been waited for long enough).
    pub fn try_commit(&mut self) -> Option<Body> {
        let Waiting { root, generation, since } = *self.waiting.as_ref()?;
        let synced = self.store.lock().sync_staged();
        if let Err(error) = synced {
            self.note("staging", &error);
            return None;
        }
        let answer = {
            let mut store = self.store.lock();
            store
                .begin_commit(generation, self.parent, unix_seconds())
                .and_then(|()| store.append_entries(&self.list))
                .and_then(|()| store.finish_commit(root))
        };
        let body = match answer {
            Ok(CommitAnswer::Committed | CommitAnswer::AlreadyCommitted) => {
                tracing::info!(%generation, frames = self.list.len(), "committed");
                self.more_to_apply = true;
                result(generation, Outcome::Committed, "")
            }
            Ok(CommitAnswer::Lacks(missing)) => {
                if since.elapsed() < FRAMES_WAIT {
                    return None;
                }
                let lacks = ranges(missing.iter().map(|s| s.0));
                Body::CommitResult(CommitResult {
                    generation: Some(convert::wire_generation(generation)),
                    outcome: Outcome::Lacks.into(),
                    lacks,
                    text: String::new(),
                })
            }
            Ok(CommitAnswer::Conflict { .. }) => {
                result(generation, Outcome::Conflict, "another generation is committed under this number")
            }
            Err(error) if error.class() == ErrorClass::Retry => {
                self.note("committing", &error);
                return None;
            }
            Err(error) => {
                self.note("committing", &error);
                result(generation, Outcome::Conflict, &error.to_string())
            }
        };
        self.waiting = None;
        self.list.clear();
        Some(body)
    }

    /// After a round of events: make staged frames durable if it is time (`idle`: nothing else is waiting).
    pub fn sync(&mut self, idle: bool) -> Option<Body> {
        if self.unsynced_bytes == 0 || !idle && self.unsynced_bytes < SYNC_BYTES {
            return None;
        }
        self.unsynced_bytes = 0;
        let synced = self.store.lock().sync_staged();
        match synced {
            Ok(keys) if keys.is_empty() => None,
            Ok(keys) => {
                let session = keys[0].session.0;
                let mut sequences: Vec<u64> = keys.iter().map(|k| k.sequence.0).collect();
                sequences.sort_unstable();
                Some(Body::Durable(Durable { session, ranges: ranges(sequences.into_iter()) }))
            }
            Err(error) => {
                self.note("syncing", &error);
                None
            }
        }
    }

    /// Apply a little; `true` if there is more. Also retention, now and then.
    pub fn work(&mut self) -> bool {
        if Instant::now() >= self.next_retain {
            self.next_retain = Instant::now() + RETAIN_INTERVAL;
            let retained = self.store.lock().retain(unix_seconds());
            match retained {
                Ok(_) | Err(ReplicaError::RollingBack) => {}
                Err(error) => self.note("retention", &error),
            }
        }
        if !self.more_to_apply || self.poisoned.is_some() || !self.has_room() {
            return false;
        }
        let progress = self.store.lock().apply_step(APPLY_BYTES);
        match progress {
            Ok(Progress::Idle) => self.more_to_apply = false,
            Ok(Progress::Working { .. }) => {}
            Ok(Progress::Applied(generation) | Progress::RolledBack(generation)) => {
                tracing::trace!(%generation, "image moved");
                self.room();
            }
            Err(error) => self.note("applying", &error),
        }
        let events = self.store.lock().take_events();
        for event in events {
            match event {
                ReplicaEvent::Applied(generation) => tracing::debug!(%generation, "applied"),
                event => tracing::warn!(?event, "replica"),
            }
        }
        self.more_to_apply
    }

    /// The source will never list these frames.
    pub fn superseded(&mut self, m: &Superseded) {
        let sequences: Vec<Sequence> = m.ranges.iter().flat_map(|r| r.first..=r.last).map(Sequence).collect();
        let reclaimed = self.store.lock().supersede(&sequences);
        if let Err(error) = reclaimed {
            self.note("reclaiming", &error);
        }
    }

    /// Commit list in hand, frames missing: look again.
    pub fn waits_for_frames(&self) -> bool {
        self.waiting.is_some()
    }

    /// Apply everything, now: a promotion or a handover waits.
    pub fn finish_applying(&mut self) -> Result<(), ReplicaError> {
        self.store.lock().apply_all()
    }

    pub fn digests(&mut self, request: &DigestRequest) -> Body {
        let disk = DiskIndex(request.disk as u16);
        let step = request.granularity.max(1);
        let mut digests = Vec::new();
        let mut error = String::new();
        let (mut at, end) = (request.start_block, request.start_block + u64::from(request.blocks.min(1 << 16)));
        while at < end {
            let blocks = u64::from(step).min(end - at) as u32;
            let digest = self.store.lock().blocks_digest(disk, &[Extent { start: Block(at), blocks }]);
            match digest {
                Ok(digest) => digests.extend_from_slice(&digest[..16]),
                Err(e) => {
                    error = e.to_string();
                    break;
                }
            }
            at += u64::from(blocks);
        }
        Body::DigestReply(DigestReply { id: request.id, digests: digests.into(), error })
    }

    /// Said when it changed.
    pub fn news(&mut self) -> Option<Body> {
        if !self.full.is_empty() && self.has_room() {
            // A source that was told to wait sends nothing that could show that there is room again: it may try.
            self.room();
        }
        let full = !self.full.is_empty();
        if full == self.told_full {
            return None;
        }
        self.told_full = full;
        Some(self.state())
    }

    /// There is something to apply and nothing that keeps us from it.
    pub fn has_work(&self) -> bool {
        self.more_to_apply && self.poisoned.is_none() && self.has_room()
    }

    /// The images hold nothing at all: the source need not send what is empty there.
    pub fn is_virgin(&self) -> bool {
        let store = self.store.lock();
        store.manifest().virgin && !store.manifest().direct_started
    }

    /// Free space, as looked at from time to time.
    pub fn state(&self) -> Body {
        let report = self.store.lock().report();
        Body::TargetState(TargetState {
            journal_bytes: report.journal_bytes,
            journal_limit_bytes: report.journal_bytes_max,
            free_bytes: self.room.folder_bytes,
            images_free_bytes: self.room.images_bytes,
            committed: Some(convert::wire_generation(self.committed())),
            applied: Some(convert::wire_generation(self.applied())),
            kept: self.store.lock().kept().iter().map(|m| convert::wire_generation(m.generation)).collect(),
            full: self.full.clone(),
        })
    }
}

/// The mark under which a former source's disks become a replica.
pub fn adopted_mark(generation: Generation) -> Mark {
    Mark { generation, root: [0; 32], committed_at_seconds: unix_seconds() }
}

fn result(generation: Generation, outcome: Outcome, text: &str) -> Body {
    Body::CommitResult(CommitResult {
        generation: Some(convert::wire_generation(generation)),
        outcome: outcome.into(),
        lacks: Vec::new(),
        text: text.to_owned(),
    })
}

/// Sorted numbers as ranges.
fn ranges(sequences: impl Iterator<Item = u64>) -> Vec<SequenceRange> {
    let mut out: Vec<SequenceRange> = Vec::new();
    for s in sequences {
        match out.last_mut() {
            Some(r) if r.last + 1 == s => r.last = s,
            _ => out.push(SequenceRange { first: s, last: s }),
        }
    }
    out
}
