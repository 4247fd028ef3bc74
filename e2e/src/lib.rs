//! Whole-system tests: two sites in network namespaces, an emulated WAN, real QEMU, a guest that checks itself.
//!
//! ```text
//!  namespace watari-PID-…-a                                  namespace watari-PID-…-b
//!  ┌──────────────────────────────┐                          ┌──────────────────────────────┐
//!  │ QEMU ─ disks: file or NBD    │   wan0            wan0   │ QEMU -incoming               │
//!  │ watari-sidecar primary       ├─── TUN ─▶ [wan] ─▶ TUN ──┤ watari-sidecar replica       │
//!  └──────────────────────────────┘  10.77.0.1     10.77.0.2 └──────────────────────────────┘
//!        ▲ QMP, control line (unix sockets)                        ▲
//!        └────────────────────── the test ─────────────────────────┘
//! ```
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`site`] | [`site::TestBed`]: sites A and B, the link between them, a scratch folder each; one at a time per process |
//! | [`wan`] | the link: rate, delay, jitter, loss, queue, cut, black hole; changeable while it runs; counters |
//! | [`netns`], [`process`], [`reaper`] | namespaces and child processes of which nothing remains, whatever happens |
//! | [`qemu`] | one machine at either site, QMP, live migration |
//! | [`guest`] | kernel and initramfs, the client of the guest's control line |
//! | [`image`] | judges raw images without their guest |
//! | [`libvirt`] | the libvirt pair, driven as virt-launcher drives it |
//! | [`baseline`] | the full block migration that KubeVirt would do |
//! | [`bench`] | `make bench`: figures beside their peers |
//! | [`build`] | the workspace's binaries, built when needed |
//!
//! # A test, from end to end
//! ```no_run
//! # use std::time::Duration;
//! # use watari_e2e::{guest, image, qemu::*, site::TestBed, wan::{Direction, Shape}};
//! # fn main() -> anyhow::Result<()> {
//! let bed = TestBed::new("move", Shape::wan(100_000_000, Duration::from_millis(170)))?;
//!
//! // Our sidecars, each in its site; logs in SITE/NAME.log, killed with the value, `kill9()` for the brave.
//! let mut primary = bed.a.sidecar("primary", &["primary", "--config", "primary.toml"])?; // relative to bed.a.dir
//! let replica = bed.b.sidecar("replica", &["replica", "--config", "replica.toml"])?;
//! primary.check()?; // fails with the end of its log when it has ended
//!
//! // The same machine at both sites; only where the disks come from differs.
//! let machine = Machine::small(2).with("rate=2500000").with("blocks=16384").with("start=1");
//! let nbd = |dir: &std::path::Path| ["disk0", "disk1"].map(|name| {
//!     Backing::Nbd { socket: dir.join("nbd.sock"), export: name.to_owned() }
//! });
//! let source = Qemu::start(&bed.a, "vm", &machine, &nbd(&bed.a.dir), Start::Boot)?;
//! let mut guest = source.control();
//! guest.hello(Duration::from_secs(40))?;
//!
//! bed.wan.cut(); // and bed.wan.black_hole(Direction::AToB), change_both(|shape| shape.loss = 0.01), …
//! bed.wan.restore()?;
//!
//! let target = Qemu::start(&bed.b, "vm", &machine, &nbd(&bed.b.dir), Start::Incoming)?;
//! guest.reset_gaps()?;
//! let bytes = bed.wan.bytes_delivered();
//! let report = migrate(&source, &target, &bed.b, &MigrationOptions::default())?;
//! guest.move_to(target.control_socket());
//! // Stops are told by the machine's clock once a second: look after two.
//! std::thread::sleep(Duration::from_millis(2500));
//! println!("{report:?} {:?} {} bytes", guest.stats()?.gaps, bed.wan.bytes_delivered() - bytes);
//!
//! let verdict = guest.verify(Duration::from_secs(60))?; // pauses the writers; `resume()` goes on
//! assert!(verdict.clean(), "{verdict:?}");
//! source.quit()?;
//! target.quit()?;
//! // What is on B's disks, without the guest: nothing that it was told is written may be missing.
//! let images = [bed.b.dir.join("disk0.img"), bed.b.dir.join("disk1.img")];
//! let tallies = image::check(&images, Some(&verdict.groups[0].acknowledged))?;
//! assert!(tallies.iter().all(|tally| tally.clean()), "{tallies:?}");
//! # Ok(())
//! # }
//! ```
//! For an image taken at *some* point in time (a generation, a failover) `image::check(&images, None)` demands that all
//! disks together are one point in time of every writer.
//!
//! Needs root and what `e2e/setup.sh` installs. `WATARI_E2E_KEEP=1` keeps the scratch folders (`target/e2e/run/PID`),
//! `WATARI_E2E_PROFILE=release` takes release builds of our binaries.

pub mod baseline;
pub mod bench;
pub mod build;
mod cpio;
pub mod guest;
pub mod image;
pub mod libvirt;
pub mod nbd;
pub mod netns;
pub mod pair;
pub mod process;
pub mod qemu;
pub mod reaper;
pub mod site;
pub mod storms;
pub mod wan;
