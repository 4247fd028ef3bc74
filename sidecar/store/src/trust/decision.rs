//! What a start means: a pure, total function over what was found. Never a full comparison without its reason (I9).

use watari_core::regions::RegionSet;
use watari_core::regions::trust::{Phase, TrustRecord};

use super::{TrustUnusable, Verdict};
use crate::maps::{Facts, MapRefused};
use crate::regions::LogUnusable;

/// What the trust record and the disks say together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TrustFact {
    /// Stopped cleanly, and nobody wrote since.
    Clean {
        starts: u64,
        /// The pair was `Untracked` at the stop.
        untracked: bool,
    },
    /// Not stopped cleanly; the disks are the same ones.
    Unclean { starts: u64 },
    /// No usable record, or the disks are not as recorded.
    Untrusted { starts: u64, reason: String },
}

impl TrustFact {
    /// From [`super::read_record`] and [`super::check`].
    pub fn new(record: &Result<TrustRecord, TrustUnusable>, verdict: impl FnOnce(&TrustRecord) -> Verdict) -> Self {
        match record {
            Err(e) => TrustFact::Untrusted { starts: 0, reason: e.to_string() },
            Ok(record) => match (verdict(record), record.phase) {
                (Verdict::Untrusted(reason), _) => TrustFact::Untrusted { starts: record.starts, reason },
                (Verdict::Trusted, Phase::CleanStop) => {
                    TrustFact::Clean { starts: record.starts, untracked: record.untracked }
                }
                (Verdict::Trusted, Phase::Serving) => TrustFact::Unclean { starts: record.starts },
            },
        }
    }

    fn starts(&self) -> u64 {
        match self {
            TrustFact::Clean { starts, .. } | TrustFact::Unclean { starts } | TrustFact::Untrusted { starts, .. } => {
                *starts
            }
        }
    }
}

/// What the map memory says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MapFact {
    /// The marks of the recorded start, complete unless `untracked`.
    Usable {
        untracked: bool,
    },
    Unusable(String),
}

impl MapFact {
    /// From an opened map and the record of the last start.
    pub fn new(map: Result<Facts<'_>, MapRefused>, record: &Result<TrustRecord, TrustUnusable>) -> Self {
        match (map, record) {
            (Err(refused), _) => MapFact::Unusable(refused.to_string()),
            (Ok(_), Err(_)) => MapFact::Unusable("no record says which start the map belongs to".into()),
            (Ok(facts), Ok(record)) if facts.belongs_to_start(record.start_id) => {
                MapFact::Usable { untracked: facts.untracked() }
            }
            (Ok(_), Ok(_)) => {
                MapFact::Unusable("the map belongs to an earlier start: the VM ran elsewhere since".into())
            }
        }
    }
}

/// What the region log says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LogFact {
    Usable { log_id: u64, heartbeat: Option<u64>, dirty: RegionSet },
    Unusable(String),
}

impl LogFact {
    /// From [`crate::regions::read_log`].
    pub fn new(log: Result<watari_core::regions::log::Recovered, LogUnusable>) -> Self {
        match log {
            Ok(log) => LogFact::Usable { log_id: log.log_id, heartbeat: log.heartbeat, dirty: log.dirty },
            Err(e) => LogFact::Unusable(e.to_string()),
        }
    }
}

/// What the peer (or the status) last heard from this source. `None` in [`StartFacts`] means nothing, or not asked yet;
/// the decision may be made again when the peer has answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heard {
    /// The start counter that the peer echoes.
    pub starts: u64,
    pub log_id: u64,
    pub heartbeat: u64,
    /// The source said that it was `Untracked`.
    pub untracked: bool,
}

/// Everything that a start found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StartFacts {
    pub trust: TrustFact,
    pub map: MapFact,
    pub log: LogFact,
    pub heard: Option<Heard>,
}

/// Where the marks come from after a clean stop.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Marks {
    /// The map memory is still there.
    Map,
    /// It is not: these regions may hold what the target lacks; compare them by digest. Often none.
    Regions(RegionSet),
}

