//! `sidecar/README.md`, run as it stands: every block marked `<!-- run: … -->`, in order, at its host.
//!
//! The two hosts are the sites of the test bed; each has one shell in process and mount namespaces of its own, so that what a
//! block leaves in the background lives on until the end and not longer. Only the block of settings is replaced: this
//! machine's folders and addresses, small disks, a VM that checks itself. Between the blocks the test asks that VM how
//! it fared; the documentation cannot.

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use watari_e2e::{
    build,
    guest::{BootFiles, Control},
    process::{Process, wait_until},
    site::{Site, TestBed},
    wan::Shape,
};
use watari_wire::report::Report;

/// For one block: the longest boots nothing and moves little.
const BLOCK: Duration = Duration::from_secs(60);
/// For the guest to boot under emulation on a busy machine.
const BOOT: Duration = Duration::from_secs(60);
const ANSWER: Duration = Duration::from_secs(30);
const DISK_MIB: u32 = 64;
/// A near peer: this is about the words of a document, distance is other tests' subject.
const ROUND_TRIP: Duration = Duration::from_millis(4);

/// What stands above a fenced block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    Settings,
    Helpers,
    Tokyo,
    Osaka,
}

#[derive(Clone, Debug)]
struct Block {
    mark: Mark,
    section: String,
    line: usize,
    script: String,
}

/// The marked blocks. A `sh` block without a mark, or a mark without its block, is a mistake in the document.
fn blocks(text: &str) -> anyhow::Result<Vec<Block>> {
    let (mut found, mut mark, mut section) = (Vec::new(), None, String::new());
    let mut lines = text.lines().zip(1..);
    while let Some((line, number)) = lines.next() {
        if let Some(title) = line.strip_prefix('#') {
            section = title.trim_start_matches('#').trim().to_owned();
        } else if line.starts_with("<!--") {
            mark = Some(match line {
                "<!-- settings -->" => Mark::Settings,
                "<!-- helpers -->" => Mark::Helpers,
                "<!-- run: tokyo -->" => Mark::Tokyo,
                "<!-- run: osaka -->" => Mark::Osaka,
                other => bail!("line {number}: unknown mark {other}"),
            });
        } else if line.starts_with("```") {
            ensure!(line == "```sh", "line {number}: only `sh` blocks stand in this document, found {line}");
            let mark = mark.take().with_context(|| format!("line {number}: this block has no mark above it"))?;
            let body: Vec<&str> = lines.by_ref().map(|(line, _)| line).take_while(|line| *line != "```").collect();
            found.push(Block { mark, section: section.clone(), line: number, script: body.join("\n") });
        } else {
            ensure!(mark.is_none() || line.is_empty(), "line {number}: a mark without its block");
        }
    }
    Ok(found)
}

