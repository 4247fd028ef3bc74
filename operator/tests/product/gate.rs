//! A gate before both API servers: every writing call of the operators about the test's VM goes through a webhook of the test's own, which
//! the API server asks before it stores anything. So an operator can be killed exactly before a call takes effect, or when it has taken
//! effect and before the operator learns of it.

use std::net::TcpListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use jiff::Timestamp;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::core::DynamicObject;
use kube::core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use tokio::sync::oneshot;
use watari_clusters::network;
use watari_operator::pki::authority::Subject;
use watari_operator::pki::rotation::Authorities;
use watari_operator::webhooks::server::{ServingCertificate, TlsListener};

use crate::scene::Scene;

const NAME: &str = "watari-e2e-gate";
/// Until the API server has stored what it was allowed to, while the operator stands still.
const STORED: Duration = Duration::from_millis(500);

/// When the operator is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The call never takes effect.
    Before,
    /// It has taken effect, and nobody was told.
    After,
}

/// Kill whoever makes this call, as [`Gate::calls`] has it, for the first time since the gate was armed.
#[derive(Clone, Debug)]
pub struct Strike {
    pub call: String,
    pub moment: Moment,
}

pub struct Gate {
    book: Arc<Mutex<Book>>,
    clients: [Client; 2],
    /// Servers end when this is dropped.
    _stop: Vec<oneshot::Sender<()>>,
}

#[derive(Default)]
struct Book {
    calls: Vec<String>,
    strike: Option<Strike>,
}

/// What one server knows.
#[derive(Clone)]
struct Door {
    book: Arc<Mutex<Book>>,
    /// Of this cluster first, then of the other.
    operators: [Operator; 2],
}

/// The operator of one site.
#[derive(Clone)]
struct Operator {
    site: &'static str,
    pods: Api<Pod>,
}

fn locked(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gate {
    pub async fn set(scene: &Scene) -> anyhow::Result<Gate> {
        let ours = scene.pair.ours.as_ref().context("the gate stands inside our own clusters")?;
        let book = Arc::<Mutex<Book>>::default();
        let operator = |index: usize| Operator {
            site: scene.sites[index].name,
            pods: Api::namespaced(scene.pair.both()[index].client.clone(), &scene.system),
        };
        let authorities = Authorities::create("gate", Timestamp::now())?;
        let subject = Subject::Webhooks { dns_names: vec!["localhost".to_owned()] };
        let certificate = ServingCertificate::new(&authorities.signing.issue(&subject, Timestamp::now())?)?;
        let mut stops = Vec::new();
        for (index, plan) in [ours.a(), ours.b()].into_iter().enumerate() {
            let inside = network::path(&plan.control_plane().netns());
            let socket = watari_e2e::netns::enter(&inside, || TcpListener::bind("127.0.0.1:0"))??;
            socket.set_nonblocking(true)?;
            let port = socket.local_addr()?.port();
            let listener = TlsListener::start(tokio::net::TcpListener::from_std(socket)?, certificate.clone())?;
            let door = Door { book: book.clone(), operators: [operator(index), operator(1 - index)] };
            let routes = Router::new().route("/", post(pass)).with_state(door);
            let (stop, stopped) = oneshot::channel::<()>();
            let server = axum::serve(listener, routes).with_graceful_shutdown(async { drop(stopped.await) });
            tokio::spawn(async { server.await });
            stops.push(stop);
            ask(&scene.pair.both()[index].client, scene, port, &authorities.bundle_pem()).await?;
        }
        let clients = scene.pair.both().map(|cluster| cluster.client.clone());
        Ok(Gate { book, clients, _stop: stops })
    }

    /// Forgets what it counted, and strikes once at the call that is named.
    pub fn arm(&self, strike: Option<Strike>) {
        *locked(&self.book) = Book { calls: Vec::new(), strike };
    }

    /// The calls since it was armed, each once, in the order in which they were first made.
    pub fn calls(&self) -> Vec<String> {
        locked(&self.book).calls.clone()
    }

    /// Whether it has struck since it was armed to.
    pub fn has_struck(&self) -> bool {
        locked(&self.book).strike.is_none()
    }

    pub async fn remove(self) -> anyhow::Result<()> {
        for client in self.clients {
            Api::<ValidatingWebhookConfiguration>::all(client).delete(NAME, &DeleteParams::default()).await?;
        }
        Ok(())
    }
}

/// Makes an API server ask, about what service accounts of Watari's namespace write in the VM's.
async fn ask(client: &Client, scene: &Scene, port: u16, authority_pem: &str) -> anyhow::Result<()> {
    let configuration = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration", "metadata": { "name": NAME },
        "webhooks": [{
            "name": "gate.e2e.watari.internal",
            "clientConfig": {
                "url": format!("https://localhost:{port}/"),
                "caBundle": base64(authority_pem),
            },
            "rules": [{ "apiGroups": ["*"], "apiVersions": ["*"], "operations": ["CREATE", "UPDATE", "DELETE"], "resources": ["*/*"] }],
            "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": scene.namespace } },
            "matchConditions": [
                { "name": "operators", "expression": format!("request.userInfo.username.startsWith('system:serviceaccount:{}:')", scene.system) },
                { "name": "no-events", "expression": "request.resource.resource != 'events'" },
            ],
            // A test that is killed leaves the gate behind; it must not stay shut.
            "failurePolicy": "Ignore", "timeoutSeconds": 10, "sideEffects": "None", "admissionReviewVersions": ["v1"],
        }],
    });
    let api: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
    api.patch(NAME, &PatchParams::apply("watari-test").force(), &Patch::Apply(&configuration)).await?;
    Ok(())
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}

