//! Runs of zeroes in what was read, so that holes go out as twelve bytes instead of their content.
//!
//! Content decides, not allocation: a hole chunk only says "reads as zeroes" ("NBD_REPLY_TYPE_OFFSET_HOLE"), looking is
//! cheaper than asking the file system, and it cannot race with a writer.

/// Unit of looking, in bytes.
const STEP: usize = 4096;
/// Shorter runs of zeroes inside other data are sent as data, in bytes: a chunk of its own costs the client more.
const HOLE_BYTES_MIN: usize = 32 << 10;
/// Most runs of one part: alternating holes and data at the smallest hole, and both ends.
pub(crate) const RUNS_MAX: usize = 2 * (crate::limits::PART_BYTES as usize / HOLE_BYTES_MIN) + 1;

/// A run within a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Run {
    pub start: u32,
    pub end: u32,
    pub zero: bool,
}

/// The runs that cover a buffer, in order, without gaps; none for an empty buffer.
pub(crate) struct Runs {
    runs: [Run; RUNS_MAX],
    count: usize,
}

impl Runs {
    /// All of it as data.
    pub fn data(length: usize) -> Runs {
        let mut runs = Runs { runs: [Run::default(); RUNS_MAX], count: 0 };
        if length > 0 {
            runs.push(0, length, false);
        }
        runs
    }

    /// Find the zeroes. A buffer that is zero throughout is one hole, however short it is.
    pub fn of(buffer: &[u8]) -> Runs {
        let mut runs = Runs { runs: [Run::default(); RUNS_MAX], count: 0 };
        let (mut data_from, mut zero_from) = (0, 0);
        let mut at = 0;
        while at < buffer.len() {
            let end = (at + STEP).min(buffer.len());
            if !is_zero(&buffer[at..end]) {
                if at - zero_from >= HOLE_BYTES_MIN && runs.count + 3 <= RUNS_MAX {
                    runs.push(data_from, zero_from, false);
                    runs.push(zero_from, at, true);
                    data_from = at;
                }
                zero_from = end;
            }
            at = end;
        }
        let tail = buffer.len() - zero_from;
        if tail == buffer.len() || tail >= HOLE_BYTES_MIN {
            runs.push(data_from, zero_from, false);
            runs.push(zero_from, buffer.len(), true);
        } else {
            runs.push(data_from, buffer.len(), false);
        }
        runs
    }

    fn push(&mut self, start: usize, end: usize, zero: bool) {
        if end > start && self.count < RUNS_MAX {
            self.runs[self.count] = Run { start: start as u32, end: end as u32, zero };
            self.count += 1;
        }
    }

    pub fn as_slice(&self) -> &[Run] {
        &self.runs[..self.count]
    }
}

/// Whether all bytes are zero. Data nearly always says no at its first byte; the rest is one memcmp with itself.
fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && bytes[..rest.len()] == *rest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_cover_everything_in_order_and_only_zeroes_are_called_zero(
            pieces in proptest::collection::vec((1usize..40, any::<bool>()), 0..24),
            odd in 0usize..600,
        ) {
            let mut buffer = Vec::new();
            for (steps, data) in pieces {
                let from = buffer.len();
                buffer.resize(from + steps * STEP, 0);
                if data {
                    buffer[from + steps * STEP / 2] = 7;
                }
            }
            buffer.resize(buffer.len() + odd, 0);
            buffer.truncate(crate::limits::PART_BYTES as usize);
            let runs = Runs::of(&buffer);
            let mut at = 0;
            for run in runs.as_slice() {
                prop_assert_eq!(run.start, at);
                prop_assert!(run.end > run.start);
                if run.zero {
                    prop_assert!(buffer[run.start as usize..run.end as usize].iter().all(|b| *b == 0));
                }
                at = run.end;
            }
            prop_assert_eq!(at as usize, buffer.len());
        }
    }

    #[test]
    fn a_zero_buffer_is_one_hole_and_the_finest_pattern_fits() {
        assert_eq!(Runs::of(&[0; 512]).as_slice(), [Run { start: 0, end: 512, zero: true }]);
        let mut buffer = vec![0u8; 1 << 20];
        for at in (0..buffer.len()).step_by(HOLE_BYTES_MIN + STEP) {
            buffer[at] = 1;
        }
        let runs = Runs::of(&buffer);
        assert_eq!(runs.as_slice().last().map(|r| r.end), Some(1 << 20));
        assert!(runs.as_slice().len() > 50);
    }
}
