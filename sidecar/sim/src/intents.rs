//! What was asked of the sidecars once, asked again later: a manifest that comes back from git, an operator that restarts
//! and repeats itself. Each carries the count of changes of site at which it was meant (`atMove`) and acts only at that.

use watari_core::{
    geometry::{ActivationId, Generation},
    handover::Event,
    record::Id,
};

use crate::{operator::Phase, world::World};

/// So many are remembered.
const INTENTS_MAX: usize = 16;

/// What is wished of one site.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Wish {
    Open(Id),
    Void,
    Promote(Generation),
}

/// See the module's header.
#[derive(Clone, Copy, Debug)]
pub struct Intent {
    pub site: usize,
    pub wish: Wish,
    pub at_move: u64,
}

impl World {
    pub fn remember(&mut self, site: usize, wish: Wish) {
        if self.intents.len() == INTENTS_MAX {
            self.intents.remove(0);
        }
        self.intents.push(Intent { site, wish, at_move: self.ctx.truth.moves });
    }

    /// The name of a handover of the VM that runs at `s` now: the same VM at the same epoch gives the same one
    /// (engine/brain/intents.rs).
    pub fn handover_of(&self, s: usize) -> Option<Id> {
        let (epoch, qemu) = (self.nodes[s].record()?.epoch, self.qemus[s].as_ref()?.id);
        let mut id = epoch.activation.0;
        id[8..].copy_from_slice(&(qemu << 16 | epoch.counter).to_le_bytes());
        Some(id)
    }

    /// An intent of before is applied again.
    pub fn applies_old_intent(&mut self) -> bool {
        if self.intents.is_empty() {
            return false;
        }
        let which = self.ctx.rng.below(self.intents.len() as u64) as usize;
        let Intent { site, wish, at_move } = self.intents[which];
        if at_move != self.ctx.truth.moves {
            self.ctx.cov.hit("an old intent is refused: the site differs");
            return true;
        }
        let event = match wish {
            // The name follows from VM and epoch: an old one is not made again.
            Wish::Open(handover) if self.handover_of(site) == Some(handover) => Event::OpenHandover { handover },
            // The operator judges from its own VM, each time: only a migration whose VM does not execute here is voided.
            Wish::Void if self.moving.is_none_or(|m| m.phase != Phase::Resumed) => {
                Event::WantVoid { activation: ActivationId([0; 16]) }
            }
            Wish::Promote(generation) => Event::Promote { generation },
            Wish::Open(_) | Wish::Void => return false,
        };
        let kept = |p: &crate::process::Process, g| {
            p.target.as_ref().is_some_and(|t| t.store.kept().iter().any(|m| m.generation == g))
        };
        if let Wish::Promote(generation) = wish {
            let there = self.nodes[site].process.as_ref().is_some_and(|p| kept(p, generation));
            if !there || !self.ctx.truth.believes(site, generation) {
                return false;
            }
            self.migration_is_over(site);
        }
        self.note(|| format!("asked of site {site} again: {wish:?}"));
        self.ctx.cov.hit(match wish {
            Wish::Open(_) => "asked again: open a handover",
            Wish::Void => "asked again: void",
            Wish::Promote(_) => "asked again: promote",
        });
        self.event(site, event)
    }
}
