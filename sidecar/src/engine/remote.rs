//! Reads of an attached guest that the source serves (design §3.5: *Attached*).

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use watari_core::{
    front::{Errno, Request},
    geometry::DiskIndex,
};
use watari_wire::replication::{ReadReply, ReadRequest, control_message::Body};

use super::{
    event::ControlSender,
    gate::{GateDisk, finish},
    stream::message,
};

struct Pending {
    disk: DiskIndex,
    request: Request,
    deadline: Instant,
}

#[derive(Default)]
struct Inner {
    control: Option<ControlSender>,
    next: u64,
    pending: HashMap<u64, Pending>,
}

/// Reads on their way. Bounded by what the front ends have outstanding.
#[derive(Default)]
pub struct RemoteReads {
    inner: Mutex<Inner>,
    disks: Mutex<Option<Arc<Vec<GateDisk>>>>,
}

impl RemoteReads {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disks(&self) -> Option<Arc<Vec<GateDisk>>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_disks(&self, disks: Arc<Vec<GateDisk>>) {
        *self.disks.lock().unwrap_or_else(PoisonError::into_inner) = Some(disks);
    }

    /// Ask the source; without a link the disk keeps the request until there is one.
    pub fn ask(&self, disk: DiskIndex, request: Request, deadline: Instant) {
        let mut inner = self.lock();
        if let Some(control) = inner.control.clone() {
            inner.next += 1;
            let id = inner.next;
            let ask =
                ReadRequest { id, disk: u32::from(disk.0), offset: request.offset, length: request.length as u32 };
            inner.pending.insert(id, Pending { disk, request, deadline });
            if control.send(message(Body::ReadRequest(ask))).is_ok() {
                return;
            }
            let Some(back) = inner.pending.remove(&id) else { return };
            drop(inner);
            return self.back([back]);
        }
        drop(inner);
        self.back([Pending { disk, request, deadline }]);
    }

    pub fn reply(&self, reply: ReadReply) {
        let Some(mut pending) = self.lock().pending.remove(&reply.id) else { return };
        if reply.errno == 0 && reply.data.len() == pending.request.data.len() {
            pending.request.data.copy_from_slice(&reply.data);
            finish(pending.request, Ok(()));
        } else {
            finish(pending.request, Err(Errno::Io));
        }
    }

    /// Another link, or none. What was asked on the old one is asked again, or waits.
    pub fn link(&self, control: Option<ControlSender>) {
        let mut inner = self.lock();
        inner.control = control;
        let pending: Vec<Pending> = std::mem::take(&mut inner.pending).into_values().collect();
        drop(inner);
        self.back(pending);
    }

    fn back(&self, pending: impl IntoIterator<Item = Pending>) {
        if let Some(disks) = self.disks() {
            for p in pending {
                disks[usize::from(p.disk.0)].retry(p.request, p.deadline);
            }
        }
    }
}
