//! virt-synchronization-controller: carries each side's half of `migrationState` to the other cluster, over mutual TLS.
//!
//! The source's controller calls the address in `sendTo.connectURL`; what it gets back is the target's half. (KubeVirt's target calls
//! back on a connection of its own.) Nothing is decided here: the [`Board`] is where the two sides pin their halves.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::ca::Pair;
use crate::{lines, tls};

/// KubeVirt's default.
pub const SYNC_PORT: u16 = 9185;
/// Between two calls for one migration.
const INTERVAL: Duration = Duration::from_millis(500);
/// Three round trips over a long line, and some loss.
const PATIENCE: Duration = Duration::from_secs(5);

/// One side's word on one migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    pub migration: String,
    /// The VMIM is being deleted.
    pub cancelled: bool,
    /// The VMIM has come to its end.
    pub ended: bool,
    /// [`half`] of the VMI's.
    pub state: Value,
}

/// A side of a migration in this cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    Source,
    Target,
}

/// What the other side gets to see.
pub fn half(side: Side, state: &Value) -> Value {
    let mut half = json!({ "failed": state["failed"], "failureReason": state["failureReason"] });
    let own = match side {
        Side::Source => ["sourceState", "startTimestamp", "mode"].as_slice(),
        Side::Target => ["targetState", "completed", "endTimestamp"].as_slice(),
    };
    for name in own {
        half[name] = state[name].clone();
    }
    half
}

/// How the other side's half changes ours; `None` if it does not.
pub fn news(side: Side, ours: &Value, theirs: &Value) -> Option<Value> {
    let mut theirs = theirs.clone();
    let object = theirs.as_object_mut()?;
    object.retain(|_, value| !value.is_null() && *value != false);
    // The same again in the older fields, which some still read.
    let (half, fields) = match side {
        Side::Source => ("targetState", [("node", "targetNode"), ("pod", "targetPod")]),
        Side::Target => ("sourceState", [("node", "sourceNode"), ("pod", "sourcePod")]),
    };
    for (name, older) in fields {
        let value = object.get(half).map(|half| half[name].clone()).filter(|value| !value.is_null());
        value.into_iter().for_each(|value| drop(object.insert(older.into(), value)));
    }
    let mut after = ours.clone();
    json_patch::merge(&mut after, &theirs);
    (after != *ours).then_some(theirs)
}

/// What is known of the peer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PeerWord {
    pub message: Option<Message>,
    /// It has seen our newest word.
    pub told: bool,
    pub error: Option<String>,
}

struct Entry {
    connect: Option<String>,
    ours: Message,
    /// A quirk: this side does not take part.
    unreachable: bool,
    calling: bool,
    peer: PeerWord,
}

type Key = (Side, String);

/// All migrations of this cluster with another one.
#[derive(Clone, Default)]
pub struct Board(Arc<Mutex<BTreeMap<Key, Entry>>>);

