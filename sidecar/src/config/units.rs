//! Durations, sizes and rates as people write them: `10s`, `64MiB`, `100Mbit`.
//!
//! A unit is always written: a bare number says too little to be safe. Sizes are bytes (`KiB` is 1024, `kB` is 1000),
//! rates are bits per second in decimal multiples, as links are sold.

use std::time::Duration;

use crate::throttle::Limit;

/// What a text should have looked like.
pub type Expected = &'static str;

pub const DURATION: Expected = "a duration such as \"500ms\", \"10s\", \"5m\", \"24h\" or \"7d\"";
pub const SIZE: Expected = "a size such as \"4096B\", \"64MiB\" or \"10GiB\"";
pub const RATE: Expected = "a rate such as \"5Mbit\", \"100Mbit\", \"1Gbit\" or \"unlimited\"";

const DURATIONS_MILLIS: &[(&str, u64)] =
    &[("ms", 1), ("s", 1_000), ("m", 60_000), ("min", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

const SIZES_BYTES: &[(&str, u64)] = &[
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

const RATES_BITS: &[(&str, u64)] = &[
    ("bit", 1),
    ("kbit", 1_000),
    ("Kbit", 1_000),
    ("Mbit", 1_000_000),
    ("Gbit", 1_000_000_000),
    ("bit/s", 1),
    ("kbit/s", 1_000),
    ("Mbit/s", 1_000_000),
    ("Gbit/s", 1_000_000_000),
];

/// `10s`, `1.5h`; also several parts, largest first is not required: `1h30m`.
pub fn duration(text: &str) -> Result<Duration, Expected> {
    let mut rest = text.trim();
    let mut millis: u64 = 0;
    if rest.is_empty() {
        return Err(DURATION);
    }
    while !rest.is_empty() {
        let unit_at = rest.find(|c: char| c.is_ascii_alphabetic()).ok_or(DURATION)?;
        let unit_end = rest[unit_at..].find(|c: char| !c.is_ascii_alphabetic()).map_or(rest.len(), |n| unit_at + n);
        let part = scaled(&rest[..unit_end], DURATIONS_MILLIS).ok_or(DURATION)?;
        millis = millis.checked_add(part).ok_or(DURATION)?;
        rest = rest[unit_end..].trim_start();
    }
    Ok(Duration::from_millis(millis))
}

/// Bytes.
pub fn size(text: &str) -> Result<u64, Expected> {
    scaled(text, SIZES_BYTES).ok_or(SIZE)
}

/// Bits per second; `unlimited` is a limit of its own, and zero is refused because it reads both ways.
pub fn rate(text: &str) -> Result<Limit, Expected> {
    if text.trim() == "unlimited" {
        return Ok(Limit::Unlimited);
    }
    match scaled(text, RATES_BITS) {
        Some(bits) if bits > 0 => Ok(Limit::BitsPerSecond(bits)),
        _ => Err(RATE),
    }
}

/// `<decimal> <unit>`, exactly: fractions must come out whole in the smallest unit (`0.5KiB` is 512, `0.3B` is refused).
fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let unit_at = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = (text[..unit_at].trim_end(), &text[unit_at..]);
    let (_, scale) = units.iter().find(|(name, _)| *name == unit)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 9 || (number.contains('.') && fraction.is_empty()) {
        return None;
    }
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return None;
    }
    let denominator = 10u128.pow(fraction.len() as u32);
    let numerator = u128::from(whole.parse::<u64>().ok()?) * denominator
        + if fraction.is_empty() { 0 } else { fraction.parse::<u128>().ok()? };
    let product = numerator.checked_mul(u128::from(*scale))?;
    if product % denominator != 0 {
        return None;
    }
    u64::try_from(product / denominator).ok()
}

/// For messages: the largest unit that divides the value.
pub fn show_size(bytes: u64) -> String {
    let best = SIZES_BYTES[..5].iter().rev().find(|(_, scale)| bytes >= *scale && bytes.is_multiple_of(*scale));
    best.map_or_else(|| format!("{bytes}B"), |(unit, scale)| format!("{}{unit}", bytes / scale))
}

/// For messages: the largest unit that divides the value.
pub fn show_duration(duration: Duration) -> String {
    let millis = duration.as_millis() as u64;
    let units = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];
    let best = units.iter().find(|(_, scale)| millis >= *scale && millis.is_multiple_of(*scale));
    best.map_or_else(|| "0s".to_owned(), |(unit, scale)| format!("{}{unit}", millis / scale))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_with_their_unit() {
        let table = [("500ms", 500), ("10s", 10_000), ("1.5h", 5_400_000), ("1h30m", 5_400_000), ("7d", 604_800_000)];
        for (text, millis) in table {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in
            ["", "10", "s", "10 parsecs", "-1s", "1e3s", "0.0001ms", "99999999999999999999s", "1h30", "1..5s", "1.s"]
        {
            assert_eq!(duration(text), Err(DURATION), "{text}");
        }
    }

    #[test]
    fn sizes_know_binary_from_decimal_and_refuse_fractions_of_a_byte() {
        let table = [("4096B", 4096), ("64MiB", 64 << 20), ("64 MiB", 64 << 20), ("0.5KiB", 512), ("1kB", 1000)];
        for (text, bytes) in table {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "64", "64mib", "64M", "0.3B", "16777216TiB", "１B"] {
            assert_eq!(size(text), Err(SIZE), "{text}");
        }
    }

    #[test]
    fn rates_are_bits_per_second() {
        assert_eq!(rate("100Mbit"), Ok(Limit::BitsPerSecond(100_000_000)));
        assert_eq!(rate("2.5Gbit/s"), Ok(Limit::BitsPerSecond(2_500_000_000)));
        assert_eq!(rate("unlimited"), Ok(Limit::Unlimited));
        for text in ["0Mbit", "100", "100MB", "none"] {
            assert_eq!(rate(text), Err(RATE), "{text}");
        }
    }

    #[test]
    fn values_are_shown_in_the_unit_a_person_would_choose() {
        assert_eq!(show_size(64 << 20), "64MiB");
        assert_eq!(show_size(1500), "1500B");
        assert_eq!(show_duration(Duration::from_secs(90)), "90s");
        assert_eq!(show_duration(Duration::from_secs(7200)), "2h");
        assert_eq!(show_duration(Duration::ZERO), "0s");
    }
}
