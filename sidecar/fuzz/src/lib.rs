//! Every decoder of ours that reads bytes from outside: what a peer, a guest, a medium, a person or KubeVirt may hand us.
//!
//! A target takes any bytes and must return: no panic, no allocation by an unchecked length, no reading past the end, no
//! time that grows faster than the input. The same functions run on stable Rust over the seeds and their mutations (`tests/`, part of `make test`)
//! and under libFuzzer (`libfuzzer/`, `make fuzz`). They judge no meaning; the decoders' own tests do.

mod seeds;

use std::path::Path;

use prost::Message as _;
use watari_core::{
    codec::Reader,
    divergence::Divergence,
    frame::{Frame, FrameHeader},
    nbd::{Catalogue, ExportShape, Handshake, Progress, RequestHeader, wire::REQUEST_BYTES},
    record::RoleRecord,
    regions::{PairId, RegionLayout, log, trust},
    replica::{Entry, Mark, journal, manifest::Manifest, undo},
};
use watari_gateway::{hello::HelloReader, routes::Routes};
use watari_hook::{RewriteOptions, SyncedDisk, Vmi, disks_to_copy, lossy, rewrite};
use watari_sidecar::config::{Config, Overrides};
use watari_store::replica::Zstd;
use watari_wire::replication::{ControlMessage, DataFrame};

pub use seeds::seeds;

/// One decoder.
#[derive(Clone, Copy)]
pub struct Target {
    pub name: &'static str,
    pub feed: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "frame", feed: frame },
    Target { name: "commit_list", feed: |b| drop(Entry::decode_all(b)) },
    Target { name: "manifest", feed: manifest },
    Target { name: "journal", feed: journal::fuzz_decode },
    Target { name: "undo", feed: undo::fuzz_decode },
    Target { name: "role_record", feed: |b| drop(RoleRecord::decode(b)) },
    Target { name: "divergence", feed: |b| drop(Divergence::decode(b)) },
    Target { name: "region_log", feed: region_log },
    Target { name: "trust", feed: |b| drop(trust::decode(b, PAIR)) },
    Target { name: "nbd_options", feed: nbd_options },
    Target { name: "nbd_requests", feed: nbd_requests },
    Target { name: "stream", feed: stream },
    Target { name: "config", feed: config },
    Target { name: "domain_xml", feed: domain_xml },
    Target { name: "client_hello", feed: client_hello },
    Target { name: "routes", feed: |b| drop(Routes::parse(b)) },
    Target { name: "vmi", feed: |b| drop(Vmi::parse(b)) },
];

/// Pair of all seeds that name one.
pub const PAIR: PairId = PairId([3; 16]);

fn frame(bytes: &[u8]) {
    if let Ok((header, used)) = FrameHeader::decode(bytes) {
        // What follows the header is taken for its payload, decompressed if it says so.
        let _ = Frame::check(header, &bytes[used..], &Zstd);
    }
}

fn manifest(bytes: &[u8]) {
    let _ = Manifest::decode(bytes);
    let _ = Mark::decode(&mut Reader::new(bytes));
}

fn region_log(bytes: &[u8]) {
    let _ = log::decode_header(bytes);
    let layout = RegionLayout::new(&[seeds::DISK_BYTES]).expect("one small disk");
    let _ = log::decode_file(bytes, PAIR, &layout);
}

struct OneDisk;

impl Catalogue for OneDisk {
    fn names(&self) -> Vec<String> {
        vec!["root".into()]
    }
    fn find(&self, name: &str) -> Option<ExportShape> {
        (name == "root" || name.is_empty()).then(|| seeds::shape("root"))
    }
    fn enter(&mut self, _: &str) -> Result<(), String> {
        Ok(())
    }
    fn shutting_down(&self) -> bool {
        false
    }
}

fn nbd_options(bytes: &[u8]) {
    let (mut handshake, mut at) = (Handshake::new(), 0);
    loop {
        let mut out = Vec::new();
        let (used, progress) = handshake.feed(&bytes[at..], &mut OneDisk, &mut out);
        at += used;
        if used == 0 || progress != Progress::Continue {
            return;
        }
    }
}

fn nbd_requests(bytes: &[u8]) {
    let session = seeds::session();
    for chunk in bytes.chunks_exact(REQUEST_BYTES) {
        let header: &[u8; REQUEST_BYTES] = chunk.try_into().expect("exact chunks");
        if let Some(request) = RequestHeader::decode(header) {
            let _ = request.verify(&session);
        }
    }
}

fn stream(bytes: &[u8]) {
    let _ = ControlMessage::decode(bytes);
    if let Ok(data) = DataFrame::decode(bytes) {
        frame(&data.header);
    }
}

/// In pieces, as a network brings them.
fn client_hello(bytes: &[u8]) {
    let mut reader = HelloReader::default();
    for piece in bytes.chunks(97) {
        let piece = &piece[..piece.len().min(reader.room())];
        if !matches!(reader.feed(piece), Ok(None)) {
            return;
        }
    }
}

fn config(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = Config::parse(Path::new("sidecar.toml"), text, &Overrides::default());
    }
}

fn domain_xml(bytes: &[u8]) {
    let synced =
        SyncedDisk { volume: "rootdisk".into(), export: "root".into(), socket: "/var/run/watari/root.sock".into() };
    let _ = rewrite(bytes, &[synced], &RewriteOptions::default());
    let _ = disks_to_copy(bytes);
    let _ = lossy::lossy(bytes);
}
