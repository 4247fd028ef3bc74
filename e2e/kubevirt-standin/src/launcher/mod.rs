//! virt-launcher: libvirt and QEMU (TCG) in the compute container, the guest's whole life.
//!
//! [`run`] is the one loop: orders of the controller ([`server`]), what libvirt says of the domain, SIGTERM. A launcher either boots
//! its guest ([`boot`]) or waits for one that arrives ([`target`]). The guest boots from a kernel in the image, not from its disk; what
//! it does there is the test guest of `watari-e2e`, whose control line is `control.sock` in the private folder.

mod agent;
mod domain;
mod doors;
mod leave;
mod libvirt;
mod prepare;
mod server;

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::hooks::{self, Hooks};
use crate::quirks::Quirks;
use crate::render::{DISKS_VARIABLE, DiskFile, HOOKS_FOLDER, HOOKS_VARIABLE, TARGET_VARIABLE, VMI_VARIABLE};
use crate::talk::{Leaving, Life, Migrate};
use libvirt::{State, virsh};
use server::{Order, Server};

/// Settings of the test guest, `NAME=VALUE …`; an annotation of the VMI.
pub const GUEST_ANNOTATION: &str = "standin.watari.internal/guest";
/// virt-launcher's `--qemu-timeout` without its random part: until a domain is there.
const DOMAIN_PATIENCE: Duration = Duration::from_secs(240);
/// KubeVirt repeats what a hook refused about once per second.
const RETRY: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(300);
/// Between the guest's departure and the launcher's end (kubevirt.md, appendix 3, 1): the old VMI is seen for about 20 s in all.
const LINGER: Duration = Duration::from_secs(10);
/// KubeVirt retries the unpause of a guest with I/O errors after these times.
const UNPAUSE: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_secs(10),
    Duration::from_secs(20),
    Duration::from_secs(40),
    Duration::from_secs(80),
];

/// Why the launcher gives up; the Pod fails of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0} is not set: this program runs in a Pod that kubevirt-standin rendered")]
    Unset(&'static str),
    #[error("{name}: {source}")]
    Json { name: &'static str, source: serde_json::Error },
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    #[error("virsh {command}: {message}")]
    Virsh { command: String, message: String },
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    #[error("libvirtd does not answer after {} s", .0.as_secs())]
    Libvirt(Duration),
    #[error("libvirt's own domain: {0}")]
    Domain(String),
    #[error("timed out waiting for domain to be defined")]
    NoDomain,
}

fn at(path: &str) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}

fn variable(name: &'static str) -> Result<String, Error> {
    std::env::var(name).map_err(|_| Error::Unset(name))
}

/// What this Pod is for.
struct Launcher {
    vmi: Value,
    disks: Vec<DiskFile>,
    hooks: Hooks,
    /// libvirt's name of the domain.
    name: String,
    quirks: Quirks,
    server: Server,
}

/// Runs the VM to its end. False if the guest did not end in good order.
pub async fn run() -> Result<bool, Error> {
    let parse = |name| move |source| Error::Json { name, source };
    let vmi: Value = serde_json::from_str(&variable(VMI_VARIABLE)?).map_err(parse(VMI_VARIABLE))?;
    let disks: Vec<DiskFile> = serde_json::from_str(&variable(DISKS_VARIABLE)?).map_err(parse(DISKS_VARIABLE))?;
    let wanted: usize = serde_json::from_str(&variable(HOOKS_VARIABLE)?).map_err(parse(HOOKS_VARIABLE))?;
    let target = std::env::var_os(TARGET_VARIABLE).is_some();
    let mut end = signal(SignalKind::terminate()).map_err(at("SIGTERM"))?;
    let (server, orders) = Server::start(if target { Life::Empty } else { Life::Starting }).await?;

    if !target {
        prepare::local_disks(&vmi, &disks).await?;
    }
    let hooks = Hooks::collect(Path::new(HOOKS_FOLDER), wanted).await?;
    tracing::info!(wanted, "hook sidecars are here");
    let shared: Vec<String> = disks.iter().filter(|disk| disk.shared && !disk.block).map(DiskFile::folder).collect();
    let _libvirtd = libvirt::start(&shared).await?;
    let launcher = Launcher { name: domain::name(&vmi), quirks: Quirks::of(&vmi), vmi, disks, hooks, server };
    let seen = if target { false } else { launcher.boot().await? };
    let outcome = launcher.live(seen, orders, &mut end).await;
    if let Err(error) = &outcome {
        tracing::error!(%error, "giving up");
    }
    outcome
}

