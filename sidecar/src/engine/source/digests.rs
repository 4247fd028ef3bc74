//! The peer's digests of its blocks, asked for by reader threads and answered through the brain.

use std::{
    collections::HashMap,
    sync::{Condvar, Mutex, PoisonError},
    time::Duration,
};

use watari_core::geometry::{Block, DiskIndex, Extent};
use watari_wire::replication::{DigestRequest, control_message::Body};

use crate::engine::{build::PeerDigests, event::ControlSender, stream::message};

/// How long a reader waits for the peer's digests before it sends the content instead.
const DIGEST_WAIT: Duration = Duration::from_secs(20);

/// The peer's digests, asked for by readers and answered through the brain.
#[derive(Default)]
pub struct DigestBook {
    inner: Mutex<DigestInner>,
    answered: Condvar,
}

#[derive(Default)]
struct DigestInner {
    control: Option<ControlSender>,
    next: u64,
    answers: HashMap<u64, Option<Vec<u8>>>,
}

impl DigestBook {
    fn lock(&self) -> std::sync::MutexGuard<'_, DigestInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn link(&self, control: Option<ControlSender>) {
        let mut inner = self.lock();
        inner.control = control;
        inner.answers.values_mut().for_each(|a| *a = Some(Vec::new()));
        self.answered.notify_all();
    }

    pub fn answer(&self, id: u64, digests: &[u8]) {
        let mut inner = self.lock();
        if let Some(answer) = inner.answers.get_mut(&id) {
            *answer = Some(digests.to_vec());
            self.answered.notify_all();
        }
    }

    /// Digests of the blocks of extents at the peer; what is not answered is missing.
    pub fn ask(&self, disk: DiskIndex, extents: &[Extent], out: &mut PeerDigests) {
        for (extent, digests) in self.request(disk, extents, 1) {
            let blocks = (extent.start.0..extent.end().0).map(Block);
            out.extend(blocks.zip(digests));
        }
    }

    /// Digests of extents in parts of `granularity` blocks (the last part of an extent may be smaller). `None`: the peer did
    /// not answer all of it.
    pub fn ask_parts(&self, disk: DiskIndex, extents: &[Extent], granularity: u32) -> Option<Vec<(Extent, [u8; 16])>> {
        let answers = self.request(disk, extents, granularity);
        let mut out = Vec::new();
        for (extent, digests) in &answers {
            let starts = (extent.start.0..extent.end().0).step_by(granularity as usize);
            let parts = starts
                .map(|at| Extent { start: Block(at), blocks: u64::from(granularity).min(extent.end().0 - at) as u32 });
            out.extend(parts.zip(digests.iter().copied()));
        }
        let wanted: usize = extents.iter().map(|e| e.blocks.div_ceil(granularity) as usize).sum();
        (out.len() == wanted).then_some(out)
    }

    /// All asked for at once, then waited for.
    fn request(&self, disk: DiskIndex, extents: &[Extent], granularity: u32) -> Vec<(Extent, Vec<[u8; 16]>)> {
        let mut inner = self.lock();
        let Some(control) = inner.control.clone() else { return Vec::new() };
        let mut asked = Vec::with_capacity(extents.len());
        for extent in extents {
            inner.next += 1;
            let id = inner.next;
            inner.answers.insert(id, None);
            asked.push((id, *extent));
            let (start_block, blocks) = (extent.start.0, extent.blocks);
            let request = DigestRequest { id, disk: u32::from(disk.0), start_block, blocks, granularity };
            // A closed link answers everything with nothing (`link`).
            let _ = control.send(message(Body::DigestRequest(request)));
        }
        let waits = |i: &mut DigestInner| asked.iter().any(|(id, _)| i.answers.get(id) == Some(&None));
        let waited = self.answered.wait_timeout_while(inner, DIGEST_WAIT, waits);
        let (mut inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let answered = asked.into_iter().filter_map(|(id, extent)| {
            let digests = inner.answers.remove(&id)??;
            Some((extent, digests.as_chunks::<16>().0.to_vec()))
        });
        answered.collect()
    }
}
