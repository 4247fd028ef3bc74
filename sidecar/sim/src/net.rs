//! The simulated network: connections that a site dials to the other, each with one control call (ordered both ways)
//! and some data calls (each ordered, together not). A connection breaks at any message; what was under way is lost from
//! some point on, and each end learns of it in its own time. Several connections may exist at once, and what an old one
//! still carries arrives late.

use std::collections::{BTreeMap, VecDeque};

use watari_core::{
    frame::FrameHeader,
    geometry::{DiskIndex, Extent, Generation, Sequence},
    handover::{Message, Peer},
    record::Id,
    replica::Entry,
    storage::sim::SimRng,
    versions::Speaks,
};

/// A frame on its way.
#[derive(Clone, Debug)]
pub struct OutFrame {
    pub header: FrameHeader,
    pub payload: Vec<u8>,
}

/// The first message of a connection: the durable record as far as it is told.
#[derive(Clone, Debug)]
pub struct Hello {
    pub peer: Peer,
    /// The role as such; `peer.role` hides that a promotion is under way.
    pub takes_frames: bool,
    pub identity: Id,
    /// Which folder this is.
    pub site: Id,
    pub session: u64,
    pub committed: Generation,
    pub staged: Vec<(Sequence, Sequence)>,
    pub virgin: bool,
    pub speaks: Speaks,
}

/// What a target answers to a commit list.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Committed,
    Lacks(Vec<Sequence>),
    Conflict(String),
}

/// What travels on a control call.
#[derive(Clone, Debug)]
pub enum Body {
    Hello(Box<Hello>),
    Handover(Message),
    List {
        generation: Generation,
        parent: Generation,
        entries: Vec<Entry>,
        root: [u8; 32],
    },
    Verdict {
        generation: Generation,
        verdict: Verdict,
    },
    Durable {
        session: u64,
        sequences: Vec<Sequence>,
    },
    DigestAsk {
        id: u64,
        disk: DiskIndex,
        extent: Extent,
    },
    Digests {
        id: u64,
        digests: Vec<[u8; 16]>,
    },
    Baseline {
        generation: Generation,
        identity: Id,
    },
    Read {
        id: u64,
        disk: usize,
        sector: u64,
        sectors: u64,
    },
    ReadReply {
        id: u64,
        data: Option<Vec<u8>>,
    },
    Full(bool),
    Superseded(u64, Vec<Sequence>),
    /// A message that only a newer version knows.
    Newer,
}

impl Body {
    pub fn name(&self) -> &'static str {
        match self {
            Body::Hello(_) => "Hello",
            Body::Handover(m) => match m {
                Message::Open { .. } => "Open",
                Message::Attached { .. } => "Attached",
                Message::QemuLeft { .. } => "QemuLeft",
                Message::Acquire { .. } => "Acquire",
                Message::TakeOver { .. } => "TakeOver",
                Message::Grant { .. } => "Grant",
                Message::Activated { .. } => "Activated",
                Message::Released { .. } => "Released",
                Message::Void { .. } => "Void",
                Message::Voided { .. } => "Voided",
            },
            Body::List { .. } => "List",
            Body::Verdict { verdict: Verdict::Committed, .. } => "Committed",
            Body::Verdict { verdict: Verdict::Lacks(_), .. } => "Lacks",
            Body::Verdict { verdict: Verdict::Conflict(_), .. } => "Conflict",
            Body::Durable { .. } => "Durable",
            Body::DigestAsk { .. } => "DigestAsk",
            Body::Digests { .. } => "Digests",
            Body::Baseline { .. } => "Baseline",
            Body::Read { .. } => "Read",
            Body::ReadReply { .. } => "ReadReply",
            Body::Full(_) => "Full",
            Body::Superseded(..) => "Superseded",
            Body::Newer => "a message of a newer version",
        }
    }
}

impl std::fmt::Display for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Body::Digests { id, digests } => write!(f, "Digests {id}: {} blocks", digests.len()),
            Body::List { generation, parent, entries, .. } => {
                write!(f, "List {generation} after {parent}:")?;
                entries
                    .iter()
                    .try_for_each(|e| write!(f, " {}{}", e.sequence.0, if e.excluded.is_empty() { "" } else { "*" }))
            }
            Body::Hello(h) => {
                let Hello { peer, takes_frames, committed, staged, virgin, .. } = &**h;
                let (epoch, floor, role) = (peer.epoch.counter, peer.floor, peer.role);
                write!(
                    f,
                    "Hello {role:?} epoch {epoch} floor {floor} takes {takes_frames} committed {committed} staged {staged:?} virgin {virgin}"
                )
            }
            Body::Durable { sequences, .. } => write!(f, "Durable {sequences:?}"),
            other => write!(f, "{other:?}"),
        }
    }
}

/// Number of a connection.
pub type WireId = u64;

