//! Who may write: the one transition table of roles and epochs, for both sides (design §3.5, §3.6; invariant I6).
//!
//! ```text
//!  active side                                          other side
//!  Serving ──open──▶ HandoverOpen ──Acquire──▶ Sealed   Replica ──guest attaches──▶ (attached) ──Acquire▶ peer
//!     ▲                    │                     │         │  ▲                          │
//!     │◀────Void{e+1}──────┴────────Void─────────┤         │  └── Voided ◀──void────┤
//!     │     (rises to e+2)                       │         │        Void{e+1} recorded first │
//!     │                                    Activated{e+1}  │                          │ Grant + applied
//!     │                                          ▼         │                          ▼
//!     └──────────────────────────────────── (peer)      Released ──adopted──▶ Replica   Serving {e+1}
//!  any active side that meets a higher epoch it did not grant: Fenced ──person accepts──▶ Released ──▶ Replica
//!  Replica ──take over──▶ (peer seals) ──Grant + applied──▶ Serving {e+1}; else:
//!  Replica/Voided ──promote──▶ Promoting ──rolled──▶ Serving {max(floor, e)+2}, `unfenced`
//! ```
//!
//! Pure: [`Site::apply`] maps (record, event) to actions, to be performed *in order*; an action after
//! [`Action::Persist`] is performed only once the record is durable. A crash between two actions is a crash: the next
//! start reads the record and goes on from [`Site::new`]. Events may come twice and late; nothing here counts time.
//!
//! It does not move data, send frames or gate I/O by itself: actions name that for the shell.

use alloc::{vec, vec::Vec};

use crate::{
    geometry::{ActivationId, Epoch, Generation},
    primary::Pace,
    record::{Id, Role, RoleRecord},
};

mod meeting;
mod words;

pub use words::{Action, Condition, Event, Gate, Message, Peer, PeerRole};

/// One side: its durable record and what it knows until the next restart.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Site {
    record: RoleRecord,
    linked: bool,
    /// Target: the handover the source has open.
    offered: Option<(Id, Epoch)>,
    attached: bool,
    /// Target: the nonce of our Acquire.
    asked: Option<Id>,
    /// Target: a grant that matches `asked`, waiting for its generation to be applied.
    granted: Option<(Epoch, Generation)>,
    /// Source: the grant to repeat.
    remainder: Option<Generation>,
    /// Source: its QEMU flushed and left; repeated at each contact, since an idle guest at the target has no other sign.
    left: bool,
    session: u64,
}

impl Site {
    /// `session` names this life of the worker.
    pub fn new(record: RoleRecord, session: u64) -> Self {
        Site {
            record,
            linked: false,
            offered: None,
            attached: false,
            asked: None,
            granted: None,
            remainder: None,
            left: false,
            session,
        }
    }

    pub fn record(&self) -> &RoleRecord {
        &self.record
    }

    /// For bookkeeping that is not a question of rights (start counter, base, reserved numbers).
    pub fn amend(&mut self, change: impl FnOnce(&mut RoleRecord)) -> Action {
        let (role, epoch, floor) = (self.record.role.clone(), self.record.epoch, self.record.floor);
        change(&mut self.record);
        assert!(
            role == self.record.role && epoch == self.record.epoch && floor == self.record.floor,
            "rights change only by events"
        );
        Action::Persist(self.record.clone())
    }

    pub fn waiting_for_grant(&self) -> bool {
        self.asked.is_some()
    }

    /// A handover is open and its source within reach: the time to start a target's QEMU.
    pub fn attachable(&self) -> bool {
        self.linked && self.offered()
    }

    /// A QEMU may attach (target side). A source that is out of reach for the moment does not end what it opened: reads
    /// wait for it, as they do when the link breaks after the attach. Should it have moved on, the next contact says so.
    pub fn offered(&self) -> bool {
        matches!(self.record.role, Role::Replica) && self.offered.is_some()
    }

    /// The gate that belongs to the state right after a start.
    pub fn gate(&self) -> Gate {
        match &self.record.role {
            Role::Serving | Role::HandoverOpen { .. } => Gate::Serve,
            Role::Sealed { .. } | Role::Promoting { .. } => Gate::Hold,
            Role::Replica => Gate::Remote,
            Role::Released { .. } | Role::Voided { .. } | Role::Fenced { .. } => Gate::Dead,
        }
    }

