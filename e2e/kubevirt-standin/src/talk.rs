//! What the controller (in virt-handler's place) and a launcher say to each other, over TCP in the Pod network. There is no
//! authentication: a stand-in runs where nobody else is.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::net::TcpStream;

use crate::lines;

/// Where a launcher listens. Nothing of Watari's in the Pod does.
pub const LAUNCHER_PORT: u16 = 9187;
/// A launcher that does not answer within this time is busy starting, or gone.
const PATIENCE: Duration = Duration::from_secs(2);
/// A freeze waits for the guest.
const FREEZE_PATIENCE: Duration = Duration::from_secs(15);

/// From the controller.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    Report,
    /// With the time after which the launcher thaws by itself, if there is one.
    Freeze {
        unfreeze_after: Option<Duration>,
    },
    Unfreeze,
    /// SyncMigrationTarget: make local disks, call the hooks once, open the doors. May be repeated; the report tells the result.
    PrepareTarget {
        vmi: Box<Value>,
    },
    Migrate(Box<Migrate>),
    /// Of a migration that leaves.
    Abort,
}

/// Where a VM is to go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Migrate {
    /// UID of the source's VMIM.
    pub job: String,
    pub address: IpAddr,
    pub ports: Ports,
    /// Replaced in the domain's description, as KubeVirt does (`live-migration-source.go:1087`).
    pub source_uid: String,
    pub target_uid: String,
    pub target_domain: String,
    /// Between clusters every disk of a claim is copied; within one only what is not shared.
    pub between_clusters: bool,
}

/// TCP ports of a prepared target, one per channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    pub libvirt: u16,
    pub memory: u16,
    pub disks: u16,
}

/// What a launcher knows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub life: Life,
    /// The newest refusal of a hook or of libvirt; gone with the next success.
    pub trouble: Option<String>,
    pub frozen: bool,
    pub leaving: Leaving,
    /// Of the VMIM that `leaving` is about.
    pub job: Option<String>,
}

/// Of the guest in this Pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Life {
    /// A boot is under way.
    #[default]
    Starting,
    Running,
    /// With libvirt's reason.
    Paused(String),
    /// A migration's target that has not been prepared.
    Empty,
    /// A hook of this target is being asked.
    Preparing,
    /// The target's doors are open.
    Prepared(Ports),
    /// Memory arrives.
    Incoming,
    /// The guest has left for another Pod.
    Left,
    Ended,
}

/// A migration out of this Pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Leaving {
    #[default]
    No,
    Running,
    Done,
    Failed(String),
}

/// What a launcher answers: its report, or why not.
pub type Answer = Result<Report, String>;

/// The launcher did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the launcher cannot be reached: {0}")]
    Unreachable(#[from] lines::Error),
    #[error("{0}")]
    Refused(String),
}

/// Asks the launcher of the Pod with this address.
pub async fn ask(pod: IpAddr, request: &Request) -> Result<Report, Error> {
    let patience = match request {
        Request::Freeze { .. } | Request::Unfreeze => FREEZE_PATIENCE,
        Request::Report | Request::PrepareTarget { .. } | Request::Migrate(_) | Request::Abort => PATIENCE,
    };
    let connect = tokio::time::timeout(PATIENCE, TcpStream::connect((pod, LAUNCHER_PORT))).await;
    let stream = connect.map_err(|_| lines::Error::Late(PATIENCE))?.map_err(lines::Error::from)?;
    let answer: Answer = lines::ask(stream, request, patience).await?;
    answer.map_err(Error::Refused)
}
