//! A VM, its pair, and one handover that the harness can stop at a chosen step, break, and bring to its end as the operator does.
//!
//! The operator's rule is the design's (§3.5 item 6): a target QEMU that has resumed means Acquire; a migration that failed, with
//! its target QEMU gone, means Void; a source QEMU that died meanwhile needs Void before the VM boots again.
//!
//! Steps are hit by what anybody could do from outside: a paused target (as libvirt starts it), a link that is slow, far or
//! silent in one direction, a limit on the sidecar's rate. Nothing in the product knows of it.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::json;
use watari_wire::report::Report;

use super::{
    ANSWER, BOOT, Dice, compare,
    matrix::{Fault, Step},
    watch::{Watch, writes},
};
use crate::{
    guest::Control,
    image,
    pair::Pair,
    qemu::{Machine, MigrationOptions, Qemu, Start, prepare_target, start_migration},
    wan::{Direction, Shape},
};

/// What a busy machine may take for what an idle one does in milliseconds.
const STEP: Duration = Duration::from_secs(90);
/// Less than the time for which a guest's request is held before its machine is paused.
const HELD: Duration = Duration::from_secs(15);
/// A link that is cut silently is noticed after at most 15 s (stream.rs); then conditions speak.
const NOTICED: Duration = Duration::from_secs(60);
/// One way to the peer while the answer to a grant is to be caught: longer than a report is old.
const FAR: Duration = Duration::from_millis(500);
/// Bytes per second of a memory migration that is to be caught in its middle.
const SLOW_MEMORY: u64 = 3 << 20;
/// The sidecar's limit, and what it is to lag behind, while its remainder is to be caught under way: some 5 s.
const SLOW_SIDECAR: &str = "8Mbit";
const REMAINDER_BYTES: u64 = 5 << 20;
/// Bytes per second of the guest, usually and while a remainder is to grow.
const RATE: u64 = 1_500_000;
const RATE_MORE: u64 = 6_000_000;

/// The link while nothing is the matter.
pub(super) fn usual_link() -> Shape {
    Shape::wan(300_000_000, Duration::from_millis(20))
}

/// The machine of the scene.
pub(super) fn machine() -> Machine {
    Machine::small(2).with(format!("rate={RATE}")).with("blocks=3072").with("start=1")
}

/// See the module's header. Between two handovers: a QEMU runs at `at`, beside a `primary` that is as old as its Pod would be; the
/// other end is a `replica`.
pub(super) struct Scene<'a> {
    pub pair: Pair<'a>,
    pub watch: Watch,
    pub at: usize,
    vm: Option<Qemu>,
    guest: Control,
    run: u64,
    boots: u32,
}

/// A handover under way.
pub(super) struct Attempt {
    tag: String,
    target: Option<Qemu>,
    /// Memory is on its way, or has arrived.
    migrating: bool,
    /// The target has been told to run, with all memory there.
    resumed: bool,
    /// What the guest was told is written, per stream, right before the fault.
    acknowledged: Vec<u64>,
}

/// Where a handover led.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The running VM is at the target.
    Moved,
    /// The running VM is still at the source.
    Stayed,
    /// Its QEMU was lost; it booted at the end that has the right to write: the target, or the source.
    BootedAtTarget,
    BootedAtSource,
}

impl<'a> Scene<'a> {
    /// Boots the VM at the first end and waits for a first generation.
    pub fn open(mut pair: Pair<'a>) -> anyhow::Result<Self> {
        pair.start(1, "replica")?;
        pair.start(0, "primary")?;
        let watch = Watch::start(&pair);
        let vm = Qemu::start(pair.site(0), "vm-0", &machine(), &pair.backings(0), Start::Boot)?;
        let guest = vm.control();
        let mut scene = Scene { pair, watch, at: 0, vm: Some(vm), guest, run: 0, boots: 1 };
        scene.greet()?;
        scene.pair.cut(0)?;
        Ok(scene)
    }

    fn greet(&mut self) -> anyhow::Result<()> {
        let hello = self.guest.hello(BOOT)?;
        ensure!(hello.groups[0].found.iter().all(|t| t.clean()), "what the guest found at its boot: {hello:?}");
        self.run = hello.groups[0].layout.run;
        Ok(())
    }

    fn vm(&self) -> anyhow::Result<&Qemu> {
        self.vm.as_ref().context("the source's QEMU is there until a fault takes it")
    }

    fn role(&self, end: usize) -> String {
        self.watch.last(end).map(|r| r.role).unwrap_or_default()
    }

