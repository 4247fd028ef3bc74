//! Numbers: samples, their medians and percentiles, and the rows that figures are made of.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::plot::Plot;

/// What is measured, for printing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    Seconds,
    Millis,
    Micros,
    Bytes,
    BytesPerSecond,
    PerSecond,
}

/// Which way is good, and how far one has to go.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
    /// Shown, not judged.
    Shown,
}

impl Bound {
    pub fn reached(self, value: f64) -> Option<bool> {
        match self {
            Bound::AtLeast(bound) => Some(value >= bound),
            Bound::AtMost(bound) => Some(value <= bound),
            Bound::Shown => None,
        }
    }
}

/// What a row is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Judged {
    /// Ours / the peer's, median over the repetitions.
    Ratio,
    /// The peer's / ours: how many times less.
    Inverse,
    /// Our own value in the row's unit.
    Ours,
    /// Ours minus the peer's, in the row's unit.
    Difference,
}

/// One line of the table.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub what: String,
    pub unit: Unit,
    /// One value for each repetition.
    pub ours: Vec<f64>,
    pub peer: String,
    /// Paired with `ours`: measured in the same repetition. May be empty.
    pub theirs: Vec<f64>,
    pub judged: Judged,
    pub bound: Bound,
    /// Which percentile of the results is judged: 50 is the median.
    pub percentile: f64,
    pub remark: String,
}

impl Row {
    /// A row that is judged by ours / theirs.
    pub fn ratio(what: impl Into<String>, unit: Unit, peer: impl Into<String>, pairs: &[(f64, f64)]) -> Row {
        let (ours, theirs) = pairs.iter().copied().unzip();
        Row {
            what: what.into(),
            unit,
            ours,
            peer: peer.into(),
            theirs,
            judged: Judged::Ratio,
            bound: Bound::Shown,
            percentile: 50.0,
            remark: String::new(),
        }
    }
    /// A row that has no peer.
    pub fn alone(what: impl Into<String>, unit: Unit, ours: Vec<f64>) -> Row {
        Row {
            what: what.into(),
            unit,
            ours,
            peer: String::new(),
            theirs: Vec::new(),
            judged: Judged::Ours,
            bound: Bound::Shown,
            percentile: 50.0,
            remark: String::new(),
        }
    }
    pub fn bound(mut self, bound: Bound) -> Row {
        self.bound = bound;
        self
    }
    pub fn judged(mut self, judged: Judged) -> Row {
        self.judged = judged;
        self
    }
    pub fn percentile(mut self, percent: f64) -> Row {
        self.percentile = percent;
        self
    }
    pub fn remark(mut self, remark: impl Into<String>) -> Row {
        self.remark = remark.into();
        self
    }

    /// What the row is judged by, one for each repetition.
    pub fn results(&self) -> Vec<f64> {
        let paired = self.ours.iter().zip(&self.theirs);
        match self.judged {
            Judged::Ratio => paired.map(|(ours, theirs)| ours / theirs).collect(),
            Judged::Inverse => paired.map(|(ours, theirs)| theirs / ours).collect(),
            Judged::Difference => paired.map(|(ours, theirs)| ours - theirs).collect(),
            Judged::Ours => self.ours.clone(),
        }
    }
    pub fn result(&self) -> f64 {
        percentile(&self.results(), self.percentile)
    }
    pub fn reached(&self) -> Option<bool> {
        self.bound.reached(self.result())
    }
}

/// What a figure found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    pub rows: Vec<Row>,
    /// Sentences below the table.
    pub notes: Vec<String>,
    pub plot: Plot,
}

/// The middle value; NaN of nothing.
pub fn median(values: &[f64]) -> f64 {
    percentile(values, 50.0)
}

/// The value below which `percent` of the values lie (linear between neighbours); NaN of nothing.
pub fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|value| !value.is_nan()).collect();
    if sorted.is_empty() {
        return f64::NAN;
    }
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() - 1) as f64 * percent / 100.0;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

/// How long something took, and what it gave.
pub fn timed<T>(job: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(Duration, T)> {
    let began = Instant::now();
    let result = job()?;
    Ok((began.elapsed(), result))
}

/// A number with its unit, short enough for a table.
pub fn show(value: f64, unit: Unit) -> String {
    let short = |value: f64| match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    };
    let binary = |value: f64| match value.abs() {
        v if v >= 1_073_741_824.0 => format!("{} GiB", short(value / 1_073_741_824.0)),
        v if v >= 1_048_576.0 => format!("{} MiB", short(value / 1_048_576.0)),
        v if v >= 1024.0 => format!("{} KiB", short(value / 1024.0)),
        _ => format!("{value:.0} B"),
    };
    match unit {
        _ if value.is_nan() => "–".into(),
        Unit::Seconds => format!("{} s", short(value)),
        Unit::Millis => format!("{} ms", short(value)),
        Unit::Micros => format!("{} µs", short(value)),
        Unit::Bytes => binary(value),
        Unit::BytesPerSecond => format!("{}/s", binary(value)),
        Unit::PerSecond => format!("{value:.0}/s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_formed_within_each_repetition_before_the_median() {
        let row = Row::ratio("x", Unit::PerSecond, "peer", &[(10.0, 10.0), (4.0, 2.0), (90.0, 100.0)])
            .bound(Bound::AtLeast(1.0));
        assert_eq!((row.result(), row.reached()), (1.0, Some(true)));
    }

    #[test]
    fn percentiles_lie_between_neighbours_and_nothing_has_none() {
        assert_eq!(percentile(&[4.0, 1.0, 2.0, 3.0], 50.0), 2.5);
        assert_eq!(percentile(&[1.0], 99.0), 1.0);
        assert!(median(&[]).is_nan());
    }
}
