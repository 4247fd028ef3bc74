//! A report in words. Pure.

use watari_wire::report::{Condition, Report};

use crate::throttle::Limit;

/// The whole report, for one look.
pub fn page(report: &Report) -> Vec<String> {
    let mut lines = vec![
        format!("Pair    {} at {} (watari {})", report.pair, report.site, report.version),
        format!("Role    {}, epoch {}, {}", or(&report.role, "none yet"), report.epoch, trust(&report.trust)),
        format!("Peer    {}", link(report)),
        format!("Lag     {}", lag(report)),
    ];
    if let Some(sending) = sending(report) {
        lines.push(format!("Sending {sending}"));
    }
    if !report.generations.behind_because.is_empty() {
        lines.push(format!("Because {}", report.generations.behind_because));
    }
    if report.worker_restarts > 0 {
        lines.push(format!("Worker  restarted {} times", report.worker_restarts));
    }
    lines.extend(disks(report));
    lines.extend(verification(report));
    if let Some(alone) = &report.divergence {
        let much =
            if alone.anything { "any block may have been".to_owned() } else { format!("{} were", bytes(alone.bytes)) };
        lines.push(format!("Alone   {much} written here after {}", or(&alone.after, "the last common generation")));
    }
    if let Some(replica) = &report.replica {
        lines.push(format!(
            "Replica {}, committed {}, applied {}, journal {} of {}, undo {}, free {}",
            or(&replica.state, "unknown"),
            or(&replica.committed, "nothing"),
            or(&replica.applied, "nothing"),
            bytes(replica.journal_bytes),
            bytes(replica.journal_limit_bytes),
            bytes(replica.undo_bytes),
            bytes(replica.free_bytes)
        ));
        if !replica.kept.is_empty() {
            lines.push(format!("Kept    {}", replica.kept.join(" ")));
        }
    }
    lines.extend(conditions(report));
    lines
}

/// The report in one line, without the time, so that an unchanged line can be recognised.
pub fn line(report: &Report) -> String {
    let mut parts = vec![format!("{} epoch {}", or(&report.role, "starting"), report.epoch)];
    if !report.trust.is_empty() && report.trust != "Tracked" {
        parts.push(report.trust.clone());
    }
    parts.push(lag(report));
    parts.extend(sending(report));
    if !report.link.connected {
        parts.push("peer not connected".to_owned());
    }
    if !report.generations.behind_because.is_empty() {
        parts.push(format!("because {}", report.generations.behind_because));
    }
    let held: Vec<&str> = held(report).map(|condition| condition.kind.as_str()).collect();
    if !held.is_empty() {
        parts.push(format!("! {}", held.join(", ")));
    }
    parts.join("; ")
}

pub fn link(report: &Report) -> String {
    let link = &report.link;
    let limit = Limit::from_bits(link.limit_bits_per_second);
    if link.connected {
        let rate = format!("{}/s", bytes(link.rate_bytes_per_second.max(0.0) as u64));
        return format!("{} connected, RTT {:.0} ms, {rate}, limit {limit}", or(&link.peer, "peer"), link.rtt_millis);
    }
    let error = if link.last_error.is_empty() { String::new() } else { format!(": {}", link.last_error) };
    format!("{} not connected{error}", or(&link.peer, "peer"))
}

pub fn lag(report: &Report) -> String {
    let generations = &report.generations;
    if generations.committed.is_empty() {
        return format!("nothing committed yet, {} to send", bytes(generations.lag_bytes));
    }
    format!(
        "{} and {} behind, generation {} committed",
        seconds(generations.lag_seconds),
        bytes(generations.lag_bytes),
        generations.committed
    )
}

/// `None` while no generation is open.
pub fn sending(report: &Report) -> Option<String> {
    let generations = &report.generations;
    if generations.open.is_empty() {
        return None;
    }
    let eta = match generations.eta_seconds {
        Some(eta) => format!(", {} to go", seconds(eta)),
        None => String::new(),
    };
    Some(format!(
        "generation {}: {} of {} ({} %){eta}",
        generations.open,
        bytes(generations.open_sent_bytes),
        bytes(generations.open_total_bytes),
        percent(generations.open_sent_bytes, generations.open_total_bytes)
    ))
}

