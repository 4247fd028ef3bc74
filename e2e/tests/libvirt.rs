//! The libvirt pair itself, with nbdkit as a stand-in for the sidecar's data path and our real hook server in front of it.
//!
//! nbdkit replicates nothing, so these tests copy the disks while the guest's writers are paused; one test does not, and proves that
//! the guest notices. What the sidecar adds is tested where the sidecar is.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use watari_e2e::libvirt::{Error, LibvirtSite, MigrationOptions, VirtualMachine};
use watari_e2e::process::{Process, wait_until};
use watari_e2e::qemu::Machine;
use watari_e2e::site::{Site, TestBed};
use watari_e2e::wan::Shape;
use watari_hook::{Gate, HookConfig, HookEngine, HookServer, SyncedDisk, Vmi};

const MIB: u64 = 1 << 20;
const BOOT: Duration = Duration::from_secs(60);
const ANSWER: Duration = Duration::from_secs(60);
const DISK_BYTES: u64 = 64 * MIB;

/// The engine behind the hook server: everything is served already; the gate is the test's.
struct Engine {
    disks: Vec<SyncedDisk>,
    gate: Mutex<Gate>,
    served: Mutex<usize>,
}

impl HookEngine for Engine {
    async fn disks(&self) -> Vec<SyncedDisk> {
        self.disks.clone()
    }
    async fn gate(&self, _vmi: &Vmi) -> Gate {
        self.gate.lock().expect("not poisoned").clone()
    }
    async fn prepare(&self, _volume: &str) -> Result<(), String> {
        *self.served.lock().expect("not poisoned") += 1;
        Ok(())
    }
    async fn shutdown(&self) {}
}

/// The hook server, on a thread inside the site, so that it sees the paths that QEMU sees.
struct Hook {
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<std::io::Result<anyhow::Result<()>>>>,
}

