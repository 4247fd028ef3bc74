//! VirtualMachineInstances: the hook sidecar, a disk that can be copied, and whether it may start here at all.

use serde_json::{Value, json};
use watari_crds::{
    names::annotation,
    wiring::{WiredDisk, Wiring},
};

use super::{Refusal, array, named, placement::Placements, put_named, settings::SidecarSettings, wiring_of};

/// Volume and disk that are added where KubeVirt would find no disk to copy: a live migration without one is refused by libvirt
/// ("NBD URI must be supplied when migration URI uses UNIX transport method"). The same at both sites.
const LOCAL_DISK: &str = "watari-local";

/// Wires a VMI of a paired VM. Repeating it changes nothing more.
pub fn wire(vmi: &mut Value, settings: &SidecarSettings) -> Result<(), Refusal> {
    let wiring = wiring_of(vmi)?;
    for disk in &wiring.disks {
        check_disk(vmi, &wiring, disk)?;
    }
    let hooks = hooks_with_ours(&vmi["metadata"]["annotations"][annotation::HOOK_SIDECARS], settings)?;
    vmi["metadata"]["annotations"][annotation::HOOK_SIDECARS] = json!(hooks);
    vmi["metadata"]["annotations"][annotation::WIRED] = json!("true");
    if !has_copyable_disk(vmi, &wiring) {
        let spec = &mut vmi["spec"];
        put_named(array(spec, "volumes"), json!({ "name": LOCAL_DISK, "emptyDisk": { "capacity": "1Mi" } }));
        let disk = json!({ "name": LOCAL_DISK, "disk": { "bus": "sata" } });
        put_named(array(&mut spec["domain"]["devices"], "disks"), disk);
    }
    Ok(())
}

/// Refuses a VMI whose pair is active elsewhere. What is not known is allowed: the sidecar asks its peer.
pub fn judge(vmi: &Value, placements: &Placements) -> Result<(), Refusal> {
    let wiring = wiring_of(vmi)?;
    let receiver = vmi["metadata"]["annotations"][annotation::CREATE_MIGRATION_TARGET] == "true";
    match placements.of(&wiring.pair_id) {
        Some(placement) => Ok(placement.admits(receiver)?),
        None => Ok(()),
    }
}

/// A disk that goes through the sidecar: a claim of the VM's own, shown to the guest as a writable disk.
fn check_disk(vmi: &Value, wiring: &Wiring, wired: &WiredDisk) -> Result<(), Refusal> {
    let refuse = |found: &str, expected, remedy| {
        let (disk, pair_id, found) = (wired.name.clone(), wiring.pair_id.clone(), found.to_owned());
        Err(Refusal::Disk { disk, pair_id, found, expected, remedy })
    };
    const NAME_IT: &str = "name the VM's own disks in the SyncPair";
    let Some(volume) = named(&vmi["spec"]["volumes"], &wired.name) else {
        return refuse("no volume of that name", "a volume of the VM", NAME_IT);
    };
    let claim = ["persistentVolumeClaim", "dataVolume"].into_iter().find_map(|kind| volume.get(kind));
    let Some(claim) = claim else {
        return refuse("a volume that is no claim", "a persistentVolumeClaim or dataVolume", NAME_IT);
    };
    if claim["hotpluggable"] == true {
        return refuse(
            "a hotplugged volume",
            "a volume that is there at the start",
            "make it part of the VM's template",
        );
    }
    let devices = &vmi["spec"]["domain"]["devices"];
    if named(&devices["filesystems"], &wired.name).is_some() {
        return refuse("a volume that is not a disk", "a disk of the domain", NAME_IT);
    }
    // KubeVirt makes a disk for each volume without one, before or after us.
    let Some(disk) = named(&devices["disks"], &wired.name) else { return Ok(()) };
    if disk.get("cdrom").is_some() || disk.get("lun").is_some() || disk["disk"]["readonly"] == true {
        return refuse("a cdrom, LUN or read-only disk", "a writable disk", "leave it out of the SyncPair");
    }
    if disk["shareable"] == true {
        return refuse("a shareable disk", "a disk of this VM alone", "leave it out of the SyncPair");
    }
    Ok(())
}

fn hooks_with_ours(found: &Value, settings: &SidecarSettings) -> Result<String, Refusal> {
    let text = match found {
        Value::Null => "[]",
        other => other.as_str().unwrap_or("something that is no text"),
    };
    let malformed = || Refusal::HookSidecars { found: text.chars().take(200).collect() };
    let mut hooks: Vec<Value> = serde_json::from_str(text).map_err(|_| malformed())?;
    match hooks.iter_mut().find(|hook| SidecarSettings::is_ours(hook)) {
        Some(ours) => *ours = settings.hook_entry(),
        None => hooks.push(settings.hook_entry()),
    }
    Ok(Value::Array(hooks).to_string())
}

/// Whether KubeVirt finds a disk to copy that is not ours (`getDiskTargetsForMigration` skips cdroms, read-only and network disks).
fn has_copyable_disk(vmi: &Value, wiring: &Wiring) -> bool {
    let volumes = vmi["spec"]["volumes"].as_array().map(Vec::as_slice).unwrap_or_default();
    let devices = &vmi["spec"]["domain"]["devices"];
    volumes.iter().filter(|volume| local(volume)).any(|volume| {
        let name = volume["name"].as_str().unwrap_or_default();
        let wired = wiring.disks.iter().any(|wired| wired.name == name);
        // A volume without a device becomes a disk, and so does a disk of no kind (KubeVirt's defaults).
        let is_disk = named(&devices["filesystems"], name).is_none()
            && named(&devices["disks"], name).is_none_or(|disk| {
                let other = ["cdrom", "lun", "floppy"].iter().any(|kind| disk.get(kind).is_some());
                !other && disk["disk"]["readonly"] != true
            });
        is_disk && !wired
    })
}

/// Volumes that become writable files or devices of the domain. Generated ISO images (configMap, secret) are left out: whether
/// they are copied differs, and one small disk too many harms nobody.
fn local(volume: &Value) -> bool {
    const LOCAL: [&str; 8] = [
        "emptyDisk",
        "containerDisk",
        "ephemeral",
        "hostDisk",
        "cloudInitNoCloud",
        "cloudInitConfigDrive",
        "persistentVolumeClaim",
        "dataVolume",
    ];
    LOCAL.iter().any(|kind| volume.get(kind).is_some_and(|source| source["hotpluggable"] != true))
}

#[cfg(test)]
#[path = "vmi_tests.rs"]
mod tests;
