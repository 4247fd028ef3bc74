//! Tables and properties of requests and replies.

#![allow(clippy::unwrap_used)]

use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::reply;
use super::request::*;
use super::wire::*;
use crate::front::{Allocation, Errno};

const SIZE: u64 = 1 << 30;

fn session() -> Session {
    Session {
        size_bytes: SIZE,
        read_only: false,
        structured: true,
        base_allocation: true,
        unfragmented_bytes_max: 1 << 20,
    }
}

fn request(kind: u16, flags: u16, offset: u64, length: u32) -> RequestHeader {
    RequestHeader { flags, kind, cookie: 7, offset, length }
}

/// The errno of a refusal, `None` if it is not refused.
fn refusal(verdict: Verdict) -> Option<Errno> {
    match verdict {
        Verdict::Refuse { errno, .. } => Some(errno),
        Verdict::Run(_) | Verdict::Done | Verdict::Goodbye | Verdict::Cut => None,
    }
}

#[test]
fn requests_that_are_right_run_as_what_they_say() {
    let run = |header: RequestHeader| match header.verify(&session()) {
        Verdict::Run(command) => command,
        other => panic!("{header:?}: {other:?}"),
    };
    let last = SIZE - 1;
    assert_eq!(run(request(CMD_READ, 0, last, 1)), Command::Read { unfragmented: false });
    assert_eq!(run(request(CMD_READ, CMD_FLAG_DF, 3, 65536)), Command::Read { unfragmented: true });
    // FUA is accepted on every command.
    assert_eq!(run(request(CMD_READ, CMD_FLAG_FUA, 0, 5)), Command::Read { unfragmented: false });
    assert_eq!(run(request(CMD_FLUSH, CMD_FLAG_FUA, 0, 0)), Command::Flush);
    assert_eq!(run(request(CMD_WRITE, 0, 0, PAYLOAD_BYTES_MAX)), Command::Write { fua: false });
    assert_eq!(run(request(CMD_WRITE, CMD_FLAG_FUA, last, 1)), Command::Write { fua: true });
    assert_eq!(run(request(CMD_TRIM, CMD_FLAG_FUA, 0, 1 << 30)), Command::Trim { fua: true });
    assert_eq!(run(request(CMD_CACHE, 0, 0, 1 << 30)), Command::Cache);
    assert_eq!(
        run(request(CMD_WRITE_ZEROES, CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO, 0, 1 << 30)),
        Command::WriteZeroes { fua: false, no_hole: true, fast: true }
    );
    assert_eq!(run(request(CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, 1, 9)), Command::BlockStatus { one: true });
}

#[test]
fn requests_that_are_wrong_are_refused_with_the_errno_of_the_specification() {
    use Errno::{Invalid, NoSpace, Overflow, Perm};
    let read_only = Session { read_only: true, ..session() };
    let simple = Session { structured: false, base_allocation: false, ..session() };
    let all = session();
    let table: Vec<(&Session, RequestHeader, Errno)> = vec![
        (&all, request(8, 0, 0, 512), Invalid),
        (&all, request(0xffff, 0, 0, 512), Invalid),
        // A flag that is unknown, or not for this command.
        (&all, request(CMD_READ, 1 << 9, 0, 512), Invalid),
        (&all, request(CMD_READ, CMD_FLAG_NO_HOLE, 0, 512), Invalid),
        (&all, request(CMD_WRITE, CMD_FLAG_DF, 0, 512), Invalid),
        (&all, request(CMD_CACHE, CMD_FLAG_REQ_ONE, 0, 512), Invalid),
        (&all, request(CMD_TRIM, CMD_FLAG_FAST_ZERO, 0, 512), Invalid),
        (&simple, request(CMD_READ, CMD_FLAG_DF, 0, 512), Invalid),
        // Ranges: writing beyond the end is ENOSPC, anything else EINVAL.
        (&all, request(CMD_READ, 0, SIZE, 1), Invalid),
        (&all, request(CMD_READ, 0, u64::MAX, 2), Invalid),
        (&all, request(CMD_WRITE, 0, SIZE - 1, 2), NoSpace),
        (&all, request(CMD_WRITE, 0, u64::MAX, u32::MAX >> 8), NoSpace),
        (&all, request(CMD_WRITE_ZEROES, 0, SIZE, 1), NoSpace),
        (&all, request(CMD_TRIM, 0, SIZE - 1, 2), Invalid),
        (&all, request(CMD_CACHE, 0, SIZE, 1), Invalid),
        (&all, request(CMD_BLOCK_STATUS, 0, SIZE, 1), Invalid),
        (&all, request(CMD_FLUSH, 0, 1, 0), Invalid),
        (&all, request(CMD_FLUSH, 0, 0, 1), Invalid),
        (&read_only, request(CMD_WRITE, 0, 0, 512), Perm),
        (&read_only, request(CMD_TRIM, 0, 0, 512), Perm),
        (&read_only, request(CMD_WRITE_ZEROES, 0, 0, 512), Perm),
        // Too long to answer.
        (&all, request(CMD_READ, 0, 0, PAYLOAD_BYTES_MAX + 1), Overflow),
        (&simple, request(CMD_READ, 0, 0, PAYLOAD_BYTES_MAX + 1), Invalid),
        (&all, request(CMD_READ, CMD_FLAG_DF, 0, (1 << 20) + 1), Overflow),
        // No context negotiated; an answer without an extent.
        (&simple, request(CMD_BLOCK_STATUS, 0, 0, 512), Invalid),
        (&all, request(CMD_BLOCK_STATUS, 0, 0, 0), Invalid),
    ];
    for (session, header, expected) in table {
        let verdict = header.verify(session);
        assert_eq!(refusal(verdict), Some(expected), "{header:?}: {verdict:?}");
    }
}

