//! The brain and its link: Hello in both directions, routing of control messages, the end of a connection.

use std::time::Duration;

use watari_core::{
    geometry::ActivationId,
    handover::{self, PeerRole},
    record::Role,
    versions::Speaks,
};
use watari_store::trust::{self, FullCompareReason, Heard, StartState};
use watari_wire::replication::{ControlMessage, Heartbeat, Hello, ReadReply, Refused};

use super::*;
use crate::engine::start::blocks_of;

impl Brain {
    /// Our durable record, as the first message. `staged` only as a listener.
    pub(super) fn our_hello(&self, staged: Vec<wire::SequenceRange>) -> Hello {
        let record = self.parts.site.record();
        let (handover, nonce) = convert::role_ids(record);
        let committed = match (&self.source, &self.target) {
            (Some(source), _) => source.primary.base(),
            (None, Some(target)) => target.committed(),
            (None, None) => record.base,
        };
        Hello {
            protocol_min: Speaks::OURS.lowest,
            protocol_max: Speaks::OURS.highest,
            pair: convert::bytes(&record.pair),
            site: convert::bytes(&record.site),
            epoch: Some(convert::wire_epoch(record.epoch)),
            floor: record.floor,
            role: record.role.tag(),
            handover: convert::bytes(&handover),
            nonce: convert::bytes(&nonce),
            starts: record.starts,
            session: self.parts.session.0,
            disks: record
                .disks
                .iter()
                .zip(self.our_capacities())
                .map(|(d, capacity_bytes)| wire::Disk {
                    name: d.name.clone(),
                    size_bytes: d.size_bytes,
                    capacity_bytes,
                })
                .collect(),
            committed: Some(convert::wire_generation(committed)),
            staged,
            virgin: self.target.as_ref().is_some_and(|t| t.is_virgin()),
            identity: convert::bytes(&record.identity),
            heard: None,
        }
    }

    /// Why we cannot talk to whoever says this, with found, expected and remedy.
    fn unacceptable(&self, hello: &Hello) -> Option<(&'static str, String)> {
        let record = self.parts.site.record();
        if hello.pair[..] != record.pair {
            return Some((
                "OtherPair",
                "the peer belongs to another pair: check pair.id in both configurations".into(),
            ));
        }
        if hello.site[..] == record.site {
            let text = "the peer's folder is a copy of this one: each site needs a folder of its own";
            return Some(("SameFolder", text.into()));
        }
        let (ours, theirs) = (Speaks::OURS, Speaks { lowest: hello.protocol_min, highest: hello.protocol_max });
        if ours.common(theirs).is_none() {
            let text = format!(
                "the peer speaks protocol {} to {}, this sidecar {} to {}: upgrade the older one",
                theirs.lowest, theirs.highest, ours.lowest, ours.highest
            );
            return Some(("ProtocolTooOld", text));
        }
        let mine: Vec<_> = record.disks.iter().map(|d| (d.name.as_str(), d.size_bytes)).collect();
        let theirs: Vec<_> = hello.disks.iter().map(|d| (d.name.as_str(), d.size_bytes)).collect();
        (mine != theirs).then(|| {
            let text = format!(
                "the sites do not have the same disks: found {theirs:?} at the peer, {mine:?} here (name, bytes); make the lists in both \
                 configurations equal and the target's disks as large as the source's"
            );
            ("DisksDiffer", text)
        })
    }

