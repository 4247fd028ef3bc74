//! From an AdmissionReview to its answer: which function is asked, and the difference as a JSON patch.

use kube::core::{
    DynamicObject,
    admission::{AdmissionRequest, AdmissionResponse, AdmissionReview},
};
use serde_json::Value;

use super::{Refusal, placement::Placements, pod, settings::SidecarSettings, vmi};

/// What the webhooks know.
#[derive(Clone, Debug)]
pub struct Knowledge {
    pub settings: SidecarSettings,
    pub placements: Placements,
}

/// The paths under which the API server asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    MutateVmi,
    ValidateVmi,
    MutatePod,
}

impl Hook {
    pub const ALL: [Hook; 3] = [Hook::MutateVmi, Hook::ValidateVmi, Hook::MutatePod];

    pub fn path(self) -> &'static str {
        match self {
            Hook::MutateVmi => "/mutate/virtualmachineinstances",
            Hook::ValidateVmi => "/validate/virtualmachineinstances",
            Hook::MutatePod => "/mutate/pods",
        }
    }
}

/// Answers a review; one that cannot be read gets an answer too, since the API server waits for one.
pub fn answer(
    hook: Hook,
    review: AdmissionReview<DynamicObject>,
    knowledge: &Knowledge,
) -> AdmissionReview<DynamicObject> {
    let request: AdmissionRequest<DynamicObject> = match review.try_into() {
        Ok(request) => request,
        Err(_) => return AdmissionResponse::invalid("the review has no request").into_review(),
    };
    let response = AdmissionResponse::from(&request);
    let Some(object) = &request.object else {
        return AdmissionResponse::invalid("the request has no object").into_review();
    };
    let before = match serde_json::to_value(object) {
        Ok(before) => before,
        Err(error) => return AdmissionResponse::invalid(error).into_review(),
    };
    match decide(hook, &before, knowledge) {
        Ok(after) => {
            let patch = json_patch::diff(&before, &after);
            if patch.0.is_empty() {
                return response.into_review();
            }
            match response.with_patch(patch) {
                Ok(response) => response.into_review(),
                Err(error) => AdmissionResponse::invalid(error).into_review(),
            }
        }
        Err(refusal) => {
            let name = object.metadata.name.as_ref().or(object.metadata.generate_name.as_ref());
            tracing::warn!(?hook, ?name, namespace = ?request.namespace, %refusal, "refused");
            response.deny(format!("watari: {refusal}")).into_review()
        }
    }
}

/// The object as it shall be.
fn decide(hook: Hook, before: &Value, knowledge: &Knowledge) -> Result<Value, Refusal> {
    let mut after = before.clone();
    match hook {
        Hook::MutateVmi => vmi::wire(&mut after, &knowledge.settings)?,
        Hook::ValidateVmi => vmi::judge(before, &knowledge.placements)?,
        Hook::MutatePod => pod::wire(&mut after, &knowledge.settings)?,
    }
    Ok(after)
}

#[cfg(test)]
#[path = "review_tests.rs"]
mod tests;
