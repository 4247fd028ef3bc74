//! Reports about a replica folder: what it has, what it lacks, whether its bytes are right.
//!
//! Everything here reads and nothing changes; open the folder with [`super::Options::read_only`] to be sure of it.

use super::{Claim, Images, Mark, ReplicaError, ReplicaStore, Staged, manifest::Manifest};
use crate::{
    frame::FrameKind,
    geometry::{BLOCK_BYTES, Generation},
    storage::Storage,
};
use alloc::{format, string::String, vec::Vec};

/// Where a kept generation lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Committed, still in the journal.
    Journal,
    /// In the image.
    Image,
    /// Reached from the image by undo.
    Undo,
}

/// A kept generation in a report.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GenerationReport {
    pub mark: Mark,
    pub place: Place,
    pub pinned: bool,
    pub shared: bool,
}

/// Whether work goes on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReplicaState {
    Ready,
    /// The last change was refused for want of room.
    Full {
        claim: Claim,
        place: String,
        needed: u64,
    },
    RollingBack(Generation),
    /// A write or sync failed; the folder must be opened again.
    Poisoned(String),
}

/// What the replica has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplicaReport {
    pub state: ReplicaState,
    pub manifest: Manifest,
    /// Newest first.
    pub generations: Vec<GenerationReport>,
    pub staged: Vec<Staged>,
    /// Bytes of all journal segments, and of the records in them that are needed.
    pub journal_bytes: u64,
    pub journal_live_bytes: u64,
    pub journal_bytes_max: u64,
    /// Content bytes that are committed and not applied.
    pub unapplied_bytes: u64,
    pub undo_bytes: u64,
}

/// Something wrong that [`ReplicaStore::verify`] found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    pub file: String,
    pub what: String,
}

impl<M: Storage, D: Images> ReplicaStore<M, D> {
    pub fn state(&self) -> ReplicaState {
        if let Some(reason) = self.poisoned() {
            return ReplicaState::Poisoned(reason.into());
        }
        if let Some((claim, (place, needed))) = self.full.first_key_value() {
            return ReplicaState::Full { claim: *claim, place: place.clone(), needed: *needed };
        }
        match self.manifest.rolling_back {
            Some(to) => ReplicaState::RollingBack(to),
            None => ReplicaState::Ready,
        }
    }

    pub fn report(&self) -> ReplicaReport {
        let generations = self.kept().into_iter().map(|mark| GenerationReport {
            mark,
            place: self.place(mark.generation),
            pinned: self.pins.contains_key(&mark.generation),
            shared: self.manifest.shared == Some(mark.generation),
        });
        ReplicaReport {
            state: self.state(),
            manifest: self.manifest.clone(),
            generations: generations.collect(),
            staged: self.staged(),
            journal_bytes: self.journal.bytes(),
            journal_live_bytes: self.journal.live_bytes(),
            journal_bytes_max: self.journal.limits().journal_bytes_max,
            unapplied_bytes: self.unapplied_bytes(),
            undo_bytes: self.history.iter().map(|info| info.bytes).sum(),
        }
    }

    fn place(&self, generation: Generation) -> Place {
        if self.pending.iter().any(|pending| pending.mark.generation == generation) {
            Place::Journal
        } else if self.history.iter().any(|info| info.older.generation == generation) {
            Place::Undo
        } else {
            Place::Image
        }
    }

    /// Content bytes of committed generations that wait for their application: what a promotion still has to write.
    pub fn unapplied_bytes(&self) -> u64 {
        let pieces = self.pending.iter().flat_map(|pending| &pending.delta.pieces);
        pieces
            .filter(|piece| piece.supply == super::delta::Supply::Data)
            .map(|piece| u64::from(piece.blocks) * BLOCK_BYTES)
            .sum()
    }

    /// Read every journal payload and every undo block and check CRCs and digests. An empty answer means all are right.
    /// The image itself carries no checksums of ours; compare it with the source for that.
    pub fn verify(&mut self) -> Result<Vec<Finding>, ReplicaError> {
        let mut findings = Vec::new();
        let held = self.pending.iter().flat_map(|pending| pending.delta.frames.iter().map(|frame| frame.frame.clone()));
        let frames: Vec<_> = self.journal.staged().cloned().chain(held).collect();
        for frame in frames.iter().filter(|frame| frame.header.kind == FrameKind::Data && !frame.in_image) {
            match frame.content(&self.meta, &*self.decompress) {
                Ok(content) => {
                    let header = &frame.header;
                    if crate::frame::content_digest(header.disk, &header.extents, &content) != header.digest {
                        let what = format!("digest of frame {:?}", frame.key());
                        findings.push(Finding { file: frame.segment_name(), what });
                    }
                }
                Err(error) => findings.push(finding(error)?),
            }
        }
        for info in self.history.clone() {
            let index = match self.undo_index(&info) {
                Ok(index) => index,
                Err(error) => {
                    findings.push(finding(error)?);
                    continue;
                }
            };
            for error in index.damage(&self.meta) {
                findings.push(finding(error)?);
            }
        }
        Ok(findings)
    }
}

/// Damage is a finding; anything else ends the verification.
fn finding(error: ReplicaError) -> Result<Finding, ReplicaError> {
    match error {
        ReplicaError::Corrupt { file, what } => Ok(Finding { file, what }),
        other => Err(other),
    }
}
