//! Every decoder that reads bytes from the wire or from disk: no panic, no allocation by an unchecked length, and what was
//! encoded is decoded again.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use proptest::prelude::*;
use watari_core::{
    codec::Reader,
    frame::{EXTENT_BYTES, FRAME_HEADER_FIXED_BYTES, FRAME_RANGE_BLOCKS_MAX, Frame, FrameError, FrameHeader, RawOnly},
    geometry::{BLOCK_BYTES, DiskIndex, Extent, Sequence, Session},
    limits::{DISK_BYTES_MAX, DISKS_MAX, FRAME_EXTENTS_MAX},
    replica::{
        Entry, Mark, journal, list,
        manifest::{Applying, Manifest},
        undo,
    },
    storage::{Storage, sim::SimMedium},
};

fn extents() -> impl Strategy<Value = Vec<Extent>> {
    prop::collection::vec((0u64..5, 1u32..4), 1..20).prop_map(|runs| {
        let mut at = 0;
        let place = |(gap, blocks): (u64, u32)| {
            let extent = Extent::new(at + gap, blocks);
            at = extent.end().0;
            extent
        };
        runs.into_iter().map(place).collect()
    })
}

/// A header with its payload.
fn frame() -> impl Strategy<Value = (FrameHeader, Vec<u8>)> {
    (extents(), 0u8..3, any::<[u8; 32]>(), 0u16..DISKS_MAX as u16, 1u64..u64::MAX).prop_map(
        |(extents, kind, digest, disk, sequence)| {
            let id = id(sequence);
            let bytes: u64 = extents.iter().map(|extent| extent.bytes()).sum();
            let content: Vec<u8> = digest.iter().cycle().take(bytes as usize).copied().collect();
            match kind {
                0 => (FrameHeader::data(id, DiskIndex(disk), extents, &content, None).unwrap(), content),
                1 => (FrameHeader::zero(id, DiskIndex(disk), extents).unwrap(), vec![]),
                _ => (FrameHeader::same(id, DiskIndex(disk), extents, digest).unwrap(), vec![]),
            }
        },
    )
}

fn entries() -> impl Strategy<Value = Entry> {
    (any::<u64>(), any::<u64>(), any::<u32>(), any::<[u8; 32]>(), prop::collection::vec(any::<u8>(), 0..40)).prop_map(
        |(session, sequence, crc32, digest, mut excluded)| {
            while excluded.last() == Some(&0) {
                excluded.pop();
            }
            Entry { session: Session(session), sequence: Sequence(sequence), crc32, digest, excluded }
        },
    )
}

fn mark() -> impl Strategy<Value = Mark> {
    (any::<u64>(), any::<[u8; 32]>(), any::<u64>()).prop_map(|(number, root, committed_at_seconds)| Mark {
        generation: generation(number),
        root,
        committed_at_seconds,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_never_panic_a_decoder(bytes in prop::collection::vec(any::<u8>(), 0..6000)) {
        let _ = FrameHeader::decode(&bytes);
        let _ = Entry::decode_all(&bytes);
        let _ = Manifest::decode(&bytes);
        let _ = Mark::decode(&mut Reader::new(&bytes));
        journal::fuzz_decode(&bytes);
        undo::fuzz_decode(&bytes);
    }

    #[test]
    fn a_frame_header_is_decoded_as_it_was_encoded(
        (header, _) in frame(), tail in prop::collection::vec(any::<u8>(), 0..9)) {
        let mut bytes = header.encode();
        let length = bytes.len();
        prop_assert_eq!(length, FRAME_HEADER_FIXED_BYTES + header.extents.len() * EXTENT_BYTES);
        bytes.extend(tail);
        prop_assert_eq!(FrameHeader::decode(&bytes), Ok((header.clone(), length)));
        for short in 0..length {
            prop_assert!(FrameHeader::decode(&bytes[..short]).is_err());
        }
    }

    #[test]
    fn a_changed_byte_of_a_frame_is_always_found(
        (header, mut payload) in frame(), at in any::<prop::sample::Index>(), flip in 1u8..=255,
    ) {
        prop_assert!(Frame::check(header.clone(), &payload, &RawOnly).is_ok());
        let mut bytes = header.encode();
        let at = at.index(bytes.len() + payload.len());
        match at.checked_sub(bytes.len()) {
            Some(at) => payload[at] ^= flip,
            None => bytes[at] ^= flip,
        }
        if let Ok((header, _)) = FrameHeader::decode(&bytes) {
            prop_assert!(Frame::check(header, &payload, &RawOnly).is_err());
        }
    }

    #[test]
    fn commit_entries_are_decoded_as_they_were_encoded(list in prop::collection::vec(entries(), 0..20)) {
        let mut bytes = Vec::new();
        list.iter().for_each(|entry| entry.encode(&mut bytes));
        prop_assert_eq!(Entry::decode_all(&bytes), Ok(list));
    }

    #[test]
    fn a_manifest_is_decoded_as_it_was_encoded(
        marks in (mark(), mark()),
        given in any::<[bool; 6]>(),
        disk_bytes in prop::collection::vec(1..=DISK_BYTES_MAX, 1..DISKS_MAX),
        floor in any::<u64>(),
    ) {
        let [newest, applied, applying, undo, rolling_back, shared] = given;
        let manifest = Manifest {
            identity: [3; 16],
            virgin: !newest,
            direct_started: undo,
            floor,
            newest: newest.then_some(marks.0),
            applied: (newest && applied).then_some(marks.1),
            applying: applying.then_some(Applying { generation: generation(7), undo }),
            rolling_back: rolling_back.then_some(generation(3)),
            shared: shared.then_some(generation(2)),
            disk_bytes,
        };
        prop_assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest));
    }

    /// Any single changed byte of any file leaves a folder that is refused or that still tells only the truth.
    #[test]
    fn a_changed_byte_anywhere_in_a_folder_never_changes_what_a_generation_holds(
        file in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), bit in 0u8..8,
    ) {
        let medium = SimMedium::new();
        let mut store = create(&medium, options(4), false);
        for number in 1..=4 {
            let staged = vec![stage(&mut store, number, number, 2, number as u8)];
            commit(&mut store, number, staged);
            if number < 4 {
                store.apply_all().unwrap();
            }
        }
        stage(&mut store, 9, 20, 1, 9);
        store.sync_staged().unwrap();
        drop(store);
        let names = medium.folder("meta").list().unwrap();
        let name = &names[file.index(names.len())];
        let length = medium.folder("meta").len(name).unwrap();
        medium.rot("meta", name, at.index(length as usize) as u64, bit);
        if let Ok(Some(mut store)) = try_open(&medium, options(4)) {
            let damaged = !store.verify().unwrap().is_empty();
            for mark in store.kept() {
                let number = mark.generation.number.0;
                let expected: Vec<u8> = (0..6).map(|at| match at {
                    0 => 0,
                    at if at <= number => at as u8,
                    at if at == number + 1 => number as u8,
                    _ => 0,
                }).collect();
                let mut found = vec![0; 6 * BLOCK_BYTES as usize];
                if store.read_at(Some(mark.generation), DISK, 0, &mut found).is_ok() && !damaged {
                    for (block, want) in found.chunks(BLOCK_BYTES as usize).zip(&expected) {
                        prop_assert!(block.iter().all(|byte| byte == want), "{} {}", name, number);
                    }
                }
            }
        }
    }
}

