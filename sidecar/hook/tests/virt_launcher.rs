//! The hook server before a client that behaves as virt-launcher's hook manager does (`pkg/hooks/manager.go`): it scans the folder,
//! dials whatever is no folder, asks `Info` with one second's patience, and makes each call on a new connection.

mod common;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use common::{fixture, synced};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::timeout};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint, Uri},
};
use watari_hook::lossy::lossy;
use watari_hook::proto::{info, v1alpha1, v1alpha2, v1alpha3};
use watari_hook::{Gate, HookConfig, HookEngine, HookServer, LaunchRole, RewriteReport, SyncedDisk, Vmi};

/// virt-launcher's side.
struct Manager {
    socket: PathBuf,
    hook_points: Vec<String>,
    versions: Vec<String>,
}

async fn dial(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connect = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://localhost").connect_timeout(Duration::from_secs(3));
    endpoint.connect_with_connector(connect).await.expect("an answer at every file in the hook folder")
}

impl Manager {
    /// One pass of `collectSideCarSockets`: one level of folders below the shared one, one socket each.
    async fn collect(shared: &Path) -> Vec<Manager> {
        let mut found = Vec::new();
        for sidecar in std::fs::read_dir(shared).expect("readable") {
            for entry in std::fs::read_dir(sidecar.expect("entry").path()).expect("readable") {
                let path = entry.expect("entry").path();
                if path.is_dir() {
                    continue;
                }
                let mut client = info::info_client::InfoClient::new(dial(&path).await);
                let answer = timeout(Duration::from_secs(1), client.info(info::InfoParams {})).await;
                let info = answer.expect("Info within a second").expect("no error").into_inner();
                found.push(Manager {
                    socket: path,
                    hook_points: info.hook_points.into_iter().map(|p| p.name).collect(),
                    versions: info.versions,
                });
            }
        }
        found
    }

    async fn define(&self, domain: &str, vmi: &str) -> Result<String, Status> {
        let mut client = v1alpha3::callbacks_client::CallbacksClient::new(dial(&self.socket).await);
        let params =
            v1alpha3::OnDefineDomainParams { domain_xml: domain.to_owned().into(), vmi: vmi.to_owned().into() };
        let answer = timeout(Duration::from_secs(20), client.on_define_domain(params)).await;
        let domain = answer.expect("an answer before a migration target's deadline")?.into_inner().domain_xml;
        Ok(String::from_utf8(domain.to_vec()).expect("text"))
    }

    async fn shutdown(&self) -> Result<(), Status> {
        let mut client = v1alpha3::callbacks_client::CallbacksClient::new(dial(&self.socket).await);
        client.shutdown(v1alpha3::ShutdownParams {}).await.map(drop)
    }
}

/// What the engine was asked and what it answers.
#[derive(Default)]
struct Script {
    gate: Option<Gate>,
    gate_hangs: bool,
    prepare_error: Option<String>,
    prepared: Vec<String>,
    roles: Vec<LaunchRole>,
    reports: Vec<RewriteReport>,
    shutdowns: usize,
}

struct Engine {
    disks: Vec<SyncedDisk>,
    script: Mutex<Script>,
}

impl Engine {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().expect("no test thread panicked")
    }
}

impl HookEngine for Engine {
    async fn disks(&self) -> Vec<SyncedDisk> {
        self.disks.clone()
    }
    async fn gate(&self, vmi: &Vmi) -> Gate {
        self.script().roles.push(vmi.role());
        if self.script().gate_hangs {
            std::future::pending::<()>().await;
        }
        self.script().gate.clone().unwrap_or(Gate::Ready)
    }
    async fn prepare(&self, volume: &str) -> Result<(), String> {
        let mut script = self.script();
        if let Some(error) = script.prepare_error.clone() {
            return Err(error);
        }
        script.prepared.push(volume.to_owned());
        Ok(())
    }
    async fn defined(&self, report: &RewriteReport) {
        self.script().reports.push(report.clone());
    }
    async fn shutdown(&self) {
        self.script().shutdowns += 1;
    }
}

/// A Pod's shared hook folder with our sidecar's part in it, and the sidecar.
struct Pod {
    shared: tempfile::TempDir,
    engine: Arc<Engine>,
    _server: HookServer,
}

fn config(shared: &Path) -> HookConfig {
    let folder = shared.join("hook-sidecar-0");
    std::fs::create_dir_all(&folder).expect("made");
    HookConfig { folder, reconnect_seconds: 120, marker: None }
}

