//! A VM that starts for the first time: KubeVirt makes `disk.img`, at its claim's size, only when virt-launcher is at work, and virt-launcher
//! begins its work only when our hook's socket is there (kubevirt.md §1.2, `pkg/host-disk`). So the hook is served before the disks are.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::Notify;
use watari_hook::{Gate, HookEngine, HookServer, SyncedDisk, Vmi};

use super::hooking;
use crate::config::{Config, Hook};

/// The disks that are not there.
pub fn missing(config: &Config) -> Vec<PathBuf> {
    config.disks.iter().map(|disk| disk.path.clone()).filter(|path| !path.exists()).collect()
}

/// Serves the hook until KubeVirt has made all disks, and says so by asking for the domain. The call itself is answered "not yet": KubeVirt
/// asks again about a second later, and then the engine answers. Errors: a sentence about `hook.dir`.
pub async fn disks(config: &Arc<Config>, hook: &Hook) -> Result<(), String> {
    let waiting = Arc::new(Waiting { config: config.clone(), made: Notify::new() });
    let absent: Vec<String> = missing(config).iter().map(|path| path.display().to_string()).collect();
    tracing::info!(disks = absent.join(", "), "waiting for disks that KubeVirt makes at the VM's first start");
    let server =
        HookServer::start(hooking::settings(config, hook), waiting.clone()).await.map_err(|e| e.to_string())?;
    waiting.made.notified().await;
    drop(server);
    Ok(())
}

struct Waiting {
    config: Arc<Config>,
    made: Notify,
}

impl HookEngine for Waiting {
    async fn disks(&self) -> Vec<SyncedDisk> {
        hooking::synced(&self.config)
    }

    async fn gate(&self, _: &Vmi) -> Gate {
        match missing(&self.config).first() {
            Some(path) => Gate::NotYet(format!("Watari waits for {}, which KubeVirt makes", path.display())),
            None => {
                self.made.notify_one();
                Gate::NotYet("Watari opens the disks that KubeVirt has just made".into())
            }
        }
    }

    async fn prepare(&self, volume: &str) -> Result<(), String> {
        Err(format!("volume {volume} is not open yet"))
    }

    async fn shutdown(&self) {}
}
