//! `cutover`: asks for a move by changing where the VM shall run, and follows it to its end.
//!
//! The wish is written as `kubectl apply` would write it, with `atMove` filled in; whoever watches may go away, the move goes on.

use std::io::Write;

use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use watari_crds::conditions::{Kind, Status};
use watari_crds::crossing::{Site, Stage};
use watari_crds::pair::SyncPair;

use super::cli::Cutover;
use super::follow::{Followed, Standing, follow};
use super::{Error, Outcome, api_error};

/// Reads where a move stands from a pair that was asked to be at `to`.
pub fn standing(pair: &SyncPair, to: Site) -> Standing {
    let status = pair.status.clone().unwrap_or_default();
    if status.active_site == to && status.crossing.is_none() {
        let last = status.history.first().filter(|moved| moved.to == to);
        let took = last.and_then(|moved| moved.seconds).map(|it| format!(" after {it} s")).unwrap_or_default();
        let predicted = last.and_then(|moved| moved.predicted_seconds);
        let predicted = predicted.map(|it| format!(" (predicted: {it} s)")).unwrap_or_default();
        return Standing::Done(format!("The VM is active at {to:?}{took}{predicted}."));
    }
    let failed = status.crossing.as_ref().filter(|attempt| attempt.failed.is_some());
    match (&status.crossing, failed) {
        (_, Some(failed)) => Standing::HeldUp(format!("Attempt {} failed: {}", failed.attempt, failed.message)),
        (Some(attempt), None) if attempt.stage == Stage::Failed => Standing::HeldUp(attempt.message.clone()),
        (Some(attempt), None) => Standing::UnderWay(format!("{:?}: {}", attempt.stage, attempt.message)),
        (None, None) => {
            let holds =
                |kind: Kind| status.conditions.iter().find(|it| it.kind == kind.name() && it.status == Status::True);
            let why = [Kind::SiteDiffers, Kind::Stalled, Kind::Reconciling].into_iter().find_map(holds);
            Standing::HeldUp(why.map_or("The operator has not taken it up yet.".to_owned(), |it| it.message.clone()))
        }
    }
}

/// Asks, and follows.
pub async fn run(api: &Api<SyncPair>, asked: &Cutover, out: &mut impl Write) -> Result<Outcome, Error> {
    let pair = api.get(&asked.name).await.map_err(api_error("the SyncPair"))?;
    let status = pair.status.unwrap_or_default();
    let to = asked.to.map_or(status.active_site.other(), Site::from);
    let patch = Patch::Merge(json!({ "spec": { "activeSite": to, "atMove": status.moves } }));
    api.patch(&asked.name, &PatchParams::default(), &patch).await.map_err(api_error("changing the SyncPair"))?;
    let followed = Followed {
        what: "the SyncPair",
        name: &asked.name,
        no_wait: asked.no_wait,
        timeout_seconds: asked.timeout_seconds,
        output: asked.output,
    };
    let observed = |pair: &SyncPair| pair.status.as_ref().map(|status| status.observed_generation);
    follow(api, &followed, observed, |pair| standing(pair, to), out).await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn pair(status: serde_json::Value) -> SyncPair {
        serde_json::from_value(json!({
            "apiVersion": "watari.io/v1alpha1", "kind": "SyncPair", "metadata": { "name": "shop" },
            "spec": { "vmName": "shop", "peer": "osaka" }, "status": status,
        }))
        .unwrap()
    }

    #[test]
    fn each_step_of_a_move_has_its_words() {
        let began = "2026-01-01T00:00:00Z";
        let attempt = json!({ "id": "x", "to": "Peer", "stage": "Converging", "message": "5 MiB are left.", "began": began, "attempt": 1 });
        let mut failed = attempt.clone();
        failed["failed"] = json!(began);
        let differs = json!([{ "type": "SiteDiffers", "status": "True", "reason": "AtMoveDiffers", "message": "an old wish", "lastTransitionTime": began }]);
        let moved = json!({ "to": "Peer", "ended": began, "seconds": 31, "predictedSeconds": 28 });
        for (status, expected) in [
            (json!({ "crossing": attempt }), Standing::UnderWay("Converging: 5 MiB are left.".to_owned())),
            (json!({ "crossing": failed }), Standing::HeldUp("Attempt 1 failed: 5 MiB are left.".to_owned())),
            (json!({ "conditions": differs }), Standing::HeldUp("an old wish".to_owned())),
            (json!({}), Standing::HeldUp("The operator has not taken it up yet.".to_owned())),
            (
                json!({ "activeSite": "Peer", "history": [moved] }),
                Standing::Done("The VM is active at Peer after 31 s (predicted: 28 s).".to_owned()),
            ),
        ] {
            assert_eq!(standing(&pair(status), Site::Peer), expected);
        }
    }
}
