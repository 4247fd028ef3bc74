//! A history: events with faults, then peace, in which everything must come to rest with both sites equal. A failing one
//! says how to replay it and is shrunk by leaving events out.

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
};

use watari_core::{handover::Gate, primary::Phase, record::Role, versions::Speaks};

use crate::{coverage::Coverage, ctx::Setup, operator, world::World};

/// Rounds of peace until which everything must have come to rest.
const PEACE_ROUNDS: u64 = 1500;

/// What a history was.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub coverage: Coverage,
    pub events: u64,
    pub faults: u64,
}

/// Run one history; panics at the first violation.
pub fn run(seed: u64, without: &BTreeSet<u64>, trace: bool) -> Outcome {
    let mut outcome = Outcome::default();
    play(seed, without, trace, &mut outcome);
    outcome
}

fn play(seed: u64, without: &BTreeSet<u64>, trace: bool, outcome: &mut Outcome) {
    let mut world = World::new(Setup::draw(seed), trace);
    let steps = world.ctx.setup.steps;
    let ran = catch_unwind(AssertUnwindSafe(|| {
        while world.step < steps {
            if without.contains(&(world.step + 1)) {
                world.step += 1;
                continue;
            }
            world.advance();
        }
        world.peace();
    }));
    outcome.events = world.step;
    outcome.faults = world.faults_seen;
    outcome.coverage = std::mem::take(&mut world.ctx.cov);
    if let Err(panic) = ran {
        if let Some(trace) = &world.ctx.trace {
            trace.iter().for_each(|line| println!("{line}"));
            println!("setup: {:?}", world.ctx.setup);
        }
        std::panic::resume_unwind(panic);
    }
}

/// The words of a panic.
pub fn words(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()
}

/// A violation, with what is needed to see it again.
#[derive(Clone, Debug)]
pub struct Failure {
    pub seed: u64,
    pub what: String,
    /// Events that may be left out.
    pub without: BTreeSet<u64>,
}

impl Failure {
    pub fn command(&self) -> String {
        let mut out = format!("cargo run --profile soak -p watari-sim -- replay --seed {}", self.seed);
        if !self.without.is_empty() {
            out += &format!(" --without {}", ranges(&self.without));
        }
        out
    }
}

/// `1-3,7`.
pub fn ranges(set: &BTreeSet<u64>) -> String {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for n in set {
        match runs.last_mut() {
            Some((_, end)) if *end + 1 == *n => *end = *n,
            _ => runs.push((*n, *n)),
        }
    }
    let one = |(a, b): &(u64, u64)| if a == b { a.to_string() } else { format!("{a}-{b}") };
    runs.iter().map(one).collect::<Vec<_>>().join(",")
}

/// The inverse of [`ranges`].
pub fn parse_ranges(text: &str) -> BTreeSet<u64> {
    let parts = text.split(',').filter(|p| !p.is_empty());
    parts
        .flat_map(|p| {
            let (a, b) = p.split_once('-').unwrap_or((p, p));
            a.parse().unwrap_or(1)..=b.parse().unwrap_or(0)
        })
        .collect()
}

/// Run a history and tell of its violation instead of panicking.
pub fn attempt(seed: u64, without: &BTreeSet<u64>) -> Result<Outcome, String> {
    catch_unwind(AssertUnwindSafe(|| run(seed, without, false))).map_err(|panic| words(&*panic))
}

/// Two violations are the same if their words are, numbers aside.
fn kind(what: &str) -> String {
    what.chars().filter(|c| !c.is_ascii_digit()).take(60).collect()
}

/// Leave out as many events as possible while the same violation remains; at most `tries` runs.
pub fn shrink(seed: u64, what: &str, tries: u32) -> Failure {
    let steps = Setup::draw(seed).steps;
    let goal = kind(what);
    let mut without = BTreeSet::new();
    let (mut left, mut size) = (tries, steps / 2);
    let mut last = what.to_owned();
    while size > 0 && left > 0 {
        let mut at = 1;
        while at <= steps && left > 0 {
            let mut more = without.clone();
            more.extend(at..(at + size).min(steps + 1));
            if more.len() > without.len() {
                left -= 1;
                if let Err(found) = attempt(seed, &more)
                    && kind(&found) == goal
                {
                    without = more;
                    last = found;
                }
            }
            at += size;
        }
        size /= 2;
    }
    Failure { seed, what: last, without }
}

