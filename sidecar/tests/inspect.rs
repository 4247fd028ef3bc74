//! `inspect` by the real binary, on a folder with three generations made by the real replica engine.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::FileExt,
    path::PathBuf,
    process::{Command, Output},
    time::SystemTime,
};

use support::{OTHER_PAIR, PAIR, config_text, pair};
use watari_core::{
    frame::{Frame, FrameHeader, FrameId},
    geometry::{BLOCK_BYTES, DiskIndex, Epoch, Extent, Generation, GenerationNumber, Sequence, Session},
    record::{DiskRecord, Role, RoleRecord},
    replica::{CommitList, Entry, Options, Policy},
    slots::SlotFile,
};
use watari_sidecar::{
    config::{Config, Overrides},
    engine::folder::{ROLE_MAGIC, ROLE_NAME, ROLE_VERSION, ReplicaFolder},
};
use watari_store::{
    folder::{DiskImages, Folder},
    lock::FolderLock,
    replica::{FileReplica, Zstd},
};

const DISK_BYTES: u64 = 1 << 20;

/// Generation `n` holds blocks `0..4` filled with `n`, and block `10 + n` filled with `100 + n`. The first two are in the
/// image (so the first is reached by undo), the third is in the journal.
struct Site {
    root: tempfile::TempDir,
}

impl Site {
    fn new() -> Site {
        let site = Site { root: tempfile::tempdir().unwrap() };
        fs::write(site.path("config.toml"), config_text(site.root.path())).unwrap();
        let config = Config::load(&site.path("config.toml"), &Overrides::default()).unwrap();
        fs::create_dir(&config.folder).unwrap();
        site.record(PAIR);
        DiskImages::create_file(&config.disks[0].path, DISK_BYTES).unwrap();
        let dir = ReplicaFolder::new(&config, &[DISK_BYTES]).dir().to_owned();
        fs::create_dir(&dir).unwrap();
        let images = DiskImages::open(&[&config.disks[0].path], false).unwrap();
        let options = Options { policy: Policy { keep_last: 8, ..Policy::default() }, ..Options::default() };
        let folder = Folder::open(&dir).unwrap();
        let mut store =
            FileReplica::create(folder, images, Box::new(Zstd), options, [7; 16], &[DISK_BYTES], false).unwrap();
        store.set_session(Session(1)).unwrap();
        for number in 1..=3 {
            let entries = vec![
                stage(&mut store, 2 * number, 0, 4, number as u8),
                stage(&mut store, 2 * number + 1, 10 + number, 1, 100 + number as u8),
            ];
            let parent = if number == 1 { Generation::default() } else { generation(number - 1) };
            store.commit(&CommitList::new(generation(number), parent, entries), 1_795_392_000 + number).unwrap();
            if number < 3 {
                store.apply_all().unwrap();
            }
        }
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn record(&self, pair_id: &str) {
        let record = RoleRecord {
            pair: pair(pair_id).0,
            site: [1; 16],
            identity: [2; 16],
            starts: 5,
            epoch: Epoch::default(),
            floor: 0,
            role: Role::Replica,
            base: Generation::default(),
            numbers_reserved: GenerationNumber(1),
            unfenced: false,
            untracked: false,
            disks: vec![DiskRecord { name: "root".to_owned(), size_bytes: DISK_BYTES }],
        };
        let _ = fs::remove_file(self.path("state").join(ROLE_NAME));
        let mut meta = Folder::open(&self.path("state")).unwrap();
        SlotFile::create(&mut meta, ROLE_NAME, ROLE_MAGIC, ROLE_VERSION, &record.encode()).unwrap();
    }

    fn inspect(&self, arguments: &[&str]) -> (i32, String) {
        let output: Output = Command::new(env!("CARGO_BIN_EXE_watari-sidecar"))
            .args(["inspect", "--config"])
            .arg(self.path("config.toml"))
            .args(arguments)
            .output()
            .unwrap();
        let words = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (output.status.code().unwrap(), words)
    }

    /// Changes one byte in the middle of a block filled with `fill`, in the folder's files whose names begin so.
    fn flip(&self, name: &str, fill: u8) {
        let mut flipped = 0;
        for (path, (bytes, _)) in self.state() {
            let ours = path.starts_with(self.path("state"))
                && path.file_name().is_some_and(|found| found.to_string_lossy().starts_with(name));
            let run = bytes.windows(2048).position(|window| window.iter().all(|byte| *byte == fill));
            if let (true, Some(at)) = (ours, run) {
                let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
                file.write_all_at(&[fill ^ 0x80], at as u64 + 1024).unwrap();
                flipped += 1;
            }
        }
        assert!(flipped > 0, "nothing to damage");
    }

    /// Every file with its content and time of change.
    fn state(&self) -> BTreeMap<PathBuf, (Vec<u8>, SystemTime)> {
        let mut state = BTreeMap::new();
        let mut folders = vec![self.root.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let changed = path.metadata().unwrap().modified().unwrap();
                    state.insert(path.clone(), (fs::read(&path).unwrap(), changed));
                }
            }
        }
        state
    }
}

