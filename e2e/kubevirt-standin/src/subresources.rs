//! virt-api's aggregated group `subresources.kubevirt.io`: `PUT …/virtualmachineinstances/NAME/freeze` and `/unfreeze`.
//!
//! As virt-api (`pkg/virt-api/rest/authorizer.go`) it asks the API server whether the caller may: a role that lacks the verb `update` on
//! `virtualmachineinstances/freeze` is refused here as it is there. The caller's name is taken from the front proxy's headers without
//! a look at its certificate.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, put};
use axum::{Json, Router};
use k8s_openapi::api::authorization::v1::SubjectAccessReview;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::server::TlsStream;

use crate::ca::go_duration;
use crate::objects::Kind;
use crate::render::CREATED_BY_LABEL;
use crate::seen::{PodSeen, current_pod, phase, uid};
use crate::sync::Trust;
use crate::talk::{self, Request};
use crate::tls;

/// Inside the Pod.
pub const PORT: u16 = 8443;
pub const GROUP: &str = "subresources.kubevirt.io";
const HANDSHAKE: Duration = Duration::from_secs(5);
/// KubeVirt's own, when nothing is said (`unfreezeTimeout` of 5 minutes).
const UNFREEZE_AFTER: Duration = Duration::from_secs(300);

/// A `Status` object, as API servers answer.
type Refusal = (StatusCode, Json<Value>);

fn refusal(code: StatusCode, reason: &str, message: String) -> Refusal {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": code.as_u16(),
    });
    (code, Json(status))
}

fn broken(error: impl std::fmt::Display) -> Refusal {
    refusal(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", error.to_string())
}

/// The routes.
fn router(client: Client) -> Router {
    let base = format!("/apis/{GROUP}");
    let version = json!({ "groupVersion": format!("{GROUP}/v1"), "version": "v1" });
    let group = json!({ "kind": "APIGroup", "apiVersion": "v1", "name": GROUP, "versions": [version], "preferredVersion": version });
    let resource = |name: &str| json!({ "name": format!("virtualmachineinstances/{name}"), "namespaced": true, "kind": "", "verbs": ["update"], "singularName": "" });
    let list = json!({
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": format!("{GROUP}/v1"),
        "resources": [resource("freeze"), resource("unfreeze")],
    });
    Router::new()
        .route(&base, get(async || Json(group)))
        .route(&format!("{base}/v1"), get(async || Json(list)))
        .route(&format!("{base}/v1/namespaces/{{namespace}}/virtualmachineinstances/{{name}}/{{verb}}"), put(act))
        .with_state(client)
}

async fn act(
    State(client): State<Client>,
    Path((namespace, name, verb)): Path<(String, String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<StatusCode, Refusal> {
    let request = match verb.as_str() {
        "freeze" => Request::Freeze { unfreeze_after: Some(unfreeze_after(&body)?) },
        "unfreeze" => Request::Unfreeze,
        _ => return Err(refusal(StatusCode::NOT_FOUND, "NotFound", format!("no subresource {verb} is played"))),
    };
    authorize(&client, &headers, &namespace, &name, &verb).await?;
    let vmi = Kind::Vmi.api(&client, &namespace).get_opt(&name).await.map_err(broken)?;
    let missing = || {
        let message = format!("virtualmachineinstances.kubevirt.io \"{name}\" not found");
        refusal(StatusCode::NOT_FOUND, "NotFound", message)
    };
    let vmi = serde_json::to_value(vmi.ok_or_else(missing)?).map_err(broken)?;
    let conflict = |text: &str| {
        let message = format!("Operation cannot be fulfilled on virtualmachineinstance \"{name}\": {text}");
        refusal(StatusCode::CONFLICT, "Conflict", message)
    };
    if phase(&vmi) != "Running" {
        return Err(conflict("VMI is not running"));
    }
    let pods: Api<Pod> = Api::namespaced(client, &namespace);
    let its = ListParams::default().labels(&format!("{CREATED_BY_LABEL}={}", uid(&vmi)));
    let pods: Vec<PodSeen> = pods.list(&its).await.map_err(broken)?.items.iter().map(PodSeen::of).collect();
    let address = current_pod(&vmi, &pods).and_then(|pod| pod.address).ok_or_else(|| conflict("VMI has no Pod"))?;
    talk::ask(address, &request).await.map_err(broken)?;
    Ok(StatusCode::ACCEPTED)
}

/// The body is optional.
fn unfreeze_after(body: &[u8]) -> Result<Duration, Refusal> {
    if body.is_empty() {
        return Ok(UNFREEZE_AFTER);
    }
    let wrong = |message: String| refusal(StatusCode::BAD_REQUEST, "BadRequest", message);
    let body: Value = serde_json::from_slice(body).map_err(|error| wrong(error.to_string()))?;
    match body["unfreezeTimeout"].as_str() {
        None => Ok(UNFREEZE_AFTER),
        Some(text) => go_duration(text).ok_or_else(|| wrong(format!("unfreezeTimeout {text:?} is no duration"))),
    }
}

async fn authorize(
    client: &Client,
    headers: &HeaderMap,
    namespace: &str,
    name: &str,
    verb: &str,
) -> Result<(), Refusal> {
    let values = |header: &str| -> Vec<String> {
        headers.get_all(header).iter().filter_map(|value| value.to_str().ok()).map(str::to_owned).collect()
    };
    let user = values("x-remote-user").into_iter().next();
    let review = json!({
        "spec": {
            "user": user, "groups": values("x-remote-group"),
            "resourceAttributes": {
                "group": GROUP, "version": "v1", "resource": "virtualmachineinstances", "subresource": verb, "verb": "update",
                "namespace": namespace, "name": name,
            },
        },
    });
    let review: SubjectAccessReview = serde_json::from_value(review).map_err(broken)?;
    let reviews: Api<SubjectAccessReview> = Api::all(client.clone());
    let answer = reviews.create(&PostParams::default(), &review).await.map_err(broken)?;
    match answer.status.is_some_and(|status| status.allowed) {
        true => Ok(()),
        false => {
            let message =
                format!("user {user:?} may not update virtualmachineinstances/{verb} in namespace {namespace:?}");
            Err(refusal(StatusCode::FORBIDDEN, "Forbidden", message))
        }
    }
}

/// TLS for axum. Handshakes are done one after the other: the API server is the one client.
struct Listener {
    tcp: TcpListener,
    /// Changes with the authority.
    trust: watch::Receiver<Option<Trust>>,
}

impl axum::serve::Listener for Listener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let Ok((stream, address)) = self.tcp.accept().await else { continue };
            let own = self.trust.borrow().as_ref().map(|trust| trust.own.clone());
            let Some(Ok(tls)) = own.map(|own| tls::acceptor(&own)) else { continue };
            if let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE, tls.accept(stream)).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.tcp.local_addr()
    }
}

/// Serves for ever.
pub async fn serve(client: Client, trust: watch::Receiver<Option<Trust>>) -> std::io::Result<()> {
    let tcp = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).await?;
    axum::serve(Listener { tcp, trust }, router(client)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_after_which_a_guest_thaws_is_read_or_a_default() {
        assert_eq!(unfreeze_after(b"").unwrap(), UNFREEZE_AFTER);
        assert_eq!(unfreeze_after(b"{}").unwrap(), UNFREEZE_AFTER);
        assert_eq!(unfreeze_after(br#"{"unfreezeTimeout":"1m30s"}"#).unwrap(), Duration::from_secs(90));
        assert!(unfreeze_after(br#"{"unfreezeTimeout":"soon"}"#).is_err());
        assert!(unfreeze_after(b"no").is_err());
    }
}
