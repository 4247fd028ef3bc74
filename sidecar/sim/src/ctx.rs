//! What every part of the simulation shares: the network, the truth, the coverage, one generator, one clock.

use watari_core::{record::Id, storage::sim::SimRng, versions::Speaks};

use crate::{coverage::Coverage, net::Net, truth::Truth};

/// Kinds of trouble beside crashes and cuts, each in some histories only.
#[derive(Clone, Copy, Debug)]
pub struct Trouble {
    /// The target's images lie about syncs, or somebody else writes to them: only verification finds it. A mode of its
    /// own, since nothing else can be asked of such a target: no moves, no failovers.
    pub liar: Option<Liar>,
    /// Each site's wall clock jumps.
    pub clocks: bool,
    /// A target's metadata folder is lost, or restored from an old copy.
    pub metadata: bool,
    /// Somebody writes to a serving site's disks while its worker is down.
    pub foreign: bool,
    /// The region log cannot be written at times; a worker that crashed passes writes through.
    pub untracked: bool,
    /// Workers of two protocol versions.
    pub versions: bool,
    /// From this event on the guest only reads.
    pub idle_from: u64,
}

/// Why a target's disks cannot be believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Liar {
    Syncs,
    ForeignHand,
}

impl Trouble {
    fn draw(rng: &mut SimRng, steps: u64) -> Trouble {
        let kinds = [Liar::Syncs, Liar::ForeignHand];
        Trouble {
            liar: rng.one_in(10).then(|| kinds[rng.below(2) as usize]),
            clocks: rng.one_in(4),
            metadata: rng.one_in(4),
            foreign: rng.one_in(4),
            untracked: rng.one_in(4),
            versions: rng.one_in(6),
            idle_from: if rng.one_in(5) { steps / 4 } else { u64::MAX },
        }
    }
}

/// How a history is set up; drawn from its seed.
#[derive(Clone, Debug)]
pub struct Setup {
    pub seed: u64,
    /// Bytes of each disk.
    pub sizes: Vec<u64>,
    /// Data calls per connection.
    pub lanes: usize,
    /// Bytes of preserved content before a generation is given up.
    pub preserve_bytes: u64,
    pub interval_millis: u64,
    /// The target's disks hold somebody's old data.
    pub filled: bool,
    pub keep_last: u32,
    /// Generations younger than this are kept, too.
    pub keep_seconds: u64,
    /// Bytes of the journal.
    pub journal_bytes: u64,
    /// Bytes of the replica's folder; `None`: no bound.
    pub capacity: Option<u64>,
    /// Kinds of faults of this history.
    pub power: bool,
    pub moves: bool,
    pub failovers: bool,
    /// What else goes wrong in this history.
    pub trouble: Trouble,
    pub steps: u64,
    /// One fault in so many that are drawn happens.
    pub rarity: u64,
}

impl Setup {
    pub fn draw(seed: u64) -> Setup {
        let mut rng = SimRng(seed ^ 0x5e7_0b5e_ed00);
        let disks = 1 + rng.below(3);
        // Small disks are cheap, and every request meets another; on large ones a bitmap has several words. Some end
        // within a block.
        let blocks = if rng.one_in(3) { 90 } else { 24 };
        let size =
            |rng: &mut SimRng| (2 + rng.below(blocks)) * 4096 + if rng.one_in(2) { rng.below(8) * 512 } else { 0 };
        let steps = 300 + rng.below(500);
        let trouble = Trouble::draw(&mut SimRng(rng.next_u64()), steps);
        let honest = trouble.liar.is_none();
        Setup {
            seed,
            sizes: (0..disks).map(|_| size(&mut rng)).collect(),
            lanes: 1 + rng.below(3) as usize,
            preserve_bytes: if rng.one_in(3) { (1 + rng.below(4)) * 4096 } else { 1 << 20 },
            interval_millis: 1 + rng.below(400),
            filled: rng.one_in(3),
            keep_last: 1 + rng.below(3) as u32,
            keep_seconds: if rng.one_in(3) { 1 + rng.below(5) } else { 0 },
            journal_bytes: if rng.one_in(6) { 60_000 + rng.below(300_000) } else { 64 << 20 },
            capacity: rng.one_in(6).then(|| 40_000 + rng.below(400_000)),
            power: rng.one_in(2) || !honest,
            moves: !rng.one_in(4) && honest,
            failovers: rng.one_in(2) && honest,
            trouble,
            steps,
            rarity: [1, 2, 4, 10][rng.below(4) as usize],
        }
    }
}

/// See the module's header.
pub struct Ctx {
    pub setup: Setup,
    pub net: Net,
    pub truth: Truth,
    pub cov: Coverage,
    pub rng: SimRng,
    /// Milliseconds since the beginning, for whoever measures how long something takes.
    pub now: u64,
    /// How far each site's wall clock is ahead.
    pub ahead: [u64; 2],
    /// Nothing goes wrong any more.
    pub peace: bool,
    /// Kept when somebody will read it.
    pub trace: Option<Vec<String>>,
}

impl Ctx {
    /// A site's wall clock, milliseconds. It jumps.
    pub fn clock(&self, site: usize) -> u64 {
        self.now + self.ahead[site]
    }

    /// Protocol versions that a worker speaks which starts now; in peace everybody was upgraded.
    pub fn versions(&mut self) -> Speaks {
        let newer = Speaks::OURS.highest + 1;
        match self.rng.below(3) {
            _ if !self.setup.trouble.versions || self.peace => Speaks::OURS,
            // The next one, which still knows ours, and one that gave ours up.
            0 => Speaks { highest: newer, ..Speaks::OURS },
            1 => Speaks { lowest: newer, highest: newer },
            _ => Speaks::OURS,
        }
    }

    pub fn id(&mut self) -> Id {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.rng.next_u64().to_le_bytes());
        id[8..].copy_from_slice(&self.rng.next_u64().to_le_bytes());
        id
    }

    pub fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(line());
        }
    }
}
