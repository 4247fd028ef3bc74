//! What is applied to a cluster, and what is read back from it. Pure.

use std::fmt;

use serde_json::{Value, json};

use super::NAMESPACE;

/// What the operator deploys, by the names of its images: each has the registry, prefix and tag of the operator's own.
const DEPLOYED: [&str; 7] = [
    OPERATOR,
    "virt-api",
    "virt-controller",
    "virt-handler",
    "virt-launcher",
    "virt-exportproxy",
    "virt-synchronization-controller",
];
const OPERATOR: &str = "virt-operator";

/// The manifest is not what a release publishes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the operator's manifest cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    #[error(
        "the operator's manifest has no Deployment {OPERATOR} in namespace {NAMESPACE}, whose image is called …{OPERATOR}…"
    )]
    NoOperator,
}

/// The operator's manifest, fit for a small cluster.
#[derive(Debug)]
pub struct Manifest {
    objects: Vec<Value>,
    operator_image: String,
}

impl Manifest {
    /// From kubectl's output: one JSON object after the other, or lists of them.
    pub fn parse(text: &str) -> Result<Manifest, Error> {
        let mut objects = Vec::new();
        for value in serde_json::Deserializer::from_str(text).into_iter::<Value>() {
            match value? {
                Value::Object(mut list) if list.contains_key("items") => {
                    objects.extend(list.remove("items").iter().flat_map(|items| items.as_array().cloned()).flatten());
                }
                object => objects.push(object),
            }
        }
        let operator = objects.iter_mut().find(|object| {
            object["kind"] == "Deployment"
                && object["metadata"]["name"] == OPERATOR
                && object["metadata"]["namespace"] == NAMESPACE
        });
        let operator = operator.ok_or(Error::NoOperator)?;
        // A second one would only wait for a second control plane.
        operator["spec"]["replicas"] = 1.into();
        let image = operator.pointer("/spec/template/spec/containers/0/image").and_then(Value::as_str);
        let operator_image = image.filter(|image| image.contains(OPERATOR)).ok_or(Error::NoOperator)?.to_owned();
        Ok(Manifest { objects, operator_image })
    }

    /// Everything as one object that kubectl takes.
    pub fn objects(&self) -> Value {
        json!({ "apiVersion": "v1", "kind": "List", "items": self.objects })
    }

    /// The images that a deployment of ours pulls, were it able to.
    pub fn images(&self) -> Vec<String> {
        DEPLOYED.iter().map(|name| self.operator_image.replacen(OPERATOR, name, 1)).collect()
    }
}

/// How KubeVirt is to run here, if the folder does not say it.
///
/// - `Sidecar` and `DecentralizedLiveMigration`: what Watari builds on. `Template` needs two more images and nobody here. `ImageVolume`
///   (container disks as volumes) needs containerd 2; Debian's is older, mounts nothing, and says nothing.
/// - One replica of everything, emulated processors (the nodes have no KVM), images only from the nodes.
/// - CAs: virt-operator drops the peer's CA once its own is older than `renewBefore`. With duration − renewBefore ≤ renewBefore on
///   all clusters an own CA never gets that old, so that one exchange holds until the next rotation, after 166 h.
pub fn custom_resource() -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt",
        "metadata": { "name": "kubevirt", "namespace": NAMESPACE },
        "spec": {
            "imagePullPolicy": "IfNotPresent",
            "infra": { "replicas": 1 },
            "certificateRotateStrategy": { "selfSigned": {
                "ca": { "duration": "336h", "renewBefore": "170h" },
                "server": { "duration": "168h", "renewBefore": "48h" },
            } },
            "configuration": {
                "imagePullPolicy": "IfNotPresent",
                "developerConfiguration": {
                    "useEmulation": true,
                    "cpuAllocationRatio": 100,
                    "featureGates": ["Sidecar", "DecentralizedLiveMigration"],
                    "disabledFeatureGates": ["Template", "ImageVolume"],
                },
            },
        },
    })
}

/// What a KubeVirt object says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub version: String,
    /// Deploying, Deployed, Deleting, …
    pub phase: String,
    /// The condition of that name, for what is deployed now.
    pub available: bool,
    /// Where the peer's synchronisation controller connects to: what a migration's `connectURL` is.
    pub synchronization_addresses: Vec<String>,
    /// The message of the first condition that is not as it should be.
    pub trouble: Option<String>,
}

