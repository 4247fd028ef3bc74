//! Power loss at every point of the region log's life: recorded writes and syncs, replayed with any subset of what was
//! not yet synced, torn at any byte of a sector.
//!
//! `kill -9` proves nothing about fsync, so this does: the recorder notes every write and sync, and, between them, when
//! the test was told that a region is logged and when it began to forget one. At every prefix of that record each region
//! that was promised and not forgotten since must read as dirty.

use std::io;
use std::sync::{Arc, Mutex};

use watari_core::geometry::{Block, DiskIndex};
use watari_core::regions::log::{self, LogHeader, SECTOR_BYTES};
use watari_core::regions::{PairId, REGION_BLOCKS, REGION_BYTES, RegionLayout, RegionSet};
use watari_store::regions::{Logged, RegionLog, RegionMedium, UntrackedReason, UntrackedSink};

const PAIR: PairId = PairId([4; 16]);
const DISK: DiskIndex = DiskIndex(0);
const REGIONS: u64 = 12_000;

#[derive(Clone, Debug)]
enum Event {
    Write {
        offset: usize,
        data: Vec<u8>,
    },
    Synced,
    /// `ensure_logged` returned for this region.
    Promised(u64),
    /// `forget` is about to be called for this region.
    Forgetting(u64),
    Failed,
}

#[derive(Clone, Default)]
struct Recorder {
    events: Arc<Mutex<Vec<Event>>>,
    /// The write or sync with this number fails, and nothing after it is called.
    fails_at: Option<usize>,
    calls: usize,
}

impl Recorder {
    fn note(&self, event: Event) {
        self.events.lock().expect("lock").push(event);
    }
    fn fault(&mut self) -> io::Result<()> {
        self.calls += 1;
        if self.fails_at.is_some_and(|at| self.calls > at) {
            assert_eq!(self.fails_at.map(|at| at + 1), Some(self.calls), "nothing is tried again after a failure");
            self.note(Event::Failed);
            return Err(io::Error::from_raw_os_error(5));
        }
        Ok(())
    }
}

impl RegionMedium for Recorder {
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        // Also a failing write may have reached the medium in part.
        self.note(Event::Write { offset: offset as usize, data: data.to_vec() });
        self.fault()
    }
    fn sync(&mut self) -> io::Result<()> {
        self.fault()?;
        self.note(Event::Synced);
        Ok(())
    }
    fn invalidate(&mut self) {}
}

struct NoSink;
impl UntrackedSink for NoSink {
    fn enter(&self, _: &UntrackedReason) {}
    fn leave(&self) {}
}

struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

fn layout() -> RegionLayout {
    RegionLayout::new(&[REGIONS * REGION_BYTES]).expect("layout")
}

/// A seeded life of a log; returns what it began with and everything that happened.
fn live(seed: u64, fails_at: Option<usize>) -> (Vec<u8>, Vec<Event>) {
    let mut random = Random(seed);
    let none = RegionSet::none(&layout());
    let header = LogHeader { pair: PAIR, log_id: seed, session: 1, sizes: layout().sizes().into() };
    let begin = log::encode_file(&header, &layout(), &none);
    let recorder = Recorder { fails_at, ..Recorder::default() };
    let region_log =
        RegionLog::start(Box::new(recorder.clone()), seed, layout(), &none, Arc::new(NoSink)).expect("log");
    let mut promised: Vec<u64> = Vec::new();
    for _ in 0..60 {
        if random.below(4) == 0 && !promised.is_empty() {
            let some: Vec<u64> = promised.iter().copied().filter(|_| random.below(2) == 0).collect();
            some.iter().for_each(|&r| recorder.note(Event::Forgetting(r)));
            let numbers: Vec<usize> = some.iter().map(|&r| r as usize).collect();
            region_log.forget(&numbers, |_, _, _| true);
            promised.retain(|r| !some.contains(r));
        } else {
            let region = random.below(REGIONS);
            let block = Block(region * REGION_BLOCKS);
            if region_log.ensure_logged(DISK, block, block) == Logged::Logged {
                recorder.note(Event::Promised(region));
                promised.push(region);
            }
        }
    }
    region_log.close();
    let events = recorder.events.lock().expect("lock").clone();
    (begin, events)
}

