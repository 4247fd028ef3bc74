//! Real KubeVirt on our clusters, from a folder that somebody filled: `KUBEVIRT_DIR`.
//!
//! ```text
//! $KUBEVIRT_DIR
//! ├── kubevirt-operator.yaml   as published with a release (its namespace is `kubevirt`)
//! ├── kubevirt-cr.yaml         optional; without it ours, see `objects::custom_resource`
//! └── images/*.tar             the images that the operator deploys, in `docker save` format
//! ```
//! Everything goes through kubectl, as KubeVirt's own guide does it. `up` may be interrupted anywhere and repeated: it applies what
//! should be and waits for what comes of it. Nothing of KubeVirt is in this repository, and nothing here builds it.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`package`] | the folder, and what is missing in it |
//! | [`objects`] | what is applied and what is read back: pure |
//! | [`kubectl`] | one cluster's kubectl |
//! | [`trust`] | the exchange of CAs |

pub mod kubectl;
pub mod objects;
pub mod package;
pub mod trust;

use std::time::{Duration, Instant};

use crate::folders::Folders;
use crate::plan::{self, ClusterPlan, Plan};
use crate::{folders, images, node, programs};
use kubectl::Kubectl;
use package::Package;

/// Where KubeVirt lives on every cluster; its published manifest says the same.
pub const NAMESPACE: &str = "kubevirt";
/// From the first object to `Available`; 94 s on two idle cores for two clusters.
const AVAILABLE_PATIENCE: Duration = Duration::from_secs(600);
/// Between the operator's CRD and the resource that it describes.
const SERVED_PATIENCE: Duration = Duration::from_secs(60);
/// Until the operator has taken everything away that it deployed.
const GONE_PATIENCE: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_secs(1);

