//! Clients that others wrote: libnbd's tools, QEMU's and fio's. What they say is compared with the backing file.
//!
//! A missing tool is a failure: without them nothing here would be proved.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::Rig;
use watari_nbd::local::LocalDiskConfig;
use watari_nbd::{ExportTable, Exports, FileDisk, Server, ServerConfig};

const MIB: usize = 1 << 20;

/// Run a tool to its end, at most two minutes; its output, which must be that of a success.
fn tool(name: &str, arguments: &[&str]) -> String {
    let (ok, output) = attempt(name, arguments);
    assert!(ok, "{name} {arguments:?} failed:\n{output}");
    output
}

/// The same, success or not.
fn attempt(name: &str, arguments: &[&str]) -> (bool, String) {
    // The distribution's tools and, for nbdsh, the distribution's Python come first.
    let path = format!("/usr/sbin:/usr/bin:/sbin:/bin:{}", std::env::var("PATH").unwrap());
    let found = std::env::split_paths(&path).any(|folder| folder.join(name).is_file());
    assert!(found, "{name} is not installed: run e2e/setup.sh");
    let out = Command::new("timeout").env("PATH", path).arg("120").arg(name).args(arguments).output().unwrap();
    let text = [out.stdout, out.stderr].concat();
    (out.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// A server for a file of `bytes`, and addresses of it in the languages of the tools.
struct Stage {
    rig: Rig,
    image: PathBuf,
    uri: String,
    qemu: String,
}

impl Stage {
    fn new(bytes: usize) -> Stage {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        std::fs::File::create(&image).unwrap().set_len(bytes as u64).unwrap();
        Self::over(folder, image)
    }

    fn over(folder: tempfile::TempDir, image: PathBuf) -> Stage {
        let disk = FileDisk::open(&image, LocalDiskConfig::new("disk")).unwrap();
        let path = folder.path().join("nbd.sock");
        let exports = Arc::new(ExportTable::of(Arc::new(disk)));
        let server = Server::bind(ServerConfig::new(&path), exports).unwrap();
        server.serve().unwrap();
        let uri = format!("nbd+unix:///disk?socket={}", path.display());
        let qemu = format!("nbd:unix:{}:exportname=disk", path.display());
        Stage { rig: Rig { server, path, folder }, image, uri, qemu }
    }

    fn file(&self, name: &str) -> String {
        self.rig.folder.path().join(name).to_str().unwrap().into()
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.image).unwrap()
    }
}

/// Bytes that are never zero and differ from block to block.
fn pattern(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes).map(|at| ((at / 512) as u8).wrapping_mul(31).wrapping_add(at as u8 ^ seed) | 1).collect()
}

fn same(left: &Path, right: &str) {
    assert!(std::fs::read(left).unwrap() == std::fs::read(right).unwrap(), "{left:?} and {right} differ");
}

#[test]
fn nbdinfo_sees_every_feature_that_is_announced() {
    let stage = Stage::new(3 * MIB + 512);
    let info = tool("nbdinfo", &[&stage.uri]);
    for line in [
        "protocol: newstyle-fixed without TLS, using structured packets",
        "export-size: 3146240",
        "base:allocation",
        "is_read_only: false",
        "can_cache: true",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_minimum: 1",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
    ] {
        assert!(info.contains(line), "{line} is missing in\n{info}");
    }
    let list = tool("nbdinfo", &["--list", &format!("nbd+unix://?socket={}", stage.rig.path.display())]);
    assert!(list.contains("export=\"disk\""), "{list}");
    let map = tool("nbdinfo", &["--map", &stage.uri]);
    assert!(map.contains("hole,zero"), "{map}");
    let (ok, text) = attempt("nbdinfo", &[&stage.uri.replace("/disk?", "/nope?")]);
    assert!(!ok && text.contains("server replied with error to opt_go request"), "{text}");
}

#[test]
fn nbdcopy_copies_both_ways_and_leaves_holes_as_holes() {
    let stage = Stage::new(32 * MIB);
    let source = stage.file("source.img");
    let mut data = vec![0; 32 * MIB];
    data[MIB..9 * MIB].copy_from_slice(&pattern(8 * MIB, 3));
    data[20 * MIB + 1000..20 * MIB + 5000].copy_from_slice(&pattern(4000, 4));
    std::fs::write(&source, &data).unwrap();
    tool("nbdcopy", &["--flush", &source, &stage.uri]);
    same(&stage.image, &source);
    let back = stage.file("back.img");
    tool("nbdcopy", &["--connections=4", "--requests=64", &stage.uri, &back]);
    same(&stage.image, &back);
    let allocated = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&back).unwrap()) * 512;
    assert!(allocated < 10 << 20, "{allocated} bytes are allocated in a copy with 8 MiB of data");
    // Between two of our servers.
    let other = Stage::new(32 * MIB);
    tool("nbdcopy", &[&stage.uri, &other.uri]);
    assert!(other.content() == data);
}

