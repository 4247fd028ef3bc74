//! The stand-in on our clusters, one behaviour per file. `make e2e`.

mod boot;
mod call_off;
mod freeze;
mod hook;
mod in_cluster;
mod migrate;
mod stage;
mod trust;
