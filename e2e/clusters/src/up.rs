//! `up` and `down`: the order of things. Every step looks before it acts, so `up` goes on where an earlier one stopped, for whatever
//! reason, and `down` takes away whatever it finds.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Node;
use kube::Api;

use crate::folders::{self, Folders};
use crate::plan::{ClusterPlan, Plan};
use crate::{cgroups, handle, images, keeper, network, node, pki, preflight, programs, volumes};

/// From the start of the programs to ready nodes; seconds on an idle machine.
const READY_PATIENCE: Duration = Duration::from_secs(240);
/// Loop devices whose last user has just ended.
const DETACH_PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(200);

/// Why the clusters are not up (or not gone).
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
    Cgroup(#[from] cgroups::Error),
    #[error(transparent)]
    Volume(#[from] volumes::Error),
    #[error(transparent)]
    Handle(#[from] handle::Error),
    #[error("clusters with more nodes are up; `make clusters-down` first")]
    Smaller,
    #[error("cluster {cluster} is not ready after {seconds} s: {missing}; logs are in {logs}")]
    Unready { cluster: String, seconds: u64, missing: String, logs: PathBuf },
    #[error("cannot unmount {path}: {source}")]
    Unmount { path: PathBuf, source: std::io::Error },
}

/// Brings all clusters of the plan up and returns when every node is ready.
pub fn up(folders: &Folders, plan: &Plan, settings: &[String]) -> Result<(), Error> {
    let _lock = folders.lock()?;
    if folders.read_plan()?.is_some_and(|old| !plan.includes(&old)) {
        return Err(Error::Smaller);
    }
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
    Ok(())
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

/// Takes everything of ours off the machine but the programs and images. Needs no plan: it goes by names.
pub fn down(folders: &Folders) -> Result<(), Error> {
    let _lock = folders.lock()?;
    watari_e2e::netns::require_root()?;
    keeper::stop(folders)?;
    volumes::detach_all(&folders.state())?;
    cgroups::remove(None)?;
    // A device that was in use is gone by itself soon; one that a killed node left is not.
    let deadline = Instant::now() + DETACH_PATIENCE;
    while volumes::detach_all(&folders.state())? > 0 && Instant::now() < deadline {
        std::thread::sleep(POLL);
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    // The last mounted first: mounts may lie on each other.
    for path in preflight::mounts_below(&mounts, folders.root()).into_iter().rev() {
        unmount(&path).map_err(|source| Error::Unmount { path, source })?;
    }
    network::remove()?;
    match std::fs::remove_dir_all(folders.state()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(folders::at(&folders.state())(error).into()),
        _ => Ok(()),
    }
}

fn unmount(path: &Path) -> std::io::Result<()> {
    let name = CString::new(path.as_os_str().as_bytes()).map_err(std::io::Error::other)?;
    // SAFETY: a terminated path and a flag.
    match unsafe { libc::umount2(name.as_ptr(), libc::MNT_DETACH) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
