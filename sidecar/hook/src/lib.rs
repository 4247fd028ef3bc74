//! KubeVirt's hook sidecar protocol and the rewriting of domain XML, without any knowledge of disks' contents.
//!
//! Where to look: `rewrite.rs` turns a domain into one whose synchronised disks we serve; `disk.rs` judges one disk; `server.rs`
//! answers virt-launcher and asks a [`HookEngine`] (`engine.rs`); `lossy.rs` models what KubeVirt's own schema forgets between two
//! calls, for tests. Facts about KubeVirt are cited by its source files.

mod callbacks;
mod disk;
mod engine;
pub mod lossy;
mod marker;
pub mod proto;
mod rewrite;
pub mod server;
mod socket;
mod tree;
mod vmi;

pub use disk::{ALIAS_PREFIX, LeftReason, MARKER_ALIAS, SERVED_ALIAS_PREFIX};
pub use engine::{Gate, HookEngine};
pub use marker::{MARKER_BYTES, MarkerOutcome, ensure_marker_file, needs_marker};
pub use rewrite::{
    LeftDisk, RECONNECT_SECONDS_MIN, RewriteError, RewriteOptions, RewriteReport, Rewritten, ServedDisk, SyncedDisk,
    disks_to_copy, rewrite,
};
pub use server::{HookConfig, HookError, HookServer};
pub use tree::XmlError;
pub use vmi::{LaunchRole, Vmi, VmiError};
