//! Limits by time of day and day of the week, in UTC. Pure: the wall clock comes in as Unix seconds.
//!
//! UTC on purpose: the two sites of a pair rarely share a time zone, and daylight saving would make a window ambiguous
//! twice a year. A clock that jumps changes the limit, never the stream.

use std::{fmt, str::FromStr};

use super::Limit;

const MINUTE_SECONDS: i64 = 60;
const DAY_SECONDS: i64 = 86_400;
/// 1970-01-01 was a Thursday; days are counted from Monday.
const EPOCH_WEEKDAY: i64 = 3;
const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// A time of day, in minutes since midnight UTC; `24:00` (1440) is allowed as an end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct TimeOfDay(pub u16);

/// A set of days of the week.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Days(u8);

/// From `from` (inclusive) to `to` (exclusive) on each of `days`; a window whose end is not after its beginning goes on
/// to that time of the next day, and belongs to the day on which it began.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    pub days: Days,
    pub from: TimeOfDay,
    pub to: TimeOfDay,
    pub limit: Limit,
}

/// The first window that holds decides; outside all windows, the base limit.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Schedule {
    pub base: Limit,
    pub windows: Vec<Window>,
}

impl Schedule {
    /// The limit at this instant.
    pub fn limit_at(&self, unix_seconds: i64) -> Limit {
        self.windows.iter().find(|window| window.holds(unix_seconds)).map_or(self.base, |window| window.limit)
    }
}

impl Window {
    fn holds(&self, unix_seconds: i64) -> bool {
        let minute = (unix_seconds.rem_euclid(DAY_SECONDS) / MINUTE_SECONDS) as u16;
        let weekday = (unix_seconds.div_euclid(DAY_SECONDS) + EPOCH_WEEKDAY).rem_euclid(7) as u8;
        let yesterday = (weekday + 6) % 7;
        if self.from < self.to {
            return self.days.contains(weekday) && (self.from.0..self.to.0).contains(&minute);
        }
        (self.days.contains(weekday) && minute >= self.from.0) || (self.days.contains(yesterday) && minute < self.to.0)
    }
}

impl Days {
    pub const ALL: Days = Days(0x7f);

    /// Monday is 0.
    fn contains(self, weekday: u8) -> bool {
        self.0 & (1 << weekday) != 0
    }
}

impl FromStr for Days {
    type Err = ();

    /// `mon`, `mon-fri`, `sat,sun`, `fri-mon` (over the weekend), `daily`.
    fn from_str(text: &str) -> Result<Self, ()> {
        if text == "daily" {
            return Ok(Days::ALL);
        }
        let index = |name: &str| DAYS.iter().position(|day| *day == name.trim()).ok_or(());
        let mut days = 0;
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (index(first)?, index(last)?);
            let count = (last + 7 - first) % 7;
            for step in 0..=count {
                days |= 1 << ((first + step) % 7);
            }
        }
        Ok(Days(days))
    }
}

impl FromStr for TimeOfDay {
    type Err = ();

    /// `HH:MM`, from `00:00` to `24:00`.
    fn from_str(text: &str) -> Result<Self, ()> {
        let two = |text: &str| -> Result<u16, ()> {
            if text.len() != 2 || !text.bytes().all(|b| b.is_ascii_digit()) {
                return Err(());
            }
            text.parse().map_err(|_| ())
        };
        let (hours, minutes) = text.split_once(':').ok_or(())?;
        let (hours, minutes) = (two(hours)?, two(minutes)?);
        let total = hours * 60 + minutes;
        if minutes > 59 || total > 1440 {
            return Err(());
        }
        Ok(TimeOfDay(total))
    }
}

impl fmt::Display for TimeOfDay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.0 / 60, self.0 % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-23 00:00:00 UTC, a Monday.
    const MONDAY: i64 = 1_795_392_000;
    const HOUR: i64 = 3600;

    fn window(days: &str, from: &str, to: &str, mbit: u64) -> Window {
        Window {
            days: days.parse().expect("days"),
            from: from.parse().expect("from"),
            to: to.parse().expect("to"),
            limit: Limit::BitsPerSecond(mbit * 1_000_000),
        }
    }

    #[test]
    fn the_first_window_that_holds_decides() {
        let schedule = Schedule {
            base: Limit::BitsPerSecond(100_000_000),
            windows: vec![window("mon-fri", "08:00", "18:00", 10), window("daily", "00:00", "24:00", 500)],
        };
        let table = [
            (MONDAY + 8 * HOUR - 1, 500),
            (MONDAY + 8 * HOUR, 10),
            (MONDAY + 18 * HOUR - 1, 10),
            (MONDAY + 18 * HOUR, 500),
            (MONDAY + 5 * 24 * HOUR + 9 * HOUR, 500),
            (MONDAY - 3 * 24 * HOUR + 9 * HOUR, 10),
        ];
        for (at, mbit) in table {
            assert_eq!(schedule.limit_at(at), Limit::BitsPerSecond(mbit * 1_000_000), "at {at}");
        }
    }

    #[test]
    fn a_window_over_midnight_belongs_to_the_day_on_which_it_begins() {
        let schedule = Schedule { base: Limit::Unlimited, windows: vec![window("fri", "22:00", "06:00", 1)] };
        let friday = MONDAY + 4 * 24 * HOUR;
        let limited = Limit::BitsPerSecond(1_000_000);
        let table = [
            (friday + 6 * HOUR - 1, Limit::Unlimited),
            (friday + 22 * HOUR, limited),
            (friday + 30 * HOUR - 1, limited),
            (friday + 30 * HOUR, Limit::Unlimited),
            (friday + 46 * HOUR, Limit::Unlimited),
        ];
        for (at, limit) in table {
            assert_eq!(schedule.limit_at(at), limit, "at {at}");
        }
    }

    #[test]
    fn without_windows_the_base_limit_holds_also_before_1970() {
        let schedule = Schedule { base: Limit::Paused, windows: Vec::new() };
        assert_eq!(schedule.limit_at(-1), Limit::Paused);
        let schedule = Schedule { base: Limit::Unlimited, windows: vec![window("wed", "23:59", "24:00", 1)] };
        assert_eq!(schedule.limit_at(-1), Limit::BitsPerSecond(1_000_000), "the last second of a Wednesday");
    }

    #[test]
    fn days_and_times_are_read_strictly() {
        assert_eq!("fri-mon".parse::<Days>(), "mon,fri,sat,sun".parse::<Days>());
        assert_eq!("mon-sun".parse::<Days>(), Ok(Days::ALL));
        for text in ["", "monday", "mon-", "mon;tue", "MON"] {
            assert!(text.parse::<Days>().is_err(), "{text}");
        }
        assert_eq!("24:00".parse::<TimeOfDay>(), Ok(TimeOfDay(1440)));
        for text in ["", "8:00", "08:60", "24:01", "25:00", "08-00", "+8:00", "08:00:00"] {
            assert!(text.parse::<TimeOfDay>().is_err(), "{text}");
        }
    }
}
