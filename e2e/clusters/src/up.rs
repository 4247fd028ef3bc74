//! `up`: the order of things. Every step looks before it acts, so it goes on where an earlier one stopped, for whatever reason, and
//! leaves alone what is up already.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Node;
use kube::Api;

use crate::folders::{self, Folders};
use crate::plan::{ClusterPlan, Plan};
use crate::{handle, images, keeper, network, node, pki, preflight, programs};

/// From the start of the programs to ready nodes; seconds on an idle machine.
const READY_PATIENCE: Duration = Duration::from_secs(240);
const POLL: Duration = Duration::from_millis(200);

/// Why the clusters are not up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    NotReady(#[from] preflight::NotReady),
    #[error(transparent)]
    Folder(#[from] folders::Error),
    #[error(transparent)]
    Program(#[from] programs::Error),
    #[error(transparent)]
    Image(#[from] images::Error),
    #[error(transparent)]
    Netns(#[from] watari_e2e::netns::Error),
    #[error(transparent)]
    Pki(#[from] pki::Error),
    #[error(transparent)]
    Node(#[from] node::Error),
    #[error(transparent)]
    Keeper(#[from] keeper::Error),
    #[error(transparent)]
    Handle(#[from] handle::Error),
    #[error("cluster {cluster} is not ready after {seconds} s: {missing}; logs are in {logs}")]
    Unready { cluster: String, seconds: u64, missing: String, logs: PathBuf },
}

/// Brings all clusters of the wish up and returns when every node is ready. More may be up already: those are looked after as well, and
/// the answer is all that there is.
pub fn up(folders: &Folders, wish: Plan, settings: &[String]) -> Result<Plan, Error> {
    let _lock = folders.lock()?;
    let plan = &match folders.read_plan()? {
        Some(known) => wish.union(&known),
        None => wish,
    };
    preflight::judge(&preflight::Facts::gather(folders, plan)?)?;
    let programs = programs::ensure(folders)?;
    images::ensure_base(folders)?;

    let begin = Instant::now();
    folders.write_plan(plan)?;
    network::ensure(plan)?;
    for cluster in &plan.clusters {
        pki::ensure_cluster(folders, cluster)?;
    }
    for node in plan.nodes() {
        pki::ensure_node(folders, &node)?;
        if node::ensure(folders, &node, &programs)? {
            eprintln!("node {} started", node.name());
        }
    }
    keeper::ensure(folders, plan, settings)?;
    let imported = images::import(folders, plan)?;
    eprintln!("{imported} images imported after {:.1} s", begin.elapsed().as_secs_f64());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(keeper::Error::Spawn)?;
    for cluster in &plan.clusters {
        runtime.block_on(await_ready(folders, cluster))?;
        eprintln!("cluster {} ready after {:.1} s", cluster.name(), begin.elapsed().as_secs_f64());
    }
    Ok(plan.clone())
}

/// Packs the sidecar of the work tree and gives it, and every other new archive, to the nodes.
pub fn refresh_images(folders: &Folders, plan: &Plan) -> Result<usize, Error> {
    images::ensure_base(folders)?;
    images::ensure_sidecar(folders)?;
    Ok(images::import(folders, plan)?)
}

async fn await_ready(folders: &Folders, cluster: &ClusterPlan) -> Result<(), Error> {
    let client = handle::client(&folders.kubeconfig(cluster)).await?;
    let api: Api<Node> = Api::all(client);
    let begin = Instant::now();
    loop {
        let missing = match api.list(&Default::default()).await {
            Err(error) => format!("its API server does not answer ({error})"),
            Ok(nodes) => {
                let ready: Vec<_> = nodes.items.iter().filter(|node| handle::is_ready(node)).collect();
                let wanted = cluster.node_plans().map(|node| node.name());
                let missing: Vec<String> =
                    wanted.filter(|name| ready.iter().all(|node| node.metadata.name.as_ref() != Some(name))).collect();
                if missing.is_empty() {
                    return Ok(());
                }
                format!("nodes {} are not ready", missing.join(", "))
            }
        };
        if begin.elapsed() > READY_PATIENCE {
            let (cluster, logs) = (cluster.name(), folders.logs());
            return Err(Error::Unready { cluster, seconds: READY_PATIENCE.as_secs(), missing, logs });
        }
        tokio::time::sleep(POLL).await;
    }
}