/// How far the comparison with the replica is; `None` where there is nothing to compare.
pub fn verification(report: &Report) -> Option<String> {
    let checked = report.verification.as_ref().filter(|v| v.pass_total_bytes > 0)?;
    let proved = match checked.proved_unix_millis {
        0 => "not yet proved identical as a whole".to_owned(),
        at => {
            let age = report.now_unix_millis.saturating_sub(at) as f64 / 1000.0;
            format!("all of it proved identical {} ago", seconds(age))
        }
    };
    let done = percent(checked.pass_bytes, checked.pass_total_bytes);
    Some(format!("Checked {done} % in this pass, {proved}, {} blocks differed", checked.differed_blocks))
}

/// A table with one row for each disk.
pub fn disks(report: &Report) -> Vec<String> {
    let width = report.disks.iter().map(|disk| disk.name.chars().count()).max().unwrap_or(0).max(4);
    let row = |name: &str, size: &str, dirty: &str, staged: &str, clients: &str| {
        format!("  {name:width$}  {size:>10}  {dirty:>10}  {staged:>10}  {clients:>7}")
    };
    let mut lines = Vec::new();
    if !report.disks.is_empty() {
        lines.push(row("disk", "size", "dirty", "staged", "clients"));
    }
    for disk in &report.disks {
        lines.push(row(
            &disk.name,
            &bytes(disk.size_bytes),
            &bytes(disk.dirty_bytes),
            &bytes(disk.staged_bytes),
            &disk.clients.to_string(),
        ));
    }
    lines
}

/// Conditions that hold, each with its next step.
pub fn conditions(report: &Report) -> Vec<String> {
    let mut lines = Vec::new();
    for condition in held(report) {
        let age = report.now_unix_millis.saturating_sub(condition.since_unix_millis) as f64 / 1000.0;
        let since = if condition.since_unix_millis == 0 { String::new() } else { format!(", for {}", seconds(age)) };
        let reason =
            if condition.reason.is_empty() { String::new() } else { format!(" ({}{since})", condition.reason) };
        lines.push(format!("! {}{reason}: {}", condition.kind, condition.message));
        if !condition.next_step.is_empty() {
            lines.push(format!("  next: {}", condition.next_step));
        }
    }
    lines
}

fn held(report: &Report) -> impl Iterator<Item = &Condition> {
    report.conditions.iter().filter(|condition| condition.status)
}

pub fn percent(part: u64, whole: u64) -> u64 {
    if whole == 0 {
        return 100;
    }
    (u128::from(part.min(whole)) * 100 / u128::from(whole)) as u64
}

