//! The objects that make the API server ask, and the policy that it enforces by itself. Pure.
//!
//! All webhooks fail closed and select by the pair's label: while nobody answers, paired VMs do not start, and nothing else
//! notices. The chart owns these objects, so that uninstalling removes them; the operator only brings its authority into them
//! ([`trust`]), as a field of its own.
//!
//! The policy keeps foreign Pods off replica claims also while the operator is stopped: a ConfigMap for each pair lists
//! its claims, and the API server itself compares. It guards against accidents; who may create Pods with our labels may also get past it.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use watari_crds::names::{ADMISSION, MANAGED_BY, WEBHOOK_SERVICE, label, role};

use super::review::Hook;

/// How long the API server waits for an answer, seconds; ours takes milliseconds, and a VM's start may wait for this.
const TIMEOUT_SECONDS: u32 = 10;
/// Label of virt-launcher Pods (KubeVirt).
const KUBEVIRT: &str = "kubevirt.io";
const VIRT_LAUNCHER: &str = "virt-launcher";

/// Where the webhooks are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Behind our Service in the operator's namespace.
    Service { namespace: String },
    /// `https://localhost:PORT`: outside the cluster, for tests.
    Url(String),
}

impl Endpoint {
    /// DNS names that the serving certificate needs.
    pub fn dns_names(&self) -> Vec<String> {
        match self {
            Endpoint::Service { namespace } => vec![format!("{WEBHOOK_SERVICE}.{namespace}.svc")],
            Endpoint::Url(url) => {
                let host = url.trim_start_matches("https://");
                vec![host.rsplit_once(':').map_or(host, |(host, _)| host).to_owned()]
            }
        }
    }

    fn client_config(&self, hook: Hook, ca_pem: Option<&str>) -> Value {
        let mut config = match self {
            Endpoint::Service { namespace } => {
                json!({ "service": { "namespace": namespace, "name": WEBHOOK_SERVICE, "path": hook.path(), "port": 443 } })
            }
            Endpoint::Url(url) => json!({ "url": format!("{url}{}", hook.path()) }),
        };
        if let Some(ca) = ca_pem {
            config["caBundle"] = json!(BASE64_STANDARD.encode(ca));
        }
        config
    }
}

/// Name of a hook within its configuration.
fn hook_name(hook: Hook) -> &'static str {
    match hook {
        Hook::MutateVmi => "virtualmachineinstances.mutate.watari.io",
        Hook::ValidateVmi => "virtualmachineinstances.validate.watari.io",
        Hook::MutatePod => "pods.mutate.watari.io",
    }
}

fn webhook(hook: Hook, endpoint: &Endpoint, ca_pem: Option<&str>) -> Value {
    let paired = json!([{ "key": label::PAIR, "operator": "Exists" }]);
    let (group, resource, selector) = match hook {
        Hook::MutateVmi | Hook::ValidateVmi => {
            (KUBEVIRT, "virtualmachineinstances", json!({ "matchExpressions": paired }))
        }
        Hook::MutatePod => {
            ("", "pods", json!({ "matchLabels": { KUBEVIRT: VIRT_LAUNCHER }, "matchExpressions": paired }))
        }
    };
    json!({
        "name": hook_name(hook),
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "failurePolicy": "Fail",
        "matchPolicy": "Equivalent",
        "timeoutSeconds": TIMEOUT_SECONDS,
        "clientConfig": endpoint.client_config(hook, ca_pem),
        "objectSelector": selector,
        "rules": [{
            "apiGroups": [group], "apiVersions": ["v1"], "operations": ["CREATE"],
            "resources": [resource], "scope": "Namespaced",
        }],
    })
}

fn metadata(name: &str) -> Value {
    json!({ "name": name, "labels": { label::MANAGED: MANAGED_BY } })
}

/// Both webhook configurations.
pub fn configurations(endpoint: &Endpoint, ca_pem: Option<&str>) -> [Value; 2] {
    let of = |kind: &str, hooks: &[Hook]| {
        let webhooks: Vec<Value> = hooks.iter().map(|hook| webhook(*hook, endpoint, ca_pem)).collect();
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": kind,
            "metadata": metadata(ADMISSION), "webhooks": webhooks,
        })
    };
    [
        of("MutatingWebhookConfiguration", &[Hook::MutateVmi, Hook::MutatePod]),
        of("ValidatingWebhookConfiguration", &[Hook::ValidateVmi]),
    ]
}

