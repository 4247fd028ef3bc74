//! What a pair calls for: a pure, total function of what was seen.
//!
//! Order matters: what the VM's next start needs (Secret, configuration, metadata claim) is there before its template says that it is
//! paired; a VM that restarts in between starts unpaired, never broken.

use std::collections::BTreeMap;

use kube::ResourceExt as _;
use watari_crds::conditions::{Finding, Kind, Reason};
use watari_crds::crossing::Site;
use watari_crds::kubevirt::VirtualMachine;
use watari_crds::names::{annotation, finalizer, label};
use watari_crds::pair::{Phase, SyncPair};
use watari_crds::quantity;
use watari_crds::replica::{AccessMode, ReplicaDisk, ReplicaMetadata, SyncReplicaSpec};
use watari_crds::wiring::{WiredDisk, Wiring};

use super::crossing::{self, Course, course};
use super::disks::{Disk, Refusal, disks};
use super::observe::{Peer, Replica, Seen, Usable};
use super::pair_id;
use super::say::say;
use crate::side::{self, accepts_writes};

/// One thing to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    SetFinalizer,
    /// Secret, ConfigMap, Service and metadata claim at this site.
    Furnish(Box<Furniture>),
    /// Label and annotation of the VM's template.
    WireVm(Wiring),
    /// The SyncReplica at the peer.
    ApplyReplica(Box<SyncReplicaSpec>),
    /// Interval, limit and pause of the running sidecar.
    Configure,
    UnwireVm,
    DeleteReplica,
    /// Everything of [`Step::Furnish`].
    Unfurnish,
    /// Our own Pod on the home's claims, while the VM is not here.
    MakeHolder(Box<Holding>),
    EndHolder,
    /// A part of a move that concerns the VM at home.
    Cross(side::Step),
    RemoveFinalizer,
}

/// What lies at this site for a pair.
#[derive(Clone, Debug, PartialEq)]
pub struct Furniture {
    pub disks: Vec<Disk>,
    pub metadata_bytes: i64,
    pub access: AccessMode,
    pub class: Option<String>,
    pub gateways: Vec<String>,
    pub peer_authorities: String,
}

/// The Pod of [`Step::MakeHolder`].
#[derive(Clone, Debug, PartialEq)]
pub struct Holding {
    pub furniture: Furniture,
    pub node_selector: BTreeMap<String, String>,
}

/// What to do and what to say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    pub steps: Vec<Step>,
    pub findings: Vec<Finding>,
    pub phase: Phase,
    /// `None`: as before.
    pub course: Option<Course>,
    pub finished: bool,
}

/// Decides for the operator of `site`.
pub fn decide(pair: &SyncPair, site: &str, seen: &Seen) -> Decision {
    if pair.metadata.deletion_timestamp.is_some() {
        return remove(pair, seen);
    }
    match plan(pair, site, seen) {
        Ok(plan) => plan,
        Err(refusal) => stalled(refusal),
    }
}

fn plan(pair: &SyncPair, site: &str, seen: &Seen) -> Result<Decision, Refusal> {
    let usable = match &seen.peer {
        Peer::Missing => {
            return Err(refusal(Reason::PeerNotReady, format!("There is no PeerCluster {}.", pair.spec.peer)));
        }
        Peer::Unusable(why) => return Ok(peer_away(pair, seen, why)),
        Peer::Usable(usable) => usable,
    };
    let gateways = gateways(usable);
    if gateways.is_empty() {
        return Err(refusal(Reason::PeerNotReady, "The peer has no gateway.".to_owned()));
    }
    if seen.own_gateway.is_empty() {
        let text = "This site has no gateway (`gateway.address` in the chart's values); the way back needs one.";
        return Err(refusal(Reason::PeerNotReady, text.to_owned()));
    }
    let vm = seen.vm.as_ref().ok_or_else(|| {
        refusal(Reason::VmMissing, format!("There is no VirtualMachine {} in this namespace.", pair.spec.vm_name))
    })?;
    if let Replica::Found(found) = &seen.replica
        && found.spec.pair_id != pair_id(pair)
    {
        let text =
            format!("At the peer {} is the replica of another pair ({}).", found.name_any(), found.spec.pair_name);
        return Err(refusal(Reason::DiskUnsuitable, text));
    }
    let disks = disks(&pair.spec, vm, &seen.claims, &sizes(pair, seen), &usable.cluster.spec.storage_classes)?;
    let metadata_bytes = metadata_bytes(pair)?;
    let wiring = wiring(pair, &disks);
    let first = disks.first().expect("`disks` refuses none");
    let mut steps = Vec::new();
    if !pair.finalizers().iter().any(|it| it == finalizer::PAIR) {
        steps.push(Step::SetFinalizer);
    }
    let furniture = Furniture {
        disks: disks.clone(),
        metadata_bytes,
        access: first.access,
        class: first.class.clone(),
        gateways,
        peer_authorities: usable.card.authorities.clone(),
    };
    steps.push(Step::Furnish(Box::new(furniture.clone())));
    if template_wiring(seen) != Some(wiring.to_annotation().as_str()) {
        steps.push(Step::WireVm(wiring));
    }
    let course = course(pair, seen);
    let wanted = replica_spec(pair, site, seen, &disks, metadata_bytes, &course)?;
    let waits_for_size = wanted.is_none();
    match (wanted, &seen.replica) {
        (Some(wanted), Replica::Found(found)) if found.spec.of_the_home() == wanted => {}
        (Some(wanted), Replica::Found(_) | Replica::None) => steps.push(Step::ApplyReplica(Box::new(wanted))),
        (None, _) | (_, Replica::Unknown) => {}
    }
    if seen.side.role().is_some_and(accepts_writes) {
        steps.push(Step::Configure);
    }
    steps.extend(hold(pair, site, seen, &course, furniture, vm));
    steps.extend(course.steps.iter().cloned().map(Step::Cross));
    let (phase, mut findings) = say(pair, seen, &course, waits_for_size);
    findings.extend([course.site_differs(), course.divergence()]);
    Ok(Decision { steps, findings, phase, course: Some(course), finished: false })
}

