//! One site's libvirtd in mount, UTS and network namespaces of its own.
//!
//! Invariant: when a [`LibvirtSite`] is dropped, every process inside its mount namespace has been killed, so that the namespace and all its
//! mounts are gone. If the harness itself is killed, libvirtd dies with it and the reaper ends QEMU by its network namespace.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use super::Error;
use crate::process::{Builder, Process, wait_until};
use crate::reaper;
use crate::site::Site;

/// libvirtd needs well below a second; two of them on a loaded machine more.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// What a site has for itself: folder of the site, place inside.
const OWN_FOLDERS: [(&str, &str); 4] =
    [("run", "/run"), ("etc", "/etc/libvirt"), ("lib", "/var/lib/libvirt"), ("log", "/var/log/libvirt")];
/// What libvirt found out about the installed QEMU: several seconds' work, the same for all sites and runs.
const CACHE: &str = "/var/cache/libvirt";

/// Mounts the site's folders over the machine's and becomes libvirtd. Arguments: folder, host name, cache, places
/// (`own:place …`), the cache's place.
const ENTER: &str = r#"
set -e
folder=$1 name=$2 cache=$3
for place in $4; do
    mkdir -p "${place#*:}"
    mount --bind "$folder/${place%%:*}" "${place#*:}"
done
mkdir -p "$5"
mount --bind "$cache" "$5"
# libvirt looks its own host name up, many times; as in a Pod it is in /etc/hosts, whatever the machine's resolver is.
printf '127.0.0.1 localhost %s\n' "$name" >"$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
hostname "$name"
exec libvirtd
"#;

/// As virt-launcher's own: no ownership changes, no cgroups, no namespaces, no log daemon.
const QEMU_CONF: &str = "user = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\nremember_owner = 0\n\
    security_driver = \"none\"\nnamespaces = []\ncgroup_controllers = []\nstdio_handler = \"file\"\n";

/// A running libvirtd and the place it lives in.
pub struct LibvirtSite {
    /// "a" or "b".
    pub name: String,
    daemon: Mutex<Process>,
    pid: u32,
    pub(super) folder: PathBuf,
    pub(super) netns: PathBuf,
    pub(super) address: std::net::Ipv4Addr,
}

impl LibvirtSite {
    /// Starts libvirtd at a site; returns when it answers.
    pub fn start(site: &Site) -> Result<LibvirtSite, Error> {
        let folder = site.dir.join("libvirt");
        for (own, _) in OWN_FOLDERS {
            let path = folder.join(own);
            std::fs::create_dir_all(&path).map_err(Error::io("a folder of the site", &path))?;
        }
        let cache = reaper::cache_folder().join("libvirt-cache");
        std::fs::create_dir_all(&cache).map_err(Error::io("libvirt's cache", &cache))?;
        let name = format!("watari-{}", site.name);
        // A UUID that is the site's own: libvirt refuses to migrate a VM to the host that it is on.
        let uuid = format!("77617461-7269-4000-8000-{:012x}", u32::from(site.address));
        let daemon_conf = format!(
            "host_uuid = \"{uuid}\"\nauth_unix_rw = \"none\"\nunix_sock_rw_perms = \"0777\"\nlog_outputs = \"3:stderr\"\n"
        );
        for (file, text) in [("libvirtd.conf", daemon_conf.as_str()), ("qemu.conf", QEMU_CONF)] {
            let path = folder.join("etc").join(file);
            std::fs::write(&path, text).map_err(Error::io("libvirt's configuration", &path))?;
        }
        let places = OWN_FOLDERS.map(|(own, place)| format!("{own}:{place}")).join(" ");
        let daemon = Builder::new(format!("libvirtd@{}", site.name), "unshare", site.dir.join("libvirtd.log"))
            .netns(&site.netns)
            .args(["--mount", "--uts", "--propagation", "private", "--", "/bin/sh", "-c", ENTER, "watari-libvirtd"])
            .arg(&folder)
            .arg(name)
            .arg(&cache)
            .arg(places)
            .arg(CACHE)
            .spawn()?;
        let (netns, pid) = (site.netns.path(), daemon.pid());
        let daemon = Mutex::new(daemon);
        let started = LibvirtSite { name: site.name.clone(), daemon, pid, folder, netns, address: site.address };
        started.wait_for_answer()?;
        Ok(started)
    }

    fn wait_for_answer(&self) -> Result<(), Error> {
        let what = format!("libvirtd of site {}", self.name);
        wait_until(&what, START_TIMEOUT, || match self.check() {
            Err(ended) => Some(Err(ended)),
            Ok(()) if self.inside("/run/libvirt/libvirt-sock").exists() => {
                self.virsh(&["list", "--all"]).ok().map(|_| Ok(()))
            }
            Ok(()) => None,
        })?
    }

