//! The brain: one thread that owns who we are and what we do about it.
//!
//! `let event = receive(); apply; perform; pump` (style item 2). It owns the role record, the one link to the peer, and
//! the duty that belongs to the role: [`Source`] while this side is active, [`Target`] while it is a replica. The guest's
//! requests never pass through here; they meet a gate that is set from here.
//!
//! Invariants: **I6** the record is durable before anything that follows from it ([`Brain::perform`] stops at a failed
//! Persist by ending the worker, which reads the record again); **I9** every refusal and loss is a condition.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, watch};
use watari_core::{
    divergence::Divergence,
    geometry::{Generation, GenerationNumber, Session},
    handover::{self, Action, Gate, Message, Site},
    limits,
    primary::{Limits, Phase},
    record::{Role, RoleRecord},
    replica::ReplicaError,
    slots::SlotFile,
};
use watari_store::{folder::Folder, lock::FolderLock, trust::StartFacts};
use watari_wire::{
    replication::{self as wire, Hello, control_message::Body},
    report::Report,
};

use super::{
    clock::{random_id, unix_millis},
    conditions::Conditions,
    connections::Connections,
    convert, divergence,
    event::{Answer, ControlSender, Event, LinkId},
    folder::ReplicaFolder,
    gate::GateDisk,
    generations::Generations,
    remote::RemoteReads,
    settings::Settings,
    source::{Asked, Begin, Source},
    steering::{Declined, Outcome},
    stream::{DataPool, Post, message},
    target::{Target, adopted_mark},
    tracking::Shared,
};
use crate::{
    config::{Config, StartWithoutPeer},
    throttle::Throttle,
    tls::Tls,
};

mod cuts;
pub(super) mod growth;
mod intents;
mod links;
mod pace;
mod parts;
mod reporting;
mod roles;

pub use parts::{Baseline, Parts};

/// Longest sleep of the loop: held requests expire, demands time out and reports are made at this grain.
const TICK: Duration = Duration::from_millis(50);
/// Events handled before the duties are looked at again.
const EVENTS_PER_ROUND: usize = 256;
/// Generation numbers reserved durably at a time.
const NUMBERS_RESERVED: u64 = 1000;

/// A write that takes longer to reach a local disk than this never will.
const DRAIN_WAIT: Duration = Duration::from_secs(30);

/// Flags that the guest's threads read.
#[derive(Default)]
pub struct Signals {
    /// A QEMU may attach here although this side does not serve ([`Site::offered`]).
    pub offered: AtomicBool,
    /// The same, and the source is within reach ([`Site::attachable`]).
    pub attachable: AtomicBool,
    /// The source's QEMU has left.
    pub source_left: AtomicBool,
    /// A request for the right to write is on its way to the brain.
    pub wants_write: AtomicBool,
}

/// The one connection to the peer.
struct Link {
    id: LinkId,
    peer: String,
    control: ControlSender,
    rtt_millis: f64,
    /// Epoch counter of the side that dialled: of two connections the one of the higher epoch stays, of equals the newer.
    /// (Sessions are random and say nothing about age; a worker that restarted must not wait for its own dead link.)
    dialler_epoch: u64,
    /// The peer shares our history; otherwise it gets a baseline after the next commit.
    same_history: bool,
}

/// What a fenced peer wrote alone, as far as it was told.
#[derive(Default)]
struct PeerDivergence {
    blocks: u64,
    anything: bool,
}

/// Somebody waits for a promotion.
struct TakingOver {
    answer: Answer,
    until: Instant,
}

/// Somebody waits for a commit.
struct CutWaiter {
    answer: Answer,
    deadline: Instant,
    /// Number that must be committed; `None` until the cut is made.
    number: Option<u64>,
    after: u64,
}

type WaitingFrame = (Bytes, Bytes, OwnedSemaphorePermit);

