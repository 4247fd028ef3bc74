//! The tracker: which blocks the guest has written since when. The one part of the core on the guest's hot path.
//!
//! Invariants: **I1** a mark precedes its write, and no mark is cleared while a write to its block is in flight;
//! **I2** a cut is one instant for all disks; **I3** a frozen, unsent block is read or preserved before it is
//! overwritten (linearised on its `frozen` bit: whoever clears it owns the old content).
//!
//! A guest write is: [`Tracker::begin`] (inside the admission gate: in-flight slot, mark) → preserve what
//! is frozen ([`Tracker::frozen_in`], [`Tracker::claim_for`]) → write the disk → [`Tracker::finish`].
//! A cut closes the gate, flips the two maps and reopens; it waits for no I/O. A write in flight at that instant is
//! marked in both maps and the sender waits for it ([`Tracker::writes_before_cut`]).
//!
//! It does not read or write disks, keep preserved content, or know about the peer.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};

use crate::{
    geometry::{Block, DiskIndex, Extent},
    limits,
};

/// The three bitmaps of a disk. `First` and `Second` take turns at being `current` and `frozen`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapName {
    First,
    Second,
    /// Sent, not yet committed.
    Staged,
}

/// Memory for the bitmaps, one bit per block. The real one survives the process; tests use [`HeapMaps`].
pub trait Maps: Send + Sync {
    fn disks(&self) -> u16;
    /// Blocks of the disk.
    fn blocks(&self, disk: DiskIndex) -> u64;
    /// At least `blocks / 64` words, rounded up; bits beyond the disk stay zero.
    fn words(&self, disk: DiskIndex, map: MapName) -> &[AtomicU64];
    /// Whether the words for `[first, last]` may be touched without a fault (lazily allocated memory). `false`: no
    /// memory; the caller must go `Untracked` instead of marking.
    fn ensure(&self, disk: DiskIndex, first: Block, last: Block) -> bool;
    /// Whether this word was never ensured and so reads as zero; lets scans skip absent memory.
    fn absent(&self, disk: DiskIndex, map: MapName, word: usize) -> bool;
}

/// Bitmaps on the heap, for tests, simulation and tools.
pub struct HeapMaps {
    disks: Vec<(u64, [Vec<AtomicU64>; 3])>,
}

impl HeapMaps {
    /// One entry per disk: its number of blocks.
    pub fn new(blocks: &[u64]) -> Self {
        let words = |n: u64| (0..n.div_ceil(64)).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
        HeapMaps { disks: blocks.iter().map(|&n| (n, [words(n), words(n), words(n)])).collect() }
    }
}

impl Maps for HeapMaps {
    fn disks(&self) -> u16 {
        self.disks.len() as u16
    }
    fn blocks(&self, disk: DiskIndex) -> u64 {
        self.disks[usize::from(disk.0)].0
    }
    fn words(&self, disk: DiskIndex, map: MapName) -> &[AtomicU64] {
        let maps = &self.disks[usize::from(disk.0)].1;
        match map {
            MapName::First => &maps[0],
            MapName::Second => &maps[1],
            MapName::Staged => &maps[2],
        }
    }
    fn ensure(&self, _: DiskIndex, _: Block, _: Block) -> bool {
        true
    }
    fn absent(&self, _: DiskIndex, _: MapName, _: usize) -> bool {
        false
    }
}

/// One write in flight. `state` is 0 when free, [`SLOT_TAKEN`] while being filled, else the cut count at admission + 1.
struct Slot {
    state: AtomicU64,
    disk: AtomicU32,
    first: AtomicU64,
    last: AtomicU64,
}

const SLOT_TAKEN: u64 = u64::MAX;

/// Proof that a write was admitted and marked. Must be given back with [`Tracker::finish`].
#[must_use = "a write that is never finished blocks every later cut from being sent"]
#[derive(Debug)]
pub struct Ticket {
    slot: u32,
    pub disk: DiskIndex,
    pub first: Block,
    pub last: Block,
    /// Cuts made before this write was admitted.
    pub cut: u64,
    /// A generation is open: frozen blocks may have to be preserved before the write.
    pub generation_open: bool,
}

