//! The libvirt pair: two libvirtd, one per site, driven as KubeVirt's virt-launcher and virt-handler drive theirs.
//!
//! ```text
//!        site a                                                    site b
//!  ┌──────────────────────────────┐                       ┌──────────────────────────────┐
//!  │ own mount, UTS, net namespace │                       │                              │
//!  │ libvirtd ── QEMU             │      TCP over the WAN  │              libvirtd ── QEMU │
//!  │    │  unix sockets ── Proxies ┼───────────────────────┼── Proxies ── unix sockets     │
//!  │ /run/watari/VOL.sock (NBD)   │                       │   /run/watari/VOL.sock        │
//!  └──────────────────────────────┘                       └──────────────────────────────┘
//! ```
//!
//! Every path inside a site is the same at both sites, as it is in two virt-launcher Pods; [`LibvirtSite::inside`] says where the
//! harness finds it. No process namespace: a libvirtd that cannot reap its QEMU stalls for 40 s at each end of one.
//!
//! - `daemon.rs`: a site's namespaces, libvirtd, virsh;
//! - `domain.rs`: a VM as KubeVirt writes its domain;
//! - `hooks.rs`: virt-launcher's hook manager, with the schema loss between the calls;
//! - `vm.rs`: define through the hook, start, look at, end;
//! - `proxy.rs`, `migrate.rs`: virt-handler's proxies and virt-launcher's migration call;
//! - `synced.rs`: a VM whose disks our sidecars hold, and its way to the other site as the operator and KubeVirt go it.
//!
//! ```no_run
//! # use std::time::Duration;
//! # use watari_e2e::{libvirt::*, pair::{Pair, PairOptions}, qemu::Machine, site::TestBed, wan::Shape};
//! # fn main() -> anyhow::Result<()> {
//! let bed = TestBed::new("libvirt", Shape::wan(100_000_000, Duration::from_millis(170)))?;
//! let (a, b) = (LibvirtSite::start(&bed.a)?, LibvirtSite::start(&bed.b)?);
//! // The sidecars run inside: `/run/watari/VOL.sock` and the hook socket's folder are where QEMU and virt-launcher see them.
//! let mut pair = Pair::in_pods(&bed, [&a, &b], PairOptions::default())?;
//! pair.start(1, "replica")?;
//! pair.start(0, "primary")?;
//!
//! let vm = VirtualMachine::new("vm", Machine::small(2).with("rate=2500000"));
//! let hooks = a.hooks()?; // as virt-launcher looks for them
//! a.define_through_hook(&hooks, &vm)?;
//! let mut guest = a.start_vm(&vm)?.control();
//! guest.hello(Duration::from_secs(60))?;
//!
//! // A target's sidecar and an open handover, as [`SyncedVm::cross`] makes them, then:
//! b.wait_at_gate(&b.hooks()?, &vm, Duration::from_secs(240))?; // the target's OnDefineDomain, once per second
//! let report = a.migrate_to(&b, &vm, &MigrationOptions::default())?; // or begin_migration, abort, finish
//! guest.move_to(b.vm(&vm).control_socket());
//! hooks.shutdown().ok(); // virt-launcher's goodbye to the source's sidecar
//! println!("{report:?}, {:?}", guest.verify(Duration::from_secs(60))?);
//! # Ok(())
//! # }
//! ```
//!
//! What it does not model: TLS between the proxies, KubeVirt's retries and their timing, and everything that needs an API server.

use std::{io, path::PathBuf};

use crate::process;

mod daemon;
pub mod domain;
mod hooks;
mod migrate;
pub mod proxy;
mod synced;
mod vm;

pub use daemon::LibvirtSite;
pub use domain::VirtualMachine;
pub use hooks::{Hooks, Refusal};
pub use migrate::{Migration, MigrationOptions, MigrationReport, virsh_arguments};
pub use proxy::ProxyBytes;
pub use synced::{Crossing, SyncedVm, Trouble};
pub use vm::RunningVm;

/// Why the pair does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Process(#[from] process::Error),
    #[error(transparent)]
    Timeout(#[from] process::Timeout),
    #[error(transparent)]
    Netns(#[from] crate::netns::Error),
    #[error(transparent)]
    Guest(#[from] crate::guest::Error),
    /// A tool is missing.
    #[error("cannot run {program}: {source}: run e2e/setup.sh")]
    Tool { program: &'static str, source: io::Error },
    /// virsh said no.
    #[error("site {site}: virsh {command}: {message}")]
    Virsh { site: String, command: String, message: String },
    /// No hook sidecar offers what virt-launcher needs.
    #[error("site {site}: {what}")]
    Hook { site: String, what: String },
    /// The hook sidecar refused the domain.
    #[error("site {site}: {refusal}")]
    Refused { site: String, refusal: Refusal },
    #[error("{what} ({path}): {source}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

impl Error {
    fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { what, path, source }
    }
}
