//! The proof can fail: deliberate mutations of the core (and of the rules that the shell must keep), each by exact
//! replacement in a copy, each to be caught by the simulator. Nothing of this is compiled into anything that ships.
//!
//! [`run`] copies the two crates into a folder of its own, builds there with a target folder of its own, and runs
//! histories until one fails; if none does, the core's own tests and the exhaustive model.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

/// One deliberate error.
pub struct Mutation {
    pub name: &'static str,
    /// Below `sidecar/`.
    pub file: &'static str,
    pub from: &'static str,
    pub to: &'static str,
}

const fn m(name: &'static str, file: &'static str, from: &'static str, to: &'static str) -> Mutation {
    Mutation { name, file, from, to }
}

const TRACKER: &str = "core/src/tracker.rs";
const PRIMARY: &str = "core/src/primary.rs";
const HANDOVER: &str = "core/src/handover.rs";
const BOOKS_MEETING: &str = "core/src/primary/meeting.rs";
const SITES_MEETING: &str = "core/src/handover/meeting.rs";
const STAGING: &str = "core/src/replica/staging.rs";

/// All of them.
pub const MUTATIONS: &[Mutation] = &[
    m(
        "a write is not marked",
        TRACKER,
        "        self.set(disk, self.current_name(), first, last);\n        self.leave();",
        "        self.leave();",
    ),
    m(
        "a mark is cleared under a write in flight",
        TRACKER,
        "            if self.any_slot(disk, e.start, last, |_| true) {",
        "            if false {",
    ),
    m(
        "a write in flight at the cut is in one map only",
        TRACKER,
        "            if slot.state.load(SeqCst) != 0 {\n                let disk = DiskIndex",
        "            if slot.state.load(SeqCst) == 77 {\n                let disk = DiskIndex",
    ),
    m(
        "the sender does not wait for older writes",
        TRACKER,
        "|state| state <= cut)",
        "|state| state <= cut && state > cut)",
    ),
    m(
        "a writer claims for a later cut",
        TRACKER,
        "self.cuts.load(SeqCst) == ticket.cut && self.claim_frozen",
        "self.claim_frozen",
    ),
    m(
        "the seal does not close admission",
        TRACKER,
        "        self.sealed.store(true, SeqCst);",
        "        self.sealed.store(false, SeqCst);",
    ),
    m(
        "giving up forgets unsent blocks",
        TRACKER,
        "        self.open.store(false, SeqCst);\n        for disk in self.disk_indices() {\n            self.pour(disk, self.frozen_name(), self.current_name());\n        }",
        "        self.open.store(false, SeqCst);\n        for disk in self.disk_indices() {\n            let blocks = self.maps.blocks(disk);\n            self.clear(disk, self.frozen_name(), Block(0), Block(blocks - 1));\n        }",
    ),
    m(
        "staged marks are lost in a restart",
        TRACKER,
        "            self.pour(disk, MapName::Staged, self.current_name());\n",
        "",
    ),
    m(
        "frozen marks are lost in a restart",
        TRACKER,
        "            self.pour(disk, self.frozen_name(), self.current_name());\n            self.pour(disk, MapName::Staged",
        "            self.pour(disk, MapName::Staged",
    ),
    m(
        "an overwrite during an early read is not noticed",
        TRACKER,
        "        word.load(SeqCst) >> (block.0 % 64) & 1 == 1",
        "        word.load(SeqCst) >> (block.0 % 64) & 1 == 2",
    ),
    m(
        "the cut is made while a read is outstanding",
        PRIMARY,
        "if !self.reads.is_empty() || self.wants_numbers()",
        "if self.wants_numbers()",
    ),
    m(
        "a superseded block is listed",
        PRIMARY,
        "                        exclude(&mut excluded, index);",
        "                        let _ = (&mut excluded, index, exclude);",
    ),
    m("a frame that counts is named as superseded", BOOKS_MEETING, "if !counts && book.durable", "if book.durable"),
    m("lost frames are not marked again", BOOKS_MEETING, "                tracker.mark(book.disk, *e);\n", ""),
    m(
        "a number is used twice",
        PRIMARY,
        "        self.next_number = generation.number.0 + 1;\n        self.demanded",
        "        self.next_number = generation.number.0;\n        self.demanded",
    ),
    m(
        "frames keep the epoch of a voided handover",
        BOOKS_MEETING,
        "        if epoch == self.epoch {",
        "        if epoch != 0 {",
    ),
    m(
        "lists do not follow the peer's newest commit",
        BOOKS_MEETING,
        "            Phase::Idle => {}\n            Phase::Open { .. } | Phase::Committing { .. } => self.abandon(tracker),",
        "            Phase::Idle => return,\n            Phase::Open { .. } | Phase::Committing { .. } => return,",
    ),
    m(
        "the remainder leaves out what is staged",
        PRIMARY,
        "Phase::Idle if dirty_blocks == 0 && self.books.is_empty()",
        "Phase::Idle if dirty_blocks == 0",
    ),
    m("a full target is full for ever", BOOKS_MEETING, "        self.blocked = false;\n", ""),
    m("a refused Same frame is repeated", PRIMARY, "!b.durable && !b.same", "!b.durable"),
    m(
        "any nonce is granted",
        HANDOVER,
        "&& self.asked == Some(nonce) && session == self.session",
        "&& self.asked.is_some() && (nonce, session).1 > 0",
    ),
    m(
        "the void leaves the floor alone",
        HANDOVER,
        "                self.record.floor = self.record.floor.max(void + 1);\n",
        "",
    ),
    m(
        "a promotion takes the epoch of an activation",
        HANDOVER,
        "self.record.floor.max(self.record.epoch.counter) + 2;",
        "self.record.floor.max(self.record.epoch.counter) + 1;",
    ),
    m(
        "a voided source keeps its epoch",
        HANDOVER,
        "counter: floor.max(self.record.epoch.counter + 2), activation };",
        "counter: self.record.epoch.counter + floor * 0, activation };",
    ),
    m(
        "a serving side ignores a higher epoch",
        SITES_MEETING,
        "if theirs.counter > mine.counter || peer.floor > mine.counter + 1 && !voided(&peer) {",
        "if theirs.counter > 1_000_000 {",
    ),
    m(
        "a sealed side that restarts does not send what remains",
        HANDOVER,
        "vec![Action::Gate(Gate::Hold), Action::SealAndSend],",
        "vec![Action::Gate(Gate::Hold)],",
    ),
    m(
        "divergent disks are called the base",
        HANDOVER,
        "let generation = Generation { epoch: self.record.epoch.counter, number: self.record.numbers_reserved };",
        "let generation = self.record.base;",
    ),
    m("consent keeps the shared history", HANDOVER, "        self.record.identity = [0; 16];\n", ""),
    m(
        "an offer outlives its handover",
        HANDOVER,
        "(self.offered, self.asked, self.granted, self.attached) = (None, None, None, false);",
        "(self.asked, self.granted, self.attached) = (None, None, false);",
    ),
    m(
        "the gate of a sealed side stays open",
        HANDOVER,
        "            Action::Gate(Gate::Hold),\n            Action::SealAndSend,",
        "            Action::Gate(Gate::Serve),\n            Action::SealAndSend,",
    ),
    m(
        "the target serves what it did not apply",
        HANDOVER,
        "                self.granted = Some((epoch, generation));\n                vec![Action::ApplyUpTo(generation)]",
        "                self.granted = Some((epoch, generation));\n                self.applied(generation, activation)",
    ),
    m(
        "a source that activated somebody does not release",
        HANDOVER,
        "            Message::Activated { handover, epoch, generation } => self.activated_by(handover, epoch, generation),",
        "            Message::Activated { .. } => Vec::new(),",
    ),
    m(
        "a commit does not sync its journal",
        "core/src/replica/commit.rs",
        "        self.sync_all_staged()?;\n        let delta = core::mem::take",
        "        let delta = core::mem::take",
    ),
    m(
        "a commit does not sync its list",
        "core/src/replica/list.rs",
        "        meta.write(&self.name, 0, &header)?;\n        meta.sync(&self.name)?;",
        "        meta.write(&self.name, 0, &header)?;",
    ),
    m(
        "a slot is not synced",
        "core/src/slots.rs",
        "        if let Err(error) = storage.sync(&self.name) {",
        "        if let Err(error) = storage.len(&self.name).map(|_| ()) {",
    ),
    m(
        "the image is not synced before the manifest says applied",
        "core/src/replica/apply.rs",
        "        for disk in &write.touched {\n            self.sync_image(*disk)?;\n        }\n",
        "",
    ),
    m(
        "undo is captured again on replay",
        "core/src/replica/apply.rs",
        "Some(applied) if !begun && self.wants_undo()",
        "Some(applied) if self.wants_undo()",
    ),
    m(
        "undo leaves blocks out",
        "core/src/replica/apply.rs",
        "            capture.writer.add(&mut self.meta, piece.disk, start, &content)?;\n",
        "            if start % 2 == 0 { capture.writer.add(&mut self.meta, piece.disk, start, &content)?; }\n",
    ),
    m(
        "a zero range is lost",
        "core/src/replica/apply.rs",
        "                self.zero_image(DiskIndex(disk), start, u64::from(blocks))?;\n                cost",
        "                cost",
    ),
    m(
        "a commit that follows nothing is taken",
        "core/src/replica/commit.rs",
        "let fresh = parent == newest.unwrap_or_default() && generation.number > parent.number;",
        "let fresh = generation.number > parent.number;",
    ),
    m(
        "a sync counts for another generation than its own",
        PRIMARY,
        "matches!(self.phase, Phase::Forgetting { generation, .. } if generation == of)",
        "matches!(self.phase, Phase::Forgetting { .. }) && of.number.0 > 0",
    ),
    m(
        "marks are forgotten by a sync of another generation",
        PRIMARY,
        "        if generation != of {\n            return false;\n        }\n        for book",
        "        if generation.number < of.number {\n            return false;\n        }\n        for book",
    ),
    m(
        "numbers are used before they are reserved",
        PRIMARY,
        "if !self.reads.is_empty() || self.wants_numbers() {",
        "if !self.reads.is_empty() {",
    ),
    m(
        "two sides without a common version talk",
        "core/src/versions.rs",
        "(both_are_ranges && lowest <= highest).then_some(highest)",
        "(both_are_ranges || lowest <= highest).then_some(highest)",
    ),
    m(
        "a take-over is granted without a seal",
        HANDOVER,
        "                Role::Serving if !self.record.untracked => self.seal_for(handover, nonce, session),",
        "                Role::Serving if !self.record.untracked => {\n                    let generation = self.record.base;\n                    vec![Action::Send(Message::Grant { handover, nonce, session, epoch, generation })]\n                }",
    ),
    m(
        "a take-over of another epoch counts",
        HANDOVER,
        "                _ if epoch != self.record.epoch => Vec::new(),\n",
        "                _ if epoch.counter == u64::MAX => Vec::new(),\n",
    ),
    m(
        "a take-over is granted by a side that lost track",
        HANDOVER,
        "                Role::Serving if !self.record.untracked => self.seal_for(handover, nonce, session),",
        "                Role::Serving => self.seal_for(handover, nonce, session),",
    ),
    m(
        "a diverged home returns without a person's consent",
        HANDOVER,
        "            Action::Gate(Gate::Dead),\n            Action::SyncDisks,\n            Action::Report(Condition::Fenced),\n        ]",
        "            Action::Gate(Gate::Dead),\n        ]\n        .into_iter()\n        .chain(self.accept_divergence())\n        .collect()",
    ),
    m(
        "the new active side serves before its epoch is written",
        HANDOVER,
        "            self.become_role(Role::Serving, epoch),\n            Action::BecomeSource { base: Some(generation) },\n            Action::Gate(Gate::Serve),\n            Action::Send(Message::Activated { handover, epoch, generation }),\n        ]",
        "            Action::BecomeSource { base: Some(generation) },\n            Action::Gate(Gate::Serve),\n            self.become_role(Role::Serving, epoch),\n            Action::Send(Message::Activated { handover, epoch, generation }),\n        ]",
    ),
    m(
        "a void is said before its floor is written",
        HANDOVER,
        "                    self.become_role(Role::Voided { handover }, epoch),\n                    Action::Gate(Gate::Dead),\n                    Action::Send(Message::Void { handover, epoch: void }),",
        "                    Action::Send(Message::Void { handover, epoch: void }),\n                    self.become_role(Role::Voided { handover }, epoch),\n                    Action::Gate(Gate::Dead),",
    ),
    m(
        "Released before the disks are synced",
        HANDOVER,
        "                    // Released promises that the replica-to-be holds everything: the disks first.\n                    Action::SyncDisks,\n",
        "",
    ),
    m(
        "a promotion serves the QEMU that was attached",
        HANDOVER,
        "                    // An attached QEMU's memory belongs to newer data: it is never served.\n                    Action::Gate(Gate::Dead),\n",
        "",
    ),
    m(
        "a fenced side goes on serving its guest",
        HANDOVER,
        "            Action::Gate(Gate::Dead),\n            Action::SyncDisks,\n            Action::Report(Condition::Fenced),",
        "            Action::SyncDisks,\n            Action::Report(Condition::Fenced),",
    ),
    m("a frame of a lower epoch is staged", STAGING, "if header.epoch < floor {", "if header.epoch + 1000 < floor {"),
    m(
        "a frame of another session is staged",
        STAGING,
        "if self.session != Some(header.session) {",
        "if self.session.is_none() {",
    ),
    m(
        "a commit of a lower epoch is taken",
        "core/src/replica/commit.rs",
        "if generation.epoch < floor {",
        "if generation.epoch + 1000 < floor {",
    ),
    m(
        "shell: a foreign writer is not noticed at the start",
        "sim/src/node.rs",
        "        } else if tampered {",
        "        } else if tampered && false {",
    ),
    m(
        "shell: a pass-through while Sealed",
        "sim/src/node.rs",
        "let pass_through = often && record.role.accepts_writes() && ctx.rng.one_in(6);",
        "let pass_through = often && ctx.rng.one_in(6);",
    ),
    m(
        "shell: regions are not logged before the write",
        "sim/src/guest.rs",
        "        let logged = || untracked || regions_of(disk, first, last).all(|r| self.logged.contains(&r));",
        "        let logged = || true;",
    ),
    m(
        "shell: marks are forgotten without an fdatasync",
        "sim/src/source.rs",
        "                self.dead |= !self.sync_disks(ctx);\n            }\n            Step::Wait",
        "            }\n            Step::Wait",
    ),
    m(
        "shell: nothing is preserved",
        "sim/src/guest.rs",
        "                if ticket.generation_open {",
        "                if false {",
    ),
    m(
        "shell: preserved content outlives its cut",
        "sim/src/source.rs",
        "            // Also when the primary gave it up by itself: old content must not meet the next cut.\n            self.preserve.clear();\n",
        "",
    ),
    m(
        "shell: the same folder is believed whatever it was meanwhile",
        "sim/src/source.rs",
        "if known && (hello.committed == base || awaited || source.listed.contains(&hello.committed)) {",
        "if known && hello.committed.number >= base.number {",
    ),
    m(
        "shell: a fence does not stop admission",
        "sim/src/process.rs",
        "                        self.tracker.seal();\n                        self.condemned",
        "                        self.condemned",
    ),
    m(
        "shell: the target's floor is not raised with its epoch",
        "sim/src/process.rs",
        "            source.raise_epoch(&self.tracker, counter);\n",
        "",
    ),
    m(
        "shell: a failed read forgets what it claimed",
        "sim/src/readers.rs",
        "            again.iter().for_each(|e| self.tracker.mark(job.read.disk, *e));\n",
        "",
    ),
];

