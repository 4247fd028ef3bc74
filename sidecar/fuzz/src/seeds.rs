//! Right inputs of each decoder, to mutate: from the encoders, and from the fixtures that are checked in beside them.

use prost::Message as _;
use watari_core::{
    divergence::Divergence,
    frame::{FrameHeader, FrameId},
    geometry::{ActivationId, Block, DiskIndex, Epoch, Extent, Generation, GenerationNumber, Sequence, Session},
    nbd::{self, ExportShape},
    record::{DiskRecord, Role, RoleRecord},
    regions::{
        RegionLayout, RegionSet,
        log::{self, LogHeader},
        trust::{self, DiskProof, FileStamp, Phase, RangeDigest, TrustRecord},
    },
    replica::{Entry, Mark},
};
use watari_wire::replication::{
    CommitPart, ControlMessage, DataFrame, Handover, Hello, SequenceRange, control_message::Body,
};

use crate::PAIR;

/// Size of the one disk, bytes.
pub const DISK_BYTES: u64 = 64 << 20;

pub fn shape(name: &str) -> ExportShape {
    ExportShape { name: name.into(), size_bytes: DISK_BYTES, read_only: false }
}

pub fn session() -> nbd::Session {
    nbd::Session {
        size_bytes: DISK_BYTES,
        read_only: false,
        structured: true,
        base_allocation: true,
        unfragmented_bytes_max: 1 << 20,
    }
}

fn generation() -> Generation {
    Generation { epoch: 2, number: GenerationNumber(9) }
}

fn client_hello() -> Vec<u8> {
    let config = rustls::ClientConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
        .with_safe_default_protocol_versions()
        .expect("the provider knows them")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = "a.pair.watari.internal".try_into().expect("a DNS name");
    let mut bytes = Vec::new();
    let mut client = rustls::ClientConnection::new(config.into(), name).expect("nothing can be missing");
    client.write_tls(&mut bytes).expect("memory takes it");
    bytes
}

fn frames() -> Vec<Vec<u8>> {
    let id = FrameId { epoch: 2, session: Session(7), sequence: Sequence(1) };
    let content = vec![5; 3 * 4096];
    let extents = vec![Extent { start: Block(1), blocks: 2 }, Extent { start: Block(9), blocks: 1 }];
    let header = |payload: Option<&[u8]>| {
        FrameHeader::data(id, DiskIndex(0), extents.clone(), &content, payload).expect("a small frame").encode()
    };
    let raw = [header(None), content.clone()].concat();
    let zero = FrameHeader::zero(id, DiskIndex(0), extents.clone()).expect("a small frame").encode();
    let same = FrameHeader::same(id, DiskIndex(0), extents.clone(), [1; 32]).expect("a small frame").encode();
    vec![raw, header(Some(&[40, 181, 47, 253, 0])), zero, same]
}

fn commit_list() -> Vec<u8> {
    let entry = |n: u64, excluded: Vec<u8>| Entry {
        session: Session(7),
        sequence: Sequence(n),
        crc32: 5,
        digest: [n as u8; 32],
        excluded,
    };
    let mut bytes = Vec::new();
    [entry(1, Vec::new()), entry(2, vec![1, 0]), entry(5, vec![255])].iter().for_each(|e| e.encode(&mut bytes));
    bytes
}

fn role_records() -> Vec<Vec<u8>> {
    let roles = [
        Role::Serving,
        Role::Sealed { handover: [1; 16], nonce: [2; 16], session: 3 },
        Role::Released { handover: [1; 16], generation: generation() },
        Role::Fenced { by: Epoch { counter: 9, activation: ActivationId([4; 16]) } },
    ];
    let record = |role| RoleRecord {
        pair: PAIR.0,
        site: [2; 16],
        identity: [3; 16],
        starts: 4,
        epoch: Epoch { counter: 5, activation: ActivationId([6; 16]) },
        floor: 5,
        role,
        base: generation(),
        numbers_reserved: GenerationNumber(1000),
        unfenced: false,
        untracked: false,
        disks: vec![DiskRecord { name: "root".into(), size_bytes: DISK_BYTES }],
    };
    roles.into_iter().map(|role| record(role).encode()).collect()
}

fn divergence() -> Vec<u8> {
    let extents = (0..9).map(|n| (DiskIndex(0), Extent { start: Block(3 * n), blocks: 1 + n as u32 % 2 })).collect();
    let list = Divergence {
        pair: PAIR.0,
        epoch: 1,
        by: 3,
        base: generation(),
        found_unix_millis: 9,
        anything: false,
        extents,
    };
    list.encode()
}

fn region_log() -> Vec<u8> {
    let layout = RegionLayout::new(&[DISK_BYTES]).expect("one small disk");
    let mut regions = RegionSet::none(&layout);
    regions.insert(3);
    let header = LogHeader { pair: PAIR, log_id: 11, session: 12, sizes: vec![DISK_BYTES] };
    log::encode_file(&header, &layout, &regions)
}

