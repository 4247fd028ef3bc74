//! The worker process of one site: its role, its one link, its duty, and the gate of its guest. It does what
//! `sidecar/src/engine/{brain,brain/links}.rs` does, in the same order, one event at a time.
//!
//! It decides nothing that the core decides.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet, VecDeque},
    rc::Rc,
};

use watari_core::{
    geometry::{ActivationId, Generation, GenerationNumber, Session},
    handover::{Action, Event, Gate, Message, Peer, PeerRole, Site},
    record::{Role, RoleRecord},
    slots::SlotFile,
    storage::sim::{SimMedium, SimStorage},
    tracker::Tracker,
    versions::Speaks,
};

use crate::{
    ctx::Ctx,
    guest::Active,
    net::{Body, Hello, OutFrame, WireId},
    node::{Node, Region, SharedMaps},
    source::{Baseline, Source},
    target::Target,
};

/// Generation numbers reserved durably at a time: few, so that reservations are frequent here.
const NUMBERS_RESERVED: u64 = 5;

/// The one connection that counts.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    pub wire: WireId,
    pub dialer: bool,
    /// Epoch counter of the side that dialled: the lower one of two connections is refused.
    pub dialler_epoch: u64,
    pub same_history: bool,
    /// The peer takes no frames now: hang up and ask again.
    pub useless: bool,
}

/// See the module's header.
pub struct Process {
    pub index: usize,
    pub site: Site,
    pub session: Session,
    slot: SlotFile,
    /// What is in the slot file.
    written: RoleRecord,
    meta: SimStorage,
    pub medium: SimMedium,
    pub images: SimStorage,
    pub tracker: Tracker<SharedMaps>,
    /// Regions that the log names (in memory), and those that were written lately.
    pub logged: BTreeSet<Region>,
    pub hot: BTreeSet<Region>,
    pub region_log: Rc<RefCell<BTreeSet<Region>>>,
    /// Old content of frozen blocks.
    pub preserve: BTreeMap<(u16, u64), Vec<u8>>,
    pub give_up: bool,
    pub source: Option<Source>,
    pub target: Option<Target>,
    pub link: Option<Link>,
    pub frames: VecDeque<OutFrame>,
    pub gate: Gate,
    apply_goal: Option<Generation>,
    pub offered: bool,
    pub source_left: bool,
    /// A request for the right to write is on its way to the role.
    pub wants_write: bool,
    /// Guest requests inside this process.
    pub requests: Vec<Active>,
    /// The QEMU that is connected, and the one that was when the gate was last closed for good.
    pub connection: Option<u64>,
    pub condemned: Option<u64>,
    /// The record could not be written: this process ends now.
    pub dead: bool,
    /// The remainder was granted: nothing may reach the disks any more.
    pub granted: bool,
    pub refusals: Vec<&'static str>,
    /// Writes were, or are, let through that no log holds: entered in mapped memory before the first of them.
    pub untracked: Rc<Cell<bool>>,
    /// It crashed too often: the guest is served and nothing is tracked.
    pub pass_through: bool,
    pub log_broken: bool,
    /// Protocol versions that it speaks.
    pub speaks: Speaks,
}

impl Process {
    pub fn new(
        node: &Node,
        site: Site,
        session: Session,
        slot: SlotFile,
        tracker: Tracker<SharedMaps>,
        logged: BTreeSet<Region>,
    ) -> Process {
        let (gate, written) = (site.gate(), site.record().clone());
        Process {
            index: node.index,
            site,
            written,
            session,
            slot,
            meta: node.medium.folder("meta"),
            medium: node.medium.clone(),
            images: node.images.clone(),
            tracker,
            logged,
            hot: BTreeSet::new(),
            region_log: node.region_log.clone(),
            preserve: BTreeMap::new(),
            give_up: false,
            source: None,
            target: None,
            link: None,
            frames: VecDeque::new(),
            gate,
            apply_goal: None,
            offered: false,
            source_left: false,
            wants_write: false,
            requests: Vec::new(),
            connection: None,
            condemned: None,
            dead: false,
            granted: false,
            refusals: Vec::new(),
            untracked: node.untracked.clone(),
            pass_through: false,
            log_broken: node.log_broken,
            speaks: Speaks::OURS,
        }
    }

