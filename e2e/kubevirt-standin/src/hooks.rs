//! virt-launcher's hook manager (`pkg/hooks/manager.go`) over any number of sidecars: scan, Info, OnDefineDomain in the order of the
//! folders, Shutdown.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};
use watari_hook::lossy::lossy;
use watari_hook::proto::info::{InfoParams, info_client::InfoClient};
use watari_hook::proto::v1alpha3::{OnDefineDomainParams, ShutdownParams, callbacks_client::CallbacksClient};

/// virt-launcher's `--qemu-timeout`, without its random part.
const COLLECT_PATIENCE: Duration = Duration::from_secs(240);
/// `manager.go`: looks again this often.
const SCAN: Duration = Duration::from_millis(300);
/// An error of Info ends virt-launcher.
const INFO_DEADLINE: Duration = Duration::from_secs(1);
const DEFINE_DEADLINE: Duration = Duration::from_secs(60);
/// Of virt-handler's call for a migration's target, inside which the hooks are asked.
const TARGET_DEADLINE: Duration = Duration::from_secs(20);
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(60);

/// What virt-launcher would end with, or report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{found} of {wanted} hook sidecars came within {} s", COLLECT_PATIENCE.as_secs())]
    TooFew { found: usize, wanted: usize },
    #[error("Info of {}: {status}", socket.display())]
    Info { socket: PathBuf, status: Box<Status> },
    #[error("{} offers PreCloudInitIso: virt-launcher crashes of it without cloud-init", .0.display())]
    CloudInit(PathBuf),
    #[error("executing custom preStart hooks failed: {}", .0.message())]
    Refused(Box<Status>),
    #[error("the domain cannot be read: {0}")]
    Xml(String),
}

/// The sidecars of this Pod.
pub struct Hooks {
    sockets: Vec<PathBuf>,
}

impl Hooks {
    /// Waits until `wanted` sidecars have shown their sockets below `folder`, and asks each for its Info.
    pub async fn collect(folder: &Path, wanted: usize) -> Result<Hooks, Error> {
        let begin = Instant::now();
        let mut sockets = scan(folder);
        while sockets.len() < wanted {
            if begin.elapsed() > COLLECT_PATIENCE {
                return Err(Error::TooFew { found: sockets.len(), wanted });
            }
            tokio::time::sleep(SCAN).await;
            sockets = scan(folder);
        }
        let mut defining = Vec::new();
        for socket in sockets {
            let info = call(&socket, INFO_DEADLINE, async |channel| InfoClient::new(channel).info(InfoParams {}).await);
            let info = info.await.map_err(|status| Error::Info { socket: socket.clone(), status: Box::new(status) })?;
            let offers = |name: &str| info.hook_points.iter().any(|point| point.name == name);
            if offers("PreCloudInitIso") {
                return Err(Error::CloudInit(socket));
            }
            if offers("OnDefineDomain") {
                defining.push(socket);
            }
        }
        Ok(Hooks { sockets: defining })
    }

    /// One round: every sidecar gets the answer of the one before. The first gets what KubeVirt's own schema keeps of `xml`.
    pub async fn on_define_domain(&self, xml: &str, vmi: &str) -> Result<String, Error> {
        self.round(xml, vmi, DEFINE_DEADLINE).await
    }

    /// The round at a migration's target: answers are thrown away, refusals are not (`live-migration-target.go:212`).
    pub async fn on_define_target(&self, xml: &str, vmi: &str) -> Result<(), Error> {
        self.round(xml, vmi, TARGET_DEADLINE).await.map(drop)
    }

    async fn round(&self, xml: &str, vmi: &str, deadline: Duration) -> Result<String, Error> {
        let mut domain = lossy(xml.as_bytes()).map_err(|error| Error::Xml(error.to_string()))?;
        for socket in &self.sockets {
            let params = OnDefineDomainParams { domain_xml: domain.into(), vmi: vmi.to_owned().into() };
            let answer =
                call(socket, deadline, async |channel| CallbacksClient::new(channel).on_define_domain(params).await);
            let answer = answer.await.map_err(|status| Error::Refused(Box::new(status)))?;
            domain = String::from_utf8(answer.domain_xml.to_vec()).map_err(|error| Error::Xml(error.to_string()))?;
        }
        Ok(domain)
    }

    /// QEMU is gone. Errors are logged and ignored, as virt-launcher does.
    pub async fn shutdown(&self) {
        for socket in &self.sockets {
            let told = call(socket, SHUTDOWN_DEADLINE, async |channel| {
                CallbacksClient::new(channel).shutdown(ShutdownParams {}).await
            });
            if let Err(status) = told.await {
                tracing::warn!(socket = %socket.display(), %status, "Shutdown");
            }
        }
    }
}

/// One call on a new connection.
async fn call<T>(
    socket: &Path,
    deadline: Duration,
    call: impl AsyncFnOnce(Channel) -> Result<Response<T>, Status>,
) -> Result<T, Status> {
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()));
    let endpoint = endpoint.map_err(|error| Status::internal(error.to_string()))?;
    let answer = async {
        let channel = endpoint.connect().await.map_err(|error| Status::unavailable(format!("{error:?}")))?;
        call(channel).await
    };
    match tokio::time::timeout(deadline, answer).await {
        Ok(answer) => answer.map(Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {} s", deadline.as_secs()))),
    }
}

/// Every file that is no folder, one level below, by folder: `manager.go` takes each for a socket.
fn scan(folder: &Path) -> Vec<PathBuf> {
    let entries = |folder: &Path| -> Vec<PathBuf> {
        let mut paths: Vec<_> =
            std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        paths.sort();
        paths
    };
    let folders = entries(folder).into_iter().filter(|path| path.is_dir());
    folders.flat_map(|folder| entries(&folder)).filter(|path| !path.is_dir()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_one_level_below_is_taken_for_a_socket() {
        let folder = std::env::temp_dir().join(format!("standin-hooks-{}", std::process::id()));
        for path in ["hook-sidecar-1/b.sock", "hook-sidecar-0/a.sock", "hook-sidecar-0/nested/ignored.sock", "ignored"]
        {
            let path = folder.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let found = scan(&folder);
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(found, ["hook-sidecar-0/a.sock", "hook-sidecar-1/b.sock"].map(|path| folder.join(path)));
    }
}
