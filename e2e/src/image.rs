//! Judges raw disk images offline: what `watari-guest` checks about itself, without the guest.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use watari_guest::block::{BLOCK_BYTES, Stamp};
use watari_guest::check::{Image, Tally};
use watari_guest::schedule::Place;

/// An image cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub struct Error {
    pub path: PathBuf,
    pub source: std::io::Error,
}

/// Bytes per read.
const CHUNK_BYTES: usize = 1 << 20;

/// Reads the images of all disks of a group, in order, and judges every run found on them, newest first. No tally: no
/// block of the workload is on them.
///
/// With `acknowledged` (per stream, from the guest's last report) nothing acknowledged may be missing; without, the
/// images together must be one point in time.
pub fn check(images: &[impl AsRef<Path>], acknowledged: Option<&[u64]>) -> Result<Vec<Tally>, Error> {
    let mut image = Image::default();
    for (disk, path) in (0u32..).zip(images) {
        let path = path.as_ref();
        read(path, |block, bytes| image.add(Place { disk, block }, Stamp::read(bytes)))
            .map_err(|source| Error { path: path.to_owned(), source })?;
    }
    Ok(image.judge(acknowledged))
}

fn read(path: &Path, mut each: impl FnMut(u64, &[u8])) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut block = 0;
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match file.read(&mut buffer[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        for bytes in buffer[..filled].chunks_exact(BLOCK_BYTES) {
            each(block, bytes);
            block += 1;
        }
        if filled < buffer.len() {
            return Ok(());
        }
    }
}