    /// Nothing is sent, and a handover is neither opened nor granted.
    pub fn counts_as_untracked(&self) -> bool {
        self.pass_through || self.untracked.get()
    }

    pub fn role(&self) -> &Role {
        &self.site.record().role
    }

    /// After a start: go on from the durable record.
    pub fn take_up(&mut self, ctx: &mut Ctx, baseline: Baseline) {
        let role = self.role().clone();
        if role.is_active_side() && !matches!(role, Role::Promoting { .. }) {
            self.become_source(ctx, None, baseline);
        } else if matches!(role, Role::Replica | Role::Voided { .. } | Role::Promoting { .. }) {
            // Not as Fenced: its disks are no replica's, and what may lie there is what a loss of power left of a removal.
            self.open_target(ctx);
        }
        let actions = self.site.resume();
        self.perform(ctx, actions);
    }

    pub fn apply(&mut self, ctx: &mut Ctx, event: Event) {
        self.follow_tracking(ctx);
        let before = self.role().name();
        let what = event_name(&event);
        if matches!((&event, self.role()), (Event::Rolled { .. }, Role::Promoting { .. })) {
            let attached = self.connection.is_some() && self.condemned != self.connection;
            assert!(!attached, "a promotion serves the QEMU that was attached before it");
        }
        let actions = self.site.apply(event);
        let after = self.role().name();
        let seals = before != after && matches!(self.role(), Role::Sealed { .. });
        assert!(!seals || !self.counts_as_untracked(), "a side that lost track seals: it cannot say what remains");
        ctx.cov.hit(format!("event {what} in {before}"));
        if before != after {
            ctx.cov.hit(format!("role {before} -> {after} by {what}"));
            ctx.note(|| format!("    site {} {before} -> {after} by {what}", self.index));
        }
        self.perform(ctx, actions);
    }

    /// The table refuses to seal for a side that is Untracked: it must know (engine/brain.rs).
    fn follow_tracking(&mut self, ctx: &mut Ctx) {
        let untracked = self.source.is_some() && self.counts_as_untracked();
        if !self.dead && self.site.record().untracked != untracked {
            let action = self.site.amend(|r| r.untracked = untracked);
            self.perform(ctx, vec![action]);
        }
    }

    /// Do what the core says, in its order, until the record cannot be written.
    pub fn perform(&mut self, ctx: &mut Ctx, actions: Vec<Action>) {
        for action in actions {
            if self.dead || self.medium.is_off() {
                self.dead = true;
                return;
            }
            match action {
                Action::Persist(record) => {
                    if self.slot.write(&mut self.meta, &record.encode()).is_err() {
                        self.dead = true;
                        return;
                    }
                    self.follow_epoch(ctx, &record);
                    self.written = record;
                }
                Action::Send(m) => {
                    self.check_written();
                    self.send(ctx, Body::Handover(m));
                }
                Action::Gate(gate) => {
                    if gate == Gate::Serve {
                        self.check_written();
                    }
                    if gate == Gate::Dead {
                        // What passed the gate before must not be admitted after it.
                        self.tracker.seal();
                        self.condemned = self.connection;
                    }
                    self.gate = gate;
                }
                Action::Converge(pace) => {
                    if let Some(s) = &mut self.source {
                        s.primary.converge(pace);
                    }
                }
                Action::SealAndSend => {
                    self.tracker.seal();
                    if let Some(s) = &mut self.source {
                        s.primary.seal(true);
                    }
                }
                Action::Unseal => {
                    self.granted = false;
                    self.tracker.unseal();
                    if let Some(s) = &mut self.source {
                        s.primary.seal(false);
                    }
                }
                Action::SyncDisks => {
                    if self.tracker.is_sealed() {
                        self.drain(ctx);
                    }
                    self.dead |= !self.sync_disks(ctx);
                }
                Action::ApplyUpTo(generation) => self.apply_goal = Some(generation),
                Action::RollTo(generation) => self.roll_to(ctx, generation),
                Action::BecomeSource { base } => self.become_source(ctx, base, Baseline::Marks),
                Action::BecomeReplica { generation } => self.become_replica(ctx, generation),
                Action::Refuse(why) => {
                    ctx.cov.hit(format!("refused: {why}"));
                    self.refusals.push(why);
                }
                Action::Report(condition) => ctx.cov.hit(format!("condition {condition:?}")),
            }
        }
        self.offered = self.site.offered();
    }

