//! Admission: wiring of paired VMs, and refusal of a VM that is active elsewhere.
//!
//! ```text
//!   VMI  ──▶ vmi::wire       adds the hook sidecar to the annotation, a disk that KubeVirt can copy where there is none
//!        ──▶ vmi::judge      refuses a VMI whose pair is active elsewhere
//!   Pod  ──▶ pod::wire       moves our hook sidecar to a native sidecar and mounts what it needs
//! ```
//! All of these are functions from JSON to JSON; [`review`] turns the difference into an admission response, [`server`] speaks
//! HTTPS, [`objects`] are the objects that make the API server ask. They are scoped by the pair's label: whatever is wrong here
//! stops paired VMs from starting, with words that reach the VM's events, and nothing else. A paired VM never starts
//! unwired because something was not understood.
//!
//! Admission looks nothing up: the wiring comes with the object as an annotation (`watari_crds::wiring`), and where a pair is
//! active comes from memory ([`placement`], kept by [`follow`]). What is unknown is allowed: the sidecar itself asks its peer's epoch at a boot.

pub mod follow;
pub mod objects;
pub mod placement;
pub mod pod;
pub mod review;
pub mod run;
pub mod server;
pub mod settings;
pub mod vmi;

use serde_json::Value;
use watari_crds::{
    names::{annotation, label},
    wiring::{Malformed, Wiring},
};

/// Why an object is refused. The text reaches a person through an event or the answer to their `kubectl`.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error(
        "this VM is paired (label {label}), and the annotation {annotation} that says how is missing; the SyncPair's controller \
         writes both into the VM's template: restart the VM once it has, or remove the label to start it without synchronisation",
        label = label::PAIR,
        annotation = annotation::WIRING
    )]
    Unwired,
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error(
        "label {label} names pair {labelled} and annotation {annotation} pair {wired}: one of them was copied from another VM; \
         delete both, the SyncPair's controller writes them anew",
        label = label::PAIR,
        annotation = annotation::WIRING
    )]
    OtherPair { labelled: String, wired: String },
    #[error("disk {disk} of pair {pair_id}: found {found}, expected {expected}; {remedy}")]
    Disk { disk: String, pair_id: String, found: String, expected: &'static str, remedy: &'static str },
    #[error("annotation {annotation}: found {found}, expected a JSON array of hook sidecars; correct it", annotation = annotation::HOOK_SIDECARS)]
    HookSidecars { found: String },
    #[error(
        "this Pod of a paired VM has no container of ours: its VMI was made while the webhooks were not asked; stop the VM and \
         start it again"
    )]
    NoSidecar,
    #[error("the Pod has no container named compute: expected a virt-launcher Pod as KubeVirt renders it")]
    NoCompute,
    #[error(transparent)]
    Elsewhere(#[from] placement::Elsewhere),
}

/// The wiring that a VMI or virt-launcher Pod carries, checked against its label.
fn wiring_of(object: &Value) -> Result<Wiring, Refusal> {
    let metadata = &object["metadata"];
    let text = metadata["annotations"][annotation::WIRING].as_str().ok_or(Refusal::Unwired)?;
    let wiring = Wiring::from_annotation(text)?;
    let labelled = metadata["labels"][label::PAIR].as_str().unwrap_or_default();
    if labelled != wiring.pair_id {
        return Err(Refusal::OtherPair { labelled: labelled.to_owned(), wired: wiring.pair_id });
    }
    Ok(wiring)
}

/// The array at `object[key]`, made if it is not there.
fn array<'a>(object: &'a mut Value, key: &str) -> &'a mut Vec<Value> {
    let entry = &mut object[key];
    if !entry.is_array() {
        *entry = Value::Array(Vec::new());
    }
    entry.as_array_mut().expect("it was made an array above")
}

/// Replaces the element of the same name, or appends.
fn put_named(list: &mut Vec<Value>, element: Value) {
    match list.iter_mut().find(|one| one["name"] == element["name"]) {
        Some(found) => *found = element,
        None => list.push(element),
    }
}

fn named<'a>(list: &'a Value, name: &str) -> Option<&'a Value> {
    list.as_array()?.iter().find(|one| one["name"] == name)
}

#[cfg(test)]
mod fixtures;
