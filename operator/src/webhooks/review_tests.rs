#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;
use crate::webhooks::fixtures::{PAIR, pod, settings, vmi};
use crate::webhooks::placement::Placement;

fn knowledge() -> Knowledge {
    Knowledge { settings: settings(), placements: Placements::default() }
}

/// As the API server asks.
fn review(object: Value, resource: &str) -> AdmissionReview<DynamicObject> {
    let group = if resource == "pods" { "" } else { "kubevirt.io" };
    serde_json::from_value(json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
            "kind": { "group": group, "version": "v1", "kind": object["kind"] },
            "resource": { "group": group, "version": "v1", "resource": resource },
            "name": "", "namespace": "default", "operation": "CREATE",
            "userInfo": { "username": "system:serviceaccount:kubevirt:kubevirt-controller" },
            "object": object, "oldObject": null, "dryRun": false, "options": null,
        },
    }))
    .unwrap()
}

fn response(review: AdmissionReview<DynamicObject>) -> Value {
    let response = serde_json::to_value(review).unwrap()["response"].clone();
    assert_eq!(response["uid"], "705ab4f5-6393-11e8-b7cc-42010a800002");
    response
}

/// The patch of a response, applied.
fn patched(mut object: Value, response: &Value) -> Value {
    assert_eq!((&response["allowed"], &response["patchType"]), (&json!(true), &json!("JSONPatch")), "{response}");
    // Bytes as a list of numbers, which Go reads into its own bytes as it reads base64.
    let text: Vec<u8> = serde_json::from_value(response["patch"].clone()).unwrap();
    let patch: json_patch::Patch = serde_json::from_slice(&text).unwrap();
    json_patch::patch(&mut object, &patch).unwrap();
    object
}

#[test]
fn the_patch_makes_what_the_function_makes_and_leaves_unknown_fields_alone() {
    let mut object = pod();
    object["spec"]["someday"] = json!({ "new": [1, 2] });
    let answered = response(answer(Hook::MutatePod, review(object.clone(), "pods"), &knowledge()));
    let mut expected = object.clone();
    crate::webhooks::pod::wire(&mut expected, &settings()).unwrap();
    assert_eq!(patched(object, &answered), expected);
    assert_eq!(expected["spec"]["someday"], json!({ "new": [1, 2] }));
    let object = vmi();
    let answered = response(answer(Hook::MutateVmi, review(object.clone(), "virtualmachineinstances"), &knowledge()));
    assert_eq!(patched(object, &answered)["metadata"]["annotations"]["watari.io/wired"], "true");
}

#[test]
fn what_is_wired_already_is_allowed_without_a_patch() {
    let mut object = pod();
    crate::webhooks::pod::wire(&mut object, &settings()).unwrap();
    let answered = response(answer(Hook::MutatePod, review(object, "pods"), &knowledge()));
    assert_eq!((&answered["allowed"], &answered["patch"]), (&json!(true), &Value::Null));
}

#[test]
fn a_refusal_carries_words_for_people() {
    let knowledge = knowledge();
    let elsewhere =
        Placement::Elsewhere { active_site: "tokyo".to_owned(), role_here: "Replica".to_owned(), sync_pair: None };
    knowledge.placements.set(PAIR, elsewhere);
    let answered = response(answer(Hook::ValidateVmi, review(vmi(), "virtualmachineinstances"), &knowledge));
    assert_eq!(answered["allowed"], false);
    assert!(
        answered["status"]["message"].as_str().unwrap().contains("watari: this VM is active at site tokyo"),
        "{answered}"
    );
}
