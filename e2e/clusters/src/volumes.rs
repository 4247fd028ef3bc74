//! Storage of the clusters: a folder or a file with a loop device for each claim, in `CLUSTER/volumes`, which all nodes see.
//!
//! ```text
//! volumes/pvc-UID/       a claim of mode Filesystem
//! volumes/pvc-UID.img    a claim of mode Block: the bytes …
//! volumes/pvc-UID        … and a device node for the loop device over them
//! ```
//! A folder has the size of the machine's disk, not that of the claim: full disks are tested on Block claims.

use std::ffi::CString;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::folders;
use crate::images::{self, tool};

/// The loop devices of Linux (Documentation/admin-guide/devices.txt).
const LOOP_MAJOR: u32 = 7;

/// Why a volume is not there (or not gone).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Folder(#[from] folders::Error),
    #[error(transparent)]
    Tool(#[from] images::Error),
    #[error("losetup answered {0:?}, which is no loop device")]
    NoLoop(String),
}

/// Makes a folder for everybody to write in, as a fresh file system of a storage driver with fsGroup is.
pub fn create_folder(volumes: &Path, name: &str) -> Result<(), Error> {
    let path = volumes.join(name);
    std::fs::create_dir_all(&path).map_err(folders::at(&path))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o2777)).map_err(folders::at(&path))?;
    Ok(())
}

/// Makes a block device of `bytes` bytes, all zero. Repeating it changes nothing.
pub fn create_device(volumes: &Path, name: &str, bytes: u64) -> Result<(), Error> {
    let (image, path) = (volumes.join(format!("{name}.img")), volumes.join(name));
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&image)
        .map_err(folders::at(&image))?;
    file.set_len(bytes).map_err(folders::at(&image))?;
    let device = match attached(&image)?.into_iter().next() {
        Some(device) => device,
        None => PathBuf::from(tool(Command::new("losetup").args(["--find", "--show"]).arg(&image))?.trim()),
    };
    let number = device
        .to_str()
        .and_then(|device| device.strip_prefix("/dev/loop")?.parse().ok())
        .ok_or_else(|| Error::NoLoop(device.display().to_string()))?;
    let _ = std::fs::remove_file(&path);
    make_node(&path, number).map_err(folders::at(&path))?;
    Ok(())
}

