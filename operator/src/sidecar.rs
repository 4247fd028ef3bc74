//! The operator's end of a sidecar's control API, over mTLS as our own site.
//!
//! One connection per call: an operator with a hundred pairs holds no hundred connections, and a moved Pod leaves nothing stale.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};
use watari_crds::names::{self, port};
use watari_wire::control::control_client::ControlClient;
use watari_wire::control::{
    AcceptDivergenceRequest, AcquireRequest, ConfigureRequest, IntentReply, OpenHandoverRequest, PromoteRequest,
    StatusRequest, VoidRequest,
};
use watari_wire::report::Report;

use crate::authority::text;
use crate::context::Context;
use crate::pki::secret::{CA, CERTIFICATE, Data, KEY};

/// A sidecar is in this cluster; connecting, the handshake and a call each take a moment or are given up.
const PATIENCE: Duration = Duration::from_secs(5);
/// A promotion first waits for the source to seal and send what remains, for up to 20 s, then applies what is in the journal.
const PROMOTION_PATIENCE: Duration = Duration::from_secs(60);

/// Why there is no answer. All are worth another try later.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error("the certificate Secret of the pair cannot be used: {0}")]
    Certificate(String),
    #[error("the sidecar at {address} does not answer: {why}")]
    Silent { address: String, why: String },
    #[error("the sidecar declined: {0}")]
    Declined(#[from] tonic::Status),
    #[error("the sidecar refused: {0}")]
    Refused(String),
    #[error("the sidecar's report cannot be read: {0}")]
    Report(#[from] serde_json::Error),
}

/// A connection to one sidecar.
pub struct Sidecar {
    control: ControlClient<Channel>,
}

impl Sidecar {
    /// Connects to the sidecar of a pair in the Pod with this address.
    pub async fn connect(context: &Context, namespace: &str, pair_id: &str, ip: &str) -> Result<Sidecar, Error> {
        let secrets: Api<Secret> = Api::namespaced(context.client.clone(), namespace);
        let secret = secrets.get(&names::certificate_secret(pair_id)).await?;
        let tls = tls(&text(&secret)).map_err(Error::Certificate)?;
        let address = match ip.contains(':') {
            true => format!("[{ip}]:{}", port::SIDECAR),
            false => format!("{ip}:{}", port::SIDECAR),
        };
        let silent = |why: String| Error::Silent { address: address.clone(), why };
        let channel = tokio::time::timeout(PATIENCE, dial(tls, &address, names::server_name(pair_id)));
        let channel = channel.await.map_err(|_| silent(format!("nothing within {PATIENCE:?}")))?;
        Ok(Sidecar { control: ControlClient::new(channel.map_err(|error| silent(error.to_string()))?) })
    }

    pub async fn report(&mut self) -> Result<Report, Error> {
        let reply = self.control.status(timed(StatusRequest {})).await?.into_inner();
        Ok(serde_json::from_str(&reply.report_json)?)
    }

    /// Changes what may change while it runs; absent fields stay.
    pub async fn configure(&mut self, settings: ConfigureRequest) -> Result<(), Error> {
        self.control.configure(timed(settings)).await?;
        Ok(())
    }

    /// At the source: from now on only the VMI with this UID may connect, and what remains is sent without pause. The same UID
    /// again is the same handover.
    pub async fn open_handover(&mut self, vmi_uid: &str) -> Result<(), Error> {
        agreed(
            self.control.open_handover(timed(OpenHandoverRequest { vmi_uid: vmi_uid.to_owned() })).await?.into_inner(),
        )
    }

    /// At the target: asks the source for the right to write.
    pub async fn acquire(&mut self) -> Result<(), Error> {
        agreed(self.control.acquire(timed(AcquireRequest {})).await?.into_inner())
    }

    /// At the target: gives the handover up for good, so that the source goes on.
    pub async fn void(&mut self) -> Result<(), Error> {
        agreed(self.control.void(timed(VoidRequest {})).await?.into_inner())
    }

    /// At a replica: takes the right to write, from the generation with this number or the newest. Answers what it lost, in words.
    pub async fn promote(&mut self, generation: Option<u64>) -> Result<String, Error> {
        let mut request = tonic::Request::new(PromoteRequest { generation: generation.unwrap_or(0) });
        request.set_timeout(PROMOTION_PATIENCE);
        let reply = self.control.promote(request).await?.into_inner();
        let text = reply.text.clone();
        agreed(reply).map(|()| text)
    }

    /// At a fenced side: what it wrote alone may be overwritten, and it becomes the replica.
    pub async fn accept_divergence(&mut self) -> Result<(), Error> {
        agreed(self.control.accept_divergence(timed(AcceptDivergenceRequest {})).await?.into_inner())
    }
}

/// A call that is given up after a while.
fn timed<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(PATIENCE);
    request
}

fn agreed(reply: IntentReply) -> Result<(), Error> {
    if reply.accepted { Ok(()) } else { Err(Error::Refused(reply.text)) }
}

fn tls(data: &Data) -> Result<ClientConfig, String> {
    let pem = |key: &str| data.get(key).map(String::as_bytes).ok_or_else(|| format!("it has no {key}"));
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem(CA)?) {
        roots.add(certificate.map_err(|error| words(&error))?).map_err(|error| words(&error))?;
    }
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem(CERTIFICATE)?).collect();
    let key = PrivateKeyDer::from_pem_slice(pem(KEY)?).map_err(|error| words(&error))?;
    let mut config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain.map_err(|error| words(&error))?, key)
        .map_err(|error| words(&error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

async fn dial(tls: ClientConfig, address: &str, server_name: String) -> io::Result<Channel> {
    let name = ServerName::try_from(server_name).map_err(io::Error::other)?;
    let stream = TcpStream::connect(address).await?;
    let stream = TlsConnector::from(Arc::new(tls)).connect(name, stream).await?;
    let mut stream = Some(TokioIo::new(stream));
    let once = tower::service_fn(move |_: Uri| {
        let stream = stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        async move { stream }
    });
    // The URI is never resolved: it only becomes the authority of the calls.
    let endpoint = Endpoint::from_static("http://sidecar.watari.internal");
    endpoint.connect_with_connector(once).await.map_err(io::Error::other)
}
