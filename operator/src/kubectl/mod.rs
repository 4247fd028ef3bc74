//! `kubectl watari`: what is going on, and whether a peer can be used. A kubectl plug-in: the binary `kubectl-watari` in the `PATH`.
//!
//! It reads and changes the same objects as everybody else, with the caller's kubeconfig and rights; it has no door of its own. What
//! it prints is made by functions without a client ([`status`], [`check`]); this module asks and prints.

pub mod check;
pub mod cli;
pub mod connect;
pub mod cutover;
pub mod failover;
pub mod follow;
pub mod status;
pub mod table;

use std::{io::Write, time::Duration};

use kube::{
    Api, Client, Config,
    api::ListParams,
    config::{KubeConfigOptions, KubeconfigError},
};
use watari_crds::{pair::SyncPair, peer::PeerCluster};

use cli::{Check, Cli, Command, Output, Scope, Status};

/// How often `-w` looks: an operator writes status every few seconds.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// Why a command could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("kubeconfig: {0}; check --kubeconfig, --context and KUBECONFIG")]
    Kubeconfig(#[from] KubeconfigError),
    #[error("{what}: {source}{hint}")]
    Api { what: String, source: kube::Error, hint: &'static str },
    #[error("no {what} named {name}{place}; `kubectl get {plural} -A` lists those there are")]
    NotFound { what: &'static str, plural: &'static str, name: String, place: String },
    #[error("{0}")]
    Connect(#[from] connect::Error),
    #[error("{0}")]
    Refused(String),
    #[error("cannot print: {0}")]
    Print(#[from] std::io::Error),
    #[error("cannot print JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// How a command ended, when it did its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All is as it should be.
    Well,
    /// Something is not, and was printed.
    NotWell,
}

/// Does what the command line says.
pub async fn run(cli: &Cli, out: &mut impl Write) -> Result<Outcome, Error> {
    match &cli.command {
        Command::Status(status) => {
            let (client, namespace) = connect(cli).await?;
            match status.watch {
                true => watch(&client, &namespace, status, out).await,
                false => print_status(&client, &namespace, status, out).await,
            }
        }
        Command::Cutover(cutover) => {
            let (client, namespace) = connect(cli).await?;
            let namespace = cutover.namespace.as_deref().unwrap_or(&namespace);
            cutover::run(&Api::namespaced(client, namespace), cutover, out).await
        }
        Command::Connect(asked) => connect::run(cli, asked, out).await,
        Command::Failover(failover) => {
            let (client, namespace) = connect(cli).await?;
            let namespace = failover.namespace.as_deref().unwrap_or(&namespace);
            failover::run(&Api::namespaced(client, namespace), failover, out).await
        }
        Command::Check(check) => print_check(&connect(cli).await?.0, check, out).await,
        Command::Completion { shell } => {
            cli::completion(*shell, out);
            Ok(Outcome::Well)
        }
    }
}

/// A client as the command line says, and the namespace of its context.
async fn connect(cli: &Cli) -> Result<(Client, String), Error> {
    let options = KubeConfigOptions { context: cli.context.clone(), ..KubeConfigOptions::default() };
    let config = match &cli.kubeconfig {
        Some(file) => Config::from_custom_kubeconfig(kube::config::Kubeconfig::read_from(file)?, &options).await?,
        None => Config::from_kubeconfig(&options).await?,
    };
    let namespace = config.default_namespace.clone();
    Ok((Client::try_from(config).map_err(api_error("the cluster"))?, namespace))
}

async fn pairs(client: &Client, namespace: &str, status: &Status) -> Result<Vec<SyncPair>, Error> {
    let api: Api<SyncPair> = match &status.scope {
        Scope { all_namespaces: true, .. } => Api::all(client.clone()),
        Scope { namespace: Some(named), .. } => Api::namespaced(client.clone(), named),
        Scope { namespace: None, all_namespaces: false } => Api::namespaced(client.clone(), namespace),
    };
    let mut found = api.list(&ListParams::default()).await.map_err(api_error("SyncPairs"))?.items;
    if let Some(name) = &status.name {
        found.retain(|pair| pair.metadata.name.as_ref() == Some(name));
        if found.is_empty() {
            let place = format!(" in namespace {}", status.scope.namespace.as_deref().unwrap_or(namespace));
            return Err(Error::NotFound { what: "SyncPair", plural: "syncpairs", name: name.clone(), place });
        }
    }
    Ok(found)
}

async fn print_status(
    client: &Client,
    namespace: &str,
    asked: &Status,
    out: &mut impl Write,
) -> Result<Outcome, Error> {
    let found = pairs(client, namespace, asked).await?;
    let rows: Vec<status::Row> = found.iter().map(|pair| status::row(pair, jiff::Timestamp::now())).collect();
    match asked.output {
        Output::Table => write!(out, "{}", status::text(&rows, asked.name.is_some()))?,
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?,
    }
    Ok(if rows.iter().all(|row| row.ready) { Outcome::Well } else { Outcome::NotWell })
}

/// Until interrupted. On a terminal each view replaces the last; elsewhere, and as JSON, they follow each other.
async fn watch(client: &Client, namespace: &str, asked: &Status, out: &mut impl Write) -> Result<Outcome, Error> {
    use std::io::IsTerminal;
    let replaces = asked.output == Output::Table && std::io::stdout().is_terminal();
    loop {
        if replaces {
            // Home, and erase what follows (ECMA-48: CUP, ED).
            write!(out, "\x1b[H\x1b[J")?;
        }
        print_status(client, namespace, asked, out).await?;
        out.flush()?;
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

async fn print_check(client: &Client, asked: &Check, out: &mut impl Write) -> Result<Outcome, Error> {
    let api: Api<PeerCluster> = Api::all(client.clone());
    let mut found = api.list(&ListParams::default()).await.map_err(api_error("PeerClusters"))?.items;
    if let Some(name) = &asked.peer {
        found.retain(|peer| peer.metadata.name.as_ref() == Some(name));
        if found.is_empty() {
            let (what, plural) = ("PeerCluster", "peerclusters");
            return Err(Error::NotFound { what, plural, name: name.clone(), place: String::new() });
        }
    }
    let findings: Vec<check::Finding> = found.iter().map(check::finding).collect();
    match asked.output {
        Output::Table => write!(out, "{}", check::text(&findings))?,
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(&findings)?)?,
    }
    let well = !findings.is_empty() && findings.iter().all(|one| one.ready && one.missing.is_empty());
    Ok(if well { Outcome::Well } else { Outcome::NotWell })
}

fn api_error(what: &str) -> impl FnOnce(kube::Error) -> Error {
    let what = what.to_owned();
    move |source| {
        let hint = match &source {
            kube::Error::Api(status) if status.code == 404 => "; is Watari's chart installed in this cluster?",
            kube::Error::Api(status) if status.code == 403 => "; ask for the right to read objects of watari.io",
            _ => "",
        };
        Error::Api { what, source, hint }
    }
}
