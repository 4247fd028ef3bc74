//! The test guest as the host sees it: its kernel and initramfs, and the client of its control line.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use watari_guest::report::{Hello, Stats, Verdict};

use crate::cpio::Archive;
use crate::{build, reaper};

/// Why the guest cannot be built or does not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Build(#[from] build::Error),
    #[error("the guest's kernel is not in {0}: run e2e/setup.sh")]
    NoKernel(PathBuf),
    #[error("guest image: {path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("kernel module {0} is not in modules.dep of the guest's kernel")]
    NoModule(String),
    #[error("the guest did not answer {command:?} within {seconds:.1} s ({last})")]
    Silent { command: String, seconds: f64, last: String },
    #[error("the guest refuses {command:?}: {reason}")]
    Refused { command: String, reason: String },
    #[error("the guest's answer to {command:?} cannot be read: {source}: {answer}")]
    Garbled { command: String, answer: String, source: serde_json::Error },
}

/// What the guest needs beyond what is built into Debian's cloud kernel.
const MODULES: [&str; 3] = ["virtio_pci", "virtio_blk", "virtio_console"];
/// The guest has this long to start an answer before it is asked again, on a new connection.
const ASK_AGAIN: Duration = Duration::from_secs(3);

/// Files to boot from.
#[derive(Clone, Debug)]
pub struct BootFiles {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

impl BootFiles {
    /// Builds the guest program and packs the initramfs, once per process.
    pub fn prepare() -> Result<BootFiles, Error> {
        static READY: OnceLock<BootFiles> = OnceLock::new();
        if let Some(ready) = READY.get() {
            return Ok(ready.clone());
        }
        let folder = reaper::cache_folder().join("kernel");
        let kernel = folder.join("vmlinuz");
        if !kernel.exists() {
            return Err(Error::NoKernel(folder));
        }
        let archive = pack(&folder, &build::guest_binary()?)?;
        let initramfs = reaper::run_folder().join("initramfs.cpio");
        // Several tests of one process may race here; each writes the same bytes, and the rename is atomic.
        let draft = initramfs.with_extension(format!("{:?}", std::thread::current().id()));
        let fail = |source| Error::Io { path: initramfs.clone(), source };
        std::fs::write(&draft, archive).map_err(fail)?;
        std::fs::rename(&draft, &initramfs).map_err(fail)?;
        Ok(READY.get_or_init(|| BootFiles { kernel, initramfs }).clone())
    }
}

fn pack(kernel: &Path, program: &Path) -> Result<Vec<u8>, Error> {
    let read = |path: PathBuf| std::fs::read(&path).map_err(|source| Error::Io { path, source });
    let text = |path| read(path).map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned());
    let version = text(kernel.join("version"))?;
    let dependencies = text(kernel.join("modules.dep"))?;
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "mnt", "modules"] {
        archive.folder(folder);
    }
    // The kernel opens it for init before /dev is mounted.
    archive.character_device("dev/console", 5, 1);
    archive.file("init", &read(program.to_owned())?);
    let mut list = Vec::new();
    for path in load_order(&dependencies)? {
        let name = path.rsplit('/').next().unwrap_or(&path).to_owned();
        archive.file(&format!("modules/{name}"), &read(kernel.join("lib/modules").join(&version).join(&path))?);
        list.push(name);
    }
    archive.file("modules/list", list.join("\n").as_bytes());
    Ok(archive.finish())
}

/// Paths of [`MODULES`] and all they need, each after what it depends on. Built-in ones are in no list.
fn load_order(dependencies: &str) -> Result<Vec<String>, Error> {
    let mut order: Vec<String> = Vec::new();
    for module in MODULES {
        let file = format!("/{module}.ko");
        let line = dependencies
            .lines()
            .find(|line| line.split(':').next().is_some_and(|path| path.ends_with(&file)))
            .ok_or_else(|| Error::NoModule(module.to_owned()))?;
        // depmod lists the deepest dependency last.
        let (path, needs) = line.split_once(':').expect("the line was found by its colon");
        for path in needs.split_whitespace().rev().chain([path]) {
            if !order.iter().any(|known| known == path) {
                order.push(path.to_owned());
            }
        }
    }
    Ok(order)
}

/// A client of one guest's control line. The socket may be another one after a migration ([`Control::move_to`]).
pub struct Control {
    socket: PathBuf,
    stream: Option<UnixStream>,
    pending: Vec<u8>,
    next_id: u64,
}

impl Control {
    /// `socket` is the host's end of the virtio-serial port (or serial line).
    pub fn new(socket: impl Into<PathBuf>) -> Control {
        Control { socket: socket.into(), stream: None, pending: Vec::new(), next_id: 1 }
    }

    /// From now on the guest is behind this socket.
    pub fn move_to(&mut self, socket: impl Into<PathBuf>) {
        self.socket = socket.into();
        self.stream = None;
    }