async fn pod(volumes: &[&str]) -> Pod {
    let shared = tempfile::tempdir().expect("a temporary folder");
    let engine = Arc::new(Engine { disks: synced(volumes), script: Mutex::default() });
    let server = HookServer::start(config(shared.path()), engine.clone()).await.expect("started");
    Pod { shared, engine, _server: server }
}

async fn launcher(pod: &Pod) -> Manager {
    let mut found = Manager::collect(pod.shared.path()).await;
    assert_eq!(found.len(), 1, "exactly one socket");
    found.pop().expect("one")
}

const BOOT: &str = r#"{"metadata":{"name":"vm","namespace":"default"},"status":{"phase":"Scheduled"}}"#;
const TARGET: &str = r#"{"metadata":{"name":"vm","annotations":{"kubevirt.io/create-migration-target":"true"}}}"#;

#[tokio::test]
async fn a_boot_with_three_lossy_defines_ends_with_our_sockets_in_the_domain() {
    let pod = pod(&["root", "data"]).await;
    let launcher = launcher(&pod).await;
    assert_eq!(launcher.hook_points, ["OnDefineDomain", "Shutdown"], "PreCloudInitIso would crash virt-launcher");
    assert_eq!(launcher.versions, ["v1alpha3", "v1alpha2", "v1alpha1"]);

    let mut domain = fixture("two_disks_of_four");
    for _ in 0..3 {
        let input = lossy(domain.as_bytes()).expect("well-formed");
        domain = launcher.define(&input, BOOT).await.expect("defined");
    }
    for volume in ["root", "data"] {
        assert!(domain.contains(&format!("<host transport=\"unix\" socket=\"/var/run/watari/{volume}.sock\"/>")));
        assert!(domain.contains(&format!("<alias name=\"ua-watari-{volume}\">")));
    }
    launcher.shutdown().await.expect("answered");

    let script = pod.engine.script();
    assert_eq!(script.roles, [LaunchRole::Boot; 3]);
    assert_eq!(script.prepared, ["data", "root", "data", "root", "data", "root"], "each call has every socket ready");
    assert_eq!(script.reports.len(), 3);
    assert_eq!(script.reports[2].left.len(), 2, "emptyDisk and containerDisk stay");
    assert_eq!(script.shutdowns, 1);
}

#[tokio::test]
async fn a_migration_target_is_told_to_wait_in_the_engines_words_and_then_let_in() {
    let pod = pod(&["root"]).await;
    let launcher = launcher(&pod).await;
    let domain = fixture("virtio_cloudinit_disk");
    let words = "waiting for 12 MiB of disk root from site-a";
    pod.engine.script().gate = Some(Gate::NotYet(words.into()));
    for _ in 0..3 {
        let refused = launcher.define(&domain, TARGET).await.expect_err("shut");
        assert_eq!((refused.code(), refused.message()), (Code::Unavailable, words));
    }
    assert!(pod.engine.script().prepared.is_empty(), "no socket is opened behind a shut gate");
    pod.engine.script().gate = Some(Gate::Ready);
    launcher.define(&domain, TARGET).await.expect("let in");
    assert_eq!(pod.engine.script().roles, [LaunchRole::MigrationTarget; 4]);
    assert_eq!(pod.engine.script().prepared, ["root"]);
}

#[tokio::test]
async fn a_refusal_a_domain_that_cannot_be_served_and_a_disk_that_cannot_be_opened_are_told_apart() {
    let pod = pod(&["root", "lun"]).await;
    let launcher = launcher(&pod).await;
    let left_alone = fixture("left_alone");

    pod.engine.script().gate = Some(Gate::Refused("this VM runs at site-b since 12:00".into()));
    let refused = launcher.define(&left_alone, BOOT).await.expect_err("refused");
    assert_eq!((refused.code(), refused.message()), (Code::FailedPrecondition, "this VM runs at site-b since 12:00"));

    pod.engine.script().gate = None;
    let refused = launcher.define(&left_alone, BOOT).await.expect_err("a LUN");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("volume lun") && refused.message().contains("LUN"), "{refused}");

    let refused = launcher.define("<domain>", BOOT).await.expect_err("cut short");
    assert!(refused.message().contains("domain XML"), "{refused}");
    let refused = launcher.define(&left_alone, "{").await.expect_err("no VMI");
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(pod.engine.script().prepared.is_empty(), "nothing is opened for a domain that is not answered");
}

