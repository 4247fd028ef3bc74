//! `watari-clusters`: brings the clusters up and down, and lets one look into them.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use watari_clusters::folders::Folders;
use watari_clusters::plan::Plan;
use watari_clusters::{down, images, keeper, kubevirt, node, programs, up};

#[derive(Parser)]
#[command(about = "Real Kubernetes clusters on this machine, with an emulated WAN between them")]
struct Arguments {
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand)]
enum What {
    /// Bring them up; goes on where an earlier run stopped, and changes nothing that is right.
    Up {
        #[arg(long, default_value_t = 2)]
        clusters: u8,
        /// Of each cluster; a drain needs two.
        #[arg(long, default_value_t = 1)]
        nodes: u8,
        /// Of the WAN, both ways: rate=100M delay=85ms jitter=2ms loss=0.1% queue=256K (default 100 Mbit/s, 170 ms there and back).
        settings: Vec<String>,
    },
    /// Take everything away but programs and images; with names, only those clusters: `down c d`.
    Down { clusters: Vec<String> },
    /// Build the cluster's programs, nothing else.
    Build,
    /// Pack the sidecar of the work tree into an image and give it to the nodes.
    Images,
    /// Build the product's two images (release, static, `docker save` format) into a folder, for a registry.
    Pack { folder: PathBuf },
    /// Which nodes run, and how the links behave.
    Status,
    /// kubectl as the administrator of a cluster: `kubectl a get pods -A`.
    #[command(disable_help_flag = true)]
    Kubectl {
        cluster: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Helm likewise.
    #[command(disable_help_flag = true)]
    Helm {
        cluster: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// A command inside a node: `exec a-1 ctr -n k8s.io images ls`.
    #[command(disable_help_flag = true)]
    Exec {
        node: String,
        program: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// A command to the link between two clusters: `wan a b set both rate=1G`, `wan a b cut`, `wan a b stats`.
    Wan { a: String, b: String, command: Vec<String> },
    /// Real KubeVirt on the clusters (e2e/clusters/README.md says from where).
    Kubevirt {
        #[command(subcommand)]
        command: Kubevirt,
        /// Only on these clusters: `--on c,d`.
        #[arg(long, global = true, value_delimiter = ',')]
        on: Vec<String>,
    },
    /// `kill -9` of a whole node at once.
    Kill { node: String },
    /// The process that holds the WAN, the doors and the storage; `up` starts it.
    #[command(hide = true)]
    Keep,
}

#[derive(Subcommand)]
enum Kubevirt {
    /// Deploy what $KUBEVIRT_DIR holds, wait until it is available, exchange the CAs.
    Up,
    /// What is deployed, and who trusts whom.
    Status,
    /// Exchange the CAs; with --keep again and again, until ended.
    Trust {
        #[arg(long)]
        keep: bool,
    },
    /// Remove KubeVirt, and with it every VM.
    Down,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Without a backtrace, whatever the environment says: these are for people.
            eprintln!("watari-clusters: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
    let folders = Folders::from_environment()?;
    let plan = || folders.read_plan()?.context("no clusters are up; `make clusters` brings them up");
    match arguments.command {
        What::Up { clusters, nodes, settings } => {
            let plan = up::up(&folders, Plan::new(clusters, nodes)?, &settings)?;
            for cluster in &plan.clusters {
                println!("cluster {}: export KUBECONFIG={}", cluster.name(), folders.kubeconfig(cluster).display());
            }
            println!(
                "kubectl and helm are in {}; logs in {}",
                programs::folder(&folders)?.display(),
                folders.logs().display()
            );
        }
        What::Down { clusters } if clusters.is_empty() => down::all(&folders)?,
        What::Down { clusters } => down::some(&folders, &clusters)?,
        What::Build => println!("{}", programs::ensure(&folders)?.display()),
        What::Images => eprintln!("{} imports", up::refresh_images(&folders, &plan()?)?),
        What::Pack { folder } => {
            for archive in images::release(&folder)? {
                let mib = archive.metadata()?.len() as f64 / f64::from(1 << 20);
                println!("{} ({mib:.1} MiB)", archive.display());
            }
        }
        What::Status => status(&folders, &plan()?)?,
        What::Kubectl { cluster, arguments } => client(&folders, &plan()?, "kubectl", &cluster, &arguments)?,
        What::Helm { cluster, arguments } => client(&folders, &plan()?, "helm", &cluster, &arguments)?,
        What::Exec { node, program, arguments } => {
            let error = node::command(&folders, &plan()?.node(&node)?, &program)?.args(arguments).exec();
            bail!("cannot run nsenter: {error}");
        }
        What::Wan { a, b, command } => {
            let plan = plan()?;
            let (a, b) = (plan.cluster(&a)?, plan.cluster(&b)?);
            print!("{}", keeper::link(&folders, a, b, &command.join(" "))?);
        }
        What::Kill { node } => node::kill(&folders, &plan()?.node(&node)?)?,
        What::Kubevirt { command, on } => {
            let sites = kubevirt::Site::open_all(&folders, &plan()?, &on)?;
            match command {
                Kubevirt::Up => kubevirt::up(&sites)?,
                Kubevirt::Status => {
                    sites.iter().try_for_each(|site| kubevirt::status(site).map(|line| println!("{line}")))?
                }
                Kubevirt::Trust { keep } => kubevirt::trust::exchange(&sites, keep)?,
                Kubevirt::Down => kubevirt::down(&sites)?,
            }
        }
        What::Keep => keeper::keep(&folders)?,
    }
    Ok(())
}

/// Becomes kubectl or Helm.
fn client(folders: &Folders, plan: &Plan, program: &str, cluster: &str, arguments: &[String]) -> anyhow::Result<()> {
    let path = programs::folder(folders)?.join(program);
    let kubeconfig = folders.kubeconfig(plan.cluster(cluster)?);
    let error = Command::new(&path).args(arguments).env("KUBECONFIG", kubeconfig).exec();
    bail!("cannot run {}: {error}", path.display())
}

fn status(folders: &Folders, plan: &Plan) -> anyhow::Result<()> {
    for node in plan.nodes() {
        match node::running(folders, &node) {
            Some(process) => println!("node {} runs (process {})", node.name(), process.pid),
            None => println!("node {} is down", node.name()),
        }
    }
    match keeper::running(folders) {
        Some(process) => println!("keeper runs (process {})", process.pid),
        None => println!("keeper is down: no WAN, no way in, no storage; `make clusters` starts it"),
    }
    for (a, b) in plan.links() {
        match keeper::link(folders, a, b, "stats") {
            Ok(report) => print!("link {}-{} {report}", a.name(), b.name()),
            Err(error) => println!("{error}"),
        }
    }
    Ok(())
}