/// Names that a block of settings assigns.
fn assigned(script: &str) -> BTreeSet<&str> {
    let words = script.lines().flat_map(|line| line.split(" #").next().unwrap_or(line).split_whitespace());
    words
        .filter_map(|word| word.split_once('='))
        .map(|(name, _)| name)
        .filter(|name| !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
        .collect()
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// One host's shell.
struct Host {
    name: &'static str,
    folder: PathBuf,
    prelude: String,
    process: Process,
    pipe: PathBuf,
    turn: u32,
}

/// Reads script names from a pipe, runs each, and leaves its exit code beside it.
const SHELL: &str = r#"exec 3<>"$0"
while read -r script <&3; do
    bash "$script" >"$script.out" 2>&1 </dev/null 3>&-
    echo $? >"$script.new"
    mv "$script.new" "$script.status"
done"#;

/// Stands in for two programs: there is no second host to copy to, and socat is not among what the tests install.
const STAND_INS: &str = r#"scp() { cp "$1" "$2" "${3/#*:$W/$PEER_FOLDER}"; }
command -v socat >/dev/null || socat() { python3 -c 'import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[2].split(":", 1)[1])
s.sendall(sys.stdin.buffer.read())
s.settimeout(0.5)
try:
    while True:
        data = s.recv(65536)
        if not data: break
        sys.stdout.buffer.write(data)
except TimeoutError:
    pass' "$@"; }
"#;

impl Host {
    fn new(name: &'static str, site: &Site, peer: &Site, settings: &str, helpers: &str) -> anyhow::Result<Host> {
        let folder = site.dir.join("vm1");
        fs::create_dir_all(&folder)?;
        let pipe = site.dir.join("blocks.pipe");
        ensure!(Command::new("mkfifo").arg(&pipe).status()?.success(), "mkfifo {}", pipe.display());
        let binary = build::binary("watari-sidecar")?;
        let programs = binary.parent().context("a binary lies in a folder")?;
        let prelude = format!(
            "set -eu\nPATH={}:$PATH\nW={}\nPEER_FOLDER={}\n{settings}\n{STAND_INS}\n{helpers}\n",
            quoted(&programs.display().to_string()),
            quoted(&folder.display().to_string()),
            quoted(&peer.dir.join("vm1").display().to_string()),
        );
        let command = site.command("shell", "bash").args(["-c", SHELL]).arg(&pipe).contained();
        Ok(Host { name, folder, prelude, process: command.spawn()?, pipe, turn: 0 })
    }

    fn run(&mut self, block: &Block) -> anyhow::Result<()> {
        self.turn += 1;
        let script = self.folder.with_file_name(format!("block-{:02}", self.turn));
        fs::write(&script, format!("{}{}\n", self.prelude, block.script))?;
        let began = Instant::now();
        // The shell holds the pipe open for both ends, so this neither waits nor fails.
        writeln!(fs::OpenOptions::new().write(true).open(&self.pipe)?, "{}", script.display())?;
        let status = script.with_extension("status");
        let ended = wait_until("the block", BLOCK, || fs::read_to_string(&status).ok());
        self.process.check()?;
        let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        let said = read(&script.with_extension("out"));
        if ended.as_ref().map(|code| code.trim()).ok() != Some("0") {
            let log = read(&self.folder.join("sidecar.log"));
            let tail: Vec<&str> = log.lines().rev().take(15).collect();
            let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
            let state = self.report().map(|r| format!("{r:#?}")).unwrap_or_default();
            bail!(
                "sidecar/README.md, line {}, at {}: {ended:?}\n{}\n--- it said:\n{said}\n--- sidecar.log:\n{tail}\n--- report:\n{state}",
                block.line,
                self.name,
                block.script,
            );
        }
        println!("{:5.1} s  line {:3} at {}: {}", began.elapsed().as_secs_f64(), block.line, self.name, block.section);
        // QEMU's monitor echoes each letter that it is sent; that is no answer.
        said.lines().filter(|line| !line.contains(['\x1b', '\r'])).for_each(|line| println!("         | {line}"));
        Ok(())
    }

    fn report(&self) -> anyhow::Result<Report> {
        let output = Command::new(build::binary("watari-sidecar")?)
            .args(["status", "--once", "--json", "--config"])
            .arg(self.folder.join("sidecar.toml"))
            .output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn control(&self) -> PathBuf {
        self.folder.join("control")
    }
}

/// The pair's dirty maps, outside of the test's own folder.
struct Maps(String);

impl Drop for Maps {
    fn drop(&mut self) {
        for site in ["tokyo", "osaka"] {
            let _ = fs::remove_dir_all(format!("/dev/shm/watari/{}-{site}", self.0));
        }
        // Not empty while another pair of this machine is running.
        let _ = fs::remove_dir("/dev/shm/watari");
    }
}

/// The settings of this run: the same names as in the document.
fn settings(bed: &TestBed, pair: &str) -> anyhow::Result<String> {
    let boot = BootFiles::prepare()?;
    let append = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on nokaslr no_timer_check \
                  lsm=capability audit=0 cryptomgr.notests watari.start=1 watari.rate=1000000 watari.blocks=4096";
    let arguments = [
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-machine",
        "q35,accel=tcg,usb=off,vmport=off",
        "-cpu",
        "qemu64,+rdrand",
        "-m",
        "192M",
        "-kernel",
        &boot.kernel.display().to_string(),
        "-initrd",
        &boot.initramfs.display().to_string(),
        "-append",
        append,
    ]
    .map(quoted)
    .join(" ");
    // The same line at both hosts; where the sockets lie is the host's own folder.
    let line = r#"-chardev "socket,id=control,path=$W/control,server=on,wait=off" -device virtio-serial-pci \
    -device virtserialport,chardev=control,name=io.watari.control -serial "file:$W/serial""#;
    Ok(format!(
        "TOKYO={} OSAKA={} PAIR={pair}\nROOT_SIZE={DISK_MIB}MiB DATA_SIZE={DISK_MIB}MiB\nVM=({arguments} \\\n    {line})",
        bed.a.address, bed.b.address
    ))
}

#[test]
fn the_steps_of_the_readme_pair_two_hosts_move_a_vm_fail_over_and_come_back() -> anyhow::Result<()> {
    let document = fs::read_to_string(build::workspace().join("sidecar/README.md"))?;
    let blocks = blocks(&document)?;
    let one = |mark| blocks.iter().find(|b| b.mark == mark).with_context(|| format!("no block marked {mark:?}"));
    let bed = TestBed::new("by-hand", Shape::wan(400_000_000, ROUND_TRIP))?;
    let pair = fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned();
    let _maps = Maps(pair.clone());
    let settings = settings(&bed, &pair)?;
    let mut expected = assigned(&settings);
    expected.insert("W");
    assert_eq!(assigned(&one(Mark::Settings)?.script), expected, "settings in the document and in this test differ");
    let helpers = &one(Mark::Helpers)?.script;
    let mut tokyo = Host::new("tokyo", &bed.a, &bed.b, &settings, helpers)?;
    let mut osaka = Host::new("osaka", &bed.b, &bed.a, &settings, helpers)?;
    for disk in ["root", "data"] {
        fs::File::create(tokyo.folder.join(format!("{disk}.img")))?.set_len(u64::from(DISK_MIB) << 20)?;
    }

    let began = Instant::now();
    let mut guest = Control::new(tokyo.control());
    let mut acknowledged = 0;
    let steps: Vec<&Block> = blocks.iter().filter(|b| matches!(b.mark, Mark::Tokyo | Mark::Osaka)).collect();
    for (index, block) in steps.iter().enumerate() {
        if block.mark == Mark::Tokyo && block.script.contains("inspect") {
            // "Applied equals committed", says the text before it.
            wait_until("the replica to be applied", ANSWER, || {
                let replica = tokyo.report().ok()?.replica?;
                (replica.applied == replica.committed).then_some(())
            })?;
        }
        match block.mark {
            Mark::Tokyo => tokyo.run(block)?,
            _ => osaka.run(block)?,
        }
        if steps.get(index + 1).is_some_and(|next| next.section == block.section) {
            continue;
        }
        match block.section.as_str() {
            "4. Start: the replica, the primary, the VM" => {
                guest.hello(BOOT)?;
            }
            "Moving the running VM" => {
                guest.move_to(osaka.control());
                let verdict = guest.verify(ANSWER)?;
                ensure!(verdict.clean() && verdict.groups[0].right > 0, "after the move: {verdict:?}");
                acknowledged = verdict.groups[0].acknowledged.iter().sum();
                guest.resume()?;
            }
            "Moving a stopped VM" => {
                guest.move_to(tokyo.control());
                let found = guest.hello(BOOT)?.groups[0].found.clone();
                ensure!(!found.is_empty() && found.iter().all(|t| t.clean()), "after the stopped move: {found:?}");
                ensure!(found[0].right > 0 && acknowledged > 0, "nothing of the first boot is there: {found:?}");
            }
            "Failover: tokyo is gone" => {
                guest.move_to(osaka.control());
                let found = guest.hello(BOOT)?.groups[0].found.clone();
                ensure!(found.len() > 1 && found.iter().all(|t| t.clean()), "after the failover: {found:?}");
            }
            "The old source returns" => {
                let verdict = guest.verify(ANSWER)?;
                ensure!(verdict.clean() && verdict.groups[0].right > 0, "at the end: {verdict:?}");
            }
            _ => {}
        }
    }
    // Not by our own digests: both sites hold the same bytes, and so does the exported generation.
    for (left, right) in [
        (osaka.folder.join("root.img"), tokyo.folder.join("root.img")),
        (osaka.folder.join("data.img"), tokyo.folder.join("data.img")),
        (osaka.folder.join("root.img"), tokyo.folder.join("root.exported")),
    ] {
        let same = Command::new("cmp").arg(&left).arg(&right).output()?;
        ensure!(same.status.success(), "{}", String::from_utf8_lossy(&same.stdout).trim());
    }
    println!("{:.0} s in all", began.elapsed().as_secs_f64());
    Ok(())
}

#[test]
fn a_block_without_a_mark_and_a_mark_without_a_block_are_found() {
    assert!(blocks("```sh\nls\n```").is_err());
    assert!(blocks("<!-- run: tokyo -->\ntext").is_err());
    assert!(blocks("<!-- run: kyoto -->\n```sh\nls\n```").is_err());
    let found = blocks("# A\n<!-- run: osaka -->\n\n```sh\nls\npwd\n```\n").expect("well formed");
    assert_eq!((found[0].mark, found[0].section.as_str(), found[0].script.as_str()), (Mark::Osaka, "A", "ls\npwd"));
}