/// What must be done before the replica can be believed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StartState {
    /// Nobody wrote since the clean stop: go on.
    Clean(Marks),
    /// The worker died, its marks live: every mark goes back to `current`.
    UncleanWithMap,
    /// The node died: compare these regions by digest, send the differences.
    UncleanWithLog(RegionSet),
    /// Compare everything by digest. The reason becomes a condition and an event.
    FullCompare(FullCompareReason),
}

/// Why everything must be compared.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FullCompareReason {
    #[error("the metadata folder is an old copy: it has seen {recorded} starts, the peer knows of {witnessed}")]
    FolderBehind { recorded: u64, witnessed: u64 },
    #[error("nothing proves that nobody else wrote to the disks: {0}")]
    Untrusted(String),
    #[error("the pair was Untracked: writes were let through that no log holds")]
    Untracked,
    #[error("no record of the changes is left: {map}; {log}")]
    NothingLeft { map: String, log: String },
    #[error(
        "the map is gone ({map}) and the peer heard nothing since the log's last heartbeat ({heartbeat}), so the source \
         may have been Untracked at the end"
    )]
    NoContact { map: String, heartbeat: String },
}

/// Decide what a start means. First match wins:
///
/// | found | outcome |
/// | --- | --- |
/// | fewer starts recorded than the peer knows of | full: folder behind |
/// | disks or record not trusted | full: untrusted |
/// | `Untracked` in the map, in the clean record, or (map gone) as the peer heard it | full: untracked |
/// | clean, map usable | clean, marks from the map |
/// | clean, log usable | clean, marks from the log |
/// | unclean, map usable | unclean with map |
/// | unclean, log usable, peer heard its last heartbeat | unclean with log |
/// | unclean, log usable, peer did not | full: no contact |
/// | neither map nor log | full: nothing left |
pub fn decide(facts: StartFacts) -> StartState {
    use StartState::FullCompare;
    let StartFacts { trust, map, log, heard } = facts;
    let recorded = trust.starts();
    if let Some(heard) = heard
        && heard.starts > recorded
    {
        return FullCompare(FullCompareReason::FolderBehind { recorded, witnessed: heard.starts });
    }
    let clean = match trust {
        TrustFact::Untrusted { reason, .. } => return FullCompare(FullCompareReason::Untrusted(reason)),
        TrustFact::Clean { untracked: true, .. } => return FullCompare(FullCompareReason::Untracked),
        TrustFact::Clean { untracked: false, .. } => true,
        TrustFact::Unclean { .. } => false,
    };
    let map = match map {
        MapFact::Usable { untracked: true } => return FullCompare(FullCompareReason::Untracked),
        MapFact::Usable { untracked: false } if clean => return StartState::Clean(Marks::Map),
        MapFact::Usable { untracked: false } => return StartState::UncleanWithMap,
        MapFact::Unusable(reason) => reason,
    };
    let (log_id, heartbeat, dirty) = match log {
        LogFact::Usable { log_id, heartbeat, dirty } => (log_id, heartbeat, dirty),
        LogFact::Unusable(log) => return FullCompare(FullCompareReason::NothingLeft { map, log }),
    };
    if clean {
        return StartState::Clean(Marks::Regions(dirty));
    }
    match heard {
        Some(heard) if heard.untracked => FullCompare(FullCompareReason::Untracked),
        Some(heard) if heard.log_id == log_id && heartbeat.is_some_and(|last| heard.heartbeat >= last) => {
            StartState::UncleanWithLog(dirty)
        }
        _ => {
            let heartbeat = heartbeat.map_or_else(|| "unreadable".into(), |n| format!("number {n}"));
            FullCompare(FullCompareReason::NoContact { map, heartbeat })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use watari_core::regions::{REGION_BYTES, RegionLayout};

    fn dirty() -> RegionSet {
        let layout = RegionLayout::new(&[REGION_BYTES * 8]).expect("layout");
        let mut set = RegionSet::none(&layout);
        set.insert(3);
        set
    }

    /// Every combination of the facts, so that the table in [`decide`]'s documentation is the whole truth.
    #[test]
    fn every_combination_of_facts_has_the_outcome_of_the_table() {
        let trusts = [
            TrustFact::Clean { starts: 5, untracked: false },
            TrustFact::Clean { starts: 5, untracked: true },
            TrustFact::Unclean { starts: 5 },
            TrustFact::Untrusted { starts: 5, reason: "inode".into() },
        ];
        let maps = [
            MapFact::Usable { untracked: false },
            MapFact::Usable { untracked: true },
            MapFact::Unusable("boot".into()),
        ];
        let logs = [
            LogFact::Usable { log_id: 1, heartbeat: Some(7), dirty: dirty() },
            LogFact::Usable { log_id: 1, heartbeat: None, dirty: dirty() },
            LogFact::Unusable("torn".into()),
        ];
        let heard = |starts, log_id, heartbeat, untracked| Some(Heard { starts, log_id, heartbeat, untracked });
        let hearings = [
            None,
            heard(5, 1, 7, false),
            heard(5, 1, 6, false),
            heard(5, 2, 9, false),
            heard(5, 1, 7, true),
            heard(6, 1, 7, false),
            heard(4, 1, 8, false),
        ];
        let mut outcomes = std::collections::BTreeMap::<&str, usize>::new();
        for trust in &trusts {
            for map in &maps {
                for log in &logs {
                    for hearing in &hearings {
                        let facts =
                            StartFacts { trust: trust.clone(), map: map.clone(), log: log.clone(), heard: *hearing };
                        let (behind, clean) =
                            (hearing.is_some_and(|h| h.starts > 5), matches!(trust, TrustFact::Clean { .. }));
                        let untracked = matches!(trust, TrustFact::Clean { untracked: true, .. })
                            || *map == MapFact::Usable { untracked: true };
                        let map_usable = *map == MapFact::Usable { untracked: false };
                        let log_usable = matches!(log, LogFact::Usable { .. });
                        let heard_last = hearing.is_some_and(|h| h.log_id == 1 && h.heartbeat >= 7)
                            && matches!(log, LogFact::Usable { heartbeat: Some(7), .. });
                        let expected = if behind {
                            "behind"
                        } else if matches!(trust, TrustFact::Untrusted { .. }) {
                            "untrusted"
                        } else if untracked {
                            "untracked"
                        } else if clean && map_usable {
                            "clean with map"
                        } else if clean && log_usable {
                            "clean with log"
                        } else if map_usable {
                            "unclean with map"
                        } else if !log_usable {
                            "nothing left"
                        } else if hearing.is_some_and(|h| h.untracked) {
                            "untracked"
                        } else if heard_last {
                            "unclean with log"
                        } else {
                            "no contact"
                        };
                        let found = match decide(facts.clone()) {
                            StartState::Clean(Marks::Map) => "clean with map",
                            StartState::Clean(Marks::Regions(set)) if set == dirty() => "clean with log",
                            StartState::Clean(Marks::Regions(_)) => "other regions than the log's",
                            StartState::UncleanWithMap => "unclean with map",
                            StartState::UncleanWithLog(set) if set == dirty() => "unclean with log",
                            StartState::UncleanWithLog(_) => "other regions than the log's",
                            StartState::FullCompare(reason) => {
                                assert!(reason.to_string().len() > 20, "a reason in words: {reason}");
                                match reason {
                                    FullCompareReason::FolderBehind { .. } => "behind",
                                    FullCompareReason::Untrusted(_) => "untrusted",
                                    FullCompareReason::Untracked => "untracked",
                                    FullCompareReason::NothingLeft { .. } => "nothing left",
                                    FullCompareReason::NoContact { .. } => "no contact",
                                }
                            }
                        };
                        assert_eq!(found, expected, "{facts:?}");
                        *outcomes.entry(found).or_default() += 1;
                    }
                }
            }
        }
        assert_eq!(outcomes.len(), 9, "every outcome was reached: {outcomes:?}");
    }
}
