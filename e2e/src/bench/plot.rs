//! Plots as SVG, written by hand: bars of ratios beside their target, or lines over time. No scripts, no fonts, one file.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// What is drawn.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Plot {
    /// The rows' results as bars, one above the other, each beside its target (computed from the rows).
    Rows,
    Lines(Lines),
}

/// Values over something.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Lines {
    pub x: String,
    pub y: String,
    pub series: Vec<Series>,
    /// Horizontal lines: a target, a link's rate.
    pub marks: Vec<(String, f64)>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// A bar: its label, its length, what is written at its end, where the target lies, and whether it was reached.
#[derive(Clone, Debug)]
pub struct Bar {
    pub label: String,
    pub value: f64,
    pub text: String,
    pub target: Option<f64>,
    pub reached: Option<bool>,
}

const WIDTH: f64 = 860.0;
const LABEL: f64 = 330.0;
const ROW: f64 = 24.0;
const TOP: f64 = 48.0;
const COLOURS: [&str; 5] = ["#2f6f9f", "#c9733a", "#5b8c5a", "#8a5a9c", "#777777"];
const GOOD: &str = "#5b8c5a";
const BAD: &str = "#b5483f";
const PLAIN: &str = "#2f6f9f";
/// Bars longer than this many times the target are cut off: a ratio of 300 shall not hide one of 0.9.
const SCALE_MAX: f64 = 4.0;

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

struct Svg(String);

impl Svg {
    fn new(height: f64, title: &str) -> Svg {
        let mut svg = Svg(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
        ));
        svg.text(12.0, 24.0, title, "start", "font-size=\"15\" font-weight=\"bold\"");
        svg
    }
    fn text(&mut self, x: f64, y: f64, text: &str, anchor: &str, extra: &str) {
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"#222222\" {extra}>{}</text>",
            escape(text)
        );
    }
    fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, colour: &str) {
        let _ = writeln!(
            self.0,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
        );
    }
    fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), style: &str) {
        let _ = writeln!(self.0, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" {style}/>");
    }
    fn end(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

/// Bars relative to their targets: the dashed line is "as good as the target"; a bar's own value stands at its end.
pub fn bars(title: &str, bars: &[Bar]) -> String {
    let height = TOP + bars.len() as f64 * ROW + 40.0;
    let mut svg = Svg::new(height, title);
    let room = WIDTH - LABEL - 130.0;
    let unit = room / SCALE_MAX;
    for (number, bar) in bars.iter().enumerate() {
        let y = TOP + number as f64 * ROW;
        let scaled = bar.value / bar.target.filter(|target| *target != 0.0).unwrap_or(1.0);
        let length = scaled.clamp(0.0, SCALE_MAX) * unit;
        let colour = match bar.reached {
            Some(true) => GOOD,
            Some(false) => BAD,
            None => PLAIN,
        };
        svg.text(LABEL - 8.0, y + 14.0, &bar.label, "end", "");
        match (bar.target, bar.reached) {
            // Without a target there is no scale to draw it on: only the number is shown.
            (None, None) => svg.text(LABEL + 6.0, y + 14.0, &bar.text, "start", "fill-opacity=\"0.8\""),
            _ => {
                svg.rect(LABEL, y + 3.0, length.max(1.0), ROW - 9.0, colour);
                svg.text(LABEL + length.max(1.0) + 6.0, y + 14.0, &bar.text, "start", "");
            }
        }
    }
    let bottom = TOP + bars.len() as f64 * ROW;
    let style = "stroke=\"#222222\" stroke-dasharray=\"4 3\"";
    svg.line((LABEL + unit, TOP - 6.0), (LABEL + unit, bottom + 4.0), style);
    svg.text(LABEL + unit, bottom + 18.0, "target", "middle", "");
    svg.text(
        WIDTH - 12.0,
        bottom + 34.0,
        "length: result / target; green: reached, red: missed",
        "end",
        "font-size=\"11\" fill-opacity=\"0.7\"",
    );
    svg.end()
}

/// A step of 1, 2 or 5 times a power of ten that gives about five lines.
fn step(largest: f64) -> f64 {
    let rough = (largest / 5.0).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|s| *s >= rough).unwrap_or(rough)
}

/// Lines over a common axis that begins at zero.
pub fn lines(title: &str, lines: &Lines) -> String {
    let (left, right, bottom, height) = (70.0, WIDTH - 20.0, 380.0, 440.0);
    let mut svg = Svg::new(height, title);
    let points = || lines.series.iter().flat_map(|series| &series.points);
    let marks = lines.marks.iter().map(|mark| mark.1);
    let x_max = points().map(|point| point.0).fold(1e-9, f64::max);
    let y_max = points().map(|point| point.1).chain(marks).fold(1e-9, f64::max) * 1.05;
    let x = |value: f64| left + value / x_max * (right - left);
    let y = |value: f64| bottom - value / y_max * (bottom - TOP - 20.0);
    for (largest, vertical) in [(x_max, true), (y_max, false)] {
        let step = step(largest);
        let decimals = if step < 1.0 { (-step.log10().floor()) as usize } else { 0 };
        for n in 0..=(largest / step) as usize {
            let value = n as f64 * step;
            let grid = "stroke=\"#dddddd\"";
            if vertical {
                svg.line((x(value), TOP), (x(value), bottom), grid);
                svg.text(x(value), bottom + 16.0, &format!("{value:.decimals$}"), "middle", "");
            } else {
                svg.line((left, y(value)), (right, y(value)), grid);
                svg.text(left - 6.0, y(value) + 4.0, &format!("{value:.decimals$}"), "end", "");
            }
        }
    }
    svg.text(right, bottom + 32.0, &lines.x, "end", "");
    svg.text(left, TOP - 6.0, &lines.y, "start", "");
    for (name, value) in &lines.marks {
        svg.line((left, y(*value)), (right, y(*value)), "stroke=\"#222222\" stroke-dasharray=\"4 3\"");
        svg.text(right - 4.0, y(*value) - 4.0, name, "end", "font-size=\"11\"");
    }
    for (number, series) in lines.series.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let path: String = series.points.iter().map(|point| format!("{:.1},{:.1} ", x(point.0), y(point.1))).collect();
        let _ = writeln!(
            svg.0,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\"/>",
            path.trim_end()
        );
        let at = left + 190.0 * number as f64;
        svg.rect(at, height - 18.0, 14.0, 4.0, colour);
        svg.text(at + 20.0, height - 12.0, &series.name, "start", "");
    }
    svg.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round_and_few() {
        assert_eq!(step(100.0), 20.0);
        assert_eq!(step(9.0), 2.0);
        assert_eq!(step(0.4), 0.1);
    }

    #[test]
    fn text_of_a_plot_is_escaped() {
        let bar =
            Bar { label: "a < b & c".into(), value: 2.0, text: "2".into(), target: Some(1.0), reached: Some(true) };
        assert!(bars("t", &[bar]).contains("a &lt; b &amp; c"));
    }
}
