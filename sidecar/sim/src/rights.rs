//! Who may write, exhaustively: two sites, a network that loses, repeats and reorders, crashes between any two actions,
//! and operators and people who decide what they like. The transition function is [`Site::apply`] itself; nothing of
//! the table is written a second time here.
//!
//! Disks are abstracted to the set of writes that they hold, one bit each: every write is a block of its own, and none is
//! lost under another. A generation is such a set. What is left out: frames, application in steps, what was read before
//! it is overwritten (the simulator has them), time, and the QEMU that attaches and leaves, of which the table only tells
//! the other side, which changes its pace.
//!
//! What makes the states few enough to visit all of them, without leaving out a behaviour:
//!
//! - *One side acts at a time.* An action changes its own side or adds a message for the other; both can as well happen
//!   before or after whatever the other side does. So a list of actions runs to its end ([`State::perform`]); it halts only
//!   where a crash would leave something else than a crash before the list or a lost message: before a record that is
//!   not the first thing done.
//! - *Nothing is lost by delivering it never.* A message stays where it is, may be delivered any number of times and in
//!   any order, and goes only when there is no room: then any may go, also the new one.
//! - *Names are reused when nobody knows them.* A life's session is the smallest that no record and no message names.
//! - *What cannot matter any more is forgotten*: who wrote when there are no writes left, older generations and whether
//!   the peer is within reach when there are no promotions left.

use std::{
    collections::VecDeque,
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
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Life {
    pub site: Site,
    pub session: u64,
    /// Actions that are still to be performed, in order. A crash loses them.
    pub todo: VecDeque<Action>,
    pub gate: Gate,
    /// No write is admitted, and whether the remainder is to be sent.
    pub sealed: bool,
    pub sealing: bool,
    /// What the shell works at until it reports back.
    pub goal: Option<Generation>,
    pub rolling: Option<Generation>,
    pub adopting: Option<Generation>,
}

/// One site.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Side {
    pub durable: RoleRecord,
    pub life: Option<Life>,
    /// Writes that its disks hold.
    pub content: u8,
    /// Generations committed here, oldest first.
    pub kept: Vec<Generation>,
    /// A person said that what this side holds beyond the other's history may be overwritten.
    pub consented: bool,
}

/// The whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct State {
    pub sides: [Side; 2],
    /// Messages on their way to each side; their order says nothing.
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
    /// A list of actions that halted goes on.
    Perform(usize),
    /// No room for the message that is to be sent: this one makes room, or the new one is lost.
    Displace {
        from: usize,
        which: Option<usize>,
    },
    Write(usize),
    Replicate(usize),
    Drain(usize),
    Applied(usize),
    Rolled(usize),
    Adopted(usize),
    Meet(usize),
    Part(usize),
    Deliver {
        to: usize,
        which: usize,
    },
    Open(usize),
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
        !matches!(self, Move::Part(_) | Move::Crash(_) | Move::Open(_) | Move::Write(_))
    }
}

impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        (&self.sides, &self.generations, &self.writers, &self.unfenced, self.used, self.bad).hash(hasher);
        for queue in &self.net {
            // In any order.
            let one = |m: &Message| {
                let mut hasher = std::hash::DefaultHasher::new();
                m.hash(&mut hasher);
                hasher.finish()
            };
            (queue.len(), queue.iter().map(one).fold(0, u64::wrapping_add)).hash(hasher);
        }
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
            Side { durable: record(index), life: None, content: 0, kept, consented: false }
        };
        let mut state = State {
            sides: [side(0), side(1)],
            net: Default::default(),
            generations: vec![(base, 0)],
            writers: Vec::new(),
            unfenced: Vec::new(),
            used: [0; 5],
            bad: None,
        };
        let nothing = Bounds { writes: 0, handovers: 0, promotions: 0, reclaims: 0, crashes: 0, messages: 1 };
        (0..2).for_each(|s| state.start(s, &nothing));
        state
    }
}

impl Side {
    /// A living process that is not in the middle of something.
    fn idle(&self) -> Option<&Life> {
        self.life.as_ref().filter(|l| l.todo.is_empty())
    }

    /// Guest writes are admitted: that is for gate and tracker to say, whatever the role.
    fn serves(&self) -> bool {
        self.life.as_ref().is_some_and(|l| l.gate == Gate::Serve && !l.sealed)
    }
}

/// The session that a message names.
fn session_of(message: &Message) -> Option<u64> {
    match message {
        Message::Acquire { session, .. } | Message::TakeOver { session, .. } | Message::Grant { session, .. } => {
            Some(*session)
        }
        _ => None,
    }
}