/// For server-side apply under a field manager of its own: only the authority of each webhook in [`configurations`].
pub fn trust(ca_pem: &str) -> [Value; 2] {
    let ca = BASE64_STANDARD.encode(ca_pem);
    let of = |kind: &str, hooks: &[Hook]| {
        let webhooks: Vec<Value> =
            hooks.iter().map(|hook| json!({ "name": hook_name(*hook), "clientConfig": { "caBundle": ca } })).collect();
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": kind,
            "metadata": { "name": ADMISSION }, "webhooks": webhooks,
        })
    };
    [
        of("MutatingWebhookConfiguration", &[Hook::MutateVmi, Hook::MutatePod]),
        of("ValidatingWebhookConfiguration", &[Hook::ValidateVmi]),
    ]
}

/// The policy on replica claims and its binding. Parameters are the ConfigMaps of [`claims`], in the Pod's own namespace.
///
/// A fault is known: an API server (seen with 1.34) that has lost its last policy with ConfigMaps as parameters sees no new
/// ConfigMap through a later one until it restarts, and then this policy refuses nothing. So it protects after the first
/// installation, and after a reinstallation perhaps not. A parameter of our own kind would not share that watch.
pub fn claims_policy() -> [Value; 2] {
    let name = format!("claims.{ADMISSION}");
    let ours = format!(
        "'{pair}' in variables.labels && variables.labels['{pair}'] in variables.claims.map(claim, variables.claims[claim]) && \
         (('{role}' in variables.labels && variables.labels['{role}'] == '{replica}') || \
          ('{kubevirt}' in variables.labels && variables.labels['{kubevirt}'] == '{launcher}'))",
        pair = label::PAIR,
        role = label::ROLE,
        replica = role::REPLICA,
        kubevirt = KUBEVIRT,
        launcher = VIRT_LAUNCHER,
    );
    let policy = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
        "metadata": metadata(&name),
        "spec": {
            "failurePolicy": "Fail",
            "paramKind": { "apiVersion": "v1", "kind": "ConfigMap" },
            "matchConstraints": { "resourceRules": [{
                "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"],
            }] },
            "variables": [
                { "name": "labels", "expression": "has(object.metadata.labels) ? object.metadata.labels : {}" },
                { "name": "claims", "expression": "has(params.data) ? params.data : {}" },
                { "name": "ours", "expression": ours },
                { "name": "taken", "expression":
                    "has(object.spec.volumes) ? object.spec.volumes.filter(v, has(v.persistentVolumeClaim) && \
                     v.persistentVolumeClaim.claimName in variables.claims).map(v, v.persistentVolumeClaim.claimName) : []" },
            ],
            "validations": [{
                "expression": "variables.ours || size(variables.taken) == 0",
                "messageExpression":
                    "'claim ' + variables.taken[0] + ' holds the replica of a VM that is active at another site (pair ' + \
                     variables.claims[variables.taken[0]] + '); a Pod that writes to it would destroy the replica. Unpair the VM or promote it first'",
                "reason": "Forbidden",
            }],
        },
    });
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": metadata(&name),
        "spec": {
            "policyName": name,
            "validationActions": ["Deny"],
            "paramRef": {
                "selector": { "matchLabels": { label::ROLE: role::CLAIMS } },
                "parameterNotFoundAction": "Allow",
            },
        },
    });
    [policy, binding]
}

/// The parameter of one pair: each claim's name, and the pair it belongs to.
pub fn claims(namespace: &str, pair_id: &str, claims: &[String]) -> Value {
    let data: serde_json::Map<String, Value> =
        claims.iter().map(|claim| (claim.clone(), Value::from(pair_id))).collect();
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {
            "name": watari_crds::names::claims(pair_id), "namespace": namespace,
            "labels": { label::PAIR: pair_id, label::ROLE: role::CLAIMS, label::MANAGED: MANAGED_BY },
        },
        "data": data,
    })
}
