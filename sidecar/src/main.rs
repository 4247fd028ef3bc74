//! `watari-sidecar`: one binary, several subcommands; this file only picks one.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::Parser;
use watari_sidecar::{
    cli::{Cli, Command, CtlIntent, EXIT_FAILED, EXIT_REFUSED, PkiAction, Run, Target},
    config::{Config, Overrides},
    control::client::Client,
    engine::steering::{Intent, Settings},
    logging, status, supervisor, worker,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = logging::init(&cli.log, cli.log_format) {
        eprintln!("watari-sidecar: {error}");
        return ExitCode::from(EXIT_REFUSED);
    }
    match &cli.command {
        Command::Primary(run) => serve(run, true),
        Command::Replica(run) => serve(run, false),
        Command::Pki(pki) => said(match &pki.action {
            PkiAction::New { out, site, pair, days } => watari_sidecar::pki::new_pair(out, site, *pair, *days),
            PkiAction::Renew { out, site, days } => watari_sidecar::pki::renew(out, site, *days),
        }),
        Command::Status(status) => said(ask(&status.target, async |socket| {
            let look = status::Look { once: status.once, json: status.json, every: status.every };
            status::show(&socket, look).await.map(|()| String::new()).map_err(anyhow::Error::from)
        })),
        Command::Ctl(ctl) => said(ask(&ctl.target, async |socket| {
            let mut client = Client::connect(&socket).await?;
            Ok(client.intent(intent(&ctl.intent), ctl.timeout).await?)
        })),
        Command::Inspect(_) => {
            eprintln!("watari-sidecar: inspect is not part of this build yet");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

/// Print what was said, or why not.
fn said<E: std::fmt::Display>(result: Result<String, E>) -> ExitCode {
    match result {
        Ok(text) if text.is_empty() => ExitCode::SUCCESS,
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("watari-sidecar: {error:#}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

/// Find the control socket and run `question` on a small runtime.
fn ask<F: Future<Output = anyhow::Result<String>>>(
    target: &Target,
    question: impl FnOnce(PathBuf) -> F,
) -> anyhow::Result<String> {
    let socket = match (&target.socket, &target.config) {
        (Some(socket), _) => socket.clone(),
        (None, Some(file)) => Config::load(file, &Overrides::default())?.control_socket,
        (None, None) => anyhow::bail!("name a configuration (--config) or a control socket (--socket)"),
    };
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(question(socket))
}

fn intent(asked: &CtlIntent) -> Intent {
    match asked.clone() {
        CtlIntent::Cut { wait } => Intent::Cut { wait },
        CtlIntent::Set { interval, bandwidth, paused, slow_down } => Intent::Configure(Settings {
            interval,
            bandwidth_bits_per_second: bandwidth.map(watari_sidecar::throttle::Limit::bits),
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

fn serve(run: &Run, front_end: bool) -> ExitCode {
    let config = match Config::load(&run.config, &run.overrides()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("watari-sidecar: {error}");
            return ExitCode::from(EXIT_REFUSED);
        }
    };
    if run.worker.worker || run.no_supervisor {
        let runtime = match tokio::runtime::Runtime::new() {
            Ok(runtime) => runtime,
            Err(error) => {
                eprintln!("watari-sidecar: {error}");
                return ExitCode::from(EXIT_FAILED);
            }
        };
        return match runtime.block_on(worker::run(config, front_end, &run.worker)) {
            Ok(code) => ExitCode::from(code),
            Err(error) => {
                eprintln!("watari-sidecar: {error}");
                ExitCode::from(EXIT_REFUSED)
            }
        };
    }
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => {
            eprintln!("watari-sidecar: {error}");
            return ExitCode::from(EXIT_FAILED);
        }
    };
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    match supervisor::supervise(&supervisor::Worker { program, arguments }) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("watari-sidecar: {error}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}