/// What became of a write at the gate.
#[derive(Debug)]
pub enum Admission {
    Go(Ticket),
    /// Its regions are not in the durable log yet: log them outside the gate and come again.
    NotLogged,
    /// Sealed: no guest write is accepted at this side now.
    Sealed,
}

/// See the module's header.
pub struct Tracker<M> {
    maps: M,
    /// Writers inside the gate; `closed` keeps new ones out.
    inside: AtomicU64,
    closed: AtomicBool,
    sealed: AtomicBool,
    /// Number of cuts so far; its parity says which map is `current`.
    cuts: AtomicU64,
    open: AtomicBool,
    slots: Vec<Slot>,
    hint: AtomicU32,
    counts: Vec<[AtomicU64; 3]>,
}

fn index(map: MapName) -> usize {
    match map {
        MapName::First => 0,
        MapName::Second => 1,
        MapName::Staged => 2,
    }
}

/// Bits `[lo, hi]` of a word.
fn mask(lo: u32, hi: u32) -> u64 {
    (u64::MAX << lo) & (u64::MAX >> (63 - hi))
}

impl<M: Maps> Tracker<M> {
    /// Takes the maps as they are; after a crash call [`Tracker::adopt`] first.
    pub fn new(maps: M) -> Self {
        let counts = (0..maps.disks()).map(|_| [AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0)]).collect();
        let slots = (0..limits::WRITES_IN_FLIGHT_MAX)
            .map(|_| Slot {
                state: AtomicU64::new(0),
                disk: AtomicU32::new(0),
                first: AtomicU64::new(0),
                last: AtomicU64::new(0),
            })
            .collect();
        let tracker = Tracker {
            maps,
            inside: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            sealed: AtomicBool::new(false),
            cuts: AtomicU64::new(0),
            open: AtomicBool::new(false),
            slots,
            hint: AtomicU32::new(0),
            counts,
        };
        for disk in tracker.disk_indices() {
            for map in [MapName::First, MapName::Second, MapName::Staged] {
                let n = tracker.present_words(disk, map).map(|(_, w)| u64::from(w.load(SeqCst).count_ones())).sum();
                tracker.counts[usize::from(disk.0)][index(map)].store(n, SeqCst);
            }
        }
        tracker
    }

    pub fn maps(&self) -> &M {
        &self.maps
    }

    pub fn disk_indices(&self) -> impl Iterator<Item = DiskIndex> + use<M> {
        (0..self.maps.disks()).map(DiskIndex)
    }

    /// After an unclean end of the process nothing is known of what was sent: every mark goes back to `current`.
    pub fn adopt(&self) {
        assert!(!self.open.load(SeqCst), "adopt is for a start, not for a running generation");
        self.close_gate();
        for disk in self.disk_indices() {
            self.pour(disk, self.frozen_name(), self.current_name());
            self.pour(disk, MapName::Staged, self.current_name());
        }
        self.open_gate();
    }

    pub fn current_name(&self) -> MapName {
        if self.cuts.load(SeqCst).is_multiple_of(2) { MapName::First } else { MapName::Second }
    }

    fn frozen_name(&self) -> MapName {
        if self.cuts.load(SeqCst).is_multiple_of(2) { MapName::Second } else { MapName::First }
    }

    /// Marked blocks.
    pub fn count(&self, disk: DiskIndex, map: MapName) -> u64 {
        self.counts[usize::from(disk.0)][index(map)].load(SeqCst)
    }

    pub fn current_blocks(&self) -> u64 {
        self.disk_indices().map(|d| self.count(d, self.current_name())).sum()
    }

    pub fn frozen_blocks(&self) -> u64 {
        self.disk_indices().map(|d| self.count(d, self.frozen_name())).sum()
    }

    pub fn staged_blocks(&self) -> u64 {
        self.disk_indices().map(|d| self.count(d, MapName::Staged)).sum()
    }

    // ---- the guest's side

    /// Admit a write to `[first, last]`: take an in-flight slot and mark the blocks, unless sealed or not logged.
    /// `logged` is called inside the gate and must only load memory. The maps must have been ensured.
    pub fn begin(&self, disk: DiskIndex, first: Block, last: Block, logged: impl Fn() -> bool) -> Admission {
        self.enter();
        if self.sealed.load(SeqCst) {
            self.leave();
            return Admission::Sealed;
        }
        if !logged() {
            self.leave();
            return Admission::NotLogged;
        }
        let cut = self.cuts.load(SeqCst);
        let slot = self.take_slot(disk, first, last, cut);
        let generation_open = self.open.load(SeqCst);
        self.set(disk, self.current_name(), first, last);
        self.leave();
        Admission::Go(Ticket { slot, disk, first, last, cut, generation_open })
    }

    /// The write has reached the disk (or failed): its slot is free. The mark stays either way.
    pub fn finish(&self, ticket: Ticket) {
        self.slots[ticket.slot as usize].state.store(0, SeqCst);
    }

    fn enter(&self) {
        loop {
            self.inside.fetch_add(1, SeqCst);
            if !self.closed.load(SeqCst) {
                return;
            }
            self.inside.fetch_sub(1, SeqCst);
            while self.closed.load(SeqCst) {
                core::hint::spin_loop();
            }
        }
    }

    fn leave(&self) {
        self.inside.fetch_sub(1, SeqCst);
    }

    fn close_gate(&self) {
        while self.closed.swap(true, SeqCst) {
            core::hint::spin_loop();
        }
        while self.inside.load(SeqCst) != 0 {
            core::hint::spin_loop();
        }
    }

    fn open_gate(&self) {
        self.closed.store(false, SeqCst);
    }

    fn take_slot(&self, disk: DiskIndex, first: Block, last: Block, cut: u64) -> u32 {
        let n = self.slots.len() as u32;
        let mut i = self.hint.fetch_add(1, SeqCst) % n;
        loop {
            let slot = &self.slots[i as usize];
            if slot.state.load(SeqCst) == 0 && slot.state.compare_exchange(0, SLOT_TAKEN, SeqCst, SeqCst).is_ok() {
                slot.disk.store(u32::from(disk.0), SeqCst);
                slot.first.store(first.0, SeqCst);
                slot.last.store(last.0, SeqCst);
                slot.state.store(cut + 1, SeqCst);
                return i;
            }
            i = (i + 1) % n;
            core::hint::spin_loop();
        }
    }

    /// Frozen blocks within `[first, last]`: what a write must preserve before it goes to the disk.
    pub fn frozen_in(&self, disk: DiskIndex, first: Block, last: Block) -> Vec<Extent> {
        let mut out = Vec::new();
        self.extents_within(disk, self.frozen_name(), first, last, u64::MAX, &mut out);
        out
    }

    /// The writer's claim on the old content of a frozen block; a writer that wins must keep what it read before. Only for
    /// the generation that was open when it was admitted: a cut since then counts this write as in flight, the sender
    /// waits for it, and what it read may be older than that cut. Inside the gate, because a cut turns the maps: a claim
    /// in mid-air would clear a mark of `current`.
    pub fn claim_for(&self, ticket: &Ticket, block: Block) -> bool {
        self.enter();
        let won = self.cuts.load(SeqCst) == ticket.cut && self.claim_frozen(ticket.disk, block);
        self.leave();
        won
    }

    /// Take the old content of a frozen block over: `true` for exactly one caller. For the sender, which may then use
    /// what it read before (no cut is made while a read is outstanding); writers use [`Tracker::claim_for`].
    pub fn claim_frozen(&self, disk: DiskIndex, block: Block) -> bool {
        self.clear_one(disk, self.frozen_name(), block)
    }

    /// A write that was admitted before cut number `cut` is still in flight somewhere in `[first, last]`.
    pub fn writes_before_cut(&self, cut: u64, disk: DiskIndex, first: Block, last: Block) -> bool {
        self.any_slot(disk, first, last, |state| state <= cut)
    }

    fn any_slot(&self, disk: DiskIndex, first: Block, last: Block, matters: impl Fn(u64) -> bool) -> bool {
        self.slots.iter().any(|slot| {
            let state = slot.state.load(SeqCst);
            if state == 0 {
                return false;
            }
            // A slot being filled belongs to a write that has not marked yet; its mark will be seen later.
            if state == SLOT_TAKEN {
                return matters(u64::MAX);
            }
            matters(state)
                && slot.disk.load(SeqCst) == u32::from(disk.0)
                && slot.first.load(SeqCst) <= last.0
                && slot.last.load(SeqCst) >= first.0
        })
    }

    /// Writes admitted and not finished.
    pub fn writes_in_flight(&self) -> usize {
        self.slots.iter().filter(|s| s.state.load(SeqCst) != 0).count()
    }

    // ---- cut and seal

    /// Make the cut: returns its number. No generation may be open, and no early read outstanding.
    pub fn cut(&self) -> u64 {
        assert!(!self.open.load(SeqCst), "one generation at a time");
        self.close_gate();
        debug_assert_eq!(self.frozen_blocks(), 0, "frozen is empty between generations");
        let cut = self.cuts.fetch_add(1, SeqCst) + 1;
        let current = self.current_name();
        for slot in &self.slots {
            if slot.state.load(SeqCst) != 0 {
                let disk = DiskIndex(slot.disk.load(SeqCst) as u16);
                let (first, last) = (Block(slot.first.load(SeqCst)), Block(slot.last.load(SeqCst)));
                self.set(disk, current, first, last);
            }
        }
        self.open.store(true, SeqCst);
        self.open_gate();
        cut
    }

    /// The open generation is finished: everything frozen was claimed.
    pub fn close_generation(&self) {
        assert_eq!(self.frozen_blocks(), 0, "a generation closes when every frozen block was read or preserved");
        self.open.store(false, SeqCst);
    }

    /// Give the open generation up: frozen blocks return to `current`.
    pub fn give_up(&self) {
        self.open.store(false, SeqCst);
        for disk in self.disk_indices() {
            self.pour(disk, self.frozen_name(), self.current_name());
        }
    }

    pub fn generation_open(&self) -> bool {
        self.open.load(SeqCst)
    }

    /// From the return of this call on no guest write is admitted; those in flight drain ([`Tracker::writes_in_flight`]).
    pub fn seal(&self) {
        self.close_gate();
        self.sealed.store(true, SeqCst);
        self.open_gate();
    }

    pub fn unseal(&self) {
        self.sealed.store(false, SeqCst);
    }

    pub fn is_sealed(&self) -> bool {
        self.sealed.load(SeqCst)
    }

    /// Run `f` while no write can be admitted. For short bookkeeping that must not race with marks (forgetting regions).
    pub fn with_gate_closed<R>(&self, f: impl FnOnce() -> R) -> R {
        self.close_gate();
        let r = f();
        self.open_gate();
        r
    }

    /// Any mark in any map, or a write in flight, within `[first, last]`.
    pub fn any_mark(&self, disk: DiskIndex, first: Block, last: Block) -> bool {
        let mut found = Vec::new();
        for map in [MapName::First, MapName::Second, MapName::Staged] {
            self.extents_within(disk, map, first, last, 1, &mut found);
        }
        !found.is_empty() || self.any_slot(disk, first, last, |_| true)
    }

    // ---- the sender's side

    /// Up to `blocks_max` frozen blocks of one disk from `from` on, as at most [`limits::FRAME_EXTENTS_MAX`] extents.
    pub fn frozen_from(&self, disk: DiskIndex, from: Block, blocks_max: u64) -> Vec<Extent> {
        self.scan(disk, self.frozen_name(), from, blocks_max)
    }

    /// The same for `current`.
    pub fn current_from(&self, disk: DiskIndex, from: Block, blocks_max: u64) -> Vec<Extent> {
        self.scan(disk, self.current_name(), from, blocks_max)
    }

    /// Begin an early read: the extents' marks move from `current` to `staged`. What has a write in flight goes back
    /// at once and is not returned. Read the returned extents from the disk, then call [`Tracker::overwritten`].
    pub fn take_current(&self, disk: DiskIndex, extents: &[Extent]) -> Vec<Extent> {
        let current = self.current_name();
        let mut taken = Vec::with_capacity(extents.len());
        for e in extents {
            let last = Block(e.end().0 - 1);
            self.set(disk, MapName::Staged, e.start, last);
            self.clear(disk, current, e.start, last);
            // I1: the slot is filled before the mark, so a write whose mark was just cleared is seen here.
            if self.any_slot(disk, e.start, last, |_| true) {
                self.set(disk, current, e.start, last);
            } else {
                taken.push(*e);
            }
        }
        taken
    }

    /// Whether the block was marked again (so what was read early may be torn or old).
    pub fn overwritten(&self, disk: DiskIndex, block: Block) -> bool {
        let word = &self.maps.words(disk, self.current_name())[(block.0 / 64) as usize];
        word.load(SeqCst) >> (block.0 % 64) & 1 == 1
    }

    /// Mark blocks as sent. Comes before their frozen bit is cleared, so that a crash between loses no mark.
    pub fn stage(&self, disk: DiskIndex, extent: Extent) {
        self.set(disk, MapName::Staged, extent.start, Block(extent.end().0 - 1));
    }

    /// Forget that blocks were sent (I5: only after a durable commit and the source's own fdatasync), or because they return.
    pub fn unstage(&self, disk: DiskIndex, extent: Extent) {
        self.clear(disk, MapName::Staged, extent.start, Block(extent.end().0 - 1));
    }

    /// Blocks must be sent (again): mark them in `current`. The maps must have been ensured.
    pub fn mark(&self, disk: DiskIndex, extent: Extent) {
        self.set(disk, self.current_name(), extent.start, Block(extent.end().0 - 1));
    }

    /// Drop every mark of a disk: only when the content is proven identical at both sites (a new base).
    pub fn clear_all(&self) {
        self.close_gate();
        for disk in self.disk_indices() {
            for map in [MapName::First, MapName::Second, MapName::Staged] {
                for (_, word) in self.present_words(disk, map) {
                    word.store(0, SeqCst);
                }
                self.counts[usize::from(disk.0)][index(map)].store(0, SeqCst);
            }
        }
        self.open_gate();
    }

    /// All marks of the disk, whatever the map, as extents (for a divergence list).
    pub fn all_marks(&self, disk: DiskIndex) -> Vec<Extent> {
        let mut out: Vec<Extent> = Vec::new();
        let words = self.maps.words(disk, MapName::First).len();
        for i in 0..words {
            let all: u64 = [MapName::First, MapName::Second, MapName::Staged]
                .into_iter()
                .filter(|m| !self.maps.absent(disk, *m, i))
                .map(|m| self.maps.words(disk, m)[i].load(SeqCst))
                .fold(0, |a, b| a | b);
            push_bits(&mut out, i as u64 * 64, all);
        }
        out
    }

    // ---- bit work

    fn present_words(&self, disk: DiskIndex, map: MapName) -> impl Iterator<Item = (usize, &AtomicU64)> {
        self.maps.words(disk, map).iter().enumerate().filter(move |(i, _)| !self.maps.absent(disk, map, *i))
    }

    fn set(&self, disk: DiskIndex, map: MapName, first: Block, last: Block) {
        let words = self.maps.words(disk, map);
        let mut new = 0;
        for_words(first, last, |i, m| {
            let old = words[i].fetch_or(m, SeqCst);
            new += u64::from((m & !old).count_ones());
        });
        if new > 0 {
            self.counts[usize::from(disk.0)][index(map)].fetch_add(new, SeqCst);
        }
    }

    fn clear(&self, disk: DiskIndex, map: MapName, first: Block, last: Block) {
        let words = self.maps.words(disk, map);
        let mut gone = 0;
        for_words(first, last, |i, m| {
            let old = words[i].fetch_and(!m, SeqCst);
            gone += u64::from((m & old).count_ones());
        });
        if gone > 0 {
            self.counts[usize::from(disk.0)][index(map)].fetch_sub(gone, SeqCst);
        }
    }

    fn clear_one(&self, disk: DiskIndex, map: MapName, block: Block) -> bool {
        let m = 1u64 << (block.0 % 64);
        let old = self.maps.words(disk, map)[(block.0 / 64) as usize].fetch_and(!m, SeqCst);
        if old & m != 0 {
            self.counts[usize::from(disk.0)][index(map)].fetch_sub(1, SeqCst);
        }
        old & m != 0
    }

    /// Move every bit of `from` into `to`. Sets first, clears after: a crash between loses no mark.
    fn pour(&self, disk: DiskIndex, from: MapName, to: MapName) {
        let target = self.maps.words(disk, to);
        for (i, word) in self.present_words(disk, from) {
            let bits = word.load(SeqCst);
            if bits != 0 {
                let old = target[i].fetch_or(bits, SeqCst);
                let counts = &self.counts[usize::from(disk.0)];
                counts[index(to)].fetch_add(u64::from((bits & !old).count_ones()), SeqCst);
                let was = word.fetch_and(!bits, SeqCst);
                counts[index(from)].fetch_sub(u64::from((bits & was).count_ones()), SeqCst);
            }
        }
    }

    fn scan(&self, disk: DiskIndex, map: MapName, from: Block, blocks_max: u64) -> Vec<Extent> {
        let blocks = self.maps.blocks(disk);
        let mut out = Vec::new();
        if from.0 < blocks && self.count(disk, map) > 0 {
            self.extents_within(disk, map, from, Block(blocks - 1), blocks_max, &mut out);
        }
        out
    }

    fn extents_within(
        &self,
        disk: DiskIndex,
        map: MapName,
        first: Block,
        last: Block,
        max: u64,
        out: &mut Vec<Extent>,
    ) {
        let words = self.maps.words(disk, map);
        let (w0, w1) = ((first.0 / 64) as usize, (last.0 / 64) as usize);
        let mut left = max;
        for (i, word) in words.iter().enumerate().take(w1 + 1).skip(w0) {
            if self.maps.absent(disk, map, i) {
                continue;
            }
            let mut bits = word.load(SeqCst);
            if i == w0 {
                bits &= u64::MAX << (first.0 % 64);
            }
            if i == w1 {
                bits &= u64::MAX >> (63 - last.0 % 64);
            }
            while u64::from(bits.count_ones()) > left {
                bits &= !(1 << (63 - bits.leading_zeros()));
            }
            left -= u64::from(bits.count_ones());
            push_bits(out, i as u64 * 64, bits);
            if out.len() > limits::FRAME_EXTENTS_MAX {
                out.truncate(limits::FRAME_EXTENTS_MAX);
                return;
            }
            if left == 0 {
                return;
            }
        }
    }
}

/// Append the runs of set bits of one word, joining with the last run where they touch.
fn push_bits(out: &mut Vec<Extent>, base: u64, mut bits: u64) {
    while bits != 0 {
        let lo = bits.trailing_zeros();
        let run = (bits >> lo).trailing_ones();
        let start = base + u64::from(lo);
        match out.last_mut() {
            Some(e) if e.end().0 == start && e.blocks <= u32::MAX - 64 => e.blocks += run,
            _ => out.push(Extent::new(start, run)),
        }
        bits = if lo + run == 64 { 0 } else { bits & (u64::MAX << (lo + run)) };
    }
}

fn for_words(first: Block, last: Block, mut f: impl FnMut(usize, u64)) {
    let (w0, w1) = (first.0 / 64, last.0 / 64);
    for w in w0..=w1 {
        let lo = if w == w0 { (first.0 % 64) as u32 } else { 0 };
        let hi = if w == w1 { (last.0 % 64) as u32 } else { 63 };
        f(w as usize, mask(lo, hi));
    }
}

#[cfg(test)]
#[path = "tracker_tests.rs"]
mod tests;
