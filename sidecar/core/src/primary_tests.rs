//! The source's books, step by step: what is sent, listed, repeated, given up and forgotten.

use std::{vec, vec::Vec};

use super::*;
use crate::{
    frame::FrameId,
    tracker::{Admission, HeapMaps},
};

const D: DiskIndex = DiskIndex(0);
const SESSION: Session = Session(9);

struct Bench {
    tracker: Tracker<HeapMaps>,
    primary: Primary,
    now: u64,
    preserved: u64,
}

fn generation(epoch: u64, number: u64) -> Generation {
    Generation { epoch, number: GenerationNumber(number) }
}

fn limits_of(preserve_bytes: u64) -> Limits {
    Limits { interval_millis: 1000, preserve_bytes, paused: false }
}

impl Bench {
    fn new(blocks: u64, preserve_bytes: u64) -> Bench {
        let number = GenerationNumber;
        let base = Generation::default();
        let primary = Primary::new(limits_of(preserve_bytes), 1, SESSION, base, number(1), number(100));
        let mut bench =
            Bench { tracker: Tracker::new(HeapMaps::new(&[blocks, blocks])), primary, now: 10_000, preserved: 0 };
        bench.meet(None, base);
        bench
    }

    /// A link stands; the peer holds these frames (`None`: nothing of this session) and kept payloads are ours.
    fn meet(&mut self, held: Option<&[u64]>, committed: Generation) {
        let holds = |s: Sequence| held.is_some_and(|h| h.contains(&s.0));
        let holds: Option<&dyn Fn(Sequence) -> bool> = if held.is_some() { Some(&holds) } else { None };
        self.primary.link_up(self.now, &self.tracker, holds, committed, &|_| true);
    }

    fn write(&self, first: u64, last: u64) {
        match self.tracker.begin(D, Block(first), Block(last), || true) {
            Admission::Go(ticket) => self.tracker.finish(ticket),
            other => panic!("{other:?}"),
        }
    }

    fn poll(&mut self) -> Step {
        self.primary.poll(self.now, &self.tracker, self.preserved)
    }

    /// Build the frame of a read, as a reader would.
    fn built(&mut self, read: &Read, frozen: bool) {
        let mut kept: Vec<Extent> = Vec::new();
        for e in &read.extents {
            if frozen {
                self.tracker.stage(read.disk, *e);
            }
            for b in e.start.0..e.end().0 {
                let ours = if frozen {
                    self.tracker.claim_frozen(read.disk, Block(b))
                } else {
                    !self.tracker.overwritten(read.disk, Block(b))
                };
                if ours {
                    kept.push(Extent::new(b, 1));
                }
            }
        }
        let headers: Vec<FrameHeader> = if kept.is_empty() {
            Vec::new()
        } else {
            let content = vec![7; kept.len() * 4096];
            let id = FrameId { epoch: 1, session: SESSION, sequence: read.sequence };
            vec![FrameHeader::data(id, read.disk, kept, &content, Some(&[1])).unwrap()]
        };
        self.primary.frames_built(self.now, read.sequence, &headers);
    }

    /// Poll and do until a commit list comes out.
    fn run_to_commit(&mut self) -> CommitList {
        for _ in 0..100 {
            match self.poll() {
                Step::Cut { generation } => {
                    let cut = self.tracker.cut();
                    self.primary.cut_made(self.now, &self.tracker, generation, cut);
                }
                Step::ReadFrozen { read, .. } => self.built(&read, true),
                Step::ReadCurrent { read } => self.built(&read, false),
                Step::Commit { list, .. } => return list,
                Step::Wait { .. } => self.primary.demand_cut(),
                other => panic!("{other:?}"),
            }
        }
        panic!("no commit: {:?}", self.primary.phase());
    }

    /// Cut, but read nothing yet.
    fn cut(&mut self) {
        self.primary.demand_cut();
        let Step::Cut { generation } = self.poll() else { panic!("no cut") };
        let cut = self.tracker.cut();
        self.primary.cut_made(self.now, &self.tracker, generation, cut);
    }

    fn sync_and_forget(&mut self, generation: Generation) {
        assert_eq!(self.poll(), Step::SyncDisks { generation });
        assert!(self.primary.forget(&self.tracker, generation));
    }

    fn commit(&mut self) -> Generation {
        let list = self.run_to_commit();
        self.primary.committed(self.now, list.generation);
        self.sync_and_forget(list.generation);
        list.generation
    }

