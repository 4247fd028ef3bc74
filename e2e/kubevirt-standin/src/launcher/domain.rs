//! The domain of a VMI as KubeVirt's converter writes it (`pkg/virt-launcher/virtwrap/converter`), but for the kernel. Pure.

use std::hash::{DefaultHasher, Hash, Hasher};

use serde_json::{Value, json};

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
    let devices = devices(vmi, disks);
    format!(
        r#"<domain type="qemu">
	<name>{name}</name>
	<uuid>{uuid}</uuid>
	<memory unit="MiB">{memory}</memory>
	<os>
		<type arch="x86_64" machine="q35">hvm</type>
		<kernel>{GUEST_FOLDER}/vmlinuz</kernel>
		<initrd>{GUEST_FOLDER}/initramfs.cpio</initrd>
		<cmdline>console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on{settings}</cmdline>
	</os>
	<devices>
		<emulator>/usr/bin/qemu-system-x86_64</emulator>
		<channel type="unix">
			<source mode="bind" path="{PRIVATE_FOLDER}/control.sock"></source>
			<target type="virtio" name="io.watari.control"></target>
		</channel>
		<controller type="usb" index="0" model="none"></controller>
		<controller type="virtio-serial" index="0" model="virtio-non-transitional"></controller>
		<memballoon model="none"></memballoon>
{devices}		<serial type="file">
			<source path="{PRIVATE_FOLDER}/serial.log"></source>
			<target port="0"></target>
		</serial>
	</devices>
	<clock offset="utc"></clock>
	<metadata>
		<kubevirt xmlns="http://kubevirt.io">
			<uid>{uid}</uid>
		</kubevirt>
	</metadata>
	<features>
		<acpi></acpi>
	</features>
	<cpu mode="custom" match="exact" check="none">
		<model>qemu64</model>
		<feature name="rdrand" policy="require"></feature>
		<topology sockets="1" cores="1" threads="1"></topology>
	</cpu>
	<vcpu placement="static">1</vcpu>
</domain>"#
    )
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
            let (kind, attribute) = if disk.block { ("block", "dev") } else { ("file", "file") };
            text += &device(volume, [kind, attribute, &disk.path], "raw", bus, &target().unwrap_or_default());
        } else if let Some(disk) = empty.iter().find(|disk| disk.volume == volume) {
            text += &device(volume, ["file", "file", &disk.path], "qcow2", bus, &target().unwrap_or_default());
        }
    }
    text
}

fn device(volume: &str, [kind, attribute, path]: [&str; 3], format: &str, bus: &str, target: &str) -> String {
    let io = if format == "raw" { " io=\"native\"" } else { "" };
    format!(
        r#"		<disk device="disk" type="{kind}">
			<source {attribute}="{path}"></source>
			<target bus="{bus}" dev="{target}"></target>
			<serial>{volume}</serial>
			<driver cache="none" error_policy="stop"{io} name="qemu" type="{format}" discard="unmap"></driver>
			<alias name="ua-{volume}"></alias>
		</disk>
"#
    )
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