    /// Fails when libvirtd has ended; with the end of its log.
    pub fn check(&self) -> Result<(), Error> {
        Ok(self.process().check()?)
    }

    fn process(&self) -> MutexGuard<'_, Process> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the harness finds what is at `path` inside this site. The result is short enough for a unix socket, whatever the
    /// workspace's own path, and valid while the site lives.
    pub fn inside(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        let relative = path.strip_prefix("/").expect("a place inside a site is an absolute path");
        PathBuf::from(format!("/proc/{}/root", self.pid)).join(relative)
    }

    /// A folder inside this site, made if need be; returns where the harness finds it.
    pub fn folder_inside(&self, path: impl AsRef<Path>) -> Result<PathBuf, Error> {
        let folder = self.inside(path);
        self.check()?;
        std::fs::create_dir_all(&folder).map_err(Error::io("a folder inside the site", &folder))?;
        Ok(folder)
    }

    /// A process inside this site's namespaces, as a container of the virt-launcher Pod is: it sees the same `/run`. `site` is the one
    /// that this libvirtd was started at; the log is outside.
    pub fn command(&self, site: &Site, name: &str, program: impl AsRef<std::ffi::OsStr>) -> Builder {
        let namespaces = |kind: &str| format!("/proc/{}/ns/{kind}", self.pid);
        Builder::new(format!("{name}@{}", self.name), "nsenter", site.dir.join(format!("{name}.log")))
            .netns(&site.netns)
            .arg(format!("--mount={}", namespaces("mnt")))
            .arg(format!("--uts={}", namespaces("uts")))
            .arg("--")
            .arg(program)
    }

    /// Runs virsh against this libvirtd and returns what it prints.
    pub fn virsh(&self, arguments: &[&str]) -> Result<String, Error> {
        let output = Command::new("virsh")
            .args(["-q", "-c", &self.uri()])
            .args(arguments)
            .output()
            .map_err(|source| Error::Tool { program: "virsh", source })?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
        }
        self.check()?;
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(Error::Virsh { site: self.name.clone(), command: arguments.join(" "), message })
    }

    pub(super) fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.inside("/run/libvirt/libvirt-sock").display())
    }

    /// What libvirtd wrote to its log so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.process().log()).unwrap_or_default()).into_owned()
    }

    /// Processes inside this site's mount namespace, libvirtd included.
    fn members(&self) -> Vec<libc::pid_t> {
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        let Some(ours) = namespace(&self.pid.to_string()) else { return Vec::new() };
        // Before the shell has made its namespace it is still in the machine's.
        if Some(&ours) == namespace("self").as_ref() {
            return Vec::new();
        }
        let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.bytes().all(|b| b.is_ascii_digit()) && namespace(name).as_ref() == Some(&ours))
            .filter_map(|name| name.parse().ok())
            .collect()
    }

    /// Runs `job` on a thread inside this site's network and mount namespaces, so that the paths it opens are the site's own.
    pub fn spawn_inside<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<io::Result<T>>, Error> {
        let open = |kind: &str| {
            let path = format!("/proc/{}/ns/{kind}", self.pid);
            File::open(&path).map_err(Error::io("a namespace of the site", path))
        };
        let (network, mounts) = (open("net")?, open("mnt")?);
        Ok(std::thread::spawn(move || {
            // SAFETY: moves only this thread, which first stops sharing root and working folder with the others, as the kernel
            // demands; both descriptors are open.
            let entered = unsafe {
                libc::unshare(libc::CLONE_FS) == 0
                    && libc::setns(network.as_raw_fd(), libc::CLONE_NEWNET) == 0
                    && libc::setns(mounts.as_raw_fd(), libc::CLONE_NEWNS) == 0
            };
            if entered { Ok(job()) } else { Err(io::Error::last_os_error()) }
        }))
    }

    /// Enters this site's network with a job, e.g. to open a socket there.
    pub(super) fn enter_network<T: Send>(&self, job: impl FnOnce() -> T + Send) -> Result<T, Error> {
        Ok(crate::netns::enter(&self.netns, job)?)
    }
}

impl Drop for LibvirtSite {
    fn drop(&mut self) {
        let daemon = self.pid as libc::pid_t;
        for pid in self.members().into_iter().filter(|pid| *pid != daemon) {
            // SAFETY: the process lives in a mount namespace that only this site's processes are in.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        self.process().kill9();
    }
}
