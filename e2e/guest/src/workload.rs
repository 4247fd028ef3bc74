//! The writers and the verifier.
//!
//! A group is a set of disks (raw, or files on ext4) with a layout; each of its streams is one thread that performs the
//! schedule's operations one after the other. Acknowledged means: the write call returned (and fdatasync too, for a
//! durable stream). The count of acknowledged operations is all the state there is; it lives in this memory and moves
//! with it.
//!
//! Does not retry failed writes: an error is counted, its block may then hold either content, and the verdict is not clean.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use watari_guest::block::{BLOCK_BYTES, Content, Stamp};
use watari_guest::check::{Expected, Image, Tally, digest, judge};
use watari_guest::report::{GroupHello, Hello, Stats, StreamStats, Verdict};
use watari_guest::schedule::{Layout, Place};

use crate::direct::{Aligned, CHUNK_BYTES, Target, disk_bytes, virtio_disks};
use crate::gaps::{self, Recorder, elapsed, now_nanos};
use crate::settings::Settings;

/// Disks smaller than this are markers or seeds of others, not ours to write.
const DISK_BYTES_MIN: u64 = 4 << 20;
/// A durable stream gets this share of its group's rate: fsync'd writes are slow, and most of a real load is not fsync'd.
const DURABLE_SHARE: f64 = 0.125;
/// A writer that fell behind by more than this does not catch up: a stop must not be followed by a burst.
const CATCH_UP_NANOS: i64 = 100_000_000;
/// How long `pause` waits for writes in flight before it says that they are not drained, in steps of 1 ms.
const DRAIN_STEPS: u32 = 5_000;

struct Group {
    name: String,
    layout: Layout,
    targets: Vec<Target>,
    /// Digest of each block of the working set at boot, by disk and row; empty when it was not scanned.
    before: Vec<Vec<u64>>,
    found: Vec<Tally>,
}

struct Stream {
    group: Arc<Group>,
    index: u32,
    durable: bool,
    /// Share of the total rate.
    share: f64,
    acknowledged: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    discards: AtomicU64,
    discards_kept: AtomicU64,
    first_errno: AtomicI32,
    slowest: AtomicU64,
    idle: AtomicBool,
    /// Slots whose last operation failed, and that operation.
    uncertain: Mutex<HashMap<u64, u64>>,
}

struct Shared {
    paused: AtomicBool,
    rate: AtomicU64,
    gaps: Arc<Recorder>,
}

/// All groups and their writers.
pub struct Workload {
    groups: Vec<Arc<Group>>,
    streams: Vec<Arc<Stream>>,
    shared: Arc<Shared>,
}

impl Workload {
    /// Opens the disks, reads what they hold and starts the (paused) writers.
    pub fn open(settings: &Settings, gaps: Arc<Recorder>) -> Workload {
        wait_for_disks(settings);
        let raw: Vec<String> = match &settings.raw {
            Some(names) => names.clone(),
            None => virtio_disks()
                .into_iter()
                .filter(|name| !settings.ext4.contains(name) && disk_bytes(name) >= DISK_BYTES_MIN)
                .collect(),
        };
        let file_bytes = (settings.base + settings.blocks + 1) * BLOCK_BYTES as u64;
        let mut groups = Vec::new();
        for (name, disks) in [("raw", &raw), ("ext4", &settings.ext4)] {
            let targets: Vec<Target> = disks
                .iter()
                .filter_map(|disk| {
                    let opened = if name == "raw" { Target::disk(disk) } else { Target::file(disk, file_bytes) };
                    opened.map_err(|error| println!("WATARI-GUEST cannot use {disk}: {error}")).ok()
                })
                .collect();
            groups.extend(Group::new(name, targets, settings).map(Arc::new));
        }
        let shared = Arc::new(Shared { paused: AtomicBool::new(true), rate: AtomicU64::new(settings.rate), gaps });
        let streams: Vec<Arc<Stream>> =
            groups.iter().flat_map(|group| Stream::all_of(group, groups.len())).map(Arc::new).collect();
        for stream in &streams {
            let (stream, shared) = (Arc::clone(stream), Arc::clone(&shared));
            std::thread::Builder::new()
                .name(format!("{}{}", stream.group.name, stream.index))
                .spawn(move || stream.run(&shared))
                .expect("a booted guest has memory for its writers");
        }
        Workload { groups, streams, shared }
    }

