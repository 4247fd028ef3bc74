//! Live migration between the sites, with virt-launcher's flags (`live-migration-source.go`): peer to peer over unix sockets, only the
//! listed disk copied, the domain persistent at the target.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::proxy::{DISKS, LIBVIRT, MEMORY, Proxies, ProxyBytes};
use super::{Error, LibvirtSite, VirtualMachine};
use crate::process::{Builder, Process};

/// How a migration shall go. The defaults are KubeVirt's.
#[derive(Clone, Debug)]
pub struct MigrationOptions {
    /// KubeVirt's maxDowntimeMs.
    pub downtime_limit: Duration,
    /// MiB per second, 0 for no limit.
    pub bandwidth_mib: u64,
    /// multifd connections; 0 for one classic stream.
    pub connections: u32,
    /// The longest that the whole may take.
    pub timeout: Duration,
}

impl Default for MigrationOptions {
    fn default() -> MigrationOptions {
        MigrationOptions {
            downtime_limit: Duration::from_millis(900),
            bandwidth_mib: 0,
            connections: 0,
            timeout: Duration::from_secs(300),
        }
    }
}

/// What a finished migration cost.
#[derive(Clone, Debug, Serialize)]
pub struct MigrationReport {
    /// From the call to its return, when the VM runs at the target and is gone from the source.
    pub total_seconds: f64,
    /// QEMU's downtime, as libvirt reports it.
    pub downtime_ms: Option<f64>,
    /// What crossed the WAN.
    pub bytes: ProxyBytes,
}

/// A migration under way. Dropping it hangs up on it: libvirt aborts and the VM stays at the source.
pub struct Migration<'s> {
    source: &'s LibvirtSite,
    target: &'s LibvirtSite,
    domain: String,
    virsh: Process,
    proxies: Proxies,
    started: Instant,
    timeout: Duration,
}

impl LibvirtSite {
    /// Moves a running VM to `target` and waits for the end. Ask the target's hook first ([`LibvirtSite::wait_at_gate`]).
    pub fn migrate_to(
        &self,
        target: &LibvirtSite,
        vm: &VirtualMachine,
        options: &MigrationOptions,
    ) -> Result<MigrationReport, Error> {
        self.begin_migration(target, vm, options)?.finish()
    }

    /// The same without waiting.
    pub fn begin_migration<'s>(
        &'s self,
        target: &'s LibvirtSite,
        vm: &VirtualMachine,
        options: &MigrationOptions,
    ) -> Result<Migration<'s>, Error> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        // The same place at both sites: libvirt gives one path for the source to dial and for the target's QEMU to listen at.
        let folder = format!("/run/migration/{number}");
        for site in [self, target] {
            site.folder_inside(&folder)?;
        }
        let domain = vm.domain_name();
        let limit = options.downtime_limit.as_millis().to_string();
        self.virsh(&["migrate-setmaxdowntime", &domain, &limit])?;
        let live = self.virsh(&["dumpxml", "--migratable", &domain])?;
        let unreadable = |e| Error::Hook { site: self.name.clone(), what: format!("libvirt's own domain: {e}") };
        let copied = watari_hook::disks_to_copy(live.as_bytes()).map_err(unreadable)?;
        let proxies = Proxies::start(self, target, &folder)?;
        let log = self.folder.join(format!("migrate-{number}.log"));
        let virsh = Builder::new(format!("virsh migrate@{}", self.name), "virsh", log)
            .args(["-q", "-c", &self.uri(), "migrate"])
            .args(virsh_arguments("system", &folder, &copied, options))
            .args(["--domain", &domain])
            .spawn()?;
        let (started, timeout) = (Instant::now(), options.timeout);
        Ok(Migration { source: self, target, domain, virsh, proxies, started, timeout })
    }
}