fn make_node(path: &Path, number: u32) -> std::io::Result<()> {
    let name = CString::new(path.as_os_str().as_bytes()).map_err(std::io::Error::other)?;
    // SAFETY: a terminated path and two numbers.
    match unsafe { libc::mknod(name.as_ptr(), libc::S_IFBLK | 0o660, libc::makedev(LOOP_MAJOR, number)) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Takes a volume of either mode away, with its data.
pub fn delete(volumes: &Path, name: &str) -> Result<(), Error> {
    let (image, path) = (volumes.join(format!("{name}.img")), volumes.join(name));
    for device in attached(&image)? {
        detach(&device)?;
    }
    let gone = |result: std::io::Result<()>, path: &Path| match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(folders::at(path)(error)),
        _ => Ok(()),
    };
    gone(std::fs::remove_file(&image), &image)?;
    match std::fs::symlink_metadata(&path) {
        Ok(metadata) if metadata.file_type().is_block_device() => gone(std::fs::remove_file(&path), &path)?,
        Ok(_) => gone(std::fs::remove_dir_all(&path), &path)?,
        Err(_) => {}
    }
    Ok(())
}

fn attached(image: &Path) -> Result<Vec<PathBuf>, Error> {
    let listed = tool(Command::new("losetup").args(["--noheadings", "--output", "NAME", "--associated"]).arg(image))?;
    Ok(listed.lines().map(|line| PathBuf::from(line.trim())).filter(|device| device.is_absolute()).collect())
}

fn detach(device: &Path) -> Result<(), Error> {
    Ok(tool(Command::new("losetup").arg("--detach").arg(device)).map(drop)?)
}

/// Detaches every loop device whose bytes lie below `folder`, and those that kubelet put on top of them. Answers how many.
///
/// A device in use goes when its last user does: asked before the nodes end as well as after it.
pub fn detach_all(folder: &Path) -> Result<usize, Error> {
    let listed = tool(Command::new("losetup").args(["--noheadings", "--list", "--output", "NAME,BACK-FILE"]))?;
    let devices = ours(&loops(&listed), folder);
    devices.iter().try_for_each(|device| detach(device))?;
    Ok(devices.len())
}

/// A loop device in use.
#[derive(Clone, Debug)]
struct Loop {
    device: PathBuf,
    /// As this machine sees it; kubelet's are "/" once the node that mounted them is gone.
    file: PathBuf,
    /// The loop device on which this one lies, if it does.
    on_top_of: Option<PathBuf>,
}

fn loops(listed: &str) -> Vec<Loop> {
    let lines = listed.lines().filter_map(|line| line.trim().split_once(char::is_whitespace));
    let parse = |(device, file): (&str, &str)| Loop {
        on_top_of: backing_loop(Path::new(device)),
        device: device.into(),
        file: file.trim().trim_end_matches(" (deleted)").into(),
    };
    lines.map(parse).collect()
}

/// The devices that belong to volumes below `folder`; those on top of others first.
fn ours(loops: &[Loop], folder: &Path) -> Vec<PathBuf> {
    let below: Vec<&PathBuf> =
        loops.iter().filter(|each| each.file.starts_with(folder)).map(|each| &each.device).collect();
    let on_top = loops.iter().filter(|each| each.on_top_of.as_ref().is_some_and(|under| below.contains(&under)));
    on_top.map(|each| &each.device).chain(below.iter().copied()).cloned().collect()
}

/// What the kernel says about a loop device's backing device (`lo_rdevice` of `struct loop_info64`, linux/loop.h).
fn backing_loop(device: &Path) -> Option<PathBuf> {
    const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
    const INFO_BYTES: usize = 232;
    const RDEVICE_AT: usize = 16;
    let file = std::fs::File::open(device).ok()?;
    let mut info = [0_u64; INFO_BYTES / 8];
    // SAFETY: fills one loop_info64, for which the array has the size and the alignment.
    if unsafe { libc::ioctl(file.as_raw_fd(), LOOP_GET_STATUS64, info.as_mut_ptr()) } != 0 {
        return None;
    }
    let number = info[RDEVICE_AT / 8];
    (libc::major(number) == LOOP_MAJOR).then(|| PathBuf::from(format!("/dev/loop{}", libc::minor(number))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loop_devices_of_our_volumes_are_detached_and_those_on_top_first() {
        let each = |device: &str, file: &str, under: Option<&str>| Loop {
            device: device.into(),
            file: file.into(),
            on_top_of: under.map(PathBuf::from),
        };
        let all = [
            each("/dev/loop1", "/c/state/a/volumes/pvc-1.img", None),
            each("/dev/loop2", "/", Some("/dev/loop1")),
            each("/dev/loop3", "/", Some("/dev/loop5")),
            each("/dev/loop4", "/c/state/b/volumes/pvc-2.img", None),
            each("/dev/loop5", "/elsewhere/disk.img", None),
        ];
        assert_eq!(ours(&all, Path::new("/c/state")), ["/dev/loop2", "/dev/loop1", "/dev/loop4"].map(PathBuf::from));
    }

    #[test]
    fn a_folder_is_made_and_taken_away_any_number_of_times() -> anyhow::Result<()> {
        let volumes = tempfile::tempdir()?;
        for _ in 0..2 {
            create_folder(volumes.path(), "pvc-1")?;
            create_folder(volumes.path(), "pvc-1")?;
            std::fs::write(volumes.path().join("pvc-1/x"), "x")?;
            delete(volumes.path(), "pvc-1")?;
            delete(volumes.path(), "pvc-1")?;
            assert_eq!(std::fs::read_dir(volumes.path())?.count(), 0);
        }
        Ok(())
    }
}
