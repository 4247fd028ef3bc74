//! Looks at the paths that a configuration names, before anything is started. Opens nothing for writing and makes
//! nothing: a refusal here has touched no file.

use std::{
    fs, io,
    net::TcpListener,
    os::unix::fs::FileTypeExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use super::{Config, ConfigError, Disk, Refusal, units};

/// As which side a sidecar is about to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Its disks must exist: they are the VM's.
    Primary,
    /// Its disks may still have to be made.
    Replica,
}

/// Refuses what cannot work; see the module.
pub fn check(config: &Config, start: Start) -> Result<(), ConfigError> {
    let mut refusals = Vec::new();
    let mut refuse = |field: &str, found: String, expected: &str, remedy: &str| {
        refusals.push(Refusal {
            place: config.file.display().to_string(),
            field: field.to_owned(),
            found,
            expected: expected.to_owned(),
            remedy: remedy.to_owned(),
        });
    };
    for (field, path) in
        [("tls.ca", &config.tls.ca), ("tls.certificate", &config.tls.certificate), ("tls.key", &config.tls.key)]
    {
        if let Err(error) = fs::File::open(path) {
            let found = describe(path, &error);
            refuse(field, found, "a readable PEM file", "make it with `watari-sidecar pki`, or mount the Secret");
        }
    }
    if let Some(found) = not_a_folder_to_be(&config.folder) {
        refuse(
            "folder",
            found,
            "a folder, or a name in one",
            "create it on storage that survives the node (not a tmpfs)",
        );
    }
    for (index, disk) in config.disks.iter().enumerate() {
        // KubeVirt makes it when the VM starts for the first time (engine/awaiting.rs).
        let made_later = config.hook.as_ref().is_some_and(|hook| !hook.outside_kubernetes) && is_to_be(&disk.path);
        match look_at(disk, start) {
            Err(_) if start == Start::Primary && made_later => {}
            Ok(()) => {}
            Err((key, found, expected, remedy)) => refuse(&format!("disk[{index}].{key}"), found, expected, remedy),
        }
    }
    if refusals.is_empty() { Ok(()) } else { Err(ConfigError::Refused(refusals)) }
}

/// Whether the peer could dial in: refuses an address that another process has, before a start makes any file. Nothing stays
/// bound; the worker binds for good, and refuses by the same words should somebody be quicker.
pub fn check_listen(config: &Config) -> Result<(), ConfigError> {
    let began = Instant::now();
    let error = loop {
        match TcpListener::bind(config.listen) {
            Ok(_) => return Ok(()),
            // A worker whose supervisor was killed is still on its way out.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && began.elapsed() < PORT_WAIT => {
                thread::sleep(Duration::from_millis(100));
            }
            Err(error) => break error,
        }
    };
    let (found, remedy) = match error.kind() {
        io::ErrorKind::AddrInUse => ("in use", "end the process that listens there, or choose another port"),
        io::ErrorKind::AddrNotAvailable => {
            ("no address of this machine", "choose one that an interface has, or 0.0.0.0")
        }
        io::ErrorKind::PermissionDenied => ("not allowed", "choose a port from 1024 on"),
        _ => ("not usable", "choose another address or port"),
    };
    Err(ConfigError::Refused(vec![Refusal {
        place: config.file.display().to_string(),
        field: "listen".to_owned(),
        found: format!("{}, {found} ({error})", config.listen),
        expected: "a free address and port".to_owned(),
        remedy: remedy.to_owned(),
    }]))
}

/// How long a port that is in use may still become free.
const PORT_WAIT: Duration = Duration::from_secs(3);

type Objection = (&'static str, String, &'static str, &'static str);

fn look_at(disk: &Disk, start: Start) -> Result<(), Objection> {
    let metadata = match fs::metadata(&disk.path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound && start == Start::Replica => {
            let parent = disk.path.parent().unwrap_or(Path::new("/"));
            return match not_a_folder(parent) {
                None if disk.size_bytes.is_none() => Err((
                    "size",
                    format!("nothing, and {} does not exist", disk.path.display()),
                    "the size of the peer's disk",
                    "add it, so that an empty image can be made, or bring an image",
                )),
                None => Ok(()),
                Some(found) => {
                    Err(("path", found, "an existing folder for the image", "create it, or correct the path"))
                }
            };
        }
        Err(error) => {
            let found = describe(&disk.path, &error);
            return Err(("path", found, "the VM's raw image file or block device", "correct the path"));
        }
    };
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        let found = format!("{}: neither a file nor a block device", disk.path.display());
        return Err(("path", found, "a raw image file or a block device", "correct the path"));
    }
    if start == Start::Primary
        && let Some(recorded) = disk.size_bytes
    {
        let found = disk.actual_bytes().map_err(|error| {
            ("path", describe(&disk.path, &error), "a disk whose size can be read", "check its permissions")
        })?;
        if found < recorded {
            let found = format!(
                "{}, larger than the {} of {}",
                units::show_size(recorded),
                units::show_size(found),
                disk.path.display()
            );
            return Err((
                "size",
                found,
                "at most the size of the disk",
                "restore the disk that was recorded, or correct `size`",
            ));
        }
    }
    Ok(())
}

/// A folder that a first start makes is as good; a whole missing path is a mistake.
fn not_a_folder_to_be(path: &Path) -> Option<String> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => not_a_folder(path.parent().unwrap_or(Path::new("/"))),
        _ => not_a_folder(path),
    }
}

/// It is not there, and its folder is.
fn is_to_be(path: &Path) -> bool {
    let absent = fs::metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    absent && path.parent().is_some_and(|folder| not_a_folder(folder).is_none())
}

fn not_a_folder(path: &Path) -> Option<String> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => None,
        Ok(_) => Some(format!("{}: not a folder", path.display())),
        Err(error) => Some(describe(path, &error)),
    }
}

fn describe(path: &Path, error: &io::Error) -> String {
    let what = match error.kind() {
        io::ErrorKind::NotFound => "does not exist".to_owned(),
        io::ErrorKind::PermissionDenied => "may not be read".to_owned(),
        _ => error.to_string(),
    };
    format!("{}: {what}", path.display())
}
