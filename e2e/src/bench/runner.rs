//! Runs figures one after the other, keeps what each found, and writes table, document and plots.
//!
//! What was found is kept in `target/e2e/bench/` as JSON, so that a narrowed run renews its figures and leaves the others;
//! each figure carries its own date and commit.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context;

use super::{
    Effort, Figure,
    conditions::Conditions,
    measure::{Judged, Outcome, show},
    plot::{self, Bar, Plot},
    table::{self, Found},
};
use crate::{build, reaper};

const INTRODUCTION: &str = "# Benchmarks\n";

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub effort: Effort,
    /// Identities of figures; empty for all.
    pub only: Vec<String>,
    /// Those too that run only when they are asked for.
    pub everything: bool,
}

impl Plan {
    fn wants(&self, figure: &dyn Figure) -> bool {
        match self.only.is_empty() {
            true => self.everything || !figure.only_on_demand(),
            false => self.only.iter().any(|id| id == figure.id()),
        }
    }
}

/// Says something about the progress.
pub fn say(text: impl std::fmt::Display) {
    eprintln!("  {text}");
}

fn kept_folder(effort: Effort) -> PathBuf {
    reaper::cache_folder().join("bench").join(if effort.quick { "quick" } else { "full" })
}

/// Runs the plan. Returns the whole table, and which figures failed.
pub fn run(figures: &[Box<dyn Figure>], plan: &Plan) -> anyhow::Result<(String, Vec<String>)> {
    let chosen: Vec<&dyn Figure> = figures.iter().map(AsRef::as_ref).filter(|figure| plan.wants(*figure)).collect();
    let kept = kept_folder(plan.effort);
    std::fs::create_dir_all(&kept).with_context(|| format!("{}", kept.display()))?;
    let mut failed = Vec::new();
    for (number, figure) in chosen.iter().enumerate() {
        let began = Instant::now();
        eprintln!("\n[{}/{}] {}: {}", number + 1, chosen.len(), figure.id(), figure.title());
        let conditions = Conditions::now();
        match figure.run(plan.effort) {
            Ok(outcome) => {
                let found = Found {
                    id: figure.id().to_owned(),
                    title: figure.title().to_owned(),
                    target: figure.target().to_owned(),
                    method: figure.method().to_owned(),
                    conditions,
                    outcome,
                };
                std::fs::write(kept.join(format!("{}.json", figure.id())), serde_json::to_vec_pretty(&found)?)?;
                eprintln!("{}", table::whole(std::slice::from_ref(&found)));
                say(format_args!("{} took {:.0} s", figure.id(), began.elapsed().as_secs_f64()));
            }
            Err(error) => {
                eprintln!("  {} could not be measured: {error:#}", figure.id());
                failed.push(format!("{}: {error:#}", figure.id()));
            }
        }
        // What one figure has written shall not be flushed to the disk during the next.
        // SAFETY: sync has no arguments and cannot fail.
        unsafe { libc::sync() };
        std::thread::sleep(Duration::from_millis(500));
    }
    let found: Vec<Found> = figures
        .iter()
        .filter_map(|figure| std::fs::read(kept.join(format!("{}.json", figure.id()))).ok())
        .filter_map(|bytes| serde_json::from_slice(&bytes).ok())
        .collect();
    write(plan.effort, &found)?;
    Ok((table::whole(&found), failed))
}

/// The document and the plots. A smoke run leaves the repository alone.
fn write(effort: Effort, found: &[Found]) -> anyhow::Result<()> {
    let docs = if effort.quick { kept_folder(effort) } else { build::workspace().join("docs") };
    let plots = docs.join("benchmarks");
    std::fs::create_dir_all(&plots)?;
    for figure in found {
        std::fs::write(plots.join(format!("{}.svg", figure.id)), draw(figure))?;
    }
    let document = docs.join("BENCHMARKS.md");
    let old = std::fs::read_to_string(&document).unwrap_or_else(|_| INTRODUCTION.to_owned());
    std::fs::write(&document, table::replace(&old, &table::section(found)))?;
    say(format_args!("written: {} and {}/*.svg", document.display(), plots.display()));
    Ok(())
}

fn draw(figure: &Found) -> String {
    let title = format!("{}: {}", figure.id, figure.title);
    let Outcome { rows, plot, .. } = &figure.outcome;
    match plot {
        Plot::Lines(lines) => plot::lines(&title, lines),
        Plot::Rows => {
            let bars: Vec<Bar> = rows
                .iter()
                .map(|row| {
                    let value = row.result();
                    let target = match row.bound {
                        super::measure::Bound::AtLeast(bound) | super::measure::Bound::AtMost(bound) => Some(bound),
                        super::measure::Bound::Shown => None,
                    };
                    let text = match row.judged {
                        Judged::Ratio | Judged::Inverse => format!("{value:.2} ×"),
                        Judged::Ours | Judged::Difference => show(value, row.unit),
                    };
                    Bar { label: row.what.clone(), value, text, target, reached: row.reached() }
                })
                .collect();
            plot::bars(&title, &bars)
        }
    }
}