#[test]
fn limits_of_a_frame_are_enforced_on_both_sides() {
    let blocks = FRAME_RANGE_BLOCKS_MAX as u32;
    assert!(FrameHeader::zero(id(1), DISK, vec![Extent::new(0, blocks)]).is_ok());
    let field = |field, found| Err(FrameError::Field { field, found });
    let large = FRAME_RANGE_BLOCKS_MAX * BLOCK_BYTES + BLOCK_BYTES;
    assert_eq!(FrameHeader::zero(id(1), DISK, vec![Extent::new(0, blocks + 1)]), field("content_bytes", large));
    assert_eq!(FrameHeader::zero(id(0), DISK, vec![Extent::new(0, 1)]), field("sequence", 0));
    assert_eq!(FrameHeader::zero(id(1), DiskIndex(64), vec![Extent::new(0, 1)]), field("disk", 64));
    assert_eq!(FrameHeader::zero(id(1), DISK, vec![]), field("extents", 0));
    let many: Vec<Extent> = (0..=FRAME_EXTENTS_MAX as u64).map(|at| Extent::new(2 * at, 1)).collect();
    assert_eq!(FrameHeader::zero(id(1), DISK, many), field("extents", 257));
    for (bad, index) in [
        (vec![Extent::new(4, 1), Extent::new(4, 1)], 1),
        (vec![Extent::new(4, 2), Extent::new(0, 1)], 1),
        (vec![Extent::new(4, 0)], 0),
        (vec![Extent::new(DISK_BYTES_MAX / BLOCK_BYTES, 1)], 0),
        (vec![Extent::new(u64::MAX, 1)], 0),
    ] {
        assert_eq!(FrameHeader::zero(id(1), DISK, bad), Err(FrameError::Extent { index }));
    }
    let content = vec![1; BLOCK_BYTES as usize];
    let longer = FrameHeader::data(id(1), DISK, vec![Extent::new(0, 1)], &content, Some(&content));
    assert_eq!(longer, field("payload_bytes", BLOCK_BYTES));
    let mut newer = FrameHeader::zero(id(1), DISK, vec![Extent::new(0, 1)]).unwrap().encode();
    newer[4] = 2;
    assert_eq!(FrameHeader::decode(&newer), Err(FrameError::NewerVersion { found: 2 }));
}

#[test]
fn an_entry_has_one_encoding() {
    let (header, _) = data(id(1), 0, 9, 1);
    let entry = entry(&header, &[0, 3]);
    let mut bytes = Vec::new();
    entry.encode(&mut bytes);
    assert_eq!(entry.excluded, [0b1001]);
    assert!(entry.excludes(3) && !entry.excludes(4) && !entry.excludes(400));
    let longer = Entry { excluded: vec![0b1001, 0], ..entry };
    let mut bytes = Vec::new();
    longer.encode(&mut bytes);
    assert_eq!(Entry::decode_all(&bytes), Err(list::ListError::Bitmap { bytes: 2 }));
}
