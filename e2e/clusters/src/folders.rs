//! Where everything lies: one folder, outside the work tree, because what is on the machine belongs to no checkout.
//!
//! ```text
//! $WATARI_CLUSTERS_DIR, else ${XDG_CACHE_HOME:-$HOME/.cache}/watari/clusters
//! ├── programs-HASH/     the cluster's programs; HASH is that of the tools' go.mod and go.sum
//! ├── images/            image archives (docker-save format); a foreign `*.tar` laid here is imported as well
//! └── state/             everything of the clusters that are up; gone after `make clusters-down`
//!     ├── plan.json  lock  keeper.json  wan-A-B.sock
//!     ├── logs/          keeper.log, and NODE/PROGRAM.log
//!     ├── A/             kubeconfig, pki/, volumes/ (which every node of the cluster sees)
//!     └── A-1/           kubernetes/ (pki, kubeconfigs, configuration), etcd/, containerd/, kubelet/, …
//! ```

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use crate::plan::{ClusterPlan, NodePlan, Plan};

/// Where nodes see the volumes of their cluster.
pub const VOLUMES_IN_NODE: &str = "/var/lib/watari-volumes";

/// What can go wrong with our own folder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("neither WATARI_CLUSTERS_DIR nor XDG_CACHE_HOME nor HOME is set: say where the clusters' folder shall be")]
    NoHome,
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("another `watari-clusters up` or `down` is at work (it holds {0}); wait for it")]
    Busy(PathBuf),
    #[error("{path} cannot be read ({source}); `make clusters-down` starts anew")]
    Plan { path: PathBuf, source: serde_json::Error },
}

/// Attaches the path to an I/O error.
pub fn at(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}

/// The one folder.
#[derive(Clone, Debug)]
pub struct Folders {
    root: PathBuf,
}

impl Folders {
    /// As the environment says.
    pub fn from_environment() -> Result<Folders, Error> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = variable("WATARI_CLUSTERS_DIR")
            .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("watari/clusters")))
            .or_else(|| Some(variable("HOME")?.join(".cache/watari/clusters")))
            .ok_or(Error::NoHome)?;
        std::fs::create_dir_all(&root).map_err(at(&root))?;
        // The nodes see it by this path too, so it must hold without a working directory.
        Ok(Folders { root: root.canonicalize().map_err(at(&root))? })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }
    pub fn programs(&self, hash: &str) -> PathBuf {
        self.root.join(format!("programs-{hash}"))
    }
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }
    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }
    pub fn plan(&self) -> PathBuf {
        self.state().join("plan.json")
    }
    pub fn keeper(&self) -> PathBuf {
        self.state().join("keeper.json")
    }
    pub fn wan_control(&self, a: &ClusterPlan, b: &ClusterPlan) -> PathBuf {
        self.state().join(format!("wan-{}-{}.sock", a.name(), b.name()))
    }
    pub fn logs(&self) -> PathBuf {
        self.state().join("logs")
    }
    pub fn cluster(&self, cluster: &ClusterPlan) -> PathBuf {
        self.state().join(cluster.name())
    }
    /// The administrator's kubeconfig, valid on this machine.
    pub fn kubeconfig(&self, cluster: &ClusterPlan) -> PathBuf {
        self.cluster(cluster).join("kubeconfig")
    }
    pub fn volumes(&self, cluster: &ClusterPlan) -> PathBuf {
        self.cluster(cluster).join("volumes")
    }
    pub fn node(&self, node: &NodePlan) -> PathBuf {
        self.state().join(node.name())
    }
    pub fn node_logs(&self, node: &NodePlan) -> PathBuf {
        self.logs().join(node.name())
    }

    /// The plan of the clusters that are up, or were when the machine stopped.
    pub fn read_plan(&self) -> Result<Option<Plan>, Error> {
        let path = self.plan();
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|source| Error::Plan { path, source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at(&path)(error)),
        }
    }

    /// Records it before anything is made, so that an interrupted run is known.
    pub fn write_plan(&self, plan: &Plan) -> Result<(), Error> {
        write(&self.plan(), &serde_json::to_vec_pretty(plan).expect("plain data"))
    }

    /// Held while the clusters are changed. The kernel lets go of it however the holder ends.
    pub fn lock(&self) -> Result<File, Error> {
        let path = self.root.join("lock");
        let file = File::create(&path).map_err(at(&path))?;
        // SAFETY: an open descriptor and two flags.
        match unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } {
            0 => Ok(file),
            _ => Err(Error::Busy(path)),
        }
    }

    /// Waits until nobody else holds what is called `what`: clusters may be shared by several people's tests, and some objects exist
    /// once in a cluster. Held and let go of like [`Folders::lock`].
    pub fn claim(&self, what: &str) -> Result<File, Error> {
        let path = self.root.join(format!("{what}.lock"));
        let file = File::create(&path).map_err(at(&path))?;
        file.lock().map_err(at(&path))?;
        Ok(file)
    }
}

/// Writes a file so that readers see all or nothing of it, also after a `kill -9` in between.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let folder = path.parent().expect("files of ours lie in folders of ours");
    std::fs::create_dir_all(folder).map_err(at(folder))?;
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, bytes).map_err(at(&fresh))?;
    std::fs::rename(&fresh, path).map_err(at(path))
}
