//! First contact of a connection: each side's record against the other's (design §3.6). Part of the one table in `handover.rs`.

use super::*;

impl Site {
    /// First contact of a connection: who is what.
    pub(super) fn met(&mut self, peer: Peer, activation: ActivationId) -> Vec<Action> {
        self.linked = true;
        let (mine, theirs) = (self.record.epoch, peer.epoch);
        let above = (theirs == mine || theirs.counter < mine.counter) && peer.floor > mine.counter;
        match self.record.role.clone() {
            Role::HandoverOpen { handover } => match peer.role {
                PeerRole::Voided { handover: h } if h == handover || above => {
                    self.voided_by(h, peer.floor, above, activation)
                }
                _ if theirs.counter > mine.counter || peer.floor > mine.counter + 1 => {
                    self.fenced_by(theirs, peer.floor)
                }
                _ if theirs.counter == mine.counter && theirs.activation != mine.activation => diverged(),
                _ => self.offer(handover),
            },
            Role::Sealed { handover, nonce, session } => match peer.role {
                PeerRole::Voided { handover: h } if h == handover || above => {
                    self.voided_by(h, peer.floor, above, activation)
                }
                // It activated on our grant and the word of it was lost: nothing else raises our epoch by exactly one (a
                // promotion takes two). Which of our grants does not matter: all that is sealed is in each of them.
                PeerRole::Active { .. } if theirs.counter == mine.counter + 1 => {
                    self.activated_by(handover, theirs, peer.generation)
                }
                _ if theirs.counter > mine.counter => self.fenced_by(theirs, peer.floor),
                _ => {
                    let mut actions = self.offer(handover);
                    if let Some(generation) = self.remainder {
                        let epoch = mine;
                        actions.push(Action::Send(Message::Grant { handover, nonce, session, epoch, generation }));
                    }
                    actions
                }
            },
            Role::Serving => {
                if theirs.counter > mine.counter || peer.floor > mine.counter + 1 && !voided(&peer) {
                    return self.fenced_by(theirs, peer.floor);
                }
                if theirs.counter == mine.counter && theirs.activation != mine.activation {
                    return diverged();
                }
                let mut actions = self.peer_stopped(&peer);
                // It voided a handover that we had already left: it needs to hear where we are.
                actions.extend(match peer.role {
                    PeerRole::Voided { handover } => self.voided_by(handover, peer.floor, above, activation),
                    PeerRole::Sealed { handover } | PeerRole::Active { handover: Some(handover) } => {
                        let generation = self.record.base;
                        vec![Action::Send(Message::Activated { handover, epoch: mine, generation })]
                    }
                    PeerRole::Active { handover: None }
                    | PeerRole::Replica
                    | PeerRole::Fenced
                    | PeerRole::Released { .. } => Vec::new(),
                });
                actions
            }
            Role::Replica | Role::Voided { .. } => {
                if theirs.counter == mine.counter && mine.counter > 0 && theirs.activation != mine.activation {
                    return diverged();
                }
                let active = matches!(peer.role, PeerRole::Active { .. } | PeerRole::Sealed { .. });
                let mut actions = Vec::new();
                if active && theirs.counter > mine.counter && theirs.counter >= self.record.floor {
                    // An epoch above ours was raised properly (it passed our floor): our Void was heard, or we were away.
                    // A QEMU that came with a handover of the old one belongs to a VM that goes on elsewhere.
                    let stale = self.record.role == Role::Replica && self.offered.is_some();
                    self.forget_handover();
                    actions.push(self.become_role(Role::Replica, theirs));
                    actions.extend(stale.then_some(Action::Gate(Gate::Dead)));
                    actions.push(Action::Gate(Gate::Remote));
                } else if let Role::Voided { handover } = self.record.role {
                    actions.push(Action::Send(Message::Void { handover, epoch: mine.counter + 1 }));
                }
                actions
            }
            Role::Promoting { .. } | Role::Released { .. } | Role::Fenced { .. } => Vec::new(),
        }
    }
}

impl Site {
    /// Promoted alone, and now the other side is seen to serve nobody any more: the warning has served.
    fn peer_stopped(&mut self, peer: &Peer) -> Vec<Action> {
        let stopped = match peer.role {
            PeerRole::Replica | PeerRole::Voided { .. } | PeerRole::Fenced | PeerRole::Released { .. } => true,
            PeerRole::Active { .. } | PeerRole::Sealed { .. } => false,
        };
        if !(self.record.unfenced && stopped) {
            return Vec::new();
        }
        self.record.unfenced = false;
        vec![Action::Persist(self.record.clone())]
    }
}

fn voided(peer: &Peer) -> bool {
    matches!(peer.role, PeerRole::Voided { .. })
}

fn diverged() -> Vec<Action> {
    vec![Action::Report(Condition::Diverged), Action::Refuse("two sides raised the same epoch apart from each other")]
}
