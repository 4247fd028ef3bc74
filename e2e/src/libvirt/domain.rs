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
        let mut disks: String = disks.iter().zip('a'..='z').map(|(volume, letter)| data_disk(volume, letter)).collect();
        if self.empty_disk {
            disks.push_str(&disk(
                "watari-copyable",
                FileOrDevice::File(EMPTY_DISK),
                "qcow2",
                "sata",
                EMPTY_DISK_TARGET,
            ));
        }
        Ok(Domain {
            namespaces: " xmlns:qemu=\"http://libvirt.org/schemas/domain/qemu/1.0\"",
            name: &format!("default_{}", self.name),
            uuid: "5d307ca9-b3ef-428c-8861-06e72d69f223",
            vmi_uid: "9b1ac4a4-2c5e-4a8b-8a0b-6d2e9be4c1aa",
            memory_mib: &memory_mib.to_string(),
            cpus: *cpus,
            kernel: &kernel.display().to_string(),
            initramfs: &initramfs.display().to_string(),
            settings: &settings,
            emulator: None,
            control_socket: CONTROL_SOCKET,
            serial_log: SERIAL_LOG,
            disks: &disks,
        }
        .to_xml())
    }
}

/// What of a domain differs between those who play virt-launcher with our test guest inside.
pub struct Domain<'a> {
    /// Attributes of the root beside its type, each after a space.
    pub namespaces: &'a str,
    pub name: &'a str,
    pub uuid: &'a str,
    pub vmi_uid: &'a str,
    pub memory_mib: &'a str,
    pub cpus: u32,
    pub kernel: &'a str,
    pub initramfs: &'a str,
    /// Of the guest's command line, each after a space.
    pub settings: &'a str,
    /// `None`: libvirt looks for QEMU itself.
    pub emulator: Option<&'a str>,
    pub control_socket: &'a str,
    pub serial_log: &'a str,
    /// As [`disk`] writes them.
    pub disks: &'a str,
}

impl Domain<'_> {
    pub fn to_xml(&self) -> String {
        let Domain { namespaces, name, uuid, vmi_uid, memory_mib, cpus, kernel, initramfs, settings, .. } = self;
        let Domain { emulator, control_socket, serial_log, disks, .. } = self;
        let emulator = emulator.map(|path| format!("\t\t<emulator>{path}</emulator>\n")).unwrap_or_default();
        format!(
            r#"<domain type="qemu"{namespaces}>
	<name>{name}</name>
	<uuid>{uuid}</uuid>
	<memory unit="MiB">{memory_mib}</memory>
	<os>
		<type arch="x86_64" machine="q35">hvm</type>
		<kernel>{kernel}</kernel>
		<initrd>{initramfs}</initrd>
		<cmdline>console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on{settings}</cmdline>
	</os>
	<devices>
{emulator}		<channel type="unix">
			<source mode="bind" path="{control_socket}"></source>
			<target type="virtio" name="io.watari.control"></target>
		</channel>
		<controller type="usb" index="0" model="none"></controller>
		<controller type="virtio-serial" index="0" model="virtio-non-transitional"></controller>
		<memballoon model="none"></memballoon>
{disks}		<serial type="file">
			<source path="{serial_log}"></source>
			<target port="0"></target>
		</serial>
	</devices>
	<clock offset="utc"></clock>
	<metadata>
		<kubevirt xmlns="http://kubevirt.io">
			<uid>{vmi_uid}</uid>
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
</domain>"#
        )
    }
}

/// Where KubeVirt has a claim's file; nothing is there at our sites, since the hook has every such disk served over NBD.
fn data_path(volume: &str) -> PathBuf {
    PathBuf::from(format!("/var/run/kubevirt-private/vmi-disks/{volume}/disk.img"))
}

fn data_disk(volume: &str, letter: char) -> String {
    let path = data_path(volume);
    disk(volume, FileOrDevice::File(&path.display().to_string()), "raw", "virtio", &format!("vd{letter}"))
}

/// What a disk lies on.
#[derive(Clone, Copy, Debug)]
pub enum FileOrDevice<'a> {
    File(&'a str),
    Device(&'a str),
}

/// One disk of [`Domain::disks`]; `volume` is the VMI's.
pub fn disk(volume: &str, source: FileOrDevice, format: &str, bus: &str, target: &str) -> String {
    let (kind, attribute, path) = match source {
        FileOrDevice::File(path) => ("file", "file", path),
        FileOrDevice::Device(path) => ("block", "dev", path),
    };
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
