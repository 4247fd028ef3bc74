//! Network namespaces with names of ours, gone when dropped.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Why a namespace or an address is not there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("network namespaces, TUN devices and QEMU in them need root; run as root (found uid {0})")]
    NotRoot(u32),
    #[error("cannot run ip (package iproute2; e2e/setup.sh installs it): {0}")]
    NoIp(io::Error),
    #[error("ip {arguments}: {message}")]
    Ip { arguments: String, message: String },
    #[error("cannot enter {path}: {source}")]
    Enter { path: PathBuf, source: io::Error },
}

/// TCP buffers large enough for 1 Gbit/s at 300 ms: the emulated link shall be the limit, not the socket.
const TCP_BUFFERS: &str = "4096 262144 67108864";

/// Fails with a clear message unless we are root.
pub fn require_root() -> Result<(), Error> {
    // SAFETY: reads a number.
    match unsafe { libc::geteuid() } {
        0 => Ok(()),
        uid => Err(Error::NotRoot(uid)),
    }
}

/// Runs `ip` with the given arguments.
pub fn ip(arguments: &[&str]) -> Result<(), Error> {
    let output = Command::new("ip").args(arguments).output().map_err(Error::NoIp)?;
    match output.status.success() {
        true => Ok(()),
        false => Err(Error::Ip {
            arguments: arguments.join(" "),
            message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        }),
    }
}

/// One network namespace, `watari-PID-N-LABEL`.
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes a namespace with its loopback up.
    pub fn create(label: &str) -> Result<Netns, Error> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        require_root()?;
        crate::reaper::arm();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{}-{count}-{label}", crate::reaper::PREFIX, std::process::id());
        ip(&["netns", "add", &name])?;
        let netns = Netns { name };
        netns.ip(&["link", "set", "lo", "up"])?;
        netns.enter(|| {
            for file in ["tcp_rmem", "tcp_wmem"] {
                // An old kernel may lack it; then long fat links are slower, which the figures show.
                let _ = std::fs::write(format!("/proc/sys/net/ipv4/{file}"), TCP_BUFFERS);
            }
        })?;
        Ok(netns)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for the namespace.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// `ip -n NAME …`
    pub fn ip(&self, arguments: &[&str]) -> Result<(), Error> {
        let mut all = vec!["-n", self.name.as_str()];
        all.extend(arguments);
        ip(&all)
    }

    /// Runs `job` on a thread inside the namespace. Sockets opened there stay there.
    pub fn enter<T: Send>(&self, job: impl FnOnce() -> T + Send) -> Result<T, Error> {
        enter(&self.path(), job)
    }
}

/// Runs `job` on a thread inside the namespace that `path` stands for.
pub fn enter<T: Send>(path: &Path, job: impl FnOnce() -> T + Send) -> Result<T, Error> {
    let fail = |source| Error::Enter { path: path.to_owned(), source };
    let file = File::open(path).map_err(fail)?;
    std::thread::scope(|scope| {
        let inside = scope.spawn(move || {
            // SAFETY: moves only this thread, with a descriptor that is open.
            match unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } {
                0 => Ok(job()),
                _ => Err(io::Error::last_os_error()),
            }
        });
        match inside.join() {
            Ok(result) => result.map_err(fail),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

impl Drop for Netns {
    fn drop(&mut self) {
        // What remains inside dies with its own owner; the name goes now. A failure is left to the reaper.
        let _ = ip(&["netns", "delete", &self.name]);
    }
}
