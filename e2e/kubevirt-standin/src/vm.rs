//! What a VM calls for (`pkg/virt-controller/watch/vm`, `syncRunStrategy`). Pure.

use serde_json::{Value, json};

use crate::seen::{
    RECEIVER_ANNOTATION, RESTORE_ANNOTATION, is_decentralized, is_deleting, is_final, is_receiver, phase,
};

/// Keeps a VMI until its Pods are gone (`VirtualMachineInstanceFinalizer`).
pub const VMI_FINALIZER: &str = "kubevirt.io/foregroundDeleteVirtualMachine";

/// The next thing to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    CreateVmi(Box<Value>),
    DeleteVmi,
    RunStrategy(String),
    Nothing,
}

/// Run strategies that are played.
enum Strategy {
    Always,
    RerunOnFailure,
    Halted,
    WaitAsReceiver,
    /// The VM is left as it is.
    Other,
}

impl Strategy {
    fn of(vm: &Value) -> Strategy {
        match vm["spec"]["runStrategy"].as_str().unwrap_or_default() {
            "Always" => Strategy::Always,
            "RerunOnFailure" => Strategy::RerunOnFailure,
            "Halted" => Strategy::Halted,
            "WaitAsReceiver" => Strategy::WaitAsReceiver,
            _ => Strategy::Other,
        }
    }
}

pub fn decide(vm: &Value, vmi: Option<&Value>) -> Action {
    let strategy = Strategy::of(vm);
    if is_deleting(vm) {
        return Action::Nothing;
    }
    let Some(vmi) = vmi else {
        return match strategy {
            Strategy::Always | Strategy::RerunOnFailure => Action::CreateVmi(Box::new(vmi_of(vm, false))),
            Strategy::WaitAsReceiver => Action::CreateVmi(Box::new(vmi_of(vm, true))),
            Strategy::Halted | Strategy::Other => Action::Nothing,
        };
    };
    if is_deleting(vmi) {
        return Action::Nothing;
    }
    let state = &vmi["status"]["migrationState"];
    let completed = state["completed"] == true;
    match strategy {
        Strategy::Halted => Action::DeleteVmi,
        // The guest lives elsewhere now; whether it does is known a little later (`vm.go:988`, which does not ask either whether the
        // migration is called a failure).
        Strategy::Always if is_final(phase(vmi)) && is_decentralized(vmi) => match completed {
            true => Action::RunStrategy("Halted".into()),
            false => Action::Nothing,
        },
        Strategy::Always if is_final(phase(vmi)) => Action::DeleteVmi,
        // An end in good order is taken for an answer.
        Strategy::RerunOnFailure if phase(vmi) == "Failed" => Action::DeleteVmi,
        Strategy::WaitAsReceiver if !is_receiver(vmi) && completed && !failed(state) => {
            let restored = vm["metadata"]["annotations"][RESTORE_ANNOTATION].as_str();
            restored.map_or(Action::Nothing, |strategy| Action::RunStrategy(strategy.to_owned()))
        }
        Strategy::Always | Strategy::RerunOnFailure | Strategy::WaitAsReceiver | Strategy::Other => Action::Nothing,
    }
}

fn failed(state: &Value) -> bool {
    state["failed"] == true
}

/// `status` of the VM.
pub fn status(vm: &Value, vmi: Option<&Value>, migrating: bool) -> Value {
    let phase = vmi.map(phase);
    let printable = match phase {
        None | Some("WaitingForSync") if matches!(Strategy::of(vm), Strategy::WaitAsReceiver) => "WaitingForReceiver",
        None => "Stopped",
        Some(_) if vmi.is_some_and(is_deleting) => "Stopping",
        Some("Running") if migrating => "Migrating",
        Some("Running") => "Running",
        Some(phase) if is_final(phase) => "Stopped",
        Some(_) => "Starting",
    };
    json!({ "created": phase.is_some(), "ready": phase == Some("Running"), "printableStatus": printable })
}

