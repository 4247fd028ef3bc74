//! A unix socket at a path: taken atomically, given back if it is still ours.
//!
//! The socket is bound under a temporary name, given its mode, made to listen, and then renamed over the path: a client
//! finds either the old state or a socket that answers with the right permissions, never something in between.
//! A socket that nobody answers at (left by a killed worker) is replaced; one that answers is somebody's.

use std::fs::{Permissions, metadata, set_permissions, symlink_metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why a path cannot be served on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Something answers there; two servers for one disk must not be.
    #[error("another server answers on {0}; stop it or choose another path")]
    InUse(PathBuf),
    #[error("{0} exists and is not a socket; it is left alone")]
    NotASocket(PathBuf),
    #[error("the path {0} is too long for a unix socket (107 bytes)")]
    TooLong(PathBuf),
    #[error("cannot listen on {path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
}

/// A listening socket and the path that it owns.
pub struct SocketPath {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of our socket, to know it again when leaving.
    identity: (u64, u64),
}

impl SocketPath {
    /// Listen on `path` with the permission bits `mode`.
    pub fn bind(path: &Path, mode: u32) -> Result<SocketPath, BindError> {
        let failed = |source: std::io::Error| match source.kind() {
            std::io::ErrorKind::InvalidInput => BindError::TooLong(path.into()),
            _ => BindError::Io { path: path.into(), source },
        };
        match symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(BindError::NotASocket(path.into())),
            Ok(_) if UnixStream::connect(path).is_ok() => return Err(BindError::InUse(path.into())),
            Ok(_) | Err(_) => {}
        }
        // Validates the length of the final name too, which rename would not.
        std::os::unix::net::SocketAddr::from_pathname(path).map_err(failed)?;
        let temporary = temporary_name(path);
        let bind = || {
            let listener = UnixListener::bind(&temporary)?;
            set_permissions(&temporary, Permissions::from_mode(mode))?;
            let found = metadata(&temporary)?;
            std::fs::rename(&temporary, path)?;
            Ok((listener, (found.dev(), found.ino())))
        };
        match bind() {
            Ok((listener, identity)) => Ok(SocketPath { listener, path: path.into(), identity }),
            Err(error) => {
                let _ours = std::fs::remove_file(&temporary);
                Err(failed(error))
            }
        }
    }

    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Remove the path, unless somebody else has taken it over meanwhile.
    pub fn unlink(&self) {
        if symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.identity) {
            let _gone = std::fs::remove_file(&self.path);
        }
    }
}

/// Short, in the same folder, unique among processes and within this one.
fn temporary_name(path: &Path) -> PathBuf {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".{:x}-{number:x}", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.sock");
        drop(SocketPath::bind(&path, 0o600).unwrap());
        assert!(path.exists(), "dropping without unlink is what a killed worker leaves behind");
        let live = SocketPath::bind(&path, 0o660).unwrap();
        assert_eq!(metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert!(matches!(SocketPath::bind(&path, 0o600), Err(BindError::InUse(_))));
        live.unlink();
        assert!(!path.exists());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "no temporary name is left");
    }

    #[test]
    fn a_file_is_never_replaced_and_a_successor_is_never_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.sock");
        std::fs::write(&path, b"precious").unwrap();
        assert!(matches!(SocketPath::bind(&path, 0o600), Err(BindError::NotASocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();
        let first = SocketPath::bind(&path, 0o600).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _second = SocketPath::bind(&path, 0o600).unwrap();
        first.unlink();
        assert!(path.exists());
    }

    #[test]
    fn a_path_that_is_too_long_is_refused_by_name() {
        let path = Path::new("/tmp").join("x".repeat(120));
        assert!(matches!(SocketPath::bind(&path, 0o600), Err(BindError::TooLong(_))));
    }
}
