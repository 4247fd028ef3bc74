//! The operator, as a library: controllers, certificates, webhooks. `main` only wires them.
//!
//! Each controller's reconcile is observe → validate → decide → act → report; only observe, act and report hold a client.

pub mod pki;
pub mod webhooks;
