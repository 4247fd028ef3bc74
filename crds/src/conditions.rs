//! Conditions of our objects: their types and reasons are enums, each documented with what a person should do next.
//!
//! kstatus semantics, so that GitOps tools wait correctly: `Ready` says whether the object does what it was asked to,
//! `Reconciling` that it is being worked on, `Stalled` that it will not go on without a person. The list is a map keyed by type.
//! A condition's message ends with the reason's [`Reason::next_step`], where there is one.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strum::{EnumIter, EnumMessage, IntoStaticStr};

/// One condition, with the fields of Kubernetes' own `metav1.Condition`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    #[serde(rename = "type")]
    pub kind: String,
    pub status: Status,
    /// When `status` changed last.
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub last_transition_time: Timestamp,
    /// Generation of the object that this speaks of.
    #[serde(default)]
    pub observed_generation: i64,
    pub reason: String,
    pub message: String,
}

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Status {
    True,
    False,
    Unknown,
}

/// The types of conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, EnumIter, EnumMessage, IntoStaticStr)]
pub enum Kind {
    /// The object does what it was asked to. SyncPair: a whole generation is at the peer and changes follow. PeerCluster: pairs can use
    /// it. SyncReplica: it receives.
    Ready,
    /// It is being worked on; nothing to do but wait. Its message says for what.
    Reconciling,
    /// It does not go on by itself; the message says what is missing.
    Stalled,
    /// SyncPair: the VM must be restarted before the pair can do what is asked; Watari never does it by itself.
    RestartRequired,
    /// SyncPair: the running VM's sidecar says something that a person should know.
    Attention,
    /// SyncPair: the VM is not where `activeSite` wants it, and nothing moves because `atMove` is not `status.moves`. SyncReplica: the same of
    /// `promote`.
    SiteDiffers,
    /// SyncPair: after a failover the home holds writes that the peer never had.
    Diverged,
}

/// Why a condition is as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, EnumIter, EnumMessage, IntoStaticStr)]
pub enum Reason {
    /// All is as it should be.
    AsAsked,
    /// The peer's API server does not answer, or refuses us.
    PeerUnreachable,
    /// The Secret with the peer's kubeconfig is missing or cannot be read.
    KubeconfigInvalid,
    /// The peer's operator has not said anything about its site.
    PeerSilent,
    /// The peer calls itself by another site name, or by ours.
    SiteNameWrong,
    /// Something that a live migration needs is missing at one of the sites; pairs synchronise without it.
    MoveNotPossible,
    /// The PeerCluster that a pair names does not exist or is not ready.
    PeerNotReady,
    /// The VM that a pair names does not exist.
    VmMissing,
    /// The VM has no disk that can be synchronised.
    NoDisks,
    /// A disk cannot be synchronised; the message says which, and why.
    DiskUnsuitable,
    /// The peer's cluster does not know a field that was sent to it.
    PeerTooOld,
    /// Objects of the pair are being made at one of the sites.
    Preparing,
    /// The VM runs without its sidecar.
    NotWired,
    /// The VM is stopped, or its Pod is not there yet; the replica keeps what it has.
    VmNotRunning,
    /// The sidecar of the VM does not answer.
    SidecarSilent,
    /// The first whole generation is on its way.
    Synchronizing,
    /// The sidecar has no connection to the peer's.
    LinkDown,
    /// The pair was paused by a person.
    Paused,
    /// The replica's Pod does not run.
    ReplicaNotRunning,
    /// A claim that belongs to the replica is missing although it was made: its content is gone.
    ClaimLost,
    /// The SyncReplica was written for another site than this.
    NotForThisSite,
    /// A sidecar reports a condition of its own; the message repeats it.
    SidecarReports,
    /// The operator could not do something and tries again; the message says what.
    Retrying,
    /// The VM is on its way to the other site.
    Moving,
    /// An attempt to move the VM failed; it runs where it was.
    MoveFailed,
    /// The VM is active at the other site.
    ActiveElsewhere,
    /// `activeSite` was written when the VM had another history: `atMove` is not `status.moves`.
    AtMoveDiffers,
    /// `promote` was written when the VM had another history: `promote.atMove` is not `status.moves`.
    PromoteDiffers,
    /// The home went on alone while the peer was promoted; its disks are kept until a person lets them be overwritten.
    WroteAlone,
}

