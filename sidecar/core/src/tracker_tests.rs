use std::{sync::Arc, thread, vec, vec::Vec};

use super::*;

const D: DiskIndex = DiskIndex(0);

fn tracker(blocks: u64) -> Tracker<HeapMaps> {
    Tracker::new(HeapMaps::new(&[blocks, blocks]))
}

fn go(t: &Tracker<HeapMaps>, disk: DiskIndex, first: u64, last: u64) -> Ticket {
    match t.begin(disk, Block(first), Block(last), || true) {
        Admission::Go(ticket) => ticket,
        other => panic!("not admitted: {other:?}"),
    }
}

#[test]
fn a_write_is_marked_before_it_is_finished_and_stays_marked_after() {
    let t = tracker(1000);
    let ticket = go(&t, D, 60, 70);
    assert_eq!(t.current_blocks(), 11);
    t.finish(ticket);
    assert_eq!(t.current_from(D, Block(0), 1000), vec![Extent::new(60, 11)]);
    assert_eq!(t.writes_in_flight(), 0);
}

#[test]
fn a_cut_separates_before_from_after_across_disks() {
    let t = tracker(1000);
    t.finish(go(&t, D, 1, 1));
    t.finish(go(&t, DiskIndex(1), 2, 2));
    t.cut();
    t.finish(go(&t, D, 3, 3));
    assert_eq!(t.frozen_from(D, Block(0), 9), vec![Extent::new(1, 1)]);
    assert_eq!(t.frozen_from(DiskIndex(1), Block(0), 9), vec![Extent::new(2, 1)]);
    assert_eq!(t.current_from(D, Block(0), 9), vec![Extent::new(3, 1)]);
}

#[test]
fn a_write_in_flight_at_the_cut_is_marked_on_both_sides_and_waited_for() {
    let t = tracker(1000);
    let ticket = go(&t, D, 5, 6);
    let cut = t.cut();
    assert_eq!(t.frozen_blocks(), 2);
    assert_eq!(t.current_blocks(), 2);
    assert!(t.writes_before_cut(cut, D, Block(6), Block(6)));
    assert!(!t.writes_before_cut(cut, D, Block(7), Block(7)));
    let after = go(&t, D, 6, 6);
    t.finish(ticket);
    assert!(!t.writes_before_cut(cut, D, Block(6), Block(6)), "a write after the cut is not waited for");
    t.finish(after);
}

#[test]
fn exactly_one_side_gets_the_old_content_of_a_frozen_block() {
    let t = tracker(64);
    t.finish(go(&t, D, 9, 9));
    t.cut();
    assert_eq!(t.frozen_in(D, Block(0), Block(63)), vec![Extent::new(9, 1)]);
    assert!(t.claim_frozen(D, Block(9)));
    assert!(!t.claim_frozen(D, Block(9)));
    t.close_generation();
}

#[test]
fn an_early_read_leaves_a_block_with_a_write_in_flight_alone() {
    let t = tracker(64);
    t.finish(go(&t, D, 1, 1));
    let busy = go(&t, D, 2, 2);
    let taken = t.take_current(D, &[Extent::new(1, 1), Extent::new(2, 1)]);
    assert_eq!(taken, vec![Extent::new(1, 1)]);
    assert!(t.overwritten(D, Block(2)), "its mark is back");
    t.finish(busy);
    t.finish(go(&t, D, 1, 1));
    assert!(t.overwritten(D, Block(1)), "a write during the early read is noticed");
}

#[test]
fn giving_a_generation_up_loses_no_mark() {
    let t = tracker(256);
    t.finish(go(&t, D, 0, 99));
    t.cut();
    t.finish(go(&t, D, 50, 149));
    t.stage(D, Extent::new(0, 10));
    (0..10).for_each(|b| assert!(t.claim_frozen(D, Block(b))));
    t.give_up();
    assert_eq!(t.frozen_blocks(), 0);
    assert_eq!(t.current_from(D, Block(0), 999), vec![Extent::new(10, 140)]);
    assert_eq!(t.all_marks(D), vec![Extent::new(0, 150)]);
}

#[test]
fn after_a_crash_everything_sent_or_frozen_counts_as_current_again() {
    let t = tracker(256);
    t.finish(go(&t, D, 0, 9));
    t.cut();
    t.stage(D, Extent::new(0, 3));
    (0..3).for_each(|b| assert!(t.claim_frozen(D, Block(b))));
    t.finish(go(&t, D, 20, 20));
    let again = Tracker::new(t.maps);
    again.adopt();
    assert_eq!(again.current_from(D, Block(0), 999), vec![Extent::new(0, 10), Extent::new(20, 1)]);
    assert_eq!(again.staged_blocks() + again.frozen_blocks(), 0);
}