/// One connection.
#[derive(Clone, Debug)]
pub struct Wire {
    pub dialer: usize,
    /// What the dialer said of itself.
    pub said: Peer,
    /// Which life of each site's process this belongs to.
    pub lives: [u64; 2],
    /// Messages on their way *to* each site.
    pub control: [VecDeque<Body>; 2],
    /// Data calls, towards the listener.
    pub lanes: Vec<VecDeque<OutFrame>>,
    /// No new message arrives; what is still queued does, then each end is told.
    pub broken: bool,
    /// The site has closed its end or was told that the connection is gone.
    pub gone: [bool; 2],
}

/// What a delivery gives to a site.
#[derive(Debug)]
pub enum Arrival {
    Message(Body),
    Closed,
}

/// All connections.
#[derive(Clone, Debug, Default)]
pub struct Net {
    pub wires: BTreeMap<WireId, Wire>,
    next: WireId,
    /// Nobody can dial, nothing arrives.
    pub partitioned: bool,
}

impl Net {
    /// Dial: the Hello is under way.
    pub fn dial(&mut self, dialer: usize, lives: [u64; 2], lanes: usize, hello: Hello) -> WireId {
        self.next += 1;
        let mut wire = Wire {
            dialer,
            said: hello.peer.clone(),
            lives,
            control: Default::default(),
            lanes: vec![VecDeque::new(); lanes],
            broken: false,
            gone: [false; 2],
        };
        wire.control[1 - dialer].push_back(Body::Hello(Box::new(hello)));
        self.wires.insert(self.next, wire);
        self.next
    }

    /// A message from `from`. On a connection that is gone it is lost.
    pub fn send(&mut self, wire: WireId, from: usize, body: Body) {
        if let Some(w) = self.wires.get_mut(&wire).filter(|w| !w.broken && !w.gone[from]) {
            w.control[1 - from].push_back(body);
        }
    }

    pub fn send_frame(&mut self, wire: WireId, lane: usize, frame: OutFrame) {
        if let Some(w) = self.wires.get_mut(&wire).filter(|w| !w.broken && !w.gone[w.dialer]) {
            let n = w.lanes.len();
            w.lanes[lane % n].push_back(frame);
        }
    }

    /// One end hangs up; the other hears what was sent before, then that it is closed.
    pub fn hang_up(&mut self, wire: WireId, by: usize) {
        if let Some(w) = self.wires.get_mut(&wire) {
            w.gone[by] = true;
            w.control[by].clear();
        }
    }

    /// The connection breaks: what is under way is lost from a random point on.
    pub fn cut(&mut self, wire: WireId, rng: &mut SimRng) {
        if let Some(w) = self.wires.get_mut(&wire) {
            w.broken = true;
            let queues = w.control.iter_mut();
            queues.for_each(|q| q.truncate(rng.below(q.len() as u64 + 1) as usize));
            w.lanes.iter_mut().for_each(|q| q.truncate(rng.below(q.len() as u64 + 1) as usize));
        }
    }

    /// The site's process is gone: its ends are, and nothing that was under way to it arrives.
    pub fn died(&mut self, site: usize) {
        for w in self.wires.values_mut() {
            w.gone[site] = true;
            w.control[site].clear();
            if w.dialer != site {
                w.lanes.iter_mut().for_each(VecDeque::clear);
            }
        }
    }

    /// Whether something can arrive at `site` on this wire.
    pub fn deliverable(&self, wire: WireId, site: usize) -> bool {
        self.wires.get(&wire).is_some_and(|w| {
            !w.gone[site] && (!w.control[site].is_empty() && !self.partitioned || w.broken || w.gone[1 - site])
        })
    }

    /// The next thing that arrives at `site` on this wire.
    pub fn deliver(&mut self, wire: WireId, site: usize) -> Option<Arrival> {
        let partitioned = self.partitioned;
        let w = self.wires.get_mut(&wire).filter(|w| !w.gone[site])?;
        if !partitioned && let Some(body) = w.control[site].pop_front() {
            return Some(Arrival::Message(body));
        }
        if w.broken || w.gone[1 - site] {
            w.gone[site] = true;
            return Some(Arrival::Closed);
        }
        None
    }

    /// The next frame of a data call. Data calls of a hung-up dialer still carry what they had.
    pub fn deliver_frame(&mut self, wire: WireId, lane: usize) -> Option<OutFrame> {
        if self.partitioned {
            return None;
        }
        self.wires.get_mut(&wire)?.lanes.get_mut(lane)?.pop_front()
    }

    /// Forget connections that can carry nothing any more.
    pub fn sweep(&mut self) {
        self.wires.retain(|_, w| !(w.gone[0] && w.gone[1] && w.lanes.iter().all(VecDeque::is_empty)));
    }

    /// The site dials already.
    pub fn dials(&self, site: usize) -> bool {
        self.wires.values().any(|w| w.dialer == site && !w.gone[site])
    }
}