/// What may lie on the medium: the synced image, and for each unsynced write whether and how it arrived.
fn after_power_loss(image: &[u8], unsynced: &[(usize, Vec<u8>)], random: &mut Random) -> Vec<u8> {
    let mut image = image.to_vec();
    let mut order: Vec<usize> = (0..unsynced.len()).collect();
    for at in (1..order.len()).rev() {
        order.swap(at, random.below(at as u64 + 1) as usize);
    }
    for write in order {
        let (offset, data) = &unsynced[write];
        for (at, sector) in data.chunks(SECTOR_BYTES).enumerate() {
            let kept = match random.below(4) {
                0 => 0,
                1 => random.below(sector.len() as u64 + 1) as usize,
                _ => sector.len(),
            };
            let from = offset + at * SECTOR_BYTES;
            image[from..from + kept].copy_from_slice(&sector[..kept]);
        }
    }
    image
}

/// Check every prefix; returns the number of images looked at and of torn sectors met.
fn check(seed: u64, begin: &[u8], events: &[Event]) -> Result<(usize, u32), String> {
    let mut random = Random(seed ^ 0x5eed);
    let mut image = begin.to_vec();
    let mut unsynced: Vec<(usize, Vec<u8>)> = Vec::new();
    let mut promised = std::collections::BTreeSet::new();
    let (mut images, mut torn) = (0, 0);
    for (at, event) in events.iter().enumerate() {
        match event {
            Event::Write { offset, data } => unsynced.push((*offset, data.clone())),
            Event::Synced => {
                for (offset, data) in unsynced.drain(..) {
                    image[offset..offset + data.len()].copy_from_slice(&data);
                }
            }
            Event::Promised(region) => {
                promised.insert(*region);
            }
            Event::Forgetting(region) => {
                promised.remove(region);
            }
            Event::Failed => {}
        }
        for _ in 0..4 {
            let lost = after_power_loss(&image, &unsynced, &mut random);
            let read = log::decode_file(&lost, PAIR, &layout()).expect("the header is never overwritten");
            if let Some(region) = promised.iter().find(|&&region| !read.dirty.contains(region as usize)) {
                return Err(format!(
                    "seed {seed}: power lost after event {at} of {}: region {region} was promised and reads as clean",
                    events.len()
                ));
            }
            images += 1;
            torn += read.bad_sectors;
        }
    }
    Ok((images, torn))
}

#[test]
fn power_loss_at_every_point_finds_every_promised_region_dirty() {
    let (mut images, mut torn) = (0, 0);
    for seed in 1..=40 {
        let (begin, events) = live(seed, None);
        let (i, t) = check(seed, &begin, &events).expect("nothing is lost");
        images += i;
        torn += t;
        // What was forgotten is really gone at the end, or the log would only ever grow.
        let promised = events.iter().filter(|e| matches!(e, Event::Promised(_))).count();
        let forgotten = events.iter().filter(|e| matches!(e, Event::Forgetting(_))).count();
        assert!(promised > 20 && forgotten > 5, "seed {seed}: {promised} promised, {forgotten} forgotten");
    }
    println!("{images} images after power loss, {torn} torn sectors among them");
    assert!(images > 10_000 && torn > 100);
}

#[test]
fn power_loss_after_a_failed_write_or_sync_finds_every_promised_region_dirty() {
    let mut failures = 0;
    for seed in 1..=8 {
        for fails_at in 0..24 {
            let (begin, events) = live(seed, Some(fails_at));
            failures += events.iter().filter(|e| matches!(e, Event::Failed)).count();
            check(seed, &begin, &events).expect("nothing is lost");
        }
    }
    assert!(failures >= 150, "{failures} faults were met");
}

#[test]
fn the_proof_can_fail() {
    // A log that promises before it syncs is found out.
    let mut found = 0;
    for seed in 1..=10 {
        let (begin, mut events) = live(seed, None);
        for at in 1..events.len() {
            if let (Event::Synced, Event::Promised(_)) = (&events[at - 1], &events[at]) {
                events.swap(at - 1, at);
            }
        }
        found += usize::from(check(seed, &begin, &events).is_err());
    }
    assert!(found >= 8, "only {found} of 10 lives show a promise before its sync");
}
