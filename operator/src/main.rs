//! The operator's process: reads its command line, waits until it is the leader, runs the controllers.
//!
//! A leader that loses its Lease ends at once, and Kubernetes starts it again: two operators that both believe to lead would only repeat
//! each other's server-side applies, and what can hurt is fenced by epochs, never by the Lease.

use anyhow::{Context as _, bail};
use clap::Parser;
use kube::Client;
use kube_lease_manager::LeaseManagerBuilder;
use tracing_subscriber::EnvFilter;
use watari_crds::names;
use watari_operator::context::Context;
use watari_operator::settings::Settings;

#[derive(Parser)]
#[command(version, about = "Keeps the disks of KubeVirt VMs pre-synchronised with peer clusters")]
struct Arguments {
    /// This site's name; each cluster has its own. It becomes part of certificates and is not changed later.
    #[arg(long, env = "WATARI_SITE")]
    site: String,
    /// The operator's own namespace.
    #[arg(long, env = "WATARI_NAMESPACE", default_value = "watari-system")]
    namespace: String,
    /// The sidecar's image.
    #[arg(long, env = "WATARI_IMAGE")]
    image: String,
    /// Always, IfNotPresent or Never.
    #[arg(long, env = "WATARI_IMAGE_PULL_POLICY", default_value = "IfNotPresent")]
    image_pull_policy: String,
    /// host:port of this site's gateway, as reachable for peers.
    #[arg(long, env = "WATARI_GATEWAY", default_value = "")]
    gateway: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().json().with_env_filter(filter).init();
    rustls::crypto::aws_lc_rs::default_provider().install_default().ok().context("this is the first provider")?;
    let Arguments { site, namespace, image, image_pull_policy, gateway } = Arguments::parse();
    let client = Client::try_default().await.context("no way to the API server")?;
    let lease = LeaseManagerBuilder::new(client.clone(), names::LEASE).with_namespace(&namespace).build().await?;
    let (mut leading, keeper) = lease.watch().await;
    tracing::info!(site, namespace, "waiting for the Lease");
    leading.wait_for(|leads| *leads).await.context("the Lease's keeper ended")?;
    tracing::info!("leading");
    let context = Context::new(client, Settings { site, namespace, image, image_pull_policy, gateway });
    tokio::select! {
        () = watari_operator::run(context) => bail!("the controllers ended"),
        lost = leading.wait_for(|leads| !*leads) => {
            drop(lost);
            bail!("the Lease is lost: another operator may lead");
        }
        _ = terminated() => {}
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