#[test]
fn nbdsh_finds_every_command_and_every_error_as_the_specification_has_it() {
    let stage = Stage::new(8 * MIB);
    let script = r#"
import errno
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(uri)
assert h.get_structured_replies_negotiated() and h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.pwrite(b"a" * 4096, 4096, nbd.CMD_FLAG_FUA)
h.pwrite(b"b" * 777, 12345)
assert h.pread(777, 12345) == b"b" * 777
assert h.pread(512, 0) == bytearray(512)
h.flush()
h.zero(2048, 4096, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(4096, 4096) == bytearray(2048) + b"a" * 2048
h.zero(1 << 20, 1 << 20, nbd.CMD_FLAG_FAST_ZERO)
h.trim(4096, 4096)
assert h.pread(4096, 4096) == bytearray(4096)
h.cache(1 << 20, 0)
seen = []
h.block_status(8 << 20, 0, lambda name, at, entries, error: seen.append((name, at, list(entries))))
assert seen[0][0] == "base:allocation" and sum(seen[0][2][0::2]) == 8 << 20, seen
one = []
h.block_status(8 << 20, 0, lambda name, at, entries, error: one.append(list(entries)), nbd.CMD_FLAG_REQ_ONE)
assert len(one[0]) == 2, one
chunks = []
h.pread_structured(1 << 20, 0, lambda data, at, status, error: chunks.append(status))
assert nbd.READ_HOLE in chunks and nbd.READ_DATA in chunks, chunks
chunks.clear()
h.pread_structured(1 << 20, 0, lambda data, at, status, error: chunks.append(status), nbd.CMD_FLAG_DF)
assert chunks == [nbd.READ_DATA], chunks
h.set_strict_mode(0)
def fails(number, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == number, (error.errnum, number)
    else:
        assert False, "no error"
fails(errno.EINVAL, lambda: h.pread(1, 8 << 20))
fails(errno.ENOSPC, lambda: h.pwrite(b"x" * 10, (8 << 20) - 5))
fails(errno.ENOSPC, lambda: h.zero(10, (8 << 20) - 5))
fails(errno.EINVAL, lambda: h.trim(10, (8 << 20) - 5))
fails(errno.EINVAL, lambda: h.pwrite(b"x", 0, nbd.CMD_FLAG_DF))
assert h.pread(1, (8 << 20) - 1) == b"\0"
h.shutdown()
print("all of it")
"#;
    let said = tool("nbdsh", &["-c", &format!("uri = {:?}", stage.uri), "-c", script]);
    assert!(said.contains("all of it"), "{said}");
    let simple = r#"
h.set_request_structured_replies(False)
h.connect_uri(uri)
assert not h.get_structured_replies_negotiated() and not h.can_df()
h.pwrite(bytes(range(256)) * (4 * 4096), 100)
assert h.pread(256 * 4 * 4096, 100) == bytes(range(256)) * (4 * 4096)
h.shutdown()
print("simple too")
"#;
    let said = tool("nbdsh", &["-c", &format!("uri = {:?}", stage.uri), "-c", simple]);
    assert!(said.contains("simple too"), "{said}");
}

#[test]
fn qemu_img_maps_converts_compares_and_benches() {
    let stage = Stage::new(32 * MIB);
    let source = stage.file("source.img");
    let mut data = vec![0; 32 * MIB];
    data[4 * MIB..6 * MIB].copy_from_slice(&pattern(2 * MIB, 9));
    std::fs::write(&source, &data).unwrap();
    tool("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "16", &source, &stage.qemu]);
    same(&stage.image, &source);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", &source, &stage.qemu]);
    let map = tool("qemu-img", &["map", "--output=json", "-f", "raw", &stage.qemu]);
    assert!(map.contains("\"start\": 4194304, \"length\": 2097152"), "{map}");
    let back = stage.file("back.qcow2");
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &stage.qemu, &back]);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &stage.qemu, &back]);
    for extra in [&["-d", "32", "-s", "4096"][..], &["-w", "-d", "16", "-s", "65536", "--flush-interval=16"]] {
        let arguments = [&["bench", "-f", "raw", "-c", "2000", "-t", "none"][..], extra, &[&stage.qemu]].concat();
        let said = tool("qemu-img", &arguments);
        assert!(said.contains("Run completed"), "{said}");
    }
}

