//! Guest requests inside a worker, step by step as `sidecar/src/engine/{gate,tracking}.rs` and `watari-nbd` do them on
//! their threads: gate, admission, preserving, the disk in pieces, completion. Each step is an event of the history.

use watari_core::{
    geometry::{Block, DiskIndex, Epoch, covering},
    handover::{Event, Gate},
    record::Role,
    replica::images::image_name,
    storage::Storage,
    tracker::{Admission, Ticket},
};

use crate::{
    content::{SECTOR_BYTES, Word, bytes_of, words_of},
    ctx::Ctx,
    net::Body,
    node::regions_of,
    process::Process,
    truth::Effect,
};

/// What a guest asks.
#[derive(Clone, Debug)]
pub enum Ask {
    /// Words for consecutive sectors.
    Write(Vec<Word>),
    /// So many sectors become zero.
    Zero(u64),
    Read(u64),
    Flush,
}

/// A request as QEMU holds it until it is answered, over reconnects.
#[derive(Clone, Debug)]
pub struct Spec {
    pub id: u64,
    pub disk: usize,
    pub sector: u64,
    pub ask: Ask,
}

impl Spec {
    pub fn sectors(&self) -> u64 {
        match &self.ask {
            Ask::Write(words) => words.len() as u64,
            Ask::Zero(n) | Ask::Read(n) => *n,
            Ask::Flush => 0,
        }
    }
    pub fn effect(&self) -> Option<Effect> {
        let words = match &self.ask {
            Ask::Write(words) => words.clone(),
            Ask::Zero(n) => vec![0; *n as usize],
            Ask::Read(_) | Ask::Flush => return None,
        };
        Some(Effect { disk: self.disk, sector: self.sector, words })
    }
    fn blocks(&self) -> Option<(Block, Block)> {
        covering(self.sector * SECTOR_BYTES, self.sectors() * SECTOR_BYTES)
    }
}

#[derive(Debug)]
enum Stage {
    /// Before the gate; held there unless it lets through.
    Gate,
    /// The peer reads for us.
    Remote,
    /// Past the gate, before the tracker. `slow`: on the path that may preserve.
    Admit { slow: bool },
    /// These frozen blocks are still to be preserved; the content of the first may have been read.
    Preserve { blocks: Vec<Block>, read: Option<Vec<u8>> },
    /// Sectors before `at` are written.
    Disk { at: u64 },
    /// On the disk; the slot is still taken.
    Finish,
    /// To be answered.
    Done { data: Option<Vec<u8>>, failed: bool },
}

/// A request inside the worker.
#[derive(Debug)]
pub struct Active {
    pub spec: Spec,
    stage: Stage,
    ticket: Option<Ticket>,
    /// Epoch in which it was admitted.
    epoch: Epoch,
    /// Its QEMU is gone: nobody hears the answer.
    pub orphan: bool,
    /// Since when it waits for the gate or the peer.
    since: Option<u64>,
}

/// So long a request is held, in milliseconds; then EIO, and QEMU pauses (design §3.5, 5).
pub const HOLD_MILLIS: u64 = 20_000;

impl Active {
    pub fn new(spec: Spec) -> Active {
        Active { spec, stage: Stage::Gate, ticket: None, epoch: Epoch::default(), orphan: false, since: None }
    }
    /// Not past the gate.
    pub fn held(&self) -> bool {
        matches!(self.stage, Stage::Gate | Stage::Remote)
    }
}

/// An answer for QEMU.
#[derive(Debug)]
pub struct Answer {
    pub id: u64,
    pub data: Option<Vec<u8>>,
    pub failed: bool,
}

impl Process {
    /// Effects of writes that are admitted and not finished, as far as they may still change the disk.
    pub fn writes_in_flight(&self) -> Vec<Effect> {
        let open = self.requests.iter().filter(|a| a.ticket.is_some() && !matches!(a.stage, Stage::Finish));
        open.filter_map(|a| a.spec.effect()).collect()
    }