/// See the module's header.
pub struct Brain {
    parts: Parts,
    source: Option<Source>,
    target: Option<Target>,
    link: Option<Link>,
    frames: VecDeque<WaitingFrame>,
    cuts: Vec<CutWaiter>,
    conditions: Conditions,
    /// Fenced: what this side wrote alone.
    divergence: Option<Divergence>,
    /// A promotion that asked the source to seal first.
    taking_over: Option<TakingOver>,
    /// When the peer was heard last.
    last_heard: Instant,
    /// As a listener: the active side's folder and what it said of itself last.
    heard: Option<(Bytes, wire::Witness)>,
    /// As a listener: the folder of the side that dialled.
    dialler_site: Bytes,
    /// What a fenced peer said that it wrote alone.
    peer_divergence: PeerDivergence,
    /// Handover goal at the target: apply exactly up to this generation.
    apply_goal: Option<Generation>,
    terminating: bool,
    /// Set when the thread shall end, with the exit code.
    exit: Option<i32>,
    limits: Limits,
    /// How large the target's images are, bytes; empty while it is out of reach.
    peer_capacities: Vec<u64>,
    /// How large our disks could be when the last link was given up to say so; empty: it never was.
    said_capacities: Vec<u64>,
    /// What was set while running, by this worker or those before it.
    settings: Settings,
    next_report: Instant,
    next_beat: Instant,
    reconnects: u64,
    last_link_error: String,
    /// Generations given up so far, and how many had been committed at the last of them.
    given_up_before: u64,
    committed_before: u64,
    /// Guest writes may be slowed down so that a move converges.
    slow_down: bool,
    lag_before: u64,
    scheduled: Option<crate::throttle::Limit>,
    next_leave: Instant,
    /// The guest's latency while little is sent, and the share of the link that we take.
    idle_latency: Option<Duration>,
    share: f64,
    /// Bytes per second that the link carried when all of it was taken.
    whole_rate: f64,
    sent_before: u64,
    /// A fresh boot holds its guest until the peer has answered, or this time.
    confirm_until: Option<Instant>,
}

impl Brain {
    pub fn new(parts: Parts) -> Self {
        let limits = Limits {
            interval_millis: parts.config.interval.as_millis() as u64,
            preserve_bytes: parts.config.preserve.memory_bytes + parts.config.preserve.spill_bytes,
            paused: false,
        };
        Brain {
            settings: parts.settings.clone(),
            parts,
            source: None,
            target: None,
            link: None,
            frames: VecDeque::new(),
            cuts: Vec::new(),
            conditions: Conditions::default(),
            divergence: None,
            taking_over: None,
            last_heard: Instant::now(),
            heard: None,
            dialler_site: Bytes::new(),
            peer_divergence: PeerDivergence::default(),
            apply_goal: None,
            terminating: false,
            exit: None,
            limits,
            peer_capacities: Vec::new(),
            said_capacities: Vec::new(),
            next_report: Instant::now(),
            next_beat: Instant::now(),
            reconnects: 0,
            last_link_error: String::new(),
            given_up_before: 0,
            committed_before: 0,
            slow_down: false,
            lag_before: 0,
            scheduled: None,
            next_leave: Instant::now(),
            idle_latency: None,
            share: 1.0,
            whole_rate: 0.0,
            sent_before: 0,
            confirm_until: None,
        }
    }

    /// Run until the end; returns the exit code.
    pub fn run(mut self) -> i32 {
        self.configure(&self.settings.clone());
        self.take_up();
        loop {
            let mut handled = 0;
            match self.parts.inbox.recv_timeout(self.pause()) {
                Ok(event) => {
                    self.handle(event);
                    handled = 1;
                    while handled < EVENTS_PER_ROUND
                        && let Ok(event) = self.parts.inbox.try_recv()
                    {
                        self.handle(event);
                        handled += 1;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return 0,
            }
            self.duties(handled < EVENTS_PER_ROUND);
            self.tick();
            if let Some(code) = self.exit {
                return self.close(code);
            }
        }
    }

    /// How long the loop may sleep.
    fn pause(&self) -> Duration {
        if self.target.as_ref().is_some_and(Target::has_work) || !self.frames.is_empty() && self.target_has_room() {
            return Duration::ZERO;
        }
        let until = self.source.as_ref().map_or(u64::MAX, |s| s.wait_until_millis);
        TICK.min(Duration::from_millis(until.saturating_sub(unix_millis())))
    }

    fn target_has_room(&self) -> bool {
        self.target.as_ref().is_some_and(Target::has_room)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Intent(intent, answer) => self.intent(intent, answer),
            Event::GuestAttached => self.apply(handover::Event::GuestAttached),
            Event::GuestLeft(how) => {
                // A broken connection at the source may come back; only a goodbye says that its QEMU is gone.
                if how == watari_core::front::Detach::Clean || self.target.is_some() {
                    self.apply(handover::Event::GuestLeft);
                }
            }
            Event::GuestWantsWrite => {
                self.parts.signals.wants_write.store(false, SeqCst);
                // A request that was on its way when the right arrived asks for nothing any more.
                if self.parts.site.offered() {
                    self.apply(handover::Event::WantWrite { nonce: random_id() });
                }
            }
            Event::LinkOpened { link, peer, hello, control, data } => {
                self.link_opened(link, peer, &hello, control, data)
            }
            Event::LinkMessage(link, m) => {
                self.last_heard = Instant::now();
                self.link_message(link, *m);
            }
            Event::LinkClosed(link, reason) => self.link_closed(link, &reason),
            Event::DialFailed(reason) => self.last_link_error = reason,
            Event::Frame { header, payload, permit } => {
                self.last_heard = Instant::now();
                self.frames.push_back((header, payload, permit));
            }
            Event::Built { read, frames } => {
                if let Some(source) = &mut self.source {
                    source.built(unix_millis(), read, frames);
                }
            }
            Event::Verified { check, checked } => {
                if let Some(source) = &mut self.source {
                    source.verified(&check, checked);
                }
            }
            Event::DisksSynced(generation, result) => self.disks_synced(generation, result),
            Event::Wake => {}
            Event::Terminate => self.terminating = true,
        }
    }

    fn apply(&mut self, event: handover::Event) {
        self.follow_tracking();
        let actions = self.parts.site.apply(event);
        self.perform(actions);
    }

    /// The same; what the core refuses, if it does.
    fn apply_or_refuse(&mut self, event: handover::Event) -> Result<(), &'static str> {
        self.follow_tracking();
        let actions = self.parts.site.apply(event);
        let refusal = actions.iter().find_map(|a| if let Action::Refuse(why) = a { Some(*why) } else { None });
        self.perform(actions);
        refusal.map_or(Ok(()), Err)
    }