impl State {
    fn start(&mut self, s: usize, bounds: &Bounds) {
        let other = &self.sides[1 - s];
        let sealed_for = |record: &RoleRecord| match record.role {
            Role::Sealed { session, .. } => Some(session),
            _ => None,
        };
        let records =
            [Some(&other.durable), other.life.as_ref().map(|l| l.site.record()), Some(&self.sides[s].durable)];
        let mut known: Vec<u64> = records.into_iter().flatten().filter_map(sealed_for).collect();
        known.extend(self.net.iter().flatten().filter_map(session_of));
        let session = (1..).find(|n| !known.contains(n)).unwrap_or_default();
        let mut site = Site::new(self.sides[s].durable.clone(), session);
        let gate = site.gate();
        let todo = site.resume().into();
        self.sides[s].life = Some(Life {
            site,
            session,
            todo,
            gate,
            sealed: false,
            sealing: false,
            goal: None,
            rolling: None,
            adopting: None,
        });
        self.perform(s, true, bounds);
    }

    /// A name that nobody else gives in this epoch.
    fn id(&self, s: usize) -> [u8; 16] {
        let mut id = [0; 16];
        let life = self.sides[s].life.as_ref();
        let counter = life.map_or(0, |l| l.site.record().epoch.counter);
        (id[0], id[2]) = (s as u8 + 1, counter as u8);
        id
    }

