//! The one process outside the clusters that they need: it holds the WAN, keeps the doors to the API servers and provides storage.
//!
//! Started and replaced by `up`; it holds no state that is not on the disk or in the API servers. While it is away the clusters go on
//! alone: unreachable from each other and from here, claims unbound.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use watari_e2e::wan::{self, End, Shape, Wan, control};

use crate::detached::{self, Detached};
use crate::door;
use crate::folders::{self, Folders};
use crate::network;
use crate::node;
use crate::plan::{ClusterPlan, Plan};
use crate::provision::Provisioner;

/// Of the API server, inside its node.
const API_PORT: u16 = 6443;
/// Makes loss and jitter repeatable.
const SEED: u64 = 1;
const MTU: u32 = 1500;
/// Opening devices and ports.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// After `kill -9`.
const END_PATIENCE: Duration = Duration::from_secs(5);
/// The line that the product's promises are measured over, each way: 100 Mbit/s, 170 ms there and back.
const RATE_BITS_PER_SECOND: u64 = 100_000_000;
const ROUND_TRIP: Duration = Duration::from_millis(170);

/// Why the keeper does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Folder(#[from] folders::Error),
    #[error(transparent)]
    Netns(#[from] watari_e2e::netns::Error),
    #[error(transparent)]
    Wan(#[from] wan::Error),
    #[error(transparent)]
    Door(#[from] door::Error),
    #[error("the keeper cannot be started: {0}")]
    Spawn(std::io::Error),
    #[error("the keeper did not come up; the end of {log}:\n{tail}")]
    Start { log: PathBuf, tail: String },
    #[error("the link between {a} and {b}: {message}")]
    Link { a: String, b: String, message: String },
    #[error("{0}")]
    Setting(String),
}

/// The keeper that runs.
pub fn running(folders: &Folders) -> Option<Detached> {
    Detached::read(&folders.keeper()).filter(Detached::alive)
}

/// Starts it unless it runs and serves this plan; then gives all links the settings (`rate=…`, `delay=…`), if any.
pub fn ensure(folders: &Folders, plan: &Plan, settings: &[String]) -> Result<(), Error> {
    // A typing error shall not cost a keeper.
    settings.iter().try_for_each(|setting| setting.parse::<control::Setting>().map(drop)).map_err(Error::Setting)?;
    let serves =
        |folders: &Folders| plan.links().all(|(a, b)| control::ask(&folders.wan_control(a, b), "stats").is_ok());
    if running(folders).is_none() || !serves(folders) {
        stop(folders)?;
        let log = folders.logs().join("keeper.log");
        let mut command = Command::new(std::env::current_exe().map_err(Error::Spawn)?);
        command.arg("keep").env("WATARI_CLUSTERS_DIR", folders.root());
        std::fs::create_dir_all(folders.logs()).map_err(folders::at(&folders.logs()))?;
        let place = detached::Place { log: &log, netns: None, cgroups: &[] };
        let process = detached::spawn(command, &place).map_err(Error::Spawn)?;
        process.write(&folders.keeper())?;
        let deadline = Instant::now() + START_PATIENCE;
        while !serves(folders) {
            if !process.alive() || Instant::now() > deadline {
                let tail = node::tail(&log);
                stop(folders)?;
                return Err(Error::Start { log, tail });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    if !settings.is_empty() {
        for (a, b) in plan.links() {
            link(folders, a, b, &format!("set both {}", settings.join(" ")))?;
        }
    }
    Ok(())
}

/// Sends one command of [`watari_e2e::wan::control`] to a link; answers with its report (JSON).
pub fn link(folders: &Folders, a: &ClusterPlan, b: &ClusterPlan, command: &str) -> Result<String, Error> {
    let fail = |message: String| Error::Link { a: a.name(), b: b.name(), message };
    let answer = control::ask(&folders.wan_control(a, b), command).map_err(|error| fail(error.to_string()))?;
    match answer.contains("\"error\"") {
        true => Err(fail(answer)),
        false => Ok(answer),
    }
}

/// Ends it, if it runs.
pub fn stop(folders: &Folders) -> Result<(), Error> {
    if let Some(process) = Detached::read(&folders.keeper())
        && !process.kill(END_PATIENCE)
    {
        return Err(Error::Spawn(std::io::Error::other(format!("process {} does not end", process.pid))));
    }
    match std::fs::remove_file(folders.keeper()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(folders::at(&folders.keeper())(error).into()),
        _ => Ok(()),
    }
}

/// The keeper itself. Returns only if it cannot begin.
pub fn keep(folders: &Folders, plan: &Plan) -> Result<(), Error> {
    // Doors first: a taken port is the likeliest trouble, and the links' sockets tell that all is well.
    for cluster in &plan.clusters {
        let control_plane = cluster.control_plane();
        let to = SocketAddr::from((control_plane.address(), API_PORT));
        door::open(cluster.api_port(), &network::path(&control_plane.netns()), to)?;
    }
    let mut links = Vec::new();
    for (a, b) in plan.links() {
        let end = |here: &ClusterPlan, there: &ClusterPlan| End {
            netns: network::path(&here.router_netns()),
            address: format!("{}/30", here.wan_address(there)),
        };
        let shape = Shape::wan(RATE_BITS_PER_SECOND, ROUND_TRIP);
        let mut wan = Wan::start(&end(a, b), &end(b, a), MTU, shape, SEED)?;
        network::attach_wan(a, b)?;
        network::attach_wan(b, a)?;
        wan.serve_control(folders.wan_control(a, b))?;
        links.push(wan);
    }
    tracing::info!(links = links.len(), "up");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Spawn)?;
    runtime.block_on(async {
        let jobs = plan.clusters.iter().map(|cluster| provide(folders, cluster));
        futures::future::join_all(jobs).await;
        std::future::pending::<()>().await
    });
    Ok(())
}

/// Serves one cluster's claims for ever.
async fn provide(folders: &Folders, cluster: &ClusterPlan) {
    match crate::handle::client(&folders.kubeconfig(cluster)).await {
        Ok(client) => Provisioner { client, volumes: folders.volumes(cluster) }.run().await,
        Err(error) => tracing::error!(cluster = cluster.name(), %error, "no client: claims stay unbound"),
    }
}
