//! What a run has reached: transitions, messages, crash points, outcomes. Printed as a table; what had to be reached and
//! was not is a failure of the simulator.

use std::collections::BTreeMap;

/// Counts by name.
#[derive(Clone, Debug, Default)]
pub struct Coverage(pub BTreeMap<String, u64>);

impl Coverage {
    pub fn hit(&mut self, what: impl AsRef<str>) {
        match self.0.get_mut(what.as_ref()) {
            Some(n) => *n += 1,
            None => {
                self.0.insert(what.as_ref().to_owned(), 1);
            }
        }
    }

    pub fn add(&mut self, other: &Coverage) {
        for (what, n) in &other.0 {
            *self.0.entry(what.clone()).or_default() += n;
        }
    }

    pub fn get(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }

    /// Names of `wanted` that were never reached.
    pub fn missing<'a>(&self, wanted: &[&'a str]) -> Vec<&'a str> {
        wanted.iter().copied().filter(|w| self.get(w) == 0).collect()
    }

    pub fn table(&self) -> String {
        let width = self.0.keys().map(String::len).max().unwrap_or(0);
        self.0.iter().map(|(what, n)| format!("{what:width$}  {n}\n")).collect()
    }
}

/// What a budget of some hundred histories must have reached: each transition, message, crash and outcome that the
/// protocol has. Rarer ones are left to the soak.
pub const REQUIRED: &[&str] = &[
    "a commit list excludes blocks",
    "a dialled connection is outdated before it opens",
    "a frame of an old connection arrives",
    "a generation is given up",
    "a person reclaims",
    "a region is forgotten",
    "a region is logged before its first write",
    "a same frame",
    "a connection of a lower epoch is refused",
    "a second connection replaces the first",
    "a write past the gate meets the seal",
    "a zero frame",
    "apply: Capturing",
    "apply: Writing",
    "checked a kept generation",
    "commit",
    "commit lacks frames",
    "condition Fenced",
    "condition Unfenced",
    "condition WaitingForGrant",
    "converged",
    "cut with writes in flight",
    "early read: overwritten meanwhile",
    "fault: a connection breaks",
    "fault: kill -9",
    "fault: partition",
    "fault: power lost",
    "frame refused: below the floor",
    "frozen read: the guest was first, its preserved content is taken",
    "full compare: no common history",
    "killed as Converging",
    "killed as Fenced",
    "killed as Replica",
    "killed as Sealed",
    "killed as Serving",
    "move: Failed",
    "move: Resumed",
    "move: done",
    "planned move: the target's disks equal the source's",
    "power lost as Replica",
    "power lost as Serving",
    "preserved before overwrite",
    "promoted to an older generation",
    "promoted to the newest generation",
    "promoted while a QEMU is attached",
    "read early",
    "read frozen",
    "received Acquire",
    "received Activated",
    "received Attached",
    "received Baseline",
    "received Committed",
    "received DigestAsk",
    "received Digests",
    "received Durable",
    "received Grant",
    "received Lacks",
    "received List",
    "received Open",
    "received QemuLeft",
    "received Read",
    "received ReadReply",
    "received Released",
    "received Superseded",
    "received TakeOver",
    "received Void",
    "received Voided",
    "resend",
    "role Converging -> Fenced by Met",
    "role Converging -> Sealed by Acquire",
    "role Converging -> Serving by Void",
    "role Fenced -> Released by AcceptDivergence",
    "role Promoting -> Serving by Rolled",
    "role Released -> Replica by Adopted",
    "role Replica -> Promoting by Promote",
    "role Replica -> Serving by Applied",
    "role Replica -> Voided by WantVoid",
    "role Sealed -> Released by Activated",
    "role Sealed -> Released by Met",
    "role Serving -> Converging by OpenHandover",
    "role Serving -> Fenced by Met",
    "role Serving -> Sealed by TakeOver",
    "role Voided -> Replica by Voided",
    "send preserved",
    "start: marks survived in mapped memory",
    "start: regions of the log are compared",
    "target: full",
    "two sides serve in two epochs",
    "a guest that never writes again has moved",
    "a peer without a common version is refused",
    "a write is passed through",
    "an old intent is refused: the site differs",
    "asked again: open a handover",
    "asked again: void",
    "fault: a Pod goes",
    "fault: a clock is set back",
    "fault: a clock is set forward",
    "fault: a folder is lost",
    "fault: a folder is restored from an old copy",
    "fault: a foreign hand in the replica",
    "fault: a foreign writer while stopped",
    "fault: the region log cannot be written",
    "full compare: changes were not logged for a while",
    "full compare: somebody else wrote to the disks",
    "full compare: writes were let through that no log holds",
    "held 20 s, then EIO: Hold",
    "held 20 s, then EIO: Remote",
    "received a message of a newer version",
    "start as a pass-through",
    "the pair becomes Untracked",
    "the pair is Tracked again",
    "the source's Pod goes before Released",
    "verification finds a disk that lies",
    "verification finds a foreign hand in the replica",
    "verification: a pass",
];
