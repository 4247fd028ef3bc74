//! A VM under libvirt whose disks our sidecars hold, and its way to the other site: what the operator, virt-controller,
//! virt-launcher and virt-handler do between "move" and "the old Pod is gone", in their order (kubevirt.md §3.3, appendix 3).
//!
//! Invariant: between two crossings the site that the VM is at runs `primary` and the other one `replica`, each in a process that
//! is as old as the last crossing, as Pods are.
//!
//! It does not judge the guest's data; callers do, with what the guest remembers.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::{Error, Hooks, LibvirtSite, MigrationOptions, MigrationReport, VirtualMachine};
use crate::{guest::Control, pair::Pair};

/// A guest under TCG on a busy machine.
const BOOT: Duration = Duration::from_secs(180);
/// What a busy machine may take for a step that an idle one takes milliseconds for.
const STEP: Duration = Duration::from_secs(90);
/// virt-launcher gives a target up after this time (kubevirt.md, appendix 3, 9).
const GATE: Duration = Duration::from_secs(240);
/// A remainder below this is worth a migration; the operator's threshold.
const CONVERGED_BYTES: u64 = 8 << 20;
/// Memory on the wire after which a migration is in its middle.
const MIGRATING_BYTES: u64 = 4 << 20;

/// A VM and its pair.
pub struct SyncedVm<'a> {
    pub pair: Pair<'a>,
    pub vm: VirtualMachine,
    pub guest: Control,
    /// The end where it runs.
    pub at: usize,
    pods: [&'a LibvirtSite; 2],
    /// The hook of the Pod that the VM runs in.
    hooks: Hooks,
}

/// What happens to the link on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    None,
    /// Cut for this long while the source converges.
    WhileConverging(Duration),
    /// Cut for this long while memory is on its way.
    WhileMigrating(Duration),
}

/// What one crossing was like.
#[derive(Clone, Debug)]
pub struct Crossing {
    /// From "move" until the source is a replica, seconds.
    pub seconds: f64,
    pub migration: MigrationReport,
    /// Bytes that crossed the link beside what virt-handler's proxies carried: the disks' share.
    pub disk_bytes: u64,
    /// QEMU was connected at the target while the source still served the guest, so its first reads were answered.
    pub attached_early: bool,
}

