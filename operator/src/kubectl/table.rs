//! Text in columns, and amounts for people.

/// Rows under a head, padded with spaces; the last column is not.
pub fn columns(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(cells) {
            line.push_str(&format!("{cell:width$}   "));
        }
        line.trim_end().to_owned() + "\n"
    };
    let mut text = line(&mut head.iter().copied());
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

/// "0 B", "12.0 MiB".
pub fn bytes(count: i64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let (mut value, mut unit) = (count as f64 / 1024.0, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// "8s", "12m05s", "3h07m", "2d04h".
pub fn seconds(count: i64) -> String {
    let (minutes, hours, days) = (count / 60, count / 3600, count / 86_400);
    match count {
        ..60 => format!("{}s", count.max(0)),
        60..3600 => format!("{minutes}m{:02}s", count % 60),
        3600..86_400 => format!("{hours}h{:02}m", minutes % 60),
        86_400.. => format!("{days}d{:02}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["a".to_owned(), "long cell".to_owned(), "x".to_owned()]];
        assert_eq!(columns(&["NAME", "B", "C"], &rows), "NAME   B           C\na      long cell   x\n");
    }

    #[test]
    fn amounts_are_short_and_keep_their_order_of_magnitude() {
        for (count, text) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (12 << 20, "12.0 MiB"), (i64::MAX, "8192.0 PiB")]
        {
            assert_eq!(bytes(count), text);
        }
        for (count, text) in [(-1, "0s"), (59, "59s"), (725, "12m05s"), (11_220, "3h07m"), (187_200, "2d04h")] {
            assert_eq!(seconds(count), text);
        }
    }
}
