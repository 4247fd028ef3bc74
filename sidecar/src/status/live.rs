//! The live view on a terminal: a few lines redrawn in place, one of them the progress of the open generation.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use watari_wire::report::Report;

use super::text;

const GENERATION: &str = "Sending {prefix} [{bar:40.cyan}] {msg}";

/// What is on the screen.
pub struct View {
    screen: MultiProgress,
    generation: ProgressBar,
    /// Plain lines above and below the progress.
    above: Vec<ProgressBar>,
    below: Vec<ProgressBar>,
}

impl Default for View {
    fn default() -> Self {
        View::new()
    }
}

impl View {
    pub fn new() -> Self {
        let screen = MultiProgress::new();
        let style = ProgressStyle::with_template(GENERATION).expect("the template is valid").progress_chars("=> ");
        let generation = screen.add(ProgressBar::new(1).with_style(style));
        View { screen, generation, above: Vec::new(), below: Vec::new() }
    }

    pub fn draw(&mut self, report: &Report) {
        let above = [
            format!("{} at {}  {}", report.pair, report.site, text::clock(report.now_unix_millis)),
            format!("{} in epoch {}, {}", report.role, report.epoch, report.trust),
            text::link(report),
            text::lag(report),
        ];
        let mut below = Vec::new();
        if !report.generations.behind_because.is_empty() {
            below.push(format!("because {}", report.generations.behind_because));
        }
        below.extend(text::disks(report));
        below.extend(text::conditions(report));
        self.progress(report);
        let (screen, generation) = (&self.screen, &self.generation);
        // Each new line goes right above the progress, and so after the lines before it.
        fill(&mut self.above, &above, screen, |line| screen.insert_before(generation, line));
        fill(&mut self.below, &below, screen, |line| screen.add(line));
    }

    /// Leaves the last picture on the screen, and a word under it.
    pub fn end(&mut self, word: &str) {
        for line in self.above.iter().chain(&self.below).chain([&self.generation]) {
            line.abandon();
        }
        println!("{word}");
    }

    fn progress(&mut self, report: &Report) {
        let generations = &report.generations;
        if generations.open.is_empty() {
            self.generation.set_prefix("nothing");
            self.generation.set_length(1);
            self.generation.set_position(0);
            self.generation.set_message("");
            return;
        }
        self.generation.set_prefix(generations.open.clone());
        self.generation.set_length(generations.open_total_bytes.max(1));
        self.generation.set_position(generations.open_sent_bytes.min(generations.open_total_bytes));
        let eta = generations.eta_seconds.map_or_else(String::new, |eta| format!(", {} to go", text::seconds(eta)));
        self.generation.set_message(format!(
            "{} of {}{eta}",
            text::bytes(generations.open_sent_bytes),
            text::bytes(generations.open_total_bytes)
        ));
    }
}

/// As many lines as there are texts.
fn fill(
    lines: &mut Vec<ProgressBar>,
    texts: &[String],
    screen: &MultiProgress,
    add: impl Fn(ProgressBar) -> ProgressBar,
) {
    while lines.len() > texts.len() {
        if let Some(line) = lines.pop() {
            line.finish_and_clear();
            screen.remove(&line);
        }
    }
    while lines.len() < texts.len() {
        let style = ProgressStyle::with_template("{msg}").expect("the template is valid");
        lines.push(add(ProgressBar::new(1).with_style(style)));
    }
    for (line, text) in lines.iter().zip(texts) {
        line.set_message(text.clone());
        line.tick();
    }
}
