//! The control server's unix socket: claimed without ever taking it from a living server, removed at the end.

use std::{
    fs, io,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::{net::UnixListener, sync::oneshot, task::JoinHandle};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use super::service;
use crate::engine::steering::Steering;

/// Owner and group may steer.
const SOCKET_MODE: u32 = 0o660;
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

/// A serving control socket. Dropping it stops the server and removes the socket, if it is still ours.
pub struct ControlSocket {
    path: PathBuf,
    inode: u64,
    stop: Option<oneshot::Sender<()>>,
    server: JoinHandle<()>,
}

impl ControlSocket {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets calls in progress end.
    pub async fn stop(mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        let _ = (&mut self.server).await;
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        self.server.abort();
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
    let (stop, stopped) = oneshot::channel::<()>();
    let server = tokio::spawn(async move {
        let served = Server::builder()
            .concurrency_limit_per_connection(CALLS_MAX)
            .add_service(service(steering))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
                // An error means that the owner is gone, which is the same wish.
                let _ = stopped.await;
            })
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "the control server ended");
        }
    });
    Ok(ControlSocket { path: path.to_owned(), inode, stop: Some(stop), server })
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
