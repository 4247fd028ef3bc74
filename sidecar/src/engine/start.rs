//! The start of a worker: from a configuration to a running brain, and the proof written at a clean stop.
//!
//! Order: lock the folder → read the role record → look at disks, trust, log and map → decide what the marks are worth
//! → record the start durably → serve the guest → talk to the peer. A refusal touches no disk and names its remedy.
//! The guest is served before the peer is met (I8).

use std::{
    fs::File,
    sync::{Arc, Mutex, atomic::AtomicBool, mpsc},
    time::Duration,
};

use tokio::sync::watch;
use watari_core::{
    front::{Detach, Errno, GuestDisk, Op, Request},
    geometry::{ActivationId, DiskIndex, Epoch, Generation, GenerationNumber, Session},
    handover::Site,
    record::{DiskRecord, Role, RoleRecord},
    regions::{PairId, REGION_BLOCKS, RegionLayout, RegionSet, log::LogHeader},
    slots::{SlotError, SlotFile},
    tracker::Tracker,
};
use watari_nbd::{
    Exports, Server, ServerConfig,
    local::{LocalDisk, LocalDiskConfig},
};
use watari_store::{
    folder::Folder,
    lock::FolderLock,
    maps::{BootId, MapIdentity, MapMemory},
    regions::{FileMedium, MarksProof, RegionLog, UntrackedReason, read_log},
    trust::{self, FullCompareReason, LogFact, MapFact, Marks, StartFacts, StartState, TrustFact},
};
use watari_wire::{replication::Hello, report::Report};

use super::{
    brain::{Baseline, Brain, Parts, Signals},
    clock::{random_id, random_u64, unix_millis},
    connections::Connections,
    event::Event,
    folder::{ROLE_MAGIC, ROLE_NAME, ROLE_VERSION, ReplicaFolder},
    gate::{GateDisk, GuestEvents, finish},
    generations::Generations,
    handle::Handle,
    preserve::PreserveStore,
    remote::RemoteReads,
    settings::Settings,
    stream::{self, Dialer, Post},
    tracking::{Shared, Tracking},
};
use crate::{
    cli::WorkerFlags,
    config::Config,
    throttle::Throttle,
    tls::{Listener, Tls},
};

mod trusting;

use trusting::{Opened, open_tracking};
pub(super) use trusting::{blocks_of, new_log};

/// How long a new owner waits for the folder of one that is leaving (a replica Pod and the target's virt-launcher Pod).
const LOCK_WAIT: Duration = Duration::from_secs(60);

/// Where a replica's kept generations are served, in `nbd.dir`.
pub const GENERATIONS_SOCKET: &str = "generations.sock";

/// Why a worker does not start. Nothing of the VM was touched.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{0}")]
    Refused(String),
    #[error("{doing}: {source}")]
    Io { doing: String, source: std::io::Error },
}

