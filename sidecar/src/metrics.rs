//! Prometheus metrics and health, over HTTP. Every value is read from the [`Report`] at the scrape: nothing is counted twice.
//!
//! Names begin with `watari_` and end in their unit. `pair` and `site` are labels of every series. `/healthz` says that
//! the worker answers; `/readyz` that it has taken its role. Neither depends on the peer: a cut link must not take a
//! virt-launcher Pod out of service.

use std::{collections::BTreeSet, fmt, io, os::unix::fs::FileTypeExt, path::Path, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, text},
    metrics::MetricType,
    registry::Registry,
};
use tokio::{
    net::{TcpListener, UnixListener},
    task::JoinHandle,
};
use watari_wire::report::Report;

use crate::{config::Metrics, engine::steering::Steering};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Debug, thiserror::Error)]
#[error("`metrics` ({at}): cannot listen: {error}; choose another address or path, or end what listens there")]
pub struct MetricsError {
    at: String,
    error: io::Error,
}

/// A serving endpoint; it ends when this is dropped.
pub struct MetricsServer {
    /// The TCP address in use, if it is one (port 0 takes a free one).
    pub address: Option<std::net::SocketAddr>,
    server: JoinHandle<()>,
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Serves `/metrics`, `/healthz` and `/readyz`.
pub async fn serve(at: &Metrics, steering: Arc<dyn Steering>) -> Result<MetricsServer, MetricsError> {
    let routes = Router::new()
        .route("/metrics", get(scrape))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(steering);
    match at {
        Metrics::Tcp(address) => {
            let refuse = |error| MetricsError { at: address.to_string(), error };
            let listener = TcpListener::bind(address).await.map_err(refuse)?;
            let address = listener.local_addr().map_err(refuse)?;
            let server = tokio::spawn(async move { log_end(axum::serve(listener, routes).await) });
            Ok(MetricsServer { address: Some(address), server })
        }
        Metrics::Unix(path) => {
            let refuse = |error| MetricsError { at: path.display().to_string(), error };
            remove_stale(path).map_err(refuse)?;
            let listener = UnixListener::bind(path).map_err(refuse)?;
            let server = tokio::spawn(async move { log_end(axum::serve(listener, routes).await) });
            Ok(MetricsServer { address: None, server })
        }
    }
}

fn log_end(result: io::Result<()>) {
    if let Err(error) = result {
        tracing::error!(%error, "the metrics server ended");
    }
}

/// A socket left by a killed worker; never one that is served, never another kind of file.
fn remove_stale(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => match std::os::unix::net::UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
            _ => Err(io::ErrorKind::AddrInUse.into()),
        },
        _ => Ok(()),
    }
}

