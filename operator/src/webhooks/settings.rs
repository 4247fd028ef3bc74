//! How this operator starts sidecars: its own settings, the same for all VMs, taken at each start of a VM.

use serde_json::{Value, json};
use watari_crds::names::path;

/// What every sidecar is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SidecarSettings {
    pub image: String,
    /// `Always`, `IfNotPresent` or `Never`; `None`: Kubernetes' own default.
    pub image_pull_policy: Option<String>,
    /// Names of Secrets in the VM's namespace.
    pub image_pull_secrets: Vec<String>,
    pub resources: Resources,
}

/// Resources of one sidecar, as Kubernetes quantities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    pub cpu_request: String,
    /// Request and limit: the memory that preserves old content is bounded, and the rest is small.
    pub memory: String,
}

impl Default for Resources {
    /// Half of `memory` is what a sidecar may preserve while a generation is open (`sidecar.toml`, `preserve.memory`).
    fn default() -> Self {
        Resources { cpu_request: "100m".to_owned(), memory: "512Mi".to_owned() }
    }
}

/// How much of the Pod's quality of service our container has to keep up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qos {
    /// Every container asks for exactly what it may have: so must ours.
    Guaranteed,
    Burstable,
    /// No container asks for anything: neither may ours.
    BestEffort,
}

impl SidecarSettings {
    /// Arguments of the sidecar beside a VM. They are also how our container is recognised.
    pub fn arguments() -> [String; 3] {
        let configuration = format!("{}/{}", path::CONFIGURATION_DIR, path::CONFIGURATION_FILE);
        ["primary".to_owned(), "--config".to_owned(), configuration]
    }

    /// Whether a container, or an entry of the hook annotation, is ours.
    pub fn is_ours(container: &Value) -> bool {
        container["args"] == json!(SidecarSettings::arguments())
    }

    /// The entry in KubeVirt's annotation.
    pub fn hook_entry(&self) -> Value {
        let mut entry = json!({ "image": self.image, "args": SidecarSettings::arguments() });
        if let Some(policy) = &self.image_pull_policy {
            entry["imagePullPolicy"] = json!(policy);
        }
        entry
    }
}

impl Resources {
    pub fn for_qos(&self, qos: Qos) -> Value {
        match qos {
            Qos::Guaranteed => {
                let both = json!({ "cpu": self.cpu_request, "memory": self.memory });
                json!({ "requests": both, "limits": both })
            }
            // A guest's disk is never slowed down by a quota on our processor time.
            Qos::Burstable => json!({
                "requests": { "cpu": self.cpu_request, "memory": self.memory },
                "limits": { "memory": self.memory },
            }),
            Qos::BestEffort => json!({}),
        }
    }
}

impl Qos {
    /// Of the containers given, ours not among them (Kubernetes, `pkg/apis/core/v1/helper/qos`).
    pub fn of<'a>(containers: impl Iterator<Item = &'a Value>) -> Qos {
        let (mut asks, mut guaranteed) = (false, true);
        for container in containers {
            let resources = &container["resources"];
            for resource in ["cpu", "memory"] {
                let (request, limit) = (&resources["requests"][resource], &resources["limits"][resource]);
                asks |= !request.is_null() || !limit.is_null();
                // A missing request is taken from the limit.
                guaranteed &= !limit.is_null() && (request.is_null() || request == limit);
            }
        }
        match (asks, guaranteed) {
            (false, _) => Qos::BestEffort,
            (true, true) => Qos::Guaranteed,
            (true, false) => Qos::Burstable,
        }
    }
}
