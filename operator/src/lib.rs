//! The operator, as a library: controllers, certificates, webhooks. `main` only reads the command line.
//!
//! Each controller's reconcile is observe → validate → decide → act → report; only observe, act and report hold a client.
//!
//! ```text
//!   card, peer   what this site says of itself; what can be done with a peer          PeerCluster
//!   pair         at the VM's home: the replica at the peer, the VM's wiring, status   SyncPair
//!   replica      at the peer: claims, certificate, configuration, Service, Pod        SyncReplica
//!   side         a move, as each of the two does its part of it
//!   routes       the gateway's routes, from the pairs' Services
//! ```

pub mod answers;
pub mod apply;
pub mod authority;
pub mod card;
pub mod configuration;
pub mod context;
pub mod events;
pub mod kubectl;
pub mod kubevirt;
pub mod metrics;
pub mod objects;
pub mod pair;
pub mod peer;
pub mod pki;
pub mod replica;
pub mod routes;
pub mod settings;
pub mod side;
pub mod sidecar;
pub mod wake;
pub mod webhooks;

use context::Context;

/// All controllers, for as long as the process is the leader.
pub async fn run(context: Context) {
    let of = || context.clone();
    tokio::join!(card::keep(of()), routes::keep(of()), peer::run(of()), pair::run(of()), replica::run(of()));
}
