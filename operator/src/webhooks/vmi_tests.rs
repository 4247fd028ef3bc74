#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use watari_crds::names::{annotation, label};

use super::*;
use crate::webhooks::{
    fixtures::{Change, PAIR, names, of, settings, vmi},
    placement::Placement,
};

fn wired(mut vmi: Value) -> Value {
    wire(&mut vmi, &settings()).unwrap_or_else(|error| panic!("{error}"));
    vmi
}

fn refused(mut vmi: Value) -> String {
    wire(&mut vmi, &settings()).expect_err("it is refused").to_string()
}

fn hooks(vmi: &Value) -> Vec<Value> {
    serde_json::from_str(vmi["metadata"]["annotations"][annotation::HOOK_SIDECARS].as_str().unwrap()).unwrap()
}

#[test]
fn a_paired_vmi_gets_our_hook_sidecar_and_says_that_it_has() {
    let vmi = wired(vmi());
    let hooks = hooks(&vmi);
    assert_eq!(hooks.len(), 1);
    assert_eq!(hooks[0]["image"], "registry.example/watari:1");
    assert_eq!(hooks[0]["imagePullPolicy"], "IfNotPresent");
    assert_eq!(hooks[0]["args"], json!(["primary", "--config", "/watari/config/sidecar.toml"]));
    assert_eq!(vmi["metadata"]["annotations"][annotation::WIRED], "true");
}

