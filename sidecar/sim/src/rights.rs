//! Who may write, exhaustively: two sites, a network that loses, repeats and reorders, crashes between any two actions,
//! and operators and people who decide what they like. The transition function is [`Site::apply`] itself; nothing of
//! the table is written a second time here.
//!
//! Disks are abstracted to the set of writes that they hold, one bit each; a generation is such a set. What is left out:
//! blocks, frames, application in steps (the simulator has them), and time.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    hash::{Hash, Hasher},
};

use watari_core::{
    geometry::{ActivationId, Epoch, Generation, GenerationNumber},
    handover::{Action, Event, Gate, Message, Peer, Site},
    record::{Role, RoleRecord},
};

use crate::process::peer_of;

/// How far the environment may go.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub writes: u8,
    pub handovers: u8,
    pub promotions: u8,
    pub reclaims: u8,
    pub crashes: u8,
    /// Messages under way in each direction.
    pub messages: usize,
}

/// What a living process has beside its durable record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Life {
    pub site: Site,
    /// Actions that are still to be performed, in order. A crash loses them.
    pub todo: VecDeque<Action>,
    pub gate: Gate,
    /// No write is admitted, and whether the remainder is to be sent.
    pub sealed: bool,
    pub sealing: bool,
    pub goal: Option<Generation>,
    pub rolling: Option<Generation>,
}

/// One site.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Side {
    pub durable: RoleRecord,
    pub life: Option<Life>,
    /// Writes that its disks hold.
    pub content: u8,
    /// Generations committed here, oldest first.
    pub kept: Vec<Generation>,
    pub lives: u8,
}

/// The whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct State {
    pub sides: [Side; 2],
    /// Messages on their way to each side.
    pub net: [Vec<Message>; 2],
    /// What each generation holds.
    pub generations: Vec<(Generation, u8)>,
    /// Who wrote in which epoch.
    pub writers: Vec<(Epoch, usize)>,
    /// Epoch counters that began with a person's decision against a side that could not be asked.
    pub unfenced: Vec<u64>,
    pub used: [u8; 5],
    pub bad: Option<&'static str>,
}

const WRITES: usize = 0;
const HANDOVERS: usize = 1;
const PROMOTIONS: usize = 2;
const RECLAIMS: usize = 3;
const CRASHES: usize = 4;

/// What may happen next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Move {
    /// The next action of a list is performed.
    Perform(usize),
    Write(usize),
    Replicate(usize),
    Drain(usize),
    Applied(usize),
    Rolled(usize),
    Meet(usize),
    Part(usize),
    Deliver {
        to: usize,
        which: usize,
        again: bool,
    },
    Lose {
        to: usize,
        which: usize,
    },
    Open(usize),
    Attach(usize),
    WantWrite(usize),
    Void(usize),
    TakeOver(usize),
    Promote(usize, usize),
    Reclaim(usize),
    Accept(usize),
    Crash(usize),
    Restart(usize),
}

impl Move {
    /// Not a fault, and no decision of a person that only a person may take.
    pub fn is_duty(self) -> bool {
        !matches!(self, Move::Part(_) | Move::Lose { .. } | Move::Crash(_) | Move::Open(_) | Move::Write(_))
    }
}

struct Into<'a, H>(&'a mut H);

impl<H: Hasher> std::fmt::Write for Into<'_, H> {
    fn write_str(&mut self, s: &str) -> std::fmt::Result {
        self.0.write(s.as_bytes());
        Ok(())
    }
}

impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        // The core's types have no `Hash`; their words do.
        for side in &self.sides {
            hasher.write(&side.durable.encode());
            let _ = write!(Into(hasher), "{:?}", side.life);
            (side.content, side.lives, &side.kept).hash(hasher);
        }
        (&self.net, &self.generations, &self.writers, &self.unfenced, self.used, self.bad).hash(hasher);
    }
}

fn record(index: usize) -> RoleRecord {
    let epoch = Epoch { counter: 1, activation: ActivationId([1; 16]) };
    RoleRecord {
        pair: [7; 16],
        site: [index as u8; 16],
        identity: [3; 16],
        starts: 1,
        epoch,
        floor: 1,
        role: if index == 0 { Role::Serving } else { Role::Replica },
        base: Generation { epoch: 1, number: GenerationNumber(1) },
        numbers_reserved: GenerationNumber(2),
        unfenced: false,
        untracked: false,
        disks: Vec::new(),
    }
}

