//! Where the region log lies: the seam for fault injection, and the real file in the metadata folder.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use watari_core::regions::log::{self, LogHeader, LogRefused, Recovered};
use watari_core::regions::{PairId, RegionLayout, RegionSet};

/// Name of the log in the metadata folder.
pub const LOG_NAME: &str = "regions.log";
const LOG_NAME_NEW: &str = "regions.log.new";

/// The few things that a region log asks of its file. Any of them may take for ever or fail; nothing is called again
/// after a failure except [`RegionMedium::invalidate`].
pub trait RegionMedium: Send {
    /// Write whole sectors at a sector's offset.
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Make everything written durable.
    fn sync(&mut self) -> io::Result<()>;
    /// The pair went `Untracked`: make this log unusable for a later start, as well as can be. Must not touch a newer
    /// log that took this one's name.
    fn invalidate(&mut self);
}

/// Why there is no usable log at a start.
#[derive(Debug, thiserror::Error)]
pub enum LogUnusable {
    #[error("there is no region log")]
    Missing,
    #[error("the region log cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Refused(#[from] LogRefused),
}

/// The log file.
pub struct FileMedium {
    file: File,
}

impl FileMedium {
    /// Write a complete new log with `regions` set, durably, and give it the log's name in `folder`; an older one is
    /// replaced only then; one of a newer format is refused and left as it is. All later writes overwrite it in place, so a full folder cannot stop them on file systems
    /// that overwrite in place.
    pub fn create(
        folder: &Path,
        header: &LogHeader,
        layout: &RegionLayout,
        regions: &RegionSet,
    ) -> io::Result<FileMedium> {
        let mut existing = Vec::new();
        match File::open(folder.join(LOG_NAME)) {
            Ok(file) => drop(file.take(log::HEADER_BYTES as u64).read_to_end(&mut existing)?),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        if let Err(newer @ LogRefused::NewerVersion { .. }) = log::decode_header(&existing) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, newer));
        }
        let new = folder.join(LOG_NAME_NEW);
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&new);
        let file = open?;
        file.write_all_at(&log::encode_file(header, layout, regions), 0)?;
        file.sync_all()?;
        std::fs::rename(&new, folder.join(LOG_NAME))?;
        File::open(folder)?.sync_all()?;
        Ok(FileMedium { file })
    }
}

impl RegionMedium for FileMedium {
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn invalidate(&mut self) {
        // By the descriptor, never by the name, which may be a newer log's. Shortening needs no room. A failure is not
        // reported: the medium has failed already, and the start that reads this log asks the peer what it heard.
        let _ = self.file.set_len(0).and_then(|()| self.file.sync_all());
    }
}

/// Read the log of a former start.
pub fn read_log(folder: &Path, pair: PairId, layout: &RegionLayout) -> Result<Recovered, LogUnusable> {
    let file = match File::open(folder.join(LOG_NAME)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(LogUnusable::Missing),
        other => other?,
    };
    let mut bytes = Vec::new();
    // Bounded by what the pair's disks need, whatever the file's length.
    file.take(log::file_bytes(layout) as u64).read_to_end(&mut bytes)?;
    Ok(log::decode_file(&bytes, pair, layout)?)
}