    fn sequences(list: &CommitList) -> Vec<u64> {
        list.entries.iter().map(|e| e.sequence.0).collect()
    }
}

#[test]
fn a_generation_is_cut_sent_listed_synced_and_only_then_forgotten() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(3, 5);
    let list = b.run_to_commit();
    assert_eq!((list.generation, list.parent), (generation(1, 1), Generation::default()));
    assert_eq!(b.tracker.staged_blocks(), 3, "sent blocks stay in the books");
    assert_eq!(b.poll(), Step::Wait { until_millis: u64::MAX });
    b.primary.committed(b.now, list.generation);
    assert_eq!(b.tracker.staged_blocks(), 3, "I5: a commit alone is not enough");
    assert_eq!(b.poll(), Step::SyncDisks { generation: list.generation });
    assert_eq!(b.poll(), Step::Wait { until_millis: u64::MAX }, "one sync at a time");
    assert!(b.primary.forget(&b.tracker, list.generation));
    assert_eq!((b.tracker.staged_blocks(), b.primary.base()), (0, list.generation));
    assert_eq!(b.primary.counters.committed, 1);
}

#[test]
fn without_a_commit_nothing_is_forgotten() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(3, 5);
    let list = b.run_to_commit();
    assert!(!b.primary.forget(&b.tracker, list.generation));
    assert_eq!(b.tracker.staged_blocks(), 3);
    b.primary.committed(b.now, generation(1, 99));
    assert!(matches!(b.primary.phase(), Phase::Committing { .. }), "the answer for another generation");
}

#[test]
fn each_generation_follows_the_one_before() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(1, 1);
    let first = b.commit();
    b.write(2, 2);
    let list = b.run_to_commit();
    assert_eq!((list.parent, list.generation), (first, generation(1, 2)));
}

#[test]
fn a_block_is_supplied_by_the_newest_frame_that_carries_it() {
    // Early staging sends 10 to 13; then 11 is written again and comes in the generation's own frame.
    let mut b = Bench::new(100, 4096);
    b.write(10, 13);
    let Step::ReadCurrent { read } = b.poll() else { panic!("the dirty set is larger than half the bound") };
    b.built(&read, false);
    b.write(11, 11);
    let list = b.run_to_commit();
    assert_eq!(list.entries.len(), 2);
    let (early, late) = (&list.entries[0], &list.entries[1]);
    assert!(early.sequence < late.sequence);
    assert_eq!(early.excluded, vec![0b0010], "the second block of the early frame");
    assert!(late.excluded.is_empty());
}

#[test]
fn a_frame_of_which_nothing_counts_is_left_out_of_the_list() {
    let mut b = Bench::new(100, 4096);
    b.write(10, 13);
    let Step::ReadCurrent { read } = b.poll() else { panic!() };
    b.built(&read, false);
    b.write(10, 13);
    let list = b.run_to_commit();
    assert_eq!(list.entries.len(), 1);
    assert!(list.entries[0].sequence > read.sequence);
}

#[test]
fn what_is_overwritten_during_an_early_read_is_not_in_its_frame_and_stays_dirty() {
    let mut b = Bench::new(100, 4096);
    b.write(10, 13);
    let Step::ReadCurrent { read } = b.poll() else { panic!() };
    b.write(12, 12);
    b.built(&read, false);
    assert_eq!(b.tracker.current_blocks(), 1);
    assert_eq!(b.primary.books_bytes(), 3 * 4096);
}

#[test]
fn overtaken_frames_are_named_once_they_are_durable_and_only_between_generations() {
    let mut b = Bench::new(100, 4096);
    b.write(10, 13);
    let Step::ReadCurrent { read } = b.poll() else { panic!() };
    b.built(&read, false);
    b.write(10, 13);
    assert!(b.primary.superseded(&b.tracker).is_empty(), "it may still be under way");
    b.primary.durable(b.now, read.sequence, read.sequence);
    assert_eq!(b.primary.superseded(&b.tracker), vec![read.sequence]);
    assert!(b.primary.superseded(&b.tracker).is_empty());
    let list = b.run_to_commit();
    assert!(!Bench::sequences(&list).contains(&read.sequence.0));
}

#[test]
fn no_cut_is_made_while_a_read_is_outstanding() {
    let mut b = Bench::new(100, 4096);
    b.write(10, 13);
    let Step::ReadCurrent { read } = b.poll() else { panic!() };
    b.primary.demand_cut();
    assert!(matches!(b.poll(), Step::Wait { .. }), "I4: a later frame must not be read earlier");
    b.built(&read, false);
    assert!(matches!(b.poll(), Step::Cut { .. }));
}