    /// The Pod at one end ends, and another takes its place.
    fn pod(&mut self, end: usize, role: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + STEP;
        while let Err(error) = self.pair.release(end) {
            // Declined until it has noticed that its QEMU is gone.
            ensure!(Instant::now() < deadline, "the sidecar of end {end} does not let go: {error:#}");
            std::thread::sleep(Duration::from_millis(100));
        }
        self.pair.start(end, role)
    }

    /// From the source to the target.
    fn there(&self) -> Direction {
        if self.at == 0 { Direction::AToB } else { Direction::BToA }
    }

    fn back(&self) -> Direction {
        if self.at == 0 { Direction::BToA } else { Direction::AToB }
    }

    /// Goes as far as `step` and no further, where that can be had from outside. Returns whether it was hit.
    pub fn reach(&mut self, step: Step, tag: &str) -> anyhow::Result<(Attempt, bool)> {
        let (from, to) = (self.at, 1 - self.at);
        let acknowledged = self.guest.stats()?.streams.iter().map(|s| s.acknowledged).collect();
        let mut attempt = Attempt { tag: tag.to_owned(), target: None, migrating: false, resumed: false, acknowledged };
        self.pod(to, "primary")?;
        self.wait(from, "the link", |s, t| s.link.connected && t.link.connected)?;
        self.pair.ctl(from, &["open-handover", "--vmi-uid", tag])?;
        self.wait(from, "the open handover", |s, t| s.role == "Converging" && t.attachable)?;
        if step == Step::Opened {
            return Ok((attempt, true));
        }
        self.start_target(&mut attempt)?;
        if step == Step::Attached {
            return Ok((attempt, true));
        }
        if step == Step::Sending {
            self.pair.ctl(from, &["set", "--bandwidth", SLOW_SIDECAR])?;
            self.guest.set_rate(RATE_MORE)?;
            self.wait(from, "a remainder that takes a while", |s, _| s.generations.lag_bytes > REMAINDER_BYTES)?;
        }
        let bandwidth = if step == Step::Migrating { SLOW_MEMORY } else { 0 };
        attempt.migrating = true;
        let options = MigrationOptions { bandwidth, ..MigrationOptions::default() };
        let (source, target) = (self.vm()?, attempt.target.as_ref().context("started above")?);
        prepare_target(target, self.pair.site(to), &options)?;
        let migration = start_migration(source, target, self.pair.site(to), &options)?;
        if step == Step::Migrating {
            let deadline = Instant::now() + STEP;
            loop {
                let progress = migration.progress()?;
                let sent = progress["ram"]["transferred"].as_u64().unwrap_or(0);
                if progress["status"] == "active" && sent > SLOW_MEMORY / 2 {
                    return Ok((attempt, true));
                }
                ensure!(Instant::now() < deadline, "memory does not move: {progress}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let (there, back, bed) = (self.there(), self.back(), self.pair.bed);
        let wan = &bed.wan;
        migration.finish_stopped(|_| {
            match step {
                // The request for the right to write arrives, and nothing comes back.
                Step::Sealed => wan.black_hole(there),
                // With nothing left to send, what the seal needs goes in one flight, and no answer to it is waited for.
                Step::Activated => {
                    let settled =
                        |r: &Report| r.disks.iter().all(|d| d.dirty_bytes == 0) && r.generations.open.is_empty();
                    // Where it is not, the step may be missed, which is said.
                    let _ = self.wait(from, "a source with nothing left to send", |s, _| settled(s));
                    wan.change_both(|shape| shape.delay = FAR);
                }
                Step::Opened | Step::Attached | Step::Migrating | Step::Sending | Step::Released => {}
            }
            Ok(())
        })?;
        attempt.resumed = true;
        self.guest.move_to(attempt.target.as_ref().context("started above")?.control_socket());
        // An idle guest asks for nothing; the operator has seen it running.
        self.pair.ctl(to, &["acquire"])?;
        let hit = match step {
            Step::Released => {
                self.wait(from, "the release", |s, t| t.role == "Serving" && s.role == "Replica")?;
                true
            }
            Step::Sending => {
                self.caught(from, STEP, |s, t| s.role == "Sealed" && s.generations.lag_bytes > 0 && !writes(t))
            }
            Step::Sealed => self.caught(from, STEP, |s, t| s.role == "Sealed" && !writes(t)),
            _ => {
                let sealed = self.caught(from, STEP, |s, t| s.role == "Sealed" && !writes(t));
                wan.black_hole(back);
                sealed && self.caught(from, HELD, |s, t| s.role == "Sealed" && writes(t))
            }
        };
        Ok((attempt, hit))
    }

    /// Was it seen? What cannot be seen any more is over.
    fn caught(&self, from: usize, patience: Duration, done: impl Fn(&Report, &Report) -> bool) -> bool {
        let over = |s: &Report| s.role == "Replica" || s.role == "Released";
        let _ = self.watch.wait("the step", patience, |a, b| {
            let (s, t) = if from == 0 { (a, b) } else { (b, a) };
            done(s, t) || over(s)
        });
        self.watch.last(from).zip(self.watch.last(1 - from)).is_some_and(|(s, t)| done(&s, &t))
    }

    /// Waits for what source and target report.
    fn wait(&self, from: usize, what: &str, done: impl Fn(&Report, &Report) -> bool) -> anyhow::Result<()> {
        self.watch.wait(what, STEP, |a, b| if from == 0 { done(a, b) } else { done(b, a) })
    }

    fn start_target(&mut self, attempt: &mut Attempt) -> anyhow::Result<()> {
        let to = 1 - self.at;
        let deadline = Instant::now() + STEP;
        attempt.target = loop {
            self.wait(self.at, "the target to be attachable", |_, t| t.attachable)?;
            let name = format!("vm-{}", attempt.tag);
            let (site, backings) = (self.pair.site(to), self.pair.backings(to));
            match Qemu::start(site, &name, &machine(), &backings, Start::IncomingStopped) {
                Ok(target) => break Some(target),
                // The link broke since the report was made; KubeVirt tries again with another migration.
                Err(error) => ensure!(Instant::now() < deadline, "the target's QEMU is not let in: {error:#}"),
            }
        };
        self.wait(self.at, "the target's QEMU to be attached", |_, t| t.role == "Attached")
    }

    /// Breaks it.
    pub fn inject(&mut self, attempt: &mut Attempt, fault: Fault) -> anyhow::Result<()> {
        // It answers while its writes are held, its control line is another thread; but not once that has paused its machine.
        if let Ok(stats) = self.guest.stats() {
            attempt.acknowledged = stats.streams.iter().map(|s| s.acknowledged).collect();
        }
        let (from, to) = (self.at, 1 - self.at);
        match fault {
            Fault::SourceWorker => ensure!(self.pair.kill_worker(from)?, "there was no worker"),
            Fault::TargetWorker => ensure!(self.pair.kill_worker(to)?, "there was no worker"),
            Fault::SourceSupervisor | Fault::TargetSupervisor => {
                let end = if fault == Fault::SourceSupervisor { from } else { to };
                if let Some(mut process) = self.pair.ends[end].sidecar.take() {
                    process.kill9();
                }
            }
            Fault::LinkCut => self.pair.bed.wan.link_down()?,
            Fault::BlackHole => self.pair.bed.wan.cut(),
            // A machine is killed when its value goes.
            Fault::TargetQemu => drop(attempt.target.take()),
            Fault::SourceQemu => drop(self.vm.take()),
            Fault::Cancel => {
                if attempt.migrating {
                    // Where all memory has arrived this comes too late, and QEMU says so or says nothing.
                    let _ = self.vm()?.qmp.execute("migrate_cancel", json!({}));
                }
                if !attempt.resumed {
                    drop(attempt.target.take());
                }
            }
        }
        Ok(())
    }

    /// While the link is gone: who may write does, nobody else, and the conditions say what a person can do.
    pub fn endure(&mut self, step: Step, fault: Fault, dice: &mut Dice) -> anyhow::Result<()> {
        if !matches!(fault, Fault::LinkCut | Fault::BlackHole) {
            std::thread::sleep(Duration::from_millis(dice.below(400)));
            return Ok(());
        }
        let (from, to) = (self.at, 1 - self.at);
        match step {
            Step::Sealed | Step::Sending | Step::Activated => {
                let names = |end: usize, kind: &str, words: &[&str]| -> anyhow::Result<()> {
                    let seen = self.watch.last(end).context("a report")?;
                    let condition = seen.conditions.iter().find(|c| c.kind == kind).context(format!("{seen:?}"))?;
                    let ok = words.iter().all(|word| condition.next_step.contains(word));
                    ensure!(ok, "{kind} must name {words:?}: {condition:?}");
                    Ok(())
                };
                let holds = |r: &Report, kind: &str| r.conditions.iter().any(|c| c.kind == kind);
                self.watch.wait("the sealed source to miss its target", NOTICED, |a, b| {
                    holds(if from == 0 { a } else { b }, "SealedWithoutTarget")
                })?;
                names(from, "SealedWithoutTarget", &["wait", "promote", "void"])?;
                if self.role(to) == "Serving" {
                    let before = self.acknowledged()?;
                    std::thread::sleep(Duration::from_secs(2));
                    ensure!(
                        self.acknowledged()? > before,
                        "the target is active and serves its guest without the source"
                    );
                } else {
                    names(to, "WaitingForGrant", &["wait", "void", "promote"])?;
                }
            }
            // Short of what the stream's patience is, and longer.
            _ if fault == Fault::LinkCut => std::thread::sleep(Duration::from_millis(500 + dice.below(3000))),
            _ => std::thread::sleep(Duration::from_secs(17)),
        }
        Ok(())
    }

    fn acknowledged(&mut self) -> anyhow::Result<u64> {
        Ok(self.guest.stats()?.streams.iter().map(|s| s.acknowledged).sum())
    }

    /// The link is back, and whoever restarts containers has done so.
    pub fn repair(&mut self) -> anyhow::Result<()> {
        self.pair.bed.wan.change_both(|shape| *shape = usual_link());
        self.pair.bed.wan.restore()?;
        for end in [0, 1] {
            if self.pair.ends[end].sidecar.is_none() {
                self.pair.start(end, "primary")?;
            }
        }
        Ok(())
    }

    /// What the operator does until the VM runs at exactly one end, with everything that was acknowledged.
    pub fn resolve(&mut self, mut attempt: Attempt, fault: Fault) -> anyhow::Result<Outcome> {
        let go_on = !matches!(fault, Fault::TargetQemu | Fault::SourceQemu | Fault::Cancel);
        if go_on && !attempt.resumed {
            self.go_on(&mut attempt)?;
        }
        let outcome = match attempt.target.take() {
            Some(target) if attempt.resumed => self.acquire(target)?,
            other => {
                drop(other);
                self.void(&attempt)?
            }
        };
        self.settle(outcome)?;
        Ok(outcome)
    }

    /// The move goes on as if nothing had been. Leaves `resumed` false when its memory migration failed.
    fn go_on(&mut self, attempt: &mut Attempt) -> anyhow::Result<()> {
        let to = 1 - self.at;
        if attempt.target.is_none() {
            self.start_target(attempt)?;
        }
        let target = attempt.target.as_ref().context("started above")?;
        let unlimited = MigrationOptions::default();
        if attempt.migrating {
            self.vm()?.qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 }))?;
        } else {
            attempt.migrating = true;
            prepare_target(target, self.pair.site(to), &unlimited)?;
            start_migration(self.vm()?, target, self.pair.site(to), &unlimited)?;
        }
        let deadline = Instant::now() + STEP * 2;
        loop {
            let state = self.vm()?.qmp.execute("query-migrate", json!({}))?;
            match state["status"].as_str().unwrap_or_default() {
                "completed" => break,
                "failed" | "cancelled" => return Ok(()),
                _ => ensure!(Instant::now() < deadline, "the memory migration does not end: {state}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        // All memory has left; it has arrived when the target can be told to run.
        while target.status()? == "inmigrate" {
            ensure!(Instant::now() < deadline, "the target's memory does not arrive");
            std::thread::sleep(Duration::from_millis(20));
        }
        target.qmp.execute("cont", json!({}))?;
        attempt.resumed = true;
        self.guest.move_to(target.control_socket());
        Ok(())
    }

    /// The target's QEMU has resumed: Acquire, again until it is granted.
    fn acquire(&mut self, target: Qemu) -> anyhow::Result<Outcome> {
        let (from, to) = (self.at, 1 - self.at);
        let deadline = Instant::now() + STEP;
        while self.role(to) != "Serving" {
            ensure!(Instant::now() < deadline, "no grant: {:#?}\n{:#?}", self.watch.last(from), self.watch.last(to));
            // Declined while the source is away: it is asked again.
            let _ = self.pair.ctl(to, &["acquire"]);
            std::thread::sleep(Duration::from_millis(200));
        }
        self.wait(from, "the source to be the replica", |s, t| s.role == "Replica" && t.role == "Serving")?;
        // Requests that were held for too long have paused it, as the next sync of KubeVirt would notice.
        unpause(&target)?;
        // Where its sidecar was killed meanwhile it waits for a reconnection that a replica refuses, until its reconnect delay is
        // over; libvirt ends a source that does not end by itself in the same way.
        drop(self.vm.replace(target));
        self.at = to;
        Ok(Outcome::Moved)
    }

    /// No QEMU runs at the target: Void, unless it had become active; then boot where the right to write is, if need be.
    fn void(&mut self, attempt: &Attempt) -> anyhow::Result<Outcome> {
        let (from, to) = (self.at, 1 - self.at);
        let deadline = Instant::now() + STEP;
        let mut said = String::new();
        let here = loop {
            // The word of a restarted side counts; the watch may still show what was before.
            let (source, target) = (self.pair.report(from), self.pair.report(to));
            if let (Ok(source), Ok(target)) = (source, target) {
                if target.role == "Serving" && source.role == "Replica" {
                    break to;
                }
                if source.role == "Serving" && target.role == "Replica" && source.epoch == target.epoch {
                    break from;
                }
                if target.role != "Serving" {
                    said = self.pair.ctl(to, &["void"]).unwrap_or_else(|e| format!("{e:#}"));
                }
            }
            ensure!(Instant::now() < deadline, "neither end gets the right to write; void says: {said}");
            std::thread::sleep(Duration::from_millis(200));
        };
        let running = self.vm.as_ref().is_some_and(|vm| vm.status().is_ok_and(|s| s == "running" || s == "io-error"));
        if here == from && running && !attempt.resumed {
            unpause(self.vm()?)?;
            self.guest.move_to(self.vm()?.control_socket());
            return Ok(Outcome::Stayed);
        }
        drop(self.vm.take());
        self.pod(here, "primary")?;
        self.boot(here, &attempt.acknowledged)?;
        Ok(if here == to { Outcome::BootedAtTarget } else { Outcome::BootedAtSource })
    }

    /// A fresh boot, after a look at what the lost guest has left.
    fn boot(&mut self, end: usize, acknowledged: &[u64]) -> anyhow::Result<()> {
        // Writes that leave zeroes cannot be counted on the image: where fewer are found than were known, the image must
        // hold those that were known.
        let images = self.pair.images(end);
        let found = image::check(&images, None)?;
        let tally = found.iter().find(|t| t.run == self.run).context("the lost guest had written")?;
        let reached = tally.acknowledged.iter().zip(acknowledged).map(|(found, known)| *found.max(known));
        let left = image::check(&images, Some(&reached.collect::<Vec<_>>()))?;
        let clean = left.iter().all(|t| t.clean()) && left.first().is_some_and(|t| t.run == self.run);
        ensure!(clean, "what the lost guest has left, {acknowledged:?} known: {left:?}\nfound: {found:?}");
        let name = format!("vm-boot-{}", self.boots);
        self.boots += 1;
        let vm = Qemu::start(self.pair.site(end), &name, &machine(), &self.pair.backings(end), Start::Boot)?;
        self.guest = vm.control();
        self.vm = Some(vm);
        self.at = end;
        self.greet()
    }

    /// Exactly one end serves, at the highest epoch; the guest misses nothing; the replica becomes equal.
    fn settle(&mut self, outcome: Outcome) -> anyhow::Result<()> {
        let at = self.at;
        self.pod(1 - at, "replica")?;
        self.wait(at, "one end that serves and one replica, at one epoch", |s, t| {
            s.role == "Serving" && t.role == "Replica" && s.epoch == t.epoch && s.link.connected
        })?;
        let epoch = self.watch.last(at).map_or(0, |r| r.epoch);
        ensure!(
            epoch == self.watch.highest_epoch(),
            "it serves at {epoch}, but {} was seen",
            self.watch.highest_epoch()
        );
        self.guest.set_rate(RATE)?;
        self.pair.ctl(at, &["set", "--bandwidth", "unlimited"])?;
        let verdict = self.guest.verify(ANSWER)?;
        ensure!(verdict.clean(), "{outcome:?}: {verdict:?}");
        compare(&mut self.pair, at, &mut self.guest)?;
        self.watch.check()
    }

    /// Ends the machine in good order.
    pub fn close(mut self) -> anyhow::Result<()> {
        self.watch.check()?;
        match self.vm.take() {
            Some(vm) => Ok(vm.quit()?),
            None => bail!("no QEMU runs at the end"),
        }
    }
}

/// Continues a machine that I/O errors have paused.
fn unpause(vm: &Qemu) -> anyhow::Result<()> {
    let deadline = Instant::now() + STEP;
    while vm.status()? != "running" {
        ensure!(Instant::now() < deadline, "{} stays {}", vm.name, vm.status()?);
        vm.qmp.execute("cont", json!({}))?;
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
