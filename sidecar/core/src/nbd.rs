//! The NBD protocol as types and bytes: the server's half of the fixed newstyle handshake and of the transmission phase.
//!
//! Purpose: everything about NBD that can be decided without a socket. [`handshake`] is a state machine from client
//! bytes to reply bytes; [`request`] decodes and judges one transmission request; [`reply`] encodes what goes back;
//! [`wire`] holds the protocol's numbers. Source: `doc/proto.md` of the NBD project, whose section names the comments use.
//!
//! Invariants of every decoder here:
//! - no input panics, and no length that a client sent is allocated or added to before it was checked against a limit;
//! - what the specification demands as an answer (an error reply, an ignored field, a closed connection) is decided
//!   here, so that the shell cannot answer differently on one of its paths.
//!
//! Not here: sockets, threads, the disk, time limits (the shell's), TLS (the sockets are local), oldstyle handshakes,
//! and the experimental extended headers.

pub mod handshake;
pub mod reply;
pub mod request;
pub mod wire;

#[cfg(test)]
mod handshake_tests;
mod meta;
#[cfg(test)]
mod transmission_tests;

pub use handshake::{Catalogue, CloseReason, ExportShape, Handshake, Negotiated, Progress};
pub use request::{Command, RequestHeader, Session, Verdict};