    pub fn sync_disk(&mut self, ctx: &mut Ctx, disk: usize) -> bool {
        if self.images.sync(&image_name(DiskIndex(disk as u16))).is_err() {
            return false;
        }
        if let Some(live) = &mut ctx.truth.live[self.index] {
            live.synced(disk);
        }
        true
    }

    /// The peer's link is new or gone: reads that were under way go to the gate again.
    pub fn retry_remote(&mut self) {
        for a in &mut self.requests {
            if matches!(a.stage, Stage::Remote) {
                a.stage = Stage::Gate;
            }
        }
    }

    pub fn remote_reply(&mut self, ctx: &mut Ctx, id: u64, data: Option<Vec<u8>>) {
        let found = self.requests.iter_mut().find(|a| a.spec.id == id && matches!(a.stage, Stage::Remote));
        if let Some(a) = found {
            ctx.cov.hit(if data.is_some() { "remote read" } else { "remote read refused" });
            a.stage = Stage::Done { failed: data.is_none(), data };
        }
    }

    /// A read of the peer's attached guest: from our disk as it is now.
    pub fn serve_read(&mut self, ctx: &mut Ctx, id: u64, disk: usize, sector: u64, sectors: u64) {
        let role = self.role();
        let may = role.is_active_side() || matches!(role, Role::Released { .. });
        let mut data = vec![0; (sectors * SECTOR_BYTES) as usize];
        let read = self.images.read(&image_name(DiskIndex(disk as u16)), sector * SECTOR_BYTES, &mut data);
        let data = (may && read.is_ok()).then_some(data);
        self.send(ctx, Body::ReadReply { id, data });
    }

    /// One step of one request. `None`: it waits. `Some(Some(_))`: it is answered.
    pub fn request_step(&mut self, ctx: &mut Ctx, which: usize) -> Option<Option<Answer>> {
        if which >= self.requests.len() {
            return None;
        }
        let mut active = self.requests.swap_remove(which);
        let did = self.advance(ctx, &mut active);
        if did {
            let (spec, stage) = (&active.spec, &active.stage);
            ctx.note(|| {
                let (id, d, s, n) = (spec.id, spec.disk, spec.sector, spec.sectors());
                let first = spec.effect().and_then(|e| e.words.first().map(|w| w >> 16));
                format!("    request {id} disk {d} sectors {s}+{n} (write {first:?}): {:.60}", format!("{stage:?}"))
            });
        }
        if let Stage::Done { data, failed } = &mut active.stage {
            let answer = Answer { id: active.spec.id, data: data.take(), failed: *failed };
            return Some((!active.orphan).then_some(answer));
        }
        self.requests.push(active);
        did.then_some(None)
    }

    /// Writes that are admitted end now.
    pub fn drain(&mut self, ctx: &mut Ctx) {
        // One may wait for another, so all take turns; a step moves the last request into the place of the one it took.
        for turn in 0..100_000 {
            let open = self.requests.iter().enumerate().filter(|(_, a)| a.ticket.is_some());
            let open: Vec<usize> = open.map(|(i, _)| i).collect();
            if open.is_empty() || self.medium.is_off() {
                return;
            }
            let _ = self.request_step(ctx, open[turn % open.len()]);
        }
        panic!("admitted writes do not end");
    }

    fn advance(&mut self, ctx: &mut Ctx, a: &mut Active) -> bool {
        if a.held() && ctx.now >= *a.since.get_or_insert(ctx.now) + HOLD_MILLIS && !matches!(a.spec.ask, Ask::Flush) {
            ctx.cov.hit(format!("held 20 s, then EIO: {:?}", self.gate));
            a.stage = Stage::Done { data: None, failed: true };
            return true;
        }
        match &mut a.stage {
            Stage::Gate => self.at_gate(ctx, a),
            Stage::Remote | Stage::Done { .. } => false,
            Stage::Admit { slow } => {
                let slow = *slow;
                self.admit(ctx, a, slow)
            }
            Stage::Preserve { .. } => self.preserve_step(ctx, a),
            Stage::Disk { .. } => self.write_step(ctx, a),
            Stage::Finish => {
                if let Some(ticket) = a.ticket.take() {
                    self.tracker.finish(ticket);
                }
                a.stage = Stage::Done { data: None, failed: false };
                true
            }
        }
    }

