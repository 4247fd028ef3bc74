//! The launcher's door for the controller: reports at once, passes orders on to the loop, freezes and thaws by itself.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::{Error, agent, at};
use crate::lines;
use crate::talk::{Answer, LAUNCHER_PORT, Life, Migrate, Report, Request};

/// Orders come one by one, and are repeated by who gives them.
const ORDERS_MAX: usize = 8;

/// What the loop is asked to do.
pub enum Order {
    PrepareTarget(Box<Value>),
    Migrate(Migrate),
    Abort,
}

/// The report, and who may change it.
#[derive(Clone)]
pub struct Server {
    state: Arc<Mutex<State>>,
    orders: mpsc::Sender<Order>,
}

struct State {
    report: Report,
    /// Writers ran before the freeze.
    resume: bool,
    /// Counts freezes, so that a late timer thaws only its own.
    freezes: u64,
}

impl Server {
    pub async fn start(life: Life) -> Result<(Server, mpsc::Receiver<Order>), Error> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, LAUNCHER_PORT)).await.map_err(at("launcher port"))?;
        let (orders, receiver) = mpsc::channel(ORDERS_MAX);
        let state = State { report: Report { life, ..Report::default() }, resume: false, freezes: 0 };
        let server = Server { state: Arc::new(Mutex::new(state)), orders };
        let serving = server.clone();
        tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                let server = serving.clone();
                tokio::spawn(async move { lines::answer(stream, async |request| server.obey(request).await).await });
            }
        });
        Ok((server, receiver))
    }

    fn state<T>(&self, job: impl FnOnce(&mut State) -> T) -> T {
        job(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn update(&self, change: impl FnOnce(&mut Report)) {
        self.state(|state| change(&mut state.report));
    }

    pub fn report(&self) -> Report {
        self.state(|state| state.report.clone())
    }

    async fn obey(&self, request: Request) -> Answer {
        let order = match request {
            Request::Report => None,
            Request::Freeze { unfreeze_after } => return self.freeze(unfreeze_after).await,
            Request::Unfreeze => return self.thaw().await,
            Request::PrepareTarget { vmi } => Some(Order::PrepareTarget(vmi)),
            Request::Migrate(order) => Some(Order::Migrate(*order)),
            Request::Abort => Some(Order::Abort),
        };
        if let Some(order) = order {
            self.orders.try_send(order).map_err(|error| error.to_string())?;
        }
        Ok(self.report())
    }

    async fn freeze(&self, unfreeze_after: Option<Duration>) -> Answer {
        if !self.report().frozen {
            let frozen = tokio::task::spawn_blocking(agent::freeze).await.map_err(|error| error.to_string())?;
            let resume = frozen.map_err(|error| format!("guest agent command failed: {error}"))?;
            self.state(|state| (state.report.frozen, state.resume) = (true, resume));
        }
        let number = self.state(|state| {
            state.freezes += 1;
            state.freezes
        });
        if let Some(after) = unfreeze_after.filter(|after| !after.is_zero()) {
            let server = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(after).await;
                if server.state(|state| state.freezes == number) {
                    tracing::warn!("unfreezeTimeout has passed");
                    let _ = server.thaw().await;
                }
            });
        }
        Ok(self.report())
    }

    async fn thaw(&self) -> Answer {
        if self.report().frozen {
            if self.state(|state| state.resume) {
                let thawed = tokio::task::spawn_blocking(agent::thaw).await.map_err(|error| error.to_string())?;
                thawed.map_err(|error| format!("guest agent command failed: {error}"))?;
            }
            self.update(|report| report.frozen = false);
        }
        Ok(self.report())
    }
}