/// Those that no history can show, because another rule covers the same loss: why, and who kills them instead. One that the
/// core's tests or the model are seen to catch needs no entry.
pub const REDUNDANT: &[(&str, &str)] = &[
    (
        "the remainder leaves out what is staged",
        "a seal demands a cut as long as the books are not empty; primary_tests",
    ),
    ("any nonce is granted", "every grant of one sealed epoch holds the same content; handover_tests"),
    ("the gate of a sealed side stays open", "the tracker's seal admits nothing; handover_tests"),
    ("a source that activated somebody does not release", "it learns of it at the next contact; handover_tests"),
    (
        "a commit does not sync its journal",
        "the shell syncs staged frames before each list; the replica's own power tests",
    ),
    ("a commit that follows nothing is taken", "the source's lists follow; the replica's own tests"),
    ("shell: a pass-through while Sealed", "the gate of a sealed side holds every write, and Untracked grants nothing"),
];

/// What became of one.
pub struct Verdict {
    pub name: &'static str,
    /// The words of what caught it: a violation, or the test that fails; `None`: it survived.
    pub caught: Option<String>,
    pub histories: u64,
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            copy(&source, &target)?;
        } else if fs::read(&source).ok() != fs::read(&target).ok() {
            fs::write(&target, fs::read(&source)?)?;
        }
    }
    Ok(())
}

