//! The operator on two clusters. `make e2e`.

mod chart;
mod first_pair;
mod scene;
