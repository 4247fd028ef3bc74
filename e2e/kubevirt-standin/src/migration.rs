//! What a VMIM calls for next (`pkg/virt-controller/watch/migration/migration.go`, `processMigrationPhase`, and decentralized.go). Pure.
//!
//! ```text
//! source   Synchronizing ▶ Pending ▶ Scheduling ▶ Scheduled ▶ PreparingTarget ▶ TargetReady ▶ Running ▶ Succeeded
//! target   WaitingForSync ▶ Pending ▶ Scheduling ▶ …                                                     or Failed
//! in-cluster                Pending ▶ …
//! ```
//!
//! All facts are in the VMI's `status.migrationState`: each side writes its own half (`sourceState`, `targetState`), the synchronization
//! controllers carry it to the other side ([`crate::sync`]). Within one cluster one VMI has both halves.

use serde_json::{Value, json};

use crate::quirks::Quirks;
use crate::render::Target;
use crate::seen::{PodSeen, is_deleting, is_final, phase, timestamp, uid};
use crate::talk::{Leaving, Life, Migrate, Ports};

/// QEMU's and libvirt's own ports, by which virt-handler names its proxies.
const CHANNELS: [u16; 3] = [0, 49152, 49153];

/// Of a VMIM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Unset,
    Synchronizing,
    WaitingForSync,
    Pending,
    Scheduling,
    Scheduled,
    PreparingTarget,
    TargetReady,
    Running,
    Succeeded,
    Failed,
}

impl Phase {
    const ALL: [(Phase, &'static str); 11] = [
        (Phase::Unset, ""),
        (Phase::Synchronizing, "Synchronizing"),
        (Phase::WaitingForSync, "WaitingForSync"),
        (Phase::Pending, "Pending"),
        (Phase::Scheduling, "Scheduling"),
        (Phase::Scheduled, "Scheduled"),
        (Phase::PreparingTarget, "PreparingTarget"),
        (Phase::TargetReady, "TargetReady"),
        (Phase::Running, "Running"),
        (Phase::Succeeded, "Succeeded"),
        (Phase::Failed, "Failed"),
    ];

    pub fn of(vmim: &Value) -> Phase {
        let text = vmim["status"]["phase"].as_str().unwrap_or_default();
        Phase::ALL.iter().find(|(_, name)| *name == text).map_or(Phase::Unset, |(phase, _)| *phase)
    }

    pub fn name(self) -> &'static str {
        Phase::ALL.iter().find(|(phase, _)| *phase == self).map_or("", |(_, name)| name)
    }

    pub fn is_final(self) -> bool {
        matches!(self, Phase::Succeeded | Phase::Failed)
    }
}

/// Which end of a migration a VMIM stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// Both.
    Local,
    Source {
        migration: String,
        connect: String,
    },
    Target {
        migration: String,
    },
}

impl Role {
    pub fn of(vmim: &Value) -> Role {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let (send, receive) = (&vmim["spec"]["sendTo"], &vmim["spec"]["receive"]);
        match (text(&send["migrationID"]), text(&send["connectURL"]), text(&receive["migrationID"])) {
            (Some(migration), Some(connect), _) => Role::Source { migration, connect },
            (_, _, Some(migration)) => Role::Target { migration },
            _ => Role::Local,
        }
    }

    pub fn migration(&self) -> Option<&str> {
        match self {
            Role::Local => None,
            Role::Source { migration, .. } | Role::Target { migration } => Some(migration),
        }
    }

    fn has_source(&self) -> bool {
        matches!(self, Role::Local | Role::Source { .. })
    }

    fn has_target(&self) -> bool {
        matches!(self, Role::Local | Role::Target { .. })
    }
}

/// What is known of the other cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Its VMIM is being deleted.
    pub cancelled: bool,
    /// It has been told that ours is.
    pub told: bool,
}

