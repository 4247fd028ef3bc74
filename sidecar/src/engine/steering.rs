//! How the outside steers an engine: intents in, a report out. The control API, the CLI and tests know nothing else.

use std::{future::Future, pin::Pin, time::Duration};

use watari_wire::report::Report;

pub use super::settings::Settings;

/// What a person, the operator or a test wants.
#[derive(Clone, Debug, PartialEq)]
pub enum Intent {
    /// Make a cut; answer once its generation is committed, or after `wait`.
    Cut {
        wait: Duration,
    },
    Configure(Settings),
    /// Source: record `HandoverOpen` for this VMI (only that QEMU may connect until Void or Released), begin Converging.
    OpenHandover {
        vmi_uid: String,
    },
    /// Target: ask for the right to write (QEMU was resumed here although the guest is idle).
    Acquire,
    /// Target: the migration failed and QEMU is gone here.
    Void,
    /// Target: take over a VM that does not run anywhere.
    MoveStopped,
    /// Target: failover without the source; `None` is the newest committed generation.
    Promote {
        generation: Option<u64>,
    },
    /// Fenced old source: its later writes may be overwritten (they stay readable through undo).
    AcceptDivergence,
    /// Give up the folder's lock and end.
    Release,
}

/// What became of an intent.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Done(String),
    Committed {
        epoch: u64,
        number: u64,
    },
    /// Not finished within the wait; it goes on.
    Pending(String),
}

/// Why not, in words that name the remedy.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct Declined(pub String);

pub type IntentFuture<'a> = Pin<Box<dyn Future<Output = Result<Outcome, Declined>> + Send + 'a>>;

/// A running engine, as seen from outside.
pub trait Steering: Send + Sync {
    fn report(&self) -> Report;
    fn intent(&self, intent: Intent) -> IntentFuture<'_>;
}