impl Hook {
    fn start(libvirt: &LibvirtSite, engine: Arc<Engine>, marker: Option<PathBuf>) -> anyhow::Result<Hook> {
        let config = HookConfig { folder: libvirt.sidecar_folder()?, reconnect_seconds: 120, marker };
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = libvirt.spawn_inside(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let _server = HookServer::start(config, engine).await?;
                // An error means that the sender is gone, which is a stop as well.
                let _ = stopped.await;
                Ok(())
            })
        })?;
        Ok(Hook { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Hook {
    fn drop(&mut self) {
        drop(self.stop.take());
        // What went wrong in there shows as a missing answer.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A site with its stand-in sidecar. Fields drop in order: nbdkit before the namespace that it lives in.
struct Place {
    hook: Option<Hook>,
    engine: Arc<Engine>,
    kits: Vec<Process>,
    images: Vec<PathBuf>,
    libvirt: LibvirtSite,
}

impl Place {
    fn start(site: &Site, vm: &VirtualMachine, images_in: &Path, marker: Option<&str>) -> anyhow::Result<Place> {
        let libvirt = LibvirtSite::start(site)?;
        libvirt.folder_inside("/run/watari")?;
        let (mut kits, mut images, mut disks) = (Vec::new(), Vec::new(), Vec::new());
        for volume in &vm.machine.disks {
            let image = images_in.join(format!("{volume}.img"));
            std::fs::File::create(&image)?.set_len(DISK_BYTES)?;
            let socket = format!("/run/watari/{volume}.sock");
            let kit = libvirt
                .command(site, &format!("nbdkit-{volume}"), "nbdkit")
                .args(["-f", "-U", &socket, "--filter=log", "file"])
                .arg(&image)
                .arg(format!("logfile={}", nbd_log(&site.dir, volume).display()))
                .spawn()?;
            wait_until("nbdkit's socket", Duration::from_secs(20), || libvirt.inside(&socket).exists().then_some(()))?;
            kits.push(kit);
            images.push(image);
            disks.push(SyncedDisk { volume: volume.clone(), export: volume.clone(), socket });
        }
        let engine = Arc::new(Engine { disks, gate: Mutex::new(Gate::Ready), served: Mutex::new(0) });
        let hook = Some(Hook::start(&libvirt, engine.clone(), marker.map(PathBuf::from))?);
        Ok(Place { hook, engine, kits, images, libvirt })
    }

    fn set_gate(&self, gate: Gate) {
        *self.engine.gate.lock().expect("not poisoned") = gate;
    }
}

fn nbd_log(folder: &Path, volume: &str) -> PathBuf {
    folder.join(format!("nbd-{volume}.log"))
}

/// Reads, writes and flushes in nbdkit's log, in order, with their time within the day.
fn operations(site: &Site, volume: &str) -> anyhow::Result<Vec<String>> {
    let log = std::fs::read_to_string(nbd_log(&site.dir, volume))?;
    let wanted = [" Read ", " Write ", " Flush ", " Connect ", " Disconnect "];
    Ok(log.lines().filter(|line| wanted.iter().any(|w| line.contains(w))).map(str::to_owned).collect())
}

fn copy_images(from: &Place, to: &Place) -> anyhow::Result<()> {
    for (from, to) in from.images.iter().zip(&to.images) {
        std::fs::copy(from, to)?;
    }
    Ok(())
}

struct Pair {
    a: Place,
    b: Place,
    bed: TestBed,
}

/// Different images at the two sites.
fn pair(label: &str, vm: &VirtualMachine) -> anyhow::Result<Pair> {
    pair_with(label, vm, false, None)
}

fn pair_with(label: &str, vm: &VirtualMachine, shared_images: bool, marker: Option<&str>) -> anyhow::Result<Pair> {
    let bed = TestBed::new(label, Shape::wan(1_000_000_000, Duration::from_millis(10)))?;
    let images_of = |site: &Site| if shared_images { bed.dir.clone() } else { site.dir.clone() };
    let place = |site: &Site| Place::start(site, vm, &images_of(site), marker);
    let (a, b) = (place(&bed.a)?, place(&bed.b)?);
    Ok(Pair { a, b, bed })
}

fn two_disks() -> VirtualMachine {
    VirtualMachine::new("vm", Machine::small(2).with("rate=2500000"))
}

#[test]
fn a_vm_defined_by_three_lossy_hook_calls_moves_there_and_back_with_its_data() -> anyhow::Result<()> {
    let vm = two_disks();
    let Pair { bed, a, b } = pair("libvirt-back-and-forth", &vm)?;
    let hooks = (a.libvirt.hooks()?, b.libvirt.hooks()?);
    let defined = a.libvirt.define_through_hook(&hooks.0, &vm)?;
    ensure!(defined.matches("<reconnect delay=\"120\"/>").count() == 2, "{defined}");
    ensure!(*a.engine.served.lock().expect("not poisoned") == 6, "two volumes, three calls");
    let began = Instant::now();
    let running = a.libvirt.start_vm(&vm)?;
    let mut guest = running.control();
    let hello = guest.hello(BOOT).with_context(|| running.serial())?;
    println!("up after {:.1} s: {hello:?}", began.elapsed().as_secs_f64());
    let live = running.xml()?;
    for part in [
        "<reconnect delay='120'/>",
        "socket='/run/watari/disk1.sock'",
        "name='ua-watari-disk0'",
        "rerror_policy='stop'",
    ] {
        ensure!(live.contains(part), "no {part} in {live}");
    }

    let ways = [(&a, &b, &hooks.1, &bed.a, &bed.b), (&b, &a, &hooks.0, &bed.b, &bed.a)];
    for (from, to, hooks_to, site_from, site_to) in ways {
        guest.resume()?;
        std::thread::sleep(Duration::from_secs(2));
        guest.pause(ANSWER)?;
        copy_images(from, to)?;
        let before = operations(site_to, "disk0")?.len();
        to.libvirt.wait_at_gate(hooks_to, &vm, Duration::from_secs(5))?;
        let report = from.libvirt.migrate_to(&to.libvirt, &vm, &MigrationOptions::default())?;
        println!("{} to {}: {report:?}", from.libvirt.name, to.libvirt.name);
        ensure!(report.bytes.memory > MIB && report.bytes.disks > 0, "memory and the copied disk crossed the WAN");
        ensure!(to.libvirt.vm(&vm).state()?.starts_with("running"), "{}", to.libvirt.vm(&vm).state()?);
        guest.move_to(to.libvirt.vm(&vm).control_socket());
        let verdict = guest.verify(ANSWER)?;
        ensure!(verdict.clean(), "{verdict:?}");
        // Not a point in time that anyone may rely on: the source's QEMU closes its disks about when the target's goes on.
        let left = wait_until("the source's goodbye", Duration::from_secs(10), || {
            operations(site_from, "disk0").ok().filter(|seen| seen.last().is_some_and(|op| op.contains(" Disconnect ")))
        })?;
        let late = left.iter().rev().skip(1).take_while(|op| op.contains(" Flush ")).count();
        println!("flushes at the source after its last other operation: {late}");
        ensure!(late > 0, "the source flushes before it leaves: {left:?}");
        let seen = operations(site_to, "disk0")?;
        let premature = seen.get(before + 1).cloned().unwrap_or_default();
        println!("first at the target: {:?}", &seen[before..seen.len().min(before + 3)]);
        ensure!(
            premature.contains(" Read ") && premature.contains("offset=0x0"),
            "QEMU reads before it may: {premature}"
        );
    }
    let stats = guest.stats()?;
    ensure!(stats.streams.iter().all(|s| s.errors == 0), "{stats:?}");
    a.libvirt.vm(&vm).end()?;
    Ok(())
}

/// The rig itself loses nothing: with one file behind both NBD servers whatever the guest misses would be the rig's fault.
#[test]
fn a_guest_that_goes_on_writing_moves_again_and_again_on_shared_images_and_misses_nothing() -> anyhow::Result<()> {
    let moves: usize = std::env::var("WATARI_E2E_MOVES").ok().map(|n| n.parse()).transpose()?.unwrap_or(3);
    let vm = two_disks();
    let Pair { bed: _bed, a, b } = pair_with("libvirt-shared", &vm, true, None)?;
    let hooks = [a.libvirt.hooks()?, b.libvirt.hooks()?];
    a.libvirt.define_through_hook(&hooks[0], &vm)?;
    let mut guest = a.libvirt.start_vm(&vm)?.control();
    guest.hello(BOOT)?;
    guest.resume()?;
    for number in 0..moves {
        let ends = [&a, &b];
        let (from, to) = (ends[number % 2], ends[(number + 1) % 2]);
        to.libvirt.wait_at_gate(&hooks[(number + 1) % 2], &vm, Duration::from_secs(5))?;
        let report = from.libvirt.migrate_to(&to.libvirt, &vm, &MigrationOptions::default())?;
        guest.move_to(to.libvirt.vm(&vm).control_socket());
        let stats = guest.stats()?;
        println!("move {number}: {report:?}, {} operations", stats.streams.iter().map(|s| s.acknowledged).sum::<u64>());
        ensure!(stats.streams.iter().all(|s| s.errors == 0), "{stats:?}");
    }
    let verdict = guest.verify(ANSWER)?;
    ensure!(verdict.clean(), "{verdict:?}");
    Ok(())
}

#[test]
fn a_guest_whose_disk_stayed_behind_notices() -> anyhow::Result<()> {
    let vm = two_disks();
    let Pair { bed: _bed, a, b } = pair("libvirt-stale", &vm)?;
    a.libvirt.define_through_hook(&a.libvirt.hooks()?, &vm)?;
    let mut guest = a.libvirt.start_vm(&vm)?.control();
    guest.hello(BOOT)?;
    guest.resume()?;
    std::thread::sleep(Duration::from_secs(1));
    copy_images(&a, &b)?;
    std::thread::sleep(Duration::from_secs(1));
    b.libvirt.prepare_target(&b.libvirt.hooks()?, &vm)?;
    a.libvirt.migrate_to(&b.libvirt, &vm, &MigrationOptions::default())?;
    guest.move_to(b.libvirt.vm(&vm).control_socket());
    let verdict = guest.verify(ANSWER)?;
    println!("{verdict:?}");
    ensure!(!verdict.clean(), "what was written after the copy is missing, and nobody noticed: {verdict:?}");
    Ok(())
}

#[test]
fn without_any_copyable_disk_libvirt_refuses_and_the_vm_goes_on_where_it_is() -> anyhow::Result<()> {
    let vm = VirtualMachine { empty_disk: false, ..two_disks() };
    let Pair { bed: _bed, a, b } = pair("libvirt-no-copyable", &vm)?;
    a.libvirt.define_through_hook(&a.libvirt.hooks()?, &vm)?;
    let mut guest = a.libvirt.start_vm(&vm)?.control();
    guest.hello(BOOT)?;
    b.libvirt.prepare_target(&b.libvirt.hooks()?, &vm)?;
    let refused =
        a.libvirt.migrate_to(&b.libvirt, &vm, &MigrationOptions::default()).err().context("a refusal")?.to_string();
    println!("{refused}");
    ensure!(refused.contains("NBD URI must be supplied when migration URI uses UNIX transport method"), "{refused}");
    ensure!(a.libvirt.vm(&vm).state()?.starts_with("running"));
    guest.stats()?;
    Ok(())
}

#[test]
fn the_marker_that_our_hook_adds_is_copied_and_lets_a_vm_without_other_disks_move() -> anyhow::Result<()> {
    let vm = VirtualMachine { empty_disk: false, ..two_disks() };
    let Pair { bed: _bed, a, b } = pair_with("libvirt-marker", &vm, false, Some("/run/watari/marker.img"))?;
    let defined = a.libvirt.define_through_hook(&a.libvirt.hooks()?, &vm)?;
    ensure!(defined.matches("ua-watarimarker").count() == 1, "once in three calls: {defined}");
    let running = a.libvirt.start_vm(&vm)?;
    let live = running.xml()?;
    ensure!(live.matches("<controller type='sata'").count() == 1, "no controller was added: {live}");
    let mut guest = running.control();
    guest.hello(BOOT)?;
    b.libvirt.wait_at_gate(&b.libvirt.hooks()?, &vm, Duration::from_secs(5))?;
    let report = a.libvirt.migrate_to(&b.libvirt, &vm, &MigrationOptions::default())?;
    println!("{report:?}");
    guest.move_to(b.libvirt.vm(&vm).control_socket());
    guest.stats()?;
    ensure!(b.libvirt.vm(&vm).state()?.starts_with("running"));
    Ok(())
}

#[test]
fn a_shut_gate_keeps_the_vm_out_and_an_aborted_migration_leaves_it_at_the_source() -> anyhow::Result<()> {
    let vm = two_disks();
    let Pair { bed, a, b } = pair("libvirt-abort", &vm)?;
    a.libvirt.define_through_hook(&a.libvirt.hooks()?, &vm)?;
    let mut guest = a.libvirt.start_vm(&vm)?.control();
    guest.hello(BOOT)?;

    let hooks = b.libvirt.hooks()?;
    b.set_gate(Gate::NotYet("waiting for 3 MiB of disk disk0 from site a".into()));
    let refused = b.libvirt.wait_at_gate(&hooks, &vm, Duration::from_secs(2));
    ensure!(
        matches!(&refused, Err(Error::Refused { refusal, .. }) if refusal.text.contains("waiting for 3 MiB")),
        "{refused:?}"
    );
    b.set_gate(Gate::Ready);
    b.libvirt.wait_at_gate(&hooks, &vm, Duration::from_secs(2))?;

    // Slow enough to be caught in the middle.
    bed.wan.change_both(|shape| shape.rate = Some(8_000_000));
    let mut migration = a.libvirt.begin_migration(&b.libvirt, &vm, &MigrationOptions::default())?;
    wait_until("memory on the wire", Duration::from_secs(60), || (migration.bytes().memory > MIB).then_some(()))?;
    ensure!(migration.running());
    migration.abort()?;
    let failed = migration.finish().err().context("aborted")?.to_string();
    println!("{failed}");
    ensure!(a.libvirt.vm(&vm).state()?.starts_with("running"), "{}", a.libvirt.vm(&vm).state()?);
    ensure!(b.libvirt.vm(&vm).state().is_err(), "nothing is left at the target");
    guest.stats()?;

    // And the next attempt, on a link that is in order, succeeds.
    bed.wan.change_both(|shape| shape.rate = Some(1_000_000_000));
    guest.pause(ANSWER)?;
    copy_images(&a, &b)?;
    b.libvirt.prepare_target(&hooks, &vm)?;
    a.libvirt.migrate_to(&b.libvirt, &vm, &MigrationOptions::default())?;
    guest.move_to(b.libvirt.vm(&vm).control_socket());
    ensure!(guest.verify(ANSWER)?.clean());
    Ok(())
}

#[test]
fn a_killed_nbd_server_is_waited_for_and_a_restarted_hook_server_is_still_found() -> anyhow::Result<()> {
    let vm = two_disks();
    let Pair { bed, mut a, b: _b } = pair("libvirt-reconnect", &vm)?;
    let hooks = a.libvirt.hooks()?;
    a.libvirt.define_through_hook(&hooks, &vm)?;
    let running = a.libvirt.start_vm(&vm)?;
    let mut guest = running.control();
    guest.hello(BOOT)?;
    guest.resume()?;
    std::thread::sleep(Duration::from_secs(1));
    a.kits[0].kill9();
    std::fs::remove_file(a.libvirt.inside("/run/watari/disk0.sock"))?;
    std::thread::sleep(Duration::from_secs(3));
    let stalled = a.libvirt.vm(&vm).state()?;
    ensure!(stalled.starts_with("running"), "requests wait, the VM is not paused: {stalled}");
    a.kits[0] = a
        .libvirt
        .command(&bed.a, "nbdkit-disk0-again", "nbdkit")
        .args(["-f", "-U", "/run/watari/disk0.sock", "file"])
        .arg(&a.images[0])
        .spawn()?;
    // QEMU tries again after 1, 2, 4, 8 s.
    let paused = guest.pause(ANSWER)?;
    ensure!(paused.streams.iter().all(|s| s.errors == 0), "{paused:?}");
    ensure!(guest.verify(ANSWER)?.clean());

    drop(a.hook.take());
    a.hook = Some(Hook::start(&a.libvirt, a.engine.clone(), None)?);
    a.libvirt.vm(&vm).end()?;
    hooks.shutdown().map_err(|refusal| anyhow::anyhow!("{refusal}"))?;
    Ok(())
}

#[test]
fn a_site_leaves_no_process_and_no_mount_behind_whatever_runs_in_it() -> anyhow::Result<()> {
    let vm = two_disks();
    let Pair { bed, a, b } = pair("libvirt-teardown", &vm)?;
    a.libvirt.define_through_hook(&a.libvirt.hooks()?, &vm)?;
    let qemu = a.libvirt.start_vm(&vm)?.qemu_pid()?;
    let alive = |pid: i32| Path::new(&format!("/proc/{pid}/exe")).read_link().is_ok();
    ensure!(alive(qemu));
    let inside = |bed: &TestBed| -> anyhow::Result<String> {
        let pids = |site: &Site| Command::new("ip").args(["netns", "pids", site.netns.name()]).output();
        Ok([pids(&bed.a)?, pids(&bed.b)?].iter().map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).collect())
    };
    ensure!(!inside(&bed)?.is_empty());
    drop((a, b));
    wait_until("QEMU's end", Duration::from_secs(10), || (!alive(qemu)).then_some(()))?;
    wait_until("empty namespaces", Duration::from_secs(10), || inside(&bed).ok().filter(|pids| pids.is_empty()))?;
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    ensure!(!mounts.contains(&bed.dir.display().to_string()), "{mounts}");
    Ok(())
}