/// The VMI that a VM's template describes.
fn vmi_of(vm: &Value, receiver: bool) -> Value {
    let (metadata, template) = (&vm["metadata"], &vm["spec"]["template"]);
    let mut annotations = template["metadata"]["annotations"].as_object().cloned().unwrap_or_default();
    if receiver {
        annotations.insert(RECEIVER_ANNOTATION.into(), "true".into());
    }
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": {
            "name": metadata["name"], "namespace": metadata["namespace"], "finalizers": [VMI_FINALIZER],
            "labels": template["metadata"]["labels"], "annotations": annotations,
            "ownerReferences": [{
                "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "name": metadata["name"], "uid": metadata["uid"],
                "controller": true, "blockOwnerDeletion": true,
            }],
        },
        "spec": template["spec"],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(strategy: &str) -> Value {
        json!({ "metadata": { "annotations": { RESTORE_ANNOTATION: "Always" } }, "spec": { "runStrategy": strategy } })
    }

    fn vmi(phase: &str) -> Value {
        json!({ "metadata": {}, "status": { "phase": phase } })
    }

    fn moved(phase: &str, completed: bool) -> Value {
        let state =
            json!({ "sourceState": {}, "targetState": { "syncAddress": "1.2.3.4:9185" }, "completed": completed });
        json!({ "metadata": {}, "status": { "phase": phase, "migrationState": state } })
    }

    #[test]
    fn a_vm_that_is_to_run_is_made_and_made_again_after_its_end() {
        assert!(matches!(decide(&vm("Always"), None), Action::CreateVmi(_)));
        assert_eq!(decide(&vm("Always"), Some(&vmi("Running"))), Action::Nothing);
        assert_eq!(decide(&vm("Always"), Some(&vmi("Failed"))), Action::DeleteVmi);
        assert_eq!(decide(&vm("RerunOnFailure"), Some(&vmi("Failed"))), Action::DeleteVmi);
        assert_eq!(decide(&vm("RerunOnFailure"), Some(&vmi("Succeeded"))), Action::Nothing);
        assert_eq!(decide(&vm("Halted"), Some(&vmi("Running"))), Action::DeleteVmi);
        assert_eq!(decide(&vm("Halted"), None), Action::Nothing);
    }

    #[test]
    fn a_vm_whose_guest_left_for_another_cluster_is_halted_instead_of_started_again() {
        assert_eq!(decide(&vm("Always"), Some(&moved("Succeeded", true))), Action::RunStrategy("Halted".into()));
        assert_eq!(decide(&vm("Always"), Some(&moved("Succeeded", false))), Action::Nothing);
    }

    #[test]
    fn a_receiver_waits_and_gets_its_own_run_strategy_back_when_the_guest_has_come() {
        let Action::CreateVmi(made) = decide(&vm("WaitAsReceiver"), None) else { panic!("it needs a VMI") };
        assert!(is_receiver(&made));
        assert_eq!(decide(&vm("WaitAsReceiver"), Some(&made)), Action::Nothing);
        assert_eq!(decide(&vm("WaitAsReceiver"), Some(&moved("Running", true))), Action::RunStrategy("Always".into()));
    }

    #[test]
    fn the_printable_status_says_what_the_vm_waits_for() {
        let printable = |strategy, vmi: Option<Value>, migrating| {
            status(&vm(strategy), vmi.as_ref(), migrating)["printableStatus"].as_str().unwrap().to_owned()
        };
        assert_eq!(printable("WaitAsReceiver", Some(vmi("WaitingForSync")), false), "WaitingForReceiver");
        assert_eq!(printable("Always", Some(vmi("Running")), true), "Migrating");
        assert_eq!(printable("Always", Some(vmi("Scheduled")), false), "Starting");
        assert_eq!(printable("Halted", None, false), "Stopped");
    }
}
