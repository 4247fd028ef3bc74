//! Judges raw disk images offline: what `watari-guest` checks about itself, without the guest.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use watari_guest::block::{BLOCK_BYTES, MAGIC, Stamp};
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
/// Blocks begin at multiples of this (`watari.shift`).
const SECTOR_BYTES: usize = 512;

/// Reads the images of all disks of a group, in order, and judges every run found on them, newest first. No tally: no
/// block of the workload is on them.
///
/// With `acknowledged` (per stream, from the guest's last report) nothing acknowledged may be missing; without, the
/// images together must be one point in time.
pub fn check(images: &[impl AsRef<Path>], acknowledged: Option<&[u64]>) -> Result<Vec<Tally>, Error> {
    let open = |path: &Path| File::open(path).map_err(|source| Error { path: path.to_owned(), source });
    let mut shift = 0;
    for path in images.iter().map(AsRef::as_ref) {
        let mut file = open(path)?;
        if let Some(found) = find_shift(&mut file).map_err(|source| Error { path: path.to_owned(), source })? {
            shift = found;
            break;
        }
    }
    let mut image = Image::default();
    for (disk, path) in (0u32..).zip(images.iter().map(AsRef::as_ref)) {
        let file = open(path)?;
        read_blocks(&file, shift, |block, bytes| image.add(Place { disk, block }, Stamp::read(bytes)))
            .map_err(|source| Error { path: path.to_owned(), source })?;
    }
    Ok(image.judge(acknowledged))
}

/// How far the first stamped block lies off its 4 KiB boundary.
fn find_shift(file: &mut File) -> std::io::Result<Option<u64>> {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let filled = fill(file, &mut buffer)?;
        let mut sectors = buffer[..filled].chunks(SECTOR_BYTES);
        if let Some(sector) = sectors.position(|sector| sector.starts_with(&MAGIC.to_le_bytes())) {
            return Ok(Some((sector * SECTOR_BYTES % BLOCK_BYTES) as u64));
        }
        if filled < buffer.len() {
            return Ok(None);
        }
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

fn read_blocks(file: &File, shift: u64, mut each: impl FnMut(u64, &[u8])) -> std::io::Result<()> {
    let blocks = file.metadata()?.len().saturating_sub(shift) / BLOCK_BYTES as u64;
    let mut buffer = vec![0; CHUNK_BYTES];
    let per_chunk = (CHUNK_BYTES / BLOCK_BYTES) as u64;
    for first in (0..blocks).step_by(per_chunk as usize) {
        let chunk = &mut buffer[..per_chunk.min(blocks - first) as usize * BLOCK_BYTES];
        file.read_exact_at(chunk, first * BLOCK_BYTES as u64 + shift)?;
        (first..).zip(chunk.chunks_exact(BLOCK_BYTES)).for_each(|(block, bytes)| each(block, bytes));
    }
    Ok(())
}
