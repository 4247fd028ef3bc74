//! The seam between KubeVirt's calls and the sidecar's engine.
//!
//! The hook server asks, the engine answers. The engine owns roles, epochs, files and NBD sockets; the server owns protocols,
//! deadlines and the domain XML. The methods are plain `async fn`s for whoever implements them:
//!
//! ```
//! use watari_hook::{Gate, HookEngine, SyncedDisk, Vmi};
//!
//! struct Always(Vec<SyncedDisk>);
//!
//! impl HookEngine for Always {
//!     async fn disks(&self) -> Vec<SyncedDisk> { self.0.clone() }
//!     async fn gate(&self, _vmi: &Vmi) -> Gate { Gate::Ready }
//!     async fn prepare(&self, _volume: &str) -> Result<(), String> { Ok(()) }
//!     async fn shutdown(&self) {}
//! }
//! ```

use std::future::Future;

use crate::{RewriteReport, SyncedDisk, Vmi};

/// May this VM be defined now?
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Gate {
    /// Yes.
    Ready,
    /// Not yet; KubeVirt asks again about once per second. The text reaches users as an event of the VMI: a sentence that says what
    /// is awaited and how far it is ("waiting for 12 MiB of 3 disks from site-a").
    NotYet(String),
    /// No, and waiting will not help: the text says why and what to do.
    Refused(String),
}

/// What the sidecar's engine answers to KubeVirt's hooks. All methods must be idempotent: virt-launcher repeats its calls. They
/// are never called concurrently by one server, except for [`shutdown`](HookEngine::shutdown), and their futures may be dropped at any
/// await when virt-launcher gives up on a call: work that must not stop half-way belongs into a task of the engine's own.
pub trait HookEngine: Send + Sync + 'static {
    /// The volumes that are to be served by us, all of them: a define fails when one cannot be.
    fn disks(&self) -> impl Future<Output = Vec<SyncedDisk>> + Send;

    /// Asked first at every define. `vmi.role()` tells a boot from a migration target; on a target stay [`Gate::NotYet`] until
    /// in sync. Answer at once (within [`GATE_SECONDS_MAX`](crate::server::GATE_SECONDS_MAX)) rather than wait.
    fn gate(&self, vmi: &Vmi) -> impl Future<Output = Gate> + Send;

    /// Have `volume`'s NBD socket accept connections when this returns: QEMU connects right after the define. Data is opened here
    /// and not before, because virt-handler makes, grows and chowns `disk.img` until then.
    ///
    /// Errors: a sentence for users; KubeVirt tries again.
    fn prepare(&self, volume: &str) -> impl Future<Output = Result<(), String>> + Send;

    /// Told what was rewritten and what was left alone, after every successful define.
    fn defined(&self, report: &RewriteReport) -> impl Future<Output = ()> + Send {
        let _ = report;
        async {}
    }

    /// QEMU is gone (it comes also after migrating away and after a failed incoming migration). May take up to
    /// [`SHUTDOWN_SECONDS_MAX`](crate::server::SHUTDOWN_SECONDS_MAX), usable for draining. It does not come on a target that never had
    /// a domain, nor when virt-launcher crashed. As a plain container the process should exit 0 afterwards, as a native
    /// sidecar stay until SIGTERM.
    fn shutdown(&self) -> impl Future<Output = ()> + Send;
}
