//! The operator on two clusters. `make e2e`.

mod chart;
#[path = "../support/definitions.rs"]
mod definitions;
mod first_pair;
mod scene;