#[tokio::test]
async fn a_disk_that_cannot_be_opened_yet_is_an_error_that_names_it_and_a_later_call_succeeds() {
    let pod = pod(&["root"]).await;
    let launcher = launcher(&pod).await;
    let domain = fixture("virtio_cloudinit_disk");
    pod.engine.script().prepare_error = Some("disk.img does not exist yet".into());
    let refused = launcher.define(&domain, BOOT).await.expect_err("not open");
    assert_eq!(refused.message(), "volume root cannot be served yet: disk.img does not exist yet");
    pod.engine.script().prepare_error = None;
    launcher.define(&domain, BOOT).await.expect("defined");
}

#[tokio::test]
async fn older_launchers_get_the_same_domain_and_no_cloud_init_call_is_served() {
    let pod = pod(&["root"]).await;
    let launcher = launcher(&pod).await;
    let domain = fixture("virtio_cloudinit_disk");
    let newest = launcher.define(&domain, BOOT).await.expect("defined");

    let mut oldest = v1alpha1::callbacks_client::CallbacksClient::new(dial(&launcher.socket).await);
    let params = v1alpha1::OnDefineDomainParams { domain_xml: domain.clone().into(), vmi: BOOT.into() };
    let answer = oldest.on_define_domain(params).await.expect("defined").into_inner();
    assert_eq!(answer.domain_xml, newest);

    let mut middle = v1alpha2::callbacks_client::CallbacksClient::new(dial(&launcher.socket).await);
    let params = v1alpha2::OnDefineDomainParams { domain_xml: domain.into(), vmi: BOOT.into() };
    assert_eq!(middle.on_define_domain(params).await.expect("defined").into_inner().domain_xml, newest);
    let refused = middle.pre_cloud_init_iso(v1alpha2::PreCloudInitIsoParams::default()).await.expect_err("not offered");
    assert_eq!(refused.code(), Code::Unimplemented);
}

#[tokio::test]
async fn info_is_answered_while_the_engine_hangs_and_the_define_ends_before_virt_launchers_deadline() {
    let pod = pod(&["root"]).await;
    let hung = launcher(&pod).await;
    pod.engine.script().gate_hangs = true;
    let domain = fixture("virtio_cloudinit_disk");
    let began = Instant::now();
    let (refused, found) = tokio::join!(hung.define(&domain, TARGET), Manager::collect(pod.shared.path()));
    assert_eq!(found.len(), 1);
    let refused = refused.expect_err("no answer from the engine");
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_restarted_sidecar_answers_at_the_path_that_virt_launcher_remembers() {
    let shared = tempfile::tempdir().expect("a temporary folder");
    let engine = Arc::new(Engine { disks: synced(&["root"]), script: Mutex::default() });
    let first = HookServer::start(config(shared.path()), engine.clone()).await.expect("started");
    let remembered = Manager::collect(shared.path()).await.pop().expect("one");
    drop(first);
    let second = HookServer::start(config(shared.path()), engine.clone()).await.expect("started again");
    assert_eq!(second.path(), remembered.socket);
    assert_eq!(Manager::collect(shared.path()).await.len(), 1, "virt-launcher must not count us twice");
    remembered.shutdown().await.expect("answered");
    assert_eq!(engine.script().shutdowns, 1);
}

#[tokio::test]
async fn settings_out_of_range_and_unknown_keys_are_refused_and_no_socket_appears() {
    let shared = tempfile::tempdir().expect("a temporary folder");
    let engine = Arc::new(Engine { disks: synced(&["root"]), script: Mutex::default() });
    let short = HookConfig { reconnect_seconds: 30, ..config(shared.path()) };
    let refused = HookServer::start(short, engine.clone()).await.expect_err("too short").to_string();
    assert!(["hook.reconnect_seconds", "30", "at least 120"].iter().all(|p| refused.contains(p)), "{refused}");
    let nowhere = HookConfig { folder: shared.path().join("absent"), ..config(shared.path()) };
    let refused = HookServer::start(nowhere, engine).await.expect_err("no folder").to_string();
    assert!(refused.contains("hook.folder") && refused.contains("absent"), "{refused}");
    assert!(Manager::collect(shared.path()).await.is_empty());

    let unknown = serde_json::from_str::<HookConfig>(r#"{"folder":"/x","reconect_seconds":120}"#);
    assert!(unknown.expect_err("a typing error").to_string().contains("reconect_seconds"));
    let defaults = serde_json::from_str::<HookConfig>(r#"{"folder":"/x"}"#).expect("complete");
    assert_eq!((defaults.reconnect_seconds, defaults.marker), (120, None));
}