    /// I6: the peer hears, and a guest is served, only what is durable.
    fn check_written(&self) {
        let rights = |r: &RoleRecord| (r.epoch, r.floor, r.role.clone());
        let (now, written) = (rights(self.site.record()), rights(&self.written));
        assert!(now == written, "I6: site {} acts as {now:?} before that is written: {written:?}", self.index);
    }

    /// A higher epoch is durable here: frames of a lower one are neither sent nor taken from now on (I6).
    fn follow_epoch(&mut self, ctx: &mut Ctx, record: &RoleRecord) {
        let counter = record.epoch.counter;
        if let Some(source) = &mut self.source {
            source.raise_epoch(&self.tracker, counter);
        }
        if let Some(target) = self.target.as_mut().filter(|_| record.role.receives()) {
            let outcome = target.store.raise_floor(record.floor.max(counter)).map_err(|e| e.to_string());
            target.note(ctx, outcome);
        }
    }

    pub fn send(&mut self, ctx: &mut Ctx, body: Body) {
        if let Some(link) = self.link {
            ctx.cov.hit(format!("sent {}", body.name()));
            ctx.note(|| format!("    site {} sends {body}", self.index));
            ctx.net.send(link.wire, self.index, body);
        }
    }

    /// fdatasync of every disk; `false`: it failed.
    pub fn sync_disks(&mut self, ctx: &mut Ctx) -> bool {
        (0..ctx.setup.sizes.len()).all(|disk| self.sync_disk(ctx, disk))
    }

    fn become_source(&mut self, ctx: &mut Ctx, base: Option<Generation>, baseline: Baseline) {
        self.target = None;
        self.frames.clear();
        self.granted = false;
        self.tracker.unseal();
        if base.is_some() {
            self.tracker.clear_all();
            self.logged.clear();
            self.region_log.borrow_mut().clear();
            Target::remove(&self.medium);
            ctx.truth.promised[self.index] = None;
        }
        self.source = Some(Source::new(ctx, self.site.record(), self.session, base));
        self.take_baseline(ctx, baseline);
    }

    fn become_replica(&mut self, ctx: &mut Ctx, generation: Generation) {
        self.source = None;
        self.preserve.clear();
        if let Ok(found) = crate::content::read_all(&self.images, &ctx.setup.sizes) {
            ctx.truth.adopted(self.index, generation, found);
        }
        let counter = self.site.record().epoch.counter;
        match Target::adopt(ctx, self.index, &self.medium, &self.images, generation, counter) {
            Ok(target) => {
                self.target = Some(target);
                self.tracker.clear_all();
                self.apply(ctx, Event::Adopted);
            }
            Err(error) => self.failed(ctx, "adopting", &error.to_string()),
        }
    }

    fn failed(&mut self, ctx: &mut Ctx, doing: &str, error: &str) {
        self.dead |= self.medium.is_off();
        ctx.cov.hit(format!("failed: {doing}"));
        ctx.note(|| format!("    site {} {doing} failed: {error}", self.index));
    }