/// All that a decision is made from.
pub struct Seen<'s> {
    pub vmim: &'s Value,
    pub vmi: Option<&'s Value>,
    /// The Pod that the guest is in.
    pub source: Option<&'s PodSeen>,
    pub target: Option<&'s PodSeen>,
    pub peer: Peer,
    /// There is a second node to migrate to.
    pub more_nodes: bool,
    /// Seconds since the VMIM was made.
    pub age: i64,
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Phase(Phase),
    /// Replaces `status.migrationState` of the VMI.
    Begin(Value),
    /// Merged into it.
    State(Value),
    Event {
        reason: &'static str,
        message: String,
    },
    CreateTarget(Box<Target>),
    DeleteTarget,
    /// The VMI now belongs to this node's virt-handler, too.
    HandOff(String),
    /// The opposite: no guest came.
    TakeBack,
    PrepareTarget,
    Migrate(Box<Migrate>),
    Abort,
    /// The guest is in the target Pod: it is the VMI's own from now on.
    Arrive,
    /// The other cluster's VMIM is being deleted.
    DeleteSelf,
    /// The finalizer.
    Release,
}

/// Whose turn it is, and what they do.
pub fn decide(seen: &Seen) -> Vec<Action> {
    let (role, now) = (Role::of(seen.vmim), Phase::of(seen.vmim));
    if now.is_final() {
        return afterwards(seen, &role, now);
    }
    let mut actions = Vec::new();
    if seen.peer.cancelled && !is_deleting(seen.vmim) {
        actions.push(Action::DeleteSelf);
    }
    let failure = failure(seen, &role, now);
    match (failure, seen.vmi) {
        (Some(reason), _) => actions.extend(fail(seen, &role, &reason)),
        (None, Some(_)) if is_deleting(seen.vmim) && now == Phase::Running && role.has_source() => {
            actions.push(Action::Abort);
            if state(seen)["abortRequested"] != true {
                actions.push(Action::State(json!({ "abortRequested": true, "abortStatus": "Aborting" })));
            }
            actions.extend(step(seen, &role, now));
        }
        (None, Some(_)) => actions.extend(step(seen, &role, now)),
        (None, None) => {}
    }
    actions
}

fn state<'s>(seen: &'s Seen) -> &'s Value {
    seen.vmi.map_or(&Value::Null, |vmi| &vmi["status"]["migrationState"])
}

/// `migrationState` is this VMIM's.
fn is_ours(seen: &Seen, role: &Role) -> bool {
    let half = if role.has_source() { "sourceState" } else { "targetState" };
    state(seen)[half]["migrationUID"] == uid(seen.vmim)
}

/// Of this attempt.
fn leaving<'s>(seen: &'s Seen) -> &'s Leaving {
    let report = seen.source.and_then(|pod| pod.report.as_ref());
    let ours = report.filter(|report| report.job.as_deref() == Some(uid(seen.vmim)));
    ours.map_or(&Leaving::No, |report| &report.leaving)
}

/// Why it is over before its end (`updateStatus`).
fn failure(seen: &Seen, role: &Role, now: Phase) -> Option<String> {
    let Some(vmi) = seen.vmi else { return Some("Migration failed because vmi does not exist.".into()) };
    let (state, ours) = (state(seen), is_ours(seen, role));
    let target_made = matches!(
        now,
        Phase::Scheduling | Phase::Scheduled | Phase::PreparingTarget | Phase::TargetReady | Phase::Running
    );
    if now == Phase::Unset {
        let other = !state.is_null() && !ours && state["completed"] != true;
        let busy = other && state["migrationUid"].as_str().is_some_and(|uid| !uid.is_empty());
        return busy
            .then(|| "VMI is not eligible for migration because another migration job is in progress.".to_owned());
    }
    if !ours {
        return Some("VMI's migration state was taken over by another migration job during active migration.".into());
    }
    if let Leaving::Failed(reason) = leaving(seen) {
        // virt-launcher's words, whatever libvirt said.
        let aborted = is_deleting(seen.vmim).then(|| "Live migration has been aborted".to_owned());
        return Some(aborted.unwrap_or_else(|| reason.clone()));
    }
    if state["failed"] == true {
        return Some(state["failureReason"].as_str().unwrap_or("source node reported migration failed").to_owned());
    }
    if is_final(phase(vmi)) && !(role.has_source() && now == Phase::Running && *leaving(seen) == Leaving::Done) {
        return Some("Migration failed vmi shutdown during migration.".into());
    }
    if role.has_target() && target_made && seen.target.is_none_or(PodSeen::down) {
        return Some("Migration failed because target pod shutdown during migration".into());
    }
    // Whoever is under way is aborted at the source, and fails of that.
    let under_way = now == Phase::Running;
    (is_deleting(seen.vmim) && !under_way).then(|| "Migration failed due to being canceled".to_owned())
}

