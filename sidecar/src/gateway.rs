//! `watari-sidecar gateway`: the gateway ([`watari_gateway`]) with this program's command line and signals.
//!
//! It shares the binary and the image with the sidecars, and nothing else: no configuration, no folder, no engine.

use tokio::signal::unix::{Signal, SignalKind, signal};
use watari_gateway::{Gateway, GatewayError, Limits, Options};

use crate::cli;

/// Serves until SIGTERM or SIGINT. An error: it could not begin.
pub async fn run(options: &cli::Gateway) -> Result<(), GatewayError> {
    // Before it says that it listens: whoever reads that may end it at once.
    let told_to_end = told_to_end();
    let gateway = Gateway::bind(Options {
        listen: options.listen,
        routes: options.routes.clone(),
        metrics: options.metrics,
        drain: options.drain,
        limits: Limits::default(),
    })
    .await?;
    let (metrics, routes) = (gateway.metrics_addr(), gateway.observed().table.status().routes);
    tracing::info!(listen = %gateway.local_addr(), ?metrics, routes, "the gateway listens");
    gateway.run(told_to_end).await;
    Ok(())
}

/// Catches the signals from this call on; resolves at the first.
fn told_to_end() -> impl Future<Output = ()> {
    let catch = |kind| signal(kind).expect("the runtime was built with signals, and these may be caught");
    let (mut terminate, mut interrupt): (Signal, Signal) =
        (catch(SignalKind::terminate()), catch(SignalKind::interrupt()));
    async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}