    fn open_target(&mut self, ctx: &mut Ctx) {
        match Target::open_or_create(ctx, self.index, &self.medium, &self.images) {
            Ok(target) => {
                target.check_promises(ctx);
                self.target = Some(target);
            }
            Err(error) => {
                assert!(
                    self.medium.is_off() || error.class() == watari_core::replica::ErrorClass::Retry,
                    "the replica cannot be opened: {error}"
                );
                self.failed(ctx, "opening the replica", &error.to_string());
            }
        }
    }

    fn roll_to(&mut self, ctx: &mut Ctx, generation: Generation) {
        let Some(target) = &mut self.target else { return };
        ctx.truth.promised[self.index] = None;
        let rolled = (|| {
            if target.committed() != generation {
                target.store.promote_to(generation)?;
            }
            target.store.apply_all()
        })();
        match rolled {
            Ok(()) => {
                let activation = ActivationId(ctx.id());
                self.apply(ctx, Event::Rolled { activation });
                ctx.truth.unfenced.insert(self.site.record().epoch.counter);
            }
            Err(error) => self.failed(ctx, "promoting", &error.to_string()),
        }
    }

    // ---- the link

    pub fn hello(&self) -> Hello {
        let record = self.site.record();
        let committed = match (&self.source, &self.target) {
            (Some(source), _) => source.primary.base(),
            (None, Some(target)) => target.committed(),
            (None, None) => record.base,
        };
        Hello {
            peer: peer_of(record, committed),
            takes_frames: record.role.receives(),
            identity: record.identity,
            site: record.site,
            session: self.session.0,
            committed,
            staged: Vec::new(),
            virgin: self.target.as_ref().is_some_and(Target::is_virgin),
            speaks: self.speaks,
        }
    }

    /// Whether this side dials.
    pub fn wants_dial(&self) -> bool {
        self.role().is_active_side() && !matches!(self.role(), Role::Promoting { .. })
    }

    pub fn link_opened(&mut self, ctx: &mut Ctx, wire: WireId, hello: &Hello, dialer: bool) {
        if self.speaks.common(hello.speaks).is_none() {
            ctx.cov.hit("a peer without a common version is refused");
            ctx.net.hang_up(wire, self.index);
            return;
        }
        let spoken = |speaks: Speaks| (1..=speaks.highest).filter(move |v| *v >= speaks.lowest);
        assert!(
            spoken(self.speaks).any(|v| spoken(hello.speaks).any(|w| v == w)),
            "a link of {:?} and {:?}, which have no version in common",
            self.speaks,
            hello.speaks
        );
        let mine = self.hello().peer;
        let outdated = |said: &Peer| said.epoch != mine.epoch || said.floor != mine.floor || said.role != mine.role;
        if dialer && ctx.net.wires.get(&wire).is_some_and(|w| outdated(&w.said)) {
            // What the peer knows of us is over: meet again.
            ctx.cov.hit("a dialled connection is outdated before it opens");
            ctx.net.hang_up(wire, self.index);
            return;
        }
        let dialler_epoch = if dialer { mine.epoch.counter } else { hello.peer.epoch.counter };
        if let Some(link) = &self.link {
            if dialler_epoch < link.dialler_epoch {
                ctx.cov.hit("a connection of a lower epoch is refused");
                ctx.net.hang_up(wire, self.index);
                return;
            }
            ctx.cov.hit("a second connection replaces the first");
            self.drop_link(ctx);
        }
        let record = self.site.record();
        let same_history = record.identity != [0; 16] && hello.identity == record.identity;
        self.link = Some(Link { wire, dialer, dialler_epoch, same_history, useless: false });
        let activation = ActivationId(ctx.id());
        let refusals = self.refusals.len();
        self.apply(ctx, Event::Met { peer: hello.peer.clone(), activation });
        if self.refusals.len() > refusals {
            self.drop_link(ctx);
        }
        if self.dead || self.link.is_none() {
            return;
        }
        if dialer {
            self.met_as_dialer(ctx, hello, same_history)
        } else {
            self.met_as_listener(ctx, hello)
        }
        if self.speaks.highest > Speaks::OURS.highest {
            self.send(ctx, Body::Newer);
        }
    }

