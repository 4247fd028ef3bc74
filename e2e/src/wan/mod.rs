//! The WAN between two namespaces: a TUN device in each, and a thread per direction that forwards IP packets.
//!
//! TCP, QEMU's migration stream and routed Pod networks cross it unchanged. Everything about it can change while it runs
//! ([`Wan::change`], or lines on the control socket, see [`control`]).
//!
//! Accuracy (tested in `tests/wan.rs`): rate within 5 %, delay within 2 ms, loss within chance, order kept.
//! Frames may carry many TCP segments where one such frame takes about a millisecond or less
//! ([`SEGMENTATION_RATE_MIN`]) and no loss is asked for; otherwise each packet of the MTU is queued, delayed and lost on its
//! own. Its limit is the machine's: see `wan_limit` in `tests/wan.rs`, which prints it.
//!
//! Does not shape per flow, does not corrupt or duplicate packets, and does not know of ICMP.

pub mod control;
pub mod link;
mod tun;

use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::netns;
pub use link::{Counters, Shape};
use link::{Link, Nanos};
use tun::{FRAME_BYTES_MAX, Tun};

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Netns(#[from] netns::Error),
    #[error("cannot make a TUN device (is /dev/net/tun there, are we root?): {0}")]
    Tun(io::Error),
    #[error("control socket {path}: {source}")]
    Control { path: PathBuf, source: io::Error },
}

/// From this rate on a full 64 KiB frame takes at most about a millisecond on the wire.
pub const SEGMENTATION_RATE_MIN: u64 = 500_000_000;
/// The forwarding thread looks at most this often, so that a fast link costs few wake-ups; it bounds the added delay.
const NAP: Duration = Duration::from_micros(200);
/// Without traffic it looks this often whether it shall end.
const IDLE: Duration = Duration::from_millis(50);
/// Frames read before deliveries get their turn.
const BATCH_FRAMES: usize = 64;
/// The name of the device in both namespaces.
pub const DEVICE: &str = "wan0";

/// Which way packets travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    AToB,
    BToA,
}

impl Direction {
    pub const BOTH: [Direction; 2] = [Direction::AToB, Direction::BToA];
    fn index(self) -> usize {
        self as usize
    }
}

impl FromStr for Direction {
    type Err = String;
    fn from_str(text: &str) -> Result<Direction, String> {
        match text {
            "a-to-b" => Ok(Direction::AToB),
            "b-to-a" => Ok(Direction::BToA),
            _ => Err(format!("unknown direction {text} (known: a-to-b, b-to-a, both)")),
        }
    }
}

/// One end: the namespace's file (`/run/netns/NAME`, `/proc/PID/ns/net`) and the address (with prefix length) that the device gets there.
#[derive(Clone, Debug)]
pub struct End {
    pub netns: PathBuf,
    pub address: String,
}

/// A snapshot of everything.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub a_to_b: DirectionReport,
    pub b_to_a: DirectionReport,
    pub carrier: bool,
}

/// One direction's behaviour and counts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DirectionReport {
    pub shape: Shape,
    pub counters: Counters,
    /// Processor time that forwarding has cost, in seconds.
    pub cpu_seconds: f64,
}

struct Lane {
    shape: Mutex<Shape>,
    /// Raised with each change of `shape`, so that the thread need not lock for each packet.
    version: AtomicU64,
    counters: Mutex<Counters>,
    cpu_nanos: AtomicU64,
}

struct Shared {
    ends: [Tun; 2],
    lanes: [Lane; 2],
    stop: AtomicBool,
    carrier: AtomicBool,
    epoch: Instant,
}