#[test]
fn a_sealed_side_admits_no_write_and_an_unlogged_region_is_reported() {
    let t = tracker(64);
    assert!(matches!(t.begin(D, Block(0), Block(0), || false), Admission::NotLogged));
    t.seal();
    assert!(matches!(t.begin(D, Block(0), Block(0), || true), Admission::Sealed));
    assert_eq!(t.current_blocks(), 0);
    t.unseal();
    t.finish(go(&t, D, 0, 0));
}

#[test]
fn a_scan_respects_its_budget_and_the_extent_limit() {
    let t = tracker(10_000);
    for b in (0..2000).step_by(2) {
        t.finish(go(&t, D, b, b));
    }
    assert_eq!(t.current_from(D, Block(0), 7).iter().map(|e| e.blocks).sum::<u32>(), 7);
    assert_eq!(t.current_from(D, Block(0), 5000).len(), limits::FRAME_EXTENTS_MAX);
}

/// Writers on threads, a sender that cuts, claims and preserves: every generation must be a point in time (I2, I3).
#[test]
fn under_concurrent_writers_every_generation_is_a_point_in_time() {
    use std::sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64},
    };
    const BLOCKS: u64 = 128;
    const WRITERS: u64 = 3;
    struct Bed {
        tracker: Tracker<HeapMaps>,
        disk: Vec<AtomicU64>,
        preserved: Mutex<std::collections::BTreeMap<u64, u64>>,
        stop: AtomicBool,
    }
    let bed = Arc::new(Bed {
        tracker: tracker(BLOCKS),
        disk: (0..BLOCKS).map(|_| AtomicU64::new(0)).collect(),
        preserved: Mutex::default(),
        stop: AtomicBool::new(false),
    });
    // Writer w owns blocks w, w+3, …: it writes the sequence number n to them in order, so at any point in time the
    // blocks of one writer hold a prefix-consistent pattern: all values within one round of each other, non-increasing.
    let writers: Vec<_> = (0..WRITERS)
        .map(|w| {
            let bed = bed.clone();
            thread::spawn(move || {
                let mut n = 1;
                while !bed.stop.load(SeqCst) {
                    for b in (w..BLOCKS).step_by(WRITERS as usize) {
                        let t = go(&bed.tracker, D, b, b);
                        if t.generation_open && !bed.tracker.frozen_in(D, Block(b), Block(b)).is_empty() {
                            let old = bed.disk[b as usize].load(SeqCst);
                            let mut kept = bed.preserved.lock().unwrap();
                            if bed.tracker.claim_frozen(D, Block(b)) {
                                kept.insert(b, old);
                            }
                        }
                        bed.disk[b as usize].store(n, SeqCst);
                        bed.tracker.finish(t);
                    }
                    n += 1;
                }
            })
        })
        .collect();
    let mut replica = vec![0u64; BLOCKS as usize];
    for _ in 0..300 {
        let cut = bed.tracker.cut();
        for e in bed.tracker.frozen_from(D, Block(0), BLOCKS) {
            for b in e.start.0..e.end().0 {
                while bed.tracker.writes_before_cut(cut, D, Block(b), Block(b)) {
                    thread::yield_now();
                }
                let read = bed.disk[b as usize].load(SeqCst);
                bed.tracker.stage(D, Extent::new(b, 1));
                if bed.tracker.claim_frozen(D, Block(b)) {
                    replica[b as usize] = read;
                }
            }
        }
        for (b, old) in std::mem::take(&mut *bed.preserved.lock().unwrap()) {
            replica[b as usize] = old;
        }
        bed.tracker.close_generation();
        for w in 0..WRITERS {
            let seen: Vec<u64> = (w..BLOCKS).step_by(WRITERS as usize).map(|b| replica[b as usize]).collect();
            assert!(seen.windows(2).all(|p| p[0] >= p[1]), "not a point in time: {seen:?}");
            assert!(seen[0] - seen[seen.len() - 1] <= 1, "not a point in time: {seen:?}");
        }
    }
    bed.stop.store(true, SeqCst);
    writers.into_iter().for_each(|w| w.join().unwrap());
}

#[test]
fn a_writer_does_not_claim_for_a_later_cut_than_its_own() {
    // Lost without it: a writer read a block for one generation, stalled until the next cut, and then its claim took the
    // new frozen bit with the old content (watari-sim seed 25).
    let t = tracker(64);
    t.finish(go(&t, D, 9, 9));
    t.cut();
    let slow = go(&t, D, 9, 9);
    assert!(t.claim_frozen(D, Block(9)), "the sender was first");
    t.close_generation();
    t.finish(go(&t, D, 9, 9));
    t.cut();
    assert!(!t.claim_for(&slow, Block(9)));
    assert!(t.overwritten(D, Block(9)), "and its mark of the new cut stays");
    let fresh = go(&t, D, 9, 9);
    assert!(t.claim_for(&fresh, Block(9)));
    t.finish(slow);
    t.finish(fresh);
}