/// What the API server asks before it stores a call.
async fn pass(
    State(door): State<Door>,
    Json(review): Json<AdmissionReview<DynamicObject>>,
) -> Json<AdmissionReview<DynamicObject>> {
    let request: AdmissionRequest<DynamicObject> = match review.try_into() {
        Ok(request) => request,
        Err(error) => return Json(AdmissionResponse::invalid(format!("no review: {error}")).into_review()),
    };
    let allowed = AdmissionResponse::from(&request);
    if request.dry_run {
        return Json(allowed.into_review());
    }
    // The peer's operator has an account of its own here.
    let user = request.user_info.username.as_deref().unwrap_or_default();
    let operator = &door.operators[usize::from(!user.ends_with(":watari-operator"))];
    let call = format!("{}'s operator: {} at {}", operator.site, in_words(&request), door.operators[0].site);
    let strike = {
        let mut book = locked(&door.book);
        if !book.calls.contains(&call) {
            book.calls.push(call.clone());
        }
        book.strike.take_if(|strike| strike.call == call)
    };
    match strike.map(|strike| strike.moment) {
        None => Json(allowed.into_review()),
        Some(Moment::Before) => {
            eprintln!("killed before {call}");
            operator.kill().await;
            Json(allowed.deny("the operator that asked was killed by the test").into_review())
        }
        Some(Moment::After) => {
            eprintln!("killed after {call}");
            // It stands still, so it cannot learn of the answer, and the call is not given up as one of a client that is gone.
            operator.signal(libc::SIGSTOP).await;
            let operator = operator.clone();
            tokio::spawn(async move {
                tokio::time::sleep(STORED).await;
                operator.kill().await;
            });
            Json(allowed.into_review())
        }
    }
}

/// What is done to what, and in which stage of the move; the same in each move.
fn in_words(request: &AdmissionRequest<DynamicObject>) -> String {
    let resource = &request.resource.resource;
    let part = request.sub_resource.as_ref().map(|it| format!("/{it}")).unwrap_or_default();
    // Migrations are named after the time.
    let name = request.name.trim_end_matches(|it: char| it.is_ascii_digit()).trim_end_matches('-');
    let stage = |place: &str| request.object.as_ref()?.data.pointer(place)?.as_str().map(str::to_owned);
    let stage = if part.is_empty() { stage("/spec/crossing/to") } else { stage("/status/crossing/stage") };
    let stage = stage.map(|stage| format!(" ({stage})")).unwrap_or_default();
    format!("{:?} {resource}{part} {name}{stage}", request.operation)
}

impl Operator {
    /// `kill -9`, and a new Pod instead of the next container, whose start Kubernetes would put off the longer the more often it was killed.
    async fn kill(&self) {
        for pod in self.signal(libc::SIGKILL).await {
            // It may be gone by itself.
            let _ = self.pods.delete(&pod, &DeleteParams::default().grace_period(0)).await;
        }
    }

    /// Sends a signal to every process of it; answers the names of the Pods.
    async fn signal(&self, signal: libc::c_int) -> Vec<String> {
        let labels = ListParams::default().labels("app.kubernetes.io/name=watari-operator");
        let pods = self.pods.list(&labels).await.map(|list| list.items).unwrap_or_default();
        for uid in pods.iter().filter_map(|pod| pod.uid()) {
            for process in processes(&uid) {
                // SAFETY: plain system call; the process is of a Pod that the test made.
                unsafe { libc::kill(process, signal) };
            }
        }
        pods.iter().map(|pod| pod.name_any()).collect()
    }
}

/// The operator's processes in the Pod, by the machine's own numbers.
fn processes(pod_uid: &str) -> Vec<libc::pid_t> {
    let place = format!("pod{pod_uid}");
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let is_it = |folder: &std::path::Path| {
        let read = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap_or_default();
        read("comm").trim() == "watari-operator" && read("cgroup").contains(&place)
    };
    entries.filter(|entry| is_it(&entry.path())).filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}
