//! `kubevirt-standin`: what stands in for KubeVirt's programs, one subcommand each.

use std::process::{Command, ExitCode};

use anyhow::Context;
use clap::{Parser, Subcommand};
use kube::{Client, Config};
use kubevirt_standin::controller::Controller;
use kubevirt_standin::{image, install, launcher, monitor};
use watari_clusters::handle::Pair;

#[derive(Parser)]
#[command(about = "Plays the part of KubeVirt that Watari touches; for tests only")]
struct Arguments {
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand)]
enum What {
    /// Pack the image, give it to the nodes of our clusters, and start the stand-in on them.
    Up,
    /// Take the stand-in, its resources and with them all VMs off our clusters.
    Down,
    /// Everything of KubeVirt but virt-launcher, for one cluster; in a Pod.
    Controller {
        /// Of this Pod, for controllers of other clusters.
        #[arg(long, env = "POD_IP")]
        address: String,
    },
    /// virt-launcher; in the compute container.
    Launcher,
    /// virt-launcher-monitor: process 1 of the compute container.
    Monitor,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
    match run(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kubevirt-standin: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: What) -> anyhow::Result<ExitCode> {
    // Before any other thread: it blocks signals for all that come after.
    if matches!(command, What::Monitor) {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("launcher");
        let code = monitor::run(command)?;
        return Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ours = async || Pair::open().await?.ours.context("the stand-in is for our own clusters");
    match command {
        What::Up => {
            runtime.block_on(async { install::up(&ours().await?, &std::env::current_exe()?).await })?;
        }
        What::Down => runtime.block_on(async { install::down(&ours().await?).await })?,
        What::Controller { address } => runtime.block_on(async {
            let client = Client::try_from(Config::incluster_env()?)?;
            Controller::new(client, image::LAUNCHER_IMAGE, &address).run().await?;
            anyhow::Ok(())
        })?,
        What::Launcher => {
            let good = runtime.block_on(launcher::run())?;
            return Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        What::Monitor => unreachable!("handled above"),
    }
    Ok(ExitCode::SUCCESS)
}
