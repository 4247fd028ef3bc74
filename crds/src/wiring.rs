//! What a webhook must know to wire a paired VM: written by the SyncPair's controller as an annotation of the VM's template,
//! carried by KubeVirt to the VMI and to every virt-launcher Pod, so that admission looks nothing up.
//!
//! Image, resources and pull policy are not here: they are the operator's own settings, and a VM that starts after an
//! upgrade gets the new image. What an older operator wrote stays readable: unknown fields are ignored, new ones have defaults.

use serde::{Deserialize, Serialize};

/// Content of [`crate::names::annotation::WIRING`], as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Wiring {
    /// The pair's id: the SyncPair's UID.
    pub pair_id: String,
    /// In the order that both sites share; at least one.
    pub disks: Vec<WiredDisk>,
}

/// One disk that goes through the sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WiredDisk {
    /// Name of the volume in the VMI, and of the Pod's volume, which KubeVirt names alike.
    pub name: String,
    /// How the claim behind it is used.
    pub mode: VolumeMode,
}

/// A claim's `volumeMode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum VolumeMode {
    /// The image is a file named `disk.img`.
    #[default]
    Filesystem,
    /// The image is the device.
    Block,
}

/// Why an annotation is no wiring.
#[derive(Debug, thiserror::Error)]
#[error(
    "the annotation {annotation} is not what the operator writes: {why}; delete it, the SyncPair's controller writes it anew",
    annotation = crate::names::annotation::WIRING
)]
pub struct Malformed {
    why: String,
}

impl Wiring {
    /// The annotation's value.
    pub fn to_annotation(&self) -> String {
        serde_json::to_string(self).expect("strings and lists have a JSON form")
    }

    /// Reads the annotation's value.
    pub fn from_annotation(text: &str) -> Result<Wiring, Malformed> {
        let wiring: Wiring = serde_json::from_str(text).map_err(|error| Malformed { why: error.to_string() })?;
        if wiring.disks.is_empty() {
            return Err(Malformed { why: "it names no disk".to_owned() });
        }
        Ok(wiring)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wiring_survives_its_annotation_and_fields_of_a_later_version() {
        let wiring = Wiring {
            pair_id: "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10".to_owned(),
            disks: vec![WiredDisk { name: "rootdisk".to_owned(), mode: VolumeMode::Block }],
        };
        let text = wiring.to_annotation();
        assert_eq!(Wiring::from_annotation(&text).expect("ours"), wiring);
        let later = text.replacen('{', r#"{"later":1,"#, 1);
        assert_eq!(Wiring::from_annotation(&later).expect("ours, later"), wiring);
    }

    #[test]
    fn an_annotation_without_a_disk_or_that_is_no_json_is_refused_with_what_to_do() {
        for text in ["", "{}", r#"{"pairId":"x","disks":[]}"#] {
            let error = Wiring::from_annotation(text).expect_err(text).to_string();
            assert!(error.contains("delete it"), "{error}");
        }
    }
}
