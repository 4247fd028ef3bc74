//! The hook server: KubeVirt's `Info` and `Callbacks` services in front of a [`HookEngine`].
//!
//! Invariants:
//! - I1: `Info` never waits for the engine (virt-launcher's deadline is 1 s, and an error there is fatal for the VM).
//! - I2: every other answer comes before virt-launcher's shortest deadline (20 s on a migration target, `live-migration-target.go`);
//!   what takes longer is an error that KubeVirt retries.
//! - I3: only `OnDefineDomain` and `Shutdown` are offered. Offering `PreCloudInitIso` crashes virt-launcher on a VMI without
//!   cloud-init (`pkg/hooks/manager.go:318`).
//!
//! It does not decide anything about the VM; the engine does.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use serde::Deserialize;
use tokio::{sync::Mutex, task::JoinHandle, time::timeout};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Status, transport::Server};

use crate::callbacks::Callbacks;
use crate::marker::ensure_marker_file;
use crate::rewrite::{RECONNECT_SECONDS_MIN, RewriteOptions, rewrite};
use crate::socket::HiddenSocket;
use crate::vmi::Vmi;
use crate::{Gate, HookEngine, proto};

/// Seconds that the engine has to answer whether a VM may be defined.
pub const GATE_SECONDS_MAX: u64 = 4;
/// Seconds that the engine has to prepare all volumes: with twice the gate's below the 20 s of a migration target.
pub const PREPARE_SECONDS_MAX: u64 = 10;
/// Seconds that draining after QEMU's end may take: below virt-launcher's 60 s.
pub const SHUTDOWN_SECONDS_MAX: u64 = 55;
/// Most calls that one connection may have open; virt-launcher makes one at a time on a new connection.
const STREAMS_MAX: u32 = 16;

/// Settings of the hook server.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HookConfig {
    /// Folder for the hook socket; KubeVirt mounts it into the sidecar at `/var/run/kubevirt-hooks`. Nothing else may be put there.
    pub folder: PathBuf,
    /// Seconds for which QEMU keeps requests while the sidecar is away, at least 120.
    #[serde(default = "reconnect_default")]
    pub reconnect_seconds: u32,
    /// File of the marker disk. Only outside Kubernetes (`marker.rs`); leave it out otherwise.
    #[serde(default)]
    pub marker: Option<PathBuf>,
}

fn reconnect_default() -> u32 {
    RECONNECT_SECONDS_MIN
}