    fn met_as_dialer(&mut self, ctx: &mut Ctx, hello: &Hello, same: bool) {
        if !self.role().is_active_side() || !hello.takes_frames {
            if let Some(link) = &mut self.link {
                link.useless = true;
            }
            return;
        }
        self.source_link_up(ctx, hello, same);
    }

    fn met_as_listener(&mut self, ctx: &mut Ctx, hello: &Hello) {
        let mut staged = Vec::new();
        if self.role().receives() {
            if self.target.is_none() {
                self.open_target(ctx);
            }
            if let Some(target) = &mut self.target {
                target.begin_session(ctx, hello.session, hello.peer.epoch.counter);
                staged = target.staged(hello.session);
            }
        }
        let mut reply = self.hello();
        reply.staged = staged;
        reply.session = hello.session;
        self.frames.clear();
        self.dead |= self.medium.is_off();
        if !self.dead {
            self.send(ctx, Body::Hello(Box::new(reply)));
            self.retry_remote();
        }
    }

    pub fn drop_link(&mut self, ctx: &mut Ctx) {
        if let Some(link) = self.link.take() {
            ctx.net.hang_up(link.wire, self.index);
        }
        self.retry_remote();
        self.source_link_down();
        self.apply(ctx, Event::Parted);
    }

    pub fn link_closed(&mut self, ctx: &mut Ctx, wire: WireId) {
        if self.link.is_some_and(|l| l.wire == wire) {
            self.source_left = false;
            self.drop_link(ctx);
        }
    }

    /// A message on a wire; the first one opens it.
    pub fn message(&mut self, ctx: &mut Ctx, wire: WireId, dialer: bool, body: Body) {
        if let Body::Hello(hello) = &body {
            self.link_opened(ctx, wire, hello, dialer);
            return;
        }
        if self.link.is_none_or(|l| l.wire != wire) {
            return;
        }
        ctx.cov.hit(format!("received {}", body.name()));
        match body {
            Body::Hello(_) => {}
            Body::Handover(m) => {
                match m {
                    Message::QemuLeft { .. } => self.source_left = true,
                    Message::Void { .. } | Message::Voided { .. } | Message::Activated { .. } => {
                        self.source_left = false
                    }
                    Message::Open { .. }
                    | Message::Attached { .. }
                    | Message::Acquire { .. }
                    | Message::TakeOver { .. }
                    | Message::Grant { .. }
                    | Message::Released { .. } => {}
                }
                let activation = ActivationId(ctx.id());
                self.apply(ctx, Event::Received(m, activation));
            }
            Body::List { generation, parent, entries, root } => {
                if let Some(target) = &mut self.target {
                    target.list(ctx, generation, parent, entries, root);
                }
            }
            Body::DigestAsk { id, disk, extent } => {
                let answer = self.target.as_mut().and_then(|t| t.digests(disk, extent));
                if let Some(digests) = answer {
                    self.send(ctx, Body::Digests { id, digests });
                }
            }
            Body::Baseline { generation, identity } => {
                if self.target.is_some() && self.site.record().identity != identity {
                    let action = self.site.amend(|r| {
                        r.identity = identity;
                        r.base = generation;
                    });
                    self.perform(ctx, vec![action]);
                }
            }
            Body::Read { id, disk, sector, sectors } => self.serve_read(ctx, id, disk, sector, sectors),
            Body::ReadReply { id, data } => self.remote_reply(ctx, id, data),
            Body::Superseded(session, sequences) => {
                if let Some(target) = self.target.as_mut().filter(|t| t.session() == session) {
                    let outcome = target.store.supersede(&sequences).map_err(|e| e.to_string());
                    target.note(ctx, outcome);
                }
            }
            // Whoever does not know it ignores it.
            Body::Newer => {}
            Body::Verdict { .. } | Body::Durable { .. } | Body::Digests { .. } | Body::Full(_) => {
                self.source_message(ctx, body);
            }
        }
    }