#[test]
fn a_lost_frame_whose_payload_is_kept_is_sent_again_as_it_was() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(3, 5);
    let list = b.run_to_commit();
    b.primary.link_down();
    assert_eq!(b.poll(), Step::Wait { until_millis: u64::MAX });
    b.meet(Some(&[]), Generation::default());
    assert_eq!(b.poll(), Step::Resend(list.entries[0].sequence));
    let Step::Commit { list: again, .. } = b.poll() else { panic!("the list goes again") };
    assert_eq!(again, list, "repeating a commit is a no-op at the target");
}

#[test]
fn a_lost_frame_without_payload_gives_the_cut_up_and_loses_no_mark() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(3, 5);
    b.run_to_commit();
    b.primary.link_down();
    b.primary.link_up(b.now, &b.tracker, None, Generation::default(), &|_| false);
    assert_eq!(*b.primary.phase(), Phase::Idle);
    assert_eq!((b.tracker.current_blocks(), b.tracker.staged_blocks()), (3, 0));
    assert_eq!(b.primary.counters.given_up, 1);
    let list = b.run_to_commit();
    assert_eq!(list.generation, generation(1, 2), "a number is never used twice");
}

#[test]
fn what_the_peer_holds_durably_is_not_sent_again() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(3, 5);
    let list = b.run_to_commit();
    let held = Bench::sequences(&list);
    b.primary.link_down();
    b.meet(Some(&held), Generation::default());
    assert!(matches!(b.poll(), Step::Commit { .. }));
    assert!(!b.primary.needs_payload(list.entries[0].sequence));
    assert_eq!(b.primary.counters.resent_bytes, 0);
}

#[test]
fn a_commit_whose_answer_was_lost_is_learned_at_the_next_contact() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(3, 5);
    let list = b.run_to_commit();
    b.primary.link_down();
    b.meet(Some(&[]), list.generation);
    b.sync_and_forget(list.generation);
    assert_eq!((b.primary.base(), b.tracker.staged_blocks()), (list.generation, 0));
}

#[test]
fn a_target_that_lacks_a_frame_gets_it_again_or_the_cut_is_given_up() {
    for kept in [true, false] {
        let mut b = Bench::new(100, 1 << 20);
        b.write(3, 5);
        let list = b.run_to_commit();
        let missing = [list.entries[0].sequence];
        b.primary.lacks(&b.tracker, list.generation, &missing, &|_| kept);
        if kept {
            assert_eq!(b.poll(), Step::Resend(missing[0]));
            assert!(matches!(b.poll(), Step::Commit { .. }));
        } else {
            assert_eq!((b.primary.phase(), b.tracker.current_blocks()), (&Phase::Idle, 3));
        }
    }
}

#[test]
fn a_lack_of_another_generation_changes_nothing() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(3, 5);
    let list = b.run_to_commit();
    b.primary.lacks(&b.tracker, generation(1, 77), &[list.entries[0].sequence], &|_| true);
    assert!(matches!(b.primary.phase(), Phase::Committing { list_sent: true, .. }));
}

#[test]
fn a_refused_same_frame_is_read_again_instead_of_repeated() {
    // Lost without it: the target refused what the frame asserted, and it was sent again for ever (watari-sim seed 1183).
    let mut b = Bench::new(100, 1 << 20);
    b.write(3, 3);
    b.cut();
    let Step::ReadFrozen { read, .. } = b.poll() else { panic!() };
    b.tracker.stage(D, read.extents[0]);
    assert!(b.tracker.claim_frozen(D, Block(3)));
    let id = FrameId { epoch: 1, session: SESSION, sequence: Sequence(read.sequence.0 + 2) };
    let same = FrameHeader::same(id, D, read.extents.clone(), [1; 32]).unwrap();
    b.primary.frames_built(b.now, read.sequence, &[same]);
    let Step::Commit { list, .. } = b.poll() else { panic!() };
    b.primary.lacks(&b.tracker, list.generation, &[id.sequence], &|_| true);
    assert_eq!((b.primary.phase(), b.tracker.current_blocks(), b.tracker.staged_blocks()), (&Phase::Idle, 1, 0));
}

