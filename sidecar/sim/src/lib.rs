//! Two sites, their guests, disks, network and operator in one deterministic simulation: the real core (tracker, primary,
//! replica, handover) against a model of the truth that knows nothing of its bookkeeping.
//!
//! One seed is one history ([`history::run`]). Invariants I1 to I10 (design §3.7) are asserted where they can be seen:
//! in [`truth`] (what a generation and a disk must hold), [`guest`] and [`world`] (who may write), [`history`] (left in
//! peace, it converges). Whoever wants to know what the simulation reached reads its [`coverage`].

pub mod content;
pub mod coverage;
pub mod ctx;
pub mod faults;
pub mod guest;
pub mod history;
pub mod intents;
pub mod mutations;
pub mod net;
pub mod node;
pub mod operator;
pub mod process;
pub mod readers;
pub mod rights;
pub mod source;
pub mod target;
pub mod trouble;
pub mod truth;
pub mod verify;
pub mod world;