/// Our own Pod at home, as it should be.
fn hold(
    pair: &SyncPair,
    site: &str,
    seen: &Seen,
    course: &Course,
    furniture: Furniture,
    vm: &VirtualMachine,
) -> Option<Step> {
    let holding = Holding { furniture, node_selector: vm.spec.template.spec.node_selector.clone() };
    match (&seen.holder, course.wants_holder(seen)) {
        (None, true) => Some(Step::MakeHolder(Box::new(holding))),
        (Some(pod), true) if !pod.deleting => {
            let other = pod.made_from != holding.holder(pair, site).made_from();
            (other || pod.has_ended()).then_some(Step::EndHolder)
        }
        (Some(pod), false) if !pod.deleting => Some(Step::EndHolder),
        (None, false) | (Some(_), _) => None,
    }
}

/// Where the peer's gateway is: as a person says, else as the peer does.
fn gateways(usable: &Usable) -> Vec<String> {
    match (usable.cluster.spec.gateways.as_slice(), usable.card.gateway.as_str()) {
        ([], "") => Vec::new(),
        ([], address) => vec![address.to_owned()],
        (given, _) => given.to_vec(),
    }
}

/// What a sidecar said of the disks' sizes: now, or before.
fn sizes(pair: &SyncPair, seen: &Seen) -> BTreeMap<String, i64> {
    let before = pair.status.iter().flat_map(|status| &status.disks).map(|disk| (disk.name.clone(), disk.size_bytes));
    let now = seen.side.report.iter().flat_map(|report| &report.disks);
    let now = now.filter_map(|disk| Some((disk.name.clone(), i64::try_from(disk.size_bytes).ok()?)));
    before.chain(now).filter(|(_, size)| *size > 0).collect()
}

fn metadata_bytes(pair: &SyncPair) -> Result<i64, Refusal> {
    let bytes = quantity::parse(&pair.spec.metadata.size);
    let bytes = bytes.map_err(|error| refusal(Reason::DiskUnsuitable, format!("metadata.size: {error}.")))?;
    Ok(i64::try_from(bytes).expect("quantities of ours fit"))
}

fn wiring(pair: &SyncPair, disks: &[Disk]) -> Wiring {
    let wired = |disk: &Disk| WiredDisk { name: disk.name.clone(), mode: disk.mode };
    Wiring { pair_id: pair_id(pair), disks: disks.iter().map(wired).collect() }
}

/// What the VM's template says; only together with the label does it count.
fn template_wiring(seen: &Seen) -> Option<&str> {
    let metadata = &seen.vm.as_ref()?.spec.template.metadata;
    metadata.labels.get(label::PAIR)?;
    metadata.annotations.get(annotation::WIRING).map(String::as_str)
}

/// `None`: the size of a disk is not known yet.
fn replica_spec(
    pair: &SyncPair,
    site: &str,
    seen: &Seen,
    disks: &[Disk],
    metadata_bytes: i64,
    course: &Course,
) -> Result<Option<SyncReplicaSpec>, Refusal> {
    let Peer::Usable(usable) = &seen.peer else { return Ok(None) };
    let Some(vm) = &seen.vm else { return Ok(None) };
    let replica_disk = |disk: &Disk| {
        Some(ReplicaDisk {
            name: disk.name.clone(),
            claim: disk.claim.clone(),
            size_bytes: disk.size_bytes?,
            claim_bytes: disk.claim_bytes,
            mode: disk.mode,
            access: disk.access,
            storage_class: disk.target_class.clone(),
        })
    };
    let Some(replica_disks) = disks.iter().map(replica_disk).collect::<Option<Vec<_>>>() else { return Ok(None) };
    let bandwidth = pair.spec.bandwidth.as_deref().map(quantity::parse).transpose();
    let bandwidth = bandwidth.map_err(|error| refusal(Reason::DiskUnsuitable, format!("bandwidth: {error}.")))?;
    let first = &replica_disks[0];
    let metadata = ReplicaMetadata {
        size_bytes: metadata_bytes,
        access: first.access,
        storage_class: first.storage_class.clone(),
    };
    Ok(Some(SyncReplicaSpec {
        pair_id: pair_id(pair),
        pair_name: format!("{}/{}", pair.namespace().unwrap_or_default(), pair.name_any()),
        vm_name: pair.spec.vm_name.clone(),
        home_site: site.to_owned(),
        site: usable.card.site.clone(),
        metadata,
        disks: replica_disks,
        interval: pair.spec.interval,
        retention: pair.spec.retention.clone(),
        bandwidth_bits_per_second: bandwidth.and_then(|bits| i64::try_from(bits).ok()),
        home_gateways: vec![seen.own_gateway.clone()],
        home_authorities: seen.own_authorities.clone(),
        node_selector: vm.spec.template.spec.node_selector.clone(),
        vm: crossing::definition(seen, course.active),
        home_migration: seen.side.kubevirt.as_ref().map(|kubevirt| kubevirt.end.clone()),
        crossing: course.crossing.clone(),
        moves: course.moves,
        promote: None,
    }))
}

