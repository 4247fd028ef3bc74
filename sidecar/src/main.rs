//! The binary: parses the command line, sets up logging, and hands over to one shell. Nothing is decided here.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use clap::Parser;
use watari_sidecar::{
    cli::{Cli, Command, Ctl, CtlIntent, EXIT_FAILED, EXIT_REFUSED, Gateway, Pki, PkiAction, Run, Status, Target},
    config::{
        Config, Overrides,
        world::{self, Start},
    },
    control::client::Client,
    engine::steering::{Intent, Settings},
    gateway, inspect, logging, pki, status,
    supervisor::{self, Worker},
    tls::Tls,
    worker,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = logging::init(&cli.log, cli.log_format) {
        return refused(&error.into());
    }
    let outcome = match &cli.command {
        Command::Primary(run) => return serve(run, Start::Primary),
        Command::Replica(run) => return serve(run, Start::Replica),
        Command::Inspect(inspect) => inspect::run(inspect).map_err(anyhow::Error::from),
        Command::Status(status) => show(status),
        Command::Ctl(ctl) => steer(ctl),
        Command::Pki(pki) => certify(pki),
        Command::Gateway(options) => return route(options),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn refused(error: &anyhow::Error) -> ExitCode {
    eprintln!("watari-sidecar: refused: {error:#}");
    ExitCode::from(EXIT_REFUSED)
}

/// A reader that has gone (`| head`) is no failure worth a word.
fn failed(error: &anyhow::Error) -> ExitCode {
    let gone = error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    });
    if !gone {
        eprintln!("watari-sidecar: {error:#}");
    }
    ExitCode::from(EXIT_FAILED)
}

/// `primary` and `replica`: as the supervisor, or as its worker. Both read the configuration, so that a refusal comes
/// before a worker and after an upgrade alike.
fn serve(run: &Run, start: Start) -> ExitCode {
    let config = match Config::load(&run.config, &run.overrides()) {
        Ok(config) => config,
        Err(error) => return refused(&error.into()),
    };
    if let Err(error) = preflight(&config, start, run) {
        return refused(&error);
    }
    if run.check {
        return match print(&summary(&config, start)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        };
    }
    if run.worker.worker || run.no_supervisor {
        return work(config, run, start);
    }
    // Whatever happens to the file on disk (an upgrade), this is the program that runs.
    let program = run.worker.fake_worker.clone().unwrap_or_else(|| PathBuf::from("/proc/self/exe"));
    let worker = Worker { program, arguments: std::env::args_os().skip(1).collect() };
    match supervisor::supervise(&worker) {
        Ok(code) => ExitCode::from(code),
        Err(error) => failed(&error.into()),
    }
}

/// Everything that can be refused before any file is touched.
fn preflight(config: &Config, start: Start, run: &Run) -> anyhow::Result<()> {
    world::check(config, start)?;
    let tls = Tls::load(config.tls.clone(), config.identity())?;
    if !run.worker.worker {
        // A worker that follows a crashed one must not be held up by what its connections left behind.
        world::check_listen(config)?;
        let left = tls.status().not_after_unix_seconds - jiff::Timestamp::now().as_second();
        if left < 0 {
            tracing::warn!(certificate = %config.tls.certificate.display(), "the certificate is expired: the peer will refuse it; renew it");
        }
    }
    Ok(())
}

fn work(config: Config, run: &Run, start: Start) -> ExitCode {
    // The program was started through /proc, and would be shown as `exe`. A name is all that is lost if this fails.
    let _ = rustix::thread::set_name(c"watari-worker");
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("watari").build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&anyhow::Error::new(error).context("cannot start the runtime")),
    };
    match runtime.block_on(worker::run(config, start == Start::Primary, &run.worker)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => refused(&error.into()),
    }
}

fn route(options: &Gateway) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("gateway").build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&anyhow::Error::new(error).context("cannot start the runtime")),
    };
    match runtime.block_on(gateway::run(options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => refused(&error.into()),
    }
}

/// What `--check` says.
fn summary(config: &Config, start: Start) -> String {
    let mut text = format!(
        "{} is valid: {} of pair {} ({}) at site {}\n",
        config.file.display(),
        match start {
            Start::Primary => "primary",
            Start::Replica => "replica",
        },
        config.pair.name,
        config.pair.id,
        config.site
    );
    for disk in &config.disks {
        text.push_str(&format!("  disk {}: {} on {}\n", disk.name, disk.path.display(), disk.socket.display()));
    }
    text.push_str(&format!(
        "  listens on {}, dials {} as {}\n  control socket {}\n",
        config.listen,
        config.peer.addresses.join(", "),
        config.peer.server_name,
        config.control_socket.display()
    ));
    text
}

/// Standard output may be a closed pipe; that is an error like any other, not a panic.
fn print(text: &str) -> anyhow::Result<()> {
    std::io::stdout().write_all(text.as_bytes()).context("cannot print")
}

fn socket(target: &Target) -> anyhow::Result<PathBuf> {
    match (&target.socket, &target.config) {
        (Some(socket), _) => Ok(socket.clone()),
        (None, Some(config)) => Ok(Config::load(config, &Overrides::default())?.control_socket),
        (None, None) => anyhow::bail!("give --config or --socket"),
    }
}

fn client_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")
}

fn show(options: &Status) -> anyhow::Result<()> {
    let look = status::Look { once: options.once, json: options.json, every: options.every };
    Ok(client_runtime()?.block_on(status::show(&socket(&options.target)?, look))?)
}

fn steer(ctl: &Ctl) -> anyhow::Result<()> {
    let path = socket(&ctl.target)?;
    let answer = client_runtime()?.block_on(ask(&path, ctl))?;
    print(&format!("{answer}\n"))
}

async fn ask(path: &Path, ctl: &Ctl) -> anyhow::Result<String> {
    let mut timeout = ctl.timeout;
    if let CtlIntent::Cut { wait } = &ctl.intent {
        // The sidecar answers after `wait`; asking for less would make that wait useless.
        timeout = timeout.max(*wait + std::time::Duration::from_secs(5));
    }
    let mut client = Client::connect(path).await?;
    Ok(client.intent(intent(&ctl.intent), timeout).await?)
}

fn intent(asked: &CtlIntent) -> Intent {
    match asked.clone() {
        CtlIntent::Cut { wait } => Intent::Cut { wait },
        CtlIntent::Set { interval, bandwidth, paused, slow_down } => Intent::Configure(Settings {
            interval,
            bandwidth_bits_per_second: bandwidth.map(|limit| limit.bits()),
            paused,
            slow_down,
        }),
        CtlIntent::OpenHandover { vmi_uid } => Intent::OpenHandover { vmi_uid },
        CtlIntent::Acquire => Intent::Acquire,
        CtlIntent::Void => Intent::Void,
        CtlIntent::MoveStopped => Intent::MoveStopped,
        CtlIntent::Promote { generation } => Intent::Promote { generation },
        CtlIntent::AcceptDivergence => Intent::AcceptDivergence,
        CtlIntent::Release => Intent::Release,
    }
}

fn certify(options: &Pki) -> anyhow::Result<()> {
    let said = match &options.action {
        PkiAction::New { out, site, pair, days } => pki::new_pair(out, site, *pair, *days)?,
        PkiAction::Renew { out, site, days } => pki::renew(out, site, *days)?,
    };
    print(&said)
}
