//! The command line of `kubectl watari`.

use std::{io::Write, path::PathBuf};

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use watari_crds::crossing::Site;

/// It was done, and something is not as it should be.
pub const EXIT_NOT_WELL: u8 = 3;
/// It could not be done.
pub const EXIT_FAILED: u8 = 1;

/// Running virtual machines, kept synchronised with a peer cluster.
#[derive(Parser, Debug)]
#[command(name = "kubectl watari", bin_name = "kubectl watari", version, arg_required_else_help = true)]
#[command(
    after_help = "Exit codes: 0 all is well, 1 it could not be done, 2 a bad command line, 3 something is not well."
)]
pub struct Cli {
    /// The kubeconfig to use instead of KUBECONFIG or ~/.kube/config.
    #[arg(long, global = true, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The context in it.
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Show how far each pair is: safe or not, how far behind, how long a move would take.
    Status(Status),
    /// Show whether peers can be used, what is missing and how to mend it.
    Check(Check),
    /// Move a VM to the other site, and follow it; interrupting this does not stop the move.
    Cutover(Cutover),
    /// Let two sites use each other, from two contexts of a kubeconfig; repeating it changes nothing that is right.
    Connect(Connect),
    /// At the peer: boot a VM there although its home is lost, from the newest whole generation.
    Failover(super::failover::Failover),
    /// Print a completion script; kubectl looks for it as `kubectl_complete-watari`.
    Completion { shell: Shell },
}

#[derive(Args, Debug)]
pub struct Status {
    /// One SyncPair, with everything that is known about it. Without it: all of them, a line each.
    pub name: Option<String>,
    #[command(flatten)]
    pub scope: Scope,
    /// Go on showing it.
    #[arg(long, short)]
    pub watch: bool,
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    pub output: Output,
}

#[derive(Args, Debug)]
pub struct Scope {
    /// The namespace to look in. Default: that of the context.
    #[arg(long, short, value_name = "NAME", conflicts_with = "all_namespaces")]
    pub namespace: Option<String>,
    /// Look in all namespaces.
    #[arg(long, short = 'A')]
    pub all_namespaces: bool,
}

#[derive(Args, Debug)]
pub struct Cutover {
    /// The SyncPair, at its home.
    pub name: String,
    /// The namespace of the pair. Default: that of the context.
    #[arg(long, short, value_name = "NAME")]
    pub namespace: Option<String>,
    /// Where the VM shall run: `source` is the pair's home. Default: where it is not. Naming where it is calls a move off.
    #[arg(long, value_name = "SITE")]
    pub to: Option<To>,
    /// Ask for it and return.
    #[arg(long)]
    pub no_wait: bool,
    /// How long to follow it, seconds; afterwards the exit code is 3 and the move goes on.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    pub timeout_seconds: u64,
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    pub output: Output,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    Source,
    Peer,
}

impl From<To> for Site {
    fn from(to: To) -> Site {
        match to {
            To::Source => Site::Source,
            To::Peer => Site::Peer,
        }
    }
}

#[derive(Args, Debug)]
#[command(
    after_help = "What it makes, at each site: a ServiceAccount watari-peer-SITE with its token, Roles for the site card and for SyncReplicas \
                  in the namespaces named (the chart's value `peers` makes the same), a Secret watari-kubeconfig-SITE and the PeerCluster SITE."
)]
pub struct Connect {
    /// The context of the peer, in the same kubeconfig or in that of --peer-kubeconfig.
    pub peer: String,
    /// The kubeconfig with the peer's context.
    #[arg(long, value_name = "FILE")]
    pub peer_kubeconfig: Option<PathBuf>,
    /// Namespaces whose VMs may be paired, the same at both sites: in these each site may hold the other's replicas.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', required = true)]
    pub namespaces: Vec<String>,
    /// Namespace of Watari's operator here.
    #[arg(long, value_name = "NAME", default_value = "watari-system")]
    pub operator_namespace: String,
    /// Namespace of Watari's operator at the peer.
    #[arg(long, value_name = "NAME", default_value = "watari-system")]
    pub peer_operator_namespace: String,
    /// URL of this cluster's API server as the peer's Pods reach it. Default: that of the context.
    #[arg(long, value_name = "URL")]
    pub server: Option<String>,
    /// URL of the peer's API server as this cluster's Pods reach it. Default: that of its context.
    #[arg(long, value_name = "URL")]
    pub peer_server: Option<String>,
    /// How long to wait until both sites have found each other usable, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub timeout_seconds: u64,
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    pub output: Output,
}

#[derive(Args, Debug)]
pub struct Check {
    /// One PeerCluster. Without it: all of them.
    pub peer: Option<String>,
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    pub output: Output,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    Table,
    Json,
}

/// Writes the completion script of `shell`.
pub fn completion(shell: Shell, out: &mut impl Write) {
    clap_complete::generate(shell, &mut Cli::command(), "kubectl-watari", out);
}