impl Default for State {
    fn default() -> Self {
        let base = Generation { epoch: 1, number: GenerationNumber(1) };
        let side = |index| {
            let kept = if index == 0 { Vec::new() } else { vec![base] };
            let mut side = Side { durable: record(index), life: None, content: 0, kept, lives: 0 };
            side.start();
            side
        };
        State {
            sides: [side(0), side(1)],
            net: Default::default(),
            generations: vec![(base, 0)],
            writers: Vec::new(),
            unfenced: Vec::new(),
            used: [0; 5],
            bad: None,
        }
    }
}

impl Side {
    fn start(&mut self) {
        self.lives += 1;
        let mut site = Site::new(self.durable.clone(), u64::from(self.lives));
        let gate = site.gate();
        let todo = site.resume().into();
        self.life = Some(Life { site, todo, gate, sealed: false, sealing: false, goal: None, rolling: None });
    }

    /// A living process that is not in the middle of something.
    fn idle(&self) -> Option<&Life> {
        self.life.as_ref().filter(|l| l.todo.is_empty())
    }

    fn serves(&self) -> bool {
        let served = |l: &Life| l.gate == Gate::Serve && !l.sealed && l.site.record().role.accepts_writes();
        self.life.as_ref().is_some_and(served)
    }
}

impl State {
    fn id(&self, s: usize) -> [u8; 16] {
        let mut id = [0; 16];
        let counter = self.sides[s].life.as_ref().map_or(0, |l| l.site.record().epoch.counter);
        (id[0], id[1], id[2]) = (s as u8 + 1, self.sides[s].lives, counter as u8);
        id
    }

    fn content_of(&self, generation: Generation) -> Option<u8> {
        self.generations.iter().find(|(g, _)| *g == generation).map(|(_, c)| *c)
    }

    /// The target of a source, if it takes frames in the source's epoch.
    fn receiver(&self, s: usize) -> Option<usize> {
        let (source, target) = (self.sides[s].idle()?, self.sides[1 - s].idle()?);
        let (a, b) = (source.site.record(), target.site.record());
        (b.role.receives() && a.epoch == b.epoch).then_some(1 - s)
    }

    /// Everything that may happen now.
    pub fn moves(&self, bounds: &Bounds, out: &mut Vec<Move>) {
        let left = |what: usize, bound: u8| self.used[what] < bound;
        for s in 0..2 {
            let Some(life) = &self.sides[s].life else {
                out.push(Move::Restart(s));
                continue;
            };
            if left(CRASHES, bounds.crashes) {
                out.push(Move::Crash(s));
            }
            if self.sides[s].serves() && left(WRITES, bounds.writes) {
                out.push(Move::Write(s));
            }
            if !life.todo.is_empty() {
                out.push(Move::Perform(s));
                continue;
            }
            let role = &life.site.record().role;
            if let Some(t) = self.receiver(s) {
                let newest = self.sides[t].kept.last().and_then(|g| self.content_of(*g));
                if role.accepts_writes() && newest != Some(self.sides[s].content) {
                    out.push(Move::Replicate(s));
                }
                if life.sealing {
                    out.push(Move::Drain(s));
                }
            }
            if life.goal.is_some() && life.goal == self.sides[s].kept.last().copied() {
                out.push(Move::Applied(s));
            }
            if life.rolling.is_some() {
                out.push(Move::Rolled(s));
            }
            if self.sides[1 - s].life.is_some() {
                out.push(Move::Meet(s));
            }
            out.push(Move::Part(s));
            for which in 0..self.net[s].len() {
                out.push(Move::Deliver { to: s, which, again: false });
                out.push(Move::Deliver { to: s, which, again: true });
                out.push(Move::Lose { to: s, which });
            }
            self.decisions(s, life, bounds, out);
        }
    }

    fn decisions(&self, s: usize, life: &Life, bounds: &Bounds, out: &mut Vec<Move>) {
        let left = |what: usize, bound: u8| self.used[what] < bound;
        match life.site.record().role {
            Role::Serving | Role::HandoverOpen { .. } | Role::Sealed { .. } => {
                if left(HANDOVERS, bounds.handovers) && matches!(life.site.record().role, Role::Serving) {
                    out.push(Move::Open(s));
                }
                if left(RECLAIMS, bounds.reclaims) {
                    out.push(Move::Reclaim(s));
                }
            }
            Role::Replica | Role::Voided { .. } => {
                if life.site.offered() {
                    out.extend([Move::Attach(s), Move::WantWrite(s)]);
                }
                out.push(Move::Void(s));
                if left(PROMOTIONS, bounds.promotions) {
                    out.push(Move::TakeOver(s));
                    out.extend((0..self.sides[s].kept.len()).map(|which| Move::Promote(s, which)));
                }
            }
            Role::Fenced { .. } => out.push(Move::Accept(s)),
            Role::Released { .. } | Role::Promoting { .. } => {}
        }
    }

