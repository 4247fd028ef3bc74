//! A stand-in for KubeVirt, for tests on clusters that do not have it. It plays only what Watari touches: see FIDELITY.md for what is
//! played, what differs, and what is not there at all.
//!
//! [`controller`] (VM → VMI → Pod) runs outside the cluster, [`launcher`] in the compute container, whose process 1 is [`monitor`].

pub mod controller;
pub mod crds;
pub mod hooks;
pub mod image;
pub mod launcher;
pub mod monitor;
pub mod render;
