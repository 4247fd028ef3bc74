//! The control API: what the operator, `watari-sidecar status` and `ctl`, and tests say to a running sidecar.
//!
//! A thin translation between `control.proto` and [`Steering`]; it decides nothing. It is served on a unix socket, whose
//! permissions say who may steer, and can be added to the mTLS listener ([`service_for_own_site`]), where only holders
//! of a certificate of *our own* site may steer: the peer speaks the replication protocol and nothing else.

pub mod client;
mod socket;

use std::{pin::Pin, sync::Arc, time::Duration};

use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt, wrappers::IntervalStream};
use tonic::{Request, Response, Status, service::interceptor::InterceptedService};
use watari_wire::control::{
    AcceptDivergenceRequest, AcquireRequest, ConfigureReply, ConfigureRequest, CutReply, CutRequest, IntentReply,
    MoveStoppedRequest, OpenHandoverRequest, PromoteRequest, ReleaseRequest, StatusReply, StatusRequest, VoidRequest,
    WatchRequest, control_server,
};

use crate::{
    engine::steering::{Declined, Intent, Outcome, Settings, Steering},
    identity::Identity,
    tls::PeerInfo,
};

pub use socket::{ControlError, ControlSocket, serve};

/// Watchers may not look more often than this, nor less: a report costs a few locks, and a watcher that has gone is
/// noticed only when something is sent.
const WATCH_MIN: Duration = Duration::from_millis(100);
const WATCH_MAX: Duration = Duration::from_secs(60);
const WATCH_DEFAULT: Duration = Duration::from_secs(1);
/// Longest wait for a commit in one call; whoever wants longer asks again.
const CUT_WAIT_MAX: Duration = Duration::from_secs(600);

/// The control service for an engine.
#[derive(Clone)]
pub struct Control {
    steering: Arc<dyn Steering>,
    /// Set once the server stops: watchers would hold it up for good. `None` where it lives as long as the process.
    stopping: Option<watch::Receiver<bool>>,
}

/// For a server that only the owner of its socket can reach.
pub fn service(steering: Arc<dyn Steering>) -> control_server::ControlServer<Control> {
    control_server::ControlServer::new(Control { steering, stopping: None })
}

/// The same for a server that can stop while the process goes on.
fn stoppable(steering: Arc<dyn Steering>, stopping: watch::Receiver<bool>) -> control_server::ControlServer<Control> {
    control_server::ControlServer::new(Control { steering, stopping: Some(stopping) })
}

/// Resolves once the server is told to stop, or when whoever could say so is gone.
async fn told(mut stopping: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is the same wish.
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// Refuses every caller whose certificate is not of one site.
#[derive(Clone)]
pub struct OwnSite(Identity);

impl tonic::service::Interceptor for OwnSite {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        match request.extensions().get::<PeerInfo>() {
            Some(peer) if peer.identity == self.0 => Ok(request),
            Some(peer) => Err(Status::permission_denied(format!(
                "found a certificate of {}, expected one of {}: only our own site may steer",
                peer.identity, self.0
            ))),
            None => Err(Status::unauthenticated("found no certificate, expected mTLS")),
        }
    }
}

/// The control API as [`service_for_own_site`] gives it.
pub type OwnSiteControl = InterceptedService<control_server::ControlServer<Control>, OwnSite>;

/// For the mTLS listener, beside the replication service.
pub fn service_for_own_site(steering: Arc<dyn Steering>, own: Identity) -> OwnSiteControl {
    InterceptedService::new(service(steering), OwnSite(own))
}

impl Control {
    fn status_reply(&self) -> Result<StatusReply, Status> {
        let report_json = serde_json::to_string(&self.steering.report())
            .map_err(|error| Status::internal(format!("cannot write the report: {error}")))?;
        Ok(StatusReply { report_json })
    }

    /// Declining is an answer, not an error: the caller shows it to a person.
    async fn intent(&self, intent: Intent) -> Result<Response<IntentReply>, Status> {
        tracing::info!(?intent, "asked");
        let reply = match self.steering.intent(intent).await {
            Ok(outcome) => IntentReply { accepted: true, text: words(&outcome) },
            Err(Declined(text)) => IntentReply { accepted: false, text },
        };
        tracing::info!(accepted = reply.accepted, text = %reply.text, "answered");
        Ok(Response::new(reply))
    }
}