/// A workspace of the two crates alone.
fn prepare(root: &Path, work: &Path) -> io::Result<()> {
    copy(&root.join("sidecar/core"), &work.join("sidecar/core"))?;
    copy(&root.join("sidecar/sim"), &work.join("sidecar/sim"))?;
    let manifest = fs::read_to_string(root.join("Cargo.toml"))?;
    let ours = |line: &&str| {
        let other = ["wire", "nbd", "hook", "store", "crds", "operator"];
        !other.iter().any(|name| line.starts_with(&format!("watari-{name} ")))
    };
    let lines = manifest.lines().filter(ours).map(|line| {
        let members = line.starts_with("members");
        if members { "members = [\"sidecar/core\", \"sidecar/sim\"]" } else { line }
    });
    fs::write(work.join("Cargo.toml"), lines.collect::<Vec<_>>().join("\n"))?;
    fs::copy(root.join("Cargo.lock"), work.join("Cargo.lock"))?;
    Ok(())
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).map(Path::to_path_buf).unwrap_or_default()
}

impl Mutation {
    /// The text of its file with the error in it, below `root`. Errors: the place is not there, or is not one.
    pub fn made(&self, root: &Path) -> io::Result<String> {
        let text = fs::read_to_string(root.join("sidecar").join(self.file))?;
        let found = text.matches(self.from).count();
        if found != 1 {
            return Err(io::Error::other(format!("{}: {found} places in {}, expected 1", self.name, self.file)));
        }
        Ok(text.replace(self.from, self.to))
    }
}

