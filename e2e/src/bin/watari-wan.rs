//! The WAN emulator as a program of its own, for experiments by hand and for scripts.
//!
//! ```text
//! watari-wan run --a NETNS --b NETNS --control /tmp/wan.sock rate=100M delay=85ms
//! watari-wan ctl /tmp/wan.sock set a-to-b loss=1%
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use watari_e2e::wan::{End, Shape, Wan, control};

#[derive(Parser)]
#[command(about = "An emulated WAN between two network namespaces")]
struct Arguments {
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand)]
enum What {
    /// Connect two existing namespaces until interrupted.
    Run {
        /// Name of the first namespace.
        #[arg(long)]
        a: String,
        /// Name of the second namespace.
        #[arg(long)]
        b: String,
        #[arg(long, default_value = "10.77.0.1/30")]
        address_a: String,
        #[arg(long, default_value = "10.77.0.2/30")]
        address_b: String,
        #[arg(long, default_value_t = 1500)]
        mtu: u32,
        /// Where to listen for commands.
        #[arg(long)]
        control: PathBuf,
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// rate=100M delay=85ms jitter=2ms loss=0.1% queue=256K, for both directions.
        settings: Vec<String>,
    },
    /// Send one command to a running emulator; prints its answer.
    Ctl { socket: PathBuf, command: Vec<String> },
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        What::Run { a, b, address_a, address_b, mtu, control, seed, settings } => {
            let mut shape = Shape::default();
            for setting in settings {
                setting.parse::<control::Setting>().map_err(anyhow::Error::msg)?.apply(&mut shape);
            }
            let end = |name: &str, address: String| End { netns: Path::new("/run/netns").join(name), address };
            let mut wan = Wan::start(&end(&a, address_a), &end(&b, address_b), mtu, shape, seed)?;
            wan.serve_control(control)?;
            loop {
                std::thread::park();
            }
        }
        What::Ctl { socket, command } => {
            let answer = control::ask(&socket, &command.join(" ")).with_context(|| format!("{}", socket.display()))?;
            print!("{answer}");
            if answer.contains("\"error\"") {
                bail!("the command was refused");
            }
            Ok(())
        }
    }
}
