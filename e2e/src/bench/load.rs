//! Data to measure with: what no compression makes smaller, and real files.

use std::{fs::File, os::unix::fs::FileExt, path::Path, process::Command};

use anyhow::{Context, ensure};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// Fills `bytes` of a file from `from` on with noise that depends on `seed`.
pub fn noise(path: &Path, from: u64, bytes: u64, seed: u64) -> anyhow::Result<()> {
    let file = File::options().write(true).create(true).truncate(false).open(path)?;
    let mut x = 0x9e37_79b9_7f4a_7c15u64 ^ seed.wrapping_mul(0xd134_2543_de82_ef95) | 1;
    let mut chunk = vec![0u8; MIB as usize];
    for at in (from..from + bytes).step_by(MIB as usize) {
        for word in chunk.as_chunks_mut::<8>().0 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            *word = x.to_le_bytes();
        }
        let length = (from + bytes - at).min(MIB) as usize;
        file.write_all_at(&chunk[..length], at)?;
    }
    Ok(())
}

/// Makes a raw image of `bytes` with an ext4 file system that holds a copy of `folder`.
pub fn ext4_of(folder: &Path, image: &Path, bytes: u64) -> anyhow::Result<()> {
    File::create(image)?.set_len(bytes)?;
    let mut mkfs = Command::new("mkfs.ext4");
    // Lazily initialised tables would be data that nobody wrote.
    mkfs.args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d"]).arg(folder).arg(image);
    let output = mkfs.env("PATH", search_path()).output().context("mkfs.ext4 (package e2fsprogs)")?;
    ensure!(output.status.success(), "mkfs.ext4: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Administrators' programs are not in everybody's path.
pub fn search_path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// Bytes that a file occupies.
pub fn allocated_bytes(path: &Path) -> anyhow::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata(path)?.blocks() * 512)
}
