//! The model of the truth, outside the core: what each generation must hold, what a serving disk must hold, and who may
//! write. It learns of guest writes, cuts and role changes from the simulator, never from the core's bookkeeping.
//!
//! I2: acknowledged before the cut is in; submitted after is not; what was in flight may be either, sector by sector.

use std::collections::{BTreeMap, BTreeSet};

use watari_core::geometry::{Epoch, Generation};

use crate::content::{Disks, Word, name};

/// A guest write's effect on the disk: words for consecutive sectors.
#[derive(Clone, Debug)]
pub struct Effect {
    pub disk: usize,
    pub sector: u64,
    pub words: Vec<Word>,
}

/// What a serving site's disks hold, and what a loss of power may leave of them.
#[derive(Clone, Debug, Default)]
pub struct Live {
    pub content: Disks,
    /// Sectors written since their disk was synced: what they held then, and every value since.
    unsynced: BTreeMap<(usize, u64), Vec<Word>>,
}

impl Live {
    pub fn new(content: Disks) -> Self {
        Live { content, unsynced: BTreeMap::new() }
    }

    /// These sectors reach the disk now.
    pub fn wrote(&mut self, effect: &Effect) {
        for (i, word) in effect.words.iter().enumerate() {
            let sector = effect.sector + i as u64;
            let now = &mut self.content[effect.disk][sector as usize];
            self.unsynced.entry((effect.disk, sector)).or_insert_with(|| vec![*now]).push(*word);
            *now = *word;
        }
    }

    pub fn synced(&mut self, disk: usize) {
        self.unsynced.retain(|(d, _), _| *d != disk);
    }

    /// The power failed: `found` is on the medium. Every sector must hold its synced value or a later one.
    pub fn power_lost(&mut self, found: Disks) {
        for (d, (was, is)) in self.content.iter().zip(&found).enumerate() {
            for (s, (was, is)) in was.iter().zip(is).enumerate() {
                let allowed = self.unsynced.get(&(d, s as u64));
                let good = allowed.map_or(was == is, |values| values.contains(is));
                assert!(
                    good,
                    "I10: after a loss of power disk {d} sector {s} holds {}, which it never held since its last sync (it held {})",
                    name(*is),
                    name(*was)
                );
            }
        }
        *self = Live::new(found);
    }
}

/// A generation: the content at its cut, and what writes in flight at that instant may have made of it.
#[derive(Clone, Debug)]
pub struct GenTruth {
    content: Disks,
    in_flight: BTreeMap<(usize, u64), Vec<Word>>,
    /// What it was found to hold when it was committed; from then on it holds exactly that.
    fixed: bool,
}

/// Everything that must be true.
#[derive(Clone, Debug, Default)]
pub struct Truth {
    /// Of each site that is an active side.
    pub live: [Option<Live>; 2],
    pub generations: BTreeMap<Generation, GenTruth>,
    /// Which site wrote in which epoch.
    pub writers: BTreeMap<(u64, [u8; 16]), usize>,
    /// The newest generation that each site, as a target, said is committed.
    pub promised: [Option<Generation>; 2],
    /// Epoch counters that began with a person's decision against a side that could not be asked: a promotion, a reclaim.
    pub unfenced: BTreeSet<u64>,
    /// Times that a person told an active side to serve on; only that can raise one counter at two sides.
    pub reclaims: u64,
    /// Guest writes are numbered.
    pub next_write: u64,
    /// Nobody can say what a site's disks hold: they lie, or somebody else writes to them. Nothing is asked of it before
    /// the end of the history.
    pub distrusted: [bool; 2],
    /// Generations of a site whose folder was restored from an old copy: the disks went on without it.
    pub outdated: [BTreeSet<Generation>; 2],
    /// Changes of the site that serves.
    pub moves: u64,
    /// Sites of which a person said that what they hold beyond the other's history may be overwritten.
    pub consented: [bool; 2],
}

impl Truth {
    pub fn write_id(&mut self) -> u64 {
        self.next_write += 1;
        self.next_write
    }

    /// A cut is made at `site`; `in_flight` are the writes that are admitted and not finished.
    pub fn cut(&mut self, site: usize, generation: Generation, in_flight: &[Effect]) {
        let content = self.live[site].as_ref().expect("only an active side makes cuts").content.clone();
        let mut open: BTreeMap<(usize, u64), Vec<Word>> = BTreeMap::new();
        for effect in in_flight {
            for (i, word) in effect.words.iter().enumerate() {
                open.entry((effect.disk, effect.sector + i as u64)).or_default().push(*word);
            }
        }
        let new = GenTruth { content, in_flight: open, fixed: false };
        let before = self.generations.insert(generation, new);
        assert!(before.is_none(), "generation {generation} is cut twice: numbers are never used twice");
    }

    /// Whether what `site` holds under a generation is what it should be.
    pub fn believes(&self, site: usize, generation: Generation) -> bool {
        !self.distrusted[site] && !self.outdated[site].contains(&generation)
    }

    /// `found` is what `site` holds under this generation.
    pub fn check_generation(&mut self, site: usize, generation: Generation, found: &Disks, what: &str) {
        if !self.believes(site, generation) {
            return;
        }
        let Some(truth) = self.generations.get_mut(&generation) else {
            panic!("{what}: generation {generation} was never cut");
        };
        for (d, (right, is)) in truth.content.iter().zip(found).enumerate() {
            if right == is {
                continue;
            }
            for (s, (right, is)) in right.iter().zip(is).enumerate() {
                let open = truth.in_flight.get(&(d, s as u64)).filter(|_| !truth.fixed);
                let good = right == is || open.is_some_and(|values| values.contains(is));
                assert!(
                    good,
                    "{what}: generation {generation} disk {d} block {} sector {s} holds {}, right is {}{}",
                    s / 8,
                    name(*is),
                    name(*right),
                    if truth.fixed { " (as committed)" } else { " (as cut)" }
                );
            }
        }
        if !truth.fixed {
            truth.content.clone_from(found);
            truth.in_flight.clear();
            truth.fixed = true;
        }
    }

    /// A former active side's disks become a replica under this name. A fenced side's are a generation of their own.
    pub fn adopted(&mut self, site: usize, generation: Generation, found: Disks) {
        use std::collections::btree_map::Entry;
        if let Entry::Vacant(new) = self.generations.entry(generation) {
            assert!(self.consented[site], "disks that nobody shares become a replica, and no person consented");
            new.insert(GenTruth { content: found, in_flight: BTreeMap::new(), fixed: true });
            return;
        }
        self.check_generation(site, generation, &found, "disks that become a replica");
    }

    /// The content of a generation that is fixed.
    pub fn content(&self, generation: Generation) -> Option<&Disks> {
        self.generations.get(&generation).map(|g| &g.content)
    }

    /// I6: a guest write goes to the disk of `site` in this epoch.
    pub fn writes(&mut self, site: usize, epoch: Epoch) {
        let writer = *self.writers.entry((epoch.counter, epoch.activation.0)).or_insert(site);
        assert!(writer == site, "I6: sites {writer} and {site} both write in epoch {epoch:?}");
    }
}