/// `12.3 MiB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // What would round to 1024 belongs to the next unit.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value >= 99.95 { format!("{value:.0} {}", UNITS[unit]) } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// `4.2 s`, `3 min 20 s`, `5 h 12 min`.
pub fn seconds(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "unknown".to_owned();
    }
    if seconds < 59.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
    match (days, whole / 3600) {
        (0, 0) => format!("{minutes} min {} s", whole % 60),
        (0, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

/// Time of day in UTC.
pub fn clock(unix_millis: u64) -> String {
    time(unix_millis).map_or_else(|| "--:--:--Z".to_owned(), |time| time.strftime("%H:%M:%SZ").to_string())
}

/// Date and time of day in UTC.
pub fn date(unix_millis: u64) -> String {
    time(unix_millis).map_or_else(|| "at no known time".to_owned(), |time| time.strftime("%F %H:%M:%SZ").to_string())
}

fn time(unix_millis: u64) -> Option<jiff::Timestamp> {
    jiff::Timestamp::from_millisecond(i64::try_from(unix_millis).ok()?).ok()
}

fn trust(trust: &str) -> String {
    match trust {
        "" => "tracking unknown".to_owned(),
        trust => trust.to_lowercase(),
    }
}

fn or<'a>(text: &'a str, instead: &'a str) -> &'a str {
    if text.is_empty() { instead } else { text }
}

#[cfg(test)]
mod tests {
    use watari_wire::report::{DiskReport, ReplicaReport};

    use super::*;

    fn report() -> Report {
        let mut report = Report {
            pair: "default/vm1".to_owned(),
            site: "tokyo".to_owned(),
            version: "0.1.0".to_owned(),
            role: "Serving".to_owned(),
            trust: "Tracked".to_owned(),
            epoch: 3,
            now_unix_millis: 1_795_392_000_000,
            ..Report::default()
        };
        report.disks.push(DiskReport {
            name: "root".to_owned(),
            size_bytes: 10 << 30,
            dirty_bytes: 12_900_000,
            staged_bytes: 1 << 20,
            clients: 1,
        });
        report.link.connected = true;
        report.link.peer = "osaka.example:7070".to_owned();
        report.link.rtt_millis = 170.4;
        report.link.rate_bytes_per_second = 11_200_000.0;
        report.link.limit_bits_per_second = 100_000_000;
        report.generations.committed = "3.12".to_owned();
        report.generations.lag_seconds = 4.2;
        report.generations.lag_bytes = 12_900_000;
        report.generations.open = "3.13".to_owned();
        report.generations.open_total_bytes = 28 << 20;
        report.generations.open_sent_bytes = 14 << 20;
        report.generations.eta_seconds = Some(1.5);
        report
    }

    #[test]
    fn a_page_says_what_a_person_asks_for() {
        let mut report = report();
        report.generations.behind_because = "the guest writes faster than the limit".to_owned();
        report.conditions.push(Condition {
            kind: "CertificateExpiring".to_owned(),
            status: true,
            reason: "Soon".to_owned(),
            message: "ends in 3 days".to_owned(),
            next_step: "renew it".to_owned(),
            since_unix_millis: 1_795_391_990_000,
        });
        let page = page(&report).join("\n");
        assert_eq!(
            page,
            "Pair    default/vm1 at tokyo (watari 0.1.0)\n\
             Role    Serving, epoch 3, tracked\n\
             Peer    osaka.example:7070 connected, RTT 170 ms, 10.7 MiB/s, limit 100Mbit/s\n\
             Lag     4.2 s and 12.3 MiB behind, generation 3.12 committed\n\
             Sending generation 3.13: 14.0 MiB of 28.0 MiB (50 %), 1.5 s to go\n\
             Because the guest writes faster than the limit\n\
             \x20 disk        size       dirty      staged  clients\n\
             \x20 root    10.0 GiB    12.3 MiB     1.0 MiB        1\n\
             ! CertificateExpiring (Soon, for 10.0 s): ends in 3 days\n\
             \x20 next: renew it"
        );
    }

    #[test]
    fn a_condition_that_does_not_hold_is_not_shown() {
        let mut report = report();
        report.conditions.push(Condition { kind: "Diverged".to_owned(), ..Condition::default() });
        assert!(!page(&report).join("\n").contains("Diverged"));
        assert!(!line(&report).contains("Diverged"));
    }

    #[test]
    fn a_replica_and_a_lost_link_are_said_in_words() {
        let mut report = report();
        report.link.connected = false;
        report.link.last_error = "cannot reach osaka.example:7070".to_owned();
        report.generations.open.clear();
        report.replica = Some(ReplicaReport {
            state: "Ready".to_owned(),
            committed: "3.12".to_owned(),
            kept: vec!["3.11".to_owned(), "3.12".to_owned()],
            ..ReplicaReport::default()
        });
        let page = page(&report).join("\n");
        assert!(page.contains("osaka.example:7070 not connected: cannot reach"), "{page}");
        assert!(page.contains("Replica Ready, committed 3.12, applied nothing"), "{page}");
        assert!(page.contains("Kept    3.11 3.12"), "{page}");
        assert!(line(&report).contains("peer not connected"));
    }

    #[test]
    fn an_empty_report_of_a_starting_sidecar_reads_well() {
        let line = line(&Report::default());
        assert_eq!(line, "starting epoch 0; nothing committed yet, 0 B to send; peer not connected");
    }

    #[test]
    fn numbers_are_written_for_people() {
        let table = [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"), ((1 << 30) - 1, "1.0 GiB")];
        for (value, expected) in table {
            assert_eq!(bytes(value), expected);
        }
        let table = [
            (0.0, "0.0 s"),
            (59.9, "59.9 s"),
            (59.99, "1 min 0 s"),
            (3725.0, "1 h 2 min"),
            (90_000.0, "1 d 1 h"),
            (f64::NAN, "unknown"),
            (f64::INFINITY, "unknown"),
        ];
        for (value, expected) in table {
            assert_eq!(seconds(value), expected, "{value}");
        }
        assert_eq!((percent(1, 0), percent(5, 4), percent(1, 3)), (100, 100, 33));
        assert_eq!(clock(1_795_392_000_000), "00:00:00Z");
    }
}
