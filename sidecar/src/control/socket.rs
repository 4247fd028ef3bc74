//! The control server's unix socket: claimed without ever taking it from a living server, removed at the end.

use std::{
    fs, io,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{net::UnixListener, sync::watch, task::JoinHandle};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use super::{stoppable, told};
use crate::engine::steering::Steering;

/// Owner and group may steer.
const SOCKET_MODE: u32 = 0o660;
/// How long the end of the process may wait for a call that does not end.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
/// Calls at once; each is small, and a client that floods waits for itself.
const CALLS_MAX: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("`control.socket` ({}): found a running sidecar, expected none; end it, or give each its own socket", .0.display())]
    InUse(PathBuf),
    #[error("`control.socket` ({}): found a file that is no socket; remove it, or choose another path", .0.display())]
    NotASocket(PathBuf),
    #[error("`control.socket` ({}): {error}; check the folder and its permissions", path.display())]
    Io { path: PathBuf, error: io::Error },
}

/// A serving control socket. Dropping it stops the server and removes the socket, if it is still ours; calls in
/// progress may end, watchers are sent away.
pub struct ControlSocket {
    path: PathBuf,
    inode: u64,
    stop: watch::Sender<bool>,
    server: JoinHandle<()>,
}

impl ControlSocket {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stops and waits for calls in progress, at most [`STOP_PATIENCE`].
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        let _ = tokio::time::timeout(STOP_PATIENCE, &mut self.server).await;
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // Not aborted: the connections are tasks of their own, and only the server tells them to end.
        self.stop.send_replace(true);
        if fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Serves the control API at `path`. A socket left over by a killed process is replaced.
pub fn serve(path: &Path, steering: Arc<dyn Steering>) -> Result<ControlSocket, ControlError> {
    let io = |error: io::Error| ControlError::Io { path: path.to_owned(), error };
    clear(path)?;
    let listener = UnixListener::bind(path).map_err(io)?;
    fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE)).map_err(io)?;
    let inode = fs::symlink_metadata(path).map_err(io)?.ino();
    let (stop, stopping) = watch::channel(false);
    let server = tokio::spawn(async move {
        let served = Server::builder()
            .concurrency_limit_per_connection(CALLS_MAX)
            .add_service(stoppable(steering, stopping.clone()))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), told(stopping))
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "the control server ended");
        }
    });
    Ok(ControlSocket { path: path.to_owned(), inode, stop, server })
}

/// Removes a socket that nobody serves.
fn clear(path: &Path) -> Result<(), ControlError> {
    let io = |error: io::Error| ControlError::Io { path: path.to_owned(), error };
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(io)?,
    };
    if !std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) {
        return Err(ControlError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(ControlError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(io),
        Err(error) => Err(io(error)),
    }
}