    fn apply(&mut self, s: usize, event: Event) {
        if let Some(life) = &mut self.sides[s].life {
            life.todo = life.site.apply(event).into();
        }
    }

    /// What a move leads to; `None`: nothing that can be seen.
    pub fn after(&self, made: Move, bounds: &Bounds) -> Option<State> {
        let mut next = self.clone();
        next.make(made, bounds);
        next.judge();
        (next != *self).then_some(next)
    }

    fn make(&mut self, made: Move, bounds: &Bounds) {
        match made {
            Move::Perform(s) => self.perform(s, bounds),
            Move::Write(s) => self.write(s),
            Move::Replicate(s) => {
                self.transfer(s);
            }
            Move::Drain(s) => {
                let generation = self.transfer(s);
                if let Some(life) = &mut self.sides[s].life {
                    life.sealing = false;
                }
                self.apply(s, Event::RemainderSent { generation });
            }
            Move::Applied(s) => {
                let generation = self.sides[s].life.as_mut().and_then(|l| l.goal.take()).unwrap_or_default();
                let activation = ActivationId(self.id(s));
                self.apply(s, Event::Applied { generation, activation });
            }
            Move::Rolled(s) => {
                let generation = self.sides[s].life.as_mut().and_then(|l| l.rolling.take()).unwrap_or_default();
                if let Some(content) = self.content_of(generation) {
                    self.sides[s].content = content;
                }
                let activation = ActivationId(self.id(s));
                self.apply(s, Event::Rolled { activation });
                self.note_unfenced(s);
            }
            Move::Meet(s) => {
                let peer = self.peer(1 - s);
                let activation = ActivationId(self.id(s));
                self.apply(s, Event::Met { peer, activation });
            }
            Move::Part(s) => self.apply(s, Event::Parted),
            Move::Deliver { to, which, again } => {
                let message = if again { self.net[to][which].clone() } else { self.net[to].remove(which) };
                let activation = ActivationId(self.id(to));
                self.apply(to, Event::Received(message, activation));
            }
            Move::Lose { to, which } => {
                self.net[to].remove(which);
            }
            Move::Open(s) => {
                self.used[HANDOVERS] += 1;
                let handover = [self.used[HANDOVERS]; 16];
                self.apply(s, Event::OpenHandover { handover });
            }
            Move::Attach(s) => self.apply(s, Event::GuestAttached),
            Move::WantWrite(s) => {
                let nonce = self.id(s);
                self.apply(s, Event::WantWrite { nonce });
            }
            Move::Void(s) => {
                let activation = ActivationId(self.id(s));
                self.apply(s, Event::WantVoid { activation });
            }
            Move::TakeOver(s) => {
                self.used[PROMOTIONS] += 1;
                let (handover, nonce) = ([0x40 | self.used[PROMOTIONS]; 16], self.id(s));
                self.apply(s, Event::TakeOver { handover, nonce });
            }
            Move::Promote(s, which) => {
                self.used[PROMOTIONS] += 1;
                let generation = self.sides[s].kept[which];
                self.apply(s, Event::Promote { generation });
            }
            Move::Reclaim(s) => {
                self.used[RECLAIMS] += 1;
                let activation = ActivationId(self.id(s));
                self.apply(s, Event::Reclaim { activation });
                self.note_unfenced(s);
            }
            Move::Accept(s) => self.apply(s, Event::AcceptDivergence),
            Move::Crash(s) => {
                self.used[CRASHES] += 1;
                self.sides[s].life = None;
            }
            Move::Restart(s) => self.sides[s].start(),
        }
    }

    fn note_unfenced(&mut self, s: usize) {
        if let Some(life) = &self.sides[s].life {
            self.unfenced.push(life.site.record().epoch.counter);
        }
    }

    fn peer(&self, s: usize) -> Peer {
        let side = &self.sides[s];
        // What is told is durable: a Hello is made between lists of actions, never within one.
        let record = &side.durable;
        let committed = side.kept.last().copied().filter(|_| record.role.receives()).unwrap_or(record.base);
        peer_of(record, committed)
    }

