#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;
use crate::webhooks::fixtures::{Change, PAIR, names, of, pod, settings};

fn wired(mut pod: Value) -> Value {
    wire(&mut pod, &settings()).unwrap_or_else(|error| panic!("{error}"));
    pod
}

fn refused(mut pod: Value) -> String {
    wire(&mut pod, &settings()).expect_err("it is refused").to_string()
}

fn sidecar(pod: &Value) -> &Value {
    of(&pod["spec"]["initContainers"], "watari")
}

#[test]
fn our_hook_sidecar_becomes_a_native_one_with_what_kubevirt_gave_it() {
    let pod = wired(pod());
    assert_eq!(names(&pod["spec"]["containers"]), ["compute"]);
    let sidecar = sidecar(&pod);
    assert_eq!(sidecar["restartPolicy"], "Always");
    assert_eq!(sidecar["env"][0]["value"], "hook-sidecar-0");
    assert_eq!(sidecar["args"], json!(SidecarSettings::arguments()));
    let hooks = of(&sidecar["volumeMounts"], "hook-sidecar-sockets");
    assert_eq!(
        (hooks["mountPath"].as_str(), hooks["subPath"].as_str()),
        (Some("/var/run/kubevirt-hooks"), Some("hook-sidecar-0"))
    );
}

#[test]
fn hook_sidecars_of_others_stay_where_they_are() {
    let mut before = pod();
    let other = json!({ "name": "hook-sidecar-1", "image": "other", "args": ["serve"] });
    array(&mut before["spec"], "containers").push(other.clone());
    array(&mut before["spec"], "initContainers").push(json!({ "name": "container-disk-binary" }));
    let pod = wired(before);
    assert_eq!(names(&pod["spec"]["containers"]), ["compute", "hook-sidecar-1"]);
    assert_eq!(of(&pod["spec"]["containers"], "hook-sidecar-1"), &other);
    assert_eq!(names(&pod["spec"]["initContainers"]), ["container-disk-binary", "watari"]);
}

