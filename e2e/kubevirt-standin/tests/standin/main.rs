//! The stand-in on our clusters. `make e2e`.

use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::{Namespace, PersistentVolumeClaim, Pod, ServiceAccount};
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams,
};
use kube::{Api, ResourceExt};
use kubevirt_standin::controller::Controller;
use kubevirt_standin::{crds, image::LAUNCHER_IMAGE};
use serde_json::json;
use watari_clusters::handle::{Ours, Pair};
use watari_clusters::provision::LOCAL_CLASS;
use watari_e2e::guest::Control;

/// From the object to a running guest, and back; seconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(180);

async fn until(what: &str, mut ask: impl AsyncFnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let begin = Instant::now();
    while !ask().await? {
        ensure!(begin.elapsed() < PATIENCE, "waited {} s in vain for {what}", PATIENCE.as_secs());
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    Ok(())
}

/// Asks the guest in this Pod, over its control line in the Pod's private folder on our node, whether it has all it wrote.
fn guest_is_clean(ours: &Ours, pod: &Pod) -> anyhow::Result<()> {
    let node = ours.plan.node(pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).context("a node")?)?;
    let uid = pod.uid().context("a Pod has a uid")?;
    let folder = ours.folders.node(&node).join(format!("kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/private"));
    // A socket's path has little room; the descriptor's is short.
    let folder = std::fs::File::open(folder)?;
    let mut guest = Control::new(format!("/proc/self/fd/{}/control.sock", folder.as_raw_fd()));
    guest.hello(Duration::from_secs(60))?;
    let begin = Instant::now();
    while guest.stats()?.streams.iter().any(|stream| stream.acknowledged == 0) {
        ensure!(begin.elapsed() < PATIENCE, "the guest writes nothing");
        std::thread::sleep(Duration::from_millis(300));
    }
    let verdict = guest.verify(Duration::from_secs(60))?;
    ensure!(verdict.clean(), "{verdict:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_boots_from_its_claim_writes_and_stops_when_it_is_halted() -> anyhow::Result<()> {
    let pair = Pair::open().await?;
    let Some(ours) = pair.ours else {
        eprintln!("skipped: the stand-in is for our own clusters");
        return Ok(());
    };
    let packed = Command::new(env!("CARGO_BIN_EXE_kubevirt-standin")).arg("image").status()?;
    ensure!(packed.success(), "packing the launcher's image ended with {packed}");
    let client = pair.a.client.clone();
    crds::apply(&client).await?;
    let controller = Controller::new(client.clone(), LAUNCHER_IMAGE);
    let controller = tokio::spawn(async move { controller.run().await });

    let namespace = format!("watari-standin-{}", std::process::id());
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let object = serde_json::from_value(json!({ "metadata": { "name": namespace } }))?;
    namespaces.create(&PostParams::default(), &object).await?;
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), &namespace);
    until("the namespace's service account", async || Ok(accounts.get_opt("default").await?.is_some())).await?;

    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), &namespace);
    let claim = json!({
        "metadata": { "name": "data" },
        "spec": { "storageClassName": LOCAL_CLASS, "accessModes": ["ReadWriteOnce"], "resources": { "requests": { "storage": "64Mi" } } },
    });
    claims.create(&PostParams::default(), &serde_json::from_value(claim)?).await?;
    let vms: Api<DynamicObject> = Api::namespaced_with(
        client.clone(),
        &namespace,
        &ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "VirtualMachine")),
    );
    let vm = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": { "name": "vm" },
        "spec": { "runStrategy": "Always", "template": {
            "metadata": { "annotations": { "standin.watari.internal/guest": "start=1 rate=500000" } },
            "spec": {
                "domain": { "memory": { "guest": "192Mi" } },
                "volumes": [{ "name": "root", "persistentVolumeClaim": { "claimName": "data" } }],
            },
        } },
    });
    vms.create(&PostParams::default(), &serde_json::from_value(vm)?).await?;
    let printable = async |wanted: &str| {
        let vm = vms.get("vm").await?;
        Ok(vm.data["status"]["printableStatus"] == wanted)
    };
    until("the VM to run", async || printable("Running").await).await?;

    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let launchers = ListParams::default().labels("kubevirt.io=virt-launcher");
    let pod = pods.list(&launchers).await?.items.pop().context("a VM that runs has a Pod")?;
    tokio::task::spawn_blocking(move || guest_is_clean(&ours, &pod)).await??;

    let halt = Patch::Merge(json!({ "spec": { "runStrategy": "Halted" } }));
    vms.patch("vm", &PatchParams::default(), &halt).await?;
    until("the Pod to be gone", async || Ok(pods.list(&launchers).await?.items.is_empty())).await?;
    until("the VM to be stopped", async || printable("Stopped").await).await?;
    controller.abort();
    namespaces.delete(&namespace, &DeleteParams::default()).await?;
    Ok(())
}