#[test]
fn qemu_io_writes_patterns_that_it_reads_back_and_discards() {
    let stage = Stage::new(8 * MIB);
    let commands = [
        "write -P 0x5a 0 1M",
        "write -f -P 0x66 1M 4k",
        "write -z -u 64k 64k",
        "discard 256k 256k",
        "flush",
        "read -P 0x5a 0 64k",
        "read -P 0 64k 64k",
        "read -P 0 256k 256k",
        "read -P 0x66 1M 4k",
        "aio_write -P 0x77 2M 1M",
        "aio_write -P 0x78 3M 1M",
        "aio_flush",
        "read -P 0x77 2M 1M",
        "read -P 0x78 3M 1M",
    ];
    let mut arguments = vec!["-f", "raw", "-t", "none"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(&stage.qemu);
    let said = tool("qemu-io", &arguments);
    assert!(!said.contains("failed") && !said.contains("error"), "{said}");
    let content = stage.content();
    assert!(content[2 * MIB..3 * MIB].iter().all(|byte| *byte == 0x77));
    assert!(content[64 << 10..128 << 10].iter().all(|byte| *byte == 0));
}

#[test]
fn fio_verifies_random_writes_at_depth_32_on_four_connections() {
    let stage = Stage::new(64 * MIB);
    let said = tool(
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            &format!("--uri={}", stage.uri),
            "--rw=randwrite",
            "--bsrange=512-128k",
            "--iodepth=32",
            "--numjobs=4",
            "--size=16M",
            "--offset_increment=16M",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--verify_backlog=64",
            "--verify_state_save=0",
            "--fsync=50",
            "--group_reporting",
        ],
    );
    assert!(said.contains("err= 0"), "{said}");
    let connections = stage.rig.server.report();
    assert!(connections.accepted >= 4);
}

#[test]
fn qemu_boots_from_the_server_and_writes_through_it() {
    // A boot sector that writes itself to the second sector through the BIOS and leaves QEMU with the BIOS's status.
    const CODE: [u8; 24] = [
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xc0, // mov es, ax
        0xbb, 0x00, 0x7c, // mov bx, 0x7c00
        0xb8, 0x01, 0x03, // mov ax, 0x0301: write one sector
        0xb9, 0x02, 0x00, // mov cx, 2: the second one
        0xb6, 0x00, // mov dh, 0
        0xcd, 0x13, // int 0x13
        0x88, 0xe0, // mov al, ah
        0xe6, 0xf4, // out 0xf4, al: isa-debug-exit
        0xf4, 0xeb, 0xfd, // hlt, and again
    ];
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    let mut disk = vec![0u8; MIB];
    disk[..CODE.len()].copy_from_slice(&CODE);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(&image, &disk).unwrap();
    let stage = Stage::over(folder, image);
    let node = format!(
        "driver=nbd,server.type=unix,server.path={},export=disk,node-name=disk,reconnect-delay=10",
        stage.rig.path.display()
    );
    let arguments = [
        "-accel",
        "tcg",
        "-m",
        "64",
        "-display",
        "none",
        "-no-reboot",
        "-monitor",
        "none",
        "-serial",
        "none",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=1",
        "-blockdev",
        &node,
        "-device",
        "virtio-blk-pci,drive=disk",
    ];
    let (_, said) = attempt("qemu-system-x86_64", &arguments);
    let content = stage.content();
    assert!(content[512..1024] == disk[..512], "the sector was not written: {said}");
}

#[test]
fn several_exports_on_one_socket_are_listed_and_kept_apart() {
    let folder = tempfile::tempdir().unwrap();
    let table = Arc::new(ExportTable::new());
    for (name, read_only) in [("root", false), ("data@12", true)] {
        let image = folder.path().join(name);
        std::fs::write(&image, pattern(MIB, name.len() as u8)).unwrap();
        let config = LocalDiskConfig { read_only, ..LocalDiskConfig::new(name) };
        table.insert(Arc::new(FileDisk::open(&image, config).unwrap()));
    }
    let path = folder.path().join("nbd.sock");
    let server = Server::bind(ServerConfig::new(&path), table.clone()).unwrap();
    server.serve().unwrap();
    let list = tool("qemu-nbd", &["--list", "-k", path.to_str().unwrap()]);
    assert!(list.contains("exports available: 2") && list.contains("data@12"), "{list}");
    for name in ["root", "data@12"] {
        let copy = folder.path().join(format!("{name}.copy"));
        let uri = format!("nbd+unix:///{name}?socket={}", path.display());
        tool("nbdcopy", &[&uri, copy.to_str().unwrap()]);
        same(&folder.path().join(name), copy.to_str().unwrap());
    }
    let (ok, said) = attempt("nbdinfo", &[&format!("nbd+unix:///?socket={}", path.display())]);
    assert!(!ok, "with two exports there is no default one: {said}");
    let read_only = format!("nbd:unix:{}:exportname=data@12", path.display());
    let (_, said) = attempt("qemu-io", &["-f", "raw", "-c", "write 0 512", &read_only]);
    assert!(said.contains("read-only") || said.contains("Permission denied"), "{said}");
    table.remove("data@12");
    assert_eq!(table.names(), ["root"]);
    assert!(tool("qemu-nbd", &["--list", "-k", path.to_str().unwrap()]).contains("exports available: 1"));
}