impl<'a> SyncedVm<'a> {
    /// Sidecars at both sites, the VM defined through our hook in three lossy rounds at the first, and running.
    pub fn boot(mut pair: Pair<'a>, pods: [&'a LibvirtSite; 2], vm: VirtualMachine) -> anyhow::Result<Self> {
        pair.start(1, "replica")?;
        pair.start(0, "primary")?;
        let hooks = pods[0].hooks()?;
        let defined = pods[0].define_through_hook(&hooks, &vm)?;
        let disks = vm.machine.disks.len();
        ensure!(defined.matches("<reconnect delay=\"120\"/>").count() == disks, "every disk is ours: {defined}");
        let running = pods[0].start_vm(&vm)?;
        let mut guest = running.control();
        guest.hello(BOOT).with_context(|| running.serial())?;
        Ok(SyncedVm { pair, vm, guest, at: 0, pods, hooks })
    }

    /// Moves the running VM to the other site. `tag` stands for the VMI's UID; with `slow_down` guest writes may be slowed
    /// until the pair converges.
    pub fn cross(&mut self, tag: &str, slow_down: bool, trouble: Trouble) -> anyhow::Result<Crossing> {
        let (from, to) = (self.at, 1 - self.at);
        let began = Instant::now();
        let bytes = self.pair.bed.wan.bytes_delivered();
        let hooks = self.target_pod(to)?;
        self.converge(tag, slow_down, trouble)?;
        self.pods[to].wait_at_gate(&hooks, &self.vm, GATE)?;
        let (migration, attached_early) = self.migrate(from, to, trouble)?;
        self.guest.move_to(self.pods[to].vm(&self.vm).control_socket());
        // The operator sees Succeeded; a guest that writes has asked by itself.
        self.pair.ctl(to, &["acquire"])?;
        self.pair.wait(to, "the target to be active", STEP, |r| r.role == "Serving")?;
        self.pair.wait(from, "the source to be the replica", STEP, |r| r.role == "Replica")?;
        let seconds = began.elapsed().as_secs_f64();
        let carried = migration.bytes;
        let carried = carried.libvirt + carried.memory + carried.disks + carried.back;
        let disk_bytes = (self.pair.bed.wan.bytes_delivered() - bytes).saturating_sub(carried);
        let left = std::mem::replace(&mut self.hooks, hooks);
        self.at = to;
        self.pod_ends(from, &left)?;
        Ok(Crossing { seconds, migration, disk_bytes, attached_early })
    }

    /// A move that is called off while memory is on its way (virt-controller deletes the VMIM): the VM runs on where it is, its
    /// handover is void, and the target's Pod gives way to a replica Pod again.
    pub fn call_off(&mut self, tag: &str) -> anyhow::Result<()> {
        let (from, to) = (self.at, 1 - self.at);
        let hooks = self.target_pod(to)?;
        self.converge(tag, false, Trouble::None)?;
        self.pods[to].wait_at_gate(&hooks, &self.vm, GATE)?;
        let mut migration = self.pods[from].begin_migration(self.pods[to], &self.vm, &MigrationOptions::default())?;
        while migration.running() && migration.bytes().memory < MIGRATING_BYTES {
            std::thread::sleep(Duration::from_millis(5));
        }
        migration.abort()?;
        let failed = migration.finish().err().context("it was called off in its middle")?;
        let state = self.pods[from].vm(&self.vm).state()?;
        ensure!(state.starts_with("running"), "after {failed} the VM is {state}");
        ensure!(self.pods[to].vm(&self.vm).state().is_err(), "no QEMU is left at the target");
        // Failed with its QEMU gone: the operator voids.
        self.pair.ctl(to, &["void"])?;
        self.pair.wait(from, "the source to serve on", STEP, |r| r.role == "Serving" && r.link.connected)?;
        self.pair.wait(to, "the target to be a replica", STEP, |r| r.role == "Replica" && !r.attachable)?;
        self.pod_ends(to, &hooks)
    }

    /// The target's virt-launcher Pod takes the claims over from the replica Pod; its gate is shut until we are in sync.
    fn target_pod(&mut self, to: usize) -> anyhow::Result<Hooks> {
        self.pair.release(to)?;
        self.pair.start(to, "primary")?;
        let hooks = self.pods[to].hooks()?;
        match self.pods[to].prepare_target(&hooks, &self.vm) {
            Err(Error::Refused { refusal, .. }) => {
                ensure!(refusal.text.contains("Watari waits"), "words for users: {refusal}");
            }
            other => bail!("without a handover the target must not be let in: {other:?}"),
        }
        Ok(hooks)
    }

    /// The handover is open, and little is left to send.
    fn converge(&mut self, tag: &str, slow_down: bool, trouble: Trouble) -> anyhow::Result<()> {
        let from = self.at;
        if slow_down {
            self.pair.ctl(from, &["set", "--slow-down", "true"])?;
        }
        self.pair.wait(from, "the link", STEP, |r| r.link.connected)?;
        self.pair.ctl(from, &["open-handover", "--vmi-uid", tag])?;
        if let Trouble::WhileConverging(time) = trouble {
            self.cut(time)?;
        }
        self.pair.wait(from, "the source to converge", STEP * 2, |r| {
            r.link.connected && r.role == "Converging" && r.generations.lag_bytes < CONVERGED_BYTES
        })?;
        Ok(())
    }

    fn migrate(&self, from: usize, to: usize, trouble: Trouble) -> anyhow::Result<(MigrationReport, bool)> {
        let options = MigrationOptions::default();
        let mut migration = self.pods[from].begin_migration(self.pods[to], &self.vm, &options)?;
        let (mut attached_early, mut troubled) = (false, false);
        while migration.running() {
            let target = self.pair.report(to);
            attached_early |= target.is_ok_and(|r| r.role == "Attached" && r.disks.iter().all(|d| d.clients > 0));
            if let Trouble::WhileMigrating(time) = trouble
                && !troubled
                && migration.bytes().memory > MIGRATING_BYTES
            {
                troubled = true;
                self.cut(time)?;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok((migration.finish()?, attached_early))
    }

    fn cut(&self, time: Duration) -> anyhow::Result<()> {
        self.pair.bed.wan.link_down()?;
        std::thread::sleep(time);
        Ok(self.pair.bed.wan.restore()?)
    }

    /// QEMU is gone: virt-launcher says goodbye, the Pod ends, the operator puts a replica Pod on its claims.
    fn pod_ends(&mut self, end: usize, hooks: &Hooks) -> anyhow::Result<()> {
        hooks.shutdown().map_err(|refusal| anyhow::anyhow!("{refusal}"))?;
        let mut process = self.pair.ends[end].sidecar.take().context("a sidecar runs at each end")?;
        process.signal(libc::SIGTERM);
        let status = process.wait(STEP)?;
        ensure!(status.success(), "a sidecar that is asked to end ends well: {status}\n{}", process.tail());
        self.pair.start(end, "replica")
    }

    /// The VM ends in good order, and its Pod with it. The pair stays for the caller to judge.
    pub fn end(self) -> anyhow::Result<Pair<'a>> {
        self.pods[self.at].vm(&self.vm).end()?;
        self.hooks.shutdown().map_err(|refusal| anyhow::anyhow!("{refusal}"))?;
        Ok(self.pair)
    }
}
