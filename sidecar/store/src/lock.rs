//! Exactly one process holds a folder: an flock on the file `lock`, with a record of who holds it.
//!
//! The kernel gives the lock back when its holder ends, however it ends, so a `kill -9` never leaves a folder locked.
//! The record only names the holder to whoever is refused; it decides nothing. Asking a holder to release is done
//! elsewhere (control API). The supervisor may take the lock and let its workers inherit it ([`FolderLock::share`]): then a
//! worker that restarts while the folder hangs need not touch it, and a killed supervisor leaves the lock to its worker.
//! On RWX claims the lock is as good as the file system's flock (NFS 4 and CephFS have one
//! across nodes); epochs, not this lock, keep two sites apart.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};

/// Name of the lock file in a folder.
pub const LOCK_NAME: &str = "lock";
/// Pause between two tries: a handover of the folder costs at most this much more than it must.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// Longest record that is read.
const RECORD_BYTES_MAX: u64 = 1024;

/// Who holds a folder.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Owner {
    /// `primary`, `replica`, `inspect`, …
    pub role: String,
    /// In the holder's own pid namespace.
    pub pid: u32,
    /// Host name: in Kubernetes the Pod's name.
    pub host: String,
    /// When it took the lock, in seconds since 1970.
    pub since_seconds: u64,
}

impl Owner {
    /// This process.
    pub fn this_process(role: &str) -> Owner {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Owner { role: role.into(), pid: std::process::id(), host, since_seconds: now_seconds() }
    }

    fn encode(&self) -> String {
        let Owner { role, pid, host, since_seconds } = self;
        format!("role={role}\npid={pid}\nhost={host}\nsince={since_seconds}\nend\n")
    }

    /// `None` for a record that is empty or half written.
    fn decode(text: &str) -> Option<Owner> {
        let field =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned);
        text.ends_with("end\n").then_some(())?;
        Some(Owner {
            role: field("role")?,
            pid: field("pid")?.parse().ok()?,
            host: field("host")?,
            since_seconds: field("since")?.parse().ok()?,
        })
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = now_seconds().saturating_sub(self.since_seconds);
        write!(f, "{} (pid {} on {}, for {held} s)", self.role, self.pid, self.host)
    }
}

/// Why the folder could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else holds it: stop that process, or ask it to release, and try again.
    #[error("the folder {folder} is held by {}; stop it or ask it to release the folder", name(.owner))]
    Held { folder: PathBuf, owner: Option<Owner> },
    /// The folder does not exist or cannot be written.
    #[error("the folder {folder} cannot be locked: {source}")]
    Io { folder: PathBuf, source: io::Error },
}

fn name(owner: &Option<Owner>) -> String {
    owner.as_ref().map_or_else(|| "another process that has not said who it is".into(), Owner::to_string)
}

fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The lock on a folder, held until it is dropped.
#[derive(Debug)]
pub struct FolderLock {
    file: File,
    folder: PathBuf,
    owner: Owner,
    /// Empty the record when dropped: not when the lock was inherited, since its first holder goes on holding it.
    clears: bool,
}

impl FolderLock {
    /// Lock `folder` for this process in `role`, waiting for at most `timeout` for another holder.
    pub fn acquire(folder: &Path, role: &str, timeout: Duration) -> Result<FolderLock, LockError> {
        let begin = Instant::now();
        let failed = |source| LockError::Io { folder: folder.into(), source };
        loop {
            match Self::try_acquire(folder, role).map_err(failed)? {
                Ok(lock) => return Ok(lock),
                Err(owner) if begin.elapsed() >= timeout => {
                    return Err(LockError::Held { folder: folder.into(), owner });
                }
                Err(_) => std::thread::sleep(RETRY_PAUSE.min(timeout.saturating_sub(begin.elapsed()))),
            }
        }
    }

    fn try_acquire(folder: &Path, role: &str) -> io::Result<Result<FolderLock, Option<Owner>>> {
        let path = folder.join(LOCK_NAME);
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = open?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => return Ok(Err(read_owner(&file))),
            Err(e) => return Err(e.into()),
        }
        // Somebody may have removed or replaced the file between our open and our lock: then we hold a lock on a file
        // that nobody else will look at.
        let (ours, named) = (file.metadata()?, std::fs::metadata(&path));
        if !named.is_ok_and(|named| named.ino() == ours.ino() && named.dev() == ours.dev()) {
            return Ok(Err(None));
        }
        let owner = Owner::this_process(role);
        file.set_len(0)?;
        file.write_all_at(owner.encode().as_bytes(), 0)?;
        Ok(Ok(FolderLock { file, folder: folder.into(), owner, clears: true }))
    }

    /// A descriptor of this lock for one child process: hand it over as the child's standard input
    /// (`Command::stdin(lock.share()?)`), the one way that leaks it to no other child that is started meanwhile. The
    /// folder stays locked until every holder has ended.
    pub fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// Take part in a lock that this process inherited through [`FolderLock::share`], usually
    /// `io::stdin().as_fd().try_clone_to_owned()?`. Does not open or read anything in
    /// the folder. `Err(Held)` if the descriptor is not, or not any more, the one that holds the lock.
    pub fn inherit(shared: OwnedFd, folder: &Path, role: &str) -> Result<FolderLock, LockError> {
        let failed = |source| LockError::Io { folder: folder.into(), source };
        // On a descriptor that holds the lock this is a no-op; on any other one it tries.
        match flock(&shared, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(LockError::Held { folder: folder.into(), owner: None }),
            Err(e) => return Err(failed(e.into())),
        }
        let owner = Owner::this_process(role);
        Ok(FolderLock { file: File::from(shared), folder: folder.into(), owner, clears: false })
    }

    /// Who holds the folder now, for `inspect` and status; `None` when nobody does or it cannot be seen.
    pub fn holder(folder: &Path) -> Option<Owner> {
        let file = File::open(folder.join(LOCK_NAME)).ok()?;
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => None,
            Err(_) => read_owner(&file),
        }
    }

    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

fn read_owner(file: &File) -> Option<Owner> {
    let mut text = String::new();
    file.take(RECORD_BYTES_MAX).read_to_string(&mut text).ok()?;
    Owner::decode(&text)
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        // An empty record while it is still ours; the lock itself goes with the descriptor. If this fails the record
        // names a process that is gone, which only shows in an error text.
        if self.clears {
            let _ = self.file.set_len(0);
        }
    }
}