/// Why the hook server did not start.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The socket.
    #[error("hook.folder: cannot offer a hook socket in {folder}: {source}")]
    Socket {
        /// Where.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The configuration.
    #[error("hook.{field} is {found}, expected {expected}")]
    Setting {
        /// Which key.
        field: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
}

/// A hook server at work. Dropping it stops it.
#[derive(Debug)]
pub struct HookServer {
    path: PathBuf,
    task: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl HookServer {
    /// Serve `engine`; when this returns virt-launcher can find the socket, and it is answered. Call it when the engine is ready
    /// to be asked, not before.
    ///
    /// Errors: a setting out of its range, or the socket cannot be made in the folder.
    pub async fn start<E: HookEngine>(config: HookConfig, engine: Arc<E>) -> Result<Self, HookError> {
        if config.reconnect_seconds < RECONNECT_SECONDS_MIN {
            return Err(HookError::Setting {
                field: "reconnect_seconds",
                found: config.reconnect_seconds.to_string(),
                expected: format!(
                    "at least {RECONNECT_SECONDS_MIN}: QEMU would pause the VM at the sidecar's second crash"
                ),
            });
        }
        let failed = |source| HookError::Socket { folder: config.folder.clone(), source };
        let (hidden, listener) = HiddenSocket::bind(&config.folder).map_err(failed)?;
        let callbacks = Callbacks::new(Definer { config: config.clone(), engine, turn: Mutex::new(()) });
        let task = tokio::spawn(
            Server::builder()
                .max_concurrent_streams(STREAMS_MAX)
                .add_service(proto::info::info_server::InfoServer::new(callbacks.clone()))
                .add_service(proto::v1alpha1::callbacks_server::CallbacksServer::new(callbacks.clone()))
                .add_service(proto::v1alpha2::callbacks_server::CallbacksServer::new(callbacks.clone()))
                .add_service(proto::v1alpha3::callbacks_server::CallbacksServer::new(callbacks))
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        let path = hidden.publish().map_err(failed)?;
        tracing::info!(socket = %path.display(), "hook server is offered to virt-launcher");
        Ok(HookServer { path, task })
    }

    /// The socket. It stays in the folder when the server stops: the next life of this container takes its name again.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Wait for the server's end, which comes only with an error.
    pub async fn ended(&mut self) -> io::Result<()> {
        match (&mut self.task).await {
            Ok(result) => result.map_err(io::Error::other),
            Err(e) => Err(io::Error::other(e)),
        }
    }
}

impl Drop for HookServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One VM's defines, in turn.
pub(crate) struct Definer<E> {
    config: HookConfig,
    engine: Arc<E>,
    /// Held during a define: virt-launcher gives up on a call at its deadline and makes the next one.
    turn: Mutex<()>,
}

impl<E: HookEngine> Definer<E> {
    /// Answer `OnDefineDomain`: the gate, the rewrite, then the sockets.
    pub async fn define(&self, domain: &[u8], vmi: &[u8]) -> Result<Bytes, Status> {
        let Ok(_turn) = timeout(Duration::from_secs(GATE_SECONDS_MAX), self.turn.lock()).await else {
            return Err(Status::unavailable("Watari is still preparing this VM's disks; this is tried again"));
        };
        let vmi = Vmi::parse(vmi).map_err(|e| Status::invalid_argument(e.to_string()))?;
        match timeout(Duration::from_secs(GATE_SECONDS_MAX), self.engine.gate(&vmi)).await {
            Ok(Gate::Ready) => {}
            Ok(Gate::NotYet(text)) => return Err(Status::unavailable(text)),
            Ok(Gate::Refused(text)) => return Err(Status::failed_precondition(text)),
            Err(_) => {
                return Err(Status::unavailable(
                    "Watari cannot tell yet whether this VM may run here; this is tried again",
                ));
            }
        }
        let synced = self.engine.disks().await;
        let options = RewriteOptions {
            reconnect_seconds: self.config.reconnect_seconds,
            marker: self.config.marker.as_ref().map(|p| p.to_string_lossy().into_owned()),
            hotplugged: vmi.hotplugged_volumes(),
        };
        let rewritten = rewrite(domain, &synced, &options).map_err(|e| Status::failed_precondition(e.to_string()))?;
        if let Some(path) = &self.config.marker {
            let failed = |e: io::Error| Status::internal(format!("the marker disk cannot be made: {e}"));
            ensure_marker_file(path).map_err(failed)?;
        }
        let volumes: BTreeSet<&str> = synced.iter().map(|s| s.volume.as_str()).collect();
        timeout(Duration::from_secs(PREPARE_SECONDS_MAX), self.prepare(&volumes)).await.map_err(|_| {
            Status::unavailable(format!(
                "Watari is still opening this VM's disks after {PREPARE_SECONDS_MAX} s; this is tried again"
            ))
        })??;
        self.engine.defined(&rewritten.report).await;
        for left in &rewritten.report.left {
            tracing::info!(volume = left.volume, target_dev = left.target, "disk left alone: {}", left.reason);
        }
        tracing::info!(served = rewritten.report.served.len(), marker = ?rewritten.report.marker, "domain rewritten");
        Ok(rewritten.xml.into())
    }

    async fn prepare(&self, volumes: &BTreeSet<&str>) -> Result<(), Status> {
        for volume in volumes {
            let prepared = self.engine.prepare(volume).await;
            prepared.map_err(|text| Status::unavailable(format!("volume {volume} cannot be served yet: {text}")))?;
        }
        Ok(())
    }

    /// Answer `Shutdown`.
    pub async fn shutdown(&self) {
        if timeout(Duration::from_secs(SHUTDOWN_SECONDS_MAX), self.engine.shutdown()).await.is_err() {
            tracing::warn!(seconds = SHUTDOWN_SECONDS_MAX, "draining did not end in time; virt-launcher goes on");
        }
    }
}