    /// A guest's write is acknowledged.
    fn write(&mut self, s: usize) {
        let Some(life) = &self.sides[s].life else { return };
        let epoch = life.site.record().epoch;
        self.sides[s].content |= 1 << self.used[WRITES];
        self.used[WRITES] += 1;
        match self.writers.iter().find(|(e, _)| *e == epoch) {
            Some((_, writer)) if *writer != s => self.bad = Some("two writers in one epoch"),
            Some(_) => {}
            None => self.writers.push((epoch, s)),
        }
    }

    /// The target commits what the source holds; the generation that it is then at.
    fn transfer(&mut self, s: usize) -> Generation {
        let (t, content) = (1 - s, self.sides[s].content);
        if let Some(newest) = self.sides[t].kept.last().copied()
            && self.content_of(newest) == Some(content)
        {
            return newest;
        }
        let epoch = self.sides[s].life.as_ref().map_or(0, |l| l.site.record().epoch.counter);
        let number = self.generations.iter().map(|(g, _)| g.number.0).max().unwrap_or(0) + 1;
        let generation = Generation { epoch, number: GenerationNumber(number) };
        self.generations.push((generation, content));
        self.sides[t].kept.push(generation);
        self.sides[t].content = content;
        generation
    }

    fn perform(&mut self, s: usize, bounds: &Bounds) {
        let Some(action) = self.sides[s].life.as_mut().and_then(|l| l.todo.pop_front()) else { return };
        let Some(life) = &mut self.sides[s].life else { return };
        match action {
            Action::Persist(record) => self.sides[s].durable = record,
            Action::Send(message) => {
                let queue = &mut self.net[1 - s];
                if queue.len() < bounds.messages && !queue.contains(&message) {
                    queue.push(message);
                }
            }
            Action::Gate(gate) => {
                life.sealed |= gate == Gate::Dead;
                life.gate = gate;
            }
            Action::SealAndSend => (life.sealed, life.sealing) = (true, true),
            Action::Unseal => (life.sealed, life.sealing) = (false, false),
            Action::ApplyUpTo(generation) => life.goal = Some(generation),
            Action::RollTo(generation) => life.rolling = Some(generation),
            Action::BecomeSource { base } => {
                (life.sealed, life.sealing) = (false, false);
                if let Some(base) = base {
                    self.became_source(s, base);
                }
            }
            Action::BecomeReplica { generation } => self.became_replica(s, generation),
            Action::Converge(_) | Action::SyncDisks | Action::Refuse(_) | Action::Report(_) => {}
        }
    }

    fn became_source(&mut self, s: usize, base: Generation) {
        let content = self.sides[s].content;
        if self.content_of(base) != Some(content) {
            self.bad = Some("a new active side does not hold the generation that it begins from");
        }
        if self.unfenced.is_empty() && content != self.sides[1 - s].content {
            self.bad = Some("a planned move lost an acknowledged write");
        }
        self.sides[s].kept.clear();
    }

    fn became_replica(&mut self, s: usize, generation: Generation) {
        let content = self.sides[s].content;
        match self.content_of(generation) {
            Some(known) if known != content => self.bad = Some("disks become a generation that they do not hold"),
            Some(_) => {}
            None => self.generations.push((generation, content)),
        }
        self.sides[s].kept = vec![generation];
        if let Some(life) = &mut self.sides[s].life {
            let more = life.site.apply(Event::Adopted);
            more.into_iter().rev().for_each(|a| life.todo.push_front(a));
        }
    }

    /// What must hold in every state.
    fn judge(&mut self) {
        let epoch = |side: &Side| side.life.as_ref().map(|l| l.site.record().epoch);
        if self.sides.iter().all(Side::serves) {
            let counters: Vec<Epoch> = self.sides.iter().filter_map(epoch).collect();
            let higher = counters.iter().map(|e| e.counter).max().unwrap_or(0);
            if counters[0] == counters[1] || !self.unfenced.contains(&higher) {
                self.bad = Some("two sides serve and no person decided so");
            }
        }
        let fenced = |side: &Side| matches!(side.durable.role, Role::Fenced { .. });
        let decided = self.used[PROMOTIONS] + self.used[RECLAIMS] > 0;
        if !decided && self.sides.iter().any(fenced) {
            self.bad = Some("a side is fenced and nobody was ever promoted");
        }
    }

    /// One side serves and the other receives, in one epoch.
    pub fn settled(&self) -> bool {
        let role = |s: usize| self.sides[s].idle().map(|l| l.site.record());
        (0..2).any(|s| match (role(s), role(1 - s)) {
            (Some(a), Some(b)) => a.role == Role::Serving && b.role == Role::Replica && a.epoch == b.epoch,
            _ => false,
        })
    }
}
