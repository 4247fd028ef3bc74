//! The whole: two machines, their guests, the network and the operator, advanced by one event at a time. Each event is
//! drawn from the history's seed and its own number, so that a history can be replayed with some of its events left out.
//!
//! Guests and QEMUs live here; what is inside a worker lives in [`crate::process`].

use std::collections::BTreeMap;

use watari_core::{
    handover::{Event, Gate},
    record::Role,
    storage::sim::SimRng,
};

use crate::{
    content::{Word, name, word},
    ctx::{Ctx, Liar, Setup},
    guest::{Active, Answer, Ask, Spec, words_read},
    intents::Intent,
    net::Arrival,
    node::Node,
    operator::Move,
};

/// A QEMU process.
#[derive(Debug)]
pub struct Qemu {
    pub id: u64,
    /// The guest executes.
    pub running: bool,
    /// It was started to receive a migration, and has not become the VM by an activation yet.
    pub incoming: bool,
    /// No new requests: a migration stops it.
    pub draining: bool,
    pub connected: bool,
    /// The connection must never be served again.
    pub condemned: bool,
    pub outstanding: BTreeMap<u64, (Spec, Vec<Word>)>,
}

/// See the module's header.
pub struct World {
    pub ctx: Ctx,
    pub nodes: [Node; 2],
    pub qemus: [Option<Qemu>; 2],
    pub moving: Option<Move>,
    /// What was asked of the sidecars, to be asked again.
    pub intents: Vec<Intent>,
    pub next_request: u64,
    pub step: u64,
    /// Faults may happen.
    pub faults: bool,
    pub faults_seen: u64,
}

type Act = (u64, fn(&mut World) -> bool);

/// Weights of events while things go wrong, and what they do. `false`: not possible now.
const EVENTS: &[Act] = &[
    (40, World::guest_submits),
    (90, World::guest_step),
    (50, World::reader_step),
    (60, World::source_step),
    (8, World::source_sync),
    (60, World::target_step),
    (90, World::arrives),
    (60, World::frame_arrives),
    (20, World::time_passes),
    (20, World::dials),
    (10, World::hangs_up_useless),
    (12, World::hears),
    (12, World::connects),
    (24, World::operates),
    (6, World::demands_cut),
    (8, World::restarts),
    (3, World::cuts_wire),
    (1, World::kills),
    (1, World::loses_power),
    (1, World::loses_power_soon),
    (1, World::partitions),
    (2, World::heals),
    (5, World::verifies),
    (1, World::much_time_passes),
    (1, World::clock_jumps),
    (1, World::pod_goes),
    (2, World::folder_is_copied),
    (1, World::folder_is_restored),
    (1, World::folder_is_lost),
    (2, World::foreign_hand_writes),
    (2, World::log_breaks),
    (3, World::log_works),
    (2, World::applies_old_intent),
];

impl World {
    pub fn new(setup: Setup, trace: bool) -> World {
        let rng = SimRng(setup.seed);
        let mut ctx = Ctx {
            setup,
            net: Default::default(),
            truth: Default::default(),
            cov: Default::default(),
            rng,
            now: 1_000,
            ahead: [10_000_000; 2],
            peace: false,
            trace: trace.then(Vec::new),
        };
        let filled = ctx.setup.filled;
        let nodes = [Node::new(0, &mut ctx, true), Node::new(1, &mut ctx, filled)];
        if ctx.setup.trouble.liar == Some(Liar::Syncs) {
            nodes[1].medium.lie_in("images");
        }
        nodes[1].medium.set_capacity(crate::target::FOLDER, ctx.setup.capacity);
        let mut world = World {
            ctx,
            nodes,
            qemus: [None, None],
            moving: None,
            intents: Vec::new(),
            next_request: 0,
            step: 0,
            faults: true,
            faults_seen: 0,
        };
        world.nodes.iter_mut().for_each(|n| n.start(&mut world.ctx));
        world.boot(0);
        world
    }