    pub(super) fn link_opened(
        &mut self,
        id: LinkId,
        peer: String,
        hello: &Hello,
        control: ControlSender,
        data: Option<(DataPool, Box<Hello>)>,
    ) {
        let now = self.our_hello(Vec::new());
        if let Some((_, said)) = &data
            && (said.role, &said.epoch, said.floor) != (now.role, &now.epoch, now.floor)
        {
            // What we said while dialling is not true any more: say it anew.
            return self.parts.post_later(Duration::ZERO);
        }
        if data.is_none() && hello.pair[..] == self.parts.site.record().pair && self.follow_growth(hello) {
            return;
        }
        if let Some((reason, text)) = self.unacceptable(hello) {
            self.conditions.set("PeerRefused", reason, &text, "correct the configuration named in the message");
            let refused = Refused { reason: reason.into(), text };
            let _ = control.send(message(Body::Refused(refused)));
            return;
        }
        let Ok(met) = convert::peer(hello) else {
            let text =
                format!("the peer is in a role (number {}) that this version does not know: upgrade it", hello.role);
            self.conditions.set("PeerRefused", "UnknownRole", &text, "upgrade this sidecar");
            return;
        };
        self.conditions.clear("PeerRefused");
        let record = self.parts.site.record();
        let dialler_epoch = if data.is_some() { record.epoch.counter } else { met.epoch.counter };
        if let Some(link) = &self.link {
            if dialler_epoch < link.dialler_epoch {
                let text = format!(
                    "a connection of epoch {} stands; this one is of epoch {dialler_epoch} and is not needed",
                    link.dialler_epoch
                );
                let _ = control.send(message(Body::Refused(Refused { reason: "LowerEpoch".into(), text })));
                return;
            }
            self.drop_link();
        }
        let record = self.parts.site.record();
        let same_history = record.identity != [0; 16] && hello.identity[..] == record.identity;
        self.peer_divergence = PeerDivergence::default();
        self.link = Some(Link { id, peer, control: control.clone(), rtt_millis: 0.0, dialler_epoch, same_history });
        self.reconnects += 1;
        let takes_frames = matches!(met.role, PeerRole::Replica | PeerRole::Voided { .. });
        let met = handover::Event::Met { peer: met, activation: ActivationId(random_id()) };
        if let Err(why) = self.apply_or_refuse(met) {
            let refused = Refused { reason: "Diverged".into(), text: why.into() };
            let _ = control.send(message(Body::Refused(refused)));
            return self.drop_link();
        }
        self.confirmed();
        match data {
            Some((data, _)) => self.met_as_dialer(hello, control, data, takes_frames, same_history),
            None => self.met_as_listener(hello),
        }
    }

    fn met_as_dialer(&mut self, hello: &Hello, control: ControlSender, data: DataPool, takes_frames: bool, same: bool) {
        let record = self.parts.site.record();
        if !record.role.is_active_side() || !takes_frames {
            if hello.role == Role::FENCED_TAG {
                self.peer_is_fenced();
            }
            self.parts.post_later(Duration::from_secs(1));
            return;
        }
        self.conditions.clear("PeerFenced");
        self.peer_capacities = hello.disks.iter().map(|d| d.capacity_bytes).collect();
        self.judge_start(hello);
        if let Some(source) = &mut self.source {
            source.link_up(unix_millis(), hello, control, data, same);
        }
    }

    /// First contact after a start as source: what the peer heard of us before decides what the marks are worth.
    fn judge_start(&mut self, hello: &Hello) {
        let Some(facts) = self.parts.start_facts.take() else { return };
        let heard = hello.heard.map(|w| Heard {
            starts: w.starts,
            log_id: w.log_id,
            heartbeat: w.heartbeat,
            untracked: w.untracked,
        });
        let shared = self.parts.shared.clone();
        let unproven = shared.unproven.swap(false, SeqCst);
        let Some(source) = &mut self.source else { return };
        match trust::decide(StartFacts { heard, ..facts }) {
            StartState::UncleanWithLog(set) if unproven => {
                tracing::info!(
                    regions = set.iter().count(),
                    "the peer proves the region log: only its regions are compared"
                );
                for (disk, first, blocks) in blocks_of(shared.regions.layout(), &set) {
                    source.must_compare(disk, first, blocks);
                }
            }
            StartState::FullCompare(reason) if unproven || matches!(reason, FullCompareReason::FolderBehind { .. }) => {
                source.compare_everything(&reason.to_string());
            }
            StartState::Clean(_)
            | StartState::UncleanWithMap
            | StartState::UncleanWithLog(_)
            | StartState::FullCompare(_) => {}
        }
        if unproven && shared.regions.report().untracked.is_none() {
            shared.tracker.maps().facts().set_untracked(false);
        }
    }

