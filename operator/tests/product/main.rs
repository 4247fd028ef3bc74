//! The operator on two clusters. `make e2e`.

mod chart;
mod crossing;
#[path = "../support/definitions.rs"]
mod definitions;
mod first_pair;
mod gateways;
mod scene;
