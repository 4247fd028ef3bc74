//! The sidecar: shells around the pure core. Each module is one shell; `main.rs` only picks one.

pub mod cli;
pub mod config;
pub mod control;
pub mod engine;
pub mod gateway;
pub mod identity;
pub mod inspect;
pub mod logging;
pub mod metrics;
pub mod pki;
pub mod status;
pub mod supervisor;
pub mod throttle;
pub mod tls;
pub mod worker;
