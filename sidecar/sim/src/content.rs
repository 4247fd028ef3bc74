//! Disk content as the truth sees it: one word per 512-byte sector, repeated 64 times on the medium.
//!
//! A word names the write that made it and its place (`id << 16 | disk << 12 | sector`), so content that is old, torn or
//! misplaced is told apart from the right one. Zero is zero. Nothing here knows about blocks that are dirty or sent.

use watari_core::{
    frame::Decompress,
    geometry::{BLOCK_BYTES, DiskIndex},
    storage::{Storage, StorageError, sim::SimStorage},
};

/// Bytes that a medium writes in one piece, and the grain of guest requests here.
pub const SECTOR_BYTES: u64 = 512;
/// Sectors of a block.
pub const BLOCK_SECTORS: u64 = BLOCK_BYTES / SECTOR_BYTES;

/// What one sector holds.
pub type Word = u64;
/// All disks of the VM, by disk and sector.
pub type Disks = Vec<Vec<Word>>;

/// The word that write `id` leaves in a sector.
pub fn word(id: u64, disk: usize, sector: u64) -> Word {
    id << 16 | (disk as u64) << 12 | sector
}

/// For people: which write, where.
pub fn name(word: Word) -> String {
    match word {
        0 => "zero".into(),
        w => format!("write {} (disk {} sector {})", w >> 16, w >> 12 & 15, w & 0xfff),
    }
}

/// Words to bytes.
pub fn bytes_of(words: &[Word]) -> Vec<u8> {
    let mut out = vec![0; words.len() * SECTOR_BYTES as usize];
    for (sector, word) in out.chunks_exact_mut(SECTOR_BYTES as usize).zip(words) {
        let bytes = word.to_le_bytes();
        sector.as_chunks_mut::<8>().0.fill(bytes);
    }
    out
}

/// Bytes to words; whole sectors only. Panics when a sector is torn inside, which no medium here does.
pub fn words_of(bytes: &[u8]) -> Vec<Word> {
    let sectors = bytes.chunks_exact(SECTOR_BYTES as usize);
    let one = |sector: &[u8]| {
        // Equal to itself shifted by a word: every word is the first.
        assert!(sector[8..] == sector[..sector.len() - 8], "the bytes of a sector come from two writes");
        u64::from_le_bytes(sector[..8].try_into().unwrap_or_default())
    };
    sectors.map(one).collect()
}

/// Everything that the image files hold.
pub fn read_all(images: &SimStorage, sizes: &[u64]) -> Result<Disks, StorageError> {
    let mut disks = Vec::with_capacity(sizes.len());
    for (disk, size) in sizes.iter().enumerate() {
        let mut bytes = vec![0; *size as usize];
        images.read(&watari_core::replica::images::image_name(DiskIndex(disk as u16)), 0, &mut bytes)?;
        disks.push(words_of(&bytes));
    }
    Ok(disks)
}

/// Stands for zstd: one word per sector instead of 512 bytes.
pub struct Words;

impl Words {
    pub fn compress(content: &[u8]) -> Vec<u8> {
        words_of(content).iter().flat_map(|w| w.to_le_bytes()).collect()
    }
}

impl Decompress for Words {
    fn decompress(&self, payload: &[u8], content_bytes: usize, out: &mut Vec<u8>) -> bool {
        let words: Vec<Word> =
            payload.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap_or_default())).collect();
        *out = bytes_of(&words);
        out.len() == content_bytes
    }
}