impl Launcher {
    /// Defines the domain through the hooks and starts it; refusals are tried again until the time is over. Answers true.
    async fn boot(&self) -> Result<bool, Error> {
        let begin = Instant::now();
        loop {
            let error = match self.boot_once().await {
                Ok(()) => {
                    tracing::info!(name = self.name, "the guest runs");
                    self.server.update(|report| (report.life, report.trouble) = (Life::Running, None));
                    return Ok(true);
                }
                Err(error) => error,
            };
            tracing::warn!(%error, "the guest does not start yet");
            self.server.update(|report| report.trouble = Some(error.to_string()));
            if begin.elapsed() > DOMAIN_PATIENCE {
                return Err(Error::NoDomain);
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn boot_once(&self) -> Result<(), Error> {
        let vmi = domain::as_hooks_see_it(&self.vmi, &self.disks).to_string();
        let mut domain = domain::domain(&self.vmi, &self.disks);
        for _ in 0..self.quirks.defines {
            domain = self.hooks.on_define_domain(&domain, &vmi).await?;
            libvirt::define(&domain).await?;
        }
        virsh(&["start", &self.name]).await.map(drop)
    }

    /// From the first domain to the last word. `seen` says whether there is a domain yet.
    async fn live(
        &self,
        mut seen: bool,
        mut orders: mpsc::Receiver<Order>,
        end: &mut tokio::signal::unix::Signal,
    ) -> Result<bool, Error> {
        let begin = Instant::now();
        let mut doors = None;
        // A guest that arrives is paused for more reasons than one before it runs here for the first time.
        let mut ran = seen;
        let (mut unpause, mut paused) = (UNPAUSE.iter(), None);
        loop {
            tokio::select! {
                _ = end.recv() => {
                    tracing::info!("asked to end");
                    if !seen {
                        return Ok(true);
                    }
                    // A refusal means that it has ended by itself meanwhile.
                    let _ = virsh(&["destroy", "--graceful", &self.name]).await;
                }
                Some(order) = orders.recv() => match order {
                    // It can neither be asked again nor boot: its doors are already open.
                    Order::PrepareTarget(_) if doors.is_some() => {}
                    Order::PrepareTarget(vmi) => doors = self.prepare_target(*vmi).await,
                    Order::Migrate(order) => self.depart(order),
                    Order::Abort => drop(virsh(&["domjobabort", &self.name]).await),
                },
                () = tokio::time::sleep(POLL) => {}
            }
            match libvirt::state(&self.name).await? {
                State::Unknown if seen => return self.last_words(false).await,
                State::Unknown if doors.is_none() && begin.elapsed() > DOMAIN_PATIENCE => return Err(Error::NoDomain),
                State::Unknown => {}
                State::Incoming | State::Paused(_) if !ran => {
                    seen = true;
                    self.server.update(|report| report.life = Life::Incoming);
                }
                State::Running => {
                    (seen, ran, unpause, paused) = (true, true, UNPAUSE.iter(), None);
                    self.server.update(|report| report.life = Life::Running);
                }
                // A guest that leaves has this state for a moment, too.
                State::Incoming => {}
                State::Paused(reason) => {
                    let since = *paused.get_or_insert_with(Instant::now);
                    if reason == "I/O error" && unpause.as_slice().first().is_some_and(|wait| since.elapsed() >= *wait)
                    {
                        unpause.next();
                        paused = Some(Instant::now());
                        let _ = virsh(&["resume", &self.name]).await;
                    }
                    self.server.update(|report| report.life = Life::Paused(reason));
                }
                State::Off(reason) => {
                    tracing::info!(reason, "the guest has ended");
                    let left = reason == "migrated";
                    // libvirt's call must return before its caller's Pod may go.
                    if left && self.server.report().leaving == Leaving::Running {
                        continue;
                    }
                    self.server.update(|report| report.life = if left { Life::Left } else { Life::Ended });
                    self.last_words(left).await?;
                    return Ok(!["crashed", "failed", "panicked"].contains(&reason.as_str()));
                }
            }
        }
    }

    /// QEMU is gone: the hooks are told; whoever was left by migration lingers.
    async fn last_words(&self, left: bool) -> Result<bool, Error> {
        self.hooks.shutdown().await;
        if left {
            tokio::time::sleep(LINGER).await;
        }
        Ok(left)
    }

    /// One SyncMigrationTarget. A hook's refusal is reported and leaves the doors shut; the controller asks again.
    async fn prepare_target(&self, vmi: Value) -> Option<doors::Doors> {
        self.server.update(|report| report.life = Life::Preparing);
        let prepared = async {
            prepare::local_disks(&vmi, &self.disks).await?;
            let domain = domain::domain(&vmi, &self.disks);
            let seen = domain::as_hooks_see_it(&vmi, &self.disks).to_string();
            self.hooks.on_define_target(&domain, &seen).await?;
            doors::open_target().await.map_err(at("migration ports"))
        };
        match prepared.await {
            Ok((doors, ports)) => {
                self.server.update(|report| (report.life, report.trouble) = (Life::Prepared(ports), None));
                Some(doors)
            }
            Err(error) => {
                tracing::warn!(%error, "the target is not ready yet");
                self.server.update(|report| (report.life, report.trouble) = (Life::Empty, Some(error.to_string())));
                None
            }
        }
    }

    /// Starts a migration; its result is in the report.
    fn depart(&self, order: Migrate) {
        let known = self.server.report();
        if known.leaving == Leaving::Running || known.job.as_ref() == Some(&order.job) {
            return;
        }
        self.server.update(|report| (report.leaving, report.job) = (Leaving::Running, Some(order.job.clone())));
        let (server, name, disks) = (self.server.clone(), self.name.clone(), self.disks.clone());
        if let Some(after) = self.quirks.crash_while_leaving {
            tokio::spawn(async move {
                tokio::time::sleep(after).await;
                tracing::error!("a quirk on request: the launcher crashes");
                std::process::abort();
            });
        }
        tokio::spawn(async move {
            let outcome = leave::migrate(&name, &disks, &order).await;
            tracing::info!(?outcome, "migration");
            server.update(|report| {
                report.leaving = match outcome {
                    Ok(()) => Leaving::Done,
                    Err(error) => Leaving::Failed(error.to_string()),
                }
            });
        });
    }
}