    pub fn hello(&self) -> Hello {
        Hello {
            kernel: crate::boot::read_or_empty("/proc/sys/kernel/osrelease").trim().to_owned(),
            uptime_seconds: crate::boot::uptime_seconds(),
            groups: self
                .groups
                .iter()
                .map(|group| GroupHello {
                    name: group.name.clone(),
                    disks: group.targets.iter().map(|target| target.name.clone()).collect(),
                    layout: group.layout,
                    found: group.found.clone(),
                })
                .collect(),
            clock_anomalies: gaps::anomalies(),
        }
    }

    pub fn set_rate(&self, bytes_per_second: u64) {
        self.shared.rate.store(bytes_per_second, Ordering::Relaxed);
    }

    pub fn reset_gaps(&self) {
        self.shared.gaps.reset();
        for stream in &self.streams {
            stream.slowest.store(0, Ordering::Relaxed);
        }
    }

    pub fn resume(&self) {
        self.shared.gaps.fsync_interrupted();
        self.shared.paused.store(false, Ordering::SeqCst);
    }

    /// Stops the writers; false when a write is still in flight after a few seconds (call again).
    pub fn pause(&self) -> bool {
        self.shared.paused.store(true, Ordering::SeqCst);
        for _ in 0..DRAIN_STEPS {
            if self.drained() {
                self.shared.gaps.fsync_interrupted();
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    fn drained(&self) -> bool {
        self.shared.paused.load(Ordering::SeqCst)
            && self.streams.iter().all(|stream| stream.idle.load(Ordering::SeqCst))
    }

    pub fn stats(&self) -> Stats {
        Stats {
            paused: self.drained(),
            rate: self.shared.rate.load(Ordering::Relaxed),
            streams: self.streams.iter().map(|stream| stream.stats()).collect(),
            gaps: self.shared.gaps.read(),
            clock_anomalies: gaps::anomalies(),
        }
    }

    /// Flushes every disk: what was written without fsync is durable afterwards too.
    pub fn sync(&self) -> io::Result<()> {
        self.groups.iter().flat_map(|group| &group.targets).try_for_each(|target| target.writer.sync_all())
    }

    /// Reads the whole working set back and judges every block. The writers must be paused.
    pub fn verify(&self) -> io::Result<Verdict> {
        if !self.drained() {
            return Err(io::Error::other("writes are in flight: pause first"));
        }
        let start = now_nanos();
        self.sync()?;
        // What is read must come from the disk, not from the guest's cache of the file system's own metadata.
        std::fs::write("/proc/sys/vm/drop_caches", "3")?;
        let groups = self.groups.iter().map(|group| self.verify_group(group)).collect();
        let errors = self.streams.iter().map(|stream| stream.errors.load(Ordering::Relaxed)).sum();
        Ok(Verdict { groups, errors, seconds: elapsed(start, now_nanos()) as f64 / 1e9 })
    }

    fn verify_group(&self, group: &Arc<Group>) -> Tally {
        let mut tally = Tally { name: group.name.clone(), run: group.layout.run, ..Tally::default() };
        let streams: Vec<_> = self.streams.iter().filter(|stream| Arc::ptr_eq(&stream.group, group)).collect();
        tally.acknowledged = streams.iter().map(|stream| stream.acknowledged.load(Ordering::SeqCst)).collect();
        let newest: Vec<Vec<u64>> =
            streams.iter().zip(&tally.acknowledged).map(|(s, &count)| group.layout.newest(s.index, count)).collect();
        group.read(|place, result| {
            let (content, bytes) = match result {
                Ok(read) => read,
                Err(error) => return tally.unreadable(place, &error.to_string()),
            };
            let row = (place.block - group.layout.base) as usize;
            let before = group.before.get(place.disk as usize).map(|rows| rows[row]);
            let expected = match group.layout.owner(place) {
                None => Expected::Untouched(before),
                Some((stream, slot)) => match newest[stream as usize][slot as usize] {
                    0 => Expected::Untouched(before),
                    sequence => Expected::Operation {
                        sequence,
                        zero: group.layout.operation(stream, sequence).zero,
                        or: streams[stream as usize].uncertain(slot, sequence),
                    },
                },
            };
            judge(&mut tally, &group.layout, place, &content, bytes, expected);
        });
        tally
    }
}

/// Virtio disks appear a moment after their driver was loaded: waits until none has appeared for a while.
fn wait_for_disks(settings: &Settings) {
    let wanted = settings.raw.iter().flatten().chain(&settings.ext4).cloned().collect::<Vec<_>>();
    let mut stable = 0;
    let mut seen = 0;
    for _ in 0..500 {
        let disks = virtio_disks();
        stable = if disks.len() == seen && seen > 0 { stable + 1 } else { 0 };
        seen = disks.len();
        if !wanted.is_empty() && wanted.iter().all(|name| disks.contains(name)) || wanted.is_empty() && stable >= 5 {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn random_u64() -> u64 {
    let mut bytes = [0u8; 8];
    // SAFETY: fills eight bytes of a live array; after boot the pool is ready, and 8 bytes are never returned in part.
    unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    u64::from_le_bytes(bytes)
}

impl Group {
    fn new(name: &str, targets: Vec<Target>, settings: &Settings) -> Option<Group> {
        let smallest = targets.iter().map(|target| target.bytes / BLOCK_BYTES as u64).min()?;
        let born = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let layout = Layout {
            run: random_u64(),
            born,
            base: settings.base,
            // A shifted last block would reach beyond the end.
            blocks: settings.blocks.min(smallest.saturating_sub(settings.base + u64::from(settings.shift > 0))),
            disks: u16::try_from(targets.len()).expect("a machine has few disks"),
            streams: settings.streams,
            random_percent: settings.random_percent,
            zero_percent: settings.zero_percent,
            shift: settings.shift,
        };
        if !layout.plausible() {
            println!("WATARI-GUEST leaves group {name} alone: no room for {} streams", settings.streams);
            return None;
        }
        let mut group = Group { name: name.to_owned(), layout, targets, before: Vec::new(), found: Vec::new() };
        if settings.scan {
            group.scan();
        }
        Some(group)
    }

    fn scan(&mut self) {
        let mut before = vec![vec![0; self.layout.blocks as usize]; self.targets.len()];
        let mut image = Image::default();
        self.read(|place, result| {
            if let Ok((content, bytes)) = result {
                before[place.disk as usize][(place.block - self.layout.base) as usize] = digest(&content, bytes);
                image.add(place, content);
            }
        });
        self.before = before;
        self.found = image.judge(None);
    }

    /// Reads the working set of every disk and hands it out block by block.
    fn read(&self, mut each: impl FnMut(Place, io::Result<(Content, &[u8])>)) {
        let mut buffer = Aligned::new(CHUNK_BYTES);
        let chunk_blocks = (CHUNK_BYTES / BLOCK_BYTES) as u64;
        for (disk, target) in (0u32..).zip(&self.targets) {
            let mut row = 0;
            while row < self.layout.blocks {
                let blocks = chunk_blocks.min(self.layout.blocks - row);
                let chunk = &mut buffer.get()[..blocks as usize * BLOCK_BYTES];
                let first = self.layout.base + row;
                let read = target.reader.read_exact_at(chunk, self.layout.offset(first));
                for (block, bytes) in (first..).zip(chunk.chunks_exact(BLOCK_BYTES)) {
                    let result = match &read {
                        Ok(()) => Ok((Stamp::read(bytes), bytes)),
                        Err(error) => Err(io::Error::from(error.kind())),
                    };
                    each(Place { disk, block }, result);
                }
                row += blocks;
            }
        }
    }
}

impl Stream {
    fn all_of(group: &Arc<Group>, groups: usize) -> Vec<Stream> {
        let count = u32::from(group.layout.streams);
        let (plain, durable) = (count.div_ceil(2), count / 2);
        (0..count)
            .map(|index| {
                let is_durable = index % 2 == 1;
                let share = match (is_durable, durable) {
                    (true, _) => DURABLE_SHARE / f64::from(durable),
                    (false, 0) => 1.0 / f64::from(plain),
                    (false, _) => (1.0 - DURABLE_SHARE) / f64::from(plain),
                };
                Stream {
                    group: Arc::clone(group),
                    index,
                    durable: is_durable,
                    share: share / groups as f64,
                    acknowledged: AtomicU64::new(0),
                    bytes: AtomicU64::new(0),
                    errors: AtomicU64::new(0),
                    discards: AtomicU64::new(0),
                    discards_kept: AtomicU64::new(0),
                    first_errno: AtomicI32::new(0),
                    slowest: AtomicU64::new(0),
                    idle: AtomicBool::new(false),
                    uncertain: Mutex::new(HashMap::new()),
                }
            })
            .collect()
    }

    fn stats(&self) -> StreamStats {
        StreamStats {
            group: self.group.name.clone(),
            stream: self.index,
            durable: self.durable,
            acknowledged: self.acknowledged.load(Ordering::SeqCst),
            bytes: self.bytes.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            discards: self.discards.load(Ordering::Relaxed),
            discards_kept: self.discards_kept.load(Ordering::Relaxed),
            first_errno: self.first_errno.load(Ordering::Relaxed),
            slowest_ms: self.slowest.load(Ordering::Relaxed) as f64 / 1e6,
        }
    }

    /// The operation that failed on this slot, when it is still the newest there.
    fn uncertain(&self, slot: u64, sequence: u64) -> Option<u64> {
        let uncertain = self.uncertain.lock().expect("no holder of this lock panics: a panic ends the machine");
        uncertain.get(&slot).copied().filter(|&failed| failed >= sequence)
    }

    fn run(&self, shared: &Shared) {
        let mut buffer = Aligned::new(BLOCK_BYTES);
        let mut due = now_nanos();
        loop {
            let rate = (shared.rate.load(Ordering::Relaxed) as f64 * self.share).max(0.0);
            if shared.paused.load(Ordering::SeqCst) || rate < 1.0 {
                self.idle.store(true, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(1));
                due = now_nanos();
                continue;
            }
            self.idle.store(false, Ordering::SeqCst);
            // `pause` may have been given between the two lines above; it waits for `idle`, so look again.
            if shared.paused.load(Ordering::SeqCst) {
                continue;
            }
            let now = now_nanos();
            if due > now + CATCH_UP_NANOS * 100 || due < now - CATCH_UP_NANOS {
                due = now;
            }
            if due > now {
                // Short naps, so that a pause is obeyed soon and a leaping clock cannot put a writer to sleep for long.
                std::thread::sleep(Duration::from_nanos((due - now).min(CATCH_UP_NANOS) as u64));
                continue;
            }
            due += (BLOCK_BYTES as f64 / rate * 1e9) as i64;
            self.step(&mut buffer, shared);
        }
    }

    fn zero(&self, target: &Target, offset: u64, discard: bool, buffer: &mut [u8]) -> io::Result<()> {
        if discard {
            self.discards.fetch_add(1, Ordering::Relaxed);
            if target.discard(offset, buffer)? {
                return Ok(());
            }
            self.discards_kept.fetch_add(1, Ordering::Relaxed);
        }
        target.zero(offset, buffer)
    }

    /// Performs the next operation and counts it.
    fn step(&self, buffer: &mut Aligned, shared: &Shared) {
        let sequence = self.acknowledged.load(Ordering::SeqCst) + 1;
        let operation = self.group.layout.operation(self.index, sequence);
        let target = &self.group.targets[operation.place.disk as usize];
        let offset = self.group.layout.offset(operation.place.block);
        let start = now_nanos();
        let written = if operation.zero {
            self.zero(target, offset, operation.discard, buffer.get())
        } else {
            let Place { disk, block } = operation.place;
            Stamp { layout: self.group.layout, stream: self.index, sequence, disk, block }.fill(buffer.get());
            target.writer.write_all_at(buffer.get(), offset)
        };
        let result = written.and_then(|()| if self.durable { target.writer.sync_data() } else { Ok(()) });
        let end = now_nanos();
        self.slowest.fetch_max(elapsed(start, end) as u64, Ordering::Relaxed);
        let mut uncertain = self.uncertain.lock().expect("no holder of this lock panics: a panic ends the machine");
        match result {
            Ok(()) => {
                uncertain.remove(&operation.slot);
                self.bytes.fetch_add(BLOCK_BYTES as u64, Ordering::Relaxed);
                if self.durable {
                    shared.gaps.fsynced(end);
                }
            }
            Err(error) => {
                println!("WATARI-GUEST {} operation {sequence}: {error}", target.name);
                uncertain.insert(operation.slot, sequence);
                self.errors.fetch_add(1, Ordering::Relaxed);
                let errno = error.raw_os_error().unwrap_or(-1);
                let _ = self.first_errno.compare_exchange(0, errno, Ordering::Relaxed, Ordering::Relaxed);
            }
        }
        self.acknowledged.store(sequence, Ordering::SeqCst);
    }
}
