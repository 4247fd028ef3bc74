//! What a start may believe: map memory, region log and trust record are looked at together, and the start is recorded
//! durably before anybody is served. The decision itself is `watari_store::trust::decide`.

use super::*;

pub(super) struct Opened {
    pub maps: MapMemory,
    pub regions: RegionLog,
    pub baseline: Baseline,
    /// Not a worker that restarts under its QEMU, and not the first start of all.
    pub fresh: bool,
    /// What a starting source found, for the peer's word on it.
    pub facts: Option<StartFacts>,
    /// This start's number in the trust record; 0: it could not be recorded.
    pub starts: u64,
}

/// The blocks of regions: disk, first block, blocks.
pub fn blocks_of(layout: &RegionLayout, set: &RegionSet) -> Vec<(DiskIndex, u64, u64)> {
    let one = |n: usize| {
        let region = layout.region(n);
        let blocks = watari_core::geometry::blocks_for(layout.sizes()[usize::from(region.disk.0)]);
        let start = region.index * REGION_BLOCKS;
        (region.disk, start, REGION_BLOCKS.min(blocks - start))
    };
    set.iter().map(one).collect()
}

/// Map memory, region log and trust, and what they say about the marks.
pub(super) fn open_tracking(
    config: &Config,
    layout: &RegionLayout,
    record: &RoleRecord,
    session: Session,
    source: bool,
) -> Result<Opened, StartError> {
    let pair = PairId(config.pair.id.0);
    let boot = BootId::current().map_err(io("boot id"))?;
    let identity = MapIdentity { pair, boot, sizes: layout.sizes().to_vec() };
    let files: Vec<File> = config
        .disks
        .iter()
        .map(|d| File::open(&d.path).map_err(io(format!("disk {}: {}", d.name, d.path.display()))))
        .collect::<Result<_, _>>()?;
    let files: Vec<&File> = files.iter().collect();
    let previous = trust::read_record(&config.folder, pair);
    let trusted = TrustFact::new(&previous, |r| trust::check(r, &files));
    let log = read_log(&config.folder, pair, layout);
    let existing = MapMemory::open(&config.runtime_dir, &identity).map_err(refused)?;
    let map = match &existing {
        Ok(memory) => MapFact::new(Ok(memory.facts()), &previous),
        Err(why) => MapFact::new(Err(why.clone()), &previous),
    };
    let usable = matches!(map, MapFact::Usable { .. });
    let first = record.starts == 1;
    let facts = StartFacts { trust: trusted, map, log: LogFact::new(log), heard: None };
    let state = trust::decide(facts.clone());
    let fresh = !first && state != StartState::UncleanWithMap;
    let maps = match existing {
        Ok(memory) if usable && source => memory,
        _ => MapMemory::create(&config.runtime_dir, &identity).map_err(refused)?,
    };
    let (regions, baseline) = if !source {
        (RegionSet::none(layout), Baseline::Marks)
    } else if first {
        // Nothing was ever synchronised: the first contact says whether to copy or to compare.
        (RegionSet::all(layout), Baseline::Marks)
    } else {
        match state {
            StartState::Clean(Marks::Map) | StartState::UncleanWithMap => {
                let mut set = RegionSet::none(layout);
                let tracker = Tracker::new(maps.clone());
                for disk in tracker.disk_indices() {
                    for e in tracker.all_marks(disk) {
                        let last = watari_core::geometry::Block(e.end().0 - 1);
                        layout.numbers(disk, e.start, last).for_each(|n| set.insert(n));
                    }
                }
                (set, Baseline::Marks)
            }
            StartState::Clean(Marks::Regions(set)) | StartState::UncleanWithLog(set) => {
                let baseline = Baseline::Compare(blocks_of(layout, &set));
                (set, baseline)
            }
            // The log looks right; whether it was written to the end only the peer can tell.
            StartState::FullCompare(FullCompareReason::NoContact { .. }) => {
                (RegionSet::all(layout), Baseline::Unproven)
            }
            StartState::FullCompare(reason) => (RegionSet::all(layout), Baseline::Everything(reason.to_string())),
        }
    };
    let start_id = random_u64();
    maps.facts().begin_start(start_id);
    let begun = trust::begin_start(&config.folder, pair, &previous, 0, start_id, session.0, &files);
    maps.facts().set_session(session.0);
    let header = LogHeader { pair, log_id: random_u64(), session: session.0, sizes: layout.sizes().to_vec() };
    let medium = FileMedium::create(&config.folder, &header, layout, &regions);
    let sink = Arc::new(maps.clone());
    let starts = begun.as_ref().map_or(0, |record| record.starts);
    let regions = match (begun, medium) {
        (Ok(_), Ok(medium)) => {
            maps.facts().confirm_start(start_id);
            // A worker that dies before the peer has spoken leaves a map that nobody believes.
            maps.facts().set_untracked(baseline == Baseline::Unproven);
            RegionLog::start(Box::new(medium), header.log_id, layout.clone(), &regions, sink).map_err(refused)?
        }
        (begun, medium) => {
            let why = begun.err().map(|e| e.to_string()).or(medium.err().map(|e| e.to_string())).unwrap_or_default();
            tracing::error!(why, "the metadata folder cannot be written: the VM is served, its changes are not logged");
            RegionLog::start_untracked(layout.clone(), UntrackedReason::Log(why), sink)
        }
    };
    let facts = (source && !first).then_some(facts);
    Ok(Opened { maps, regions, baseline, fresh, facts, starts })
}

/// A complete new region log in place of one that failed. Every region is in it; what is clean is forgotten later.
pub fn new_log(config: &Config, shared: &Shared, session: Session) -> Result<(), String> {
    let layout = shared.regions.layout().clone();
    let pair = PairId(config.pair.id.0);
    let header = LogHeader { pair, log_id: random_u64(), session: session.0, sizes: layout.sizes().to_vec() };
    let (folder, id) = (config.folder.clone(), header.log_id);
    // The folder may hang: then this attempt is left behind.
    let made = watari_store::regions::within(Duration::from_secs(1), move || {
        FileMedium::create(&folder, &header, &layout, &RegionSet::all(&layout))
    });
    let medium = made.ok_or("the metadata folder hangs")?.map_err(|e| e.to_string())?;
    shared.regions.leave_untracked(Box::new(medium), id, MarksProof::Rebuilt).map_err(|e| e.to_string())
}
