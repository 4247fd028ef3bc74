//! The gateway: one address per cluster behind which the sidecars of all pairs are reached.
//!
//! A sidecar that dials its peer names its pair in the TLS ClientHello (SNI). The gateway reads that one message, looks
//! the name up in its routes, connects to the address found there (the ClusterIP Service of that pair) and from then
//! on copies bytes both ways. It has no certificate and ends no TLS: who may speak to whom is decided by the two sidecars
//! alone, and a gateway in wrong hands sees and changes nothing, it can only refuse.
//!
//! What must hold: whatever a stranger does (says nothing, says it slowly, never stops, asks for a name that does not exist,
//! comes a thousand times) costs a bounded amount of memory ([`limits`]), and never the connections of others ([`places`]).
//!
//! Rooms: [`hello`] (bytes to a server name), [`routes`] (the file), [`table`] (the file, watched), [`places`] (who may
//! wait and who may stay), [`relay`] (copying), [`socket`] (dead peers), [`serve`] (the loop), [`metrics`]. It knows nothing of Kubernetes.

pub mod hello;
pub mod limits;
pub mod metrics;
pub mod places;
pub mod relay;
pub mod routes;
pub mod serve;
pub mod socket;
pub mod table;

pub use limits::Limits;
pub use serve::{Gateway, GatewayError, Options};