/// Why KubeVirt is not there (or not gone).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Package(#[from] package::Error),
    #[error(transparent)]
    Kubectl(#[from] kubectl::Error),
    #[error(transparent)]
    Manifest(#[from] objects::Error),
    #[error(transparent)]
    Plan(#[from] plan::Error),
    #[error(transparent)]
    Folder(#[from] folders::Error),
    #[error(transparent)]
    Program(#[from] programs::Error),
    #[error(transparent)]
    Image(#[from] images::Error),
    #[error(transparent)]
    Node(#[from] node::Error),
    #[error("cluster {cluster}: KubeVirt is not available after {seconds} s; what is not running:\n{pods}")]
    Unavailable { cluster: String, seconds: u64, pods: String },
    #[error("cluster {cluster}: KubeVirt is still there after {seconds} s; what holds it: {condition}")]
    NotGone { cluster: String, seconds: u64, condition: String },
    #[error(
        "cluster {cluster} does not know the CA of {missing} after {seconds} s; see the log of virt-operator there"
    )]
    Distrusted { cluster: String, missing: String, seconds: u64 },
}

/// A cluster as KubeVirt's administrator sees it.
pub struct Site {
    pub cluster: ClusterPlan,
    folders: Folders,
    kubectl: Kubectl,
}

impl Site {
    /// The clusters of these names; all if none is named.
    pub fn open_all(folders: &Folders, plan: &Plan, names: &[String]) -> Result<Vec<Site>, Error> {
        let program = programs::folder(folders)?.join("kubectl");
        let open = |cluster: &ClusterPlan| Site {
            kubectl: Kubectl::new(&program, &folders.kubeconfig(cluster), cluster.name()),
            cluster: cluster.clone(),
            folders: folders.clone(),
        };
        Ok(plan.chosen(names)?.into_iter().map(open).collect())
    }
}

/// Does the same on all sites at the same time; the first error of the earliest site counts.
fn on_all(sites: &[Site], job: impl Fn(&Site) -> Result<(), Error> + Sync) -> Result<(), Error> {
    std::thread::scope(|scope| {
        let jobs: Vec<_> = sites.iter().map(|site| scope.spawn(|| job(site))).collect();
        jobs.into_iter().try_for_each(|job| job.join().expect("a job returns its errors"))
    })
}

/// Deploys the package on all sites, returns when KubeVirt is available on each and each trusts the others.
pub fn up(sites: &[Site]) -> Result<(), Error> {
    let package = Package::from_environment()?;
    let begin = Instant::now();
    on_all(sites, |site| {
        let name = site.cluster.name();
        let imported = images::import_from(&site.folders, &package.images(), site.cluster.node_plans())?;
        eprintln!("cluster {name}: {imported} archives imported after {:.1} s", begin.elapsed().as_secs_f64());
        deploy(site, &package)?;
        eprintln!("cluster {name}: KubeVirt available after {:.1} s", begin.elapsed().as_secs_f64());
        Ok(())
    })?;
    trust::exchange(sites, false)
}

fn deploy(site: &Site, package: &Package) -> Result<(), Error> {
    let kubectl = &site.kubectl;
    let manifest = kubectl.run(&["create", "--dry-run=client", "-o", "json", "-f", &package.operator()], b"")?;
    let manifest = objects::Manifest::parse(&manifest)?;
    let present = images::names(&site.folders, &site.cluster.control_plane())?;
    package.require(&manifest.images(), &present)?;

    // The operator and what it calls infrastructure run on control planes only.
    let node = site.cluster.control_plane().name();
    kubectl.run(&["label", "--overwrite", "node", &node, "node-role.kubernetes.io/control-plane="], b"")?;
    kubectl.apply(&manifest.objects().to_string())?;
    let resource = match package.custom_resource()? {
        Some(text) => text,
        None => objects::custom_resource().to_string(),
    };
    let begin = Instant::now();
    while let Err(error) = kubectl.apply(&resource) {
        if begin.elapsed() > SERVED_PATIENCE {
            return Err(error.into());
        }
        std::thread::sleep(POLL);
    }
    await_available(site)
}

fn await_available(site: &Site) -> Result<(), Error> {
    let begin = Instant::now();
    while !read(site)?.is_some_and(|report| report.available) {
        if begin.elapsed() > AVAILABLE_PATIENCE {
            let pods = site.kubectl.run(&["-n", NAMESPACE, "get", "pods", "-o", "wide"], b"")?;
            let seconds = AVAILABLE_PATIENCE.as_secs();
            return Err(Error::Unavailable { cluster: site.cluster.name(), seconds, pods });
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// What the KubeVirt object says; nothing if there is none.
fn read(site: &Site) -> Result<Option<objects::Report>, Error> {
    let kind = site.kubectl.get(&["crd", "kubevirts.kubevirt.io"])?;
    let object = match kind {
        Some(_) => site.kubectl.get(&["-n", NAMESPACE, "kubevirts.kubevirt.io", "kubevirt"])?,
        None => None,
    };
    Ok(object.map(|object| objects::Report::of(&object)))
}

/// One line about a site.
pub fn status(site: &Site) -> Result<String, Error> {
    let name = site.cluster.name();
    let Some(report) = read(site)? else { return Ok(format!("cluster {name}: no KubeVirt")) };
    let trusted = trust::certificates(site)?;
    Ok(format!("cluster {name}: {report}; {trusted} CA certificates trusted"))
}

/// Removes KubeVirt from all sites. VMs go first: the operator refuses while there are any.
pub fn down(sites: &[Site]) -> Result<(), Error> {
    on_all(sites, |site| {
        let kubectl = &site.kubectl;
        if read(site)?.is_some() {
            for kind in ["virtualmachines.kubevirt.io", "virtualmachineinstances.kubevirt.io"] {
                kubectl
                    .run(&["delete", kind, "--all", "--all-namespaces", "--ignore-not-found", "--timeout=120s"], b"")?;
            }
            let object =
                ["-n", NAMESPACE, "delete", "kubevirts.kubevirt.io", "kubevirt", "--ignore-not-found", "--wait=false"];
            kubectl.run(&object, b"")?;
            let begin = Instant::now();
            while let Some(report) = read(site)? {
                if begin.elapsed() > GONE_PATIENCE {
                    let (cluster, seconds) = (site.cluster.name(), GONE_PATIENCE.as_secs());
                    return Err(Error::NotGone { cluster, seconds, condition: report.to_string() });
                }
                std::thread::sleep(POLL);
            }
        }
        // The operator itself, by the labels that every release gives to its parts.
        kubectl.run(&["delete", "namespace", NAMESPACE, "--ignore-not-found"], b"")?;
        let rest = "clusterroles,clusterrolebindings,crd,priorityclasses";
        kubectl.run(&["delete", rest, "-l", "operator.kubevirt.io", "--ignore-not-found"], b"")?;
        Ok(())
    })
}