    /// What must be taken up again after a restart in this state, before any event.
    pub fn resume(&mut self) -> Vec<Action> {
        match self.record.role.clone() {
            Role::Sealed { .. } => vec![Action::Gate(Gate::Hold), Action::SealAndSend],
            Role::HandoverOpen { .. } => vec![Action::Gate(Gate::Serve), Action::Converge(Pace::Generations)],
            Role::Released { generation, .. } => {
                vec![Action::Gate(Gate::Dead), Action::BecomeReplica { generation }]
            }
            Role::Promoting { generation } => vec![Action::Gate(Gate::Hold), Action::RollTo(generation)],
            Role::Fenced { .. } => vec![Action::Gate(Gate::Dead), Action::Report(Condition::Fenced)],
            Role::Serving if self.record.unfenced => {
                vec![Action::Gate(Gate::Serve), Action::Report(Condition::Unfenced)]
            }
            Role::Serving | Role::Replica | Role::Voided { .. } => vec![Action::Gate(self.gate())],
        }
    }

    fn become_role(&mut self, role: Role, epoch: Epoch) -> Action {
        self.record.floor = self.record.floor.max(epoch.counter);
        self.record.epoch = epoch;
        self.record.role = role;
        Action::Persist(self.record.clone())
    }

    /// The handover that was offered is over, whichever way: an offer that outlives it could be voided or acquired again.
    fn forget_handover(&mut self) {
        (self.offered, self.asked, self.granted, self.attached) = (None, None, None, false);
    }