fn fail(seen: &Seen, role: &Role, reason: &str) -> Vec<Action> {
    let mut actions = Vec::new();
    if is_ours(seen, role) {
        let aborted = is_deleting(seen.vmim).then_some("Succeeded");
        actions.push(Action::State(json!({
            "failed": true, "completed": true, "failureReason": reason, "endTimestamp": timestamp(), "abortStatus": aborted,
        })));
    }
    if role.has_target() && seen.vmi.is_some() {
        actions.push(Action::TakeBack);
    }
    actions.push(Action::Event { reason: "FailedMigration", message: reason.to_owned() });
    actions.push(Action::Phase(Phase::Failed));
    actions
}

/// Clears up after the end.
fn afterwards(seen: &Seen, role: &Role, now: Phase) -> Vec<Action> {
    let mut actions = Vec::new();
    // A guest that has arrived is not switched off, whatever the source says of the migration.
    let stale = seen.target.filter(|pod| now == Phase::Failed && !pod.deleting && !pod.guest_runs());
    if role.has_target() && stale.is_some() {
        actions.push(Action::DeleteTarget);
    }
    if seen.peer.cancelled && !is_deleting(seen.vmim) && now == Phase::Failed {
        actions.push(Action::DeleteSelf);
    }
    // A target whose peer goes as well has nothing to tell; a source's failure must have reached its target.
    let told = seen.peer.told || seen.peer.cancelled && !role.has_source();
    if is_deleting(seen.vmim) && (now == Phase::Succeeded || *role == Role::Local || told) {
        actions.push(Action::Release);
    }
    actions
}

/// One step forward, if it is due.
fn step(seen: &Seen, role: &Role, now: Phase) -> Vec<Action> {
    let state = state(seen);
    let (source, target) = (&state["sourceState"], &state["targetState"]);
    match now {
        Phase::Unset => begin(seen, role),
        Phase::Synchronizing if !target["migrationUID"].is_null() => vec![Action::Phase(Phase::Pending)],
        Phase::WaitingForSync if !source["pod"].is_null() => vec![Action::Phase(Phase::Pending)],
        Phase::Pending if role.has_target() => match seen.target {
            Some(_) => vec![Action::Phase(Phase::Scheduling)],
            None if seen.age < Quirks::of(seen.vmim).late_target_pod.as_secs() as i64 => Vec::new(),
            None => vec![Action::CreateTarget(Box::new(target_of(seen, role)))],
        },
        Phase::Pending if seen.vmi.is_some_and(|vmi| phase(vmi) == "Running") => {
            vec![Action::State(source_half(seen)), Action::Phase(Phase::Scheduling)]
        }
        Phase::Scheduling => scheduling(seen, role),
        Phase::Scheduled if !state["targetNode"].is_null() => vec![Action::Phase(Phase::PreparingTarget)],
        Phase::PreparingTarget => preparing(seen, role),
        Phase::TargetReady => target_ready(seen, role),
        Phase::Running => running(seen, role),
        Phase::Synchronizing
        | Phase::WaitingForSync
        | Phase::Pending
        | Phase::Scheduled
        | Phase::Succeeded
        | Phase::Failed => Vec::new(),
    }
}

