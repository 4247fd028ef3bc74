//! The supervisor: starts the worker, and starts it again at once when it crashes.
//!
//! It exists because nothing else is quick enough: kubelet's back-off and QEMU's growing reconnect pauses add up to a
//! paused VM by the second crash. It is one thread without a runtime, allocates next to nothing and keeps no state
//! worth saving: everything the worker needs survives in its folder and in mapped memory (I1, I5).
//!
//! - A worker that is killed, aborts or fails is replaced; what it ended with otherwise is passed on ([`verdict`]).
//! - After [`CRASHES_MAX`] crashes within [`CRASH_WINDOW`] the next worker is asked to be a pass-through; whether its role
//!   allows that is the engine's matter.
//! - A supervisor that is killed takes its worker with it (PDEATHSIG), so that two workers never meet on one folder.
//! - SIGTERM, SIGINT and SIGHUP reach the worker as SIGTERM; it ends when no guest needs it any more, and it alone
//!   decides when that is. A worker started after such a signal is told by `--draining`.

mod policy;

use std::{
    ffi::OsString,
    io::{self, Read},
    os::unix::{
        net::UnixStream,
        process::{CommandExt, parent_id},
    },
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, set_parent_process_death_signal, wait};
use signal_hook::consts::signal::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};

use crate::cli::EXIT_AGAIN;
use policy::Crashes;
pub use policy::{CRASH_WINDOW, CRASHES_MAX, Ended, Verdict, verdict};

/// What to start: the program, and the arguments before the ones that the supervisor adds.
#[derive(Clone, Debug)]
pub struct Worker {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
}

#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    #[error("cannot start the worker {}: {error}", program.display())]
    Start { program: PathBuf, error: io::Error },
    #[error("cannot watch signals: {0}")]
    Signals(io::Error),
}

/// Runs workers until one ends on purpose; returns its exit code.
pub fn supervise(worker: &Worker) -> Result<u8, SupervisorError> {
    let signals = Signals::watch().map_err(SupervisorError::Signals)?;
    let mut crashes = Crashes::default();
    let mut draining = false;
    let mut running = Some(start(worker, &crashes, draining)?);
    let mut start_at = Instant::now();
    loop {
        let patience = match running {
            Some(_) => None,
            None => Some(start_at.saturating_duration_since(Instant::now())),
        };
        signals.wait(patience);
        if signals.take_end() {
            draining = true;
            tracing::info!("asked to end; the worker ends once no guest is connected");
            if let Some(pid) = running {
                // It may have ended this instant; then it is reaped below.
                kill_process(pid, Signal::TERM).ok();
            }
        }
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            // As the container's first process we inherit orphans; they are only reaped.
            if running != Some(pid) {
                continue;
            }
            running = None;
            let ended = ended(status);
            match verdict(ended, crashes.total()) {
                Verdict::PassOn(code) => return Ok(code),
                Verdict::Restart => {
                    let now = Instant::now();
                    start_at = now + crashes.add(now, ended);
                    match ended {
                        Ended::Exited(EXIT_AGAIN) => tracing::info!("the worker asks to be started again"),
                        Ended::Exited(_) | Ended::Killed(_) | Ended::NotStarted => {
                            tracing::error!(%ended, crashes = crashes.total(), pass_through = crashes.pass_through(), "worker crashed; starting another");
                        }
                    }
                }
            }
        }
        if running.is_none() && Instant::now() >= start_at {
            match start(worker, &crashes, draining) {
                Ok(pid) => running = Some(pid),
                Err(error) => {
                    let now = Instant::now();
                    start_at = now + crashes.add(now, Ended::NotStarted);
                    tracing::error!(%error, "trying again");
                }
            }
        }
    }
}

fn start(worker: &Worker, crashes: &Crashes, draining: bool) -> Result<Pid, SupervisorError> {
    let mut command = Command::new(&worker.program);
    command.arg0("watari-sidecar").args(&worker.arguments).arg("--worker");
    command.arg("--restarts").arg(crashes.total().to_string());
    if crashes.pass_through() {
        command.arg("--pass-through");
    }
    if draining {
        command.arg("--draining");
    }
    // A group of its own: what a terminal sends (Ctrl-C, hang-up) reaches the worker only through us.
    command.process_group(0);
    let supervisor = std::process::id();
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // Killed before the line above: then the signal will never come.
            if parent_id() == supervisor { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
        });
    }
    let start = |error| SupervisorError::Start { program: worker.program.clone(), error };
    let child = command.spawn().map_err(start)?;
    // `child` is dropped without waiting: all children are reaped in one place.
    Pid::from_raw(child.id() as i32).ok_or_else(|| start(io::ErrorKind::InvalidData.into()))
}

fn ended(status: WaitStatus) -> Ended {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Ended::Exited(code as u8),
        (None, Some(signal)) => Ended::Killed(signal),
        // Only `WUNTRACED` and `WCONTINUED` report anything else, and neither is asked for.
        (None, None) => Ended::Killed(0),
    }
}

/// Signals as wake-ups on a socket pair, with flags that say which.
struct Signals {
    wake: UnixStream,
    end: Arc<AtomicBool>,
}

impl Signals {
    fn watch() -> io::Result<Signals> {
        let (wake, send) = UnixStream::pair()?;
        let end = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT, SIGHUP] {
            // The flag first: a wake-up must never be seen without it.
            signal_hook::flag::register(signal, Arc::clone(&end))?;
        }
        for signal in [SIGTERM, SIGINT, SIGHUP, SIGCHLD] {
            signal_hook::low_level::pipe::register(signal, send.try_clone()?)?;
        }
        Ok(Signals { wake, end })
    }

    /// Returns after a signal or after `patience`; may return early.
    fn wait(&self, patience: Option<Duration>) {
        if patience.is_some_and(|patience| patience.is_zero()) {
            return;
        }
        let mut bytes = [0; 64];
        if self.wake.set_read_timeout(patience).is_ok() {
            // Many signals may share a wake-up; an interrupted or timed-out read is as good as one.
            let _ = (&self.wake).read(&mut bytes);
        } else {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn take_end(&self) -> bool {
        self.end.swap(false, Ordering::SeqCst)
    }
}
