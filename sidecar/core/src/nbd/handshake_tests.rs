//! Tables and properties of the handshake: what every option, right or wrong, is answered with.

#![allow(clippy::unwrap_used)]

use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::handshake::*;
use super::wire::*;

/// Two exports; `refuse` makes entering fail, `down` makes the server shut down.
#[derive(Default)]
struct Shop {
    refuse: bool,
    down: bool,
    entered: Vec<String>,
}

impl Catalogue for Shop {
    fn names(&self) -> Vec<String> {
        vec!["root".into(), "data".into()]
    }
    fn find(&self, name: &str) -> Option<ExportShape> {
        let (name, read_only) = match name {
            "" | "root" => ("root", false),
            "data" => ("data", true),
            _ => return None,
        };
        Some(ExportShape { name: name.into(), size_bytes: 1 << 30, read_only })
    }
    fn enter(&mut self, name: &str) -> Result<(), String> {
        if self.refuse {
            return Err("held for a handover".into());
        }
        self.entered.push(name.into());
        Ok(())
    }
    fn shutting_down(&self) -> bool {
        self.down
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn info(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    data.extend(infos.iter().flat_map(|i| i.to_be_bytes()));
    data
}

fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

/// A handshake in the option phase, and its shop.
struct Session {
    handshake: Handshake,
    shop: Shop,
}

impl Session {
    fn with_flags(flags: u32) -> Self {
        let mut session = Session { handshake: Handshake::new(), shop: Shop::default() };
        let (consumed, progress) = session.handshake.feed(&flags.to_be_bytes(), &mut session.shop, &mut Vec::new());
        assert_eq!((consumed, progress), (4, Progress::Continue));
        session
    }

    fn new() -> Self {
        Self::with_flags(3)
    }

    fn feed(&mut self, bytes: &[u8]) -> (Vec<u8>, Progress) {
        let mut out = Vec::new();
        let (consumed, progress) = self.handshake.feed(bytes, &mut self.shop, &mut out);
        assert!(consumed <= bytes.len());
        (out, progress)
    }

    /// Send one option; the replies as (type, data).
    fn ask(&mut self, number: u32, data: &[u8]) -> (Vec<(u32, Vec<u8>)>, Progress) {
        let (out, progress) = self.feed(&option(number, data));
        (replies(&out, number), progress)
    }

    /// The types of the replies to one option.
    fn kinds(&mut self, number: u32, data: &[u8]) -> Vec<u32> {
        self.ask(number, data).0.iter().map(|(kind, _)| *kind).collect()
    }
}

fn replies(mut out: &[u8], number: u32) -> Vec<(u32, Vec<u8>)> {
    let mut found = Vec::new();
    while !out.is_empty() {
        assert_eq!(be64(out, 0), Some(OPTION_REPLY_MAGIC));
        assert_eq!(be32(out, 8), Some(number));
        let length = be32(out, 16).unwrap() as usize;
        found.push((be32(out, 12).unwrap(), out[20..20 + length].to_vec()));
        out = &out[20 + length..];
    }
    found
}

#[test]
fn every_option_right_or_wrong_gets_the_reply_that_the_specification_names() {
    let long_name = "x".repeat(STRING_BYTES_MAX + 1);
    let mut lying_name = info("root", &[]);
    lying_name[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut lying_count = info("root", &[]);
    let end = lying_count.len();
    lying_count[end - 2..].copy_from_slice(&u16::MAX.to_be_bytes());
    let mut trailing = info("root", &[INFO_NAME]);
    trailing.push(0);
    let mut lying_queries = meta("root", &["base:allocation"]);
    lying_queries[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut long_query = meta("root", &["base:allocation"]);
    long_query[12..16].copy_from_slice(&0x7fff_ffffu32.to_be_bytes());

    let table: Vec<(u32, Vec<u8>, Vec<u32>)> = vec![
        (OPT_LIST, vec![], vec![REP_SERVER, REP_SERVER, REP_ACK]),
        (OPT_LIST, vec![1], vec![REP_ERR_INVALID]),
        (OPT_STRUCTURED_REPLY, vec![0; 9], vec![REP_ERR_INVALID]),
        (OPT_STRUCTURED_REPLY, vec![], vec![REP_ACK]),
        (OPT_STRUCTURED_REPLY, vec![], vec![REP_ACK]),
        (OPT_STARTTLS, vec![], vec![REP_ERR_UNSUP]),
        // Withdrawn, experimental and never defined options.
        (4, vec![], vec![REP_ERR_UNSUP]),
        (11, vec![], vec![REP_ERR_UNSUP]),
        (0, vec![], vec![REP_ERR_UNSUP]),
        (0xffff_ffff, vec![7; 300], vec![REP_ERR_UNSUP]),
        (OPT_INFO, info("root", &[]), vec![REP_INFO, REP_ACK]),
        (OPT_INFO, info("", &[]), vec![REP_INFO, REP_ACK]),
        (OPT_INFO, info("root", &[INFO_BLOCK_SIZE, INFO_NAME]), vec![REP_INFO, REP_INFO, REP_INFO, REP_ACK]),
        // Unknown information requests are ignored.
        (OPT_INFO, info("root", &[2, 77, 0xffff]), vec![REP_INFO, REP_ACK]),
        (OPT_INFO, info("nope", &[]), vec![REP_ERR_UNKNOWN]),
        (OPT_GO, info("nope", &[]), vec![REP_ERR_UNKNOWN]),
        (OPT_INFO, vec![], vec![REP_ERR_INVALID]),
        (OPT_GO, vec![0; 5], vec![REP_ERR_INVALID]),
        (OPT_INFO, lying_name, vec![REP_ERR_INVALID]),
        (OPT_INFO, lying_count, vec![REP_ERR_INVALID]),
        (OPT_INFO, trailing, vec![REP_ERR_INVALID]),
        (OPT_INFO, info("a\0b", &[]), vec![REP_ERR_INVALID]),
        (OPT_INFO, info(&long_name, &[]), vec![REP_ERR_INVALID]),
        (OPT_LIST_META_CONTEXT, meta("root", &[]), vec![REP_META_CONTEXT, REP_ACK]),
        (OPT_LIST_META_CONTEXT, meta("root", &["base:"]), vec![REP_META_CONTEXT, REP_ACK]),
        (OPT_LIST_META_CONTEXT, meta("root", &["base:allocation"]), vec![REP_META_CONTEXT, REP_ACK]),
        (OPT_LIST_META_CONTEXT, meta("root", &["qemu:", "base:later", "junk"]), vec![REP_ACK]),
        (OPT_SET_META_CONTEXT, meta("root", &["base:allocation", "qemu:x"]), vec![REP_META_CONTEXT, REP_ACK]),
        // The wildcard and the empty list select nothing.
        (OPT_SET_META_CONTEXT, meta("root", &["base:"]), vec![REP_ACK]),
        (OPT_SET_META_CONTEXT, meta("root", &[]), vec![REP_ACK]),
        (OPT_SET_META_CONTEXT, meta("nope", &["base:allocation"]), vec![REP_ERR_UNKNOWN]),
        (OPT_SET_META_CONTEXT, vec![], vec![REP_ERR_INVALID]),
        (OPT_SET_META_CONTEXT, vec![0; 7], vec![REP_ERR_INVALID]),
        (OPT_SET_META_CONTEXT, lying_queries, vec![REP_ERR_INVALID]),
        (OPT_SET_META_CONTEXT, long_query, vec![REP_ERR_INVALID]),
    ];
    let mut session = Session::new();
    for (index, (number, data, expected)) in table.into_iter().enumerate() {
        assert_eq!(session.kinds(number, &data), expected, "row {index}, option {number}");
    }
    assert!(session.shop.entered.is_empty(), "nothing in the table enters transmission");
}

#[test]
fn go_enters_with_what_info_announced_and_export_name_says_the_same_in_its_own_words() {
    let mut session = Session::new();
    let (before, _) = session.ask(OPT_INFO, &info("root", &[INFO_BLOCK_SIZE]));
    let (after, progress) = session.ask(OPT_GO, &info("root", &[INFO_BLOCK_SIZE]));
    assert_eq!(before, after);
    let Progress::Enter(negotiated) = progress else { panic!("{progress:?}") };
    assert!(!negotiated.structured && !negotiated.base_allocation);
    assert_eq!(be64(&after[0].1, 2), Some(1 << 30));
    assert_eq!(be16(&after[0].1, 10), Some(transmission_flags(false, false)));
    assert_eq!(&after[1].1[2..], [0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0], "1, 4096, 32 MiB");

    for (flags, trailer) in [(3, 0), (1, 124), (0, 124)] {
        let mut session = Session::with_flags(flags);
        let (out, progress) = session.feed(&option(OPT_EXPORT_NAME, b"data"));
        assert!(matches!(progress, Progress::Enter(_)));
        assert_eq!(out.len(), 10 + trailer);
        assert_eq!(be16(&out, 8), Some(transmission_flags(true, false)));
    }
}

#[test]
fn flags_say_what_is_true_for_read_only_and_structured_sessions() {
    let writable = transmission_flags(false, true);
    assert_eq!(writable, 0b1101_1110_1101, "{writable:#b}");
    let read_only = transmission_flags(true, false);
    assert_eq!(read_only, 0b0101_0000_1111, "{read_only:#b}");
}

#[test]
fn a_context_counts_only_for_the_export_it_was_selected_for_and_only_if_it_was_the_last_word() {
    let chosen = |steps: &[(u32, Vec<u8>)], go: &str| {
        let mut session = Session::new();
        session.kinds(OPT_STRUCTURED_REPLY, &[]);
        for (number, data) in steps {
            session.kinds(*number, data);
        }
        match session.ask(OPT_GO, &info(go, &[])).1 {
            Progress::Enter(negotiated) => negotiated.base_allocation,
            other => panic!("{other:?}"),
        }
    };
    let set = |name: &str, query: &str| (OPT_SET_META_CONTEXT, meta(name, &[query]));
    assert!(chosen(&[set("root", BASE_ALLOCATION)], "root"));
    assert!(chosen(&[set("", BASE_ALLOCATION)], ""));
    assert!(!chosen(&[set("data", BASE_ALLOCATION)], "root"));
    assert!(!chosen(&[set("root", BASE_ALLOCATION), set("root", "qemu:dirty")], "root"));
    // A failing SET replaces the earlier selection too.
    assert!(!chosen(&[set("root", BASE_ALLOCATION), (OPT_SET_META_CONTEXT, vec![1])], "root"));
    assert!(!chosen(&[(OPT_LIST_META_CONTEXT, meta("root", &[BASE_ALLOCATION]))], "root"));
}

#[test]
fn contexts_need_structured_replies_first() {
    let mut session = Session::new();
    for number in [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT] {
        assert_eq!(session.kinds(number, &meta("root", &[BASE_ALLOCATION])), [REP_ERR_INVALID]);
    }
}

#[test]
fn a_refusal_by_the_disk_reaches_the_client_in_words_and_the_client_may_go_on() {
    let mut session = Session::new();
    session.shop.refuse = true;
    let (found, progress) = session.ask(OPT_GO, &info("root", &[]));
    assert_eq!(found, [(REP_ERR_POLICY, b"held for a handover".to_vec())]);
    assert_eq!(progress, Progress::Continue);
    session.shop.refuse = false;
    assert!(matches!(session.ask(OPT_GO, &info("root", &[])).1, Progress::Enter(_)));

    let mut session = Session::new();
    session.shop.refuse = true;
    let (out, progress) = session.feed(&option(OPT_EXPORT_NAME, b"root"));
    assert_eq!((out, progress), (vec![], Progress::Close(CloseReason::ExportRefused)));
}

#[test]
fn what_cannot_be_answered_closes_the_connection() {
    let close = |bytes: &[u8], reason| {
        let mut session = Session::new();
        assert_eq!(session.feed(bytes).1, Progress::Close(reason));
    };
    close(&option(OPT_EXPORT_NAME, b"nope"), CloseReason::ExportRefused);
    close(&option(OPT_EXPORT_NAME, b"\xff\xfe"), CloseReason::ExportRefused);
    close(&option(OPT_ABORT, b"whatever"), CloseReason::Aborted);
    close(&[0; 16], CloseReason::BadMagic);
    close(b"GET", CloseReason::BadMagic);
    let mut header = option(OPT_EXPORT_NAME, &[]);
    header[12..].copy_from_slice(&(OPTION_BYTES_MAX + 1).to_be_bytes());
    close(&header, CloseReason::Flood);
    let mut header = option(OPT_LIST, &[]);
    header[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    close(&header, CloseReason::Flood);

    let mut handshake = Handshake::new();
    let (_, progress) = handshake.feed(&4u32.to_be_bytes(), &mut Shop::default(), &mut Vec::new());
    assert_eq!(progress, Progress::Close(CloseReason::UnknownClientFlags));

    let mut old = Session::with_flags(0);
    assert_eq!(old.feed(&option(OPT_LIST, &[])).1, Progress::Close(CloseReason::NotFixedNewstyle));
}

#[test]
fn abort_is_acknowledged_even_while_shutting_down_and_everything_else_is_told_about_it() {
    let mut session = Session::new();
    session.shop.down = true;
    assert_eq!(session.kinds(OPT_LIST, &[]), [REP_ERR_SHUTDOWN]);
    assert_eq!(session.kinds(OPT_GO, &info("root", &[])), [REP_ERR_SHUTDOWN]);
    let (found, progress) = session.ask(OPT_ABORT, &[]);
    assert_eq!(found, [(REP_ACK, vec![])]);
    assert_eq!(progress, Progress::Close(CloseReason::Aborted));
}

#[test]
fn an_option_too_long_to_look_at_is_skipped_and_the_next_one_is_understood() {
    let mut session = Session::new();
    let length = OPTION_BYTES_MAX + 5;
    let mut stream = option(77, &[]);
    stream[12..].copy_from_slice(&length.to_be_bytes());
    stream.extend(std::iter::repeat_n(0xee, length as usize));
    stream.extend(option(OPT_LIST, &[]));
    let (mut out, mut at) = (Vec::new(), 0);
    while at < stream.len() {
        let window = &stream[at..stream.len().min(at + 4000)];
        let (consumed, progress) = session.handshake.feed(window, &mut session.shop, &mut out);
        assert_eq!(progress, Progress::Continue);
        assert!(consumed > 0);
        at += consumed;
    }
    assert_eq!(be32(&out, 12), Some(REP_ERR_TOO_BIG));
    let text = be32(&out, 16).unwrap() as usize;
    assert_eq!(replies(&out[20 + text..], OPT_LIST).len(), 3);
}

#[test]
fn an_endless_stream_of_options_is_cut() {
    let mut session = Session::new();
    for _ in 0..OPTIONS_MAX {
        assert_eq!(session.ask(OPT_LIST, &[]).1, Progress::Continue);
    }
    let (out, progress) = session.feed(&option(OPT_LIST, &[]));
    assert_eq!((out.len(), progress), (0, Progress::Close(CloseReason::Flood)));
}

fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..64),
        (any::<u32>(), "[a-z]{0,6}", any::<u16>()).prop_map(|(length, name, count)| {
            let mut data = if length % 3 == 0 { length } else { name.len() as u32 }.to_be_bytes().to_vec();
            data.extend_from_slice(name.as_bytes());
            data.extend_from_slice(&count.to_be_bytes());
            data
        }),
        Just(meta("root", &[BASE_ALLOCATION])),
        Just(info("root", &[3])),
    ];
    (0u32..13, data, any::<u32>(), 0u8..20).prop_map(|(number, data, lie, dice)| {
        let mut bytes = option(number, &data);
        match dice {
            0 => bytes[12..16].copy_from_slice(&lie.to_be_bytes()),
            1 => bytes[(lie % 16) as usize] ^= 0x40,
            _ => {}
        }
        bytes
    })
}

proptest! {
    /// No input panics, consumes more than there is, or is answered out of proportion; and how the bytes are cut into
    /// pieces makes no difference.
    #[test]
    fn any_stream_is_survived_and_its_cutting_does_not_matter(
        flags in prop_oneof![3 => Just(3u32), 1 => any::<u32>()],
        options in proptest::collection::vec(any_option(), 0..8),
        piece in 1usize..50,
    ) {
        let mut stream = flags.to_be_bytes().to_vec();
        stream.extend(options.concat());
        let run = |piece: usize| {
            let (mut handshake, mut shop, mut out) = (Handshake::new(), Shop::default(), Vec::new());
            let (mut start, mut end) = (0, 0);
            loop {
                let (consumed, progress) = handshake.feed(&stream[start..end], &mut shop, &mut out);
                start += consumed;
                assert!(start <= end);
                if progress != Progress::Continue {
                    // A wrong magic may be noticed a few bytes earlier or later, with the same outcome.
                    return (std::format!("{progress:?}"), out);
                }
                if consumed == 0 {
                    if end == stream.len() {
                        return ("waiting".to_string(), out);
                    }
                    end = (end + piece).min(stream.len());
                }
            }
        };
        let (whole, pieces) = (run(usize::MAX / 2), run(piece));
        prop_assert!(whole.1.len() <= stream.len() * 16 + 4096);
        prop_assert_eq!(whole, pieces);
    }
}
