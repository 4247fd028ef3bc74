//! The operator on two clusters. `make e2e`.

mod chart;
mod crossing;
#[path = "../support/definitions.rs"]
mod definitions;
mod failover;
mod first_pair;
mod gate;
mod installed;
mod killed;
mod lifecycle;
mod play;
mod scene;