fn io(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> StartError {
    let doing = doing.into();
    move |source| StartError::Io { doing, source }
}

fn refused(text: impl std::fmt::Display) -> StartError {
    StartError::Refused(text.to_string())
}

/// The guest's behaviour, posted to the brain.
struct Reporter {
    post: Post,
    signals: Arc<Signals>,
    remote: Arc<RemoteReads>,
}

impl GuestEvents for Reporter {
    fn may_attach(&self) -> Result<(), String> {
        use std::sync::atomic::Ordering::SeqCst;
        if self.signals.offered.load(SeqCst) {
            return Ok(());
        }
        Err("this side holds a replica and no handover is open: open one at the source (`watari-sidecar ctl open-handover`), or promote this side".into())
    }
    fn attached(&self) {
        (self.post)(Event::GuestAttached);
    }
    fn left(&self, how: Detach) {
        (self.post)(Event::GuestLeft(how));
    }
    fn wants_write(&self) {
        use std::sync::atomic::Ordering::SeqCst;
        if !self.signals.wants_write.swap(true, SeqCst) {
            (self.post)(Event::GuestWantsWrite);
        }
    }
    fn source_left(&self) -> bool {
        self.signals.source_left.load(std::sync::atomic::Ordering::SeqCst)
    }
    fn read_remote(&self, disk: DiskIndex, request: Request, deadline: std::time::Instant) {
        self.remote.ask(disk, request, deadline);
    }
}

/// A running worker; the brain runs on its own thread.
pub struct Running {
    pub post: Post,
    pub report: Arc<Mutex<Report>>,
    pub brain: std::thread::JoinHandle<i32>,
    /// NBD servers of the guest's disks; dropped last.
    pub servers: Vec<Server>,
    pub disks: Arc<Vec<GateDisk>>,
    pub connections: Arc<Connections>,
    pub throttle: Arc<Throttle>,
    pub signals: Arc<Signals>,
    /// Set to stop listening.
    pub stop: watch::Sender<bool>,
    pub listening: std::net::SocketAddr,
}

/// Start everything. `front_end`: this process serves a guest (`primary`). Needs a tokio runtime.
pub async fn start(config: Arc<Config>, front_end: bool, flags: &WorkerFlags) -> Result<Running, StartError> {
    std::fs::create_dir_all(&config.folder).map_err(io(format!("folder {}", config.folder.display())))?;
    std::fs::create_dir_all(&config.runtime_dir)
        .map_err(io(format!("runtime_dir {}", config.runtime_dir.display())))?;
    let tls = Tls::load(config.tls.clone(), config.identity()).map_err(refused)?;
    let lock = take_lock(&config, front_end)?;
    let mut meta = Folder::open(&config.folder).map_err(io("folder"))?;
    let found = read_role(&meta, &config)?;
    let sizes = disk_sizes(&config, found.as_ref().map(|(_, r)| r), front_end)?;
    let (slot, record) = role_record(&mut meta, &config, found, &sizes, front_end)?;
    let session = Session(random_u64());

    let layout = RegionLayout::new(&sizes).map_err(refused)?;
    let (inbox_tx, inbox) = mpsc::channel();
    let inbox_tx = Mutex::new(inbox_tx);
    let post: Post = Arc::new(move |event| {
        // The brain ends last; an event for a brain that is gone has nobody to miss it.
        let _ = inbox_tx.lock().unwrap_or_else(std::sync::PoisonError::into_inner).send(event);
    });
    let source = record.role.is_active_side();
    let opened = open_tracking(&config, &layout, &record, session, source)?;
    let Opened { maps, regions, baseline, fresh, facts, starts } = opened;
    let spill = config.folder.join("spill");
    let wake = post.clone();
    let shared = Arc::new(Shared {
        tracker: Tracker::new(maps),
        regions,
        preserve: PreserveStore::new(config.preserve.memory_bytes, Some((&spill, config.preserve.spill_bytes))),
        give_up: Default::default(),
        pass_through: flags.pass_through && record.role.accepts_writes(),
        unproven: AtomicBool::new(baseline == Baseline::Unproven),
        slow_down_micros: Default::default(),
        written_bytes: Default::default(),
        latency: Default::default(),
        effort: Default::default(),
        wake: Box::new(move || wake(Event::Wake)),
    });
    if shared.pass_through {
        // Recorded before the first untracked write: the next worker that tracks compares everything.
        shared.tracker.maps().facts().set_untracked(true);
    }
    shared.tracker.adopt();
    if !source {
        shared.tracker.clear_all();
    }

    let signals: Arc<Signals> = Arc::default();
    let remote: Arc<RemoteReads> = Arc::default();
    let connections = Arc::new(Connections::new(&config.runtime_dir));
    let events: Arc<dyn GuestEvents> =
        Arc::new(Reporter { post: post.clone(), signals: signals.clone(), remote: remote.clone() });
    let site = Site::new(record, session.0);
    let mut disks = Vec::new();
    for (i, disk) in config.disks.iter().enumerate() {
        let index = DiskIndex(i as u16);
        let mut options = LocalDiskConfig::new(disk.name.clone());
        options.size_bytes = Some(sizes[i]);
        let around = Tracking { disk: index, shared: shared.clone() };
        let local = LocalDisk::open_around(&disk.path, options, around).map_err(refused)?;
        disks.push(GateDisk::new(index, local, site.gate(), connections.clone(), events.clone()));
    }
    let disks = Arc::new(disks);
    remote.set_disks(disks.clone());

    let generations = Arc::new(Generations::new(config.disks.iter().map(|d| d.name.clone()).collect()));
    let limit = config.bandwidth.limit_at((unix_millis() / 1000) as i64);
    let throttle = Arc::new(Throttle::new(limit));
    let hello: Arc<Mutex<Hello>> = Arc::default();
    let report: Arc<Mutex<Report>> = Arc::default();
    let (dial, wanted) = watch::channel(false);
    let parts = Parts {
        replica: ReplicaFolder::new(&config, &sizes),
        tls: tls.clone(),
        generations: generations.clone(),
        config: config.clone(),
        inbox,
        post: post.clone(),
        site,
        session,
        slot,
        meta,
        lock,
        shared,
        disks: disks.clone(),
        connections: connections.clone(),
        remote,
        signals: signals.clone(),
        hello: hello.clone(),
        dial,
        throttle: throttle.clone(),
        report: report.clone(),
        baseline,
        fresh_boot: fresh,
        start_facts: facts,
        starts,
        restarts: flags.restarts,
        settings: Settings::read(&config.runtime_dir, flags.restarts),
    };
    // The listener first: a port in use is a refusal, not a surprise later.
    let listener = Listener::bind(config.listen, tls.clone()).await.map_err(refused)?;
    let listening = listener.local_addr();
    let mut servers = if front_end { serve_guest(&config, &disks)? } else { Vec::new() };
    servers.push(serve_generations(&config, generations)?);
    let brain = std::thread::Builder::new()
        .name("brain".into())
        .spawn(move || Brain::new(parts).run())
        .map_err(io("brain thread"))?;
    let (stop, stopped) = watch::channel(false);
    let listen_post = post.clone();
    // Our own site's operator steers over the same listener; the unix socket is for people on the spot.
    let steering = Arc::new(Handle { post: post.clone(), report: report.clone(), signals: signals.clone() });
    let control = crate::control::service_for_own_site(steering, config.identity());
    tokio::spawn(async move {
        if let Err(error) = stream::listen(listener, listen_post, control, stopped).await {
            tracing::error!(%error, "the listener for the peer ended");
        }
    });
    tokio::spawn(stream::dial_loop(Dialer {
        tls,
        peer: config.peer.clone(),
        data_streams: config.data_streams,
        throttle: throttle.clone(),
        post: post.clone(),
        hello,
        wanted,
    }));
    Ok(Running { post, report, brain, servers, disks, connections, throttle, signals, stop, listening })
}

fn take_lock(config: &Config, front_end: bool) -> Result<FolderLock, StartError> {
    let role = if front_end { "primary" } else { "replica" };
    match FolderLock::acquire(&config.folder, role, Duration::ZERO) {
        Ok(lock) => Ok(lock),
        Err(error) => {
            tracing::info!(%error, "waiting for the folder, at most {LOCK_WAIT:?}");
            FolderLock::acquire(&config.folder, role, LOCK_WAIT).map_err(refused)
        }
    }
}

type FoundRole = (SlotFile, RoleRecord);

fn read_role(meta: &Folder, config: &Config) -> Result<Option<FoundRole>, StartError> {
    let found = SlotFile::open(meta, ROLE_NAME, ROLE_MAGIC, ROLE_VERSION).map_err(refused)?;
    let Some((slot, payload)) = found else { return Ok(None) };
    let record = RoleRecord::decode(&payload.bytes).map_err(refused)?;
    if record.pair != config.pair.id.0 {
        return Err(refused(format!(
            "folder {}: it belongs to pair {}, expected {}: name another folder, or the right pair.id",
            config.folder.display(),
            crate::identity::PairId(record.pair),
            config.pair.id
        )));
    }
    Ok(Some((slot, record)))
}

/// The size of each disk that the guest sees, bytes: recorded, configured, or found.
fn disk_sizes(config: &Config, record: Option<&RoleRecord>, front_end: bool) -> Result<Vec<u64>, StartError> {
    if let Some(record) = record {
        let names: Vec<_> = record.disks.iter().map(|d| d.name.as_str()).collect();
        let configured: Vec<_> = config.disks.iter().map(|d| d.name.as_str()).collect();
        if names != configured {
            return Err(refused(format!(
                "disks: found {configured:?} in the configuration, expected {names:?} as recorded in the folder: a pair's disks cannot change"
            )));
        }
    }
    let mut sizes = Vec::new();
    for (i, disk) in config.disks.iter().enumerate() {
        let recorded = record.map(|r| r.disks[i].size_bytes);
        let actual = match disk.actual_bytes() {
            Ok(actual) => actual,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !front_end && record.is_none() => {
                let size = disk.size_bytes.ok_or_else(|| {
                    refused(format!(
                        "disk {}: {} does not exist; name its size (size_bytes) so that an empty image can be made, or bring one",
                        disk.name,
                        disk.path.display()
                    ))
                })?;
                watari_store::folder::DiskImages::create_file(&disk.path, size).map_err(io(format!(
                    "disk {}: making {}",
                    disk.name,
                    disk.path.display()
                )))?;
                size
            }
            Err(source) => {
                return Err(StartError::Io { doing: format!("disk {}: {}", disk.name, disk.path.display()), source });
            }
        };
        let wanted = recorded.or(disk.size_bytes).unwrap_or(actual);
        if actual < wanted {
            return Err(refused(format!(
                "disk {}: found {actual} bytes in {}, expected {wanted} as recorded: restore it or grow it; nothing was touched",
                disk.name,
                disk.path.display()
            )));
        }
        sizes.push(wanted);
    }
    Ok(sizes)
}

/// The record of this start: the counter raised, or a first record.
fn role_record(
    meta: &mut Folder,
    config: &Config,
    found: Option<FoundRole>,
    sizes: &[u64],
    front_end: bool,
) -> Result<FoundRole, StartError> {
    let words = |e: SlotError| refused(format!("role record in {}: {e}", config.folder.display()));
    if let Some((mut slot, mut record)) = found {
        record.starts += 1;
        slot.write(meta, &record.encode()).map_err(words)?;
        return Ok((slot, record));
    }
    let disks = config.disks.iter().zip(sizes);
    let disks = disks.map(|(d, s)| DiskRecord { name: d.name.clone(), size_bytes: *s }).collect();
    // The side where the VM lives begins at epoch 1; a replica learns the epoch from it.
    let (role, epoch, identity) = if front_end {
        (Role::Serving, Epoch { counter: 1, activation: ActivationId(random_id()) }, random_id())
    } else {
        (Role::Replica, Epoch::default(), [0; 16])
    };
    let record = RoleRecord {
        pair: config.pair.id.0,
        site: random_id(),
        identity,
        starts: 1,
        epoch,
        floor: epoch.counter,
        role,
        base: Generation::default(),
        numbers_reserved: GenerationNumber(1),
        unfenced: false,
        untracked: false,
        disks,
    };
    let slot = SlotFile::create(meta, ROLE_NAME, ROLE_MAGIC, ROLE_VERSION, &record.encode()).map_err(words)?;
    Ok((slot, record))
}

fn serve_guest(config: &Config, disks: &Arc<Vec<GateDisk>>) -> Result<Vec<Server>, StartError> {
    let mut servers = Vec::new();
    for (i, disk) in config.disks.iter().enumerate() {
        if let Some(dir) = disk.socket.parent() {
            std::fs::create_dir_all(dir).map_err(io(format!("nbd.dir {}", dir.display())))?;
        }
        let mut options = ServerConfig::new(&disk.socket);
        options.mode = config.nbd.mode;
        let server =
            Server::bind(options, Arc::new(DiskExports { disks: disks.clone(), index: i })).map_err(refused)?;
        server.serve().map_err(io(format!("disk {}", disk.name)))?;
        servers.push(server);
    }
    Ok(servers)
}

/// Kept generations, as `disk@epoch.number` on one socket beside the guest's.
fn serve_generations(config: &Config, generations: Arc<Generations>) -> Result<Server, StartError> {
    std::fs::create_dir_all(&config.nbd.dir).map_err(io(format!("nbd.dir {}", config.nbd.dir.display())))?;
    let server =
        Server::bind(ServerConfig::new(config.nbd.dir.join(GENERATIONS_SOCKET)), generations).map_err(refused)?;
    server.serve().map_err(io("generations"))?;
    Ok(server)
}

/// The one disk of a socket; each connection gets an [`Export`] of its own.
struct DiskExports {
    disks: Arc<Vec<GateDisk>>,
    index: usize,
}

impl Exports for DiskExports {
    fn names(&self) -> Vec<String> {
        vec![self.disks[self.index].info().name]
    }
    fn open(&self, name: &str) -> Option<Arc<dyn GuestDisk>> {
        let disk = &self.disks[self.index];
        let ours = name.is_empty() || name == disk.info().name;
        ours.then(|| Arc::new(Export { disks: self.disks.clone(), index: self.index, deaths: disk.deaths() }) as _)
    }
}

/// One disk of the shared list, as one connection sees it: dead for good once the gate was closed for good, because
/// that QEMU's memory belongs to other data than what is served later.
struct Export {
    disks: Arc<Vec<GateDisk>>,
    index: usize,
    deaths: u64,
}

impl GuestDisk for Export {
    fn info(&self) -> watari_core::front::DiskInfo {
        self.disks[self.index].info()
    }
    fn attach(&self, connection: u64) -> Result<(), String> {
        self.disks[self.index].attach(connection)
    }
    fn detach(&self, connection: u64, how: Detach) {
        self.disks[self.index].detach(connection, how);
    }
    fn submit(&self, request: Request) {
        let disk = &self.disks[self.index];
        match request.op {
            _ if disk.deaths() == self.deaths => disk.submit(request),
            Op::Flush => finish(request, Ok(())),
            _ => finish(request, Err(Errno::Io)),
        }
    }
    fn allocation(
        &self,
        offset: u64,
        length: u64,
    ) -> Result<Vec<watari_core::front::Allocation>, watari_core::front::Errno> {
        self.disks[self.index].allocation(offset, length)
    }
    fn zeroes_are_fast(&self, no_hole: bool) -> bool {
        self.disks[self.index].zeroes_are_fast(no_hole)
    }
}

/// At a clean stop: what proves at the next start that nobody wrote meanwhile.
pub fn record_clean_stop(parts: &Parts) {
    let pair = PairId(parts.config.pair.id.0);
    if !parts.site.record().role.is_active_side() {
        return;
    }
    let files: Result<Vec<File>, _> = parts.config.disks.iter().map(|d| File::open(&d.path)).collect();
    let recorded = (|| {
        let files = files.map_err(|e| e.to_string())?;
        let files: Vec<&File> = files.iter().collect();
        let current = trust::read_record(&parts.config.folder, pair).map_err(|e| e.to_string())?;
        let layout = parts.shared.regions.layout();
        let dirty: Vec<_> = parts.shared.regions.regions().iter().map(|n| layout.region(n)).collect();
        let untracked = parts.shared.untracked();
        trust::record_clean_stop(&parts.config.folder, &current, layout, &files, &dirty, random_u64(), untracked)
            .map_err(|e| e.to_string())
    })();
    if let Err(error) = recorded {
        tracing::warn!(error, "no proof of a clean stop was written: the next start compares what the log names");
    }
}
