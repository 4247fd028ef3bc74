//! The webhooks as a running part of the operator: serving, with a certificate that is renewed and an authority that the API
//! server is told.
//!
//! Every replica of the operator serves, whoever leads. Each makes its own certificate, in memory, signed by the cluster's
//! authority: nothing has to be shared but that. The API server is told the whole bundle, so a rotation of the authority
//! is known to it long before a certificate of the new one is shown.

use std::{fmt::Display, net::SocketAddr, time::Duration};

use jiff::Timestamp;
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams},
};
use serde_json::Value;
use tokio::net::TcpListener;

use super::{
    objects::{self, Endpoint},
    review::Knowledge,
    server::{self, CertificateError, ServingCertificate},
};
use crate::pki::{
    PkiError,
    authority::{Issued, Subject},
    renewal::{Renewal, renewal},
    rotation::Authorities,
};

/// How often certificate and trust are looked at; also how long a reinstalled chart's webhooks may lack our authority.
const PERIOD: Duration = Duration::from_secs(30);
/// Field manager of the authority in the webhook configurations: the chart, or a GitOps tool, owns everything else in them.
const FIELD_MANAGER: &str = "watari-operator-trust";

/// Why the webhooks are not served.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("webhooks: cannot listen on {address}: {error}; choose another address or port, or end what listens there")]
    Listen { address: SocketAddr, error: std::io::Error },
    #[error("webhooks: there is no authority to vouch for them: {0}")]
    Authority(String),
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    #[error("webhooks: the server ended: {0}")]
    Ended(std::io::Error),
}

/// What is served, and where.
pub struct Serving {
    pub client: Client,
    pub listen: SocketAddr,
    pub endpoint: Endpoint,
    pub knowledge: Knowledge,
}

/// Serves until `stop` resolves. `authorities` reads them from where they are kept.
pub async fn run<E: Display>(
    serving: Serving,
    authorities: impl AsyncFn() -> Result<Authorities, E>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), RunError> {
    let Serving { client, listen, endpoint, knowledge } = serving;
    let subject = Subject::Webhooks { dns_names: endpoint.dns_names() };
    let first = authorities().await.map_err(|error| RunError::Authority(error.to_string()))?;
    let mut issued = first.signing.issue(&subject, Timestamp::now())?;
    let certificate = ServingCertificate::new(&issued)?;
    let socket = TcpListener::bind(listen).await.map_err(|error| RunError::Listen { address: listen, error })?;
    tracing::info!(%listen, ?endpoint, "webhooks are served");
    let served = server::serve(socket, certificate.clone(), knowledge, stop);
    tokio::pin!(served);
    let keep = async {
        loop {
            match authorities().await {
                Ok(authorities) => {
                    if let Err(error) = renew(&authorities, &subject, &certificate, &mut issued) {
                        tracing::warn!(%error, "the webhooks' certificate could not be renewed; trying again");
                    }
                    tell(&client, &authorities.bundle_pem()).await;
                }
                Err(error) => tracing::warn!(%error, "the authority could not be read; trying again"),
            }
            tokio::time::sleep(PERIOD).await;
        }
    };
    tokio::select! {
        ended = &mut served => ended.map_err(RunError::Ended),
        () = keep => Ok(()),
    }
}

fn renew(
    authorities: &Authorities,
    subject: &Subject,
    certificate: &ServingCertificate,
    issued: &mut Issued,
) -> Result<(), RunError> {
    match renewal(Some(&issued.certificate_pem), subject, Timestamp::now()) {
        Renewal::Wait { .. } => Ok(()),
        Renewal::Due(why) => {
            let fresh = authorities.signing.issue(subject, Timestamp::now())?;
            certificate.replace(&fresh)?;
            *issued = fresh;
            tracing::info!(?why, "the webhooks have a new certificate");
            Ok(())
        }
    }
}

/// Tells the API server whom to trust. Repeating it changes nothing; a failure is logged and tried again.
async fn tell(client: &Client, ca_pem: &str) {
    for object in objects::trust(ca_pem) {
        if let Err(error) = apply(client, &object).await {
            let kind = &object["kind"];
            tracing::warn!(%error, %kind, "the API server could not be told our authority; is the chart installed whole?");
        }
    }
}

async fn apply(client: &Client, object: &Value) -> kube::Result<()> {
    let kind = object["kind"].as_str().unwrap_or_default();
    let gvk = GroupVersionKind::gvk("admissionregistration.k8s.io", "v1", kind);
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &ApiResource::from_gvk(&gvk));
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    api.patch(name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(object)).await?;
    Ok(())
}