    /// One event of a history.
    pub fn advance(&mut self) {
        self.step += 1;
        let mut mix = SimRng(self.ctx.setup.seed ^ self.step.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        self.ctx.rng = SimRng(mix.next_u64());
        let total: u64 = EVENTS.iter().map(|(w, _)| w).sum();
        for _ in 0..12 {
            let mut at = self.ctx.rng.below(total);
            let event = EVENTS.iter().find(|(w, _)| {
                let here = at < *w;
                at = at.saturating_sub(*w);
                here
            });
            if event.is_some_and(|(_, act)| act(self)) {
                break;
            }
        }
        self.settle();
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.ctx.rng.one_in(n)
    }

    pub fn some_site(&mut self) -> usize {
        self.ctx.rng.below(2) as usize
    }

    pub fn note(&mut self, line: impl FnOnce() -> String) {
        let step = self.step;
        self.ctx.note(|| format!("{step}: {}", line()));
    }

    /// After each event: processes that must end do, lost power comes back, the truth learns who is what.
    pub fn settle(&mut self) {
        for s in 0..2 {
            if self.nodes[s].medium.is_off() {
                self.power_failed(s);
            }
            if self.nodes[s].process.as_ref().is_some_and(|p| p.dead) {
                self.process_gone(s);
            }
            self.nodes[s].learn_truth(&mut self.ctx);
            if let (Some(q), Some(p)) = (&mut self.qemus[s], &self.nodes[s].process) {
                q.condemned |= q.connected && (p.gate == Gate::Dead || p.condemned == Some(q.id));
            }
        }
        self.ctx.net.sweep();
        self.check_active_sides();
        self.check_fences();
    }

    /// A planned move never ends in a fence: that takes a promotion.
    fn check_fences(&self) {
        for n in &self.nodes {
            let fenced = n.process.as_ref().is_some_and(|p| matches!(p.role(), Role::Fenced { .. }));
            assert!(
                !fenced || !self.ctx.truth.unfenced.is_empty(),
                "site {} is fenced and nobody was ever promoted",
                n.index
            );
        }
    }

    /// I6: two sides serve only after a promotion that nobody could fence, and then in two epochs.
    fn check_active_sides(&mut self) {
        let serving = |n: &Node| {
            let p = n.process.as_ref()?;
            let record = p.site.record();
            (record.role.accepts_writes() && p.gate == Gate::Serve).then_some(record.epoch)
        };
        if let (Some(a), Some(b)) = (serving(&self.nodes[0]), serving(&self.nodes[1])) {
            assert!(a != b, "I6: both sides serve in epoch {a:?}");
            assert!(
                a.counter != b.counter || self.ctx.truth.reclaims > 0,
                "I6: both sides serve under counter {} and nobody reclaimed",
                a.counter
            );
            let higher = a.counter.max(b.counter);
            self.ctx.cov.hit(if a.counter == b.counter {
                "diverged: two sides serve under one counter"
            } else {
                "two sides serve in two epochs"
            });
            assert!(
                self.ctx.truth.unfenced.contains(&higher),
                "I6: both sides serve ({a:?} and {b:?}) and no person decided so"
            );
        }
    }

    // ---- the guest

    pub fn boot(&mut self, s: usize) {
        self.note(|| format!("a VM boots at site {s}"));
        self.next_request += 1;
        self.qemus[s] = Some(Qemu {
            id: self.next_request,
            running: true,
            incoming: false,
            draining: false,
            connected: false,
            condemned: false,
            outstanding: BTreeMap::new(),
        });
        self.connect(s);
    }

    /// QEMU connects (again) and sends what is outstanding.
    pub fn connect(&mut self, s: usize) -> bool {
        let Some(q) = self.qemus[s].as_mut().filter(|q| !q.connected && !q.condemned) else { return false };
        let Some(p) = self.nodes[s].process.as_mut().filter(|p| p.connection.is_none()) else { return false };
        match p.gate {
            // An incoming QEMU may be served only by the activation of its own handover; see `Qemu::incoming`.
            Gate::Serve | Gate::Hold if !q.incoming => {}
            Gate::Remote if q.incoming && p.offered => {}
            Gate::Serve | Gate::Hold | Gate::Remote | Gate::Dead => return false,
        }
        q.connected = true;
        p.connection = Some(q.id);
        p.requests.extend(q.outstanding.values().map(|(spec, _)| Active::new(spec.clone())));
        p.apply(&mut self.ctx, Event::GuestAttached);
        true
    }

    fn connects(&mut self) -> bool {
        let s = self.some_site();
        self.connect(s)
    }

    /// QEMU is gone, with a goodbye or without. Its held requests go with it; what is past the gate goes on.
    pub fn qemu_gone(&mut self, s: usize, clean: bool) {
        self.note(|| format!("the QEMU at site {s} is gone, clean: {clean}"));
        let Some(q) = self.qemus[s].take() else { return };
        let Some(p) = self.nodes[s].process.as_mut().filter(|_| q.connected) else { return };
        p.requests.retain(|a| !a.held());
        p.requests.iter_mut().for_each(|a| a.orphan = true);
        p.connection = None;
        if clean || p.target.is_some() {
            p.apply(&mut self.ctx, Event::GuestLeft);
        }
    }

    fn lineage(&self, s: usize) -> Option<usize> {
        [s, 1 - s].into_iter().find(|n| self.ctx.truth.live[*n].is_some())
    }

    fn guest_submits(&mut self) -> bool {
        let s = self.some_site();
        let rng = &mut self.ctx.rng;
        let disk = rng.below(self.ctx.setup.sizes.len() as u64) as usize;
        let sectors = self.ctx.setup.sizes[disk] / 512;
        // Half of the requests go to a few hot blocks, so that they meet each other.
        let sector = if rng.one_in(2) { rng.below(sectors.min(40)) } else { rng.below(sectors) };
        let n = (1 + if rng.one_in(3) { rng.below(60) } else { rng.below(9) }).min(sectors - sector);
        let idle = self.step >= self.ctx.setup.trouble.idle_from;
        let kind = if idle { 7 + rng.below(3) } else { rng.below(10) };
        let Some(q) = self.qemus[s].as_ref().filter(|q| q.running && !q.draining && !q.condemned) else { return false };
        if q.outstanding.len() >= 8 {
            return false;
        }
        let overlaps =
            |spec: &Spec| spec.disk == disk && spec.sector < sector + n && sector < spec.sector + spec.sectors();
        let id = self.ctx.truth.write_id();
        let ask = match kind {
            0..=5 => Ask::Write((sector..sector + n).map(|at| word(id, disk, at)).collect()),
            6 => Ask::Zero(n),
            7 | 8 => Ask::Read(n),
            _ => Ask::Flush,
        };
        let clash = match ask {
            Ask::Read(_) => q.outstanding.values().any(|(s, _)| s.effect().is_some() && overlaps(s)),
            _ => q.outstanding.values().any(|(s, _)| matches!(s.ask, Ask::Read(_)) && overlaps(s)),
        };
        if clash {
            return false;
        }
        self.submit(s, disk, sector, ask);
        true
    }

    pub fn submit(&mut self, s: usize, disk: usize, sector: u64, ask: Ask) {
        self.next_request += 1;
        let spec = Spec { id: self.next_request, disk, sector, ask };
        let expected = match (&spec.ask, self.lineage(s)) {
            (Ask::Read(n), Some(at)) => {
                let content = &self.ctx.truth.live[at].as_ref().expect("just found").content[disk];
                content[sector as usize..(sector + n) as usize].to_vec()
            }
            _ => Vec::new(),
        };
        if let Some(p) = self.nodes[s].process.as_mut().filter(|p| p.connection.is_some()) {
            p.requests.push(Active::new(spec.clone()));
        }
        if let Some(q) = &mut self.qemus[s] {
            q.outstanding.insert(spec.id, (spec, expected));
        }
    }

    fn guest_step(&mut self) -> bool {
        let s = self.some_site();
        let condemned = self.qemus[s].as_ref().is_some_and(|q| q.condemned);
        let Some(p) = &mut self.nodes[s].process else { return false };
        if p.requests.is_empty() || condemned {
            // A condemned connection gets EIO for good; what it had past the gate ends.
            if !condemned || p.requests.is_empty() {
                return false;
            }
            p.requests.retain(|a| !a.held());
        }
        let which = self.ctx.rng.below(p.requests.len().max(1) as u64) as usize;
        match p.request_step(&mut self.ctx, which) {
            None => false,
            Some(answer) => {
                if let Some(answer) = answer {
                    self.answered(s, answer);
                }
                true
            }
        }
    }

    /// Every request of a site's guest takes a step.
    pub fn guest_round(&mut self, s: usize) {
        let condemned = self.qemus[s].as_ref().is_some_and(|q| q.condemned);
        let Some(p) = &mut self.nodes[s].process else { return };
        if condemned {
            p.requests.retain(|a| !a.held());
        }
        for which in (0..p.requests.len()).rev() {
            let Some(p) = &mut self.nodes[s].process else { return };
            if let Some(Some(answer)) = p.request_step(&mut self.ctx, which) {
                self.answered(s, answer);
            }
        }
    }

    fn answered(&mut self, s: usize, answer: Answer) {
        if self.nodes[s].process.as_ref().is_none_or(|p| p.dead) {
            return;
        }
        let at = self.lineage(s);
        let Some(q) = &mut self.qemus[s] else { return };
        if answer.failed {
            // QEMU pauses (`werror=stop`, `rerror=stop`) and will send it again.
            let spec = q.outstanding.get(&answer.id).map(|(spec, _)| spec.clone());
            if let (Some(spec), Some(p), false) = (spec, &mut self.nodes[s].process, q.condemned) {
                p.requests.push(Active::new(spec));
            }
            return;
        }
        let Some((spec, expected)) = q.outstanding.remove(&answer.id) else { return };
        let Some(data) = answer.data.filter(|_| q.running && !expected.is_empty()) else { return };
        let live = at.and_then(|at| self.ctx.truth.live[at].as_ref());
        for (i, (found, right)) in words_read(&data).iter().zip(&expected).enumerate() {
            let sector = spec.sector + i as u64;
            let now = live.map(|l| l.content[spec.disk][sector as usize]);
            assert!(
                found == right || Some(*found) == now,
                "a guest at site {s} reads {} at disk {} sector {sector}, right is {}",
                name(*found),
                spec.disk,
                name(*right)
            );
        }
    }

    // ---- the workers

    pub fn worker(&mut self) -> Option<usize> {
        let s = self.some_site();
        self.nodes[s].process.is_some().then_some(s)
    }

    fn reader_step(&mut self) -> bool {
        let Some(s) = self.worker() else { return false };
        let Some(p) = &mut self.nodes[s].process else { return false };
        let jobs = p.source_jobs() as u64;
        let which = self.ctx.rng.below(jobs.max(1)) as usize;
        jobs > 0 && p.job_step(&mut self.ctx, which)
    }

    fn source_step(&mut self) -> bool {
        let Some(s) = self.worker() else { return false };
        self.nodes[s].process.as_mut().is_some_and(|p| p.source_step(&mut self.ctx))
    }

    fn source_sync(&mut self) -> bool {
        let Some(s) = self.worker() else { return false };
        self.nodes[s].process.as_mut().is_some_and(|p| p.source_sync(&mut self.ctx))
    }

    fn target_step(&mut self) -> bool {
        let Some(s) = self.worker() else { return false };
        let kind = [0, 0, 0, 0, 1, 2, 2, 3, 3, 3, 4][self.ctx.rng.below(11) as usize];
        let did = self.nodes[s].process.as_mut().is_some_and(|p| p.target_step(&mut self.ctx, kind));
        if did && self.ctx.rng.one_in(30) {
            self.check_kept(s);
        }
        did
    }

    pub fn check_kept(&mut self, s: usize) {
        if let Some(t) = self.nodes[s].process.as_mut().and_then(|p| p.target.as_mut()) {
            t.check_kept(&mut self.ctx);
        }
    }

    fn hears(&mut self) -> bool {
        let Some(s) = self.worker() else { return false };
        self.nodes[s].process.as_mut().is_some_and(|p| p.hear_want_write(&mut self.ctx))
    }

    fn demands_cut(&mut self) -> bool {
        let Some(s) = self.worker() else { return false };
        let source = self.nodes[s].process.as_mut().and_then(|p| p.source.as_mut());
        source.map(|s| s.primary.demand_cut()).is_some()
    }

    fn time_passes(&mut self) -> bool {
        self.ctx.now += 1 + self.ctx.rng.below(300);
        true
    }

    // ---- the network

    fn dials(&mut self) -> bool {
        let s = self.some_site();
        self.dial(s)
    }

    pub fn dial(&mut self, s: usize) -> bool {
        if self.ctx.net.partitioned || self.ctx.net.dials(s) || self.nodes[1 - s].process.is_none() {
            return false;
        }
        let Some(p) = self.nodes[s].process.as_ref().filter(|p| p.wants_dial()) else { return false };
        let lives = [self.nodes[0].life, self.nodes[1].life];
        let hello = p.hello();
        let wire = self.ctx.net.dial(s, lives, self.ctx.setup.lanes, hello);
        self.note(|| format!("site {s} dials: connection {wire}"));
        true
    }

    fn hangs_up_useless(&mut self) -> bool {
        let s = self.some_site();
        self.hang_up_useless(s)
    }

    /// The peer took no frames when we met: ask again.
    pub fn hang_up_useless(&mut self, s: usize) -> bool {
        let Some(p) = &mut self.nodes[s].process else { return false };
        let unwanted = p.link.is_some_and(|l| l.dialer && (l.useless || !p.wants_dial()));
        if unwanted {
            p.drop_link(&mut self.ctx);
        }
        unwanted
    }

    fn arrives(&mut self) -> bool {
        let s = self.some_site();
        let wires: Vec<u64> = self.ctx.net.wires.keys().copied().collect();
        if wires.is_empty() {
            return false;
        }
        let wire = wires[self.ctx.rng.below(wires.len() as u64) as usize];
        self.arrive(wire, s)
    }

    pub fn arrive(&mut self, wire: u64, s: usize) -> bool {
        let Some(w) = self.ctx.net.wires.get(&wire) else { return false };
        let dialer = w.dialer == s;
        if w.lives[s] != self.nodes[s].life || self.nodes[s].process.is_none() {
            return false;
        }
        let Some(arrival) = self.ctx.net.deliver(wire, s) else { return false };
        self.note(|| match &arrival {
            Arrival::Message(body) => format!("connection {wire} -> site {s}: {body}"),
            Arrival::Closed => format!("connection {wire} -> site {s}: closed"),
        });
        let Some(p) = &mut self.nodes[s].process else { return false };
        match arrival {
            Arrival::Closed => p.link_closed(&mut self.ctx, wire),
            Arrival::Message(body) => p.message(&mut self.ctx, wire, dialer, body),
        }
        true
    }

    fn frame_arrives(&mut self) -> bool {
        let wires: Vec<u64> = self.ctx.net.wires.keys().copied().collect();
        if wires.is_empty() {
            return false;
        }
        let wire = wires[self.ctx.rng.below(wires.len() as u64) as usize];
        let lane = self.ctx.rng.below(self.ctx.setup.lanes as u64) as usize;
        self.frame_arrive(wire, lane)
    }

    pub fn frame_arrive(&mut self, wire: u64, lane: usize) -> bool {
        let Some(w) = self.ctx.net.wires.get(&wire) else { return false };
        let s = 1 - w.dialer;
        if w.lives[s] != self.nodes[s].life {
            return false;
        }
        let Some(p) = &mut self.nodes[s].process else { return false };
        let Some(frame) = self.ctx.net.deliver_frame(wire, lane) else { return false };
        if p.link.is_none_or(|l| l.wire != wire) {
            self.ctx.cov.hit("a frame of an old connection arrives");
        }
        p.frames.push_back(frame);
        true
    }

    // ---- helpers for the operator

    pub fn role(&self, s: usize) -> Option<Role> {
        self.nodes[s].process.as_ref().map(|p| p.role().clone())
    }
}
