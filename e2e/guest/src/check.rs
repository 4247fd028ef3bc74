//! Is every block what it must be? The same judgement for the guest about itself and for the host about an image.
//!
//! Given: what each place holds ([`Content`]), and per stream how many operations had been acknowledged. The guest knows
//! that number; the host may take it from the guest's last report or, for an image whose guest is gone, take the newest
//! operation that the image itself shows ([`judge_image`]): then the image must be *some* point in time of the run, the
//! same on all disks for each stream.
//!
//! Does not read disks; callers feed it 4 KiB at a time.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::block::{Content, Stamp, mix};
use crate::schedule::{Layout, Place};

/// How many blocks of one run are right, and in which way the others are wrong.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tally {
    pub name: String,
    pub run: u64,
    /// Per stream: operations that the judgement assumed to be acknowledged.
    pub acknowledged: Vec<u64>,
    /// Blocks judged.
    pub blocks: u64,
    /// Blocks written by this run that hold exactly their newest operation.
    pub right: u64,
    /// Acknowledged data is absent: the place is zero or holds what was there before the run.
    pub missing: u64,
    /// An older operation of the run is back.
    pub resurrected: u64,
    /// Mixed from two writes, or damaged.
    pub torn: u64,
    /// A block of another place, or of no known origin.
    pub foreign: u64,
    /// An operation that had not been acknowledged yet.
    pub future: u64,
    /// A place that this run never wrote has changed.
    pub disturbed: u64,
    /// Could not be read.
    pub unreadable: u64,
    /// The first few wrong places in words.
    pub examples: Vec<String>,
}

/// Examples kept per tally: enough to see a pattern, few enough for the control line.
const EXAMPLES_MAX: usize = 8;

impl Tally {
    /// No block is wrong.
    pub fn clean(&self) -> bool {
        let Tally { missing, resurrected, torn, foreign, future, disturbed, unreadable, .. } = self;
        [missing, resurrected, torn, foreign, future, disturbed, unreadable].iter().all(|count| **count == 0)
    }

    fn example(&mut self, place: Place, what: impl FnOnce() -> String) {
        if self.examples.len() < EXAMPLES_MAX {
            self.examples.push(format!("disk {} block {}: {}", place.disk, place.block, what()));
        }
    }

    /// A place could not be read at all.
    pub fn unreadable(&mut self, place: Place, why: &str) {
        self.blocks += 1;
        self.unreadable += 1;
        self.example(place, || format!("cannot be read: {why}"));
    }
}

/// What a place must hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Expected {
    /// This run never wrote here; if known, a digest of what was here before.
    Untouched(Option<u64>),
    /// Operation `sequence` of the place's stream. With `or` set, an operation that failed may have left its data too.
    Operation { sequence: u64, zero: bool, or: Option<u64> },
}

/// A digest of a place's content, for "has it changed?".
pub fn digest(content: &Content, bytes: &[u8]) -> u64 {
    match content {
        Content::Zero => 0,
        _ => bytes.chunks_exact(8).fold(1, |sum, c| mix(sum ^ u64::from_le_bytes(c.try_into().expect("eight bytes")))),
    }
}

/// Judges one place and counts the result.
pub fn judge(tally: &mut Tally, layout: &Layout, place: Place, content: &Content, bytes: &[u8], expected: Expected) {
    tally.blocks += 1;
    let (sequence, zero, or) = match expected {
        Expected::Untouched(None) => return judge_untouched(tally, layout, place, content),
        Expected::Untouched(Some(before)) => {
            if digest(content, bytes) != before {
                tally.disturbed += 1;
                tally.example(place, || format!("never written by this run, yet it changed to {}", describe(content)));
            }
            return;
        }
        Expected::Operation { sequence, zero, or } => (sequence, zero, or),
    };
    let here = |stamp: &Stamp| (Place { disk: stamp.disk, block: stamp.block }) == place;
    let counter = match content {
        // A failed write of zeroes or of data may have left either; both are accepted while `or` is set.
        Content::Zero if zero || or.is_some() => return tally.right += 1,
        Content::Stamped(stamp) if here(stamp) && stamp.layout.run == layout.run => match stamp.sequence {
            found if (found == sequence && !zero) || or == Some(found) => return tally.right += 1,
            found if found > sequence => &mut tally.future,
            _ => &mut tally.resurrected,
        },
        // Intact and of this place, but of an earlier boot: the run's own write is gone.
        Content::Stamped(stamp) if here(stamp) => &mut tally.missing,
        Content::Zero => &mut tally.missing,
        Content::Torn => &mut tally.torn,
        Content::Stamped(_) | Content::Unknown => &mut tally.foreign,
    };
    *counter += 1;
    let wanted = if zero { "zeroes of operation" } else { "operation" };
    tally.example(place, || format!("should hold {wanted} {sequence}, holds {}", describe(content)));
}

