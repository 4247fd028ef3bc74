//! Watari's Kubernetes API and nothing else: what a person writes, what a controller reports, and what things are called.
//!
//! No client and no decision lives here; `operator` and the tests are built on it.

pub mod names;
pub mod wiring;
