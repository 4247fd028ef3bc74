//! What a VMI calls for (`pkg/virt-controller/watch/vmi/lifecycle.go`), and what its status says. Pure.

use serde_json::{Map, Value, json};

use crate::render::ClaimVolume;
use crate::seen::{PodSeen, TARGET_NODE_LABEL, is_deleting, is_final, is_receiver, phase};
use crate::talk::{Leaving, Life, Report};

/// The next thing to do; the status is written besides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    CreatePod,
    DeletePods,
    /// All Pods of a VMI that shall go are gone.
    Release,
    Nothing,
}

/// `pods` are all of this VMI, `pod` is the one it is in.
pub fn decide(vmi: &Value, pod: Option<&PodSeen>, pods: &[&PodSeen]) -> Action {
    if is_deleting(vmi) {
        return match pods {
            [] => Action::Release,
            pods if pods.iter().all(|pod| pod.deleting) => Action::Nothing,
            _ => Action::DeletePods,
        };
    }
    match (phase(vmi), pod) {
        ("Pending", None) => Action::CreatePod,
        _ => Action::Nothing,
    }
}

/// The phase that follows, or the one that is.
pub fn next_phase(vmi: &Value, pod: Option<&PodSeen>) -> &'static str {
    let receiver = is_receiver(vmi);
    let handed_off = !vmi["metadata"]["labels"][TARGET_NODE_LABEL].is_null();
    let failed = vmi["status"]["migrationState"]["failed"] == true;
    let ended = pod.filter(|pod| pod.down()).map(|pod| if pod.phase == "Succeeded" { "Succeeded" } else { "Failed" });
    match phase(vmi) {
        "" if receiver => "WaitingForSync",
        "" => "Pending",
        "WaitingForSync" if handed_off && !failed && pod.is_some() => "Scheduled",
        "WaitingForSync" => "WaitingForSync",
        // A target that did not get its guest is a receiver again; one that did is not asked.
        "Scheduled" if receiver => match pod {
            Some(pod) if pod.guest_runs() => "Running",
            Some(pod) if !pod.down() && !failed => "Scheduled",
            Some(_) | None => "WaitingForSync",
        },
        "Pending" if pod.is_none() => "Pending",
        "Succeeded" => "Succeeded",
        "Failed" => "Failed",
        "Running" => match pod {
            None => "Failed",
            Some(_) => ended.unwrap_or("Running"),
        },
        _ => match pod {
            None => "Failed",
            Some(pod) if ended.is_none() && pod.guest_runs() => "Running",
            Some(pod) if pod.phase == "Running" => "Scheduled",
            Some(_) => ended.unwrap_or("Scheduling"),
        },
    }
}

/// `status`, without what migrations write there (`migrationState`, `migratedVolumes`), and `null` where something is over.
pub fn status(vmi: &Value, pod: Option<&PodSeen>, claims: &[ClaimVolume]) -> Value {
    let phase = next_phase(vmi, pod);
    let report = pod.and_then(|pod| pod.report.as_ref());
    let node = pod.and_then(|pod| pod.node.clone());
    let active: Map<String, Value> = pod
        .filter(|pod| !pod.down())
        .and_then(|pod| Some((pod.uid.clone(), pod.node.clone()?.into())))
        .into_iter()
        .collect();
    json!({
        "phase": phase,
        "nodeName": node,
        "activePods": active,
        "runtimeUser": 107,
        "migrationMethod": "BlockMigration",
        "migrationTransport": "Unix",
        "conditions": conditions(vmi, phase, report, claims),
        "fsFreezeStatus": report.filter(|report| report.frozen).map(|_| "frozen"),
        "volumeStatus": claims.iter().map(volume).collect::<Vec<_>>(),
    })
}

fn volume(claim: &ClaimVolume) -> Value {
    json!({ "name": claim.volume, "target": "", "persistentVolumeClaimInfo": {
        "claimName": claim.claim,
        "accessModes": [if claim.shared { "ReadWriteMany" } else { "ReadWriteOnce" }],
        "volumeMode": if claim.block { "Block" } else { "Filesystem" },
        "capacity": { "storage": claim.bytes.to_string() },
    } })
}

