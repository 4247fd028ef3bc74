//! From `kubectl apply` of a SyncPair to a replica that listens at the peer and a VM that is wired, and back to nothing.
//!
//! The VM stays off; what admission would make of its start is asked with `dryRun`.

use anyhow::ensure;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Secret, Service};
use k8s_openapi::api::events::v1::Event;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use watari_clusters::provision::SHARED_CLASS;
use watari_crds::conditions::Reason;
use watari_crds::kubevirt::VirtualMachine;
use watari_crds::names::{self, annotation, label};
use watari_crds::pair::{Phase, SyncPair};
use watari_crds::peer::PeerCluster;
use watari_crds::replica::SyncReplica;
use watari_crds::wiring::Wiring;

use crate::scene::{Scene, condition, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sync_pair_becomes_a_replica_that_listens_and_leaves_nothing_when_it_is_deleted() -> anyhow::Result<()> {
    let Some(scene) = Scene::begin("first").await? else { return Ok(()) };
    let result = play(&scene).await;
    if result.is_err() {
        eprintln!("{}", scene.logs().await);
    }
    scene.end().await?;
    result
}

async fn play(scene: &Scene) -> anyhow::Result<()> {
    let (a, b) = (&scene.pair.a.client, &scene.pair.b.client);
    let peers: Api<PeerCluster> = Api::all(a.clone());
    until("the PeerCluster to be ready", async || {
        let peer = serde_json::to_value(peers.get(scene.peer()).await?)?;
        Ok(condition(&peer, "Ready").filter(|(status, _)| status == "True"))
    })
    .await?;

    vm(scene).await?;
    let pairs: Api<SyncPair> = scene.api(a);
    let pair = json!({
        "apiVersion": "watari.io/v1alpha1", "kind": "SyncPair", "metadata": { "name": "shop" },
        "spec": { "vmName": "shop", "peer": scene.peer(), "metadata": { "size": "1Gi" }, "interval": "2s" },
    });
    let pair = pairs.create(&PostParams::default(), &serde_json::from_value(pair)?).await?;
    let id = pair.metadata.uid.clone().unwrap_or_default();

    // At the peer: it listens, and says over mTLS that it is a replica.
    let replicas: Api<SyncReplica> = scene.api(b);
    until("a ready SyncReplica in the role Replica", async || {
        let Some(replica) = replicas.get_opt("shop").await? else { return Ok(None) };
        let role = replica.status.as_ref().and_then(|status| status.role.clone());
        let ready = condition(&serde_json::to_value(&replica)?, "Ready");
        Ok(ready.filter(|(status, _)| status == "True" && role.as_deref() == Some("Replica")))
    })
    .await?;
    let claim = scene.api::<PersistentVolumeClaim>(b).get("shop-root").await?;
    ensure!(claim.metadata.labels.unwrap_or_default().get(label::PAIR) == Some(&id));

    // At home: what the VM's next start needs is there, and its template says how it is wired.
    scene.api::<Secret>(a).get(&names::certificate_secret(&id)).await?;
    scene.api::<ConfigMap>(a).get(&names::configuration(&id)).await?;
    scene.api::<Service>(a).get(&names::service(&id)).await?;
    scene.api::<PersistentVolumeClaim>(a).get(&names::metadata_claim(&id)).await?;
    let template = scene.api::<VirtualMachine>(a).get("shop").await?.spec.template.metadata;
    ensure!(template.labels.get(label::PAIR) == Some(&id), "{template:?}");
    let wiring = Wiring::from_annotation(template.annotations.get(annotation::WIRING).map_or("", String::as_str))?;
    ensure!(wiring.disks.len() == 1 && wiring.disks[0].name == "root", "{wiring:?}");
    until("the pair to say that its VM does not run", async || {
        let phase = pairs.get("shop").await?.status.map(|status| status.phase);
        Ok(phase.filter(|phase| *phase == Phase::Stopped))
    })
    .await?;
    until("an Event that says so", async || {
        let events = scene.api::<Event>(a).list(&ListParams::default().fields("regarding.kind=SyncPair")).await?;
        let said = |event: &Event| event.reason.as_deref() == Some(Reason::VmNotRunning.name());
        Ok(events.items.iter().any(said).then_some(()))
    })
    .await?;
    for (client, site) in [(a, "tokyo"), (b, "osaka")] {
        let routes: Api<ConfigMap> = Api::namespaced(client.clone(), &scene.system);
        until(&format!("the gateway's route at {site}"), async || {
            let text = routes.get_opt(names::GATEWAY_ROUTES).await?.and_then(|map| map.data).unwrap_or_default();
            Ok(text.values().any(|text| text.contains(&names::server_name(&id))).then_some(()))
        })
        .await?;
    }

    wired(scene).await?;

    pairs.delete("shop", &DeleteParams::default()).await?;
    until("the pair and its replica to be gone", async || {
        let gone = pairs.get_opt("shop").await?.is_none() && replicas.get_opt("shop").await?.is_none();
        Ok(gone.then_some(()))
    })
    .await?;
    until("everything of the pair to be gone", async || {
        left(scene, &id).await.map(|left| left.is_empty().then_some(()))
    })
    .await?;
    let vm = scene.api::<VirtualMachine>(a).get("shop").await?;
    ensure!(!vm.spec.template.metadata.labels.contains_key(label::PAIR), "the VM is still wired");
    scene.api::<PersistentVolumeClaim>(a).get("shop-root").await?;
    Ok(())
}

/// The API server asks the operators: a start of the VM is wired at home and refused at the peer.
async fn wired(scene: &Scene) -> anyhow::Result<()> {
    let (a, b) = (&scene.pair.a.client, &scene.pair.b.client);
    let template = scene.vms(a).get("shop").await?.data["spec"]["template"].clone();
    let mut vmi = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": template["metadata"], "spec": template["spec"],
    });
    vmi["metadata"]["name"] = json!("shop");
    let vmi: DynamicObject = serde_json::from_value(vmi)?;
    let dry_run = PostParams { dry_run: true, ..PostParams::default() };
    let vmis = |client: &Client| -> Api<DynamicObject> {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "VirtualMachineInstance"));
        Api::namespaced_with(client.clone(), &scene.namespace, &resource)
    };
    // The operator's authority reaches the API server a moment after the operator begins.
    let started =
        until("the webhooks at home to answer", async || Ok(vmis(a).create(&dry_run, &vmi).await.ok())).await?;
    ensure!(started.annotations().get(annotation::WIRED).map(String::as_str) == Some("true"), "{started:?}");
    ensure!(started.annotations().contains_key(annotation::HOOK_SIDECARS), "{started:?}");
    until("the peer to refuse a start, since the VM is active at home", async || {
        let refused = vmis(b).create(&dry_run, &vmi).await.err().map(|error| error.to_string()).unwrap_or_default();
        Ok(refused.contains("this VM is active at site tokyo").then_some(()))
    })
    .await
}

