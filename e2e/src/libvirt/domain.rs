//! A VM's domain as KubeVirt's converter writes it (`pkg/virt-launcher/virtwrap/converter`), with our test guest inside.

use std::path::PathBuf;

use crate::guest::{self, BootFiles};
use crate::qemu::Machine;

/// Where the guest's control line is inside a site.
pub(super) const CONTROL_SOCKET: &str = "/run/kubevirt-private/control.sock";
/// Where the guest's serial console is written inside a site.
pub(super) const SERIAL_LOG: &str = "/var/log/libvirt/serial.log";
/// The emptyDisk that our VMI webhook adds: the disk that libvirt copies.
pub(super) const EMPTY_DISK: &str = "/run/libvirt/empty-disks/watari-copyable.qcow2";
/// Its name at the domain's SATA controller.
const EMPTY_DISK_TARGET: &str = "sda";

/// A VM of the libvirt pair.
#[derive(Clone, Debug)]
pub struct VirtualMachine {
    pub name: String,
    /// The serial numbers of its disks are the names of the VMI's volumes.
    pub machine: Machine,
    /// Has the 1 MiB emptyDisk that libvirt copies. Without it, and without the marker, libvirt refuses to migrate.
    pub empty_disk: bool,
}

impl VirtualMachine {
    /// A VM of that shape, with the emptyDisk.
    pub fn new(name: impl Into<String>, machine: Machine) -> VirtualMachine {
        VirtualMachine { name: name.into(), machine, empty_disk: true }
    }

    /// The VMI as JSON, as far as hooks look at it.
    pub(super) fn vmi(&self, target: bool) -> String {
        let volumes: Vec<_> = self
            .machine
            .disks
            .iter()
            // KubeVirt has replaced the claims by host disks when it calls hooks.
            .map(|v| serde_json::json!({ "name": v, "hostDisk": { "path": data_path(v), "type": "Disk" } }))
            .collect();
        let mut vmi = serde_json::json!({
            "metadata": { "name": self.name, "namespace": "default", "uid": "9b1ac4a4-2c5e-4a8b-8a0b-6d2e9be4c1aa" },
            "spec": { "volumes": volumes },
            "status": { "phase": if target { "WaitingForSync" } else { "Scheduled" } },
        });
        if target {
            vmi["metadata"]["annotations"] = serde_json::json!({ "kubevirt.io/create-migration-target": "true" });
            vmi["status"]["migrationState"] = serde_json::json!({ "targetPod": "virt-launcher-target" });
        }
        vmi.to_string()
    }

    /// The domain as the first hook call gets it.
    pub(super) fn domain(&self) -> Result<String, guest::Error> {
        let BootFiles { kernel, initramfs } = BootFiles::prepare()?;
        let Machine { memory_mib, cpus, disks, guest } = &self.machine;
        let settings: String = guest.iter().map(|setting| format!(" watari.{setting}")).collect();
        let append = format!("console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on{settings}");
        let mut devices: String =
            disks.iter().zip('a'..='z').map(|(volume, letter)| data_disk(volume, letter)).collect();
        if self.empty_disk {
            devices.push_str(&disk("watari-copyable", "qcow2", EMPTY_DISK, "sata", EMPTY_DISK_TARGET));
        }
        let name = &self.name;
        Ok(format!(
            r#"<domain type="qemu" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">
	<name>default_{name}</name>
	<uuid>5d307ca9-b3ef-428c-8861-06e72d69f223</uuid>
	<memory unit="MiB">{memory_mib}</memory>
	<os>
		<type arch="x86_64" machine="q35">hvm</type>
		<kernel>{kernel}</kernel>
		<initrd>{initramfs}</initrd>
		<cmdline>{append}</cmdline>
	</os>
	<devices>
		<channel type="unix">
			<source mode="bind" path="{CONTROL_SOCKET}"></source>
			<target type="virtio" name="io.watari.control"></target>
		</channel>
		<controller type="usb" index="0" model="none"></controller>
		<controller type="virtio-serial" index="0" model="virtio-non-transitional"></controller>
		<memballoon model="none"></memballoon>
{devices}		<serial type="file">
			<source path="{SERIAL_LOG}"></source>
			<target port="0"></target>
		</serial>
	</devices>
	<clock offset="utc"></clock>
	<metadata>
		<kubevirt xmlns="http://kubevirt.io">
			<uid>9b1ac4a4-2c5e-4a8b-8a0b-6d2e9be4c1aa</uid>
		</kubevirt>
	</metadata>
	<features>
		<acpi></acpi>
	</features>
	<cpu mode="custom" match="exact" check="none">
		<model>qemu64</model>
		<feature name="rdrand" policy="require"></feature>
		<topology sockets="1" cores="{cpus}" threads="1"></topology>
	</cpu>
	<vcpu placement="static">{cpus}</vcpu>
</domain>"#,
            kernel = kernel.display(),
            initramfs = initramfs.display(),
        ))
    }
}

/// Where KubeVirt has a claim's file; nothing is there at our sites, since the hook has every such disk served over NBD.
fn data_path(volume: &str) -> PathBuf {
    PathBuf::from(format!("/var/run/kubevirt-private/vmi-disks/{volume}/disk.img"))
}

fn data_disk(volume: &str, letter: char) -> String {
    let path = data_path(volume);
    disk(volume, "raw", &path.display().to_string(), "virtio", &format!("vd{letter}"))
}

fn disk(volume: &str, format: &str, file: &str, bus: &str, target: &str) -> String {
    let io = if format == "raw" { " io=\"native\"" } else { "" };
    format!(
        r#"		<disk device="disk" type="file">
			<source file="{file}"></source>
			<target bus="{bus}" dev="{target}"></target>
			<serial>{volume}</serial>
			<driver cache="none" error_policy="stop"{io} name="qemu" type="{format}" discard="unmap"></driver>
			<alias name="ua-{volume}"></alias>
		</disk>
"#
    )
}
