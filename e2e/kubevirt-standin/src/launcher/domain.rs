//! The domain of a VMI as KubeVirt's converter writes it (`pkg/virt-launcher/virtwrap/converter`), but for the kernel. Pure.

use std::hash::{DefaultHasher, Hash, Hasher};

use serde_json::{Value, json};
use watari_e2e::libvirt::domain::{self, Domain, FileOrDevice};

use super::GUEST_ANNOTATION;
use crate::render::{DiskFile, PRIVATE_FOLDER};

/// Where the image has the guest's kernel and initramfs.
pub const GUEST_FOLDER: &str = "/guest";
/// Where KubeVirt keeps emptyDisks (`pkg/emptydisk`).
const EMPTY_DISKS: &str = "/var/run/libvirt/empty-disks";

fn text<'v>(value: &'v Value, otherwise: &'v str) -> &'v str {
    value.as_str().unwrap_or(otherwise)
}

/// `namespace_name`, as KubeVirt calls domains.
pub fn name(vmi: &Value) -> String {
    let metadata = &vmi["metadata"];
    format!("{}_{}", text(&metadata["namespace"], "default"), text(&metadata["name"], ""))
}

/// Claims in Filesystem mode have been replaced by host disks when hooks are called (`hostdisk.ReplacePVCByHostDisk`).
pub fn as_hooks_see_it(vmi: &Value, disks: &[DiskFile]) -> Value {
    let mut vmi = vmi.clone();
    for volume in vmi["spec"]["volumes"].as_array_mut().into_iter().flatten() {
        let file = disks.iter().find(|disk| !disk.block && volume["name"] == disk.volume.as_str());
        if let (Some(file), Some(volume)) = (file, volume.as_object_mut()) {
            volume.remove("persistentVolumeClaim");
            volume.remove("dataVolume");
            volume.insert("hostDisk".into(), json!({ "path": file.path, "type": "Disk" }));
        }
    }
    vmi
}

/// A local disk that both sides of a migration make empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmptyDisk {
    pub volume: String,
    pub path: String,
    /// As in the VMI: `1Mi`.
    pub capacity: String,
}

pub fn empty_disks(vmi: &Value) -> Vec<EmptyDisk> {
    let volumes = vmi["spec"]["volumes"].as_array();
    let empty = volumes.into_iter().flatten().filter_map(|volume| {
        let capacity = volume["emptyDisk"]["capacity"].as_str()?.to_owned();
        let volume = volume["name"].as_str()?.to_owned();
        Some(EmptyDisk { path: format!("{EMPTY_DISKS}/{volume}.qcow2"), volume, capacity })
    });
    empty.collect()
}

/// The machine's own UUID, when the VMI does not say: the same for the same name, as KubeVirt's.
fn uuid(vmi: &Value) -> String {
    if let Some(uuid) = vmi["spec"]["domain"]["firmware"]["uuid"].as_str() {
        return uuid.to_owned();
    }
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, text(&vmi["metadata"]["name"], "")).hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    };
    let (high, low) = (half(0), half(1));
    format!("{}-{}-4{}-8{}-{}", &high[..8], &high[8..12], &high[13..], &low[1..4], &low[4..])
}

/// The domain.
pub fn domain(vmi: &Value, disks: &[DiskFile]) -> String {
    let metadata = &vmi["metadata"];
    let (name, uid, uuid) = (name(vmi), text(&metadata["uid"], ""), uuid(vmi));
    let guest = text(&metadata["annotations"][GUEST_ANNOTATION], "");
    let settings: String = guest.split_whitespace().map(|setting| format!(" watari.{setting}")).collect();
    let memory = text(&vmi["spec"]["domain"]["memory"]["guest"], "192Mi").trim_end_matches("Mi");
    Domain {
        namespaces: "",
        name: &name,
        uuid: &uuid,
        vmi_uid: uid,
        memory_mib: memory,
        cpus: 1,
        kernel: &format!("{GUEST_FOLDER}/vmlinuz"),
        initramfs: &format!("{GUEST_FOLDER}/initramfs.cpio"),
        settings: &settings,
        emulator: Some("/usr/bin/qemu-system-x86_64"),
        control_socket: &format!("{PRIVATE_FOLDER}/control.sock"),
        serial_log: &format!("{PRIVATE_FOLDER}/serial.log"),
        disks: &devices(vmi, disks),
    }
    .to_xml()
}

/// Claims and emptyDisks in the order of the VMI's volumes, each on the bus that its disk names.
fn devices(vmi: &Value, disks: &[DiskFile]) -> String {
    let empty = empty_disks(vmi);
    let (mut virtio, mut sata) = ('a'..='z', 'a'..='z');
    let mut text = String::new();
    for volume in vmi["spec"]["volumes"].as_array().into_iter().flatten().filter_map(|volume| volume["name"].as_str()) {
        let wishes = vmi["spec"]["domain"]["devices"]["disks"].as_array();
        let wish = wishes.into_iter().flatten().find(|disk| disk["name"] == volume);
        let bus = wish.and_then(|disk| disk["disk"]["bus"].as_str()).unwrap_or("virtio");
        let mut target = || match bus {
            "virtio" => virtio.next().map(|letter| format!("vd{letter}")),
            _ => sata.next().map(|letter| format!("sd{letter}")),
        };
        if let Some(disk) = disks.iter().find(|disk| disk.volume == volume) {
            let source = match disk.block {
                true => FileOrDevice::Device(&disk.path),
                false => FileOrDevice::File(&disk.path),
            };
            text += &domain::disk(volume, source, "raw", bus, &target().unwrap_or_default());
        } else if let Some(disk) = empty.iter().find(|disk| disk.volume == volume) {
            let source = FileOrDevice::File(&disk.path);
            text += &domain::disk(volume, source, "qcow2", bus, &target().unwrap_or_default());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vmi() -> Value {
        json!({
            "metadata": { "name": "vm", "namespace": "shop", "uid": "1" },
            "spec": {
                "domain": { "devices": { "disks": [{ "name": "seed", "disk": { "bus": "sata" } }] } },
                "volumes": [
                    { "name": "root", "dataVolume": { "name": "data" } },
                    { "name": "seed", "emptyDisk": { "capacity": "1Mi" } },
                    { "name": "network", "configMap": { "name": "no disk of ours" } },
                ],
            },
        })
    }

    fn root() -> DiskFile {
        DiskFile { volume: "root".into(), path: "/d/disk.img".into(), block: false, bytes: 1, shared: false }
    }

    #[test]
    fn every_claim_and_empty_disk_is_a_disk_on_its_bus() {
        let xml = domain(&vmi(), &[root()]);
        assert!(xml.contains(r#"<target bus="virtio" dev="vda">"#), "{xml}");
        assert!(xml.contains(r#"<target bus="sata" dev="sda">"#), "{xml}");
        assert_eq!(xml.matches("<disk ").count(), 2);
        assert!(xml.contains("<name>shop_vm</name>"));
    }

    #[test]
    fn a_machine_keeps_its_uuid_whatever_its_vmi_is_called_inside() {
        let mut other = vmi();
        other["metadata"]["uid"] = "2".into();
        assert_eq!(uuid(&vmi()), uuid(&other));
        assert_eq!(uuid(&vmi()).len(), 36);
    }

    #[test]
    fn hooks_are_shown_host_disks_in_the_place_of_claims() {
        let seen = as_hooks_see_it(&vmi(), &[root()]);
        assert_eq!(seen["spec"]["volumes"][0]["hostDisk"]["path"], "/d/disk.img");
        assert!(seen["spec"]["volumes"][0].get("dataVolume").is_none());
    }
}
