//! The test guest's workload, as far as the host must know it too: how a block looks ([`block`]), which block is written
//! when ([`schedule`]), what an image must therefore hold ([`check`]), and what the guest reports ([`report`]).
//!
//! Everything about a run follows from its [`schedule::Layout`] and one number per stream (how many operations were
//! acknowledged), so the whole expected content of all disks is known without keeping a list: the guest keeps it in its
//! memory to judge itself, and the host can judge an image on its own, even one whose guest is long gone.
//!
//! The program itself (`main.rs`) is the init process of a tiny Linux; see there.

pub mod block;
pub mod check;
pub mod report;
pub mod schedule;