    /// The transition table.
    pub fn apply(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::OpenHandover { handover } => self.open_handover(handover),
            Event::GuestAttached => self.guest_attached(),
            Event::GuestLeft => self.guest_left(),
            Event::WantWrite { nonce } => self.want_write(nonce),
            Event::WantVoid { activation: _ } => self.want_void(),
            Event::TakeOver { handover, nonce } => self.take_over(handover, nonce),
            Event::Promote { generation } => self.promote(generation),
            Event::Rolled { activation } => self.rolled(activation),
            Event::Reclaim { activation } => self.reclaim(activation),
            Event::AcceptDivergence => self.accept_divergence(),
            Event::RemainderSent { generation } => self.remainder_sent(generation),
            Event::Applied { generation, activation } => self.applied(generation, activation),
            Event::Adopted => self.adopted(),
            Event::Met { peer, activation } => self.met(peer, activation),
            Event::Parted => {
                // What was offered stays known: a person may void it while the source is away. Whether it still
                // stands is said anew at the next contact.
                self.linked = false;
                Vec::new()
            }
            Event::Received(message, activation) => self.received(message, activation),
        }
    }

    fn open_handover(&mut self, handover: Id) -> Vec<Action> {
        match self.record.role {
            Role::Serving if !self.record.untracked => {
                let epoch = self.record.epoch;
                // Whatever left in an earlier handover says nothing about this one.
                self.left = false;
                vec![
                    self.become_role(Role::HandoverOpen { handover }, epoch),
                    Action::Send(Message::Open { handover, epoch }),
                    Action::Converge(Pace::Generations),
                ]
            }
            Role::HandoverOpen { handover: now } if now == handover => {
                vec![Action::Send(Message::Open { handover, epoch: self.record.epoch })]
            }
            Role::Serving
            | Role::HandoverOpen { .. }
            | Role::Sealed { .. }
            | Role::Released { .. }
            | Role::Replica
            | Role::Voided { .. }
            | Role::Promoting { .. }
            | Role::Fenced { .. } => vec![Action::Refuse("a handover can be opened only while Serving and Tracked")],
        }
    }

    fn guest_attached(&mut self) -> Vec<Action> {
        self.left = false;
        if let (Role::Replica, Some((handover, _))) = (&self.record.role, self.offered) {
            self.attached = true;
            return vec![Action::Gate(Gate::Remote), Action::Send(Message::Attached { handover })];
        }
        Vec::new()
    }

    /// What a target must hear at each contact.
    fn offer(&self, handover: Id) -> Vec<Action> {
        let mut actions = vec![Action::Send(Message::Open { handover, epoch: self.record.epoch })];
        if self.left {
            actions.push(Action::Send(Message::QemuLeft { handover }));
        }
        actions
    }

    fn guest_left(&mut self) -> Vec<Action> {
        self.attached = false;
        match self.record.role {
            Role::HandoverOpen { handover } | Role::Sealed { handover, .. } => {
                self.left = true;
                vec![Action::Send(Message::QemuLeft { handover })]
            }
            Role::Serving
            | Role::Released { .. }
            | Role::Replica
            | Role::Voided { .. }
            | Role::Promoting { .. }
            | Role::Fenced { .. } => Vec::new(),
        }
    }

    fn want_write(&mut self, nonce: Id) -> Vec<Action> {
        match (&self.record.role, self.offered) {
            (Role::Replica, Some((handover, _))) => {
                let nonce = *self.asked.get_or_insert(nonce);
                let ask = Message::Acquire { handover, nonce, session: self.session };
                vec![Action::Send(ask), Action::Report(Condition::WaitingForGrant)]
            }
            _ => vec![Action::Refuse("no handover is open at the source")],
        }
    }

    /// Target: a promotion that tries to lose nothing. An attached QEMU belongs to a migration that is over now.
    fn take_over(&mut self, handover: Id, nonce: Id) -> Vec<Action> {
        if !self.linked || self.record.role != Role::Replica {
            return vec![Action::Refuse("only a replica whose source is within reach can take over from it")];
        }
        let handover = self.offered.map_or(handover, |(h, _)| h);
        self.offered = Some((handover, self.record.epoch));
        let nonce = *self.asked.get_or_insert(nonce);
        self.attached = false;
        vec![
            Action::Gate(Gate::Dead),
            Action::Send(Message::TakeOver { handover, nonce, session: self.session, epoch: self.record.epoch }),
            Action::Report(Condition::WaitingForGrant),
        ]
    }

    fn want_void(&mut self) -> Vec<Action> {
        let Some(handover) = self.offered.map(|(h, _)| h).or(self.voided_handover()) else {
            return vec![Action::Refuse("no handover to void is known here")];
        };
        match self.record.role {
            Role::Replica => {
                let void = self.record.epoch.counter + 1;
                self.forget_handover();
                let epoch = self.record.epoch;
                // The floor first: a late Grant or Activate at e+1 can never count again.
                self.record.floor = self.record.floor.max(void + 1);
                vec![
                    self.become_role(Role::Voided { handover }, epoch),
                    Action::Gate(Gate::Dead),
                    Action::Send(Message::Void { handover, epoch: void }),
                ]
            }
            Role::Voided { handover } => {
                vec![Action::Send(Message::Void { handover, epoch: self.record.epoch.counter + 1 })]
            }
            Role::Serving
            | Role::HandoverOpen { .. }
            | Role::Sealed { .. }
            | Role::Released { .. }
            | Role::Promoting { .. }
            | Role::Fenced { .. } => vec![Action::Refuse("only a target that is not active can void a handover")],
        }
    }

    fn voided_handover(&self) -> Option<Id> {
        match self.record.role {
            Role::Voided { handover } => Some(handover),
            _ => None,
        }
    }

    fn promote(&mut self, generation: Generation) -> Vec<Action> {
        match self.record.role {
            Role::Replica | Role::Voided { .. } => {
                self.forget_handover();
                let epoch = self.record.epoch;
                vec![
                    self.become_role(Role::Promoting { generation }, epoch),
                    // An attached QEMU's memory belongs to newer data: it is never served.
                    Action::Gate(Gate::Dead),
                    Action::RollTo(generation),
                ]
            }
            Role::Promoting { generation } => vec![Action::RollTo(generation)],
            Role::Serving
            | Role::HandoverOpen { .. }
            | Role::Sealed { .. }
            | Role::Released { .. }
            | Role::Fenced { .. } => vec![Action::Refuse("only a replica can be promoted")],
        }
    }

    fn rolled(&mut self, activation: ActivationId) -> Vec<Action> {
        let Role::Promoting { generation } = self.record.role else { return Vec::new() };
        // One more than an activation takes: a sealed source knows that its grant was taken by its epoch + 1, and must
        // not take this for it.
        let counter = self.record.floor.max(self.record.epoch.counter) + 2;
        self.record.base = generation;
        self.record.unfenced = true;
        vec![
            self.become_role(Role::Serving, Epoch { counter, activation }),
            Action::BecomeSource { base: Some(generation) },
            Action::Gate(Gate::Serve),
            Action::Report(Condition::Unfenced),
        ]
    }

    fn reclaim(&mut self, activation: ActivationId) -> Vec<Action> {
        let above = match self.record.role {
            Role::Serving => 1,
            // One more than an Activate that this handover may lead to.
            Role::HandoverOpen { .. } | Role::Sealed { .. } => 2,
            Role::Released { .. }
            | Role::Replica
            | Role::Voided { .. }
            | Role::Promoting { .. }
            | Role::Fenced { .. } => return vec![Action::Refuse("only the active side can be told to serve on")],
        };
        let sealed = matches!(self.record.role, Role::Sealed { .. });
        self.remainder = None;
        self.record.unfenced |= sealed;
        let counter = self.record.floor.max(self.record.epoch.counter + above);
        let mut actions = vec![
            self.become_role(Role::Serving, Epoch { counter, activation }),
            Action::Converge(Pace::Interval),
            Action::Unseal,
            Action::Gate(Gate::Serve),
        ];
        if sealed {
            actions.push(Action::Report(Condition::Unfenced));
        }
        actions
    }

    fn accept_divergence(&mut self) -> Vec<Action> {
        let Role::Fenced { by } = self.record.role else {
            return vec![Action::Refuse("this side is not Fenced: there is nothing to accept")];
        };
        // What lies on our disks is no generation of anybody's. It becomes one, under a number that was never used, so that
        // undo keeps it and nobody takes it for the base; and the new history begins with a comparison.
        let generation = Generation { epoch: self.record.epoch.counter, number: self.record.numbers_reserved };
        self.record.numbers_reserved.0 += 1;
        self.record.identity = [0; 16];
        vec![
            Action::SyncDisks,
            self.become_role(Role::Released { handover: [0; 16], generation }, by),
            Action::BecomeReplica { generation },
        ]
    }

    fn remainder_sent(&mut self, generation: Generation) -> Vec<Action> {
        let Role::Sealed { handover, nonce, session } = self.record.role else { return Vec::new() };
        self.remainder = Some(generation);
        vec![Action::Send(Message::Grant { handover, nonce, session, epoch: self.record.epoch, generation })]
    }

    fn applied(&mut self, generation: Generation, activation: ActivationId) -> Vec<Action> {
        let (Role::Replica, Some((epoch, granted)), Some((handover, _))) =
            (&self.record.role, self.granted, self.offered)
        else {
            return Vec::new();
        };
        if generation != granted || epoch != self.record.epoch || epoch.counter + 1 < self.record.floor {
            return Vec::new();
        }
        let epoch = Epoch { counter: epoch.counter + 1, activation };
        self.forget_handover();
        self.record.base = generation;
        vec![
            self.become_role(Role::Serving, epoch),
            Action::BecomeSource { base: Some(generation) },
            Action::Gate(Gate::Serve),
            Action::Send(Message::Activated { handover, epoch, generation }),
        ]
    }

    fn adopted(&mut self) -> Vec<Action> {
        let Role::Released { handover, generation } = self.record.role else { return Vec::new() };
        let epoch = self.record.epoch;
        self.record.base = generation;
        self.remainder = None;
        self.forget_handover();
        vec![
            self.become_role(Role::Replica, epoch),
            Action::Gate(Gate::Remote),
            Action::Send(Message::Released { handover }),
        ]
    }

    fn received(&mut self, message: Message, activation: ActivationId) -> Vec<Action> {
        match message {
            Message::Open { handover, epoch } => {
                if epoch != self.record.epoch || !matches!(self.record.role, Role::Replica) {
                    return Vec::new();
                }
                self.offered = Some((handover, epoch));
                let mut actions = Vec::new();
                if self.attached {
                    actions.push(Action::Send(Message::Attached { handover }));
                }
                if let Some(nonce) = self.asked {
                    actions.push(Action::Send(Message::Acquire { handover, nonce, session: self.session }));
                }
                actions
            }
            Message::Attached { handover } => match self.record.role {
                Role::HandoverOpen { handover: h } if h == handover => vec![Action::Converge(Pace::Staging)],
                _ => Vec::new(),
            },
            Message::QemuLeft { .. } | Message::Released { .. } => Vec::new(),
            Message::Acquire { handover, nonce, session } => self.acquire(handover, nonce, session),
            Message::TakeOver { handover, nonce, session, epoch } => match self.record.role {
                _ if epoch != self.record.epoch => Vec::new(),
                // A person's word at the other side stands above a migration that is being prepared here. It goes by
                // that one's name: the target has heard of it, or will before our grant, and may void it.
                Role::HandoverOpen { handover } if !self.record.untracked => self.seal_for(handover, nonce, session),
                Role::Serving if !self.record.untracked => self.seal_for(handover, nonce, session),
                _ => self.acquire(handover, nonce, session),
            },
            Message::Grant { handover, nonce, session, epoch, generation } => {
                let mine =
                    self.offered == Some((handover, epoch)) && self.asked == Some(nonce) && session == self.session;
                if !mine || !matches!(self.record.role, Role::Replica) || epoch != self.record.epoch {
                    return Vec::new();
                }
                self.granted = Some((epoch, generation));
                vec![Action::ApplyUpTo(generation)]
            }
            Message::Activated { handover, epoch, generation } => self.activated_by(handover, epoch, generation),
            Message::Void { handover, epoch } => {
                let mine = self.record.epoch.counter;
                self.voided_by(handover, epoch + 1, epoch <= mine + 1 && mine < epoch + 1, activation)
            }
            Message::Voided { handover, epoch } => match self.record.role {
                Role::Voided { handover: h } if h == handover && epoch.counter >= self.record.floor => {
                    self.forget_handover();
                    vec![self.become_role(Role::Replica, epoch), Action::Gate(Gate::Remote)]
                }
                _ => Vec::new(),
            },
        }
    }

    fn acquire(&mut self, handover: Id, nonce: Id, session: u64) -> Vec<Action> {
        match self.record.role {
            Role::HandoverOpen { handover: h } if h == handover && !self.record.untracked => {
                self.seal_for(handover, nonce, session)
            }
            Role::Sealed { handover: h, nonce: n, session: s } if h == handover => {
                let mut actions = Vec::new();
                let epoch = self.record.epoch;
                if (n, s) != (nonce, session) {
                    // The target restarted before it activated; only its newest Acquire can be granted.
                    actions.push(self.become_role(Role::Sealed { handover, nonce, session }, epoch));
                }
                if let Some(generation) = self.remainder {
                    actions.push(Action::Send(Message::Grant { handover, nonce, session, epoch, generation }));
                }
                actions
            }
            _ => Vec::new(),
        }
    }

    fn seal_for(&mut self, handover: Id, nonce: Id, session: u64) -> Vec<Action> {
        let epoch = self.record.epoch;
        vec![
            self.become_role(Role::Sealed { handover, nonce, session }, epoch),
            Action::Gate(Gate::Hold),
            Action::SealAndSend,
        ]
    }

    fn activated_by(&mut self, handover: Id, epoch: Epoch, generation: Generation) -> Vec<Action> {
        match self.record.role {
            Role::Sealed { handover: h, .. } if h == handover && epoch.counter == self.record.epoch.counter + 1 => {
                self.record.base = generation;
                vec![
                    // Released promises that the replica-to-be holds everything: the disks first.
                    Action::SyncDisks,
                    self.become_role(Role::Released { handover, generation }, epoch),
                    Action::Gate(Gate::Dead),
                    Action::Send(Message::Released { handover }),
                    Action::BecomeReplica { generation },
                ]
            }
            _ => Vec::new(),
        }
    }

    /// The target voided `handover`; its floor is `floor` (= our epoch + 2, or what it was when it first voided). `above`:
    /// that floor is above our epoch, and its own epoch is not. Then the name does not matter (it may be a take-over that
    /// we never heard of): whatever we have open can never be activated there, and it takes nothing from us until we rise.
    fn voided_by(&mut self, handover: Id, floor: u64, above: bool, activation: ActivationId) -> Vec<Action> {
        let rises = match self.record.role {
            Role::HandoverOpen { handover: h } | Role::Sealed { handover: h, .. } => h == handover || above,
            Role::Serving => above,
            Role::Released { .. }
            | Role::Replica
            | Role::Voided { .. }
            | Role::Promoting { .. }
            | Role::Fenced { .. } => false,
        };
        match self.record.role {
            _ if rises => {
                self.remainder = None;
                let epoch = Epoch { counter: floor.max(self.record.epoch.counter + 2), activation };
                vec![
                    self.become_role(Role::Serving, epoch),
                    Action::Converge(Pace::Interval),
                    Action::Unseal,
                    Action::Gate(Gate::Serve),
                    Action::Send(Message::Voided { handover, epoch }),
                ]
            }
            Role::Serving if self.record.epoch.counter >= floor => {
                vec![Action::Send(Message::Voided { handover, epoch: self.record.epoch })]
            }
            _ => Vec::new(),
        }
    }

    fn fenced_by(&mut self, theirs: Epoch, floor: u64) -> Vec<Action> {
        let by = Epoch { counter: theirs.counter.max(floor), activation: theirs.activation };
        let epoch = self.record.epoch;
        vec![
            self.become_role(Role::Fenced { by }, epoch),
            Action::Gate(Gate::Dead),
            Action::SyncDisks,
            Action::Report(Condition::Fenced),
        ]
    }
}

#[cfg(test)]
#[path = "handover_tests.rs"]
mod tests;
