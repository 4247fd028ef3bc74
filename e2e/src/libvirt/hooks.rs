//! virt-launcher's hook manager (`pkg/hooks/manager.go`), its deadlines and its losses.
//!
//! Blocking, with a small runtime of its own: call it from plain threads, not from inside an async runtime.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::timeout;
use tonic::{Status, transport::Channel, transport::Endpoint};
use watari_hook::lossy::lossy;
use watari_hook::proto::info::{InfoParams, info_client::InfoClient};
use watari_hook::proto::v1alpha3::{OnDefineDomainParams, ShutdownParams, callbacks_client::CallbacksClient};

use super::Error;
use crate::process::wait_until;

/// Deadline of Info (`manager.go`); an error there ends virt-launcher.
const INFO_DEADLINE: Duration = Duration::from_secs(1);
/// Deadline of OnDefineDomain at a boot (`manager.go:263`).
const DEFINE_DEADLINE: Duration = Duration::from_secs(60);
/// The caller's deadline on a migration target.
const TARGET_DEADLINE: Duration = Duration::from_secs(20);
/// Deadline of Shutdown.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(60);
/// Calls at a boot of a VM with placeholder ports (`nichotplug.go:226`).
pub(super) const DEFINES_PER_BOOT: usize = 3;

/// What a hook sidecar answered instead of a domain; KubeVirt shows the text to users and calls again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// gRPC's name of the code.
    pub code: String,
    /// The sidecar's words.
    pub text: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the hook sidecar refuses the domain ({}): {}", self.code, self.text)
    }
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Refusal {
        Refusal { code: format!("{:?}", status.code()), text: status.message().to_owned() }
    }
}

/// The hook sidecar of one Pod, found.
pub struct Hooks {
    socket: PathBuf,
    site: String,
    runtime: tokio::runtime::Runtime,
}

impl Hooks {
    /// Waits for one sidecar's socket below `shared` (one level of folders, any file that is no folder) and asks its Info.
    ///
    /// Errors: none in time, an error of Info, or an offer that would crash virt-launcher.
    pub fn collect(site: &str, shared: &Path, patience: Duration) -> Result<Hooks, Error> {
        let socket = wait_until("a hook socket", patience, || sockets(shared).into_iter().next())?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(Error::io("a runtime for gRPC", &socket))?;
        let hooks = Hooks { socket, site: site.to_owned(), runtime };
        let failed = |what: String| Error::Hook { site: site.to_owned(), what };
        let info = hooks.call(INFO_DEADLINE, async |channel| InfoClient::new(channel).info(InfoParams {}).await);
        let info = info.map_err(|e| failed(format!("Info: {e:?}: virt-launcher would have ended")))?;
        let points: Vec<&str> = info.hook_points.iter().map(|p| p.name.as_str()).collect();
        if points.contains(&"PreCloudInitIso") {
            return Err(failed("PreCloudInitIso is offered: virt-launcher would have crashed".into()));
        }
        if !points.contains(&"OnDefineDomain") || !info.versions.iter().any(|v| v == "v1alpha3") {
            return Err(failed(format!("offers {points:?} in versions {:?}", info.versions)));
        }
        Ok(hooks)
    }

    /// One call on a new connection.
    fn call<T>(
        &self,
        deadline: Duration,
        call: impl AsyncFnOnce(Channel) -> Result<tonic::Response<T>, Status>,
    ) -> Result<T, Status> {
        let uri = format!("unix://{}", self.socket.display());
        self.runtime.block_on(async {
            let endpoint = Endpoint::from_shared(uri).map_err(|e| Status::internal(e.to_string()))?;
            let answer = async {
                let channel = endpoint.connect().await.map_err(|e| Status::unavailable(format!("{e:?}")))?;
                call(channel).await
            };
            match timeout(deadline, answer).await {
                Ok(answer) => answer.map(tonic::Response::into_inner),
                Err(_) => Err(Status::deadline_exceeded(format!("no answer within {} s", deadline.as_secs()))),
            }
        })
    }

    fn define_once(&self, domain: &str, vmi: &str, deadline: Duration) -> Result<String, Refusal> {
        let params = OnDefineDomainParams { domain_xml: domain.to_owned().into(), vmi: vmi.to_owned().into() };
        let answer =
            self.call(deadline, async |channel| CallbacksClient::new(channel).on_define_domain(params).await)?;
        let text = String::from_utf8(answer.domain_xml.to_vec());
        text.map_err(|_| Refusal { code: "Internal".into(), text: "the answer is not UTF-8".into() })
    }

    /// The calls of one boot: `define` gets each answer, as libvirt does; between two calls KubeVirt's schema is all that survives.
    pub(super) fn boot(
        &self,
        domain: &str,
        vmi: &str,
        mut define: impl FnMut(&str) -> Result<(), Error>,
    ) -> Result<String, Error> {
        let lose = |xml: &str| {
            let what =
                |e| Error::Hook { site: self.site.clone(), what: format!("a domain that KubeVirt cannot read: {e}") };
            lossy(xml.as_bytes()).map_err(what)
        };
        let call = |input: String| -> Result<String, Error> {
            let answer = self.define_once(&input, vmi, DEFINE_DEADLINE);
            answer.map_err(|refusal| Error::Refused { site: self.site.clone(), refusal })
        };
        let mut answer = call(lose(domain)?)?;
        define(&answer)?;
        for _ in 1..DEFINES_PER_BOOT {
            answer = call(lose(&answer)?)?;
            define(&answer)?;
        }
        Ok(answer)
    }

    /// The call on a migration target: the answer is thrown away, a refusal is not.
    pub(super) fn target(&self, domain: &str, vmi: &str) -> Result<(), Refusal> {
        let input = lossy(domain.as_bytes()).map_err(|e| Refusal { code: "Internal".into(), text: e.to_string() })?;
        self.define_once(&input, vmi, TARGET_DEADLINE).map(drop)
    }

    /// QEMU is gone. Errors are ignored by virt-launcher, and therefore only returned for whoever is curious.
    pub fn shutdown(&self) -> Result<(), Refusal> {
        let call = async |channel| CallbacksClient::new(channel).shutdown(ShutdownParams {}).await;
        Ok(self.call(SHUTDOWN_DEADLINE, call).map(drop)?)
    }
}

fn sockets(shared: &Path) -> Vec<PathBuf> {
    let entries = |folder: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    };
    let folders = entries(shared).into_iter().filter(|path| path.is_dir());
    folders.flat_map(|folder| entries(&folder)).filter(|path| !path.is_dir()).collect()
}
