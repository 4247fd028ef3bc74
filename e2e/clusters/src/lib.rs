//! Two (or more) real Kubernetes clusters on one machine, with an emulated WAN between them, and the tests that run on any two.
//!
//! ```text
//!        this machine                     namespaces watari-clusters-…
//!  ┌───────────────────────┐   ┌──────────────┐                        ┌──────────────┐
//!  │ kubectl, tests        │   │ node a-1     │                        │ node b-1     │
//!  │    │ 127.0.0.1:16441  │   │ etcd … Pods  │                        │ etcd … Pods  │
//!  │    ▼                  │   └──────┬───────┘                        └──────┬───────┘
//!  │ keeper ── doors ──────┼──▶ API   │                                       │
//!  │    ├───── WAN ────────┼─▶ router a ════ 100 Mbit/s, 170 ms ═════════ router b
//!  │    └───── volumes     │
//!  └───────────────────────┘
//! ```
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`plan`] | names, addresses, ports: arithmetic |
//! | [`folders`] | where everything lies |
//! | [`preflight`] | what is wrong with this machine, before anything is made |
//! | [`programs`], [`images`], [`pki`] | what clusters are made of |
//! | [`network`], [`cgroups`], [`node`], [`detached`] | machines made of namespaces |
//! | [`keeper`], [`door`], [`provision`], [`volumes`] | what they need from outside: WAN, a way in, storage |
//! | [`up`], [`down`] | the order of things |
//! | [`kubevirt`] | real KubeVirt on them |
//! | [`handle`] | a cluster as tests see it |

pub mod cgroups;
pub mod detached;
pub mod door;
pub mod down;
pub mod folders;
pub mod handle;
pub mod images;
pub mod keeper;
pub mod kubevirt;
pub mod network;
pub mod node;
pub mod pki;
pub mod plan;
pub mod preflight;
pub mod programs;
pub mod provision;
pub mod up;
pub mod volumes;