#[test]
fn hooks_of_others_stay_and_ours_is_there_once_with_the_image_of_now() {
    let mut before = vmi();
    before["metadata"]["annotations"][annotation::HOOK_SIDECARS] = json!(r#"[{"image":"other"}]"#);
    let once = wired(before);
    assert_eq!(
        hooks(&once).iter().map(|hook| hook["image"].as_str().unwrap()).collect::<Vec<_>>(),
        ["other", "registry.example/watari:1"]
    );
    let mut again = once.clone();
    let newer = SidecarSettings { image: "registry.example/watari:2".to_owned(), ..settings() };
    wire(&mut again, &newer).unwrap();
    assert_eq!(hooks(&again)[1]["image"], "registry.example/watari:2");
    assert_eq!(hooks(&again).len(), 2);
    assert_eq!(wired(once.clone()), once, "the same once more changes nothing");
}

#[test]
fn a_vm_whose_disks_are_all_ours_gets_one_small_disk_that_can_be_copied() {
    let vmi = wired(vmi());
    assert_eq!(names(&vmi["spec"]["volumes"]), ["root", "data", "watari-local"]);
    assert_eq!(of(&vmi["spec"]["volumes"], "watari-local")["emptyDisk"]["capacity"], "1Mi");
    assert_eq!(of(&vmi["spec"]["domain"]["devices"]["disks"], "watari-local")["disk"]["bus"], "sata");
}

#[test]
fn a_vm_with_a_disk_that_can_be_copied_gets_none() {
    let with = |disk: Value, volume: Value| {
        let mut vmi = vmi();
        array(&mut vmi["spec"]["domain"]["devices"], "disks").push(disk);
        array(&mut vmi["spec"], "volumes").push(volume);
        names(&wired(vmi)["spec"]["volumes"]).contains(&"watari-local".to_owned())
    };
    let cloud_init = || json!({ "name": "seed", "cloudInitNoCloud": { "userData": "x" } });
    assert!(!with(json!({ "name": "seed", "disk": { "bus": "virtio" } }), cloud_init()));
    assert!(!with(json!({ "name": "seed" }), cloud_init()), "a disk of no kind is a disk");
    assert!(!with(json!({ "name": "c", "disk": {} }), json!({ "name": "c", "containerDisk": { "image": "i" } })));
    // What libvirt does not copy does not count.
    assert!(with(json!({ "name": "seed", "cdrom": { "bus": "sata" } }), cloud_init()));
    assert!(with(json!({ "name": "seed", "disk": { "readonly": true } }), cloud_init()));
    assert!(with(json!({ "name": "s", "disk": {} }), json!({ "name": "s", "secret": { "secretName": "s" } })));
}

/// KubeVirt's own webhook makes a disk for a volume that has none, and may be asked after ours.
#[test]
fn a_volume_without_a_device_counts_as_the_disk_that_it_will_become() {
    let mut before = vmi();
    before["spec"]["domain"]["devices"].as_object_mut().unwrap().remove("disks");
    assert_eq!(names(&wired(before.clone())["spec"]["volumes"]), ["root", "data", "watari-local"]);
    array(&mut before["spec"], "volumes").push(json!({ "name": "scratch", "emptyDisk": { "capacity": "1Gi" } }));
    assert_eq!(names(&wired(before)["spec"]["volumes"]), ["root", "data", "scratch"]);
}

#[test]
fn a_disk_that_cannot_go_through_the_sidecar_is_refused_by_name_with_the_remedy() {
    let change = |change: Change| {
        let mut vmi = vmi();
        change(&mut vmi);
        refused(vmi)
    };
    let cases: [(&str, Change); 6] = [
        ("no volume of that name", &|vmi| vmi["spec"]["volumes"][0]["name"] = json!("other")),
        ("a volume that is no claim", &|vmi| vmi["spec"]["volumes"][0] = json!({ "name": "root", "emptyDisk": {} })),
        ("hotplugged", &|vmi| vmi["spec"]["volumes"][0]["persistentVolumeClaim"]["hotpluggable"] = json!(true)),
        ("not a disk", &|vmi| {
            vmi["spec"]["domain"]["devices"]["filesystems"] = json!([{ "name": "root", "virtiofs": {} }])
        }),
        ("cdrom", &|vmi| vmi["spec"]["domain"]["devices"]["disks"][0] = json!({ "name": "root", "cdrom": {} })),
        ("shareable", &|vmi| vmi["spec"]["domain"]["devices"]["disks"][0]["shareable"] = json!(true)),
    ];
    for (found, apply) in cases {
        let words = change(apply);
        assert!(words.contains("disk root") && words.contains(found) && words.contains(PAIR), "{found}: {words}");
    }
}

#[test]
fn a_paired_vmi_without_a_right_wiring_does_not_start() {
    let mut unwired = vmi();
    unwired["metadata"]["annotations"].as_object_mut().unwrap().remove(annotation::WIRING);
    assert!(refused(unwired).contains("restart the VM"));
    let mut rubbish = vmi();
    rubbish["metadata"]["annotations"][annotation::WIRING] = json!("{");
    assert!(refused(rubbish).contains("delete it"));
    let mut copied = vmi();
    copied["metadata"]["labels"][label::PAIR] = json!("another");
    assert!(refused(copied).contains("copied from another VM"));
    let mut hooks = vmi();
    hooks["metadata"]["annotations"][annotation::HOOK_SIDECARS] = json!("no");
    assert!(refused(hooks).contains("JSON array"));
}

#[test]
fn a_vm_starts_only_where_its_pair_is_active_and_may_wait_for_a_migration_elsewhere() {
    let placements = Placements::default();
    let judged = |receiver: bool| {
        let mut vmi = vmi();
        if receiver {
            vmi["metadata"]["annotations"][annotation::CREATE_MIGRATION_TARGET] = json!("true");
        }
        judge(&vmi, &placements).map_err(|error| error.to_string())
    };
    assert_eq!((judged(false), judged(true)), (Ok(()), Ok(())), "what is unknown is left to the sidecar");
    placements.set(PAIR, Placement::Here);
    assert_eq!(judged(false), Ok(()));
    placements.set(PAIR, Placement::Receiving { active_site: "tokyo".to_owned() });
    assert_eq!(judged(true), Ok(()));
    assert!(judged(false).unwrap_err().contains("moving here"));
    let sync_pair = Some("default/vm1".to_owned());
    placements.set(
        PAIR,
        Placement::Elsewhere { active_site: "tokyo".to_owned(), role_here: "Replica".to_owned(), sync_pair },
    );
    assert_eq!(judged(true), Ok(()));
    let words = judged(false).unwrap_err();
    assert!(
        words.contains("tokyo") && words.contains("activeSite of default/vm1") && words.contains("failover"),
        "{words}"
    );
    placements.forget(PAIR);
    assert_eq!(judged(false), Ok(()));
}
