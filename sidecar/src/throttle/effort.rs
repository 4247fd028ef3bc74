//! How hard to compress: the zstd level, from what the link carries against what the CPU can do (design §3.3). Pure; the
//! caller measures.
//!
//! One step at a time, and only on a clear difference, so that the level does not swing with every sample. A link that
//! is faster than the CPU at the lowest level is not helped by compressing at all, but content that compresses well is
//! cheap there, too: the lowest level stays, and incompressible content goes raw whatever the level.

/// Levels that are worth having, from cheap to thorough (zstd's negative levels are its fast ones).
pub const LADDER: [i32; 6] = [-5, -1, 1, 3, 6, 9];
/// Below this many times the link's rate the CPU is what limits: one step down.
pub const TIGHT: f64 = 1.5;
/// Above this many times the link's rate there is CPU to spare: one step up. A step costs about half of the speed.
pub const AMPLE: f64 = 6.0;

/// What was measured since the last decision. Rates in bytes per second; 0: nothing was.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measured {
    /// What the link carries (payload as sent), or what the limit allows, if that is less.
    pub link: f64,
    /// Content that one thread compresses in a second at the present level.
    pub thread: f64,
    /// Threads' worth of CPU that may be spent on it.
    pub threads: f64,
    /// Content bytes per payload byte, at least 1: the link carries so much more content than payload.
    pub ratio: f64,
}

/// The level to use next, from the one used until now.
pub fn next_level(previous: i32, measured: Measured) -> i32 {
    let at = LADDER.iter().rposition(|l| *l <= previous).unwrap_or(0);
    let Measured { link, thread, threads, ratio } = measured;
    if link <= 0.0 || thread <= 0.0 {
        return LADDER[at];
    }
    let spare = thread * threads / (link * ratio.max(1.0));
    if spare < TIGHT {
        LADDER[at.saturating_sub(1)]
    } else if spare > AMPLE {
        LADDER[(at + 1).min(LADDER.len() - 1)]
    } else {
        LADDER[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(link_mbit: f64, thread_mbyte: f64, ratio: f64) -> Measured {
        Measured { link: link_mbit * 125_000.0, thread: thread_mbyte * 1e6, threads: 1.0, ratio }
    }

    #[test]
    fn a_thin_link_is_worth_more_of_the_cpu_and_a_fat_one_less() {
        let table = [
            ("5 Mbit/s, 300 MB/s per thread", 1, measured(5.0, 300.0, 1.0), 3),
            ("100 Mbit/s, enough to spare", 1, measured(100.0, 300.0, 1.0), 3),
            ("100 Mbit/s, just right", 3, measured(100.0, 60.0, 1.0), 3),
            ("1 Gbit/s, the CPU limits", 1, measured(1000.0, 150.0, 1.0), -1),
            ("content shrinks to a third: the link carries three times as much", 1, measured(400.0, 150.0, 3.0), -1),
            ("nothing lower", -5, measured(10_000.0, 500.0, 1.0), -5),
            ("nothing higher", 9, measured(1.0, 500.0, 1.0), 9),
            ("nothing was sent", 3, measured(0.0, 500.0, 1.0), 3),
            ("nothing was compressed", 3, measured(100.0, 0.0, 1.0), 3),
            ("a level between two steps is the lower one", 2, measured(100.0, 40.0, 1.0), 1),
        ];
        for (name, previous, measured, expected) in table {
            assert_eq!(next_level(previous, measured), expected, "{name}");
        }
    }

    #[test]
    fn a_steady_load_does_not_swing_when_a_step_halves_the_speed() {
        let mut level = 1;
        let mut seen = Vec::new();
        for _ in 0..20 {
            let steps = LADDER.iter().position(|l| *l == level).expect("on the ladder") as i32;
            let thread = 600.0 / f64::from(1 << steps);
            level = next_level(level, measured(100.0, thread, 1.0));
            seen.push(level);
        }
        assert!(seen[5..].windows(2).all(|w| w[0] == w[1]), "{seen:?}");
    }
}