impl Kind {
    /// As written in `type`: the variant's own name.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

impl Reason {
    /// As written in `reason`: the variant's own name.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// What a person should do next; empty when there is nothing to do.
    pub fn next_step(self) -> &'static str {
        match self {
            Reason::AsAsked | Reason::Preparing | Reason::Synchronizing | Reason::Moving => "",
            Reason::PeerUnreachable => {
                "Check that the server in the peer's kubeconfig is reachable from here and that its token is valid; `kubectl watari connect` renews it."
            }
            Reason::KubeconfigInvalid => {
                "Run `kubectl watari connect`, or make the Secret that `spec.kubeconfigSecret` names, with the label app.kubernetes.io/managed-by=watari and the key `kubeconfig`."
            }
            Reason::PeerSilent => "Install the chart at the peer, and see that its operator runs.",
            Reason::SiteNameWrong => {
                "Give each cluster a `site` of its own in the chart's values, and write the peer's into `spec.site`."
            }
            Reason::MoveNotPossible => "See status.missing: each entry has its remedy.",
            Reason::PeerNotReady => "Look at the PeerCluster's own conditions.",
            Reason::VmMissing => "Create the VirtualMachine, or correct `spec.vmName` by making a new SyncPair.",
            Reason::NoDisks => "Only volumes of claims and DataVolumes are synchronised; give the VM one.",
            Reason::DiskUnsuitable => {
                "Change the disk as the message says, or list the disks to synchronise in `spec.disks`."
            }
            Reason::PeerTooOld => "Upgrade the chart and its definitions at the peer.",
            Reason::NotWired => "Restart the VM when it suits you: `virtctl restart`.",
            Reason::VmNotRunning => "Start the VM to synchronise what it writes.",
            Reason::SidecarSilent => "See the log of the container `watari` in the VM's virt-launcher Pod.",
            Reason::LinkDown => "Check the gateway's address in the PeerCluster, and that both gateways run.",
            Reason::Paused => "Set `spec.paused` to false to go on.",
            Reason::ReplicaNotRunning => "See the events of the replica's Pod at the peer.",
            Reason::ClaimLost => {
                "The replica's content is gone. Delete and make the SyncPair anew to synchronise from the beginning."
            }
            Reason::NotForThisSite => {
                "Correct the PeerCluster's kubeconfig at the pair's home: it leads to the wrong cluster."
            }
            Reason::SidecarReports => "",
            Reason::Retrying => "If it stays, see the operator's log.",
            Reason::MoveFailed => {
                "It is tried again by itself; to give it up set `spec.activeSite` to where the VM is."
            }
            Reason::ActiveElsewhere => {
                "Move it home first: set `spec.activeSite` to Source and `spec.atMove` to `status.moves`."
            }
            Reason::AtMoveDiffers => {
                "To move the VM set `spec.atMove` to `status.moves` (or run `kubectl watari cutover`); to leave it, set `spec.activeSite` to `status.activeSite`."
            }
            Reason::PromoteDiffers => {
                "Look where the VM runs; if it must go on here, run `kubectl watari failover`, which writes the right `promote.atMove`."
            }
            Reason::WroteAlone => {
                "Copy what you need (docs/a-disaster.md), then set `spec.overwriteDiverged.atMove` to `status.moves`: the home becomes the replica."
            }
        }
    }
}

/// What a controller found about one type; becomes a [`Condition`] when it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub kind: Kind,
    pub status: Status,
    pub reason: Reason,
    /// What is the case, in a sentence; the next step is added.
    pub message: String,
}

impl Finding {
    pub fn new(kind: Kind, status: bool, reason: Reason, message: impl Into<String>) -> Finding {
        let status = if status { Status::True } else { Status::False };
        Finding { kind, status, reason, message: message.into() }
    }

    /// The message and the reason's next step.
    pub fn words(&self) -> String {
        format!("{} {}", self.message, self.reason.next_step()).trim().to_owned()
    }

    /// Nothing is to be said beyond the condition itself.
    pub fn is_as_asked(&self) -> bool {
        self.reason == Reason::AsAsked
    }
}

/// The list as it shall be written: findings replace what was there, the transition time moves only with the status.
/// Types that are not found any more disappear.
pub fn merged(before: &[Condition], findings: &[Finding], generation: i64, now: Timestamp) -> Vec<Condition> {
    let condition = |finding: &Finding| {
        let kind = finding.kind.name();
        let same = before.iter().find(|old| old.kind == kind && old.status == finding.status);
        Condition {
            kind: kind.to_owned(),
            status: finding.status,
            last_transition_time: same.map_or(now, |old| old.last_transition_time),
            observed_generation: generation,
            reason: finding.reason.name().to_owned(),
            message: finding.words(),
        }
    };
    findings.iter().map(condition).collect()
}

/// Those of `findings` that say something else than `before`: another status or another reason.
pub fn changed<'a>(before: &[Condition], findings: &'a [Finding]) -> Vec<&'a Finding> {
    let said = |finding: &&Finding| {
        let (kind, reason) = (finding.kind.name(), finding.reason.name());
        before.iter().any(|old| old.kind == kind && old.status == finding.status && old.reason == reason)
    };
    findings.iter().filter(|finding| !said(finding)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("a small number")
    }

    #[test]
    fn the_transition_time_moves_only_when_the_status_changes() {
        let ready = |status, message| [Finding::new(Kind::Ready, status, Reason::AsAsked, message)];
        let first = merged(&[], &ready(false, "not yet"), 1, at(10));
        let second = merged(&first, &ready(false, "still not"), 2, at(20));
        assert_eq!((second[0].last_transition_time, second[0].observed_generation), (at(10), 2));
        assert_eq!(merged(&second, &ready(true, "now"), 2, at(30))[0].last_transition_time, at(30));
    }

    #[test]
    fn a_message_ends_with_what_to_do_next() {
        let finding = Finding::new(Kind::RestartRequired, true, Reason::NotWired, "The VM runs without its sidecar.");
        let written = merged(&[], &[finding], 1, at(0));
        assert_eq!(
            written[0].message,
            "The VM runs without its sidecar. Restart the VM when it suits you: `virtctl restart`."
        );
    }

    #[test]
    fn only_what_says_something_new_has_changed() {
        let finding = |kind, status, reason| Finding::new(kind, status, reason, "Words.");
        let before =
            [finding(Kind::Ready, false, Reason::Synchronizing), finding(Kind::Stalled, false, Reason::AsAsked)];
        let before = merged(&[], &before, 1, at(0));
        let reworded = Finding { message: "Other words.".to_owned(), ..finding(Kind::Stalled, false, Reason::AsAsked) };
        let now = [
            finding(Kind::Ready, false, Reason::LinkDown),
            reworded,
            finding(Kind::Attention, true, Reason::SidecarReports),
        ];
        let changed: Vec<Kind> = changed(&before, &now).iter().map(|finding| finding.kind).collect();
        assert_eq!(changed, [Kind::Ready, Kind::Attention]);
    }
}