#[test]
fn the_pods_own_volumes_are_mounted_in_both_modes_and_no_claim_is_there_twice() {
    let pod = wired(pod());
    let sidecar = sidecar(&pod);
    assert_eq!(of(&sidecar["volumeMounts"], "root")["mountPath"], "/watari/disks/root");
    assert_eq!(of(&sidecar["volumeDevices"], "data")["devicePath"], "/dev/watari/data");
    let mut claims: Vec<&str> = pod["spec"]["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|volume| volume["persistentVolumeClaim"]["claimName"].as_str())
        .collect();
    claims.sort_unstable();
    assert_eq!(claims, ["vm1-data", "vm1-root", &format!("watari-{PAIR}-metadata")]);
}

#[test]
fn both_containers_see_the_sockets_under_one_path_that_kubevirt_does_not_dial() {
    let pod = wired(pod());
    for container in [of(&pod["spec"]["containers"], "compute"), sidecar(&pod)] {
        assert_eq!(of(&container["volumeMounts"], "watari-nbd")["mountPath"], "/var/run/watari/nbd");
    }
    assert_eq!(of(&pod["spec"]["volumes"], "watari-nbd"), &json!({ "name": "watari-nbd", "emptyDir": {} }));
}

#[test]
fn metadata_claim_certificates_configuration_and_runtime_are_mounted() {
    let pod = wired(pod());
    let volumes = &pod["spec"]["volumes"];
    assert_eq!(of(volumes, "watari-tls")["secret"]["secretName"], format!("watari-{PAIR}-tls"));
    assert_eq!(of(volumes, "watari-config")["configMap"]["name"], format!("watari-{PAIR}-config"));
    assert_eq!(of(volumes, "watari-runtime")["emptyDir"]["medium"], "Memory");
    let mounts = &sidecar(&pod)["volumeMounts"];
    for (name, at, read_only) in [
        ("watari-tls", "/watari/tls", true),
        ("watari-config", "/watari/config", true),
        ("watari-metadata", "/watari/metadata", false),
        ("watari-runtime", "/watari/runtime", false),
    ] {
        let mount = of(mounts, name);
        assert_eq!((mount["mountPath"].as_str(), mount["readOnly"] == true), (Some(at), read_only));
    }
    assert_eq!(names(&pod["spec"]["imagePullSecrets"]), ["pull"]);
}

#[test]
fn the_quality_of_service_of_the_pod_is_what_it_was() {
    let with = |resources: Value| {
        let mut pod = pod();
        pod["spec"]["containers"][0]["resources"] = resources;
        // KubeVirt gives a sidecar of a Guaranteed VMI 200m and 64M; ours needs more.
        pod["spec"]["containers"][1]["resources"] = json!({ "limits": { "cpu": "200m", "memory": "64M" } });
        let pod = wired(pod);
        let containers = [&pod["spec"]["containers"][0], sidecar(&pod)];
        (Qos::of(containers.into_iter()), sidecar(&pod)["resources"].clone())
    };
    let both = json!({ "cpu": "2", "memory": "4Gi" });
    let (qos, ours) = with(json!({ "requests": both, "limits": both }));
    assert_eq!(qos, Qos::Guaranteed);
    assert_eq!(ours["limits"], json!({ "cpu": "100m", "memory": "512Mi" }));
    assert_eq!(with(json!({ "limits": both })).0, Qos::Guaranteed, "a missing request is taken from the limit");
    let (qos, ours) = with(json!({ "requests": { "memory": "1Gi" } }));
    assert_eq!(qos, Qos::Burstable);
    assert_eq!(ours["limits"], json!({ "memory": "512Mi" }), "no quota on processor time");
    let (qos, ours) = with(json!({}));
    assert_eq!((qos, ours), (Qos::BestEffort, json!({})));
}

#[test]
fn the_sidecar_is_restricted_and_keeps_the_user_that_kubevirt_chose() {
    let pod = wired(pod());
    let context = &sidecar(&pod)["securityContext"];
    assert_eq!(context["runAsUser"], 107);
    assert_eq!(context["runAsNonRoot"], true);
    assert_eq!(context["allowPrivilegeEscalation"], false);
    assert_eq!(context["capabilities"], json!({ "drop": ["ALL"] }));
    assert_eq!(context["readOnlyRootFilesystem"], true);
    assert_eq!(context["seccompProfile"]["type"], "RuntimeDefault");
}

#[test]
fn a_pod_that_only_binds_claims_has_no_sidecar_to_wait_for() {
    let mut before = pod();
    before["metadata"]["annotations"][annotation::EPHEMERAL_PROVISIONING] = json!("true");
    let pod = wired(before);
    assert_eq!(names(&pod["spec"]["containers"]), ["compute"]);
    assert!(pod["spec"]["initContainers"].is_null());
    assert_eq!(pod["spec"]["volumes"].as_array().unwrap().len(), 4, "no claim of ours is waited for");
}

#[test]
fn wiring_a_wired_pod_again_changes_nothing() {
    let once = wired(pod());
    assert_eq!(wired(once.clone()), once);
}

#[test]
fn a_pod_that_does_not_fit_its_wiring_is_refused_with_the_reason() {
    let change = |change: Change| {
        let mut pod = pod();
        change(&mut pod);
        refused(pod)
    };
    let cases: [(&str, Change); 5] = [
        ("no container of ours", &|pod| drop(array(&mut pod["spec"], "containers").pop())),
        ("no container named compute", &|pod| pod["spec"]["containers"][0]["name"] = json!("other")),
        ("no volume of that name", &|pod| pod["spec"]["volumes"][2]["name"] = json!("other")),
        ("a volume that is no claim", &|pod| pod["spec"]["volumes"][2] = json!({ "name": "root", "emptyDir": {} })),
        ("a claim of mode Filesystem, expected a claim of mode Block", &|pod| {
            pod["spec"]["containers"][0]["volumeDevices"] = json!([])
        }),
    ];
    for (found, apply) in cases {
        let words = change(apply);
        assert!(words.contains(found), "{found}: {words}");
    }
}
