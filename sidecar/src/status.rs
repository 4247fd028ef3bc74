//! `watari-sidecar status`: what a running sidecar says about its pair, for a person or a script.
//!
//! Three ways to look: once, live on a terminal (redrawn in place, with progress), or as lines. Everything shown comes
//! from the [`Report`]; [`text`] turns it into words and is pure, [`live`] draws.

pub mod live;
pub mod text;

use std::{
    io::{self, IsTerminal, Write},
    path::Path,
    time::Duration,
};

use watari_wire::report::Report;

use crate::control::client::{Client, ClientError};

#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("cannot print: {0}")]
    Print(#[from] io::Error),
    #[error("the report cannot be written: {0}")]
    Json(#[from] serde_json::Error),
}

/// How to show.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    pub once: bool,
    pub json: bool,
    pub every: Duration,
}

/// Shows the sidecar behind `socket` until it ends, or once.
pub async fn show(socket: &Path, look: Look) -> Result<(), StatusError> {
    let mut client = Client::connect(socket).await?;
    let mut out = io::stdout();
    if look.once {
        return print_once(&mut out, &client.report().await?, look.json);
    }
    let mut watch = client.watch(look.every).await?;
    if !look.json && out.is_terminal() {
        let mut view = live::View::new();
        while let Some(report) = watch.next().await? {
            view.draw(&report);
        }
        view.end("the sidecar has ended");
        return Ok(());
    }
    let mut former = String::new();
    while let Some(report) = watch.next().await? {
        let line = if look.json { serde_json::to_string(&report)? } else { text::line(&report) };
        if line != former {
            let time = if look.json { String::new() } else { format!("{} ", text::clock(report.now_unix_millis)) };
            writeln!(out, "{time}{line}")?;
            out.flush()?;
            former = line;
        }
    }
    Ok(())
}

fn print_once(out: &mut impl Write, report: &Report, json: bool) -> Result<(), StatusError> {
    if json {
        serde_json::to_writer_pretty(&mut *out, report)?;
        writeln!(out)?;
    } else {
        for line in text::page(report) {
            writeln!(out, "{line}")?;
        }
    }
    Ok(())
}
