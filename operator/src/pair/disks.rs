//! Which disks of a VM a pair has, and what each becomes at the peer: validation, pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use watari_crds::conditions::Reason;
use watari_crds::kubevirt::VirtualMachine;
use watari_crds::pair::SyncPairSpec;
use watari_crds::quantity;
use watari_crds::replica::AccessMode;
use watari_crds::wiring::VolumeMode;

/// One disk of a pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    pub name: String,
    pub claim: String,
    pub mode: VolumeMode,
    pub access: AccessMode,
    /// Class here.
    pub class: Option<String>,
    pub target_class: Option<String>,
    pub claim_bytes: i64,
    /// The guest's disk; `None`: only the VM's sidecar can tell (an image in a file system).
    pub size_bytes: Option<i64>,
}

/// Why a pair cannot be made of this VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub reason: Reason,
    pub message: String,
}

fn refuse(reason: Reason, message: String) -> Refusal {
    Refusal { reason, message }
}

/// The disks in the order of the VM's volumes. `claims` are those that were found, `sizes` what a sidecar said, `classes` the peer's
/// map of storage classes.
pub fn disks(
    spec: &SyncPairSpec,
    vm: &VirtualMachine,
    claims: &BTreeMap<String, PersistentVolumeClaim>,
    sizes: &BTreeMap<String, i64>,
    classes: &BTreeMap<String, String>,
) -> Result<Vec<Disk>, Refusal> {
    let template = &vm.spec.template.spec;
    let mut disks = Vec::new();
    for wanted in &spec.disks {
        let volume = template.volumes.iter().find(|volume| volume.name == wanted.name);
        if volume.and_then(|volume| volume.claim()).is_none() {
            let text =
                format!("The VM has no volume {} that stands on a claim and is there from its start.", wanted.name);
            return Err(refuse(Reason::DiskUnsuitable, text));
        }
    }
    for volume in &template.volumes {
        let wanted = spec.disks.iter().find(|disk| disk.name == volume.name);
        let Some(claim) = volume.claim().filter(|_| spec.disks.is_empty() || wanted.is_some()) else { continue };
        if !suits(template, &volume.name) {
            if wanted.is_none() {
                continue;
            }
            let text = format!("Disk {} is a CD-ROM, a LUN, or shareable; those cannot be synchronised.", volume.name);
            return Err(refuse(Reason::DiskUnsuitable, text));
        }
        let missing =
            || refuse(Reason::DiskUnsuitable, format!("The claim {claim} of disk {} is missing.", volume.name));
        let found = claims.get(claim).ok_or_else(missing)?;
        let mut disk = disk(&volume.name, claim, found, sizes)?;
        let mapped = disk.class.as_ref().map(|class| classes.get(class).unwrap_or(class).clone());
        disk.target_class = wanted.and_then(|disk| disk.target_storage_class.clone()).or(mapped);
        disks.push(disk);
    }
    match disks.is_empty() {
        true => Err(refuse(Reason::NoDisks, "The VM has no disk on a claim.".to_owned())),
        false => Ok(disks),
    }
}

/// A plain disk of the domain.
fn suits(template: &watari_crds::kubevirt::VmiSpecView, name: &str) -> bool {
    let disk = template.domain.devices.disks.iter().find(|disk| disk.name == name);
    disk.is_some_and(|disk| disk.cdrom.is_none() && disk.lun.is_none() && disk.shareable != Some(true))
}

