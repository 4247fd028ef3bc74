//! Which version of the protocol two sides speak with each other (`PROTOCOL.md`, Versions). Decided by each side alone from
//! the other's Hello, and both come to the same answer.

/// The versions that a side speaks: all from the lowest to the highest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Speaks {
    pub lowest: u32,
    pub highest: u32,
}

impl Speaks {
    /// This code.
    pub const OURS: Speaks = Speaks { lowest: 1, highest: 1 };

    /// The highest version that both speak; `None`: the link ends with `ProtocolTooOld`. Version 0 does not exist (a Hello
    /// that does not say), and a range that ends before it begins has nothing in common with anybody.
    pub fn common(self, theirs: Speaks) -> Option<u32> {
        let lowest = self.lowest.max(theirs.lowest).max(1);
        let highest = self.highest.min(theirs.highest);
        let both_are_ranges = self.lowest <= self.highest && theirs.lowest <= theirs.highest;
        (both_are_ranges && lowest <= highest).then_some(highest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speaks(lowest: u32, highest: u32) -> Speaks {
        Speaks { lowest, highest }
    }

    #[test]
    fn two_sides_speak_the_highest_version_that_both_know_or_none() {
        let cases = [
            ("the only version there is", speaks(1, 1), speaks(1, 1), Some(1)),
            ("n and n-1, upgraded first here", speaks(1, 2), speaks(1, 1), Some(1)),
            ("n and n-1, upgraded first there", speaks(1, 1), speaks(1, 2), Some(1)),
            ("n and n+1, both with an overlap", speaks(2, 3), speaks(1, 2), Some(2)),
            ("one inside the other", speaks(1, 9), speaks(3, 4), Some(4)),
            ("the peer gave the old one up", speaks(1, 1), speaks(2, 2), None),
            ("we gave the old one up", speaks(2, 3), speaks(1, 1), None),
            ("a Hello that does not say", speaks(1, 1), speaks(0, 0), None),
            ("two that do not say", speaks(0, 0), speaks(0, 0), None),
            ("from nothing up to ours", speaks(1, 1), speaks(0, 1), Some(1)),
            ("a range that ends before it begins", speaks(1, 3), speaks(3, 2), None),
            ("such a range around ours", speaks(2, 2), speaks(9, 1), None),
            ("the largest numbers there are", speaks(1, u32::MAX), speaks(u32::MAX, u32::MAX), Some(u32::MAX)),
        ];
        for (what, ours, theirs, common) in cases {
            assert_eq!(ours.common(theirs), common, "{what}");
            assert_eq!(theirs.common(ours), common, "{what}: the other side must come to the same answer");
        }
    }

    #[test]
    fn the_version_before_ours_is_spoken_as_long_as_there_is_one() {
        let Speaks { highest, .. } = Speaks::OURS;
        let before = speaks((highest - 1).max(1), (highest - 1).max(1));
        assert!(Speaks::OURS.common(before).is_some(), "a pair is upgraded one side after the other");
    }
}