    fn nonce(&self, s: usize) -> [u8; 16] {
        let mut id = self.id(s);
        id[1] = self.sides[s].life.as_ref().map_or(0, |l| l.session as u8);
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
        let busy = (0..2).find(|s| self.sides[*s].life.as_ref().is_some_and(|l| !l.todo.is_empty()));
        if let Some(s) = busy {
            match self.sides[s].life.as_ref().and_then(|l| l.todo.front()) {
                Some(Action::Send(_)) => {
                    let all = (0..self.net[1 - s].len()).map(Some).chain([None]);
                    out.extend(all.map(|which| Move::Displace { from: s, which }));
                }
                _ => {
                    out.push(Move::Perform(s));
                    if left(CRASHES, bounds.crashes) {
                        out.push(Move::Crash(s));
                    }
                }
            }
            return;
        }
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
            if life.adopting.is_some() {
                out.push(Move::Adopted(s));
            }
            if self.sides[1 - s].life.is_some() {
                out.push(Move::Meet(s));
            }
            if self.takes_over_later(bounds) {
                out.push(Move::Part(s));
            }
            out.extend((0..self.net[s].len()).map(|which| Move::Deliver { to: s, which }));
            self.decisions(s, life, bounds, out);
        }
    }

    /// Only then it matters whether the peer is within reach, and which generations are kept.
    fn takes_over_later(&self, bounds: &Bounds) -> bool {
        self.used[PROMOTIONS] < bounds.promotions
    }

    fn decisions(&self, s: usize, life: &Life, bounds: &Bounds, out: &mut Vec<Move>) {
        let left = |what: usize, bound: u8| self.used[what] < bound;
        match life.site.record().role {
            Role::Serving | Role::HandoverOpen { .. } | Role::Sealed { .. } => {
                if left(HANDOVERS, bounds.handovers) && matches!(life.site.record().role, Role::Serving) {
                    out.push(Move::Open(s));
                }
                if left(RECLAIMS, bounds.reclaims) || self.diverged() {
                    out.push(Move::Reclaim(s));
                }
            }
            Role::Replica | Role::Voided { .. } => {
                if life.site.offered() {
                    out.push(Move::WantWrite(s));
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

    /// Both sides raised one counter apart from each other. The condition asks a person to name one, as often as it is so.
    fn diverged(&self) -> bool {
        let active = self.sides.iter().all(|side| side.durable.role.is_active_side());
        let [a, b] = self.sides.each_ref().map(|side| side.durable.epoch);
        active && a.counter == b.counter && a.activation != b.activation
    }

    fn apply(&mut self, s: usize, event: Event, bounds: &Bounds) {
        if let Some(life) = &mut self.sides[s].life {
            life.todo = life.site.apply(event).into();
        }
        self.perform(s, true, bounds);
    }

    /// What a move leads to; `None`: nothing that can be seen.
    pub fn after(&self, made: Move, bounds: &Bounds) -> Option<State> {
        let mut next = self.clone();
        next.make(made, bounds);
        next.judge();
        next.forget(bounds);
        (next != *self).then_some(next)
    }

    fn make(&mut self, made: Move, bounds: &Bounds) {
        match made {
            Move::Perform(s) => self.perform(s, true, bounds),
            Move::Displace { from, which } => {
                if let (Some(which), Some(Action::Send(message))) =
                    (which, self.sides[from].life.as_mut().and_then(|l| l.todo.front().cloned()))
                {
                    self.net[1 - from][which] = message;
                }
                if let Some(life) = &mut self.sides[from].life {
                    life.todo.pop_front();
                }
                self.perform(from, false, bounds);
            }
            Move::Write(s) => self.write(s),
            Move::Replicate(s) => {
                self.transfer(s);
            }
            Move::Drain(s) => {
                let generation = self.transfer(s);
                if let Some(life) = &mut self.sides[s].life {
                    life.sealing = false;
                }
                self.apply(s, Event::RemainderSent { generation }, bounds);
            }
            Move::Applied(s) => {
                let generation = self.sides[s].life.as_mut().and_then(|l| l.goal.take()).unwrap_or_default();
                let activation = ActivationId(self.id(s));
                self.apply(s, Event::Applied { generation, activation }, bounds);
            }
            Move::Rolled(s) => {
                let generation = self.sides[s].life.as_mut().and_then(|l| l.rolling.take()).unwrap_or_default();
                if let Some(content) = self.content_of(generation) {
                    self.sides[s].content = content;
                }
                let activation = ActivationId(self.id(s));
                let actions = self.sides[s].life.as_mut().map(|l| l.site.apply(Event::Rolled { activation }));
                self.decided(s, actions, bounds);
            }
            Move::Adopted(s) => {
                let generation = self.sides[s].life.as_mut().and_then(|l| l.adopting.take()).unwrap_or_default();
                self.sides[s].kept = vec![generation];
                self.apply(s, Event::Adopted, bounds);
            }
            Move::Meet(s) => {
                let peer = self.peer(1 - s);
                let activation = ActivationId(self.id(s));
                self.apply(s, Event::Met { peer, activation }, bounds);
            }
            Move::Part(s) => self.apply(s, Event::Parted, bounds),
            Move::Deliver { to, which } => {
                let message = self.net[to][which].clone();
                let activation = ActivationId(self.id(to));
                self.apply(to, Event::Received(message, activation), bounds);
            }
            Move::Open(s) => {
                self.used[HANDOVERS] += 1;
                let handover = [self.used[HANDOVERS]; 16];
                self.apply(s, Event::OpenHandover { handover }, bounds);
            }
            Move::WantWrite(s) => {
                let nonce = self.nonce(s);
                self.apply(s, Event::WantWrite { nonce }, bounds);
            }
            Move::Void(s) => {
                let activation = ActivationId(self.id(s));
                self.apply(s, Event::WantVoid { activation }, bounds);
            }
            Move::TakeOver(s) => {
                self.used[PROMOTIONS] += 1;
                let (handover, nonce) = ([0x40 | self.used[PROMOTIONS]; 16], self.nonce(s));
                self.apply(s, Event::TakeOver { handover, nonce }, bounds);
            }
            Move::Promote(s, which) => {
                self.used[PROMOTIONS] += 1;
                let generation = self.sides[s].kept[which];
                self.apply(s, Event::Promote { generation }, bounds);
            }
            Move::Reclaim(s) => {
                self.used[RECLAIMS] += u8::from(!self.diverged());
                let activation = ActivationId(self.id(s));
                let actions = self.sides[s].life.as_mut().map(|l| l.site.apply(Event::Reclaim { activation }));
                self.decided(s, actions, bounds);
            }
            Move::Accept(s) => {
                self.sides[s].consented = true;
                self.apply(s, Event::AcceptDivergence, bounds);
            }
            Move::Crash(s) => {
                self.used[CRASHES] += 1;
                self.sides[s].life = None;
            }
            Move::Restart(s) => self.start(s, bounds),
        }
    }

    /// A person's decision raised the epoch of `s`, against a side that may not have been asked.
    fn decided(&mut self, s: usize, actions: Option<Vec<Action>>, bounds: &Bounds) {
        if let Some(life) = &mut self.sides[s].life {
            self.unfenced.push(life.site.record().epoch.counter);
            life.todo = actions.unwrap_or_default().into();
        }
        self.perform(s, true, bounds);
    }

    /// What no move asks for any more.
    fn forget(&mut self, bounds: &Bounds) {
        self.unfenced.sort_unstable();
        self.unfenced.dedup();
        self.writers.sort_unstable_by_key(|(e, s)| (e.counter, e.activation.0, *s));
        if self.used[WRITES] >= bounds.writes {
            self.writers.clear();
        }
        if !self.takes_over_later(bounds) {
            for side in &mut self.sides {
                let older = side.kept.len().saturating_sub(1);
                side.kept.drain(..older);
                if let Some(life) = side.life.as_mut().filter(|l| l.todo.is_empty()) {
                    let said = life.site.apply(Event::Parted);
                    assert!(said.is_empty(), "a link that ends asks for nothing");
                }
            }
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
        let record = life.site.record();
        if !record.role.accepts_writes() {
            self.bad = Some("a write is acknowledged by a side that may not write");
        }
        let epoch = record.epoch;
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
        let Some(life) = &mut self.sides[s].life else { return Generation::default() };
        let epoch = life.site.record().epoch.counter;
        let newest = self.generations.iter().map(|(g, _)| g.number.0).max().unwrap_or(0);
        let number = life.site.record().numbers_reserved.0.max(newest + 1);
        let generation = Generation { epoch, number: GenerationNumber(number) };
        // A number is reserved before it is used.
        let reserved = life.site.amend(|r| r.numbers_reserved = GenerationNumber(number + 1));
        if let Action::Persist(record) = reserved {
            self.sides[s].durable = record;
        }
        self.generations.push((generation, content));
        self.sides[t].kept.push(generation);
        self.sides[t].content = content;
        generation
    }

    /// Actions until the list ends, halts where a crash matters, or a message finds no room. `begins`: none of the list (or
    /// of what is left of it after a halt) was performed yet.
    fn perform(&mut self, s: usize, begins: bool, bounds: &Bounds) {
        let mut first = begins;
        while let Some(life) = &mut self.sides[s].life {
            match life.todo.front() {
                None => return,
                Some(Action::Persist(_)) if !first && self.used[CRASHES] < bounds.crashes => return,
                Some(Action::Send(message)) => {
                    let queue = &self.net[1 - s];
                    let full = queue.len() >= bounds.messages && !queue.contains(message);
                    if full && tells(message) {
                        return;
                    }
                }
                Some(_) => {}
            }
            let Some(action) = life.todo.pop_front() else { return };
            first &= matches!(action, Action::Converge(_) | Action::SyncDisks | Action::Refuse(_) | Action::Report(_));
            self.act(s, action);
        }
    }

    fn act(&mut self, s: usize, action: Action) {
        let Some(life) = &mut self.sides[s].life else { return };
        match action {
            Action::Persist(record) => self.sides[s].durable = record,
            Action::Send(message) => {
                let queue = &mut self.net[1 - s];
                if tells(&message) && !queue.contains(&message) {
                    queue.push(message);
                }
            }
            Action::Gate(gate) => {
                life.sealed |= gate == Gate::Dead;
                life.gate = gate;
                if gate == Gate::Serve && life.site.record() != &self.sides[s].durable {
                    self.bad = Some("a guest is served by a right that is not written");
                }
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
            Action::BecomeReplica { generation } => {
                life.adopting = Some(generation);
                self.became_replica(s, generation);
            }
            Action::Converge(_) | Action::SyncDisks | Action::Refuse(_) | Action::Report(_) => {}
        }
    }

    fn became_source(&mut self, s: usize, base: Generation) {
        let content = self.sides[s].content;
        let counter = self.sides[s].durable.epoch.counter;
        if self.content_of(base) != Some(content) {
            self.bad = Some("a new active side does not hold the generation that it begins from");
        }
        // What a person decided in this epoch or above overrules the other side's disks, or this activation.
        let decided = self.unfenced.iter().any(|c| *c >= counter);
        if !decided && content != self.sides[1 - s].content {
            self.bad = Some("a planned move lost an acknowledged write");
        }
        self.sides[s].kept.clear();
        self.sides[s].consented = false;
    }

    fn became_replica(&mut self, s: usize, generation: Generation) {
        let content = self.sides[s].content;
        match self.content_of(generation) {
            Some(known) if known != content => self.bad = Some("disks become a generation that they do not hold"),
            Some(_) => {}
            None => {
                self.generations.push((generation, content));
                if !self.sides[s].consented {
                    self.bad = Some("disks that nobody shares become a replica, and no person consented");
                }
            }
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

/// Whether a message tells the table anything: these three are for the shell, and the table only hears them
/// (`what_attaches_and_leaves_says_nothing_of_rights` in the tests).
fn tells(message: &Message) -> bool {
    !matches!(message, Message::Attached { .. } | Message::QemuLeft { .. } | Message::Released { .. })
}