fn conditions(vmi: &Value, phase: &str, report: Option<&Report>, claims: &[ClaimVolume]) -> Vec<Value> {
    let condition = |kind: &str, holds: bool, reason: &str, message: &str| {
        let mut condition = json!({ "type": kind, "status": if holds { "True" } else { "False" } });
        if !reason.is_empty() {
            condition["reason"] = reason.into();
            condition["message"] = message.into();
        }
        condition
    };
    let gone = report.is_some_and(|report| report.leaving == Leaving::Done || report.life == Life::Left);
    let running = phase == "Running" && !gone;
    let mut conditions = vec![match running {
        true => condition("Ready", true, "", ""),
        false => condition("Ready", false, "GuestNotRunning", "Guest VM is not reported as running"),
    }];
    if running {
        conditions.push(condition("AgentConnected", true, "", ""));
        let local = claims.iter().find(|claim| !claim.shared);
        conditions.push(match local {
            None => condition("LiveMigratable", true, "", ""),
            Some(claim) => condition(
                "LiveMigratable",
                false,
                "DisksNotLiveMigratable",
                &format!("cannot migrate VMI: PVC {} is not shared", claim.claim),
            ),
        });
    }
    if let Some(Life::Paused(reason)) = report.map(|report| &report.life) {
        let reason = if reason == "I/O error" { "PausedIOError" } else { "PausedByUser" };
        conditions.push(condition("Paused", true, reason, "VMI was paused"));
    }
    if let Some(trouble) = report.and_then(|report| report.trouble.as_ref()) {
        conditions.push(condition("Synchronized", false, "SyncFailed", trouble));
    }
    // The synchronization controller's own condition is kept.
    let kept = vmi["status"]["conditions"].as_array().into_iter().flatten();
    conditions.extend(kept.filter(|condition| condition["type"] == PEER_CONDITION && !is_final(phase)).cloned());
    conditions
}

/// What a synchronization controller that cannot reach its peer writes.
pub const PEER_CONDITION: &str = "DecentralizedLiveMigrationFailure";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seen::RECEIVER_ANNOTATION;

    fn vmi(phase: &str) -> Value {
        json!({ "metadata": { "uid": "1" }, "status": { "phase": phase } })
    }

    fn receiver(phase: &str, handed_off: bool) -> Value {
        let labels = if handed_off { json!({ TARGET_NODE_LABEL: "b-1" }) } else { json!({}) };
        json!({ "metadata": { "annotations": { RECEIVER_ANNOTATION: "true" }, "labels": labels }, "status": { "phase": phase } })
    }

    fn pod(phase: &str, life: Life) -> PodSeen {
        let report = Some(Report { life, ..Report::default() });
        PodSeen { phase: phase.into(), vmi_uid: "1".into(), report, ..PodSeen::default() }
    }

    #[test]
    fn a_vmi_goes_from_its_object_to_a_running_guest_and_to_its_end() {
        let cases = [
            ("", None, "Pending"),
            ("Pending", Some(pod("Pending", Life::Starting)), "Scheduling"),
            ("Scheduling", Some(pod("Running", Life::Starting)), "Scheduled"),
            ("Scheduled", Some(pod("Running", Life::Running)), "Running"),
            ("Running", Some(pod("Running", Life::Starting)), "Running"),
            ("Running", Some(pod("Failed", Life::Ended)), "Failed"),
            ("Running", Some(pod("Succeeded", Life::Ended)), "Succeeded"),
            ("Running", None, "Failed"),
        ];
        for (phase, pod, next) in cases {
            assert_eq!(next_phase(&vmi(phase), pod.as_ref()), next, "{phase} {pod:?}");
        }
        assert_eq!(decide(&vmi("Pending"), None, &[]), Action::CreatePod);
    }

    #[test]
    fn a_receiver_waits_until_its_target_is_handed_over_and_again_when_no_guest_came() {
        let target = |phase, life| Some(pod(phase, life));
        let cases = [
            (receiver("", false), None, "WaitingForSync"),
            (receiver("WaitingForSync", false), target("Running", Life::Empty), "WaitingForSync"),
            (receiver("WaitingForSync", true), target("Running", Life::Empty), "Scheduled"),
            (receiver("Scheduled", true), target("Running", Life::Incoming), "Scheduled"),
            (receiver("Scheduled", true), target("Running", Life::Running), "Running"),
            (receiver("Scheduled", true), target("Failed", Life::Ended), "WaitingForSync"),
            (receiver("Scheduled", true), None, "WaitingForSync"),
        ];
        for (vmi, pod, next) in cases {
            assert_eq!(next_phase(&vmi, pod.as_ref()), next, "{vmi} {pod:?}");
        }
    }

    #[test]
    fn a_vmi_that_shall_go_goes_after_its_pods() {
        let mut vmi = vmi("Running");
        vmi["metadata"]["deletionTimestamp"] = "now".into();
        let mut seen = pod("Running", Life::Running);
        assert_eq!(decide(&vmi, Some(&seen), &[&seen]), Action::DeletePods);
        seen.deleting = true;
        assert_eq!(decide(&vmi, Some(&seen), &[&seen]), Action::Nothing);
        assert_eq!(decide(&vmi, None, &[]), Action::Release);
    }

    #[test]
    fn a_guest_that_has_left_is_no_longer_ready() {
        let left = pod("Running", Life::Left);
        let status = status(&vmi("Running"), Some(&left), &[]);
        assert_eq!(status["phase"], "Running");
        assert_eq!(status["conditions"][0]["status"], "False");
    }
}
