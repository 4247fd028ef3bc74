//! The sidecar: shells around the pure core. Each module is one shell; `main.rs` only picks one.

pub mod engine;