#[test]
fn a_refused_write_still_owes_its_payload_and_an_endless_one_is_cut() {
    let refused = request(CMD_WRITE, 1 << 12, 0, 12345).verify(&session());
    assert!(matches!(refused, Verdict::Refuse { skip_bytes: 12345, .. }), "{refused:?}");
    let refused = request(CMD_READ, 1 << 12, 0, 12345).verify(&session());
    assert!(matches!(refused, Verdict::Refuse { skip_bytes: 0, .. }), "{refused:?}");
    assert_eq!(request(CMD_WRITE, 0, 0, PAYLOAD_BYTES_MAX + 1).verify(&session()), Verdict::Cut);
}

#[test]
fn empty_requests_succeed_and_goodbye_is_goodbye_whatever_else_it_says() {
    for kind in [CMD_READ, CMD_WRITE, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES] {
        assert_eq!(request(kind, 0, SIZE, 0).verify(&session()), Verdict::Done, "command {kind}");
    }
    assert_eq!(request(CMD_DISC, 0xffff, u64::MAX, u32::MAX).verify(&session()), Verdict::Goodbye);
}

#[test]
fn replies_are_the_bytes_of_the_specification() {
    let mut out = Vec::new();
    reply::simple(&mut out, 0x0102, Err(Errno::NoSpace));
    assert_eq!(out, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 1, 2]);
    out.clear();
    reply::data_header(&mut out, 1, true, 0x1000, 512);
    assert_eq!(out.len(), reply::DATA_HEADER_BYTES);
    assert_eq!(out[..8], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1]);
    assert_eq!((be64(&out, 8), be32(&out, 16), be64(&out, 20)), (Some(1), Some(520), Some(0x1000)));
    out.clear();
    reply::hole(&mut out, 1, false, 0x1000, 512);
    assert_eq!(out[4..8], [0, 0, 0, 2]);
    assert_eq!((be32(&out, 16), be64(&out, 20), be32(&out, 28)), (Some(12), Some(0x1000), Some(512)));
    out.clear();
    reply::none(&mut out, 9);
    assert_eq!(out[4..8], [0, 1, 0, 0]);
    out.clear();
    reply::error(&mut out, 9, Errno::Io, "broken");
    assert_eq!(out[4..8], [0, 1, 0x80, 1]);
    assert_eq!((be32(&out, 16), be32(&out, 20), be16(&out, 24)), (Some(12), Some(5), Some(6)));
    assert_eq!(&out[26..], b"broken");
}

