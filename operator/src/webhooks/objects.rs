//! The objects that make the API server ask, and the policy that it enforces by itself. Pure.
//!
//! All webhooks fail closed and select by the pair's label: while nobody answers, paired VMs do not start, and nothing else
//! notices. The chart owns these objects, so that uninstalling removes them; the operator only brings its authority into them
//! ([`trust`]), as a field of its own.
//!
//! The policies keep foreign Pods off replica claims also while the operator is stopped: the status of each SyncReplica lists the
//! claims that were made for it, that of a SyncPair those of a VM that is at the peer, and the API server itself compares. It guards against accidents; who may create Pods with our labels may
//! also get past it.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use watari_crds::names::{ADMISSION, GROUP, MANAGED_BY, VERSION, WEBHOOK_SERVICE, label, role};

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

/// The policies on replica claims, each with its binding. Parameters are the SyncReplicas in the Pod's own namespace, and the SyncPairs whose
/// VM is active at the peer.
///
/// - `status.claims`, not the names in a spec: the peer writes the SyncReplica's, and must not decide which of our claims nobody may use.
/// - The kinds are our own. With ConfigMaps as parameters an API server (1.34) that had lost its last such policy saw no new ConfigMap
///   through a later one until it was restarted.
/// - What cannot be evaluated is allowed (`Ignore`): that happens where our definitions were deleted, and then there is nothing to
///   protect; to refuse would keep every Pod of the cluster from being made.
pub fn claims_policies() -> [Value; 4] {
    let [policy, binding] = claims_policy("claims", "SyncReplica", "params.spec.pairId");
    let [home_policy, home_binding] = claims_policy("home-claims", "SyncPair", "params.metadata.uid");
    [policy, binding, home_policy, home_binding]
}

/// Of one kind of parameters, in which `pair_id` is the pair's.
fn claims_policy(prefix: &str, kind: &str, pair_id: &str) -> [Value; 2] {
    let name = format!("{prefix}.{ADMISSION}");
    let ours = format!(
        "'{pair}' in variables.labels && variables.labels['{pair}'] == {pair_id} && \
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
            "failurePolicy": "Ignore",
            "paramKind": { "apiVersion": format!("{GROUP}/{VERSION}"), "kind": kind },
            "matchConstraints": { "resourceRules": [{
                "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"],
            }] },
            "variables": [
                { "name": "labels", "expression": "has(object.metadata.labels) ? object.metadata.labels : {}" },
                { "name": "claims", "expression":
                    "has(params.status) && has(params.status.claims) ? params.status.claims : {}" },
                { "name": "ours", "expression": ours },
                { "name": "taken", "expression":
                    "has(object.spec.volumes) ? object.spec.volumes.filter(v, has(v.persistentVolumeClaim) && \
                     v.persistentVolumeClaim.claimName in variables.claims).map(v, v.persistentVolumeClaim.claimName) : []" },
            ],
            "validations": [{
                "expression": "variables.ours || size(variables.taken) == 0",
                "messageExpression": format!(
                    "'claim ' + variables.taken[0] + ' belongs to the replica of VM ' + params.spec.vmName + ' ({kind} ' + \
                     params.metadata.name + ', pair ' + {pair_id} + '): another Pod that writes to it would destroy the replica. \
                     Unpair the VM first'"
                ),
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
            // All of the Pod's namespace.
            "paramRef": { "selector": {}, "parameterNotFoundAction": "Allow" },
        },
    });
    [policy, binding]
}
