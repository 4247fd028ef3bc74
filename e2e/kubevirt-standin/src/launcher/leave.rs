//! The source's half of a migration, with virt-launcher's flags (`live-migration-source.go`).

use watari_e2e::libvirt::{MigrationOptions, virsh_arguments};

use super::doors;
use super::libvirt::{virsh, write_domain};
use super::{Error, at};
use crate::render::DiskFile;
use crate::talk::Migrate;

/// KubeVirt's maxDowntimeMs.
const DOWNTIME_MS: &str = "900";

/// Moves the running `domain` to where `order` says; returns when it runs there.
pub async fn migrate(domain: &str, disks: &[DiskFile], order: &Migrate) -> Result<(), Error> {
    let _doors = doors::open_source(order.address, order.ports).map_err(at("migration sockets"))?;
    virsh(&["migrate-setmaxdowntime", domain, DOWNTIME_MS]).await?;
    let live = virsh(&["dumpxml", "--migratable", domain]).await?;
    let copied = watari_hook::disks_to_copy(live.as_bytes()).map_err(|error| Error::Domain(error.to_string()))?;
    let copied = copied_disks(&live, copied, disks, order.between_clusters);
    let there = live
        .replace(&order.source_uid, &order.target_uid)
        .replace(&format!("<name>{domain}</name>"), &format!("<name>{}</name>", order.target_domain));
    let description = write_domain("migration.xml", &there)?;
    let folder = doors::folder();
    let mut arguments =
        virsh_arguments("session", &folder.display().to_string(), &copied, &MigrationOptions::default());
    if copied.is_empty() && !order.between_clusters {
        // Nothing of this VM is local: no flag for storage (`IsBlockMigration`).
        arguments.retain(|argument| argument != "--copy-storage-inc");
    }
    let mut command: Vec<&str> = vec!["migrate"];
    command.extend(arguments.iter().map(String::as_str));
    command.extend(["--dname", &order.target_domain, "--xml", &description, "--persistent-xml", &description]);
    command.extend(["--domain", domain]);
    virsh(&command).await.map(drop)
}

/// Within a cluster, a claim that both Pods mount is not copied (`classifyVolumesForMigration`).
fn copied_disks(live: &str, targets: Vec<String>, disks: &[DiskFile], between_clusters: bool) -> Vec<String> {
    if between_clusters {
        return targets;
    }
    let shared = |target: &String| {
        let device = live.split("<disk ").find(|part| part.contains(&format!("dev='{target}'")));
        device.is_some_and(|device| disks.iter().any(|disk| disk.shared && device.contains(&disk.path)))
    };
    targets.into_iter().filter(|target| !shared(target)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn within_a_cluster_what_both_pods_mount_is_not_copied() {
        let live = "<disk type='file'><source file='/d/root/disk.img'/><target dev='vda'/></disk>\
                    <disk type='file'><source file='/d/seed.qcow2'/><target dev='sda'/></disk>";
        let disk =
            DiskFile { volume: "root".into(), path: "/d/root/disk.img".into(), block: false, bytes: 1, shared: true };
        let all = vec!["vda".to_owned(), "sda".to_owned()];
        assert_eq!(copied_disks(live, all.clone(), std::slice::from_ref(&disk), false), ["sda"]);
        assert_eq!(copied_disks(live, all.clone(), &[disk], true), all);
    }
}