/// A place that the run never wrote and whose former content is unknown: it may hold anything whole that belongs there.
fn judge_untouched(tally: &mut Tally, layout: &Layout, place: Place, content: &Content) {
    match content {
        Content::Zero | Content::Unknown => return,
        Content::Torn => tally.torn += 1,
        Content::Stamped(stamp) if (Place { disk: stamp.disk, block: stamp.block }) != place => tally.foreign += 1,
        Content::Stamped(stamp) if stamp.layout.run == layout.run => tally.future += 1,
        Content::Stamped(_) => return,
    }
    tally.example(place, || format!("never written by this run, holds {}", describe(content)));
}

fn describe(content: &Content) -> String {
    match content {
        Content::Zero => "zeroes".into(),
        Content::Torn => "a torn block".into(),
        Content::Unknown => "foreign bytes".into(),
        Content::Stamped(s) => {
            format!(
                "run {:x} stream {} operation {} of disk {} block {}",
                s.layout.run, s.stream, s.sequence, s.disk, s.block
            )
        }
    }
}

/// Operations at the end of a stream that may have left no stamp: a run of zeroes, or stamps that it took away again.
const UNSEEN_TAIL_MAX: u64 = 64;

/// What an image shows, collected place by place and judged at the end.
#[derive(Default)]
pub struct Image {
    /// Per disk: content by block, zero blocks left out.
    places: BTreeMap<(u32, u64), Content>,
}

impl Image {
    /// Adds what a place of the image holds.
    pub fn add(&mut self, place: Place, content: Content) {
        if content != Content::Zero {
            self.places.insert((place.disk, place.block), content);
        }
    }

    fn content(&self, place: Place) -> Content {
        self.places.get(&(place.disk, place.block)).copied().unwrap_or(Content::Zero)
    }

    /// The runs whose blocks are on the image, newest first.
    pub fn runs(&self) -> Vec<Layout> {
        let mut runs: BTreeMap<(u64, u64), Layout> = BTreeMap::new();
        for content in self.places.values() {
            if let Content::Stamped(stamp) = content
                && stamp.layout.plausible()
            {
                runs.insert((stamp.layout.born, stamp.layout.run), stamp.layout);
            }
        }
        runs.into_values().rev().collect()
    }

    /// Judges every run on the image, newest first: each stream must be the first K operations for some K, on all disks
    /// at once, in every place that no newer run has overwritten.
    ///
    /// `acknowledged` pins K for the newest run (what the guest had been told is written); K may then be larger by the
    /// one operation per stream that was under way.
    pub fn judge(&self, acknowledged: Option<&[u64]>) -> Vec<Tally> {
        let mut overwritten: BTreeMap<(u32, u64), ()> = BTreeMap::new();
        let mut tallies = Vec::new();
        for (age, layout) in self.runs().into_iter().enumerate() {
            let mut tally = Tally { name: format!("run {:x}", layout.run), run: layout.run, ..Tally::default() };
            for stream in 0..u32::from(layout.streams) {
                let floor = acknowledged.filter(|_| age == 0).and_then(|known| known.get(stream as usize)).copied();
                let (best, reached) = self.judge_stream(&layout, stream, floor, &overwritten);
                tally.acknowledged.push(reached);
                merge(&mut tally, best);
                for (slot, sequence) in layout.newest(stream, reached).into_iter().enumerate() {
                    if sequence > 0 {
                        let place = layout.place(stream, slot as u64);
                        overwritten.insert((place.disk, place.block), ());
                    }
                }
            }
            tallies.push(tally);
        }
        tallies
    }

    /// The most favourable K for one stream. The newest stamp seen is a lower bound; operations that write zeroes leave
    /// no stamp and take those of others away, so K may lie some operations beyond. Each K has to explain every place.
    fn judge_stream(
        &self,
        layout: &Layout,
        stream: u32,
        floor: Option<u64>,
        hidden: &BTreeMap<(u32, u64), ()>,
    ) -> (Tally, u64) {
        let seen = self
            .places
            .values()
            .filter_map(|content| match content {
                Content::Stamped(s) if s.layout.run == layout.run && s.stream == stream => Some(s.sequence),
                _ => None,
            })
            .max()
            .unwrap_or(0);
        // Beyond what was acknowledged, the one operation that was under way may be there or not.
        let (mut reached, limit) = floor.map_or((seen, seen + UNSEEN_TAIL_MAX), |floor| (floor, floor + 1));
        let mut best: Option<(Tally, u64)> = None;
        loop {
            let tally = self.judge_prefix(layout, stream, reached, hidden);
            let clean = tally.clean();
            if best.as_ref().is_none_or(|(b, _)| wrong(&tally) < wrong(b)) {
                best = Some((tally, reached));
            }
            if clean || reached >= limit {
                return best.expect("at least one K was judged");
            }
            reached += 1;
        }
    }

    fn judge_prefix(&self, layout: &Layout, stream: u32, reached: u64, hidden: &BTreeMap<(u32, u64), ()>) -> Tally {
        let mut tally = Tally::default();
        for (slot, sequence) in layout.newest(stream, reached).into_iter().enumerate() {
            let place = layout.place(stream, slot as u64);
            if hidden.contains_key(&(place.disk, place.block)) {
                continue;
            }
            let expected = match sequence {
                0 => Expected::Untouched(None),
                sequence => Expected::Operation { sequence, zero: layout.operation(stream, sequence).zero, or: None },
            };
            judge(&mut tally, layout, place, &self.content(place), &[], expected);
        }
        tally
    }
}