fn generation(number: u64) -> Generation {
    Generation { number: GenerationNumber(number), epoch: 0 }
}

fn stage(store: &mut FileReplica, sequence: u64, start: u64, blocks: u32, fill: u8) -> Entry {
    let content = vec![fill; (u64::from(blocks) * BLOCK_BYTES) as usize];
    let id = FrameId { epoch: 0, session: Session(1), sequence: Sequence(sequence) };
    let extents = vec![Extent::new(start, blocks)];
    let header = FrameHeader::data(id, DiskIndex(0), extents, &content, None).unwrap();
    let (crc32, digest) = (header.crc32, header.digest);
    store.stage(&Frame::check(header, &content, &Zstd).unwrap()).unwrap();
    Entry { session: Session(1), sequence: Sequence(sequence), crc32, digest, excluded: vec![] }
}

/// What generation `number` holds.
fn content(number: u64) -> Vec<u8> {
    let mut content = vec![0; DISK_BYTES as usize];
    content[..4 * BLOCK_BYTES as usize].fill(number as u8);
    for made in 1..=number {
        let at = ((10 + made) * BLOCK_BYTES) as usize;
        content[at..at + BLOCK_BYTES as usize].fill(100 + made as u8);
    }
    content
}

#[test]
fn every_kept_generation_is_listed_and_exported_byte_for_byte() {
    let site = Site::new();
    let (code, words) = site.inspect(&["list"]);
    assert_eq!(code, 0, "{words}");
    for part in [
        "Role    Replica",
        "started 5 times",
        "Kept    0.3",
        "in journal",
        "Kept    0.2",
        "in image",
        "Kept    0.1",
        "in undo",
    ] {
        assert!(words.contains(part), "{part}: {words}");
    }
    for number in 1..=3 {
        let out = site.path(&format!("out-{number}"));
        let number_text = number.to_string();
        let mut arguments = vec!["export", "--disk", "root", "--out", out.to_str().unwrap()];
        if number < 3 {
            arguments.extend(["--generation", &number_text]);
        }
        let (code, words) = site.inspect(&arguments);
        assert_eq!(code, 0, "{words}");
        assert!(fs::read(&out).unwrap() == content(number), "generation {number}");
    }
    let (code, words) = site.inspect(&["dump"]);
    assert!(code == 0 && words.contains("RoleRecord") && words.contains("Manifest"), "{words}");
}

#[test]
fn nothing_in_the_folder_or_the_images_is_changed() {
    let site = Site::new();
    let before = site.state();
    for arguments in [vec!["list"], vec!["verify"], vec!["dump"]] {
        assert_eq!(site.inspect(&arguments).0, 0);
    }
    assert!(site.state() == before);
    let out = site.path("out");
    assert_eq!(site.inspect(&["export", "--disk", "root", "--out", out.to_str().unwrap()]).0, 0);
    fs::remove_file(out).unwrap();
    assert!(site.state() == before);
}

#[test]
fn damage_is_found_and_ends_with_an_exit_code() {
    let site = Site::new();
    let (code, words) = site.inspect(&["verify"]);
    assert!(code == 0 && words.contains("are right"), "{words}");
    // The block that the first generation had, kept by undo: everything else can be read.
    site.flip("undo", 1);
    let (code, words) = site.inspect(&["verify"]);
    assert!(code == 1 && words.contains("undo") && words.contains("1 findings"), "{words}");
    // Content of the newest generation, which only the journal has: the folder itself is damaged, and nothing is cut off.
    site.flip("", 103);
    let before = site.state();
    let (code, words) = site.inspect(&["verify"]);
    assert!(code == 1 && words.contains("is damaged"), "{words}");
    assert!(site.state() == before);
}

#[test]
fn what_does_not_exist_is_refused_with_what_does() {
    let site = Site::new();
    let out = site.path("out");
    let out = out.to_str().unwrap();
    let (code, words) = site.inspect(&["export", "--disk", "boot", "--out", out]);
    assert!(code == 1 && words.contains("found \"boot\", expected one of root"), "{words}");
    let (code, words) = site.inspect(&["export", "--disk", "root", "--generation", "9", "--out", out]);
    assert!(code == 1 && words.contains("found 9, expected one of 3, 2, 1"), "{words}");
    fs::write(out, "precious").unwrap();
    let (code, words) = site.inspect(&["export", "--disk", "root", "--out", out]);
    assert!(code == 1 && words.contains("File exists"), "{words}");
    assert_eq!(fs::read_to_string(out).unwrap(), "precious");
}

#[test]
fn a_running_sidecar_and_a_folder_of_another_pair_are_refused() {
    let site = Site::new();
    let lock = FolderLock::acquire(&site.path("state"), "replica", std::time::Duration::ZERO).unwrap();
    let (code, words) = site.inspect(&["list"]);
    assert!(code == 1 && words.contains(&format!("process {}", std::process::id())), "{words}");
    drop(lock);
    site.record(OTHER_PAIR);
    let (code, words) = site.inspect(&["list"]);
    assert!(code == 1 && words.contains(OTHER_PAIR) && words.contains(PAIR), "{words}");
}
