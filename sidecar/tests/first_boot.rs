//! The VM of a new claim: KubeVirt makes `disk.img` while the sidecar runs already, and asks for the domain then.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use rustix::process::{Pid, Signal, kill_process};
use support::{Folder, PAIR, authority, config_text, identity};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};
use watari_hook::proto::v1alpha3::{OnDefineDomainParams, callbacks_client::CallbacksClient};
use watari_sidecar::pki::Validity;

const PATIENCE: Duration = Duration::from_secs(30);
/// A VMI that boots.
const VMI: &str = r#"{"metadata":{"name":"vm1","namespace":"default"},"spec":{}}"#;

/// Ends the sidecar with the test.
struct Sidecar(Child);

impl Drop for Sidecar {
    fn drop(&mut self) {
        // The supervisor takes its worker along; it may have ended.
        let _ = kill_process(Pid::from_child(&self.0), Signal::TERM);
        let _ = self.0.wait();
    }
}

/// `runtime` is on a tmpfs.
fn start(folder: &Folder, runtime: &Path) -> Sidecar {
    let text = format!("{}[hook]\ndir = \"{}\"\n", config_text(folder.dir.path()), folder.path("hooks").display());
    let own = folder.path("run").display().to_string();
    fs::create_dir(folder.path("hooks")).unwrap();
    fs::write(
        folder.path("config.toml"),
        text.replace("size = \"1MiB\"\n", "").replace(&own, &runtime.display().to_string()),
    )
    .unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_watari-sidecar"));
    command.args(["primary", "--log", "off", "--config"]).arg(folder.path("config.toml")).stdin(Stdio::null());
    Sidecar(command.spawn().unwrap())
}

async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(begin.elapsed() < PATIENCE, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The one socket in the hook's folder.
fn socket(folder: &Path) -> Option<PathBuf> {
    fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|it| it == "sock"))
}

async fn define(hooks: &Path) -> Result<String, Status> {
    let socket = socket(hooks).ok_or_else(|| Status::unavailable("no socket"))?;
    let connect = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel: Channel = Endpoint::from_static("http://localhost")
        .connect_with_connector(connect)
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let domain = include_str!("../hook/tests/fixtures/virtio_cloudinit_disk.xml");
    let params = OnDefineDomainParams { domain_xml: domain.into(), vmi: VMI.into() };
    let answer = CallbacksClient::new(channel).on_define_domain(params).await?.into_inner();
    Ok(String::from_utf8(answer.domain_xml.to_vec()).unwrap())
}

#[tokio::test]
async fn the_hook_is_there_before_the_disk_and_the_domain_once_kubevirt_has_made_it() {
    let ca = authority("both");
    let folder = Folder::new(&ca, &ca, identity(PAIR, "tokyo"), Validity::days(1));
    let runtime = tempfile::tempdir_in("/dev/shm").unwrap();
    let _sidecar = start(&folder, runtime.path());
    let hooks = folder.path("hooks");
    until("virt-launcher to find the socket", async || socket(&hooks)).await;
    let refused = until("an answer of the hook", async || match define(&hooks).await {
        Err(status) if status.code() == Code::Unavailable && !status.message().contains("Watari") => None,
        answer => Some(answer),
    });
    let refused = refused.await.unwrap_err();
    assert!(refused.message().contains("root.img, which KubeVirt makes"), "{refused:?}");
    fs::File::create(folder.path("root.img")).unwrap().set_len(1 << 20).unwrap();
    let domain = until("the domain with our disk", async || define(&hooks).await.ok()).await;
    assert!(domain.contains("protocol=\"nbd\"") && domain.contains("root.sock"), "{domain}");
}
