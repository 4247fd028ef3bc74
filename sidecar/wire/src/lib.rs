//! The wire: generated protobuf types and services, and the serialisable [`report`].

pub mod report;

/// Between the two sites of a pair.
#[allow(clippy::all, missing_docs)]
pub mod replication {
    tonic::include_proto!("watari.replication.v1");
}

/// Between a sidecar and whoever steers it.
#[allow(clippy::all, missing_docs)]
pub mod control {
    tonic::include_proto!("watari.control.v1");
}