#[test]
fn giving_up_returns_unsent_blocks_and_keeps_sent_ones_staged() {
    let mut b = Bench::new(200, 1 << 30);
    b.write(0, 199);
    b.cut();
    let Step::ReadFrozen { read, .. } = b.poll() else { panic!() };
    b.built(&read, true);
    let sent: u64 = read.extents.iter().map(|e| u64::from(e.blocks)).sum();
    b.primary.abandon(&b.tracker);
    assert_eq!((b.tracker.staged_blocks(), b.tracker.current_blocks()), (sent, 200 - sent));
    let list = b.run_to_commit();
    assert!(Bench::sequences(&list).contains(&read.sequence.0), "what was sent stays useful");
}

#[test]
fn a_large_delta_is_staged_before_the_cut_and_a_small_one_is_not() {
    let mut small = Bench::new(100, 1 << 20);
    small.write(0, 9);
    small.primary.demand_cut();
    assert!(matches!(small.poll(), Step::Cut { .. }));
    let mut large = Bench::new(100, 8 * 4096);
    large.write(0, 9);
    large.primary.demand_cut();
    assert!(matches!(large.poll(), Step::ReadCurrent { .. }));
}

#[test]
fn while_the_target_is_attached_writes_are_staged_at_once_and_cut_only_now_and_then() {
    let mut b = Bench::new(64, 1 << 30);
    b.primary.limits.interval_millis = 60_000;
    b.commit();
    b.primary.converge(Pace::Staging);
    b.write(0, 3);
    let Step::ReadCurrent { read } = b.poll() else { panic!("staged without a cut") };
    b.built(&read, false);
    // The same block again: once per pass, and passes keep a pause.
    b.write(1, 1);
    let Step::Wait { until_millis } = b.poll() else { panic!("a pass ends") };
    b.now = until_millis;
    let Step::ReadCurrent { read } = b.poll() else { panic!("the next pass") };
    assert_eq!(read.extents, vec![Extent::new(1, 1)]);
    b.built(&read, false);
    assert_eq!(b.tracker.current_blocks(), 0, "all of it is on its way");
    b.now += limits::STAGING_CUT_MILLIS;
    let list = b.run_to_commit();
    assert_eq!(list.entries.len(), 2, "what was staged is committed by the next cut, nothing is read again");
}

#[test]
fn a_seal_during_staging_cuts_as_soon_as_the_reads_are_in() {
    let mut b = Bench::new(64, 1 << 30);
    b.primary.limits.interval_millis = 60_000;
    b.commit();
    b.primary.converge(Pace::Staging);
    b.write(0, 3);
    let Step::ReadCurrent { read } = b.poll() else { panic!("staged") };
    b.write(9, 9);
    b.tracker.seal();
    b.primary.seal(true);
    assert!(matches!(b.poll(), Step::Wait { .. }), "not while a read is outstanding");
    b.built(&read, false);
    let list = b.run_to_commit();
    assert_eq!(list.entries.len(), 2);
    assert_eq!(b.primary.remainder(0), Some(list.generation));
}

#[test]
fn preserved_content_is_sent_first_when_it_fills_its_bound() {
    let mut b = Bench::new(100, 8 * 4096);
    b.write(0, 2);
    b.cut();
    b.preserved = 5;
    assert!(matches!(b.poll(), Step::SendPreserved { .. }));
    let mut calm = Bench::new(100, 8 * 4096);
    calm.write(0, 2);
    calm.cut();
    calm.preserved = 1;
    assert!(matches!(calm.poll(), Step::ReadFrozen { .. }));
}

#[test]
fn a_generation_does_not_close_while_something_is_preserved_or_being_read() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(0, 2);
    b.cut();
    let Step::ReadFrozen { read, .. } = b.poll() else { panic!() };
    assert!(matches!(b.poll(), Step::Wait { .. }));
    b.built(&read, true);
    b.preserved = 1;
    let Step::SendPreserved { read } = b.poll() else { panic!() };
    b.preserved = 0;
    assert!(matches!(b.poll(), Step::Wait { .. }));
    b.primary.frames_built(b.now, read.sequence, &[]);
    assert!(matches!(b.poll(), Step::Commit { .. }));
}

#[test]
fn a_read_that_failed_is_done_again() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(0, 2);
    b.cut();
    let Step::ReadFrozen { read, .. } = b.poll() else { panic!() };
    b.primary.frames_built(b.now, read.sequence, &[]);
    let mut again = b.poll();
    if matches!(again, Step::Wait { .. }) {
        again = b.poll();
    }
    let Step::ReadFrozen { read: second, .. } = again else { panic!("{again:?}") };
    assert_eq!(second.extents, read.extents);
    assert!(second.sequence > read.sequence, "a new read has new sequences");
}