    /// The peer was active before; what it wrote alone is known once it has said so.
    fn peer_is_fenced(&mut self) {
        let PeerDivergence { blocks, anything } = self.peer_divergence;
        let text = match (anything, blocks) {
            (true, _) => "the peer was active before and holds writes of its own; which ones is not known".to_owned(),
            (false, 0) => "the peer was active before".to_owned(),
            (false, blocks) => {
                let bytes = blocks * watari_core::geometry::BLOCK_BYTES;
                format!(
                    "the peer was active before and holds {bytes} bytes of its own, written after the common generation"
                )
            }
        };
        let next = "at the peer: `watari-sidecar inspect divergence` shows and copies them, `ctl accept-divergence` lets them be overwritten";
        self.conditions.clear("PeerFenced");
        self.conditions.set("PeerFenced", "Divergence", &text, next);
    }

    fn met_as_listener(&mut self, hello: &Hello) {
        let receives = self.parts.site.record().role.receives();
        let mut staged = Vec::new();
        if receives {
            if self.target.is_none() {
                self.open_target();
            }
            if let Some(target) = &mut self.target {
                let epoch = convert::epoch(hello.epoch.clone()).counter;
                if let Err(error) = target.begin_session(hello.session, epoch) {
                    tracing::warn!(%error, "this side cannot take the peer's frames");
                }
                staged = target.staged(hello.session);
            }
        }
        let mut reply = self.our_hello(staged);
        // A listener says whose staging it holds, and whether the images can still be believed empty.
        reply.session = hello.session;
        reply.heard = self.heard.as_ref().filter(|(site, _)| *site == hello.site).map(|(_, witness)| *witness);
        self.dialler_site = hello.site.clone();
        self.frames.clear();
        if let Some(link) = &self.link {
            let _ = link.control.send(message(Body::Hello(reply)));
        }
        // Known from the first moment on: a handover may be opened in the next.
        self.tell_room();
        if let Some(link) = &self.link {
            for part in self.divergence.iter().flat_map(|list| divergence::messages(list, self.parts.disks.len())) {
                let _ = link.control.send(message(Body::Divergence(part)));
            }
            self.parts.remote.link(Some(link.control.clone()));
        }
        for disk in self.parts.disks.iter() {
            disk.release();
        }
    }

    /// End the link on our own account; whoever is the active side dials again.
    pub(super) fn hang_up(&mut self) {
        if self.link.is_some() {
            self.drop_link();
        }
        self.parts.post_later(Duration::ZERO);
    }

    fn drop_link(&mut self) {
        self.link = None;
        self.peer_capacities.clear();
        self.parts.remote.link(None);
        if let Some(source) = &mut self.source {
            source.link_down();
        }
        self.apply(handover::Event::Parted);
    }

    pub(super) fn link_closed(&mut self, id: LinkId, reason: &str) {
        if self.link.as_ref().is_some_and(|l| l.id == id) {
            tracing::info!(reason, "link closed");
            self.last_link_error = reason.to_owned();
            self.parts.signals.source_left.store(false, SeqCst);
            self.drop_link();
        }
    }

    pub(super) fn link_message(&mut self, id: LinkId, m: ControlMessage) {
        let Some(link) = self.link.as_mut().filter(|l| l.id == id) else { return };
        let Some(body) = m.body else { return };
        let now = unix_millis();
        match body {
            Body::Hello(_) => tracing::warn!("a second Hello on one link is ignored"),
            Body::Heartbeat(beat) if beat.reply => {
                let rtt = now.saturating_sub(beat.unix_millis) as f64;
                link.rtt_millis = if link.rtt_millis == 0.0 { rtt } else { link.rtt_millis * 0.8 + rtt * 0.2 };
            }
            Body::Heartbeat(beat) => {
                if let Some(witness) = beat.witness {
                    self.heard = Some((self.dialler_site.clone(), witness));
                }
                let _ = link.control.send(message(Body::Heartbeat(Heartbeat { reply: true, ..beat })));
            }
            Body::Refused(refused) => {
                self.conditions.set("PeerRefused", &refused.reason, &refused.text, "correct what the peer names");
            }
            Body::Handover(h) => self.handover_message(&h),
            Body::ReadRequest(read) => self.serve_read(&read),
            Body::ReadReply(reply) => self.parts.remote.reply(reply),
            Body::CommitPart(part) => {
                if let Some(answer) = self.target.as_mut().and_then(|t| t.commit_part(&part)) {
                    let _ = link.control.send(message(answer));
                }
            }
            Body::DigestRequest(request) => {
                if let Some(target) = &mut self.target {
                    let _ = link.control.send(message(target.digests(&request)));
                }
            }
            Body::Baseline(baseline) => {
                let identity = convert::id(&baseline.identity);
                let base = convert::generation(baseline.generation.unwrap_or_default());
                if self.target.is_some() && self.parts.site.record().identity != identity {
                    let action = self.parts.site.amend(|r| {
                        r.identity = identity;
                        r.base = base;
                    });
                    self.perform(vec![action]);
                }
            }
            Body::CommitResult(result) => {
                if let Some(source) = &mut self.source {
                    source.commit_result(now, &result);
                }
            }
            Body::Durable(durable) => {
                if let Some(source) = &mut self.source {
                    let ranges: Vec<_> = durable.ranges.iter().map(|r| (r.first, r.last)).collect();
                    source.durable(now, durable.session, &ranges);
                }
            }
            Body::DigestReply(reply) => {
                if let Some(source) = &self.source {
                    source.digests.answer(reply.id, &reply.digests);
                }
            }
            Body::TargetState(state) => {
                if let Some(source) = &mut self.source {
                    source.target_state(&state);
                }
            }
            Body::Superseded(m) => {
                if let Some(target) = &mut self.target {
                    target.superseded(&m);
                }
            }
            Body::Divergence(part) => {
                let seen = &mut self.peer_divergence;
                seen.blocks += part.extents.chunks_exact(2).map(|e| e[1]).sum::<u64>();
                seen.anything |= part.anything;
                if part.last {
                    self.peer_is_fenced();
                }
            }
        }
    }

