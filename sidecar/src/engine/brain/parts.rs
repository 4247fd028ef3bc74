//! What a brain is made from; `start` puts it together.

use super::*;

/// Everything that the brain is made from.
pub struct Parts {
    pub config: Arc<Config>,
    pub inbox: Receiver<Event>,
    pub post: Post,
    pub site: Site,
    pub session: Session,
    pub slot: SlotFile,
    pub meta: Folder,
    pub lock: FolderLock,
    pub shared: Arc<Shared>,
    pub disks: Arc<Vec<GateDisk>>,
    pub connections: Arc<Connections>,
    pub remote: Arc<RemoteReads>,
    pub signals: Arc<Signals>,
    pub replica: ReplicaFolder,
    pub tls: Arc<Tls>,
    pub generations: Arc<Generations>,
    pub hello: Arc<Mutex<Hello>>,
    pub dial: watch::Sender<bool>,
    pub throttle: Arc<Throttle>,
    pub report: Arc<Mutex<Report>>,
    /// Workers of this supervisor that crashed before this one.
    pub restarts: u64,
    /// What a former worker of this supervisor was told.
    pub settings: Settings,
    /// What a start as source must do before the marks can be believed.
    pub baseline: Baseline,
    /// Nothing shows that a guest was served a moment ago (a worker that restarts under its QEMU): the peer is asked first
    /// whether it was promoted meanwhile.
    pub fresh_boot: bool,
    /// What a starting source found, until the peer's word on it is heard.
    pub start_facts: Option<StartFacts>,
    /// This start's number in the trust record; 0: it could not be recorded.
    pub starts: u64,
}

/// Where the marks of a starting source come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Baseline {
    /// The marks are right as they are.
    Marks,
    /// These ranges (disk, first block, blocks) may differ.
    Compare(Vec<(watari_core::geometry::DiskIndex, u64, u64)>),
    /// Everything may differ, for this reason.
    Everything(String),
    /// The peer's word decides between the log and everything ([`Brain::judge_start`]).
    Unproven,
}
