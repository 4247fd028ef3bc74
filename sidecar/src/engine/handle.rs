//! A running engine as seen from outside: [`Steering`] over the brain's inbox.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;
use watari_wire::report::Report;

use super::{
    brain::Signals,
    event::Event,
    steering::{Declined, Intent, IntentFuture, Steering},
    stream::Post,
};

/// See the module's header.
#[derive(Clone)]
pub struct Handle {
    pub post: Post,
    pub report: Arc<Mutex<Report>>,
    pub signals: Arc<Signals>,
}

impl Handle {
    /// A target's QEMU may be started: a handover is open and its source within reach.
    pub fn attachable(&self) -> bool {
        self.signals.attachable.load(std::sync::atomic::Ordering::SeqCst)
    }
}

impl Steering for Handle {
    fn report(&self) -> Report {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn intent(&self, intent: Intent) -> IntentFuture<'_> {
        let (answer, answered) = oneshot::channel();
        (self.post)(Event::Intent(intent, answer));
        Box::pin(async move {
            answered.await.unwrap_or_else(|_| Err(Declined("the sidecar is ending: ask again when it is back".into())))
        })
    }
}
