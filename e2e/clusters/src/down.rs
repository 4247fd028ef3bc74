//! `down`: takes away whatever it finds, all of it or some clusters; what is not there is no error.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::folders::{self, Folders};
use crate::plan::{self, ClusterPlan, Plan};
use crate::{cgroups, keeper, network, node, preflight, volumes};

/// Loop devices whose last user has just ended.
const DETACH_PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(200);

/// Why something is left.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Folder(#[from] folders::Error),
    #[error(transparent)]
    Plan(#[from] plan::Error),
    #[error(transparent)]
    Netns(#[from] watari_e2e::netns::Error),
    #[error(transparent)]
    Node(#[from] node::Error),
    #[error(transparent)]
    Keeper(#[from] keeper::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroups::Error),
    #[error(transparent)]
    Volume(#[from] volumes::Error),
    #[error("cannot unmount {path}: {source}")]
    Unmount { path: PathBuf, source: std::io::Error },
}

/// Takes everything of ours off the machine but the programs and images. Needs no plan: it goes by names.
pub fn all(folders: &Folders) -> Result<(), Error> {
    let _lock = folders.lock()?;
    watari_e2e::netns::require_root()?;
    keeper::stop(folders)?;
    volumes::detach_all(&folders.state())?;
    cgroups::remove(None)?;
    clear(folders.root())?;
    network::remove()?;
    remove_folder(&folders.state())
}

/// Takes these clusters away; the others run on and notice nothing.
pub fn some(folders: &Folders, names: &[String]) -> Result<(), Error> {
    let lock = folders.lock()?;
    watari_e2e::netns::require_root()?;
    let Some(plan) = folders.read_plan()? else { return Ok(()) };
    let gone: Vec<ClusterPlan> = plan.chosen(names)?.into_iter().cloned().collect();
    let rest = Plan { clusters: plan.clusters.into_iter().filter(|cluster| !gone.contains(cluster)).collect() };
    if rest.clusters.is_empty() {
        drop(lock);
        return all(folders);
    }
    for node in gone.iter().flat_map(ClusterPlan::node_plans) {
        node::kill(folders, &node)?;
    }
    // The keeper goes by the plan, and a network can only go once the keeper's devices in it have. What an interruption after this
    // leaves is taken up by an `up` of the same cluster, or away by a `down` of all.
    folders.write_plan(&rest)?;
    keeper::release(folders, &rest, &gone)?;
    for cluster in &gone {
        network::remove_cluster(cluster)?;
        for folder in cluster.node_plans().map(|node| folders.node(&node)).chain([folders.cluster(cluster)]) {
            clear(&folder)?;
            remove_folder(&folder)?;
        }
    }
    Ok(())
}

/// Detaches and unmounts whatever a folder still carries once its nodes have ended.
fn clear(folder: &Path) -> Result<(), Error> {
    // A device that was in use is gone by itself soon; one that a killed node left is not.
    let deadline = Instant::now() + DETACH_PATIENCE;
    while volumes::detach_all(folder)? > 0 && Instant::now() < deadline {
        std::thread::sleep(POLL);
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    // The last mounted first: mounts may lie on each other.
    for path in preflight::mounts_below(&mounts, folder).into_iter().rev() {
        unmount(&path).map_err(|source| Error::Unmount { path, source })?;
    }
    Ok(())
}

fn remove_folder(folder: &Path) -> Result<(), Error> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(folders::at(folder)(error).into()),
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