/// Each side's half, empty but for who it is.
fn begin(seen: &Seen, role: &Role) -> Vec<Action> {
    let vmi = seen.vmi.unwrap_or(&Value::Null);
    let me = json!({
        "migrationUID": uid(seen.vmim), "virtualMachineInstanceUID": uid(vmi),
        "domainNamespace": vmi["metadata"]["namespace"],
        "domainName": domain_name(vmi),
    });
    let (state, phase) = match role {
        Role::Source { connect, .. } => {
            (json!({ "sourceState": me, "targetState": { "syncAddress": connect } }), Phase::Synchronizing)
        }
        Role::Target { .. } => (json!({ "targetState": me }), Phase::WaitingForSync),
        Role::Local => {
            let local = vmi["status"]["conditions"]
                .as_array()
                .into_iter()
                .flatten()
                .find(|condition| condition["type"] == "LiveMigratable" && condition["status"] == "False");
            // KubeVirt's admission webhook refuses such a VMIM (`migration-create-admitter.go:59`).
            if let Some(condition) = local {
                let message = condition["message"].as_str().unwrap_or_default().to_owned();
                return vec![Action::Event { reason: "FailedMigration", message }, Action::Phase(Phase::Failed)];
            }
            let mut state = json!({ "sourceState": me.clone(), "targetState": me });
            merge(&mut state, source_half(seen));
            (state, Phase::Pending)
        }
    };
    let mut state = state;
    state["migrationUid"] = uid(seen.vmim).into();
    vec![Action::Begin(state), Action::Phase(phase)]
}

/// JSON merge (RFC 7396), without removals.
fn merge(into: &mut Value, from: Value) {
    json_patch::merge(into, &from);
}

fn domain_name(vmi: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    format!("{}_{}", text(&vmi["metadata"]["namespace"]), text(&vmi["metadata"]["name"]))
}

/// Where the guest is (`updateVMIMigrationSourceWithPodInfo`).
fn source_half(seen: &Seen) -> Value {
    let pod = seen.source.map(|pod| pod.name.clone());
    let node = seen.source.and_then(|pod| pod.node.clone());
    json!({
        "sourcePod": pod, "sourceNode": node,
        "sourceState": { "pod": pod, "node": node, "nodeSelectors": {}, "selinuxContext": "none" },
    })
}

fn target_of(seen: &Seen, role: &Role) -> Target {
    let source_node = match role {
        Role::Target { .. } => state(seen)["sourceState"]["node"].as_str().map(str::to_owned),
        Role::Local | Role::Source { .. } => None,
    };
    Target {
        vmim_name: seen.vmim["metadata"]["name"].as_str().unwrap_or_default().to_owned(),
        vmim_uid: uid(seen.vmim).to_owned(),
        added_node_selector: seen.vmim["spec"]["addedNodeSelector"].as_object().cloned().unwrap_or_default(),
        source_node,
        apart: *role == Role::Local && seen.more_nodes,
    }
}

fn scheduling(seen: &Seen, role: &Role) -> Vec<Action> {
    if !role.has_target() {
        let known = !state(seen)["targetState"]["pod"].is_null();
        return if known { vec![Action::Phase(Phase::Scheduled)] } else { Vec::new() };
    }
    let Some(pod) = seen.target.filter(|pod| pod.phase == "Running" && pod.ready && pod.report.is_some()) else {
        return Vec::new();
    };
    let node = pod.node.clone().unwrap_or_default();
    let half = json!({
        "targetPod": pod.name, "targetNode": node, "targetState": { "pod": pod.name, "node": node },
    });
    vec![Action::State(half), Action::HandOff(node), Action::Phase(Phase::Scheduled)]
}

