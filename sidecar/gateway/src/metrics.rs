//! Metrics and health of a gateway, over HTTP: `/metrics`, `/healthz` (it answers) and `/readyz` (it has had routes).
//!
//! Names begin with `watari_gateway_`. There is no series per pair: the sidecars have those.

use std::{fmt, net::SocketAddr, sync::Arc, sync::atomic::AtomicI64};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};
use tokio::{net::TcpListener, task::JoinHandle};

use crate::{places::Places, table::Table};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why a connection was not routed, or not for long.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, EncodeLabelValue)]
pub enum Refusal {
    /// No whole ClientHello in time.
    HelloTimeout,
    /// It gave up, or the connection broke, before its ClientHello was whole.
    Gone,
    NotTls,
    HelloTooLong,
    NoServerName,
    UnknownServerName,
    /// It waited when the waiting room was full.
    Evicted,
    GatewayFull,
    SourceFull,
    RouteFull,
    /// Nobody answers behind the route.
    Unreachable,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct RefusalLabel {
    reason: Refusal,
}

/// Bytes relayed since the start.
#[derive(Clone, Default, Debug)]
pub struct Bytes {
    pub to_pods: Counter,
    pub to_clients: Counter,
}

/// What the gateway counts.
#[derive(Clone, Default)]
pub struct Counts {
    pub accepted: Counter,
    pub routed: Counter,
    pub bytes: Bytes,
    refused: Family<RefusalLabel, Counter>,
}

impl Counts {
    pub fn refuse(&self, reason: Refusal) {
        self.refused.get_or_create(&RefusalLabel { reason }).inc();
    }

    /// Refused for this reason since the start.
    pub fn refused(&self, reason: Refusal) -> u64 {
        self.refused.get_or_create(&RefusalLabel { reason }).get()
    }
}

/// All that reports are made from.
#[derive(Clone)]
pub struct Observed {
    pub counts: Counts,
    pub places: Arc<Places>,
    pub table: Arc<Table>,
}

/// A serving endpoint; it ends when this is dropped.
pub struct MetricsServer {
    pub address: SocketAddr,
    server: JoinHandle<()>,
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Serves on `address`; port 0 takes a free one.
pub async fn serve(address: SocketAddr, observed: Observed) -> std::io::Result<MetricsServer> {
    let routes = Router::new()
        .route("/metrics", get(scrape))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .with_state(observed);
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    let server = tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, routes).await {
            tracing::error!(%error, "the metrics server ended");
        }
    });
    Ok(MetricsServer { address, server })
}

async fn readyz(State(observed): State<Observed>) -> (StatusCode, String) {
    let status = observed.table.status();
    match (status.loaded, status.error) {
        (true, _) => (StatusCode::OK, format!("{} routes\n", status.routes)),
        (false, error) => (StatusCode::SERVICE_UNAVAILABLE, error.unwrap_or_else(|| "no routes yet".to_owned()) + "\n"),
    }
}

async fn scrape(State(observed): State<Observed>) -> Response {
    match encode(&observed) {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Everything in OpenMetrics text.
pub fn encode(observed: &Observed) -> Result<String, fmt::Error> {
    let (waiting, routed) = observed.places.counts();
    let status = observed.table.status();
    let counts = &observed.counts;
    let mut registry = Registry::with_prefix("watari_gateway");
    registry.register("accepted_connections", "Connections accepted", counts.accepted.clone());
    registry.register("routed_connections", "Connections that reached their sidecar", counts.routed.clone());
    registry.register("refused_connections", "Connections not routed, by reason", counts.refused.clone());
    let mut bytes = |name, help, counter: &Counter| {
        registry.register_with_unit(name, help, Unit::Bytes, counter.clone());
    };
    bytes("to_pods", "Bytes relayed from clients to sidecars", &counts.bytes.to_pods);
    bytes("to_clients", "Bytes relayed from sidecars to clients", &counts.bytes.to_clients);
    let mut gauge = |name, help, value: usize| {
        let gauge: Gauge<i64, AtomicI64> = Gauge::default();
        gauge.set(value as i64);
        registry.register(name, help, gauge);
    };
    gauge("waiting", "Connections now that have not named their pair", waiting);
    gauge("open", "Connections now that are routed", routed);
    gauge("routes", "Routes in force", status.routes);
    gauge("routes_file_bad", "1: the routes file as it is now is not in force", usize::from(status.error.is_some()));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}
