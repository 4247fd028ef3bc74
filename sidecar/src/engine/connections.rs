//! Who is connected, shared by all disks of the VM, and who must never be served again.
//!
//! A QEMU whose gate was closed for good (a promotion past it, a void, a fence, a release) holds memory that belongs to
//! other data than what this side serves later. Its connections are *condemned*: dead while this process lives
//! (`start::Export`), and, because a QEMU that lost its connection reconnects and looks like a new one, nobody may attach
//! until each of them has said goodbye. A marker in the runtime folder says so to the next worker: that folder lives
//! as long as the Pod, and so at least as long as its QEMU. Outside Kubernetes `ctl release` is a person's word that it
//! is gone.

use std::{
    collections::HashSet,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use watari_core::{front::Detach, geometry::DiskIndex};

/// Name of the marker in the runtime folder.
pub const MARKER_NAME: &str = "condemned";
const REFUSED: &str = "a VM that was connected here belongs to other data than what this side holds now, and may still try to come back: \
                       make sure that its QEMU has ended; then run `watari-sidecar ctl release` and start this side again (in Kubernetes: \
                       delete its Pod)";

/// One connection: its disk and its number there.
pub type Connection = (DiskIndex, u64);

#[derive(Default)]
struct State {
    open: HashSet<Connection>,
    /// Condemned, and not gone with a goodbye.
    condemned: HashSet<Connection>,
    /// A former worker condemned connections that nobody can count any more.
    inherited: bool,
    /// Something other than a clean goodbye ended a connection since the first one opened.
    broken: bool,
}

/// See the module's header.
pub struct Connections {
    marker: PathBuf,
    state: Mutex<State>,
}

impl Connections {
    /// `runtime_dir`: where the marker lies.
    pub fn new(runtime_dir: &std::path::Path) -> Self {
        let marker = runtime_dir.join(MARKER_NAME);
        let state = State { inherited: marker.exists(), ..State::default() };
        Connections { marker, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections of a VM that may be served.
    pub fn count(&self) -> usize {
        let state = self.lock();
        state.open.difference(&state.condemned).count()
    }

    /// Whether anybody may attach; `Err` is the reason.
    pub fn admit(&self) -> Result<(), String> {
        let state = self.lock();
        if state.inherited || !state.condemned.is_empty() { Err(REFUSED.into()) } else { Ok(()) }
    }

    /// A connection opened; `true`: the first one.
    pub fn opened(&self, connection: Connection) -> bool {
        let mut state = self.lock();
        let first = state.open.is_empty();
        state.broken &= !first;
        state.open.insert(connection);
        first
    }

    /// A connection is gone. If it was the last one: how they went, all together.
    pub fn closed(&self, connection: Connection, how: Detach) -> Option<Detach> {
        let mut state = self.lock();
        let last = state.open.remove(&connection) && state.open.is_empty();
        state.broken |= how == Detach::Lost;
        if how == Detach::Clean && state.condemned.remove(&connection) && state.condemned.is_empty() && !state.inherited
        {
            self.forget_marker();
        }
        last.then_some(if state.broken { Detach::Lost } else { Detach::Clean })
    }

    /// The gate was closed for good: whoever is connected now is never served again.
    pub fn condemn(&self) {
        let mut state = self.lock();
        if state.open.is_empty() {
            return;
        }
        let open: Vec<Connection> = state.open.iter().copied().collect();
        state.condemned.extend(open);
        if let Err(error) = std::fs::write(&self.marker, b"see `watari-sidecar status`\n") {
            tracing::error!(%error, marker = %self.marker.display(), "cannot mark that a VM must not come back: end its QEMU before a restart");
        }
    }

    /// A person says that whoever was condemned is gone.
    pub fn forgive(&self) {
        let mut state = self.lock();
        state.condemned.clear();
        state.inherited = false;
        self.forget_marker();
    }

    fn forget_marker(&self) {
        match std::fs::remove_file(&self.marker) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(%error, marker = %self.marker.display(), "the marker stays; nobody may attach after a restart");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Connection = (DiskIndex(0), 1);
    const DATA: Connection = (DiskIndex(1), 1);

    #[test]
    fn the_first_and_the_last_connection_are_told_and_how_they_all_went() {
        let dir = tempfile::tempdir().unwrap();
        let c = Connections::new(dir.path());
        assert!(c.opened(ROOT) && !c.opened(DATA));
        assert_eq!(c.closed(ROOT, Detach::Lost), None);
        assert_eq!(c.closed(DATA, Detach::Clean), Some(Detach::Lost));
        assert!(c.opened(ROOT));
        assert_eq!(c.closed(ROOT, Detach::Clean), Some(Detach::Clean));
    }

    #[test]
    fn a_condemned_vm_keeps_others_out_until_it_says_goodbye() {
        let dir = tempfile::tempdir().unwrap();
        let c = Connections::new(dir.path());
        c.opened(ROOT);
        c.opened(DATA);
        c.condemn();
        assert_eq!(c.count(), 0, "it does not count as a VM that needs us");
        assert!(c.admit().is_err());
        c.closed(ROOT, Detach::Clean);
        assert!(c.admit().is_err());
        c.closed(DATA, Detach::Clean);
        assert_eq!(c.admit(), Ok(()));
        assert!(Connections::new(dir.path()).admit().is_ok(), "nothing is left for the next worker");
    }

    #[test]
    fn a_condemned_vm_that_just_vanished_keeps_others_out_of_the_next_worker_too_until_a_person_says_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let c = Connections::new(dir.path());
        c.opened(ROOT);
        c.condemn();
        c.closed(ROOT, Detach::Lost);
        assert!(c.admit().is_err());
        let next = Connections::new(dir.path());
        assert!(next.admit().is_err());
        next.forgive();
        assert!(next.admit().is_ok() && Connections::new(dir.path()).admit().is_ok());
    }

    #[test]
    fn with_nobody_connected_nobody_is_condemned() {
        let dir = tempfile::tempdir().unwrap();
        let c = Connections::new(dir.path());
        c.condemn();
        assert!(c.admit().is_ok());
    }
}
