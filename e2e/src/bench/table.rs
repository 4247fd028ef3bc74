//! The Markdown table, and the part of `docs/BENCHMARKS.md` that is measured.
//!
//! What people write there (why a target is missed, what comes next) stands outside the two marks and is kept.

use super::{
    conditions::Conditions,
    measure::{Bound, Judged, Outcome, Row, median, percentile, show},
};

/// A figure and what it found, as kept between runs.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Found {
    pub id: String,
    pub title: String,
    pub target: String,
    pub method: String,
    pub conditions: Conditions,
    pub outcome: Outcome,
}

pub const BEGIN: &str = "<!-- measured: begin (written by `make bench`) -->";
pub const END: &str = "<!-- measured: end -->";

const HEAD: &str = "| | what | Watari | peer | result | target | |\n| --- | --- | ---: | ---: | ---: | ---: | --- |\n";

fn times(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0} ×"),
        v if v >= 10.0 => format!("{value:.1} ×"),
        _ => format!("{value:.2} ×"),
    }
}

fn result(row: &Row, value: f64) -> String {
    match row.judged {
        Judged::Ratio | Judged::Inverse => times(value),
        Judged::Ours | Judged::Difference => show(value, row.unit),
    }
}

fn line(id: &str, row: &Row) -> String {
    let results = row.results();
    let spread = match (results.len(), row.judged) {
        (0 | 1, _) => String::new(),
        _ => format!(" ({}–{})", bare(row, percentile(&results, 0.0)), bare(row, percentile(&results, 100.0))),
    };
    let peer = match row.theirs.is_empty() {
        true => row.peer.clone(),
        false => format!("{} {}", show(median(&row.theirs), row.unit), row.peer),
    };
    let target = match row.bound {
        Bound::AtLeast(bound) => format!("≥ {}", result(row, bound)),
        Bound::AtMost(bound) => format!("≤ {}", result(row, bound)),
        Bound::Shown => String::new(),
    };
    let verdict = match row.reached() {
        Some(true) => "reached",
        Some(false) => "**missed**",
        None => "",
    };
    let remark = if row.remark.is_empty() { String::new() } else { format!(" *({})*", row.remark) };
    format!(
        "| {id} | {}{remark} | {} | {peer} | {}{spread} | {target} | {verdict} |\n",
        row.what,
        show(median(&row.ours), row.unit),
        result(row, row.result()),
    )
}

fn bare(row: &Row, value: f64) -> String {
    result(row, value).trim_end_matches([' ', '×']).to_owned()
}

/// One table of everything.
pub fn whole(found: &[Found]) -> String {
    let mut text = HEAD.to_owned();
    for figure in found {
        figure.outcome.rows.iter().for_each(|row| text += &line(&figure.id, row));
    }
    text
}

/// The measured part of the document: one table, then what each figure's rows do not say.
pub fn section(found: &[Found]) -> String {
    let rows = found.iter().flat_map(|figure| &figure.outcome.rows);
    let judged: Vec<bool> = rows.filter_map(Row::reached).collect();
    let reached = judged.iter().filter(|reached| **reached).count();
    let mut text = format!(
        "{BEGIN}\n\n{reached} of {} judged rows reach their target. Medians of several repetitions; in parentheses the \
         smallest and largest result of a repetition; the two sides of a row took turns within each.\n\n{}\n",
        judged.len(),
        whole(found)
    );
    text +=
        "## Conditions\n\n| figure | date | commit | load before | repetitions |\n| --- | --- | --- | --- | --- |\n";
    for figure in found {
        let Conditions { date, commit, load, .. } = &figure.conditions;
        let repetitions = figure.outcome.rows.iter().map(|row| row.ours.len()).max().unwrap_or(0);
        text += &format!("| {} | {date} | {commit} | {load} | {repetitions} |\n", figure.id);
    }
    if let Some(figure) = found.last() {
        text += &format!("\n{}\n", figure.conditions.machine());
    }
    for figure in found {
        text += &format!(
            "\n## {}: {}\n\nTarget: {}\n\n{}\n\n![{}](benchmarks/{}.svg)\n",
            figure.id, figure.title, figure.target, figure.method, figure.title, figure.id
        );
        figure.outcome.notes.iter().for_each(|note| text += &format!("\n- {note}"));
        text += if figure.outcome.notes.is_empty() { "" } else { "\n" };
    }
    text + "\n" + END
}

/// `document` with its measured part replaced; a document without one gets it at its end.
pub fn replace(document: &str, section: &str) -> String {
    match (document.find(BEGIN), document.find(END)) {
        (Some(begin), Some(end)) if begin < end => {
            format!("{}{section}{}", &document[..begin], &document[end + END.len()..])
        }
        _ => format!("{}\n{section}\n", document.trim_end()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_wrote_around_the_measured_part_is_kept() {
        let old = format!("# Title\n\nwhy\n\n{BEGIN}\nold\n{END}\n\nnext steps\n");
        let new = replace(&old, &format!("{BEGIN}\nnew\n{END}"));
        assert_eq!(new, format!("# Title\n\nwhy\n\n{BEGIN}\nnew\n{END}\n\nnext steps\n"));
        assert_eq!(replace("# Title\n", "x"), "# Title\nx\n");
    }
}
