//! virt-launcher: libvirt and QEMU (TCG) in the compute container, the guest's whole life.
//!
//! libvirtd runs unprivileged, for the session of uid 107, as KubeVirt's does. The guest boots from a kernel in the image, not from its
//! disk; what it does there is the test guest of `watari-e2e`, whose control line is `control.sock` in the private folder.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use crate::hooks::{self, Hooks};
use crate::render::{
    DISKS_VARIABLE, DiskFile, HOOKS_FOLDER, HOOKS_VARIABLE, PRIVATE_FOLDER, RUNNING_FILE, VMI_VARIABLE,
};

/// Calls of OnDefineDomain at a boot with placeholder ports (`nichotplug.go:226`).
const DEFINES_PER_BOOT: usize = 3;
/// libvirtd asks QEMU what it can; the first time that takes seconds.
const LIBVIRT_PATIENCE: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(300);
/// Where the image has the guest's kernel and initramfs.
pub const GUEST_FOLDER: &str = "/guest";
/// Settings of the test guest, `NAME=VALUE …`; an annotation of the VMI.
pub const GUEST_ANNOTATION: &str = "standin.watari.internal/guest";

/// Why the launcher gives up; the Pod fails of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0} is not set: this program runs in a Pod that kubevirt-standin rendered")]
    Unset(&'static str),
    #[error("{name}: {source}")]
    Json { name: &'static str, source: serde_json::Error },
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    #[error("virsh {command}: {message}")]
    Virsh { command: String, message: String },
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    #[error("libvirtd does not answer after {} s", LIBVIRT_PATIENCE.as_secs())]
    Libvirt,
}

fn at(path: &str) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}

fn variable(name: &'static str) -> Result<String, Error> {
    std::env::var(name).map_err(|_| Error::Unset(name))
}

/// Runs the VM to its end. False if the guest did not end in good order.
pub async fn run() -> Result<bool, Error> {
    let vmi_text = variable(VMI_VARIABLE)?;
    let parse = |name| move |source| Error::Json { name, source };
    let vmi: Value = serde_json::from_str(&vmi_text).map_err(parse(VMI_VARIABLE))?;
    let disks: Vec<DiskFile> = serde_json::from_str(&variable(DISKS_VARIABLE)?).map_err(parse(DISKS_VARIABLE))?;
    let wanted: usize = serde_json::from_str(&variable(HOOKS_VARIABLE)?).map_err(parse(HOOKS_VARIABLE))?;
    let mut end = signal(SignalKind::terminate()).map_err(at("SIGTERM"))?;

    // virt-handler's work before the launcher is asked to start anything (host-disk.go:238).
    for disk in disks.iter().filter(|disk| !disk.block) {
        let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(&disk.path);
        let file = file.map_err(at(&disk.path))?;
        if file.metadata().map_err(at(&disk.path))?.len() < disk.bytes {
            file.set_len(disk.bytes).map_err(at(&disk.path))?;
        }
    }
    let hooks = Hooks::collect(Path::new(HOOKS_FOLDER), wanted).await?;
    tracing::info!(wanted, "hook sidecars are here");
    let mut libvirtd = start_libvirtd().await?;

    let name = domain_name(&vmi);
    let hooks_vmi = as_hooks_see_it(&vmi, &disks).to_string();
    let mut domain = hooks.on_define_domain(&domain(&vmi, &disks), &hooks_vmi).await?;
    define(&domain)?;
    for _ in 1..DEFINES_PER_BOOT {
        domain = hooks.on_define_domain(&domain, &hooks_vmi).await?;
        define(&domain)?;
    }
    virsh(&["start", &name])?;
    tracing::info!(name, "the guest runs");
    std::fs::write(RUNNING_FILE, "").map_err(at(RUNNING_FILE))?;

    let good = loop {
        tokio::select! {
            _ = end.recv() => {
                tracing::info!("asked to end");
                // A refusal means that it has ended by itself meanwhile.
                let _ = virsh(&["destroy", "--graceful", &name]);
            }
            () = tokio::time::sleep(POLL) => {}
        }
        let state = virsh(&["domstate", "--reason", &name])?;
        if state.starts_with("shut off") || state.starts_with("crashed") {
            tracing::info!(state, "the guest has ended");
            break !state.contains("crashed") && !state.contains("failed");
        }
    };
    let _ = std::fs::remove_file(RUNNING_FILE);
    hooks.shutdown().await;
    let _ = libvirtd.kill();
    let _ = libvirtd.wait();
    Ok(good)
}