fn preparing(seen: &Seen, role: &Role) -> Vec<Action> {
    if !role.has_target() {
        let open = !state(seen)["targetState"]["nodeAddress"].is_null();
        return if open { vec![Action::Phase(Phase::TargetReady)] } else { Vec::new() };
    }
    match seen.target.and_then(PodSeen::life) {
        Some(Life::Empty) => vec![Action::PrepareTarget],
        Some(Life::Prepared(ports)) => {
            let address = seen.target.and_then(|pod| pod.address).map(|address| address.to_string());
            let ports = json!({
                ports.libvirt.to_string(): CHANNELS[0], ports.memory.to_string(): CHANNELS[1], ports.disks.to_string(): CHANNELS[2],
            });
            let half = json!({
                "targetNodeAddress": address, "targetDirectMigrationNodePorts": ports,
                "targetState": { "nodeAddress": address, "directMigrationNodePorts": ports },
            });
            vec![Action::State(half), Action::Phase(Phase::TargetReady)]
        }
        Some(
            Life::Starting
            | Life::Running
            | Life::Paused(_)
            | Life::Preparing
            | Life::Incoming
            | Life::Left
            | Life::Ended,
        )
        | None => Vec::new(),
    }
}

fn target_ready(seen: &Seen, role: &Role) -> Vec<Action> {
    let started = !state(seen)["startTimestamp"].is_null();
    if started || !role.has_source() {
        return if started { vec![Action::Phase(Phase::Running)] } else { Vec::new() };
    }
    match (leaving(seen), order(seen, role)) {
        (Leaving::Running | Leaving::Done, _) => {
            vec![Action::State(json!({ "startTimestamp": timestamp(), "mode": "PreCopy" }))]
        }
        (Leaving::No, Some(order)) => vec![Action::Migrate(Box::new(order))],
        (Leaving::No | Leaving::Failed(_), _) => Vec::new(),
    }
}

fn order(seen: &Seen, role: &Role) -> Option<Migrate> {
    let state = state(seen);
    let target = &state["targetState"];
    let port = |channel: u16| -> Option<u16> {
        let ports = target["directMigrationNodePorts"].as_object()?;
        ports.iter().find(|(_, named)| **named == channel)?.0.parse().ok()
    };
    Some(Migrate {
        job: uid(seen.vmim).to_owned(),
        address: target["nodeAddress"].as_str()?.parse().ok()?,
        ports: Ports { libvirt: port(CHANNELS[0])?, memory: port(CHANNELS[1])?, disks: port(CHANNELS[2])? },
        source_uid: state["sourceState"]["virtualMachineInstanceUID"].as_str()?.to_owned(),
        target_uid: target["virtualMachineInstanceUID"].as_str()?.to_owned(),
        target_domain: target["domainName"].as_str()?.to_owned(),
        between_clusters: *role != Role::Local,
    })
}

fn running(seen: &Seen, role: &Role) -> Vec<Action> {
    let state = state(seen);
    let mut actions = Vec::new();
    if role.has_target() && seen.target.is_some_and(PodSeen::guest_runs) && state["completed"] != true {
        let ready = json!({
            "targetNodeDomainReadyTimestamp": timestamp(), "targetNodeDomainDetected": true,
            "targetState": { "domainReadyTimestamp": timestamp(), "domainDetected": true },
            "endTimestamp": timestamp(), "completed": true,
        });
        return vec![Action::State(ready), Action::Arrive];
    }
    let source_done = !role.has_source() || *leaving(seen) == Leaving::Done;
    if source_done && role.has_source() && Quirks::of(seen.vmim).fail_after_switch {
        return fail(seen, role, "a quirk on request: the guest runs at the target");
    }
    // The old Pod may have ended before it was asked.
    if state["completed"] == true && (source_done || seen.source.is_none_or(PodSeen::down)) {
        actions.push(Action::Event {
            reason: "SuccessfulMigration",
            message: "Source node reported migration succeeded".into(),
        });
        actions.push(Action::Phase(Phase::Succeeded));
    }
    actions
}

#[cfg(test)]
#[path = "migration_tests.rs"]
mod tests;