/// A running link. Ends with its value, and takes the devices with it.
pub struct Wan {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Wan {
    /// Connects two namespaces. `seed` makes loss and jitter repeatable.
    pub fn start(a: &End, b: &End, mtu: u32, shape: Shape, seed: u64) -> Result<Wan, Error> {
        let ends = [Tun::create(&a.netns, DEVICE, &a.address, mtu)?, Tun::create(&b.netns, DEVICE, &b.address, mtu)?];
        let lane = || Lane {
            shape: Mutex::new(shape),
            version: AtomicU64::new(0),
            counters: Mutex::default(),
            cpu_nanos: AtomicU64::new(0),
        };
        let shared = Arc::new(Shared {
            ends,
            lanes: [lane(), lane()],
            stop: AtomicBool::new(false),
            carrier: AtomicBool::new(true),
            epoch: Instant::now(),
        });
        let threads = Direction::BOTH
            .into_iter()
            .map(|direction| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("wan {direction:?}"))
                    .spawn(move || forward(&shared, direction, seed))
                    .map_err(Error::Tun)
            })
            .collect::<Result<_, _>>()?;
        Ok(Wan { shared, threads })
    }

    /// Changes one direction.
    pub fn change(&self, direction: Direction, change: impl FnOnce(&mut Shape)) {
        self.shared.change(direction, change);
    }
    /// Changes both directions alike.
    pub fn change_both(&self, change: impl Fn(&mut Shape)) {
        Direction::BOTH.into_iter().for_each(|direction| self.change(direction, &change));
    }
    /// Cuts both directions silently: packets under way are lost, senders are told nothing.
    pub fn cut(&self) {
        self.change_both(|shape| shape.cut = true);
    }
    /// Swallows everything in one direction; the other still works.
    pub fn black_hole(&self, direction: Direction) {
        self.change(direction, |shape| shape.cut = true);
    }
    /// Ends cuts and black holes, plugs the cables in.
    pub fn restore(&self) -> io::Result<()> {
        self.change_both(|shape| shape.cut = false);
        self.shared.set_carrier(true)
    }
    /// Unplugs the cables: as a cut, and the devices show no carrier.
    pub fn link_down(&self) -> io::Result<()> {
        self.cut();
        self.shared.set_carrier(false)
    }
    /// Behaviour and counters now.
    pub fn report(&self) -> Report {
        self.shared.report()
    }
    /// Bytes of IP that have crossed, both directions together.
    pub fn bytes_delivered(&self) -> u64 {
        let report = self.report();
        report.a_to_b.counters.delivered_bytes + report.b_to_a.counters.delivered_bytes
    }
    /// Serves the control socket until the link ends.
    pub fn serve_control(&mut self, path: PathBuf) -> Result<(), Error> {
        let thread = control::serve(Arc::clone(&self.shared), path)?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for Wan {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn shape(&self, direction: Direction) -> MutexGuard<'_, Shape> {
        self.lanes[direction.index()].shape.lock().expect("holders only copy and assign")
    }

    fn change(&self, direction: Direction, change: impl FnOnce(&mut Shape)) {
        change(&mut self.shape(direction));
        self.lanes[direction.index()].version.fetch_add(1, Ordering::SeqCst);
    }

    fn set_carrier(&self, on: bool) -> io::Result<()> {
        self.carrier.store(on, Ordering::SeqCst);
        self.ends.iter().try_for_each(|end| end.set_carrier(on))
    }

    fn report(&self) -> Report {
        let lane = |direction: Direction| DirectionReport {
            shape: *self.shape(direction),
            counters: *self.lanes[direction.index()].counters.lock().expect("holders only copy"),
            cpu_seconds: self.lanes[direction.index()].cpu_nanos.load(Ordering::Relaxed) as f64 / 1e9,
        };
        Report {
            a_to_b: lane(Direction::AToB),
            b_to_a: lane(Direction::BToA),
            carrier: self.carrier.load(Ordering::SeqCst),
        }
    }

    fn now(&self) -> Nanos {
        self.epoch.elapsed().as_nanos() as Nanos
    }
}

/// The loop of one direction: take what came, deliver what is due, sleep until something is.
fn forward(shared: &Shared, direction: Direction, seed: u64) {
    let lane = &shared.lanes[direction.index()];
    let (near, far) = (&shared.ends[direction.index()], &shared.ends[1 - direction.index()]);
    let mut link = Link::new(*shared.shape(direction), seed.wrapping_add(direction.index() as u64));
    let mut version = u64::MAX;
    let mut buffer = vec![0; FRAME_BYTES_MAX];
    be_punctual();
    while !shared.stop.load(Ordering::Relaxed) {
        let current = lane.version.load(Ordering::SeqCst);
        if current != version {
            version = current;
            let shape = *shared.shape(direction);
            link.set_shape(shape, shared.now());
            let together = shape.loss == 0.0 && shape.rate.is_none_or(|rate| rate >= SEGMENTATION_RATE_MIN);
            // Without it frames stay small, which costs speed only.
            let _ = near.set_segmentation(together);
        }
        let mut busy = false;
        for _ in 0..BATCH_FRAMES {
            // A device that vanished (its namespace was removed) reads as an error: then there is nothing to forward.
            let Ok(Some(packet)) = near.read(&mut buffer) else { break };
            link.offer(packet, shared.now());
            busy = true;
        }
        let now = shared.now();
        while let Some(packet) = link.deliver(now) {
            if far.write(&packet.frame).is_err() {
                link.undeliverable(&packet);
            }
            busy = true;
        }
        *lane.counters.lock().expect("holders only copy") = link.counters();
        lane.cpu_nanos.store(thread_cpu_nanos(), Ordering::Relaxed);
        if busy {
            // Packets come in trains; a short nap lets the next batch gather.
            std::thread::sleep(NAP);
            continue;
        }
        let wait =
            link.next_event().map_or(IDLE, |due| Duration::from_nanos(due.saturating_sub(shared.now())).min(IDLE));
        wait_readable(near, wait);
    }
}

/// Sleeps until the device has a frame or the time is over.
fn wait_readable(tun: &Tun, wait: Duration) {
    let mut poll = libc::pollfd { fd: tun.descriptor(), events: libc::POLLIN, revents: 0 };
    let timeout = libc::timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
    // SAFETY: one pollfd and one timespec that live across the call; no signal mask.
    let result = unsafe { libc::ppoll(&mut poll, 1, &timeout, std::ptr::null()) };
    if result > 0 && poll.revents & libc::POLLIN == 0 {
        // POLLERR (no carrier, device down) would make this a busy loop.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Lets this thread's timers fire within a microsecond instead of the usual 50, and lets it go first on a busy machine:
/// a late packet would be a property of the test machine, not of the emulated link.
fn be_punctual() {
    const NICE: libc::c_int = -15;
    // SAFETY: both change the calling thread only (on Linux a "process" 0 of setpriority is the thread). Without the right
    // to do so nothing happens, and accuracy depends on the machine's load.
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, 1000);
        libc::setpriority(libc::PRIO_PROCESS, 0, NICE);
    }
}

fn thread_cpu_nanos() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec that lives across the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