fn wrong(tally: &Tally) -> u64 {
    tally.missing + tally.resurrected + tally.torn + tally.foreign + tally.future + tally.disturbed
}

fn merge(into: &mut Tally, from: Tally) {
    let Tally {
        name: _,
        run: _,
        acknowledged: _,
        blocks,
        right,
        missing,
        resurrected,
        torn,
        foreign,
        future,
        disturbed,
        unreadable,
        examples,
    } = from;
    into.blocks += blocks;
    into.right += right;
    into.missing += missing;
    into.resurrected += resurrected;
    into.torn += torn;
    into.foreign += foreign;
    into.future += future;
    into.disturbed += disturbed;
    into.unreadable += unreadable;
    into.examples.extend(examples);
    into.examples.truncate(EXAMPLES_MAX);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout {
            run: 5,
            born: 1,
            base: 4,
            blocks: 40,
            disks: 2,
            streams: 2,
            random_percent: 10,
            zero_percent: 20,
            shift: 0,
        }
    }

    fn image_after(layout: &Layout, acknowledged: [u64; 2]) -> Image {
        let mut image = Image::default();
        for stream in 0..2 {
            for sequence in 1..=acknowledged[stream as usize] {
                let op = layout.operation(stream, sequence);
                image.places.remove(&(op.place.disk, op.place.block));
                if !op.zero {
                    let Place { disk, block } = op.place;
                    image.add(op.place, Content::Stamped(Stamp { layout: *layout, stream, sequence, disk, block }));
                }
            }
        }
        image
    }

    #[test]
    fn an_image_of_any_single_point_in_time_is_clean() {
        for k in 1..200 {
            let tallies = image_after(&layout(), [k, 200 - k]).judge(None);
            assert!(tallies.iter().all(Tally::clean), "{k}: {tallies:?}");
        }
    }

    #[test]
    fn a_newest_stamp_that_was_zeroed_again_makes_no_point_in_time_unclean() {
        // On few blocks it happens often: the last stamped operation is zeroed by the next one, and nothing shows how far the run was.
        for run in 1..300 {
            let layout = Layout { run, blocks: 8, random_percent: 100, zero_percent: 40, ..layout() };
            for k in 1..40 {
                let tallies = image_after(&layout, [k, 40 - k]).judge(None);
                assert!(tallies.iter().all(Tally::clean), "run {run}, {k}: {tallies:?}");
            }
        }
    }

    #[test]
    fn disks_cut_at_different_times_are_noticed() {
        let layout = Layout { zero_percent: 0, ..layout() };
        let (early, late) = (image_after(&layout, [50, 50]), image_after(&layout, [60, 60]));
        let mut mixed = Image::default();
        for (image, disk) in [(&early, 0), (&late, 1)] {
            for ((_, block), content) in image.places.range((disk, 0)..(disk + 1, 0)) {
                mixed.add(Place { disk, block: *block }, *content);
            }
        }
        let tally = &mixed.judge(None)[0];
        assert!(tally.missing + tally.resurrected > 0, "{tally:?}");
    }

    #[test]
    fn a_lost_acknowledged_write_is_missing_even_when_it_was_the_last() {
        let layout = Layout { zero_percent: 0, ..layout() };
        let image = image_after(&layout, [30, 30]);
        assert!(image.judge(Some(&[30, 30]))[0].clean());
        assert_eq!(image.judge(Some(&[31, 30]))[0].missing, 1);
    }

    #[test]
    fn torn_foreign_resurrected_and_future_blocks_are_told_apart() {
        let layout = Layout { zero_percent: 0, ..layout() };
        let mut image = image_after(&layout, [80, 80]);
        let stamp = |sequence, at: Place| {
            Content::Stamped(Stamp { layout, stream: 0, sequence, disk: at.disk, block: at.block })
        };
        let place = |sequence| layout.operation(0, sequence).place;
        image.add(place(80), Content::Torn);
        image.add(place(79), stamp(79, place(78)));
        image.add(place(77), stamp(1, place(77)));
        image.add(place(76), stamp(500, place(76)));
        let tally = &image.judge(Some(&[80, 80]))[0];
        assert_eq!((tally.torn, tally.foreign, tally.resurrected, tally.future), (1, 1, 1, 1), "{tally:?}");
    }

    #[test]
    fn an_older_run_under_a_newer_one_is_judged_where_it_still_shows() {
        let old = layout();
        let new = Layout { run: 6, born: 2, ..old };
        let mut image = image_after(&old, [90, 90]);
        for (place, content) in image_after(&new, [7, 3]).places {
            image.places.insert(place, content);
        }
        for stream in 0..2u32 {
            for sequence in 1..=[7, 3][stream as usize] {
                let op = new.operation(stream, sequence);
                if op.zero {
                    image.places.remove(&(op.place.disk, op.place.block));
                }
            }
        }
        let tallies = image.judge(None);
        assert_eq!(tallies.len(), 2);
        assert!(tallies.iter().all(Tally::clean), "{tallies:?}");
    }
}
