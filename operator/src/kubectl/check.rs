//! What `check` says about a PeerCluster: from the object alone.

use serde::Serialize;
use watari_crds::{
    conditions::{Kind, Status},
    peer::{Missing, PeerCluster, Versions},
};

/// One peer.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    pub name: String,
    pub site: String,
    pub ready: bool,
    /// Why it is not ready; empty when it is.
    pub why: String,
    pub round_trip_millis: Option<i64>,
    pub versions: Option<Versions>,
    pub missing: Vec<Missing>,
}

pub fn finding(peer: &PeerCluster) -> Finding {
    let status = peer.status.clone().unwrap_or_default();
    let current = peer.metadata.generation.is_none_or(|generation| generation == status.observed_generation);
    let ready = status.conditions.iter().find(|one| one.kind == Kind::Ready.name());
    let why = match ready {
        Some(_) if !current => "the operator has not looked at this spec yet; is it running?".to_owned(),
        Some(condition) if condition.status == Status::True => String::new(),
        Some(condition) => format!("{}: {}", condition.reason, condition.message),
        None => "the operator has not looked at it yet; is it running?".to_owned(),
    };
    Finding {
        name: peer.metadata.name.clone().unwrap_or_default(),
        site: peer.spec.site.clone(),
        ready: why.is_empty(),
        why,
        round_trip_millis: status.round_trip_millis,
        versions: status.versions,
        missing: status.missing,
    }
}

pub fn text(findings: &[Finding]) -> String {
    if findings.is_empty() {
        return "No PeerCluster in this cluster yet.\n".to_owned();
    }
    let mut text = String::new();
    for one in findings {
        let verdict = if one.ready { "can be used" } else { "cannot be used" };
        text.push_str(&format!("{} (site {}): {verdict}", one.name, one.site));
        if let Some(millis) = one.round_trip_millis {
            text.push_str(&format!(", answers in {millis} ms"));
        }
        text.push('\n');
        if let Some(Versions { watari, kubernetes, kubevirt }) = &one.versions {
            let said = |version: &str| if version.is_empty() { "not found".to_owned() } else { version.to_owned() };
            let (watari, kubernetes, kubevirt) = (said(watari), said(kubernetes), said(kubevirt));
            text.push_str(&format!("  Watari {watari}, Kubernetes {kubernetes}, KubeVirt {kubevirt}\n"));
        }
        if !one.why.is_empty() {
            text.push_str(&format!("  {}\n", one.why));
        }
        for Missing { site, what, remedy } in &one.missing {
            text.push_str(&format!("  missing at {site}: {what}\n    → {remedy}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::{Value, json};

    use super::*;

    fn peer(status: Value) -> PeerCluster {
        serde_json::from_value(json!({
            "apiVersion": "watari.io/v1alpha1", "kind": "PeerCluster", "metadata": { "name": "osaka", "generation": 1 },
            "spec": { "site": "osaka", "kubeconfigSecret": "osaka" }, "status": status,
        }))
        .unwrap()
    }

    fn ready(status: &str) -> Value {
        json!({
            "type": "Ready", "status": status, "reason": "PeerUnreachable", "message": "no route to host",
            "lastTransitionTime": "2026-11-24T11:00:00Z",
        })
    }

    #[test]
    fn each_missing_thing_is_said_with_its_remedy() {
        let missing =
            json!([{ "site": "osaka", "what": "feature gate Sidecar", "remedy": "add it to the KubeVirt object" }]);
        let status = json!({
            "observedGeneration": 1, "conditions": [ready("True")], "missing": missing, "roundTripMillis": 172,
            "versions": { "watari": "0.1.0", "kubernetes": "v1.34.2" },
        });
        let text = text(&[finding(&peer(status))]);
        for part in [
            "can be used, answers in 172 ms",
            "KubeVirt not found",
            "missing at osaka: feature gate Sidecar",
            "→ add it",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn a_peer_that_nobody_has_looked_at_is_not_called_usable() {
        assert!(finding(&peer(Value::Null)).why.contains("is it running"));
        let stale = finding(&peer(json!({ "observedGeneration": 0, "conditions": [ready("True")] })));
        assert!(!stale.ready);
        let down = finding(&peer(json!({ "observedGeneration": 1, "conditions": [ready("False")] })));
        assert_eq!((down.ready, down.why.as_str()), (false, "PeerUnreachable: no route to host"));
    }
}
