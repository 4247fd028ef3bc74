//! The operator's process: every replica of it answers the API server's webhooks; the one that holds the Lease runs the controllers.
//!
//! A leader that loses its Lease ends at once, and Kubernetes starts it again: two operators that both believe to lead would only repeat
//! each other's server-side applies, and what can hurt is fenced by epochs, never by the Lease.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Parser;
use futures::FutureExt as _;
use kube::Client;
use kube_lease_manager::LeaseManagerBuilder;
use tokio::sync::oneshot;
use tracing_subscriber::EnvFilter;
use watari_crds::names;
use watari_operator::authority;
use watari_operator::context::Context;
use watari_operator::metrics;
use watari_operator::settings::Arguments;
use watari_operator::webhooks::{
    follow,
    review::Knowledge,
    run::{self, Serving},
};

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().json().with_env_filter(filter).init();
    match operate(arguments).await {
        Ok(()) => {
            tracing::info!("ended, as asked");
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!("ended: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn operate(arguments: Arguments) -> anyhow::Result<()> {
    rustls::crypto::aws_lc_rs::default_provider().install_default().ok().context("this is the first provider")?;
    let stop = terminated().shared();
    let client = Client::try_default().await.context("no way to the API server")?;
    let context = Context::new(client, arguments.settings());
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(site = arguments.site, namespace = arguments.namespace, version, "begins");
    let listen = arguments.metrics_listen;
    let metrics = async {
        let served = metrics::serve(listen, context.metrics.clone(), stop.clone()).await;
        served.with_context(|| format!("metrics at {listen}"))
    };
    tokio::try_join!(admit(context.clone(), &arguments, stop.clone()), lead(context.clone(), stop.clone()), metrics)?;
    Ok(())
}

/// Without its leader a site stands still for so long, seconds: as Kubernetes' own controllers.
const LEASE_SECONDS: u64 = 15;
/// The leader renews so long before its Lease ends, seconds.
const RENEWAL_SECONDS: u64 = 5;

/// Webhooks, until `stop`.
async fn admit(
    context: Context,
    arguments: &Arguments,
    stop: impl Future<Output = ()> + Clone + Send + 'static,
) -> anyhow::Result<()> {
    let (told, listed) = oneshot::channel();
    let following = follow::run(context.clone(), told);
    let serving = async {
        // Whoever is asked before it knows where pairs are active would let a VM start twice.
        tokio::select! {
            listed = listed => listed.context("nothing follows where pairs are active")?,
            () = stop.clone() => return Ok(()),
        }
        let serving = Serving {
            client: context.client.clone(),
            listen: arguments.webhook_listen,
            endpoint: arguments.endpoint(),
            knowledge: Knowledge { settings: context.settings.sidecars(), placements: context.placements.clone() },
        };
        Ok(run::run(serving, async || authority::authorities(&context).await, stop.clone()).await?)
    };
    tokio::select! {
        () = following => bail!("nothing follows where pairs are active any more"),
        served = serving => served,
    }
}

/// Controllers, from the moment at which this process leads, until `stop`.
async fn lead(context: Context, stop: impl Future<Output = ()> + Clone) -> anyhow::Result<()> {
    let lease = LeaseManagerBuilder::new(context.client.clone(), names::LEASE)
        .with_namespace(&context.settings.namespace)
        .with_duration(LEASE_SECONDS)
        .with_grace(RENEWAL_SECONDS)
        .build()
        .await
        .context("the Lease")?;
    let (mut leading, keeper) = lease.watch().await;
    tracing::info!("waiting for the Lease");
    tokio::select! {
        leads = leading.wait_for(|leads| *leads) => drop(leads.context("the Lease's keeper ended")?),
        () = stop.clone() => return Ok(()),
    }
    tracing::info!("leading");
    context.metrics.leads();
    tokio::select! {
        () = watari_operator::run(context) => bail!("the controllers ended"),
        lost = leading.wait_for(|leads| !*leads) => {
            drop(lost);
            bail!("the Lease is lost: another operator may lead");
        }
        () = stop => {}
    }
    // Given back, so that the next one need not wait until it runs out.
    drop(leading);
    keeper.await??;
    Ok(())
}

/// SIGTERM, as Kubernetes ends a Pod, or an interrupt.
async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
    }
}