#[test]
fn the_window_bounds_what_is_not_durable() {
    let mut b = Bench::new(1000, 1 << 30);
    b.write(0, 999);
    b.cut();
    let mut reads = Vec::new();
    while let Step::ReadFrozen { read, .. } = b.poll() {
        reads.push(read);
    }
    assert!(b.primary.bytes_in_flight() <= b.primary.window.bytes());
    assert!(reads.len() > 1 && b.tracker.frozen_blocks() == 1000, "I8: the rest waits");
}

#[test]
fn numbers_are_reserved_durably_before_a_cut_uses_them() {
    let mut b = Bench::new(100, 1 << 20);
    let number = GenerationNumber;
    b.primary = Primary::new(limits_of(1 << 20), 1, SESSION, generation(1, 4), number(7), number(7));
    b.meet(None, generation(1, 4));
    b.write(0, 0);
    b.primary.demand_cut();
    assert!(b.primary.wants_numbers());
    assert!(matches!(b.poll(), Step::Wait { .. }));
    b.primary.numbers_reserved(number(9));
    assert_eq!(b.poll(), Step::Cut { generation: generation(1, 7) });
}

#[test]
fn a_number_is_never_below_the_base() {
    let primary = Primary::new(limits_of(0), 1, SESSION, generation(1, 40), GenerationNumber(3), GenerationNumber(100));
    assert_eq!(primary.next_number(), GenerationNumber(41));
}

#[test]
fn nothing_is_sent_while_paused_unless_sealed() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(0, 0);
    b.primary.limits.paused = true;
    b.primary.demand_cut();
    assert!(matches!(b.poll(), Step::Wait { .. }));
    b.primary.seal(true);
    assert!(matches!(b.poll(), Step::Cut { .. }));
}

#[test]
fn the_remainder_is_the_last_cut_once_its_list_is_under_way() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(0, 3);
    b.commit();
    b.write(5, 5);
    b.tracker.seal();
    b.primary.seal(true);
    assert_eq!(b.primary.remainder(1), None, "something is dirty");
    let list = b.run_to_commit();
    assert_eq!(b.primary.remainder(0), Some(list.generation));
    assert_eq!(b.primary.remainder(1), None);
}

#[test]
fn a_clean_seal_has_the_base_as_its_remainder() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(0, 3);
    let base = b.commit();
    b.tracker.seal();
    b.primary.seal(true);
    assert!(matches!(b.poll(), Step::Wait { .. }));
    assert_eq!(b.primary.remainder(0), Some(base));
    b.primary.link_down();
    assert_eq!(b.primary.remainder(0), None, "not without a link");
}

#[test]
fn what_was_staged_early_and_never_committed_is_part_of_the_remainder() {
    let mut b = Bench::new(100, 4096);
    b.write(10, 13);
    let Step::ReadCurrent { read } = b.poll() else { panic!() };
    b.built(&read, false);
    b.tracker.seal();
    b.primary.seal(true);
    assert_eq!(b.primary.remainder(0), None, "the books are not empty");
    let list = b.run_to_commit();
    assert!(Bench::sequences(&list).contains(&read.sequence.0));
}

#[test]
fn a_raised_epoch_sends_everything_again_under_its_own_name() {
    // Lost without it: after an aborted handover every frame carried the old epoch, the target refused them below its
    // floor, and the pair never synchronised again (watari-sim seeds 11 and 26).
    let mut b = Bench::new(100, 1 << 20);
    b.write(0, 3);
    b.run_to_commit();
    b.primary.raise_epoch(&b.tracker, 3);
    assert_eq!((b.primary.phase(), b.tracker.current_blocks(), b.tracker.staged_blocks()), (&Phase::Idle, 4, 0));
    b.primary.demand_cut();
    assert_eq!(b.poll(), Step::Cut { generation: generation(3, 2) });
}

#[test]
fn a_raised_epoch_leaves_a_durable_commit_alone() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(0, 3);
    let list = b.run_to_commit();
    b.primary.committed(b.now, list.generation);
    b.primary.raise_epoch(&b.tracker, 3);
    b.sync_and_forget(list.generation);
    assert_eq!((b.primary.base(), b.tracker.staged_blocks()), (list.generation, 0));
}

