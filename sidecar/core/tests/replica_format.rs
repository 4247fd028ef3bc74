//! Format 1 stays readable, and a newer format is refused without being touched.
//!
//! `tests/fixtures/replica-1` was written by the first program that knew format 1. `REPLICA_WRITE_FIXTURE=1` writes it
//! again; that is right only together with a new format and a new folder name.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use std::{fs, path::PathBuf};
use watari_core::{
    codec::crc32,
    geometry::BLOCK_BYTES,
    replica::{CommitAnswer, Options, Progress, ReplicaError},
    slots::SLOT_BYTES,
    storage::{Storage, sim::SimMedium},
};

fn fixture() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/replica-1")
}

/// Two applied generations with undo between them, one that is committed and in the middle of its application, one
/// frame that is staged.
fn write_fixture() {
    let medium = SimMedium::new();
    let mut store = create(&medium, options(4), false);
    for number in 1..=3 {
        let staged = vec![stage(&mut store, number, number, 2, number as u8)];
        assert_eq!(commit(&mut store, number, staged), CommitAnswer::Committed);
        if number < 3 {
            store.apply_all().unwrap();
        }
    }
    while !store.manifest().applying.is_some_and(|applying| applying.undo) {
        assert!(matches!(store.apply_step(1).unwrap(), Progress::Working { .. }));
    }
    stage(&mut store, 9, 20, 1, 9);
    store.sync_staged().unwrap();
    fs::create_dir_all(fixture()).unwrap();
    for folder in ["meta", "images"] {
        let storage = medium.folder(folder);
        for name in storage.list().unwrap() {
            let mut bytes = vec![0; storage.len(&name).unwrap() as usize];
            storage.read(&name, 0, &mut bytes).unwrap();
            if folder == "images" {
                // The disk is zero from here on.
                bytes.truncate(5 * BLOCK_BYTES as usize);
            }
            fs::write(fixture().join(name), bytes).unwrap();
        }
    }
}

fn load() -> SimMedium {
    if std::env::var_os("REPLICA_WRITE_FIXTURE").is_some() {
        write_fixture();
    }
    let medium = SimMedium::new();
    for file in fs::read_dir(fixture()).unwrap() {
        let file = file.unwrap();
        let name = file.file_name().into_string().unwrap();
        let mut storage = medium.folder(if name.starts_with("disk-") { "images" } else { "meta" });
        storage.write(&name, 0, &fs::read(file.path()).unwrap()).unwrap();
    }
    medium.folder("images").truncate("disk-0", DISK_BLOCKS * BLOCK_BYTES).unwrap();
    medium
}

#[test]
fn a_folder_of_format_1_is_read_continued_and_bit_exact() {
    let medium = load();
    let mut store = open(&medium, options(4));
    assert_eq!(kept(&store), [3, 2, 1]);
    assert_eq!(store.staged()[0].ranges.len(), 1);
    for round in 0..2 {
        let found: Vec<Vec<u8>> =
            [1, 2, 3].iter().map(|number| (0..6).map(|at| block(&mut store, *number, at)).collect()).collect();
        assert_eq!(found, [[0, 1, 1, 0, 0, 0], [0, 1, 2, 2, 0, 0], [0, 1, 2, 3, 3, 0]], "round {round}");
        assert_eq!(store.verify(), Ok(vec![]));
        store.apply_all().unwrap();
    }
    let (header, _) = data(id(9), 20, 1, 9);
    assert_eq!(commit(&mut store, 4, vec![entry(&header, &[])]), CommitAnswer::Committed);
    assert_eq!(block(&mut store, 4, 20), 9);
}

/// Give a file the next version, with its checksum right.
fn raise_version(medium: &SimMedium, name: &str) {
    let mut storage = medium.folder("meta");
    let length = storage.len(name).unwrap() as usize;
    let (headers, header_bytes): (&[u64], usize) = match name.split('-').next().unwrap() {
        "manifest" => (&[0, SLOT_BYTES as u64], SLOT_BYTES),
        "journal" => (&[0], 64),
        "list" => (&[0], 128),
        "undo" => (&[0], 4096),
        other => panic!("{other}"),
    };
    for at in headers {
        let mut header = vec![0; header_bytes.min(length)];
        storage.read(name, *at, &mut header).unwrap();
        header[8..10].copy_from_slice(&2u16.to_le_bytes());
        let crc = crc32(&[&header[..12], &header[16..]]);
        header[12..16].copy_from_slice(&crc.to_le_bytes());
        storage.write(name, *at, &header).unwrap();
    }
}

#[test]
fn a_newer_format_of_any_file_is_refused_and_not_touched() {
    let names = load().folder("meta").list().unwrap();
    let mut kinds: Vec<&str> = names.iter().map(|name| name.split('-').next().unwrap()).collect();
    kinds.dedup();
    assert_eq!(kinds, ["journal", "list", "manifest", "undo"], "the fixture has every kind of file");
    for name in &names {
        let medium = load();
        raise_version(&medium, name);
        let before = medium.operations();
        let refused = try_open(&medium, options(4)).map(|_| ());
        let expected = ReplicaError::NewerVersion { file: name.clone(), found: 2, supported: 1 };
        assert_eq!(refused, Err(expected));
        let looked_at = try_open(&medium, Options { read_only: true, ..options(4) }).map(|_| ());
        assert!(looked_at.is_err());
        assert_eq!(medium.operations(), before, "{name} was touched");
    }
}