#[test]
fn errors_on_the_wire_are_the_eight_that_the_specification_allows() {
    let all = [
        (Errno::Perm, 1),
        (Errno::Io, 5),
        (Errno::NoMem, 12),
        (Errno::Invalid, 22),
        (Errno::NoSpace, 28),
        (Errno::Overflow, 75),
        (Errno::NotSupported, 95),
        (Errno::ShuttingDown, 108),
    ];
    for (errno, number) in all {
        assert_eq!(errno_on_wire(errno), number);
    }
}

/// The descriptors of a block status reply.
fn extents(out: &[u8]) -> Vec<(u32, u32)> {
    assert_eq!(be32(out, 16).unwrap() as usize, out.len() - 20);
    assert_eq!(be32(out, 20), Some(BASE_ALLOCATION_ID));
    out[24..].chunks(8).map(|d| (be32(d, 0).unwrap(), be32(d, 4).unwrap())).collect()
}

proptest! {
    #[test]
    fn any_header_has_a_verdict_and_what_runs_lies_within_the_export(
        bytes in any::<[u8; REQUEST_BYTES]>(),
        right_magic in any::<bool>(),
        small in any::<bool>(),
        size_bytes in any::<u64>(),
        flags in any::<[bool; 3]>(),
    ) {
        let mut bytes = bytes;
        if right_magic {
            bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        }
        if small {
            // Known commands and short ranges, so that the interesting paths are reached.
            (bytes[4], bytes[5]) = (0, bytes[5] & 0x1f);
            (bytes[6], bytes[7]) = (0, bytes[7] & 7);
            bytes[24] = 0;
        }
        let [read_only, structured, base_allocation] = flags;
        let session = Session { size_bytes, read_only, structured, base_allocation, unfragmented_bytes_max: 65536 };
        let Some(header) = RequestHeader::decode(&bytes) else {
            prop_assert!(be32(&bytes, 0) != Some(REQUEST_MAGIC));
            return Ok(());
        };
        match header.verify(&session) {
            Verdict::Run(command) => {
                prop_assert!(u128::from(header.offset) + u128::from(header.length) <= u128::from(size_bytes));
                prop_assert!(header.length > 0 || command == Command::Flush);
                let changes = matches!(command, Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes { .. });
                prop_assert!(!(changes && read_only));
                if matches!(command, Command::Read { .. } | Command::Write { .. }) {
                    prop_assert!(header.length <= PAYLOAD_BYTES_MAX);
                }
            }
            Verdict::Refuse { skip_bytes, .. } => prop_assert!(skip_bytes <= PAYLOAD_BYTES_MAX),
            Verdict::Done | Verdict::Goodbye | Verdict::Cut => {}
        }
    }

    #[test]
    fn block_status_describes_a_prefix_of_the_range_in_the_terms_of_the_specification(
        runs in proptest::collection::vec((0u64..1 << 34, any::<bool>(), any::<bool>()), 0..20),
        length in 1u32..,
        one in any::<bool>(),
    ) {
        let runs: Vec<Allocation> =
            runs.into_iter().map(|(length, hole, zero)| Allocation { length, hole, zero }).collect();
        let mut out = vec![0xaa; 3];
        let described = reply::block_status(&mut out, 5, length, one, &runs);
        let Some(()) = described else {
            prop_assert_eq!(out.len(), 3);
            prop_assert!(runs.iter().all(|run| run.length == 0));
            return Ok(());
        };
        let found = extents(&out[3..]);
        prop_assert!(!found.is_empty() && (!one || found.len() == 1));
        let total: u64 = found.iter().map(|(bytes, _)| u64::from(*bytes)).sum();
        let known: u64 = runs.iter().map(|run| run.length).sum();
        prop_assert!(total <= u64::from(length).min(known));
        prop_assert!(one || total == u64::from(length).min(known));
        for pair in found.windows(2) {
            prop_assert!(pair[0].1 != pair[1].1, "neighbours differ");
        }
        // Every byte described carries the state of the run it lies in.
        let mut at = 0u64;
        for (bytes, state) in found {
            prop_assert!(bytes > 0);
            for probe in [at, at + u64::from(bytes) - 1] {
                let mut end = 0;
                let run = runs.iter().find(|run| { end += run.length; probe < end }).unwrap();
                prop_assert_eq!(state, u32::from(run.hole) * STATE_HOLE + u32::from(run.zero) * STATE_ZERO);
            }
            at += u64::from(bytes);
        }
    }
}