async fn scrape(State(steering): State<Arc<dyn Steering>>) -> Response {
    match encode(steering.report()) {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn healthz(State(steering): State<Arc<dyn Steering>>) -> String {
    format!("ok {}\n", steering.report().version)
}

async fn readyz(State(steering): State<Arc<dyn Steering>>) -> (StatusCode, String) {
    let report = steering.report();
    if report.role.is_empty() {
        return (StatusCode::SERVICE_UNAVAILABLE, "no role yet\n".to_owned());
    }
    match report.replica.filter(|replica| replica.state == "Poisoned") {
        Some(_) => (StatusCode::SERVICE_UNAVAILABLE, "the replica's storage has failed\n".to_owned()),
        None => (StatusCode::OK, format!("{}\n", report.role)),
    }
}

/// A report in OpenMetrics text.
pub fn encode(report: Report) -> Result<String, fmt::Error> {
    let labels = [("pair", report.pair.clone()), ("site", report.site.clone())];
    let mut registry = Registry::with_labels(labels.into_iter().map(|(name, value)| (name.into(), value.into())));
    registry.register_collector(Box::new(ReportCollector(report)));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct ReportCollector(Report);

type Labels = Vec<(&'static str, String)>;

/// Writes one family after another.
struct Families<'a, 'b>(&'a mut DescriptorEncoder<'b>);

impl Families<'_, '_> {
    fn gauges(&mut self, name: &str, help: &str, samples: Vec<(Labels, f64)>) -> fmt::Result {
        if samples.is_empty() {
            return Ok(());
        }
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in samples {
            if labels.is_empty() {
                family.encode_gauge(&value)?;
            } else {
                family.encode_family(&labels.as_slice())?.encode_gauge(&value)?;
            }
        }
        Ok(())
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        self.gauges(name, help, vec![(Labels::new(), value)])
    }

    /// `name` without `_total`, which the format adds.
    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        family.encode_counter::<prometheus_client::encoding::NoLabelSet, u64, u64>(&value, None)
    }
}

impl Collector for ReportCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let mut families = Families(&mut encoder);
        site(&mut families, &self.0)?;
        disks(&mut families, &self.0)?;
        generations(&mut families, &self.0)?;
        link(&mut families, &self.0)?;
        verification(&mut families, &self.0)?;
        replica(&mut families, &self.0)
    }
}

fn site(families: &mut Families, report: &Report) -> fmt::Result {
    let info = vec![("version", report.version.clone())];
    families.gauges("watari_build_info", "The running version; always 1", vec![(info, 1.0)])?;
    let role = vec![("role", report.role.clone())];
    families.gauges("watari_role", "The role this side has now; always 1", vec![(role, 1.0)])?;
    let trust = vec![("trust", report.trust.clone())];
    families.gauges("watari_trust", "How far dirty marks are trusted now; always 1", vec![(trust, 1.0)])?;
    families.gauge("watari_epoch", "Counter of the epoch this side is in", report.epoch as f64)?;
    families.gauge("watari_epoch_floor", "Lower epochs are refused", report.floor as f64)?;
    families.gauge(
        "watari_logged_bytes",
        "Bytes in regions that would be compared with the peer after the loss of this node",
        report.logged_bytes as f64,
    )?;
    families.counter("watari_worker_restarts", "Workers that crashed and were replaced", report.worker_restarts)?;
    // One sample a type: a type that is reported twice would be a duplicate series.
    let mut seen = BTreeSet::new();
    let conditions = report.conditions.iter().filter(|condition| seen.insert(condition.kind.clone()));
    let conditions = conditions
        .map(|condition| {
            let labels = vec![("type", condition.kind.clone()), ("reason", condition.reason.clone())];
            (labels, f64::from(u8::from(condition.status)))
        })
        .collect();
    families.gauges("watari_condition", "1 while the condition holds", conditions)
}

fn disks(families: &mut Families, report: &Report) -> fmt::Result {
    let each = |value: fn(&watari_wire::report::DiskReport) -> f64| -> Vec<(Labels, f64)> {
        report.disks.iter().map(|disk| (vec![("disk", disk.name.clone())], value(disk))).collect()
    };
    families.gauges("watari_disk_size_bytes", "Exported size", each(|disk| disk.size_bytes as f64))?;
    families.gauges(
        "watari_disk_dirty_bytes",
        "Written since the newest committed generation",
        each(|disk| disk.dirty_bytes as f64),
    )?;
    families.gauges(
        "watari_disk_staged_bytes",
        "Of the dirty bytes, those durable at the peer but not committed",
        each(|disk| disk.staged_bytes as f64),
    )?;
    families.gauges("watari_disk_clients", "NBD clients connected", each(|disk| f64::from(disk.clients)))
}

fn generations(families: &mut Families, report: &Report) -> fmt::Result {
    let generations = &report.generations;
    families.gauge(
        "watari_committed_generation",
        "Number of the newest generation committed at the target",
        generations.committed_number as f64,
    )?;
    families.gauge(
        "watari_lag_seconds",
        "Age of the newest committed generation: what a disaster would lose now",
        generations.lag_seconds,
    )?;
    families.gauge("watari_lag_bytes", "Bytes not yet committed at the target", generations.lag_bytes as f64)?;
    families.gauge(
        "watari_open_generation_bytes",
        "Size of the open generation",
        generations.open_total_bytes as f64,
    )?;
    families.gauge("watari_open_generation_sent_bytes", "Of those, sent", generations.open_sent_bytes as f64)?;
    if let Some(eta) = generations.eta_seconds {
        families.gauge("watari_eta_seconds", "Predicted time until the open generation is committed", eta)?;
    }
    families.counter("watari_generations_committed", "Generations committed", generations.committed_count)?;
    families.counter(
        "watari_generations_given_up",
        "Generations given up because the guest overwrote more than could be preserved",
        generations.given_up_count,
    )
}

fn link(families: &mut Families, report: &Report) -> fmt::Result {
    let (link, transfer) = (&report.link, &report.transfer);
    families.gauge("watari_link_up", "1 while the peer is connected", f64::from(u8::from(link.connected)))?;
    families.gauge("watari_link_rtt_seconds", "Round-trip time to the peer", link.rtt_millis / 1000.0)?;
    families.gauge("watari_link_rate_bytes_per_second", "Measured delivery rate", link.rate_bytes_per_second)?;
    families.gauge(
        "watari_link_limit_bits_per_second",
        "Limit in force; 0 is unlimited",
        link.limit_bits_per_second as f64,
    )?;
    families.counter("watari_link_reconnects", "Connections to the peer that had to be made again", link.reconnects)?;
    families.counter("watari_sent_content_bytes", "Guest content covered by frames sent", transfer.content_bytes)?;
    families.counter("watari_sent_wire_bytes", "Bytes handed to the stream", transfer.wire_bytes)?;
    families.counter("watari_resent_bytes", "Sent again because a connection broke", transfer.resent_bytes)?;
    families.counter("watari_durable_bytes", "Newly durable at the peer", transfer.durable_bytes)?;
    families.counter("watari_frames", "Frames sent", transfer.frames)?;
    families.gauge(
        "watari_preserve_bytes",
        "Old content kept for the open generation",
        transfer.preserve_bytes as f64,
    )?;
    families.gauge("watari_preserve_limit_bytes", "The bound of that", transfer.preserve_limit_bytes as f64)
}

fn verification(families: &mut Families, report: &Report) -> fmt::Result {
    let Some(verification) = &report.verification else { return Ok(()) };
    families.gauge("watari_verify_pass_bytes", "Compared in this pass", verification.pass_bytes as f64)?;
    families.gauge("watari_verify_total_bytes", "Size of a whole pass", verification.pass_total_bytes as f64)?;
    families.gauge(
        "watari_verify_proved_timestamp_seconds",
        "When the last pass began that found all disks identical; 0: none yet",
        verification.proved_unix_millis as f64 / 1000.0,
    )?;
    families.counter(
        "watari_verify_differed_blocks",
        "Blocks of the replica that were not what was sent",
        verification.differed_blocks,
    )
}

fn replica(families: &mut Families, report: &Report) -> fmt::Result {
    let Some(replica) = &report.replica else { return Ok(()) };
    let state = vec![("state", replica.state.clone())];
    families.gauges("watari_replica_state", "State of the replica; always 1", vec![(state, 1.0)])?;
    families.gauge("watari_replica_kept_generations", "Generations that can be chosen", replica.kept.len() as f64)?;
    families.gauge("watari_replica_journal_bytes", "Journal in use", replica.journal_bytes as f64)?;
    families.gauge("watari_replica_journal_limit_bytes", "Room for the journal", replica.journal_limit_bytes as f64)?;
    families.gauge("watari_replica_free_bytes", "Free space in the metadata folder", replica.free_bytes as f64)?;
    families.gauge("watari_replica_undo_bytes", "Undo files of kept generations", replica.undo_bytes as f64)
}

#[cfg(test)]
mod tests {
    use watari_wire::report::{Condition, DiskReport, ReplicaReport};

    use super::*;

    fn report() -> Report {
        let mut report = Report {
            pair: "default/vm1".to_owned(),
            site: "tokyo".to_owned(),
            version: "0.1.0".to_owned(),
            role: "Serving".to_owned(),
            trust: "Tracked".to_owned(),
            epoch: 3,
            ..Report::default()
        };
        for name in ["root", "data"] {
            report.disks.push(DiskReport { name: name.to_owned(), dirty_bytes: 4096, ..DiskReport::default() });
        }
        report.generations.lag_seconds = 4.5;
        report.generations.committed_count = 7;
        report.link.rtt_millis = 170.0;
        report
    }

    #[test]
    fn each_value_of_the_report_appears_once_with_pair_and_site() {
        let text = encode(report()).expect("it encodes");
        for line in [
            "watari_lag_seconds{pair=\"default/vm1\",site=\"tokyo\"} 4.5",
            "watari_disk_dirty_bytes{pair=\"default/vm1\",site=\"tokyo\",disk=\"root\"} 4096.0",
            "watari_disk_dirty_bytes{pair=\"default/vm1\",site=\"tokyo\",disk=\"data\"} 4096.0",
            "watari_generations_committed_total{pair=\"default/vm1\",site=\"tokyo\"} 7",
            "watari_link_rtt_seconds{pair=\"default/vm1\",site=\"tokyo\"} 0.17",
            "watari_role{pair=\"default/vm1\",site=\"tokyo\",role=\"Serving\"} 1.0",
        ] {
            assert_eq!(text.lines().filter(|found| *found == line).count(), 1, "{line}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        assert!(!text.contains("watari_eta_seconds") && !text.contains("watari_replica_"), "{text}");
    }

    #[test]
    fn no_series_is_written_twice_even_from_a_clumsy_report() {
        let mut report = report();
        for _ in 0..2 {
            let kind = "PeerUnreachable".to_owned();
            report.conditions.push(Condition { kind, status: true, ..Condition::default() });
        }
        report.replica = Some(ReplicaReport::default());
        let text = encode(report).expect("it encodes");
        let mut series: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.rsplit_once(' ').expect("a value").0)
            .collect();
        series.sort_unstable();
        let count = series.len();
        series.dedup();
        assert_eq!(series.len(), count);
        assert!(text.contains("watari_replica_journal_bytes"));
    }
}
