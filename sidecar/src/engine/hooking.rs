//! What the engine answers to KubeVirt's hooks: which disks, when a domain may be defined, when QEMU is gone.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use watari_hook::{Gate, HookConfig, HookEngine, HookServer, SyncedDisk, Vmi};

use watari_wire::report::Report;

use super::{brain::growth, event::Event, handle::Handle};
use crate::config::{Config, Hook};

/// Longest that a boot waits for a larger disk to be taken up: a look, a new Hello and a restart of the worker take about 3 s.
const GROWTH_WAIT: Duration = Duration::from_secs(10);

/// See the module's header.
pub struct Hooks {
    config: Arc<Config>,
    handle: Handle,
    /// When a boot first found a disk larger than recorded.
    growing_since: Mutex<Option<Instant>>,
}

impl Hooks {
    /// KubeVirt made a disk larger just before it called: the VM should see that, unless it cannot be had soon.
    fn waits_for_growth(&self, report: &Report) -> bool {
        let recorded: Vec<u64> = report.disks.iter().map(|d| d.size_bytes).collect();
        let blocked = report.conditions.iter().any(|c| c.kind == "DiskGrowth");
        let grown = growth::capacities(&self.config, &recorded) != recorded;
        let mut since = self.growing_since.lock().unwrap_or_else(PoisonError::into_inner);
        if !grown || blocked || !report.link.connected {
            *since = None;
            return false;
        }
        since.get_or_insert_with(Instant::now).elapsed() < GROWTH_WAIT
    }
}

/// Serve the hook socket until the returned server is dropped.
pub async fn start(config: &Arc<Config>, hook: &Hook, handle: Handle) -> Result<HookServer, String> {
    let settings = settings(config, hook);
    let hooks = Arc::new(Hooks { config: config.clone(), handle, growing_since: Mutex::default() });
    HookServer::start(settings, hooks).await.map_err(|e| e.to_string())
}

/// Where the hook listens, and what it writes into domains.
pub fn settings(config: &Config, hook: &Hook) -> HookConfig {
    let marker = hook.outside_kubernetes.then(|| config.nbd.dir.join("marker.img"));
    HookConfig { folder: hook.dir.clone(), reconnect_seconds: watari_hook::RECONNECT_SECONDS_MIN, marker }
}

/// The disks that we serve.
pub fn synced(config: &Config) -> Vec<SyncedDisk> {
    let disks = config.disks.iter().map(|d| SyncedDisk {
        volume: d.name.clone(),
        export: d.name.clone(),
        socket: d.socket.display().to_string(),
    });
    disks.collect()
}

impl HookEngine for Hooks {
    async fn disks(&self) -> Vec<SyncedDisk> {
        synced(&self.config)
    }

    /// A boot needs the active side, a migration target an open handover that is nearly in sync.
    async fn gate(&self, vmi: &Vmi) -> Gate {
        let report = self.handle.report.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match (vmi.role(), report.role.as_str()) {
            (watari_hook::LaunchRole::Boot, "Serving") if self.waits_for_growth(&report) => {
                Gate::NotYet("Watari takes up a larger disk of this VM: the replica grows first".into())
            }
            (watari_hook::LaunchRole::Boot, "Serving") => Gate::Ready,
            (watari_hook::LaunchRole::Boot, "Converging") => Gate::Refused(
                "Watari has a handover open for this VM: move it, or void the handover, before it boots".into(),
            ),
            (watari_hook::LaunchRole::Boot, role) => Gate::Refused(format!(
                "Watari refuses to boot this VM here: this site is {role}; the VM is active at the peer, or must be promoted first"
            )),
            (watari_hook::LaunchRole::MigrationTarget, "Replica" | "Attached" | "Serving") => {
                let attachable = self.handle.attachable();
                if attachable {
                    Gate::Ready
                } else {
                    Gate::NotYet("Watari waits for the source to open the handover of this VM's disks".into())
                }
            }
            (watari_hook::LaunchRole::MigrationTarget, role) => {
                Gate::NotYet(format!("Watari waits: this site is {role}, not a replica in sync"))
            }
        }
    }

    /// The sockets are served from the start of the worker on.
    async fn prepare(&self, volume: &str) -> Result<(), String> {
        match self.config.disk(volume) {
            Some(_) => Ok(()),
            None => Err(format!("volume {volume} is not one of this pair's disks")),
        }
    }

    async fn shutdown(&self) {
        tracing::info!("KubeVirt says that QEMU is gone");
        (self.handle.post)(Event::Wake);
    }
}
