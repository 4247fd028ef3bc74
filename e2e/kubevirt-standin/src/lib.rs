//! A stand-in for KubeVirt, for tests on clusters that do not have it. It plays only what Watari touches: see FIDELITY.md for what is
//! played, what differs, and what is not there at all.
//!
//! [`controller`] runs as one Pod per cluster ([`install`]): the decisions of [`vm`], [`vmi`] and [`migration`] are pure, [`act`] does
//! them, [`sync`] speaks with the other cluster, [`subresources`] and [`ca`] play virt-api and virt-operator. [`launcher`] runs in the compute
//! container, whose process 1 is [`monitor`].

pub mod act;
pub mod ca;
pub mod controller;
pub mod crds;
pub mod guest;
pub mod hooks;
pub mod image;
pub mod install;
pub mod launcher;
mod lines;
pub mod migration;
pub mod monitor;
pub mod objects;
pub mod quirks;
pub mod render;
pub mod seen;
pub mod subresources;
pub mod sync;
pub mod talk;
pub mod tls;
pub mod vm;
pub mod vmi;