/// Every mutation still has its place in this code.
pub fn check_places() -> io::Result<()> {
    MUTATIONS.iter().try_for_each(|m| m.made(&root()).map(|_| ()))
}

/// Try every mutation that is `wanted`; at most `minutes` of histories each. `work` is a folder of its own, kept if it is
/// to be used again.
pub fn run(
    work: &Path,
    wanted: impl Fn(&str) -> bool,
    minutes: f64,
    mut told: impl FnMut(&Verdict),
) -> io::Result<Vec<Verdict>> {
    let mut verdicts = Vec::new();
    for mutation in MUTATIONS.iter().filter(|m| wanted(m.name)) {
        prepare(&root(), work)?;
        fs::write(work.join("sidecar").join(mutation.file), mutation.made(&root())?)?;
        let verdict = attempt(mutation.name, work, minutes)?;
        told(&verdict);
        verdicts.push(verdict);
    }
    Ok(verdicts)
}

fn cargo(work: &Path, args: &[&str]) -> io::Result<std::process::Output> {
    Command::new("cargo")
        .args(args)
        .current_dir(work)
        .env("CARGO_TARGET_DIR", work.join("target"))
        .env("RUSTFLAGS", "-Awarnings")
        .output()
}

/// Histories first; what they do not catch, the exhaustive model and the core's own tests may.
fn attempt(name: &'static str, work: &Path, minutes: f64) -> io::Result<Verdict> {
    let built = cargo(work, &["build", "--quiet", "--offline", "--profile", "soak", "-p", "watari-sim"])?;
    if !built.status.success() {
        return Err(io::Error::other(format!("{name} does not build:\n{}", String::from_utf8_lossy(&built.stderr))));
    }
    let output = Command::new(work.join("target/soak/watari-sim"))
        .args(["soak", "--tries", "0", "--first", "1000000", "--minutes", &minutes.to_string()])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let violation = text.lines().find_map(|line| line.split_once("FAILED: ")).map(|(_, what)| what.to_owned());
    let histories = text.lines().find_map(|line| line.split_once(" histories, ")?.0.parse().ok()).unwrap_or(0);
    let caught = match violation {
        Some(what) => Some(what),
        // A run that ended otherwise (a hang-up, an abort) is no verdict.
        None if !text.contains(" histories, ") => {
            return Err(io::Error::other(format!("{name} ended early:\n{}", String::from_utf8_lossy(&output.stderr))));
        }
        None => failing_test(name, work)?,
    };
    Ok(Verdict { name, caught: caught.map(|what| what.chars().take(90).collect()), histories })
}

/// The first test of the model or of the core that fails.
fn failing_test(name: &'static str, work: &Path) -> io::Result<Option<String>> {
    for tests in [["-p", "watari-core", "--tests"], ["-p", "watari-sim", "--test=rights"]] {
        let built = cargo(work, &[&["test", "--quiet", "--offline", "--no-run"][..], &tests].concat())?;
        if !built.status.success() {
            let words = String::from_utf8_lossy(&built.stderr);
            return Err(io::Error::other(format!("{name}: the tests do not build:\n{words}")));
        }
        let ran = cargo(work, &[&["test", "--offline"][..], &tests].concat())?;
        if !ran.status.success() {
            let text = String::from_utf8_lossy(&ran.stdout);
            let failed = text.lines().find_map(|l| l.strip_prefix("test ")?.strip_suffix(" ... FAILED"));
            return Ok(Some(format!("{}: {}", tests[1], failed.unwrap_or("a test"))));
        }
    }
    Ok(None)
}
