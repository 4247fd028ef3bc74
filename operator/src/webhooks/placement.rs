//! Where each pair's VM may run, as far as this operator knows: written by the controllers, read by admission.

use std::{
    collections::HashMap,
    sync::{Arc, RwLock},
};

/// Where the VM of a pair may run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placement {
    Here,
    /// It is moving here: only as the receiver of that migration.
    Receiving {
        /// The site where it is active now.
        active_site: String,
    },
    /// Not at all, but for a receiver: that one has no Pod until there is a migration, and runs nothing before the handover, whose
    /// rules are the sidecars'.
    Elsewhere {
        active_site: String,
        /// What this side is instead, for people: "Replica", "Fenced".
        role_here: String,
        /// `namespace/name` of the SyncPair, where it is known.
        sync_pair: Option<String>,
    },
}

/// A VMI that must not start here.
#[derive(Debug, thiserror::Error)]
pub enum Elsewhere {
    #[error(
        "this VM is active at site {active_site}, and its disks here are {role_here}; started here it would write to them. To move it here, set \
         activeSite of {sync_pair} (or run `kubectl watari cutover`); if {active_site} is lost, `kubectl watari failover`"
    )]
    Active { active_site: String, role_here: String, sync_pair: String },
    #[error(
        "this VM is active at site {active_site} and is moving here: until then it may only wait as a receiver \
         (runStrategy WaitAsReceiver); to stop the move, set activeSite back"
    )]
    Moving { active_site: String },
}

/// Shared between controllers and the webhook server.
#[derive(Clone, Debug, Default)]
pub struct Placements(Arc<RwLock<HashMap<String, Placement>>>);

impl Placements {
    pub fn set(&self, pair_id: &str, placement: Placement) {
        self.write().insert(pair_id.to_owned(), placement);
    }

    pub fn forget(&self, pair_id: &str) {
        self.write().remove(pair_id);
    }

    /// `None`: nothing is known.
    pub fn of(&self, pair_id: &str) -> Option<Placement> {
        self.0.read().unwrap_or_else(|poisoned| poisoned.into_inner()).get(pair_id).cloned()
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<String, Placement>> {
        self.0.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Placement {
    /// Whether a VMI may be created here; `receiver`: it is one that waits for a migration.
    pub fn admits(&self, receiver: bool) -> Result<(), Elsewhere> {
        match self {
            Placement::Here => Ok(()),
            Placement::Receiving { .. } | Placement::Elsewhere { .. } if receiver => Ok(()),
            Placement::Receiving { active_site } => Err(Elsewhere::Moving { active_site: active_site.clone() }),
            Placement::Elsewhere { active_site, role_here, sync_pair } => Err(Elsewhere::Active {
                active_site: active_site.clone(),
                role_here: role_here.clone(),
                sync_pair: sync_pair.clone().unwrap_or_else(|| "the SyncPair at its home".to_owned()),
            }),
        }
    }
}