#[test]
fn the_next_list_follows_what_the_peer_has_committed() {
    // Lost without it: a commit whose word was lost with the former worker left every later list with the wrong parent,
    // each refused as a conflict (watari-sim seed 19).
    let mut b = Bench::new(100, 1 << 20);
    b.write(0, 3);
    b.meet(None, generation(1, 5));
    let list = b.run_to_commit();
    assert_eq!(list.parent, generation(1, 5));
    assert!(list.generation.number.0 > 5);
}

#[test]
fn a_peer_that_is_behind_its_word_makes_nothing_forgotten() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(0, 3);
    let list = b.run_to_commit();
    b.primary.committed(b.now, list.generation);
    b.primary.link_down();
    b.meet(None, Generation::default());
    assert!(!b.primary.forget(&b.tracker, list.generation));
    assert_eq!(b.tracker.current_blocks(), 4, "I5: the commit is not there any more");
    assert_eq!(b.primary.base(), Generation::default());
}

#[test]
fn a_sync_that_began_for_another_generation_forgets_nothing() {
    // Lost without it: the sync of a generation is slow, the target's folder is exchanged, the next generation is committed
    // there, and the first sync's end was taken for one that covers what was written after it began (I5).
    let mut b = Bench::new(100, 1 << 20);
    b.write(0, 3);
    let first = b.run_to_commit().generation;
    b.primary.committed(b.now, first);
    assert_eq!(b.poll(), Step::SyncDisks { generation: first });
    b.primary.link_down();
    b.meet(None, Generation::default());
    b.write(10, 12);
    let second = b.run_to_commit().generation;
    b.primary.committed(b.now, second);
    assert!(!b.primary.awaits_sync(first) && !b.primary.forget(&b.tracker, first));
    assert_eq!(b.tracker.staged_blocks(), 7, "the second sync has not even begun");
    b.sync_and_forget(second);
    assert_eq!((b.tracker.staged_blocks(), b.primary.base()), (0, second));
}

#[test]
fn a_late_answer_for_a_given_up_generation_moves_the_parent_and_forgets_nothing() {
    let mut b = Bench::new(100, 1 << 20);
    b.write(0, 3);
    let list = b.run_to_commit();
    b.primary.abandon(&b.tracker);
    b.primary.committed(b.now, list.generation);
    assert_eq!((b.primary.base(), b.tracker.staged_blocks()), (list.generation, 4));
    assert_eq!(b.run_to_commit().parent, list.generation);
}

#[test]
fn a_full_target_is_asked_again_on_a_new_link() {
    // Lost without it: "full" outlived the target's process, and nothing was ever sent to its successor.
    let mut b = Bench::new(100, 1 << 20);
    b.write(0, 3);
    b.primary.demand_cut();
    b.primary.block(true);
    assert!(matches!(b.poll(), Step::Wait { .. }));
    b.primary.link_down();
    b.meet(Some(&[]), Generation::default());
    assert!(matches!(b.poll(), Step::Cut { .. }));
}

#[test]
fn a_clock_that_is_set_back_holds_up_no_generation() {
    // Lost without it: after a step back by an hour no generation was cut for an hour.
    let mut b = Bench::new(64, 1 << 20);
    b.now = 10_000_000;
    b.write(0, 0);
    b.commit();
    b.now -= 3_600_000;
    b.write(1, 1);
    let Step::Wait { until_millis } = b.poll() else { panic!("a cut before its time") };
    assert!(until_millis <= b.now + 1000, "waits until {until_millis} at {}", b.now);
    b.now += 1000;
    assert!(matches!(b.poll(), Step::Cut { .. }));
}

#[test]
fn an_acknowledgement_from_before_its_frame_says_nothing_about_the_path() {
    // Lost without it: a clock that was set back made the path one of no length, which never grew again.
    let mut b = Bench::new(64, 1 << 20);
    b.now = 10_000_000;
    let mut window = b.primary.window.clone();
    for i in 1..200 {
        window.delivered(i * 100, 4 << 20, Some(200), true);
    }
    b.primary.window = window;
    let before = b.primary.window.bytes();
    b.write(0, 0);
    b.cut();
    let Step::ReadFrozen { read, .. } = b.poll() else { panic!("nothing to read") };
    b.built(&read, true);
    b.now -= 3_600_000;
    b.primary.durable(b.now, read.sequence, read.sequence);
    assert!(b.primary.window.bytes() > before / 2, "{} bytes after {before}", b.primary.window.bytes());
}
