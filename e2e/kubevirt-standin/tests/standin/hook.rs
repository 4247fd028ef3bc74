//! Our sidecar in a real virt-launcher Pod: hook rounds, the disk over NBD, the guest's data on the claim.
//!
//! What the operator's webhook does to the Pod is done here by the stand-in's own annotation, a JSON patch: our container becomes a
//! native sidecar (as a plain one it would stay for ever, since it leaves on SIGTERM only) and gets its mounts.

use std::process::Command;

use anyhow::{Context, ensure};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Api;
use kube::api::{LogParams, PostParams};
use serde_json::json;
use watari_clusters::handle::{ClaimKind, Cluster};
use watari_clusters::images::SIDECAR_IMAGE;
use watari_e2e::build;

use crate::stage::{PATIENCE, Stage, play, until};

const LOCAL: ClaimKind = ClaimKind { block: false, shared: false };
const PAIR: &str = "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10";
const CONFIG: &str = r#"site = "tokyo"
folder = "/watari/metadata/folder"
runtime_dir = "/watari/runtime/map"
listen = "0.0.0.0:7070"
interval = "5s"
bandwidth = "100Mbit"
[pair]
id = "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10"
name = "default/vm"
[[disk]]
name = "root"
path = "/watari/disks/root/disk.img"
[nbd]
dir = "/var/run/watari/nbd"
mode = "0666"
[peer]
addresses = ["127.0.0.1:9"]
[tls]
ca = "/watari/tls/ca.crt"
certificate = "/watari/tls/tls.crt"
key = "/watari/tls/tls.key"
[hook]
dir = "/var/run/kubevirt-hooks"
outside_kubernetes = false
"#;

/// The hook's container as a native sidecar with its own volumes, and the sockets' folder in both containers.
fn patch() -> String {
    let volume = |name: &str, source: serde_json::Value| {
        let mut volume = json!({ "name": name });
        json_patch::merge(&mut volume, &source);
        json!({ "op": "add", "path": "/spec/volumes/-", "value": volume })
    };
    let (compute, sidecar) = ("containers/0", "initContainers/0");
    let mount = |container: &str, name: &str, path: &str| {
        let value = json!({ "name": name, "mountPath": path });
        json!({ "op": "add", "path": format!("/spec/{container}/volumeMounts/-"), "value": value })
    };
    json!([
        json!({ "op": "add", "path": "/spec/initContainers", "value": [] }),
        json!({ "op": "move", "from": "/spec/containers/1", "path": "/spec/initContainers/0" }),
        json!({ "op": "add", "path": "/spec/initContainers/0/restartPolicy", "value": "Always" }),
        volume("watari-config", json!({ "configMap": { "name": "watari" } })),
        volume("watari-tls", json!({ "secret": { "secretName": "watari" } })),
        volume("watari-nbd", json!({ "emptyDir": {} })),
        volume("watari-runtime", json!({ "emptyDir": { "medium": "Memory" } })),
        volume("watari-metadata", json!({ "persistentVolumeClaim": { "claimName": "metadata" } })),
        mount(compute, "watari-nbd", "/var/run/watari"),
        mount(sidecar, "watari-nbd", "/var/run/watari"),
        mount(sidecar, "watari-config", "/watari/config"),
        mount(sidecar, "watari-tls", "/watari/tls"),
        mount(sidecar, "watari-runtime", "/watari/runtime"),
        mount(sidecar, "watari-metadata", "/watari/metadata"),
        mount(sidecar, "root", "/watari/disks/root"),
    ])
    .to_string()
}

/// Configuration, certificates and the metadata claim.
async fn provide(stage: &Stage, cluster: &Cluster) -> anyhow::Result<()> {
    let folder = watari_e2e::reaper::run_folder().join("standin-hook");
    let program = tokio::task::block_in_place(|| build::binary("watari-sidecar"))?;
    let mut pki = Command::new(program);
    let pki = pki
        .args(["pki", "new", "--pair", PAIR, "--site", "tokyo", "--site", "osaka", "--out"])
        .arg(&folder)
        .output()?;
    ensure!(pki.status.success(), "{}", String::from_utf8_lossy(&pki.stderr));
    let read = |name: &str| anyhow::Ok((name.to_owned(), ByteString(std::fs::read(folder.join("tokyo").join(name))?)));
    let mut secret =
        Secret { data: Some([read("ca.crt")?, read("tls.crt")?, read("tls.key")?].into()), ..Secret::default() };
    secret.metadata.name = Some("watari".into());
    let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), &stage.scene.namespace);
    secrets.create(&PostParams::default(), &secret).await?;
    let map = json!({ "metadata": { "name": "watari" }, "data": { "sidecar.toml": CONFIG } });
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), &stage.scene.namespace);
    maps.create(&PostParams::default(), &serde_json::from_value(map)?).await?;
    ensure!(stage.scene.claim(cluster, "metadata", LOCAL).await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_with_our_hook_sidecar_boots_from_its_disk_over_nbd_and_its_pod_completes() -> anyhow::Result<()> {
    play("hook", |stage| async move {
        let [a, _] = stage.clusters();
        provide(&stage, a).await?;
        let hooks = json!([{
            "image": SIDECAR_IMAGE, "imagePullPolicy": "IfNotPresent",
            "args": ["primary", "--config", "/watari/config/sidecar.toml"],
        }]);
        let annotations = json!({
            "standin.watari.internal/guest": "start=1 rate=500000",
            "standin.watari.internal/pod-patch": patch(),
            "hooks.kubevirt.io/hookSidecars": hooks.to_string(),
        });
        stage.vm_with(a, "vm", "RerunOnFailure", LOCAL, annotations).await?;
        stage.until_printable(a, "vm", "Running").await?;
        let mut guest = stage.guest(a).await?;
        guest.has_written(1 << 20)?;
        guest.is_clean()?;
        let domain = guest.domain()?;
        ensure!(domain.contains("/var/run/watari/nbd/root.sock"), "the disk is ours: {domain}");

        let pod = stage.launchers(a).await?.pop().context("the VM's Pod")?.metadata.name.context("a name")?;
        let log = |container: &str| LogParams { container: Some(container.into()), ..LogParams::default() };
        let pods = stage.scene.pods(a);
        let compute = pods.logs(&pod, &log("compute")).await?;
        ensure!(compute.contains("hook sidecars are here"), "{compute}");
        // The guest switches itself off: QEMU's end, the hooks' Shutdown, a sidecar that leaves when compute has.
        tokio::task::block_in_place(|| guest.control.power_off());
        until("the Pod to complete", PATIENCE, || async {
            let phase = pods.get_opt(&pod).await?.and_then(|pod| pod.status).and_then(|status| status.phase);
            ensure!(
                phase.as_deref() != Some("Failed"),
                "the Pod failed: {}",
                pods.logs(&pod, &log("hook-sidecar-0")).await?
            );
            Ok((phase.is_none() || phase.as_deref() == Some("Succeeded")).then_some(()))
        })
        .await
    })
    .await
}
