//! Metrics over plain HTTP: what the leading operator last found of each pair, and how often its work failed. `/metrics`, OpenMetrics text.
//!
//! Sidecars and gateways have metrics of their own; these are what alerts are made of, since they are there also when a sidecar is not.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use kube::ResourceExt as _;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use strum::IntoEnumIterator as _;
use tokio::net::TcpListener;
use watari_crds::conditions::{Kind, Status};
use watari_crds::pair::{Phase, SyncPair, SyncPairStatus};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Which pair a series is of.
#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct PairLabels {
    namespace: String,
    pair: String,
    vm: String,
    peer: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct PhaseLabels {
    namespace: String,
    pair: String,
    phase: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct KindLabel {
    kind: String,
}

/// Shared by controllers and server.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    leading: Gauge,
    ready: Family<PairLabels, Gauge>,
    phase: Family<PhaseLabels, Gauge>,
    committed: Family<PairLabels, Gauge>,
    lag: Family<PairLabels, Gauge>,
    moves: Family<PairLabels, Gauge>,
    failures: Family<KindLabel, Counter>,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let mut registry = Registry::with_prefix("watari_operator");
        let (leading, failures) = (Gauge::default(), Family::default());
        registry.register("leading", "1: this operator runs the controllers", leading.clone());
        registry.register("failed_reconciles", "Reconciles that ended in an error, by object", failures.clone());
        let mut pairs = |name: &str, help: &str, unit: Option<Unit>| {
            let family = Family::<PairLabels, Gauge>::default();
            match unit {
                Some(unit) => registry.register_with_unit(name, help, unit, family.clone()),
                None => registry.register(name, help, family.clone()),
            }
            family
        };
        let ready = pairs("pair_ready", "1: a whole generation is at the peer and changes follow", None);
        let committed = pairs(
            "pair_committed_timestamp",
            "When the newest generation that is whole at the peer was cut",
            Some(Unit::Seconds),
        );
        let lag = pairs("pair_lag", "Bytes of the disks that are not whole at the peer", Some(Unit::Bytes));
        let moves = pairs("pair_moves", "How often the VM has changed sites", None);
        let phase = Family::<PhaseLabels, Gauge>::default();
        registry.register("pair_phase", "1: the phase that the pair is in", phase.clone());
        Metrics { registry: Arc::new(registry), leading, ready, phase, committed, lag, moves, failures }
    }
}

impl Metrics {
    /// From now on this operator runs the controllers.
    pub fn leads(&self) {
        self.leading.set(1);
    }

    /// A reconcile of an object of this kind failed.
    pub fn failed(&self, kind: &str) {
        self.failures.get_or_create(&KindLabel { kind: kind.to_owned() }).inc();
    }

    /// What was found of a pair. Figures that are not known now have no series.
    pub fn found(&self, pair: &SyncPair, status: &SyncPairStatus) {
        let labels = labels(pair);
        let is_ready =
            |it: &watari_crds::conditions::Condition| it.kind == Kind::Ready.name() && it.status == Status::True;
        let ready = status.conditions.iter().any(is_ready);
        self.ready.get_or_create(&labels).set(i64::from(ready));
        self.moves.get_or_create(&labels).set(status.moves);
        let cut = status.committed.as_ref().map(|it| it.cut_time.as_second());
        for (family, value) in [(&self.committed, cut), (&self.lag, status.lag_bytes)] {
            match value {
                Some(value) => drop(family.get_or_create(&labels).set(value)),
                None => drop(family.remove(&labels)),
            }
        }
        self.leave_phases(&labels);
        self.phase.get_or_create(&of_phase(&labels, status.phase)).set(1);
    }

    /// A pair that is gone.
    pub fn forget(&self, pair: &SyncPair) {
        let labels = labels(pair);
        for family in [&self.ready, &self.committed, &self.lag, &self.moves] {
            family.remove(&labels);
        }
        self.leave_phases(&labels);
    }

    fn leave_phases(&self, labels: &PairLabels) {
        for phase in Phase::iter() {
            self.phase.remove(&of_phase(labels, phase));
        }
    }

    fn response(&self) -> Response {
        let mut written = String::new();
        match text::encode(&mut written, &self.registry) {
            Ok(()) => ([(header::CONTENT_TYPE, OPEN_METRICS)], written).into_response(),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        }
    }
}

fn labels(pair: &SyncPair) -> PairLabels {
    PairLabels {
        namespace: pair.namespace().unwrap_or_default(),
        pair: pair.name_any(),
        vm: pair.spec.vm_name.clone(),
        peer: pair.spec.peer.clone(),
    }
}

fn of_phase(labels: &PairLabels, phase: Phase) -> PhaseLabels {
    PhaseLabels { namespace: labels.namespace.clone(), pair: labels.pair.clone(), phase: phase.into() }
}

/// Serves until `stop`. Errors are those of the socket.
pub async fn serve(
    listen: SocketAddr,
    metrics: Metrics,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let routes = Router::new().route("/metrics", get(async move || metrics.response()));
    axum::serve(TcpListener::bind(listen).await?, routes).with_graceful_shutdown(stop).await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use serde_json::json;

    fn pair() -> SyncPair {
        let pair = json!({
            "apiVersion": "watari.io/v1alpha1", "kind": "SyncPair", "metadata": { "name": "shop", "namespace": "web" },
            "spec": { "vmName": "vm1", "peer": "osaka" },
        });
        serde_json::from_value(pair).unwrap()
    }

    fn scraped(metrics: &Metrics) -> String {
        let mut written = String::new();
        text::encode(&mut written, &metrics.registry).unwrap();
        written
    }

    #[test]
    fn a_pair_has_one_phase_and_no_figure_that_is_not_known_and_goes_with_its_object() {
        let metrics = Metrics::default();
        metrics
            .found(&pair(), &SyncPairStatus { phase: Phase::Synchronizing, lag_bytes: Some(7), ..Default::default() });
        metrics.found(&pair(), &SyncPairStatus { phase: Phase::Protected, moves: 2, ..Default::default() });
        let text = scraped(&metrics);
        let labels = r#"{namespace="web",pair="shop",vm="vm1",peer="osaka"}"#;
        assert!(text.contains(&format!("watari_operator_pair_moves{labels} 2\n")), "{text}");
        assert!(text.contains(&format!("watari_operator_pair_ready{labels} 0\n")), "{text}");
        assert!(
            text.contains(r#"watari_operator_pair_phase{namespace="web",pair="shop",phase="Protected"} 1"#),
            "{text}"
        );
        assert!(!text.contains("Synchronizing") && !text.contains("pair_lag_bytes{"), "{text}");
        metrics.forget(&pair());
        assert!(!scraped(&metrics).contains("shop"), "{}", scraped(&metrics));
    }
}
