//! Child processes that cannot outlive us, with their output in a log file.
//!
//! The kernel kills a child when the *thread* that made it ends (PR_SET_PDEATHSIG), so all children are made by one thread
//! that lives as long as the process. Daemons that make children of their own are run in a process namespace
//! ([`Builder::contained`]), whose end takes everything inside with it.

use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use crate::netns::Netns;

/// Why a process is not running as it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Build(#[from] crate::build::Error),
    #[error("cannot start {name}: {source}")]
    Spawn { name: String, source: io::Error },
    #[error("{name} ended with {status}; the end of {log}:\n{tail}")]
    Ended { name: String, status: ExitStatus, log: PathBuf, tail: String },
    #[error("{name} is still running after {seconds:.1} s")]
    StillRunning { name: String, seconds: f64 },
    #[error("cannot wait for {name}: {source}")]
    Wait { name: String, source: io::Error },
}

/// How often a wait looks again.
const POLL: Duration = Duration::from_millis(5);
/// Log lines shown when something fails.
const TAIL_LINES: usize = 30;

/// A process to be started.
pub struct Builder {
    name: String,
    program: OsString,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    netns: Option<PathBuf>,
    folder: Option<PathBuf>,
    log: PathBuf,
    contained: bool,
}

/// A running child. Killed and reaped when dropped.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    status: Option<ExitStatus>,
    expected: bool,
}

impl Builder {
    /// `name` is for people; output goes to `log` (appended).
    pub fn new(name: impl Into<String>, program: impl AsRef<OsStr>, log: impl Into<PathBuf>) -> Builder {
        Builder {
            name: name.into(),
            program: program.as_ref().to_owned(),
            arguments: Vec::new(),
            environment: Vec::new(),
            netns: None,
            folder: None,
            log: log.into(),
            contained: false,
        }
    }
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Builder {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Builder {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Builder {
        self.environment.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }
    /// Run inside a network namespace.
    pub fn netns(mut self, netns: &Netns) -> Builder {
        self.netns = Some(netns.path());
        self
    }
    pub fn current_dir(mut self, folder: impl Into<PathBuf>) -> Builder {
        self.folder = Some(folder.into());
        self
    }
    /// Run in process and mount namespaces of its own: for daemons that make children. The process seen here is the
    /// wrapper; killing it kills everything inside.
    pub fn contained(mut self) -> Builder {
        self.contained = true;
        self
    }

    /// Starts the process.
    pub fn spawn(self) -> Result<Process, Error> {
        let fail = |source| Error::Spawn { name: self.name.clone(), source };
        let log = OpenOptions::new().create(true).append(true).open(&self.log).map_err(fail)?;
        let mut command = match self.contained {
            false => Command::new(&self.program),
            true => {
                let mut wrapper = Command::new("unshare");
                wrapper.args([
                    "--pid",
                    "--fork",
                    "--kill-child=KILL",
                    "--mount",
                    "--propagation",
                    "private",
                    "--mount-proc",
                ]);
                wrapper.arg("--").arg(&self.program);
                wrapper
            }
        };
        command.args(&self.arguments).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(fail)?).stderr(log).process_group(0);
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        let netns = self.netns.as_ref().map(std::fs::File::open).transpose().map_err(fail)?;
        let parent = std::process::id();
        // SAFETY: between fork and exec only system calls are made; the descriptor is open because `netns` lives in the
        // closure.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                // The parent may have died between fork and prctl.
                if libc::getppid() as u32 != parent {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                if let Some(netns) = &netns
                    && libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) != 0
                {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = on_spawner(move || command.spawn()).map_err(fail)?;
        Ok(Process { name: self.name, child, log: self.log, status: None, expected: false })
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Runs `job` on the thread that all children belong to.
fn on_spawner<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> T {
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Job>>> = OnceLock::new();
    let (answer, result) = mpsc::sync_channel(1);
    let spawner = SPAWNER.get_or_init(|| {
        crate::reaper::arm();
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::spawn(move || queue.into_iter().for_each(|job| job()));
        Mutex::new(jobs)
    });
    let job: Job = Box::new(move || drop(answer.send(job())));
    spawner.lock().expect("sending does not panic").send(job).expect("the spawner thread never ends");
    result.recv().expect("the spawner runs every job to its end")
}

impl Process {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
    pub fn name(&self) -> &str {
        &self.name
    }
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The status, once ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status
    }

    /// Fails when the process has ended; with the end of its log.
    pub fn check(&mut self) -> Result<(), Error> {
        match self.ended() {
            None => Ok(()),
            Some(status) => {
                Err(Error::Ended { name: self.name.clone(), status, log: self.log.clone(), tail: self.tail() })
            }
        }
    }

    /// Waits for the end.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus, Error> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.ended() {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(Error::StillRunning { name: self.name.clone(), seconds: timeout.as_secs_f64() });
            }
            std::thread::sleep(POLL);
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: libc::c_int) {
        if self.status.is_none() {
            // SAFETY: the child has not been reaped, so the id is still its own.
            unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
        }
    }

    /// `kill -9` and reap.
    pub fn kill9(&mut self) {
        self.expected = true;
        if self.ended().is_none() {
            self.signal(libc::SIGKILL);
            self.status = self.child.wait().ok();
        }
    }

    /// The last lines of the log.
    pub fn tail(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.expected {
            eprintln!("--- {} (pid {}), the end of its log:\n{}", self.name, self.pid(), self.tail());
        }
        self.kill9();
    }
}

/// Repeats `attempt` until it yields, or fails with `what` after `timeout`.
pub fn wait_until<T>(what: &str, timeout: Duration, mut attempt: impl FnMut() -> Option<T>) -> Result<T, Timeout> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(found) = attempt() {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(Timeout { what: what.to_owned(), seconds: timeout.as_secs_f64() });
        }
        std::thread::sleep(POLL);
    }
}

/// Something did not happen in time.
#[derive(Debug, thiserror::Error)]
#[error("waited {seconds:.1} s in vain for {what}")]
pub struct Timeout {
    pub what: String,
    pub seconds: f64,
}
