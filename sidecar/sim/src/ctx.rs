//! What every part of the simulation shares: the network, the truth, the coverage, one generator, one clock.

use watari_core::{record::Id, storage::sim::SimRng};

use crate::{coverage::Coverage, net::Net, truth::Truth};

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
    /// Bytes of the journal.
    pub journal_bytes: u64,
    /// Bytes of the replica's folder; `None`: no bound.
    pub capacity: Option<u64>,
    /// Kinds of faults of this history.
    pub power: bool,
    pub moves: bool,
    pub failovers: bool,
    pub steps: u64,
    /// One fault in so many that are drawn happens.
    pub rarity: u64,
}

impl Setup {
    pub fn draw(seed: u64) -> Setup {
        let mut rng = SimRng(seed ^ 0x5e7_0b5e_ed00);
        let disks = 1 + rng.below(3);
        // Some disks end within a block.
        let size = |rng: &mut SimRng| (2 + rng.below(90)) * 4096 + if rng.one_in(2) { rng.below(8) * 512 } else { 0 };
        Setup {
            seed,
            sizes: (0..disks).map(|_| size(&mut rng)).collect(),
            lanes: 1 + rng.below(3) as usize,
            preserve_bytes: if rng.one_in(3) { (1 + rng.below(4)) * 4096 } else { 1 << 20 },
            interval_millis: 1 + rng.below(400),
            filled: rng.one_in(3),
            keep_last: 1 + rng.below(3) as u32,
            journal_bytes: if rng.one_in(6) { 60_000 + rng.below(300_000) } else { 64 << 20 },
            capacity: rng.one_in(6).then(|| 40_000 + rng.below(400_000)),
            power: rng.one_in(2),
            moves: !rng.one_in(4),
            failovers: rng.one_in(2),
            steps: 300 + rng.below(500),
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
    pub now: u64,
    /// Kept when somebody will read it.
    pub trace: Option<Vec<String>>,
}

impl Ctx {
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
