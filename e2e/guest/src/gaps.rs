//! How long was the guest interrupted? A 1 ms heartbeat, the times of fsync'd writes, and the machine's real-time clock.
//!
//! A stopped machine's own clock stands still, so the two largest gaps seen by it miss the pause itself. The CMOS
//! real-time clock follows the host: its seconds are watched at every heartbeat, and when a second arrives earlier than
//! the guest's clock says, the machine stood still for the difference. A heartbeat that comes late makes a tick *look*
//! late, never early, so only a lasting jump counts (the highest of the last few offsets is the reference).
//! Accuracy: about two heartbeats. Stops of up to an hour are told.

use std::arch::asm;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use watari_guest::report::Gaps;

const HEARTBEAT: Duration = Duration::from_millis(1);
/// Jumps below this are within the accuracy of watching a tick from a 1 ms heartbeat.
const JUMP_MIN_NANOS: i64 = 3_000_000;
/// Offsets remembered as the reference: more than the ticks one busy second can disturb.
const REFERENCE_TICKS: usize = 4;
/// A clock difference beyond this is nonsense from being stopped between two readings, not a gap.
const NONSENSE_NANOS: i64 = 3_600_000_000_000;

static ANOMALIES: AtomicU64 = AtomicU64::new(0);

/// Nanoseconds of the monotonic clock.
pub fn now_nanos() -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec that lives across the call; CLOCK_MONOTONIC always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

/// Time from `earlier` to `later`; a backward or absurd step counts as an anomaly and as no time.
pub fn elapsed(earlier: i64, later: i64) -> i64 {
    match later - earlier {
        good @ 0..NONSENSE_NANOS => good,
        _ => {
            ANOMALIES.fetch_add(1, Ordering::Relaxed);
            0
        }
    }
}

/// Clock differences that made no sense since boot.
pub fn anomalies() -> u64 {
    ANOMALIES.load(Ordering::Relaxed)
}

/// What was measured since the last reset.
#[derive(Default)]
pub struct Recorder(Mutex<State>);

#[derive(Default)]
struct State {
    largest: Gaps,
    /// Largest gaps since the last tick, by the guest's clock.
    heartbeat: i64,
    fsync: i64,
    last_fsync: Option<i64>,
    last_tick: i64,
    /// Recent differences real-time clock − guest clock at a tick.
    offsets: Vec<i64>,
    /// The stop found at the last tick, counted over consecutive ticks.
    jump: i64,
}

fn millis(nanos: i64) -> f64 {
    nanos as f64 / 1e6
}

fn raise(value: &mut f64, nanos: i64) {
    *value = value.max(millis(nanos));
}

impl Recorder {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no holder of this lock panics: a panic ends the machine")
    }

    /// A durable write completed now.
    pub fn fsynced(&self, now: i64) {
        let mut state = self.state();
        if let Some(last) = state.last_fsync {
            let gap = elapsed(last, now);
            state.fsync = state.fsync.max(gap);
            // The stop may have been found at a tick inside this gap: the clock lacks it.
            let lacking = if last < state.last_tick { state.jump } else { 0 };
            raise(&mut state.largest.fsync_ms, gap + lacking);
        }
        state.last_fsync = Some(now);
    }

    /// Durable writes stop or start on purpose: the time in between is not a gap.
    pub fn fsync_interrupted(&self) {
        self.state().last_fsync = None;
    }

    /// Forgets the largest gaps; the clocks' relation stays known.
    pub fn reset(&self) {
        let mut state = self.state();
        let ticks = state.largest.ticks;
        state.largest = Gaps { ticks, ..Gaps::default() };
        (state.heartbeat, state.fsync, state.last_fsync) = (0, 0, None);
    }

    /// The largest gaps since the last reset. A stop shows up with the second tick after it.
    pub fn read(&self) -> Gaps {
        self.state().largest.clone()
    }

    fn beat(&self, gap: i64) {
        let mut state = self.state();
        state.heartbeat = state.heartbeat.max(gap);
        raise(&mut state.largest.heartbeat_ms, gap);
        raise(&mut state.largest.pause_ms, gap);
    }

    /// The real-time clock has just ticked to `rtc` (nanoseconds on a scale of its own).
    fn tick(&self, rtc: i64, now: i64) {
        let mut state = self.state();
        let offset = rtc - now;
        let reference = state.offsets.iter().copied().max();
        let jump = reference.map_or(0, |reference| offset - reference);
        if jump >= JUMP_MIN_NANOS {
            state.jump += jump;
            state.offsets.clear();
            state.largest.stopped_total_ms += millis(jump);
            let (stopped, heartbeat, fsync) = (state.jump, state.heartbeat, state.fsync);
            raise(&mut state.largest.stopped_ms, stopped);
            raise(&mut state.largest.pause_ms, stopped + heartbeat);
            if fsync > 0 {
                raise(&mut state.largest.fsync_ms, stopped + fsync);
            }
        } else {
            state.jump = 0;
        }
        if state.offsets.len() == REFERENCE_TICKS {
            state.offsets.remove(0);
        }
        state.offsets.push(offset);
        state.largest.ticks += 1;
        (state.heartbeat, state.fsync, state.last_tick) = (0, 0, now);
    }
}

/// Starts the heartbeat thread.
pub fn start_heartbeat(recorder: Arc<Recorder>) {
    std::thread::Builder::new()
        .name("heartbeat".into())
        .spawn(move || {
            let rtc = RealTimeClock::open();
            let mut last = now_nanos();
            let mut seconds = rtc.as_ref().map(RealTimeClock::seconds);
            let mut scale = 0i64;
            loop {
                std::thread::sleep(HEARTBEAT);
                let now = now_nanos();
                recorder.beat(elapsed(last, now));
                last = now;
                if let (Some(rtc), Some(before)) = (&rtc, seconds) {
                    let after = rtc.seconds();
                    if after != before {
                        scale += (after - before).rem_euclid(3600) * 1_000_000_000;
                        seconds = Some(after);
                        recorder.tick(scale, now_nanos());
                    }
                }
            }
        })
        .expect("a booted guest has memory for one more thread");
}

/// The CMOS clock behind ports 0x70 and 0x71. Linux reads it at boot only, so nobody contends for the index port.
struct RealTimeClock {
    binary: bool,
}

impl RealTimeClock {
    /// For the calling thread only. `None` when there is no such clock.
    fn open() -> Option<RealTimeClock> {
        // SAFETY: grants this thread access to two I/O ports that no driver uses after boot; touches no memory.
        if unsafe { libc::syscall(libc::SYS_ioperm, 0x70, 2, 1) } != 0 {
            return None;
        }
        let status_b = read_cmos(0x0b);
        (status_b != 0xff).then_some(RealTimeClock { binary: status_b & 4 != 0 })
    }

    /// Seconds within the hour.
    fn seconds(&self) -> i64 {
        loop {
            let (second, minute, again) = (read_cmos(0), read_cmos(2), read_cmos(0));
            if second == again {
                return self.decode(minute) * 60 + self.decode(second);
            }
        }
    }

    fn decode(&self, byte: u8) -> i64 {
        if self.binary { i64::from(byte) } else { i64::from(byte >> 4) * 10 + i64::from(byte & 15) }
    }
}

fn read_cmos(index: u8) -> u8 {
    let value: u8;
    // SAFETY: ioperm granted both ports to this thread; an OUT and an IN touch no memory.
    unsafe {
        asm!("out 0x70, al", in("al") index, options(nomem, nostack, preserves_flags));
        asm!("in al, 0x71", out("al") value, options(nomem, nostack, preserves_flags));
    }
    value
}