    /// Waits for the guest to be up.
    pub fn hello(&mut self, timeout: Duration) -> Result<Hello, Error> {
        self.ask("hello", timeout)
    }
    /// What the guest has done and felt so far.
    pub fn stats(&mut self) -> Result<Stats, Error> {
        self.ask("stats", Duration::from_secs(20))
    }
    /// Starts or continues the writers.
    pub fn resume(&mut self) -> Result<Stats, Error> {
        self.ask("resume", Duration::from_secs(20))
    }
    /// Stops the writers and waits until no write is in flight.
    pub fn pause(&mut self, timeout: Duration) -> Result<Stats, Error> {
        let deadline = Instant::now() + timeout;
        loop {
            let stats: Stats = self.ask("pause", timeout)?;
            if stats.paused {
                return Ok(stats);
            }
            if Instant::now() >= deadline {
                let last = "writes are still in flight".to_owned();
                return Err(Error::Silent { command: "pause".into(), seconds: timeout.as_secs_f64(), last });
            }
        }
    }
    /// Bytes per second, all writers together.
    pub fn set_rate(&mut self, bytes_per_second: u64) -> Result<Stats, Error> {
        self.ask(&format!("rate {bytes_per_second}"), Duration::from_secs(20))
    }
    /// Bytes of memory per second that change.
    pub fn set_churn(&mut self, bytes_per_second: u64) -> Result<Stats, Error> {
        self.ask(&format!("churn {bytes_per_second}"), Duration::from_secs(20))
    }
    /// Forgets the largest gaps so far.
    pub fn reset_gaps(&mut self) -> Result<Stats, Error> {
        self.ask("reset-gaps", Duration::from_secs(20))
    }
    /// Pauses, reads everything back, judges it.
    pub fn verify(&mut self, timeout: Duration) -> Result<Verdict, Error> {
        self.pause(timeout)?;
        self.ask("verify", timeout)
    }
    /// Switches the machine off; no answer comes.
    pub fn power_off(&mut self) {
        let _ = self.attempt("poweroff", Duration::from_millis(200));
    }

    /// Asks until an answer comes. Every command may be repeated.
    pub fn ask<T: DeserializeOwned>(&mut self, command: &str, timeout: Duration) -> Result<T, Error> {
        let deadline = Instant::now() + timeout;
        // A long command must not be repeated while it still runs.
        let long = ["verify", "pause", "sync"].contains(&command);
        let mut patience = if long { ASK_AGAIN.max(timeout / 2) } else { ASK_AGAIN };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let last = match self.attempt(command, patience.min(left.max(Duration::from_millis(1)))) {
                Ok(answer) => return read_answer(command, answer),
                Err(error) => error,
            };
            self.stream = None;
            if Instant::now() >= deadline {
                let (command, last) = (command.to_owned(), last.to_string());
                return Err(Error::Silent { command, seconds: timeout.as_secs_f64(), last });
            }
            patience *= 2;
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn attempt(&mut self, command: &str, patience: Duration) -> std::io::Result<String> {
        if self.stream.is_none() {
            self.pending.clear();
            self.stream = Some(UnixStream::connect(&self.socket)?);
        }
        let stream = self.stream.as_mut().expect("set above");
        let id = self.next_id;
        self.next_id += 1;
        stream.write_all(format!("#{id} {command}\n").as_bytes())?;
        let deadline = Instant::now() + patience;
        let mark = format!("@{id} ");
        loop {
            while let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                // Anything else is the kernel talking, or the answer to a question that was given up.
                if let Some(answer) = String::from_utf8_lossy(&line).trim().strip_prefix(&mark) {
                    return Ok(answer.to_owned());
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(std::io::ErrorKind::TimedOut.into());
            }
            stream.set_read_timeout(Some(left))?;
            let mut bytes = [0; 4096];
            match stream.read(&mut bytes)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                count => self.pending.extend_from_slice(&bytes[..count]),
            }
        }
    }
}

fn read_answer<T: DeserializeOwned>(command: &str, answer: String) -> Result<T, Error> {
    let garbled = |source, answer| Error::Garbled { command: command.to_owned(), answer, source };
    let value: serde_json::Value = match serde_json::from_str(&answer) {
        Ok(value) => value,
        Err(source) => return Err(garbled(source, answer)),
    };
    if let Some(reason) = value.get("error").and_then(|reason| reason.as_str()) {
        return Err(Error::Refused { command: command.to_owned(), reason: reason.to_owned() });
    }
    serde_json::from_value(value).map_err(|source| garbled(source, answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_need() {
        let dependencies = "a/virtio_pci.ko: a/legacy.ko a/virtio.ko a/virtio_ring.ko\na/virtio_blk.ko: a/virtio.ko \
             a/virtio_ring.ko\na/virtio_console.ko: a/virtio.ko a/virtio_ring.ko\na/virtio.ko: a/virtio_ring.ko";
        let order = load_order(dependencies).expect("all modules are listed");
        let at = |name: &str| order.iter().position(|path| path.contains(name)).expect(name);
        assert!(at("virtio_ring") < at("a/virtio.ko") && at("a/virtio.ko") < at("virtio_pci") && order.len() == 6);
    }
}