    /// The table refuses to seal for a side that is Untracked or a pass-through (design §3.5): it must know.
    fn follow_tracking(&mut self) {
        let untracked = self.source.is_some() && self.parts.shared.untracked();
        if self.parts.site.record().untracked != untracked {
            let action = self.parts.site.amend(|r| r.untracked = untracked);
            self.perform(vec![action]);
        }
    }

    /// Do what the core says, in its order.
    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Persist(record) => {
                    if let (Role::Fenced { by }, None) = (&record.role, &self.divergence) {
                        self.list_divergence(&record, by.counter);
                    }
                    if let Err(error) = self.parts.slot.write(&mut self.parts.meta, &record.encode()) {
                        // Nothing that follows may happen; the next start reads what is durable.
                        tracing::error!(%error, "the role record cannot be written: the worker starts over");
                        std::process::exit(super::EXIT_RECORD);
                    }
                    tracing::info!(
                        role = record.role.name(),
                        epoch = record.epoch.counter,
                        floor = record.floor,
                        "role"
                    );
                    if let Some(source) = &mut self.source {
                        source.raise_epoch(record.epoch.counter);
                    }
                    if let Some(target) = &mut self.target
                        && let Err(error) = target.raise_floor(record.floor)
                    {
                        tracing::warn!(%error, "the replica does not take the new floor");
                    }
                    self.dial();
                }
                Action::Send(m) => self.send(&m),
                Action::Gate(gate) => self.set_gate(gate),
                Action::Converge(pace) => {
                    if let Some(s) = &mut self.source {
                        s.primary.converge(pace);
                    }
                }
                Action::SealAndSend => {
                    self.parts.shared.tracker.seal();
                    if let Some(s) = &mut self.source {
                        s.primary.seal(true);
                    }
                }
                Action::Unseal => {
                    self.parts.shared.tracker.unseal();
                    if let Some(s) = &mut self.source {
                        s.primary.seal(false);
                    }
                }
                Action::SyncDisks => {
                    self.drain();
                    for disk in self.parts.disks.iter() {
                        if let Err(errno) = disk.local().file().flush() {
                            tracing::error!(
                                ?errno,
                                "fdatasync of a disk failed before a release: the worker starts over"
                            );
                            std::process::exit(super::EXIT_RECORD);
                        }
                    }
                }
                Action::ApplyUpTo(generation) => self.apply_goal = Some(generation),
                Action::RollTo(generation) => self.roll_to(generation),
                Action::BecomeSource { base } => self.become_source(base, Baseline::Marks),
                Action::BecomeReplica { generation } => self.become_replica(generation),
                Action::Refuse(why) => self.conditions.refused(why),
                Action::Report(condition) => self.conditions.handover(condition),
            }
        }
        self.parts.signals.offered.store(self.parts.site.offered(), SeqCst);
        self.parts.signals.attachable.store(self.parts.site.attachable(), SeqCst);
    }

    /// Wait for the writes that passed the gate before it closed. They are on their way to a local disk.
    fn drain(&self) {
        let began = Instant::now();
        while self.parts.shared.tracker.writes_in_flight() > 0 {
            if began.elapsed() > DRAIN_WAIT {
                tracing::error!("writes of a fenced guest do not end: the worker starts over");
                std::process::exit(super::EXIT_RECORD);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn set_gate(&self, gate: Gate) {
        if gate == Gate::Dead {
            // A write that is past the gate and not admitted yet must not be.
            self.parts.shared.tracker.seal();
        }
        for disk in self.parts.disks.iter() {
            disk.set_gate(gate);
        }
        if gate == Gate::Dead {
            self.parts.connections.condemn();
        }
    }

    fn send(&self, m: &Message) {
        if let Some(link) = &self.link {
            // A closed link is reported by itself; what matters is repeated at the next one.
            let _ = link.control.send(message(Body::Handover(convert::handover(m))));
        }
    }

    fn dial(&self) {
        let role = &self.parts.site.record().role;
        let wanted = role.is_active_side() && !matches!(role, Role::Promoting { .. });
        self.parts.dial.send_if_modified(|now| std::mem::replace(now, wanted) != wanted);
        self.refresh_hello();
    }

    fn disks_synced(&mut self, generation: Generation, result: Result<(), String>) {
        let Some(source) = &mut self.source else { return };
        match result {
            Ok(()) => {
                if !source.primary.awaits_sync(generation) {
                    // The commit went with the target's folder while the sync was under way.
                    return;
                }
                // Durable before anything of it is forgotten: a source that starts anew must know a target's folder that is
                // older than this (watari-sim seed 14016).
                let action = self.parts.site.amend(|r| r.base = generation);
                self.perform(vec![action]);
                let Some(source) = &mut self.source else { return };
                source.disks_synced(generation);
                let base = source.primary.base();
                if let Some(link) = &mut self.link
                    && !link.same_history
                {
                    link.same_history = true;
                    let baseline = wire::Baseline {
                        generation: Some(convert::wire_generation(base)),
                        identity: convert::bytes(&self.parts.site.record().identity),
                    };
                    let _ = link.control.send(message(Body::Baseline(baseline)));
                }
            }
            Err(error) => {
                // I5: without a sync nothing is forgotten, and a failed sync is never repeated.
                self.conditions.set(
                    "SourceDiskFailed",
                    "SyncFailed",
                    &error,
                    "check the disk; the VM's own writes report errors to it",
                );
            }
        }
    }

    // ---- duties

    fn duties(&mut self, idle: bool) {
        self.source_duty();
        self.target_duty(idle);
    }

    fn source_duty(&mut self) {
        let Some(source) = &mut self.source else { return };
        match source.pump(unix_millis()) {
            Asked::Nothing => {}
            Asked::Numbers => {
                let until = GenerationNumber(source.primary.next_number().0 + NUMBERS_RESERVED);
                let base = source.primary.base();
                let action = self.parts.site.amend(|r| {
                    r.numbers_reserved = until;
                    r.base = base;
                });
                self.perform(vec![action]);
                if let Some(source) = &mut self.source {
                    source.reserved(until);
                }
                (self.parts.post)(Event::Wake);
            }
            Asked::Remainder(generation) => self.apply(handover::Event::RemainderSent { generation }),
        }
        self.answer_cuts();
    }

    fn target_duty(&mut self, idle: bool) {
        let Some(target) = &mut self.target else {
            self.frames.clear();
            return;
        };
        while target.has_room()
            && let Some((header, payload, _)) = self.frames.front()
        {
            if !target.frame(header, payload) {
                break;
            }
            self.frames.pop_front();
        }
        let mut out: Vec<Body> = target.sync(idle).into_iter().collect();
        if target.waits_for_frames() {
            out.extend(target.try_commit());
        }
        target.work();
        out.extend(target.news());
        if let Some(link) = &self.link {
            for body in out {
                let _ = link.control.send(message(body));
            }
        }
        if let Some(goal) = self.apply_goal
            && self.target.as_ref().is_some_and(|t| t.committed() == goal && t.applied() == goal)
        {
            self.apply_goal = None;
            let activation = watari_core::geometry::ActivationId(random_id());
            self.apply(handover::Event::Applied { generation: goal, activation });
        }
    }

    fn tick(&mut self) {
        let now = Instant::now();
        for disk in self.parts.disks.iter() {
            disk.expire(now);
        }
        self.confirm_late(now);
        self.take_over_or_promote(now);
        if now >= self.next_beat {
            self.next_beat = now + Duration::from_secs(1);
            self.beat();
            self.follow_schedule();
            self.give_way();
            self.choose_level();
            self.slow_down();
            self.leave_untracked(now);
            self.forget_cold_regions(now);
            self.verify();
            self.grow();
        }
        if now >= self.next_report {
            self.next_report = now + Duration::from_millis(100);
            self.make_report();
        }
        if self.terminating && self.exit.is_none() && self.parts.connections.count() == 0 {
            self.exit = Some(0);
        }
    }

    /// A clean end: what is staged is synced, the proof for the next start is written.
    fn close(mut self, code: i32) -> i32 {
        if let Some(target) = &mut self.target {
            let _ = target.sync(true);
        }
        super::start::record_clean_stop(&self.parts);
        self.make_report();
        code
    }

    fn refresh_hello(&self) {
        let hello = self.our_hello(Vec::new());
        *self.parts.hello.lock().unwrap_or_else(PoisonError::into_inner) = hello;
    }
}

const _: () = assert!(limits::DISKS_MAX <= 1 << 15, "connection numbers carry the disk in their top bits");