fn trust_record() -> Vec<u8> {
    let file = Some(FileStamp { inode: 5, mtime_ns: 6, ctime_ns: 7 });
    let ranges = vec![RangeDigest { offset: 0, length: 4096, blake3: [9; 32] }];
    let disks = vec![DiskProof { size: DISK_BYTES, file, ranges }];
    let record = TrustRecord {
        pair: PAIR,
        starts: 5,
        start_id: 6,
        session: 7,
        phase: Phase::CleanStop,
        untracked: false,
        disks,
    };
    trust::encode(&record)
}

/// Client flags, then options: LIST, INFO for "root", SET_META_CONTEXT, GO.
fn nbd_options() -> Vec<u8> {
    let option = |number: u32, data: &[u8]| {
        [&b"IHAVEOPT"[..], &number.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
    };
    let named = |rest: &[u8]| [&4u32.to_be_bytes()[..], b"root", rest].concat();
    let context = [&1u32.to_be_bytes()[..], &15u32.to_be_bytes(), b"base:allocation"].concat();
    let flags = 3u32.to_be_bytes().to_vec();
    let options = [
        option(3, &[]),
        option(8, &[]),
        option(6, &named(&[0, 1, 0, 3])),
        option(10, &named(&context)),
        option(7, &named(&[0, 0])),
    ];
    [flags, options.concat()].concat()
}

fn nbd_requests() -> Vec<u8> {
    let request = |kind: u16, flags: u16, offset: u64, length: u32| {
        [
            &0x2560_9513u32.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            &77u64.to_be_bytes(),
            &offset.to_be_bytes(),
            &length.to_be_bytes(),
        ]
        .concat()
    };
    (0..8).flat_map(|kind| request(kind, kind % 4, 4096 * u64::from(kind), 4096)).collect()
}

fn stream() -> Vec<Vec<u8>> {
    let message = |body| ControlMessage { body: Some(body) }.encode_to_vec();
    let hello = Hello {
        pair: PAIR.0.to_vec().into(),
        site: vec![2; 16].into(),
        staged: vec![SequenceRange { first: 1, last: 9 }],
        ..Hello::default()
    };
    let part =
        CommitPart { entries: commit_list().into(), last: true, root: vec![1; 32].into(), ..CommitPart::default() };
    let handover = Handover { kind: 4, handover: vec![1; 16].into(), nonce: vec![2; 16].into(), ..Handover::default() };
    let data = DataFrame { header: frames()[0].clone().into(), payload: vec![5; 100].into() }.encode_to_vec();
    vec![message(Body::Hello(hello)), message(Body::CommitPart(part)), message(Body::Handover(handover)), data]
}

/// Right inputs of one target.
///
/// # Panics
/// For a name that no target has.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    macro_rules! file {
        ($path:literal) => {
            include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../", $path)).to_vec()
        };
    }
    match target {
        "frame" => frames(),
        "commit_list" => vec![commit_list(), file!("core/tests/fixtures/replica-1/list-0000000000000000-0000000000000003")],
        "manifest" => {
            let mut mark = Vec::new();
            Mark { generation: generation(), root: [1; 32], committed_at_seconds: 5 }.encode(&mut mark);
            vec![file!("core/tests/fixtures/replica-1/manifest"), mark]
        }
        "journal" => vec![file!("core/tests/fixtures/replica-1/journal-0000000000000003")],
        "undo" => vec![file!("core/tests/fixtures/replica-1/undo-0000000000000003-0000000000000002")],
        "role_record" => role_records(),
        "divergence" => vec![divergence(), file!("core/tests/fixtures/divergence-1")],
        "region_log" => vec![region_log()],
        "trust" => vec![trust_record()],
        "nbd_options" => vec![nbd_options()],
        "nbd_requests" => vec![nbd_requests()],
        "stream" => stream(),
        "config" => vec![file!("examples-config/primary.toml"), file!("examples-config/replica.toml"), file!("examples-config/kubevirt.toml")],
        "domain_xml" => vec![
            file!("hook/tests/fixtures/as_libvirt_writes_it.xml"),
            file!("hook/tests/fixtures/iothreads.xml"),
            file!("hook/tests/fixtures/left_alone.xml"),
            file!("hook/tests/fixtures/scsi_block.xml"),
        ],
        "client_hello" => vec![client_hello()],
        "routes" => vec![br#"{"version":1,"routes":{"a.pair.watari.internal":"10.96.4.7:7070","b.internal":"[fd00::7]:1"}}"#.to_vec()],
        "vmi" => vec![
            br#"{"metadata":{"name":"vm1","uid":"u","annotations":{"a":"b"}},"status":{"migrationState":{"migrationUid":"m"},"volumeStatus":[{"name":"root","hotplugVolume":{}}]}}"#.to_vec(),
            b"{\"metadata\":{\"annotations\":null},\"status\":null}".to_vec(),
        ],
        other => panic!("no target is called {other}"),
    }
}
