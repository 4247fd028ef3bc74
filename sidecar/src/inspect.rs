//! `watari-sidecar inspect`: looks into the folder of a sidecar that is not running. Changes nothing, not even a lock file.
//!
//! The folder is opened read-only through the same code that serves it, so what is shown is what a start would find.
//! While a sidecar holds the folder this refuses: files change under a reader then, and the running one answers `status`
//! and serves kept generations over NBD.

use std::{
    fs,
    io::{self, IsTerminal, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use indicatif::{ProgressBar, ProgressStyle};
use watari_core::{
    geometry::{DiskIndex, Generation},
    record::{RecordError, RoleRecord},
    replica::{Mark, Options, ReplicaError, ViewCache, inspect::ReplicaState},
    slots::{SlotError, SlotFile},
};
use watari_store::{
    folder::{DiskImages, Folder},
    lock::FolderLock,
    replica::{FileReplica, Zstd},
};

use crate::{
    cli::{Inspect, InspectAction},
    config::{Config, ConfigError, Overrides},
    engine::divergence::DivergenceUnusable,
    engine::folder::{ROLE_MAGIC, ROLE_NAME, ROLE_VERSION, ReplicaFolder},
    identity::PairId,
    status::text,
};

mod divergence;

/// Bytes read and written at a time by an export.
const CHUNK_BYTES: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{}: found a running sidecar (process {pid} on {host}), expected none; end it, or ask it with `status`", folder.display())]
    Running { folder: PathBuf, pid: u32, host: String },
    #[error("{}: found no record of a sidecar, expected one; is this the folder of this pair?", .0.display())]
    Empty(PathBuf),
    #[error("{}: found a folder of pair {found}, expected {expected}; name the right configuration", folder.display())]
    OtherPair { folder: PathBuf, found: PairId, expected: PairId },
    #[error("the role record: {0}")]
    Slot(#[from] SlotError),
    #[error("the role record: {0}")]
    Record(#[from] RecordError),
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    #[error("this side holds no replica: its disks are the VM's own")]
    NoReplica,
    #[error("`--disk`: found {found:?}, expected one of {known}")]
    NoSuchDisk { found: String, known: String },
    #[error("`--generation`: found {found}, expected one of {known}")]
    NoSuchGeneration { found: u64, known: String },
    #[error("nothing is committed yet")]
    NothingCommitted,
    #[error(transparent)]
    Divergence(#[from] DivergenceUnusable),
    #[error(
        "this side is {0}, expected Fenced: what it wrote alone may be overwritten already; look among the kept generations (`list`)"
    )]
    NotFenced(&'static str),
    #[error("{0} findings")]
    Damaged(usize),
}

/// Does what was asked and prints the answer.
pub fn run(inspect: &Inspect) -> Result<(), InspectError> {
    let config = Config::load(&inspect.config, &Overrides::default())?;
    let mut opened = Opened::open(&config)?;
    let mut out = io::stdout().lock();
    match &inspect.action {
        InspectAction::List => print(&mut out, &opened.list(&config)),
        InspectAction::Dump => print(&mut out, &[opened.dump()]),
        InspectAction::Verify => {
            let findings = opened.verify()?;
            print(&mut out, &findings)?;
            if findings.is_empty() {
                return print(&mut out, &["journal, undo and records are right".to_owned()]);
            }
            Err(InspectError::Damaged(findings.len()))
        }
        InspectAction::Divergence { out: dir } => {
            let lines = divergence::show(&config, &opened.record, dir.as_deref())?;
            print(&mut out, &lines)
        }
        InspectAction::Export { disk, generation, out: file } => {
            let (generation, bytes) = opened.export(&config, disk, *generation, file)?;
            let said = format!("{}: {} of generation {generation}", file.display(), text::bytes(bytes));
            print(&mut out, &[said])
        }
    }
}

fn print(out: &mut impl Write, lines: &[String]) -> Result<(), InspectError> {
    for line in lines {
        writeln!(out, "{line}").map_err(|error| InspectError::Io { path: PathBuf::from("standard output"), error })?;
    }
    Ok(())
}

/// A folder, opened for reading.
struct Opened {
    record: RoleRecord,
    replica: Option<FileReplica>,
}

impl Opened {
    fn open(config: &Config) -> Result<Opened, InspectError> {
        let folder = &config.folder;
        if let Some(owner) = FolderLock::holder(folder) {
            return Err(InspectError::Running { folder: folder.clone(), pid: owner.pid, host: owner.host });
        }
        let io = |path: &Path| {
            let path = path.to_owned();
            move |error| InspectError::Io { path, error }
        };
        let meta = Folder::open(folder).map_err(io(folder))?;
        let (_, payload) = SlotFile::open(&meta, ROLE_NAME, ROLE_MAGIC, ROLE_VERSION)?
            .ok_or_else(|| InspectError::Empty(folder.clone()))?;
        let record = RoleRecord::decode(&payload.bytes)?;
        if record.pair != config.pair.id.0 {
            let (found, expected) = (PairId(record.pair), config.pair.id);
            return Err(InspectError::OtherPair { folder: folder.clone(), found, expected });
        }
        let sizes: Vec<u64> = record.disks.iter().map(|disk| disk.size_bytes).collect();
        let replica = ReplicaFolder::new(config, &sizes);
        let dir = replica.dir();
        let replica = match fs::metadata(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            found => {
                found.map_err(io(dir))?;
                let paths: Vec<&PathBuf> = config.disks.iter().map(|disk| &disk.path).collect();
                let images = DiskImages::open(&paths, true).map_err(io(dir))?;
                let meta = Folder::open(dir).map_err(io(dir))?;
                let options = Options { read_only: true, ..Options::default() };
                FileReplica::open(meta, images, Box::new(Zstd), options)?
            }
        };
        Ok(Opened { record, replica })
    }

    fn list(&self, config: &Config) -> Vec<String> {
        let record = &self.record;
        let mut lines = vec![
            format!("Pair    {} ({})", config.pair.name, config.pair.id),
            format!(
                "Role    {}, epoch {}, floor {}, started {} times",
                record.role.name(),
                record.epoch.counter,
                record.floor,
                record.starts
            ),
        ];
        for disk in &record.disks {
            lines.push(format!("Disk    {}, {}", disk.name, text::bytes(disk.size_bytes)));
        }
        if record.untracked {
            lines.push("Trust   untracked: the next start compares everything by digest".to_owned());
        }
        let Some(replica) = &self.replica else {
            lines.push("Replica none".to_owned());
            return lines;
        };
        let report = replica.report();
        lines.push(format!("Replica {}", state(&report.state)));
        lines.push(format!(
            "Journal {} ({} needed), undo {}, {} to apply",
            text::bytes(report.journal_bytes),
            text::bytes(report.journal_live_bytes),
            text::bytes(report.undo_bytes),
            text::bytes(report.unapplied_bytes)
        ));
        if report.generations.is_empty() {
            lines.push("Kept    nothing committed yet".to_owned());
        }
        for kept in &report.generations {
            let shared = if kept.shared { ", shared with the peer" } else { "" };
            let at = kept.mark.committed_at_seconds.saturating_mul(1000);
            lines.push(format!(
                "Kept    {}, committed {}, in {}{shared}",
                kept.mark.generation,
                text::date(at),
                format!("{:?}", kept.place).to_lowercase()
            ));
        }
        lines
    }

    fn dump(&self) -> String {
        match &self.replica {
            None => format!("{:#?}", self.record),
            Some(replica) => format!("{:#?}\n{:#?}", self.record, replica.report()),
        }
    }

    /// What is wrong, one line each. The images carry no checksums of ours: compare an export with the source for that.
    fn verify(&mut self) -> Result<Vec<String>, InspectError> {
        let Some(replica) = &mut self.replica else { return Ok(Vec::new()) };
        let findings = replica.verify()?;
        Ok(findings.into_iter().map(|finding| format!("{}: {}", finding.file, finding.what)).collect())
    }

    /// Writes one disk of a kept generation to a new sparse file; durable when this returns.
    fn export(
        &mut self,
        config: &Config,
        disk: &str,
        number: Option<u64>,
        file: &Path,
    ) -> Result<(Generation, u64), InspectError> {
        let replica = self.replica.as_mut().ok_or(InspectError::NoReplica)?;
        let index = config.disks.iter().position(|known| known.name == disk).ok_or_else(|| {
            let known = config.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(", ");
            InspectError::NoSuchDisk { found: disk.to_owned(), known }
        })?;
        let generation = choose(&replica.kept(), number)?;
        let view = replica.view(Some(generation))?;
        let disk = DiskIndex(index as u16);
        let bytes = view.disk_bytes(disk).ok_or(InspectError::NoReplica)?;
        let io = |error| InspectError::Io { path: file.to_owned(), error };
        let target = fs::OpenOptions::new().write(true).create_new(true).open(file).map_err(io)?;
        target.set_len(bytes).map_err(io)?;
        let progress = progress(bytes);
        let (mut cache, mut chunk, mut offset) = (ViewCache::default(), vec![0; CHUNK_BYTES], 0);
        while offset < bytes {
            let length = CHUNK_BYTES.min((bytes - offset) as usize);
            let chunk = &mut chunk[..length];
            replica.read_view(&view, &mut cache, disk, offset, chunk)?;
            // The new file reads as zeroes already.
            if chunk.iter().any(|byte| *byte != 0) {
                target.write_all_at(chunk, offset).map_err(io)?;
            }
            offset += length as u64;
            progress.set_position(offset);
        }
        target.sync_all().map_err(io)?;
        progress.finish_and_clear();
        Ok((generation, bytes))
    }
}

fn choose(kept: &[Mark], number: Option<u64>) -> Result<Generation, InspectError> {
    let newest = kept.first().ok_or(InspectError::NothingCommitted)?;
    let Some(number) = number else { return Ok(newest.generation) };
    kept.iter().map(|mark| mark.generation).find(|generation| generation.number.0 == number).ok_or_else(|| {
        let known = kept.iter().map(|mark| mark.generation.number.0.to_string()).collect::<Vec<_>>().join(", ");
        InspectError::NoSuchGeneration { found: number, known }
    })
}

fn state(state: &ReplicaState) -> String {
    match state {
        ReplicaState::Ready => "ready".to_owned(),
        ReplicaState::RollingBack(to) => format!("being taken back to {to}"),
        ReplicaState::Poisoned(why) => format!("failed: {why}"),
        full @ ReplicaState::Full { .. } => format!("{full:?}").to_lowercase(),
    }
}

fn progress(bytes: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bytes} of {total_bytes} [{bar:40.cyan}] {eta}");
    ProgressBar::new(bytes).with_style(style.expect("the template is valid").progress_chars("=> "))
}