    fn handover_message(&mut self, h: &wire::Handover) {
        use wire::handover::Kind;
        match h.kind() {
            Kind::QemuLeft => self.parts.signals.source_left.store(true, SeqCst),
            Kind::Void | Kind::Voided | Kind::Activated => self.parts.signals.source_left.store(false, SeqCst),
            _ => {}
        }
        if let Some(m) = convert::from_handover(h) {
            self.apply(handover::Event::Received(m, ActivationId(random_id())));
        }
    }

    /// A read of the peer's attached guest: from our disk as it is now.
    fn serve_read(&self, read: &wire::ReadRequest) {
        let Some(link) = &self.link else { return };
        let mut reply = ReadReply { id: read.id, ..ReadReply::default() };
        let active = self.parts.site.record().role.is_active_side()
            || matches!(self.parts.site.record().role, Role::Released { .. });
        match self.parts.disks.get(read.disk as usize).map(|d| d.local().file()) {
            Some(file)
                if active
                    && read.length as u64 <= limits::REMOTE_READ_BYTES_MAX
                    && read.offset.saturating_add(u64::from(read.length)) <= file.size_bytes() =>
            {
                let mut data = vec![0; read.length as usize];
                match file.read_at(read.offset, &mut data) {
                    Ok(()) => reply.data = data.into(),
                    Err(_) => reply.errno = 5,
                }
            }
            _ => reply.errno = 5,
        }
        let _ = link.control.send(message(Body::ReadReply(reply)));
    }

    /// Once a second: a target's state, and a heartbeat.
    pub(super) fn beat(&mut self) {
        self.tell_room();
        let Some(link) = &self.link else { return };
        let witness = self.source.is_some().then(|| {
            let log = self.parts.shared.regions.report();
            let untracked = self.parts.shared.untracked();
            wire::Witness { starts: self.parts.starts, log_id: log.log_id, heartbeat: log.heartbeat, untracked }
        });
        let beat = Heartbeat { id: 0, reply: false, unix_millis: unix_millis(), witness };
        let _ = link.control.send(message(Body::Heartbeat(beat)));
    }

    /// A target's room, measured now, and its state to the source.
    fn tell_room(&mut self) {
        let Some(target) = &mut self.target else { return };
        target.room = self.parts.replica.room();
        if let Some(link) = &self.link {
            let _ = link.control.send(message(target.state()));
        }
    }
}

impl Parts {
    /// Break the link after a pause, so that the dialer asks again how things are at the peer.
    fn post_later(&self, pause: Duration) {
        let dial = self.dial.clone();
        std::thread::spawn(move || {
            std::thread::sleep(pause);
            if *dial.borrow() {
                dial.send_replace(false);
                std::thread::sleep(Duration::from_millis(50));
                dial.send_replace(true);
            }
        });
    }
}