    fn at_gate(&mut self, ctx: &mut Ctx, a: &mut Active) -> bool {
        let write = a.spec.effect().is_some();
        match (self.gate, &a.spec.ask) {
            (Gate::Serve, Ask::Write(_) | Ask::Zero(_)) if self.pass_through => {
                // Between the gate and the disk nothing of ours is asked.
                ctx.cov.hit("a write is passed through");
                a.epoch = self.site.record().epoch;
                a.stage = Stage::Disk { at: 0 };
                while matches!(a.stage, Stage::Disk { .. }) && !self.dead {
                    self.write_step(ctx, a);
                }
            }
            (Gate::Serve, Ask::Write(_) | Ask::Zero(_)) => a.stage = Stage::Admit { slow: false },
            (Gate::Serve | Gate::Hold, Ask::Flush) => {
                let synced = self.sync_disk(ctx, a.spec.disk);
                a.stage = Stage::Done { data: None, failed: !synced };
            }
            (Gate::Remote | Gate::Dead, Ask::Flush) => a.stage = Stage::Done { data: None, failed: false },
            (Gate::Serve, Ask::Read(n)) => {
                let mut data = vec![0; (*n * SECTOR_BYTES) as usize];
                let name = image_name(DiskIndex(a.spec.disk as u16));
                let read = self.images.read(&name, a.spec.sector * SECTOR_BYTES, &mut data);
                a.stage = Stage::Done { failed: read.is_err(), data: Some(data) };
            }
            (Gate::Dead, _) => a.stage = Stage::Done { data: None, failed: true },
            (Gate::Hold, _) => return false,
            (Gate::Remote, Ask::Read(n)) => {
                let (id, n) = (a.spec.id, *n);
                if self.source_left {
                    self.want_write(ctx);
                }
                if self.link.is_none() {
                    return false;
                }
                a.stage = Stage::Remote;
                self.send(ctx, Body::Read { id, disk: a.spec.disk, sector: a.spec.sector, sectors: n });
            }
            (Gate::Remote, _) => {
                debug_assert!(write);
                return self.want_write(ctx);
            }
        }
        true
    }

    /// Tell the role that the guest wants to write, once until it was heard.
    fn want_write(&mut self, ctx: &mut Ctx) -> bool {
        if std::mem::replace(&mut self.wants_write, true) {
            return false;
        }
        ctx.note(|| format!("    site {}: the attached guest wants to write", self.index));
        true
    }

    /// The role hears of it.
    pub fn hear_want_write(&mut self, ctx: &mut Ctx) -> bool {
        if !std::mem::take(&mut self.wants_write) {
            return false;
        }
        let nonce = ctx.id();
        // A request that was on its way when the right arrived asks for nothing any more.
        if self.site.offered() {
            self.apply(ctx, Event::WantWrite { nonce });
        }
        true
    }