impl Board {
    fn entries<T>(&self, job: impl FnOnce(&mut BTreeMap<Key, Entry>) -> T) -> T {
        job(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Our newest word; answers what is known of the peer. `connect` is the source's.
    pub fn pin(&self, side: Side, ours: Message, connect: Option<&str>, unreachable: bool) -> PeerWord {
        self.entries(|entries| {
            let entry = entries.entry((side, ours.migration.clone())).or_insert_with(|| Entry {
                connect: connect.map(str::to_owned),
                ours: Message::default(),
                unreachable,
                calling: false,
                peer: PeerWord::default(),
            });
            entry.peer.told &= entry.ours == ours;
            (entry.ours, entry.unreachable) = (ours, unreachable);
            entry.peer.clone()
        })
    }

    /// Forgets all others.
    pub fn keep(&self, known: &BTreeSet<Key>) {
        self.entries(|entries| entries.retain(|key, _| known.contains(key)));
    }

    /// A source of another cluster has called.
    fn answer(&self, theirs: Message) -> Result<Message, String> {
        self.entries(|entries| {
            let entry = entries.get_mut(&(Side::Target, theirs.migration.clone())).filter(|entry| !entry.unreachable);
            let unknown = || format!("unable to find migration resource for migration ID {}", theirs.migration);
            let entry = entry.ok_or_else(unknown)?;
            entry.peer = PeerWord { message: Some(theirs), told: true, error: None };
            Ok(entry.ours.clone())
        })
    }

    /// Calls that are due, each marked as under way.
    fn due(&self) -> Vec<(Key, String, Message)> {
        self.entries(|entries| {
            let due = entries.iter_mut().filter(|((side, _), entry)| {
                let ended = entry.ours.ended && entry.peer.message.as_ref().is_some_and(|peer| peer.ended);
                let idle = entry.calling || entry.unreachable || ended && entry.peer.told;
                *side == Side::Source && !idle
            });
            due.filter_map(|(key, entry)| {
                entry.calling = true;
                Some((key.clone(), entry.connect.clone()?, entry.ours.clone()))
            })
            .collect()
        })
    }

    fn called(&self, key: &Key, said: &Message, outcome: Result<Message, String>) {
        self.entries(|entries| {
            let Some(entry) = entries.get_mut(key) else { return };
            entry.calling = false;
            match outcome {
                Ok(message) => {
                    entry.peer = PeerWord { message: Some(message), told: entry.ours == *said, error: None };
                }
                Err(error) => entry.peer.error = Some(error),
            }
        });
    }
}

/// What the controller's TLS stands on, renewed by each reconcile of [`crate::ca`].
#[derive(Clone)]
pub struct Trust {
    pub own: Pair,
    pub bundle: String,
}

/// Calls peers for ever.
pub async fn call(board: Board, trust: watch::Receiver<Option<Trust>>) {
    loop {
        for (key, address, message) in board.due() {
            let (board, trust) = (board.clone(), trust.borrow().clone());
            tokio::spawn(async move {
                let outcome = ask(&address, &message, trust).await;
                board.called(&key, &message, outcome);
            });
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn ask(address: &str, message: &Message, trust: Option<Trust>) -> Result<Message, String> {
    let trust = trust.ok_or("no certificate yet")?;
    let connector = tls::mutual_connector(&trust.own, &trust.bundle).map_err(|error| error.to_string())?;
    let call = async {
        let stream = TcpStream::connect(address).await.map_err(|error| format!("{address}: {error}"))?;
        let stream = connector.connect(tls::sync_name(), stream).await;
        let stream = stream.map_err(|error| format!("{address}: {error}"))?;
        lines::ask::<Result<Message, String>>(stream, message, PATIENCE).await.map_err(|error| error.to_string())?
    };
    tokio::time::timeout(PATIENCE, call).await.map_err(|_| format!("{address}: no answer"))?
}

/// Answers peers for ever.
pub async fn serve(board: Board, trust: watch::Receiver<Option<Trust>>) -> std::io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, SYNC_PORT)).await?;
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let Some(trust) = trust.borrow().clone() else { continue };
        let board = board.clone();
        tokio::spawn(async move {
            let answer = async {
                let acceptor = tls::mutual_acceptor(&trust.own, &trust.bundle).map_err(std::io::Error::other)?;
                let stream = acceptor.accept(stream).await?;
                lines::answer(stream, async |theirs| board.answer(theirs)).await.map_err(std::io::Error::other)
            };
            if let Ok(Err(error)) = tokio::time::timeout(PATIENCE, answer).await {
                tracing::warn!(%error, "a peer's call");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(state: Value) -> Message {
        Message { migration: "m".into(), state, ..Message::default() }
    }

    #[test]
    fn each_side_learns_the_others_half_and_only_what_is_new() {
        let source =
            json!({ "sourceState": { "pod": "p" }, "targetState": { "syncAddress": "t" }, "startTimestamp": "now" });
        let target = json!({ "targetState": { "node": "b-1" }, "completed": true });
        let learned = news(Side::Source, &source, &half(Side::Target, &target)).unwrap();
        assert_eq!(learned["targetState"]["node"], "b-1");
        assert_eq!(learned["completed"], true);
        let mut after = source.clone();
        json_patch::merge(&mut after, &learned);
        assert_eq!(after["targetState"]["syncAddress"], "t");
        assert_eq!(news(Side::Source, &after, &half(Side::Target, &target)), None);
    }

    #[test]
    fn a_target_answers_only_for_migrations_that_it_knows() {
        let board = Board::default();
        assert!(board.answer(message(Value::Null)).is_err());
        board.pin(Side::Target, message(json!(1)), None, false);
        assert_eq!(board.answer(message(json!(2))).unwrap().state, json!(1));
        let word = board.pin(Side::Target, message(json!(1)), None, false);
        assert!(word.told && word.message.unwrap().state == json!(2));
        assert!(!board.pin(Side::Target, message(json!(3)), None, false).told);
        board.pin(Side::Target, message(json!(3)), None, true);
        assert!(board.answer(message(json!(2))).is_err(), "unreachable");
    }

    #[test]
    fn a_migration_is_called_for_one_at_a_time_until_both_sides_know_its_end() {
        let board = Board::default();
        let ended = Message { ended: true, ..message(Value::Null) };
        board.pin(Side::Source, ended.clone(), Some("peer:1"), false);
        let due = board.due();
        assert_eq!(due.len(), 1);
        assert!(board.due().is_empty(), "the first call is under way");
        board.called(&due[0].0, &due[0].2, Ok(ended));
        assert!(board.due().is_empty(), "all is said");
    }
}
