//! The sidecar: shells around the pure core. Each module is one shell; `main.rs` only picks one.

pub mod cli;
pub mod config;
pub mod engine;
pub mod identity;
pub mod pki;
pub mod throttle;
pub mod tls;