/// virsh's arguments for virt-launcher's call, but for the domain. `daemon` is "system" or "session", `folder` has the sockets, `copied` are the
/// disks that libvirt is to copy. As in virt-launcher (`live-migration-source.go:1111`) both the list and the URI are there only if
/// there is one.
pub fn virsh_arguments(daemon: &str, folder: &str, copied: &[String], options: &MigrationOptions) -> Vec<String> {
    let mut arguments: Vec<String> =
        ["--live", "--p2p", "--persistent", "--copy-storage-inc"].map(str::to_owned).into();
    let mut add = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    if !copied.is_empty() {
        add("--migrate-disks", copied.join(","));
        add("--disks-uri", format!("unix://{folder}/{DISKS}"));
    }
    add("--migrateuri", format!("unix://{folder}/{MEMORY}"));
    add("--desturi", format!("qemu+unix:///{daemon}?socket={folder}/{LIBVIRT}"));
    if options.bandwidth_mib > 0 {
        add("--bandwidth", options.bandwidth_mib.to_string());
    }
    if options.connections > 0 {
        add("--parallel-connections", options.connections.to_string());
        arguments.push("--parallel".into());
    }
    arguments
}

impl Migration<'_> {
    /// Is it still going on?
    pub fn running(&mut self) -> bool {
        self.virsh.ended().is_none()
    }

    /// What has crossed the WAN so far.
    pub fn bytes(&self) -> ProxyBytes {
        self.proxies.bytes()
    }

    /// Asks libvirt to give the migration up; [`finish`](Migration::finish) then fails, unless it was too late.
    pub fn abort(&self) -> Result<(), Error> {
        self.source.virsh(&["domjobabort", &self.domain]).map(drop)
    }

    /// Waits for the end. After a success libvirt at the source forgets the VM, as its virt-launcher's end would make it.
    pub fn finish(mut self) -> Result<MigrationReport, Error> {
        let status = self.virsh.wait(self.timeout.saturating_sub(self.started.elapsed()))?;
        let total_seconds = self.started.elapsed().as_secs_f64();
        if !status.success() {
            let message = self.virsh.tail();
            return Err(Error::Virsh { site: self.source.name.clone(), command: "migrate".into(), message });
        }
        let job = self.target.virsh(&["domjobinfo", "--completed", &self.domain])?;
        self.source.virsh(&["undefine", "--nvram", &self.domain])?;
        Ok(MigrationReport { total_seconds, downtime_ms: downtime(&job), bytes: self.proxies.bytes() })
    }
}

/// The line `Total downtime:  123  ms` of virsh's table.
fn downtime(job: &str) -> Option<f64> {
    let line = job.lines().find_map(|line| line.strip_prefix("Total downtime:"))?;
    let mut words = line.split_whitespace();
    let number: f64 = words.next()?.parse().ok()?;
    Some(if words.next()? == "s" { number * 1000.0 } else { number })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_call_is_the_one_that_virt_launcher_makes() {
        let options = MigrationOptions { connections: 8, ..MigrationOptions::default() };
        let expected = "--live --p2p --persistent --copy-storage-inc --migrate-disks sda,vdc --disks-uri unix:///run/migration/0/disks.sock \
            --migrateuri unix:///run/migration/0/memory.sock --desturi qemu+unix:///system?socket=/run/migration/0/libvirt.sock \
            --parallel-connections 8 --parallel";
        let copied = ["sda".to_owned(), "vdc".to_owned()];
        assert_eq!(virsh_arguments("system", "/run/migration/0", &copied, &options).join(" "), expected);
        let none = virsh_arguments("system", "/run/migration/0", &[], &options).join(" ");
        assert!(!none.contains("--migrate-disks") && !none.contains("--disks-uri"), "{none}");
    }

    #[test]
    fn the_downtime_is_read_from_virshs_table_in_both_of_its_units() {
        let table = "Job type:         Completed   \nTotal downtime:   123          ms\nMemory total: 1 MiB";
        assert_eq!(downtime(table), Some(123.0));
        assert_eq!(downtime("Total downtime:   1.5          s"), Some(1500.0));
        assert_eq!(downtime("Job type: None"), None);
    }
}
