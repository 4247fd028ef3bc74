//! The worker process: one engine, its control socket, its metrics and hook, and the end of it all.
//!
//! SIGTERM means "leave when no guest is connected" (design §3.1: the guest may still be shutting down through us); the
//! brain decides when that is. Exit codes: [`EXIT_REFUSED`](crate::cli::EXIT_REFUSED) when nothing was touched.

use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    cli::WorkerFlags,
    config::Config,
    control,
    engine::{
        awaiting,
        event::Event,
        handle::Handle,
        hooking,
        start::{self, Running, StartError},
        steering::Steering,
    },
    metrics,
};

/// Why a worker ended without being asked to.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Control(#[from] control::ControlError),
    #[error(transparent)]
    Metrics(#[from] metrics::MetricsError),
    #[error("hook.dir: {0}")]
    Hook(String),
    #[error("signals: {0}")]
    Signals(std::io::Error),
}

/// Run until the brain ends; returns the exit code.
pub async fn run(config: Config, front_end: bool, flags: &WorkerFlags) -> Result<u8, WorkerError> {
    let config = Arc::new(config);
    let mut terminate = signal(SignalKind::terminate()).map_err(WorkerError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(WorkerError::Signals)?;
    if let (Some(hook), true) = (&config.hook, front_end)
        && !awaiting::missing(&config).is_empty()
    {
        tokio::select! {
            made = awaiting::disks(&config, hook) => made.map_err(WorkerError::Hook)?,
            _ = terminate.recv() => return Ok(0),
            _ = interrupt.recv() => return Ok(0),
        }
    }
    let running = start::start(config.clone(), front_end, flags).await?;
    let handle =
        Handle { post: running.post.clone(), report: running.report.clone(), signals: running.signals.clone() };
    let steering: Arc<dyn Steering> = Arc::new(handle.clone());
    let control = control::serve(&config.control_socket, steering.clone())?;
    let _metrics = match &config.metrics {
        Some(at) => Some(metrics::serve(at, steering.clone()).await?),
        None => None,
    };
    let _hook = match (&config.hook, front_end) {
        (Some(hook), true) => Some(hooking::start(&config, hook, handle).await.map_err(WorkerError::Hook)?),
        _ => None,
    };
    tracing::info!(listen = %running.listening, folder = %config.folder.display(), "ready");
    if flags.draining {
        (running.post)(Event::Terminate);
    }
    let Running { brain, post, servers, stop, .. } = running;
    let mut brain = tokio::task::spawn_blocking(move || brain.join().unwrap_or(crate::engine::EXIT_RECORD));
    let code = loop {
        tokio::select! {
            code = &mut brain => break code.unwrap_or(crate::engine::EXIT_RECORD),
            _ = terminate.recv() => post(Event::Terminate),
            _ = interrupt.recv() => post(Event::Terminate),
        }
    };
    stop.send_replace(true);
    for server in &servers {
        server.shutdown(std::time::Duration::from_secs(2));
    }
    control.stop().await;
    Ok(u8::try_from(code).unwrap_or(1))
}
