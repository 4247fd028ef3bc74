//! A VM at a site: defined through the hook, started, looked at, ended.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use super::domain::{CONTROL_SOCKET, EMPTY_DISK, SERIAL_LOG};
use super::{Error, Hooks, LibvirtSite, VirtualMachine};
use crate::guest::Control;

/// Where virt-launcher looks for hook sockets; each sidecar has a folder of its own below.
pub(super) const HOOKS_FOLDER: &str = "/run/kubevirt-hooks";
/// Our sidecar's folder; in a Pod it sees only this one.
const SIDECAR_FOLDER: &str = "/run/kubevirt-hooks/hook-sidecar-0";
/// virt-launcher waits 240 s for its sidecars; ours is up in a fraction of this.
const HOOK_PATIENCE: Duration = Duration::from_secs(30);
/// KubeVirt repeats a refused SyncMigrationTarget about once per second (kubevirt.md, appendix 3, 4).
const GATE_POLL: Duration = Duration::from_secs(1);

/// A view of a VM at one site. It owns nothing: the VM may be at the other site a moment later.
pub struct RunningVm<'s> {
    site: &'s LibvirtSite,
    domain: String,
}

impl VirtualMachine {
    /// libvirt's name of the VM.
    pub fn domain_name(&self) -> String {
        format!("default_{}", self.name)
    }
}

impl LibvirtSite {
    /// The folder that a hook sidecar of this site gets as its own, as seen inside the site; made by this call.
    pub fn sidecar_folder(&self) -> Result<PathBuf, Error> {
        self.folder_inside(SIDECAR_FOLDER)?;
        Ok(SIDECAR_FOLDER.into())
    }

    /// Finds this site's hook sidecar as virt-launcher does.
    pub fn hooks(&self) -> Result<Hooks, Error> {
        Hooks::collect(&self.name, &self.inside(HOOKS_FOLDER), HOOK_PATIENCE)
    }

    /// Boots a VM's domain through the hook: three calls with KubeVirt's losses in between, each answer defined. Returns the domain
    /// that libvirt has in the end, in the sidecar's words.
    pub fn define_through_hook(&self, hooks: &Hooks, vm: &VirtualMachine) -> Result<String, Error> {
        self.make_places(vm)?;
        hooks.boot(&vm.domain()?, &vm.vmi(false), |xml| self.define(xml))
    }

    /// What virt-handler and virt-launcher do at a migration's target: make the local disks, ask the hook. A refusal is
    /// [`Error::Refused`].
    pub fn prepare_target(&self, hooks: &Hooks, vm: &VirtualMachine) -> Result<(), Error> {
        self.make_places(vm)?;
        let refused = |refusal| Error::Refused { site: self.name.clone(), refusal };
        hooks.target(&vm.domain()?, &vm.vmi(true)).map_err(refused)
    }

    /// The same, asked again once per second until the hook lets the VM in, as KubeVirt does. Fails with the last refusal.
    pub fn wait_at_gate(&self, hooks: &Hooks, vm: &VirtualMachine, patience: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + patience;
        loop {
            match self.prepare_target(hooks, vm) {
                Err(Error::Refused { .. }) if Instant::now() < deadline => std::thread::sleep(GATE_POLL),
                other => return other,
            }
        }
    }

    fn define(&self, xml: &str) -> Result<(), Error> {
        let path = self.folder.join("domain.xml");
        std::fs::write(&path, xml).map_err(Error::io("the domain", &path))?;
        self.virsh(&["define", &path.display().to_string()]).map(drop)
    }

    /// Folders, and the disk that libvirt copies: virt-launcher makes both at both sites.
    fn make_places(&self, vm: &VirtualMachine) -> Result<(), Error> {
        for place in [CONTROL_SOCKET, SERIAL_LOG, EMPTY_DISK] {
            self.folder_inside(PathBuf::from(place).parent().expect("an absolute path of a file"))?;
        }
        let path = self.inside(EMPTY_DISK);
        if !vm.empty_disk || path.exists() {
            return Ok(());
        }
        let mut create = Command::new("qemu-img");
        let output = create.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M").output();
        let output = output.map_err(|source| Error::Tool { program: "qemu-img", source })?;
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            Ok(())
        } else {
            Err(Error::io("an emptyDisk", path)(std::io::Error::other(message)))
        }
    }

    /// Starts a VM that is defined here.
    pub fn start_vm(&self, vm: &VirtualMachine) -> Result<RunningVm<'_>, Error> {
        self.virsh(&["start", &vm.domain_name()])?;
        Ok(self.vm(vm))
    }

    /// A VM at this site, whatever its state.
    pub fn vm(&self, vm: &VirtualMachine) -> RunningVm<'_> {
        RunningVm { site: self, domain: vm.domain_name() }
    }
}

impl RunningVm<'_> {
    /// `running`, `paused`, `shut off`, …, and libvirt's reason in brackets.
    pub fn state(&self) -> Result<String, Error> {
        self.site.virsh(&["domstate", "--reason", &self.domain])
    }

    /// The guest's control line at this site.
    pub fn control(&self) -> Control {
        Control::new(self.control_socket())
    }

    /// Where the harness finds the guest's control line at this site.
    pub fn control_socket(&self) -> PathBuf {
        self.site.inside(CONTROL_SOCKET)
    }

    /// What the guest printed at this site.
    pub fn serial(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.site.inside(SERIAL_LOG)).unwrap_or_default()).into_owned()
    }

    /// The live domain as libvirt has it.
    pub fn xml(&self) -> Result<String, Error> {
        self.site.virsh(&["dumpxml", &self.domain])
    }

    /// Process id of QEMU, from libvirt's own record.
    pub fn qemu_pid(&self) -> Result<i32, Error> {
        let path = self.site.inside(format!("/run/libvirt/qemu/{}.pid", self.domain));
        let text = std::fs::read_to_string(&path).map_err(Error::io("QEMU's process id", &path))?;
        text.trim().parse().map_err(|e| Error::io("QEMU's process id", path)(std::io::Error::other(e)))
    }

    /// `kill -9` of QEMU, as a node's out-of-memory killer would.
    pub fn kill_qemu(&self) -> Result<(), Error> {
        let pid = self.qemu_pid()?;
        // SAFETY: libvirt has just named it as its running QEMU.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        Ok(())
    }

    /// Continues a VM that I/O errors have paused, as KubeVirt's next sync does.
    pub fn unpause(&self) -> Result<(), Error> {
        self.site.virsh(&["resume", &self.domain]).map(drop)
    }

    /// QEMU's end in good order (SIGTERM: it flushes and closes its disks), and libvirt forgets the VM.
    pub fn end(&self) -> Result<(), Error> {
        self.site.virsh(&["destroy", "--graceful", &self.domain])?;
        self.forget()
    }

    /// libvirt forgets a VM that does not run here: what virt-launcher's end does.
    pub fn forget(&self) -> Result<(), Error> {
        self.site.virsh(&["undefine", "--nvram", &self.domain]).map(drop)
    }
}
