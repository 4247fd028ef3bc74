//! The other end of the control API: one connection to a running sidecar, and an intent carried over it.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint, Uri},
};
use watari_wire::{
    control::{
        AcceptDivergenceRequest, AcquireRequest, ConfigureRequest, CutRequest, MoveStoppedRequest, OpenHandoverRequest,
        PromoteRequest, ReleaseRequest, StatusReply, StatusRequest, VoidRequest, WatchRequest,
        control_client::ControlClient,
    },
    report::Report,
};

use crate::engine::steering::{Intent, Settings};

/// A local socket answers at once or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("{}: found no running sidecar ({error}); is it started, and is this its control socket?", path.display())]
    NotRunning { path: PathBuf, error: io::Error },
    /// It answered: no. The text says why and what to do.
    #[error("declined: {0}")]
    Declined(String),
    #[error("no answer within {0:?}; what was asked for may still happen, see `watari-sidecar status`")]
    Timeout(Duration),
    #[error("the sidecar ended the call: {0}")]
    Call(String),
    #[error("the report cannot be read: {0}; are both of the same version?")]
    Report(#[from] serde_json::Error),
}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        match status.code() {
            Code::FailedPrecondition | Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated => {
                ClientError::Declined(status.message().to_owned())
            }
            code => ClientError::Call(format!("{code:?}: {}", status.message())),
        }
    }
}

/// A connection to one running sidecar.
#[derive(Clone, Debug)]
pub struct Client {
    control: ControlClient<Channel>,
}

impl Client {
    /// Connects to the control socket at `path`.
    pub async fn connect(path: &Path) -> Result<Client, ClientError> {
        let not_running = |error: io::Error| ClientError::NotRunning { path: path.to_owned(), error };
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(path))
            .await
            .map_err(|_| not_running(io::ErrorKind::TimedOut.into()))?
            .map_err(not_running)?;
        let mut stream = Some(TokioIo::new(stream));
        let once = tower::service_fn(move |_: Uri| {
            let stream = stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
            async move { stream }
        });
        let channel = Endpoint::from_static("http://localhost")
            .connect_with_connector(once)
            .await
            .map_err(|error| not_running(io::Error::other(error)))?;
        Ok(Client::on(channel))
    }

    /// On a channel at hand (mTLS).
    pub fn on(channel: Channel) -> Client {
        Client { control: ControlClient::new(channel) }
    }

    pub async fn report(&mut self) -> Result<Report, ClientError> {
        parse(&self.control.status(StatusRequest {}).await?.into_inner())
    }

    pub async fn watch(&mut self, every: Duration) -> Result<Watch, ClientError> {
        let interval_millis = u32::try_from(every.as_millis()).unwrap_or(u32::MAX);
        Ok(Watch(self.control.watch(WatchRequest { interval_millis }).await?.into_inner()))
    }

    /// Carries an intent over; returns the sidecar's answer in words. Waits at most `timeout`.
    pub async fn intent(&mut self, intent: Intent, timeout: Duration) -> Result<String, ClientError> {
        tokio::time::timeout(timeout, self.send(intent)).await.unwrap_or(Err(ClientError::Timeout(timeout)))
    }

    async fn send(&mut self, intent: Intent) -> Result<String, ClientError> {
        let control = &mut self.control;
        let reply = match intent {
            Intent::Cut { wait } => {
                let wait_millis = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
                return Ok(control.cut(CutRequest { wait_millis }).await?.into_inner().text);
            }
            Intent::Configure(Settings { interval, bandwidth_bits_per_second, paused, slow_down }) => {
                let interval_millis = interval.map(|interval| interval.as_millis() as u64);
                let request = ConfigureRequest { interval_millis, bandwidth_bits_per_second, paused, slow_down };
                return Ok(control.configure(request).await?.into_inner().text);
            }
            Intent::OpenHandover { vmi_uid } => control.open_handover(OpenHandoverRequest { vmi_uid }).await?,
            Intent::Acquire => control.acquire(AcquireRequest {}).await?,
            Intent::Void => control.void(VoidRequest {}).await?,
            Intent::MoveStopped => control.move_stopped(MoveStoppedRequest {}).await?,
            Intent::Promote { generation } => {
                control.promote(PromoteRequest { generation: generation.unwrap_or(0) }).await?
            }
            Intent::AcceptDivergence => control.accept_divergence(AcceptDivergenceRequest {}).await?,
            Intent::Release => control.release(ReleaseRequest {}).await?,
        };
        let reply = reply.into_inner();
        if reply.accepted { Ok(reply.text) } else { Err(ClientError::Declined(reply.text)) }
    }
}

/// Reports, one after another.
pub struct Watch(Streaming<StatusReply>);

impl Watch {
    /// `None` once the sidecar has ended.
    pub async fn next(&mut self) -> Result<Option<Report>, ClientError> {
        match self.0.message().await? {
            Some(reply) => parse(&reply).map(Some),
            None => Ok(None),
        }
    }
}

fn parse(reply: &StatusReply) -> Result<Report, ClientError> {
    Ok(serde_json::from_str(&reply.report_json)?)
}