impl Report {
    pub fn of(object: &Value) -> Report {
        let status = &object["status"];
        let text = |name: &str| status[name].as_str().unwrap_or("?").to_owned();
        let conditions = status["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
        let is = |name: &str, value: &str| {
            conditions.iter().any(|condition| condition["type"] == name && condition["status"] == value)
        };
        let trouble = conditions.iter().find(|condition| {
            let good = if condition["type"] == "Degraded" { "False" } else { "True" };
            condition["type"] != "Progressing" && condition["status"] != good
        });
        let addresses = status["synchronizationAddresses"].as_array().into_iter().flatten();
        Report {
            version: text("observedKubeVirtVersion"),
            phase: text("phase"),
            available: is("Available", "True")
                && !is("Progressing", "True")
                && status["observedGeneration"] == object["metadata"]["generation"],
            synchronization_addresses: addresses.filter_map(|address| address.as_str().map(str::to_owned)).collect(),
            trouble: trouble.map(|condition| {
                let part = |name: &str| condition[name].as_str().unwrap_or("?");
                format!("{} is {} ({})", part("type"), part("status"), part("message"))
            }),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { version, phase, available, synchronization_addresses, trouble } = self;
        let available = if *available { "available" } else { "not available" };
        write!(
            f,
            "KubeVirt {version}, {phase}, {available}, synchronisation at {}",
            synchronization_addresses.join(" ")
        )?;
        trouble.iter().try_for_each(|trouble| write!(f, ", {trouble}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment(namespace: &str, image: &str) -> Value {
        json!({
            "kind": "Deployment", "metadata": { "name": OPERATOR, "namespace": namespace },
            "spec": { "replicas": 2, "template": { "spec": { "containers": [{ "image": image }] } } },
        })
    }

    #[test]
    fn a_manifest_is_read_as_lists_and_as_single_objects_and_its_operator_runs_once() {
        let (first, operator) = (json!({ "kind": "Namespace" }), deployment(NAMESPACE, "r.example/k/virt-operator:v1"));
        let single = format!("{first}\n{operator}");
        let list = json!({ "kind": "List", "items": [first, operator] }).to_string();
        for text in [single, list] {
            let manifest = Manifest::parse(&text).unwrap();
            let objects = manifest.objects();
            assert_eq!(objects["items"].as_array().map(Vec::len), Some(2));
            assert_eq!(objects["items"][1]["spec"]["replicas"], 1);
            assert!(manifest.images().contains(&"r.example/k/virt-synchronization-controller:v1".to_owned()));
        }
    }

    #[test]
    fn a_manifest_without_the_operator_in_its_namespace_is_refused() {
        for text in [deployment("elsewhere", "r/virt-operator:1"), deployment(NAMESPACE, "r/other:1"), json!({})] {
            assert!(matches!(Manifest::parse(&text.to_string()), Err(Error::NoOperator)), "{text}");
        }
    }

    #[test]
    fn our_ca_settings_keep_a_peers_ca_until_the_rotation() {
        let resource = custom_resource();
        let ca = &resource["spec"]["certificateRotateStrategy"]["selfSigned"]["ca"];
        let hours = |name: &str| ca[name].as_str().unwrap().trim_end_matches('h').parse::<u32>().unwrap();
        assert!(hours("duration") - hours("renewBefore") <= hours("renewBefore"));
    }

    #[test]
    fn kubevirt_is_available_only_for_what_was_asked_last_and_trouble_is_told() {
        let object = |observed: u32, available: &str, progressing: &str| {
            json!({
                "metadata": { "generation": 2 },
                "status": {
                    "phase": "Deployed", "observedKubeVirtVersion": "v1", "observedGeneration": observed,
                    "synchronizationAddresses": ["10.0.0.1:9185"],
                    "conditions": [
                        { "type": "Available", "status": available, "message": "why" },
                        { "type": "Progressing", "status": progressing },
                        { "type": "Degraded", "status": "False" },
                    ],
                },
            })
        };
        assert!(Report::of(&object(2, "True", "False")).available);
        assert!(!Report::of(&object(1, "True", "False")).available);
        assert!(!Report::of(&object(2, "True", "True")).available);
        let report = Report::of(&object(2, "False", "False"));
        assert_eq!(report.trouble.as_deref(), Some("Available is False (why)"));
        assert!(report.to_string().contains("10.0.0.1:9185"));
    }
}
