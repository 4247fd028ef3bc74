//! Giving way to the guest: when its own I/O gets slower than it is on an idle disk, replication reads and sends less.
//! Pure; the caller measures.
//!
//! Hysteresis on purpose: between the two ratios the factor stays, so that the rate does not swing with every sample.
//! It falls by a share and rises by a step, as congestion control does; it never reaches zero, because then a busy
//! guest would never be replicated (best effort).

use std::time::Duration;

/// Slower than this many times its idle latency: the guest is being hurt, give way.
pub const RATIO_HIGH: f64 = 2.0;
/// Below this many times its idle latency: there is room again.
pub const RATIO_LOW: f64 = 1.3;
/// Latencies below this never count as hurt: on a fast disk a ratio of two is noise.
pub const LATENCY_FLOOR: Duration = Duration::from_micros(500);
pub const FACTOR_MIN: f64 = 0.1;
pub const FACTOR_MAX: f64 = 1.0;
const DECREASE: f64 = 0.7;
const INCREASE: f64 = 0.1;

/// The share of the allowed rate to use next, from the share used until now.
///
/// `recent` is a high percentile of guest request latency over the last interval (`None`: the guest did nothing, so
/// nobody is hurt), `idle` the same percentile measured while nothing was sent (`None`: not known yet, stay).
pub fn next_factor(previous: f64, recent: Option<Duration>, idle: Option<Duration>) -> f64 {
    let previous = if previous.is_nan() { FACTOR_MIN } else { previous.clamp(FACTOR_MIN, FACTOR_MAX) };
    let rise = (previous + INCREASE).min(FACTOR_MAX);
    let Some(recent) = recent else { return rise };
    if recent < LATENCY_FLOOR {
        return rise;
    }
    let Some(idle) = idle else { return previous };
    let ratio = recent.as_secs_f64() / idle.as_secs_f64().max(1e-6);
    if ratio > RATIO_HIGH {
        (previous * DECREASE).max(FACTOR_MIN)
    } else if ratio < RATIO_LOW {
        rise
    } else {
        previous
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Option<Duration> {
        Some(Duration::from_millis(millis))
    }

    #[test]
    fn the_factor_falls_when_hurt_rises_when_not_and_stays_between() {
        let table = [
            ("hurt", 1.0, ms(10), ms(2), 0.7),
            ("hurt at the minimum", 0.1, ms(10), ms(2), 0.1),
            ("between the ratios", 0.5, ms(16), ms(10), 0.5),
            ("exactly the high ratio stays", 0.5, ms(20), ms(10), 0.5),
            ("room again", 0.5, ms(10), ms(10), 0.6),
            ("never above one", 1.0, ms(10), ms(10), 1.0),
            ("an idle guest is not hurt", 0.5, None, ms(10), 0.6),
            ("no baseline yet", 0.5, ms(10), None, 0.5),
            ("below the floor is noise", 0.5, Some(Duration::from_micros(400)), Some(Duration::from_micros(20)), 0.6),
            ("a baseline of zero", 1.0, ms(10), ms(0), 0.7),
            ("nonsense comes in, sense goes out", f64::NAN, ms(10), ms(2), 0.1),
        ];
        for (name, previous, recent, idle, expected) in table {
            let next = next_factor(previous, recent, idle);
            assert!((next - expected).abs() < 1e-9, "{name}: {next}");
        }
    }

    #[test]
    fn a_steady_load_between_the_ratios_does_not_swing() {
        let mut factor = 0.4;
        for round in 0..1000 {
            factor = next_factor(factor, ms(14 + round % 5), ms(10));
        }
        assert_eq!(factor, 0.4);
    }

    #[test]
    fn full_rate_is_back_ten_calm_intervals_after_the_worst() {
        let mut factor = 1.0;
        for _ in 0..50 {
            factor = next_factor(factor, ms(100), ms(1));
        }
        assert_eq!(factor, FACTOR_MIN);
        for _ in 0..10 {
            factor = next_factor(factor, ms(1), ms(1));
        }
        assert_eq!(factor, FACTOR_MAX);
    }
}