impl World {
    /// No more faults; operators do their duty. Everything must come to rest, and then both sites are equal.
    fn peace(&mut self) {
        self.note(|| "peace".into());
        self.faults = false;
        self.ctx.peace = true;
        self.ctx.net.partitioned = false;
        for s in 0..2 {
            self.nodes[s].medium.power_off_at(None);
            self.nodes[s].medium.set_capacity(crate::target::FOLDER, None);
            // A journal that is too small is a person's choice; here it is made. A worker that passes through is started
            // anew, and so is one of another version.
            let p = self.nodes[s].process.as_ref();
            let upgraded = p.is_some_and(|p| p.pass_through || p.speaks != Speaks::OURS);
            if self.ctx.setup.journal_bytes < 64 << 20 || upgraded {
                self.process_gone(s);
            }
        }
        self.ctx.setup.journal_bytes = 64 << 20;
        for source in self.nodes.iter_mut().filter_map(|n| n.process.as_mut()?.source.as_mut()) {
            // What was proved before says nothing about what was done to the disks since.
            source.verification.clean_passes = 0;
        }
        let mut goal = None;
        for round in 0..PEACE_ROUNDS {
            self.step += 1;
            self.ctx.rng = watari_core::storage::sim::SimRng(self.ctx.setup.seed ^ self.step << 32);
            self.duties();
            // Again now and then: a write that was held until after the demanded cut is in none (seed 1002208).
            // What verification found goes with the next cut.
            let often = goal.is_none() || self.ctx.truth.distrusted.contains(&true);
            if round == 20 || round > 20 && round % if often { 50 } else { 400 } == 0 {
                goal = self.demand();
            }
            if let Some((s, _, committed)) = goal
                && self.at_rest(s, committed)
            {
                self.check_equal(s);
                self.ctx.cov.hit("converged");
                return;
            }
            // Who serves may have changed since.
            if goal.is_some_and(|(s, source, _)| self.source_life(s) != Some(source)) {
                goal = None;
            }
        }
        panic!("left in peace it does not converge: {}", self.state());
    }

    /// A fresh generation is asked for where the VM is active.
    fn demand(&mut self) -> Option<(usize, (u64, u64), u64)> {
        let s = (0..2).find(|s| matches!(self.role(*s), Some(Role::Serving)))?;
        let source = self.nodes[s].process.as_mut()?.source.as_mut()?;
        source.primary.demand_cut();
        let committed = source.primary.counters.committed;
        Some((s, self.source_life(s)?, committed))
    }

    /// Which life of a serving source this is: session and epoch.
    fn source_life(&self, s: usize) -> Option<(u64, u64)> {
        let p = self.nodes[s].process.as_ref().filter(|p| matches!(p.role(), Role::Serving))?;
        Some((p.session.0, p.site.record().epoch.counter))
    }

    /// One round of everybody's duty.
    fn duties(&mut self) {
        self.ctx.now += 7;
        for p in self.nodes.iter_mut().filter_map(|n| n.process.as_mut()) {
            // Cuts by demand only, so that it can come to rest.
            if let Some(source) = &mut p.source {
                source.primary.limits.interval_millis = 1 << 40;
            }
        }
        for s in 0..2 {
            self.restart(s);
            self.log_works_at(s);
            self.connect(s);
            self.dial(s);
            self.accepts(s);
            self.cleans_up(s);
            if self.one_in(10) {
                self.hang_up_useless(s);
            }
            self.settle();
            for _ in 0..6 {
                let Some(p) = &mut self.nodes[s].process else { break };
                p.source_step(&mut self.ctx);
                p.source_sync(&mut self.ctx);
                p.verify_step(&mut self.ctx);
                p.job_step(&mut self.ctx, 0);
                p.hear_want_write(&mut self.ctx);
                (0..4).for_each(|kind| {
                    p.target_step(&mut self.ctx, kind);
                });
                self.guest_round(s);
                self.settle();
            }
        }
        let wires: Vec<u64> = self.ctx.net.wires.keys().copied().collect();
        for wire in wires {
            for s in 0..2 {
                (0..4).for_each(|_| {
                    self.arrive(wire, s);
                    self.settle();
                });
            }
            for lane in 0..self.ctx.setup.lanes {
                (0..4).for_each(|_| {
                    self.frame_arrive(wire, lane);
                });
            }
        }
        self.finish_moves();
        self.settle();
    }

