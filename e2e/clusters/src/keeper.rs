//! The one process outside the clusters that they need: it holds the WAN, keeps the doors to the API servers and provides storage.
//!
//! Started by `up`; it holds no state that is not on the disk or in the API servers. It follows `plan.json`: clusters come and go
//! without the others noticing. While it is away the clusters go on alone: unreachable from each other and from here, claims unbound.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
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
/// How often the keeper looks at the plan.
const LOOK: Duration = Duration::from_secs(1);
/// Until a keeper has followed a changed plan: a look, and opening or closing devices and ports on a busy machine.
const FOLLOW_PATIENCE: Duration = Duration::from_secs(10);
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
    let followed = running(folders).is_some() && within(FOLLOW_PATIENCE, || serves(folders, plan));
    if !followed {
        stop(folders)?;
        start(folders, plan)?;
    }
    if !settings.is_empty() {
        for (a, b) in plan.links() {
            link(folders, a, b, &format!("set both {}", settings.join(" ")))?;
        }
    }
    Ok(())
}

fn start(folders: &Folders, plan: &Plan) -> Result<(), Error> {
    let log = folders.logs().join("keeper.log");
    let mut command = Command::new(std::env::current_exe().map_err(Error::Spawn)?);
    command.arg("keep").env("WATARI_CLUSTERS_DIR", folders.root());
    std::fs::create_dir_all(folders.logs()).map_err(folders::at(&folders.logs()))?;
    let place = detached::Place { log: &log, netns: None, cgroups: &[] };
    let process = detached::spawn(command, &place).map_err(Error::Spawn)?;
    process.write(&folders.keeper())?;
    within(START_PATIENCE, || serves(folders, plan) || !process.alive());
    if serves(folders, plan) {
        return Ok(());
    }
    let tail = node::tail(&log);
    stop(folders)?;
    Err(Error::Start { log, tail })
}

fn serves(folders: &Folders, plan: &Plan) -> bool {
    plan.links().all(|(a, b)| control::ask(&folders.wan_control(a, b), "stats").is_ok())
}

/// Asks again until it is so; answers whether it came to be.
fn within(patience: Duration, mut so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    while !so() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    true
}

/// Waits until the keeper holds nothing of a cluster that the plan no longer has; ends one that does not let go.
pub fn release(folders: &Folders, plan: &Plan, gone: &[ClusterPlan]) -> Result<(), Error> {
    let held = |cluster: &ClusterPlan| {
        let others = plan.clusters.iter().chain(gone).filter(|other| other.index != cluster.index);
        others
            .into_iter()
            .any(|other| folders.wan_control(cluster, other).exists() || folders.wan_control(other, cluster).exists())
    };
    let let_go = running(folders).is_some() && within(FOLLOW_PATIENCE, || !gone.iter().any(held));
    if !let_go {
        stop(folders)?;
        ensure(folders, plan, &[])?;
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
pub fn keep(folders: &Folders) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Spawn)?;
    runtime.block_on(async {
        let mut served = Served::default();
        served.follow(folders)?;
        loop {
            tokio::time::sleep(LOOK).await;
            // What is served goes on; whoever changed the plan waits in vain and is shown this log.
            if let Err(error) = served.follow(folders) {
                tracing::error!(%error, "the plan cannot be followed");
            }
        }
    })
}

/// What the keeper holds for whom, by the clusters' indices.
#[derive(Default)]
struct Served {
    /// A door stays when its cluster goes: it leads nowhere then.
    doors: BTreeSet<u8>,
    links: BTreeMap<(u8, u8), Wan>,
    volumes: BTreeMap<u8, JoinHandle<()>>,
}

impl Served {
    /// Lets go of what the plan has no more, takes up what it has besides. Without a plan (it is being replaced) all stays.
    fn follow(&mut self, folders: &Folders) -> Result<(), Error> {
        let Some(plan) = folders.read_plan()? else { return Ok(()) };
        let known = |index: &u8| plan.clusters.iter().any(|cluster| cluster.index == *index);
        self.links.retain(|(a, b), _| known(a) && known(b));
        self.volumes.retain(|index, task| {
            known(index) || {
                task.abort();
                false
            }
        });
        // Doors first: a taken port is the likeliest trouble, and the links' sockets tell that all is well.
        for cluster in &plan.clusters {
            if self.doors.contains(&cluster.index) {
                continue;
            }
            let control_plane = cluster.control_plane();
            let to = SocketAddr::from((control_plane.address(), API_PORT));
            door::open(cluster.api_port(), &network::path(&control_plane.netns()), to)?;
            self.doors.insert(cluster.index);
        }
        for (a, b) in plan.links() {
            if let Entry::Vacant(place) = self.links.entry((a.index, b.index)) {
                place.insert(connect(folders, a, b)?);
                tracing::info!(a = a.name(), b = b.name(), "link up");
            }
        }
        for cluster in &plan.clusters {
            let job = || tokio::spawn(provide(folders.clone(), cluster.clone()));
            self.volumes.entry(cluster.index).or_insert_with(job);
        }
        Ok(())
    }
}

fn connect(folders: &Folders, a: &ClusterPlan, b: &ClusterPlan) -> Result<Wan, Error> {
    let end = |here: &ClusterPlan, there: &ClusterPlan| End {
        netns: network::path(&here.router_netns()),
        address: format!("{}/30", here.wan_address(there)),
    };
    let shape = Shape::wan(RATE_BITS_PER_SECOND, ROUND_TRIP);
    let mut wan = Wan::start(&end(a, b), &end(b, a), MTU, shape, SEED)?;
    network::attach_wan(a, b)?;
    network::attach_wan(b, a)?;
    wan.serve_control(folders.wan_control(a, b))?;
    Ok(wan)
}

/// Serves one cluster's claims for ever.
async fn provide(folders: Folders, cluster: ClusterPlan) {
    match crate::handle::client(&folders.kubeconfig(&cluster)).await {
        Ok(client) => Provisioner { client, volumes: folders.volumes(&cluster) }.run().await,
        Err(error) => tracing::error!(cluster = cluster.name(), %error, "no client: claims stay unbound"),
    }
}