    fn admit(&mut self, ctx: &mut Ctx, a: &mut Active, slow: bool) -> bool {
        let Some((first, last)) = a.spec.blocks() else { return false };
        let disk = DiskIndex(a.spec.disk as u16);
        let untracked = self.untracked.get();
        let logged = || untracked || regions_of(disk, first, last).all(|r| self.logged.contains(&r));
        match self.tracker.begin(disk, first, last, logged) {
            Admission::Go(ticket) => {
                let role = self.role();
                assert!(role.accepts_writes(), "I6: a guest write is admitted by a site that is {}", role.name());
                self.hot.extend(regions_of(disk, first, last));
                let mut blocks = Vec::new();
                if ticket.generation_open {
                    let frozen = self.tracker.frozen_in(disk, first, last);
                    blocks = frozen.iter().flat_map(|e| e.start.0..e.end().0).map(Block).collect();
                }
                if !blocks.is_empty() && !slow {
                    // The mark stays; the slow path takes a slot of its own.
                    self.tracker.finish(ticket);
                    a.stage = Stage::Admit { slow: true };
                    return true;
                }
                a.epoch = self.site.record().epoch;
                a.ticket = Some(ticket);
                a.stage =
                    if blocks.is_empty() { Stage::Disk { at: 0 } } else { Stage::Preserve { blocks, read: None } };
                true
            }
            Admission::NotLogged => {
                self.log_regions(ctx, disk, first, last);
                a.stage = Stage::Admit { slow: true };
                true
            }
            Admission::Sealed => {
                ctx.cov.hit("a write past the gate meets the seal");
                false
            }
        }
    }

    fn preserve_step(&mut self, ctx: &mut Ctx, a: &mut Active) -> bool {
        let Stage::Preserve { blocks, read } = &mut a.stage else { return false };
        let Some(ticket) = &a.ticket else { return false };
        let disk = DiskIndex(a.spec.disk as u16);
        let Some(block) = blocks.first().copied() else {
            a.stage = Stage::Disk { at: 0 };
            return true;
        };
        if self.tracker.writes_before_cut(ticket.cut, disk, block, block) {
            return false;
        }
        match read.take() {
            None => {
                let extent = watari_core::geometry::Extent { start: block, blocks: 1 };
                *read = self.read_blocks(ctx, disk, extent);
                return true;
            }
            Some(_) if self.preserve.len() as u64 * 4096 >= ctx.setup.preserve_bytes => {
                self.give_up = true;
                a.stage = Stage::Disk { at: 0 };
            }
            Some(content) => {
                if self.tracker.claim_for(ticket, block) {
                    ctx.cov.hit("preserved before overwrite");
                    self.preserve.insert((disk.0, block.0), content);
                }
                blocks.remove(0);
            }
        }
        true
    }

    fn write_step(&mut self, ctx: &mut Ctx, a: &mut Active) -> bool {
        let Stage::Disk { at } = a.stage else { return false };
        let Some(effect) = a.spec.effect() else { return false };
        let left = effect.words.len() as u64 - at;
        let n = if ctx.rng.one_in(2) { left } else { 1 + ctx.rng.below(left) };
        let words = effect.words[at as usize..(at + n) as usize].to_vec();
        let part = Effect { disk: effect.disk, sector: effect.sector + at, words };
        self.may_write(ctx, a.epoch);
        if let Some(live) = &mut ctx.truth.live[self.index] {
            live.wrote(&part);
        }
        let name = image_name(DiskIndex(a.spec.disk as u16));
        let offset = part.sector * SECTOR_BYTES;
        let wrote = match a.spec.ask {
            Ask::Zero(_) => self.images.zero(&name, offset, n * SECTOR_BYTES),
            _ => self.images.write(&name, offset, &bytes_of(&part.words)),
        };
        self.dead |= wrote.is_err();
        a.stage = if n == left { Stage::Finish } else { Stage::Disk { at: at + n } };
        true
    }

    /// I6: a guest write goes to our disk now; may it?
    fn may_write(&self, ctx: &mut Ctx, epoch: Epoch) {
        let record = self.site.record();
        // Admitted before a seal or a fence it may still arrive, until the right is granted or the disks are a replica's.
        let ends = matches!(record.role, Role::Sealed { .. } | Role::Fenced { .. } | Role::Released { .. });
        assert!(
            record.role.accepts_writes() || ends && !self.granted,
            "I6: a guest write reaches the disk of a site that is {}{}",
            record.role.name(),
            if self.granted { " and has granted the right to write" } else { "" }
        );
        ctx.truth.writes(self.index, epoch);
    }
}

/// The words of an answer to a read.
pub fn words_read(data: &[u8]) -> Vec<Word> {
    words_of(data)
}
