//! The pure core of Watari: what must be right, and nothing that touches the world.
//!
//! No files, no sockets, no clocks, no randomness. Time, random numbers and bytes come in as arguments; I/O goes
//! through the two seams [`front`] (the guest) and [`storage`] (durable bytes). See `PROTOCOL.md` and `FORMAT.md`
//! beside this crate, and `ARCHITECTURE.md` at the root for where each room is.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod codec;
pub mod divergence;
pub mod frame;
pub mod front;
pub mod geometry;
pub mod handover;
pub mod limits;
pub mod nbd;
pub mod primary;
pub mod record;
pub mod regions;
pub mod replica;
pub mod slots;
pub mod storage;
pub mod tracker;
pub mod versions;