    // ---- duties

    pub fn reserve_numbers(&mut self, ctx: &mut Ctx) {
        let Some(source) = &self.source else { return };
        let until = GenerationNumber(source.primary.next_number().0 + NUMBERS_RESERVED);
        let base = source.primary.base();
        let action = self.site.amend(|r| {
            r.numbers_reserved = until;
            r.base = base;
        });
        self.perform(ctx, vec![action]);
        if let (false, Some(source)) = (self.dead, &mut self.source) {
            source.primary.numbers_reserved(until);
        }
    }

    /// After a commit and the sync that follows it: from here on the two sides share a history.
    pub fn tell_baseline(&mut self, ctx: &mut Ctx) {
        let Some(source) = &self.source else { return };
        let base = source.primary.base();
        if let Some(link) = &mut self.link
            && !link.same_history
        {
            link.same_history = true;
            let identity = self.site.record().identity;
            self.send(ctx, Body::Baseline { generation: base, identity });
        }
    }

    /// One step of the target's duty: 0 frame, 1 sync, 2 commit, 3 apply, 4 retention.
    pub fn target_step(&mut self, ctx: &mut Ctx, kind: u64) -> bool {
        let Some(target) = &mut self.target else {
            self.frames.clear();
            return false;
        };
        let mut out = Vec::new();
        let did = match kind {
            0 => match self.frames.front() {
                Some(frame) if target.frame(ctx, frame) => self.frames.pop_front().is_some(),
                _ => false,
            },
            1 => target.sync(ctx).map(|b| out.push(b)).is_some(),
            2 => target.try_commit(ctx).map(|b| out.push(b)).is_some(),
            3 => target.work(ctx),
            _ => target.retain(ctx),
        };
        out.extend(target.news(ctx.now));
        self.dead |= self.medium.is_off();
        if self.dead {
            return true;
        }
        out.into_iter().for_each(|body| self.send(ctx, body));
        if let Some(goal) = self.apply_goal
            && self.target.as_ref().is_some_and(|t| t.committed() == goal && t.applied() == goal)
        {
            self.apply_goal = None;
            let activation = ActivationId(ctx.id());
            self.apply(ctx, Event::Applied { generation: goal, activation });
            return true;
        }
        did
    }
}

/// How the record looks to the peer (engine/convert.rs).
pub fn peer_of(record: &RoleRecord, generation: Generation) -> Peer {
    let role = match record.role {
        Role::Serving => PeerRole::Active { handover: None },
        Role::HandoverOpen { handover } => PeerRole::Active { handover: Some(handover) },
        Role::Sealed { handover, .. } => PeerRole::Sealed { handover },
        Role::Released { handover, .. } => PeerRole::Released { handover },
        Role::Replica => PeerRole::Replica,
        Role::Voided { handover } => PeerRole::Voided { handover },
        Role::Promoting { .. } | Role::Fenced { .. } => PeerRole::Fenced,
    };
    Peer { epoch: record.epoch, floor: record.floor, role, generation }
}

fn event_name(event: &Event) -> &'static str {
    match event {
        Event::OpenHandover { .. } => "OpenHandover",
        Event::GuestAttached => "GuestAttached",
        Event::GuestLeft => "GuestLeft",
        Event::WantWrite { .. } => "WantWrite",
        Event::WantVoid { .. } => "WantVoid",
        Event::TakeOver { .. } => "TakeOver",
        Event::Promote { .. } => "Promote",
        Event::Reclaim { .. } => "Reclaim",
        Event::Rolled { .. } => "Rolled",
        Event::AcceptDivergence => "AcceptDivergence",
        Event::RemainderSent { .. } => "RemainderSent",
        Event::Applied { .. } => "Applied",
        Event::Adopted => "Adopted",
        Event::Met { .. } => "Met",
        Event::Parted => "Parted",
        Event::Received(m, _) => match m {
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
    }
}
