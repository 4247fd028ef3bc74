//! `make bench`: the figures of the project beside their peers, in one run.
//!
//! Machines are shared and noisy, so every figure is a ratio of two things measured in the same run: the two sides take
//! turns within each repetition, the ratio of each repetition is formed before the median, and both absolute values are
//! printed beside it. Nothing here is a test: a slow machine makes a figure, never a failure.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`measure`] | samples, medians, percentiles; what a row of the table holds and how it is judged |
//! | [`runner`] | runs figures, keeps what they found, writes the table and the plots |
//! | [`table`], [`plot`], [`conditions`] | Markdown, SVG, and under which conditions it was measured |
//! | [`fio`], [`peers`], [`load`], [`quota`], [`rig`] | load generators, the peers' servers, data to write, a quota of processor time, sidecars at hand |
//! | `fNN_…` | one figure each |
//!
//! A figure is a value that implements [`Figure`]; [`all`] lists them in the order in which they run.

pub mod conditions;
pub mod fio;
pub mod load;
pub mod measure;
pub mod peers;
pub mod plot;
pub mod quota;
pub mod rig;
pub mod runner;
pub mod table;

mod f01_move;
mod f03_nbd;
mod f05_wire;
mod f06_stream;
mod f07_fat;
mod f08_thin;
mod f09_idle;
mod f10_lag;
mod f11_cut;
mod f12_memory;
mod f14_failover;
mod f15_binary;

pub use measure::Outcome;

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// A smoke run: one repetition, small data. Its figures mean nothing.
    pub quick: bool,
    /// How long the full copy of F1-hour shall take: its disk is made accordingly.
    pub copy_minutes: u64,
}

impl Effort {
    /// `full` of something, or `quick` in a smoke run.
    pub fn of<T>(self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// One figure: what is measured, and against what.
pub trait Figure {
    /// As the project's targets name it: "F3".
    fn id(&self) -> &'static str;
    fn title(&self) -> &'static str;
    /// What is to be reached, in words.
    fn target(&self) -> &'static str;
    /// How it is measured: conditions that the rows do not say.
    fn method(&self) -> &'static str;
    /// Takes so long that it runs only when it is asked for.
    fn only_on_demand(&self) -> bool {
        false
    }
    fn run(&self, effort: Effort) -> anyhow::Result<Outcome>;
}

/// Every figure, in the order in which they run.
pub fn all() -> Vec<Box<dyn Figure>> {
    vec![
        Box::new(f01_move::Moves),
        Box::new(f01_move::Pause),
        Box::new(f01_move::OneHour),
        Box::new(f03_nbd::NbdServer),
        Box::new(f05_wire::Wire),
        Box::new(f06_stream::Stream),
        Box::new(f07_fat::LongFat),
        Box::new(f08_thin::Thin),
        Box::new(f09_idle::Idle),
        Box::new(f10_lag::Lag),
        Box::new(f11_cut::CutStall),
        Box::new(f12_memory::Memory),
        Box::new(f14_failover::Failover),
        Box::new(f15_binary::Binary),
    ]
}