fn disk(
    name: &str,
    claim: &str,
    found: &PersistentVolumeClaim,
    sizes: &BTreeMap<String, i64>,
) -> Result<Disk, Refusal> {
    let unsuitable = |text: String| refuse(Reason::DiskUnsuitable, format!("Claim {claim} of disk {name}: {text}."));
    let spec = found.spec.clone().unwrap_or_default();
    let mode = match spec.volume_mode.as_deref() {
        Some("Block") => VolumeMode::Block,
        _ => VolumeMode::Filesystem,
    };
    let modes = spec.access_modes.unwrap_or_default();
    let access = match modes.iter().map(String::as_str).find(|mode| mode.starts_with("ReadWrite")) {
        Some("ReadWriteMany") => AccessMode::ReadWriteMany,
        Some("ReadWriteOnce") => AccessMode::ReadWriteOnce,
        Some("ReadWriteOncePod") => {
            return Err(unsuitable("ReadWriteOncePod does not let two Pods of ours meet during a move".to_owned()));
        }
        _ => return Err(unsuitable("it cannot be written".to_owned())),
    };
    let capacity = found.status.as_ref().and_then(|status| status.capacity.as_ref()?.get("storage").cloned());
    let capacity = capacity.ok_or_else(|| unsuitable("it is not bound yet".to_owned()))?;
    let bytes = quantity::parse(&capacity.0).map_err(|error| unsuitable(error.to_string()))?;
    let claim_bytes = i64::try_from(bytes).expect("quantities of ours fit");
    let size_bytes = sizes.get(name).copied().or(match mode {
        VolumeMode::Block => Some(claim_bytes),
        VolumeMode::Filesystem => None,
    });
    let class = spec.storage_class_name;
    let (name, claim) = (name.to_owned(), claim.to_owned());
    Ok(Disk { name, claim, mode, access, class, target_class: None, claim_bytes, size_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn vm(disks: Value, volumes: Value) -> VirtualMachine {
        serde_json::from_value(json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": { "name": "vm" },
            "spec": { "template": { "spec": { "domain": { "devices": { "disks": disks } }, "volumes": volumes } } },
        }))
        .expect("a VM")
    }

    fn claim(name: &str, mode: &str, access: &str) -> (String, PersistentVolumeClaim) {
        let claim = json!({
            "metadata": { "name": name },
            "spec": { "volumeMode": mode, "accessModes": [access], "storageClassName": "fast" },
            "status": { "capacity": { "storage": "64Mi" } },
        });
        (name.to_owned(), serde_json::from_value(claim).expect("a claim"))
    }

    fn spec(disks: Value) -> SyncPairSpec {
        serde_json::from_value(json!({ "vmName": "vm", "peer": "osaka", "disks": disks })).expect("a spec")
    }

    fn on_claim(name: &str) -> Value {
        json!({ "name": name, "persistentVolumeClaim": { "claimName": format!("vm-{name}") } })
    }

    #[test]
    fn every_plain_disk_on_a_claim_is_taken_in_the_vms_order_and_nothing_else() {
        let vm = vm(
            json!([{ "name": "data" }, { "name": "cd", "cdrom": {} }, { "name": "init" }, { "name": "root" }]),
            json!([on_claim("root"), { "name": "init", "cloudInitNoCloud": {} }, on_claim("cd"), on_claim("data")]),
        );
        let claims = BTreeMap::from([
            claim("vm-root", "Block", "ReadWriteOnce"),
            claim("vm-cd", "Block", "ReadWriteOnce"),
            claim("vm-data", "Filesystem", "ReadWriteMany"),
        ]);
        let classes = BTreeMap::from([("fast".to_owned(), "quick".to_owned())]);
        let found = disks(&spec(json!([])), &vm, &claims, &BTreeMap::new(), &classes).expect("two disks");
        let short: Vec<_> = found.iter().map(|disk| (disk.name.as_str(), disk.access, disk.size_bytes)).collect();
        assert_eq!(
            short,
            [("root", AccessMode::ReadWriteOnce, Some(64 << 20)), ("data", AccessMode::ReadWriteMany, None)]
        );
        assert!(found.iter().all(|disk| disk.target_class.as_deref() == Some("quick")));
        let sizes = BTreeMap::from([("data".to_owned(), 60 << 20)]);
        let told = disks(&spec(json!([])), &vm, &claims, &sizes, &classes).expect("two disks");
        assert_eq!(told[1].size_bytes, Some(60 << 20));
    }

    #[test]
    fn a_disk_that_was_asked_for_and_cannot_be_synchronised_is_refused_by_name() {
        let vm =
            vm(json!([{ "name": "root" }, { "name": "cd", "cdrom": {} }]), json!([on_claim("root"), on_claim("cd")]));
        let claims = |access| BTreeMap::from([claim("vm-root", "Block", access), claim("vm-cd", "Block", access)]);
        for (asked, access, words) in [
            (json!([{ "name": "cd" }]), "ReadWriteOnce", "CD-ROM"),
            (json!([{ "name": "other" }]), "ReadWriteOnce", "no volume other"),
            (json!([]), "ReadWriteOncePod", "ReadWriteOncePod"),
            (json!([]), "ReadOnlyMany", "cannot be written"),
        ] {
            let refusal = disks(&spec(asked), &vm, &claims(access), &BTreeMap::new(), &BTreeMap::new());
            let refusal = refusal.expect_err(words);
            assert!(refusal.message.contains(words), "{refusal:?}");
        }
    }

    #[test]
    fn a_vm_without_a_disk_on_a_claim_is_no_pair() {
        let vm = vm(json!([{ "name": "init" }]), json!([{ "name": "init", "cloudInitNoCloud": {} }]));
        let refusal = disks(&spec(json!([])), &vm, &BTreeMap::new(), &BTreeMap::new(), &BTreeMap::new());
        assert_eq!(refusal.expect_err("no disk").reason, Reason::NoDisks);
    }
}