/// The stream until `end` resolves.
fn until<S: Stream>(stream: S, end: impl Future<Output = ()>) -> impl Stream<Item = S::Item> {
    // The second stream yields one item, and that ends the whole.
    let ended = tokio_stream::once(end).then(|end| async move {
        end.await;
        None
    });
    stream.map(Some).merge(ended).map_while(|item| item)
}

/// An outcome for a person.
fn words(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Done(text) | Outcome::Pending(text) => text.clone(),
        Outcome::Committed { epoch, number } => format!("generation {epoch}.{number} is committed"),
    }
}

fn decline(Declined(text): Declined) -> Status {
    Status::failed_precondition(text)
}

#[tonic::async_trait]
impl control_server::Control for Control {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        self.status_reply().map(Response::new)
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<StatusReply, Status>> + Send>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let every = match request.into_inner().interval_millis {
            0 => WATCH_DEFAULT,
            millis => Duration::from_millis(millis.into()).clamp(WATCH_MIN, WATCH_MAX),
        };
        let mut ticks = tokio::time::interval(every);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let this = self.clone();
        let reports = IntervalStream::new(ticks).map(move |_| this.status_reply());
        let reports: Self::WatchStream = match self.stopping.clone() {
            None => Box::pin(reports),
            Some(stopping) => Box::pin(until(reports, told(stopping))),
        };
        Ok(Response::new(reports))
    }

    async fn cut(&self, request: Request<CutRequest>) -> Result<Response<CutReply>, Status> {
        let wait = Duration::from_millis(request.into_inner().wait_millis.into()).min(CUT_WAIT_MAX);
        let outcome = self.steering.intent(Intent::Cut { wait }).await.map_err(decline)?;
        let text = words(&outcome);
        Ok(Response::new(match outcome {
            Outcome::Committed { epoch, number } => CutReply { epoch, number, committed: true, text },
            Outcome::Done(_) | Outcome::Pending(_) => CutReply { epoch: 0, number: 0, committed: false, text },
        }))
    }

    async fn configure(&self, request: Request<ConfigureRequest>) -> Result<Response<ConfigureReply>, Status> {
        let ConfigureRequest { interval_millis, bandwidth_bits_per_second, paused, slow_down } = request.into_inner();
        if interval_millis == Some(0) {
            return Err(Status::invalid_argument("interval_millis: found 0, expected at least 1"));
        }
        let settings = Settings {
            interval: interval_millis.map(Duration::from_millis),
            bandwidth_bits_per_second,
            paused,
            slow_down,
        };
        let outcome = self.steering.intent(Intent::Configure(settings)).await.map_err(decline)?;
        Ok(Response::new(ConfigureReply { text: words(&outcome) }))
    }

    async fn open_handover(&self, request: Request<OpenHandoverRequest>) -> Result<Response<IntentReply>, Status> {
        let OpenHandoverRequest { vmi_uid } = request.into_inner();
        if vmi_uid.is_empty() {
            return Err(Status::invalid_argument("vmi_uid: found nothing, expected the UID of the VM instance"));
        }
        self.intent(Intent::OpenHandover { vmi_uid }).await
    }

    async fn acquire(&self, _: Request<AcquireRequest>) -> Result<Response<IntentReply>, Status> {
        self.intent(Intent::Acquire).await
    }

    async fn void(&self, _: Request<VoidRequest>) -> Result<Response<IntentReply>, Status> {
        self.intent(Intent::Void).await
    }

    async fn move_stopped(&self, _: Request<MoveStoppedRequest>) -> Result<Response<IntentReply>, Status> {
        self.intent(Intent::MoveStopped).await
    }

    async fn promote(&self, request: Request<PromoteRequest>) -> Result<Response<IntentReply>, Status> {
        let generation = Some(request.into_inner().generation).filter(|number| *number != 0);
        self.intent(Intent::Promote { generation }).await
    }

    async fn accept_divergence(&self, _: Request<AcceptDivergenceRequest>) -> Result<Response<IntentReply>, Status> {
        self.intent(Intent::AcceptDivergence).await
    }

    async fn release(&self, _: Request<ReleaseRequest>) -> Result<Response<IntentReply>, Status> {
        self.intent(Intent::Release).await
    }
}