    /// The operator brings a move to its end, whichever it is, and boots a VM that does not run.
    fn finish_moves(&mut self) {
        match self.moving.map(|m| m.phase) {
            Some(operator::Phase::Resumed) => {
                let lost = self.moving.is_some_and(|m| self.qemus[1 - m.from].is_none());
                if !self.moves_on() || lost {
                    self.asks();
                }
            }
            Some(operator::Phase::Failed) => {
                self.moves_on();
            }
            Some(_) => {
                if !self.moves_on() && self.one_in(8) {
                    self.migration_fails();
                }
            }
            None => {
                self.settles_divergence();
                self.voids_leftovers();
                for s in 0..2 {
                    self.boots(s);
                }
            }
        }
    }

    /// Two active sides under one counter: a person names the first.
    fn settles_divergence(&mut self) {
        let serves = |w: &World, s: usize| w.nodes[s].process.as_ref().is_some_and(|p| p.role().accepts_writes());
        if serves(self, 0) && serves(self, 1) && self.one_in(20) {
            let of = |w: &World, s: usize| w.nodes[s].record().map(|r| r.epoch.counter);
            if of(self, 0) == of(self, 1) {
                self.ctx.cov.hit("diverged: a person names the winner");
                self.reclaims(0);
            }
        }
    }

    fn at_rest(&self, s: usize, committed: u64) -> bool {
        let t = 1 - s;
        let (Some(a), Some(b)) = (&self.nodes[s].process, &self.nodes[t].process) else { return false };
        let (Some(source), Some(target)) = (&a.source, &b.target) else { return false };
        matches!(b.role(), Role::Replica)
            && self.moving.is_none()
            && a.gate == Gate::Serve
            && (!self.ctx.truth.distrusted[t] || source.verification.clean_passes > 1)
            && source.primary.phase() == &Phase::Idle
            && !source.busy()
            && source.primary.counters.committed > committed
            && target.applied() == source.primary.base()
            && a.requests.is_empty()
            && a.tracker.current_blocks() + a.tracker.frozen_blocks() == 0
    }

    fn check_equal(&mut self, s: usize) {
        let t = 1 - s;
        let sizes = self.ctx.setup.sizes.clone();
        let disks = crate::content::read_all(&self.nodes[s].images, &sizes).expect("peace");
        let images = crate::content::read_all(&self.nodes[t].images, &sizes).expect("peace");
        let live = &self.ctx.truth.live[s].as_ref().expect("an active side").content;
        assert!(&disks == live, "I10: the serving disks are not what the guest wrote");
        for (d, (a, b)) in disks.iter().zip(&images).enumerate() {
            let at = a.iter().zip(b).position(|(a, b)| a != b);
            assert!(at.is_none(), "at rest disk {d} differs at sector {}", at.unwrap_or(0));
        }
        self.check_kept(t);
        if let Some(p) = &self.nodes[s].process {
            assert!(
                p.tracker.staged_blocks() == 0,
                "at rest {} staged marks are left: they leak",
                p.tracker.staged_blocks()
            );
            assert!(p.tracker.writes_in_flight() == 0, "at rest a write is in flight for ever");
        }
    }

    /// For people: where everybody stands.
    pub fn state(&self) -> String {
        let site = |s: usize| {
            let Some(p) = &self.nodes[s].process else { return format!("site {s}: no process") };
            let source = p.source.as_ref().map(|x| {
                format!(
                    "source {:?} base {} linked {} jobs {}",
                    x.primary.phase(),
                    x.primary.base(),
                    x.primary.linked(),
                    p.source_jobs()
                )
            });
            let target = p.target.as_ref().map(|t| {
                format!(
                    "target committed {} applied {} full {} poisoned {:?}",
                    t.committed(),
                    t.applied(),
                    t.full(),
                    t.store.poisoned()
                )
            });
            format!(
                "site {s}: {:?} epoch {} floor {} gate {:?} link {:?} dirty {}+{} {source:?} {target:?} requests {:?} refusals {:?}",
                p.role(),
                p.site.record().epoch.counter,
                p.site.record().floor,
                p.gate,
                p.link,
                p.tracker.current_blocks(),
                p.tracker.frozen_blocks(),
                p.requests,
                p.refusals.last()
            )
        };
        let qemus: Vec<String> = self.qemus.iter().map(|q| format!("{q:?}")).collect();
        format!("{}\n{}\nmove {:?}\n{}", site(0), site(1), self.moving, qemus.join("\n"))
    }
}
