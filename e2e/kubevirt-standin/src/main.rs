//! `kubevirt-standin`: what stands in for KubeVirt's programs, one subcommand each.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};
use kubevirt_standin::controller::Controller;
use kubevirt_standin::{crds, image, launcher, monitor};
use watari_clusters::folders::Folders;
use watari_clusters::{handle, images};

#[derive(Parser)]
#[command(about = "Plays the part of KubeVirt that Watari touches; for tests only")]
struct Arguments {
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand)]
enum What {
    /// Pack the launcher's image and give it to the nodes of our clusters.
    Image,
    /// virt-controller, for one cluster: makes the custom resources and works until it is killed.
    Controller {
        #[arg(long)]
        kubeconfig: PathBuf,
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
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match command {
        What::Image => {
            let folders = Folders::from_environment()?;
            image::ensure(&folders, &std::env::current_exe()?)?;
            if let Some(plan) = folders.read_plan()? {
                eprintln!("{} imports", images::import(&folders, &plan)?);
            }
        }
        What::Controller { kubeconfig } => runtime.block_on(async {
            let client = handle::client(&kubeconfig).await?;
            crds::apply(&client).await?;
            Controller::new(client, image::LAUNCHER_IMAGE).run().await;
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
