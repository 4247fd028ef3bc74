//! Watari's Kubernetes API and nothing else: what a person writes, what a controller reports, and what things are called.
//!
//! | object | made by | says |
//! | --- | --- | --- |
//! | [`peer::PeerCluster`] | a person, or `kubectl watari connect` | where the other cluster is |
//! | [`pair::SyncPair`] | a person, at the VM's home | which VM is kept at the peer, and how |
//! | [`replica::SyncReplica`] | the home's operator, at the peer | what the peer has to hold |
//!
//! A field that does nothing yet is absent. No client and no decision lives here. `crdgen` writes the definitions into the
//! chart, and a test says when those are stale.

// Each printer column says its type, which the lint takes for one attribute said twice.
#![allow(clippy::duplicated_attributes)]

pub mod card;
pub mod conditions;
pub mod crossing;
pub mod failover;
pub mod generate;
pub mod kubevirt;
pub mod names;
pub mod pair;
pub mod peer;
pub mod quantity;
pub mod replica;
pub mod wiring;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;

/// All definitions, in the order in which they are installed.
pub fn definitions() -> [CustomResourceDefinition; 3] {
    [peer::PeerCluster::crd(), pair::SyncPair::crd(), replica::SyncReplica::crd()]
}