/// A VM that does not run, with one disk on a claim that is bound at once.
async fn vm(scene: &Scene) -> anyhow::Result<()> {
    let a = &scene.pair.a.client;
    let claim = json!({
        "metadata": { "name": "shop-root" },
        "spec": {
            "storageClassName": SHARED_CLASS, "accessModes": ["ReadWriteMany"], "volumeMode": "Block",
            "resources": { "requests": { "storage": "64Mi" } },
        },
    });
    let claims: Api<PersistentVolumeClaim> = scene.api(a);
    claims.create(&PostParams::default(), &serde_json::from_value(claim)?).await?;
    let vm = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": { "name": "shop" },
        "spec": { "runStrategy": "Halted", "template": { "metadata": { "labels": { "app": "shop" } }, "spec": {
            "domain": { "devices": { "disks": [{ "name": "root", "disk": { "bus": "virtio" } }] }, "memory": { "guest": "128Mi" } },
            "volumes": [{ "name": "root", "persistentVolumeClaim": { "claimName": "shop-root" } }],
        } } },
    });
    scene.vms(a).create(&PostParams::default(), &serde_json::from_value(vm)?).await?;
    Ok(())
}

/// Names of all objects of the pair on both clusters.
async fn left(scene: &Scene, id: &str) -> anyhow::Result<Vec<String>> {
    let labels = ListParams::default().labels(&format!("{}={id}", label::PAIR));
    let mut names = Vec::new();
    for cluster in scene.pair.both() {
        let client = &cluster.client;
        names.extend(scene.names::<Pod>(client, &labels).await?);
        names.extend(scene.names::<Secret>(client, &labels).await?);
        names.extend(scene.names::<ConfigMap>(client, &labels).await?);
        names.extend(scene.names::<Service>(client, &labels).await?);
        names.extend(scene.names::<PersistentVolumeClaim>(client, &labels).await?);
    }
    Ok(names)
}