async fn start_libvirtd() -> Result<Child, Error> {
    let folder = format!("{PRIVATE_FOLDER}/libvirt");
    std::fs::create_dir_all(&folder).map_err(at(&folder))?;
    let write = |name: &str, text: &str| {
        let path = format!("{folder}/{name}");
        std::fs::write(&path, text).map_err(at(&path))
    };
    write("qemu.conf", "security_driver = \"none\"\nnamespaces = []\nstdio_handler = \"file\"\n")?;
    // libvirt refuses to migrate a VM to the host that it is on, and knows hosts by this.
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(at("/proc/sys/kernel/random/uuid"))?;
    write("libvirtd.conf", &format!("host_uuid = \"{}\"\nlog_outputs = \"3:stderr\"\n", uuid.trim()))?;
    let child = Command::new("/usr/sbin/libvirtd").stdin(Stdio::null()).spawn().map_err(at("libvirtd"))?;
    let begin = Instant::now();
    while virsh(&["list"]).is_err() {
        if begin.elapsed() > LIBVIRT_PATIENCE {
            return Err(Error::Libvirt);
        }
        tokio::time::sleep(POLL).await;
    }
    tracing::info!(seconds = begin.elapsed().as_secs_f64(), "libvirtd answers");
    Ok(child)
}

fn virsh(arguments: &[&str]) -> Result<String, Error> {
    let output =
        Command::new("virsh").args(["-q", "-c", "qemu:///session"]).args(arguments).output().map_err(at("virsh"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        false => Err(Error::Virsh {
            command: arguments.join(" "),
            message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        }),
    }
}

fn define(xml: &str) -> Result<(), Error> {
    let path = format!("{PRIVATE_FOLDER}/domain.xml");
    std::fs::write(&path, xml).map_err(at(&path))?;
    virsh(&["define", &path]).map(drop)
}

fn text<'v>(value: &'v Value, otherwise: &'v str) -> &'v str {
    value.as_str().unwrap_or(otherwise)
}

/// `namespace_name`, as KubeVirt calls domains.
fn domain_name(vmi: &Value) -> String {
    let metadata = &vmi["metadata"];
    format!("{}_{}", text(&metadata["namespace"], "default"), text(&metadata["name"], ""))
}

/// Claims in Filesystem mode have been replaced by host disks when hooks are called (`hostdisk.ReplacePVCByHostDisk`).
fn as_hooks_see_it(vmi: &Value, disks: &[DiskFile]) -> Value {
    let mut vmi = vmi.clone();
    for volume in vmi["spec"]["volumes"].as_array_mut().into_iter().flatten() {
        let file = disks.iter().find(|disk| !disk.block && volume["name"] == disk.volume.as_str());
        if let (Some(file), Some(volume)) = (file, volume.as_object_mut()) {
            volume.remove("persistentVolumeClaim");
            volume.insert("hostDisk".into(), serde_json::json!({ "path": file.path, "type": "Disk" }));
        }
    }
    vmi
}

/// The domain as KubeVirt's converter writes it, but for the kernel.
fn domain(vmi: &Value, disks: &[DiskFile]) -> String {
    let metadata = &vmi["metadata"];
    let (name, uid) = (domain_name(vmi), text(&metadata["uid"], ""));
    let guest = text(&metadata["annotations"][GUEST_ANNOTATION], "");
    let settings: String = guest.split_whitespace().map(|setting| format!(" watari.{setting}")).collect();
    let memory = text(&vmi["spec"]["domain"]["memory"]["guest"], "192Mi").trim_end_matches("Mi");
    let firmware = text(&vmi["spec"]["domain"]["firmware"]["uuid"], uid);
    let devices: String = disks.iter().zip('a'..='z').map(|(disk, letter)| data_disk(disk, letter)).collect();
    format!(
        r#"<domain type="qemu">
	<name>{name}</name>
	<uuid>{firmware}</uuid>
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

fn data_disk(disk: &DiskFile, letter: char) -> String {
    let DiskFile { volume, path, block, .. } = disk;
    let (kind, attribute) = if *block { ("block", "dev") } else { ("file", "file") };
    format!(
        r#"		<disk device="disk" type="{kind}">
			<source {attribute}="{path}"></source>
			<target bus="virtio" dev="vd{letter}"></target>
			<serial>{volume}</serial>
			<driver cache="none" error_policy="stop" io="native" name="qemu" type="raw" discard="unmap"></driver>
			<alias name="ua-{volume}"></alias>
		</disk>
"#
    )
}
