//! Serve one file or block device over NBD on a unix socket, until killed: for tests, benchmarks and a first look.
//!
//! `serve_file SOCKET FILE [--read-only] [--name NAME] [--threads N]`

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use watari_nbd::local::LocalDiskConfig;
use watari_nbd::{ExportTable, FileDisk, Server, ServerConfig};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(socket), Some(file)) = (arguments.next(), arguments.next()) else {
        bail!("usage: serve_file SOCKET FILE [--read-only] [--name NAME] [--threads N]");
    };
    let mut config = LocalDiskConfig::new("disk");
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--read-only" => config.read_only = true,
            "--name" => config.name = arguments.next().context("--name needs a value")?,
            "--threads" => config.pool_threads = arguments.next().context("--threads needs a value")?.parse()?,
            other => bail!("unknown argument {other}"),
        }
    }
    let disk = Arc::new(FileDisk::open(Path::new(&file), config)?);
    let server = Server::bind(ServerConfig::new(socket), Arc::new(ExportTable::of(disk)))?;
    server.serve()?;
    loop {
        std::thread::park();
    }
}
