//! Two sites and the WAN between them.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::build;
use crate::netns::{self, Netns};
use crate::process::{Builder, Process};
use crate::reaper;
use crate::wan::{self, End, Shape, Wan};

/// Why there is no test bed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Netns(#[from] netns::Error),
    #[error(transparent)]
    Wan(#[from] wan::Error),
    #[error("scratch folder {path}: {source}")]
    Folder { path: PathBuf, source: std::io::Error },
}

/// One site: a namespace, its address on the WAN, a scratch folder.
pub struct Site {
    /// "a" or "b".
    pub name: String,
    pub netns: Netns,
    /// Where the other site reaches this one.
    pub address: Ipv4Addr,
    /// For everything this site has: sockets, logs, disks.
    pub dir: PathBuf,
}

impl Site {
    fn create(label: &str, address: Ipv4Addr, dir: PathBuf) -> Result<Site, Error> {
        std::fs::create_dir_all(&dir).map_err(|source| Error::Folder { path: dir.clone(), source })?;
        Ok(Site { name: label.to_owned(), netns: Netns::create(label)?, address, dir })
    }

    /// A process at this site, logging to `dir/NAME.log`.
    pub fn command(&self, name: &str, program: impl AsRef<std::ffi::OsStr>) -> Builder {
        Builder::new(format!("{name}@{}", self.name), program, self.dir.join(format!("{name}.log"))).netns(&self.netns)
    }

    /// Starts `watari-sidecar` here (built if need be) with the given arguments, e.g. `primary --config FILE`.
    pub fn sidecar(&self, name: &str, arguments: &[&str]) -> Result<Process, crate::process::Error> {
        let binary = build::binary("watari-sidecar")?;
        self.command(name, binary).args(arguments).current_dir(&self.dir).spawn()
    }
}

/// Sites A and B and the WAN. Fields drop in order: the link first, then the namespaces.
///
/// One process has one test bed at a time: tests of one file take turns, since on a small machine they would falsify each
/// other's times. (Making a second one while holding the first waits for ever.)
pub struct TestBed {
    pub wan: Wan,
    pub a: Site,
    pub b: Site,
    pub dir: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

/// How the link between the sites is made; everything else about it can change later.
#[derive(Clone, Copy, Debug)]
pub struct LinkOptions {
    pub mtu: u32,
    /// Makes loss and jitter repeatable.
    pub seed: u64,
}

impl Default for LinkOptions {
    fn default() -> LinkOptions {
        LinkOptions { mtu: 1500, seed: 1 }
    }
}

impl TestBed {
    /// Two sites with a link of the given shape. `label` names the scratch folder.
    pub fn new(label: &str, shape: Shape) -> Result<TestBed, Error> {
        TestBed::with_options(label, shape, LinkOptions::default())
    }

    /// The same with all options.
    pub fn with_options(label: &str, shape: Shape, options: LinkOptions) -> Result<TestBed, Error> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        static TURN: Mutex<()> = Mutex::new(());
        netns::require_root()?;
        // A test that failed poisons nothing that the next one would use.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = reaper::run_folder().join(format!("{label}-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        let a = Site::create("a", Ipv4Addr::new(10, 77, 0, 1), dir.join("a"))?;
        let b = Site::create("b", Ipv4Addr::new(10, 77, 0, 2), dir.join("b"))?;
        let end = |site: &Site| End { netns: site.netns.path(), address: format!("{}/30", site.address) };
        let mut wan = Wan::start(&end(&a), &end(&b), options.mtu, shape, options.seed)?;
        wan.serve_control(dir.join("wan.sock"))?;
        Ok(TestBed { wan, a, b, dir, _turn: turn })
    }
}

impl Drop for TestBed {
    fn drop(&mut self) {
        // A failed test's logs are worth keeping when asked for; disks can be large, so otherwise they go at once.
        if std::env::var_os("WATARI_E2E_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}