/// A peer that cannot be used at the moment takes nothing back: what is here stays as it is.
fn peer_away(pair: &SyncPair, seen: &Seen, why: &str) -> Decision {
    let course = course(pair, seen);
    let (phase, mut findings) = say(pair, seen, &course, false);
    let text = format!("The peer cannot be used now: {why}");
    for finding in findings.iter_mut().filter(|finding| finding.kind == Kind::Reconciling) {
        *finding = Finding::new(Kind::Reconciling, true, Reason::PeerNotReady, text.clone());
    }
    if seen.side.report.is_none() {
        findings.retain(|finding| finding.kind != Kind::Ready);
        findings.push(Finding::new(Kind::Ready, false, Reason::PeerNotReady, text));
    }
    // What KubeVirt has been told already goes on, and this side may have to ask for the right to write.
    let steps = course.steps.iter().cloned().map(Step::Cross).collect();
    findings.extend([course.site_differs(), course.divergence()]);
    Decision { steps, findings, phase, course: Some(course), ..Decision::default() }
}

/// First the VM's next start is set free, then the replica goes; what the running VM still uses goes last.
fn remove(pair: &SyncPair, seen: &Seen) -> Decision {
    if !pair.finalizers().iter().any(|it| it == finalizer::PAIR) {
        return Decision { finished: true, ..Decision::default() };
    }
    if pair.status.as_ref().is_some_and(|status| status.active_site == Site::Peer) {
        let text = "The VM is active at the peer, and its disks here are the replica: nothing is taken apart.";
        return stalled(refusal(Reason::ActiveElsewhere, text.to_owned()));
    }
    let mut steps = Vec::new();
    if template_wiring(seen).is_some() {
        steps.push(Step::UnwireVm);
    }
    let replica_gone = match (&seen.replica, &seen.peer) {
        (Replica::Found(found), _) if found.spec.pair_id == pair_id(pair) => {
            steps.push(Step::DeleteReplica);
            false
        }
        (Replica::Found(_) | Replica::None, _) | (Replica::Unknown, Peer::Missing) => true,
        (Replica::Unknown, Peer::Unusable(_) | Peer::Usable(_)) => false,
    };
    let wired = seen.side.launcher.as_ref().is_some_and(|pod| pod.wired);
    if !wired {
        steps.push(Step::Unfurnish);
    }
    if replica_gone && !wired {
        steps.push(Step::RemoveFinalizer);
        return Decision { steps, finished: true, ..Decision::default() };
    }
    let text = match (wired, replica_gone) {
        (true, _) => "The running VM still uses its sidecar; what belongs to it goes when the VM has stopped.",
        (false, true) => "It is going.",
        (false, false) => "The replica at the peer is going, or the peer does not answer.",
    };
    let restart = if wired { Reason::NotWired } else { Reason::AsAsked };
    let findings = vec![
        Finding::new(Kind::Ready, false, Reason::Preparing, text),
        Finding::new(Kind::Reconciling, true, Reason::Preparing, text),
        Finding::new(Kind::Stalled, false, Reason::AsAsked, ""),
        Finding::new(Kind::RestartRequired, wired, restart, if wired { text } else { "" }),
    ];
    Decision { steps, findings, phase: Phase::Deleting, ..Decision::default() }
}

fn refusal(reason: Reason, message: String) -> Refusal {
    Refusal { reason, message }
}

fn stalled(refusal: Refusal) -> Decision {
    let Refusal { reason, message } = refusal;
    let findings = vec![
        Finding::new(Kind::Ready, false, reason, message.clone()),
        Finding::new(Kind::Reconciling, false, reason, message.clone()),
        Finding::new(Kind::Stalled, true, reason, message),
    ];
    Decision { findings, phase: Phase::Pending, ..Decision::default() }
}

#[cfg(test)]
#[path = "decide_tests.rs"]
pub mod tests;
