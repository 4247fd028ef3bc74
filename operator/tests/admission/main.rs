//! The webhooks and the policy as a real API server meets them. Needs clusters: `make e2e`.
//!
//! The webhook server runs in this process, on a socket inside the network of cluster a's control plane, and is asked only
//! about the test's own namespace. Objects are created with `dryRun`, which goes through admission and stores nothing.

#![allow(clippy::unwrap_used)]

#[path = "../support/definitions.rs"]
mod definitions;

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, ensure};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, Pod, ServiceAccount};
use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::oneshot};
use watari_clusters::{handle::Pair, network};
use watari_crds::{
    names::{annotation, label, role},
    pair::SyncPair,
    replica::SyncReplica,
    wiring::{VolumeMode, WiredDisk, Wiring},
};
use watari_operator::{
    pki::{authority::Subject, rotation::Authorities},
    webhooks::{
        objects::{self, Endpoint},
        placement::{Placement, Placements},
        review::Knowledge,
        server::{self, ServingCertificate},
        settings::{Resources, SidecarSettings},
    },
};

const PAIR: &str = "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10";
/// An API server takes up changed admission objects within a second or so.
const PATIENCE: Duration = Duration::from_secs(60);

fn settings() -> SidecarSettings {
    SidecarSettings {
        image: "watari.internal/watari-sidecar:dev".to_owned(),
        image_pull_policy: Some("IfNotPresent".to_owned()),
        image_pull_secrets: vec![],
        resources: Resources::default(),
    }
}

/// The test's namespace, cluster-wide objects of its name, and the server; [`Stage::end`] takes all of it away.
struct Stage {
    client: Client,
    name: String,
    placements: Placements,
    stop: Option<oneshot::Sender<()>>,
    authorities: Authorities,
    endpoint: Endpoint,
}

/// Plays `story` on a stage of its own and takes the stage away.
async fn staged(test: &str, story: impl AsyncFnOnce(&Stage) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let Some(stage) = Stage::set(test).await? else { return Ok(()) };
    let result = story(&stage).await;
    stage.end().await?;
    result
}

impl Stage {
    async fn set(test: &str) -> anyhow::Result<Option<Stage>> {
        let pair = Pair::open().await?;
        let Some(ours) = pair.ours else {
            eprintln!("skipped: the webhook server of this test listens inside our own clusters");
            return Ok(None);
        };
        let client = pair.a.client.clone();
        definitions::install(&client).await?;
        kubevirt_standin::crds::apply(&client).await?;
        let name = format!("watari-admission-{test}-{}", std::process::id());
        let namespaces: Api<Namespace> = Api::all(client.clone());
        namespaces
            .create(&PostParams::default(), &serde_json::from_value(json!({ "metadata": { "name": name } }))?)
            .await?;
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), &name);
        until("the namespace's service account", async || Ok(accounts.get_opt("default").await?.is_some())).await?;

        let inside = network::path(&ours.a().control_plane().netns());
        let socket = watari_e2e::netns::enter(&inside, || std::net::TcpListener::bind("127.0.0.1:0"))??;
        socket.set_nonblocking(true)?;
        let address: SocketAddr = socket.local_addr()?;
        let authorities = Authorities::create("a", Timestamp::now())?;
        let endpoint = Endpoint::Url(format!("https://localhost:{}", address.port()));
        let subject = Subject::Webhooks { dns_names: endpoint.dns_names() };
        let certificate = ServingCertificate::new(&authorities.signing.issue(&subject, Timestamp::now())?)?;
        let placements = Placements::default();
        let knowledge = Knowledge { settings: settings(), placements: placements.clone() };
        let (stop, stopped) = oneshot::channel();
        let socket = TcpListener::from_std(socket)?;
        tokio::spawn(server::serve(socket, certificate, knowledge, async { drop(stopped.await) }));
        Ok(Some(Stage { client, name, placements, stop: Some(stop), authorities, endpoint }))
    }

    /// A cluster-wide object of ours, under the test's name and for its namespace alone.
    async fn apply(&self, mut object: Value) -> anyhow::Result<()> {
        object["metadata"]["name"] = json!(self.name);
        let selector = json!({ "matchLabels": { "kubernetes.io/metadata.name": self.name } });
        for webhook in object.get_mut("webhooks").and_then(Value::as_array_mut).into_iter().flatten() {
            webhook["namespaceSelector"] = selector.clone();
        }
        if object["kind"] == "ValidatingAdmissionPolicy" {
            object["spec"]["matchConstraints"]["namespaceSelector"] = selector.clone();
        }
        if object["kind"] == "ValidatingAdmissionPolicyBinding" {
            object["spec"]["policyName"] = json!(self.name);
        }
        let (kind, plural) = (object["kind"].as_str().unwrap(), plural(&object));
        let resource = ApiResource::from_gvk_with_plural(
            &GroupVersionKind::gvk("admissionregistration.k8s.io", "v1", kind),
            &plural,
        );
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        api.patch(&self.name, &PatchParams::apply("watari-test").force(), &Patch::Apply(&object)).await?;
        Ok(())
    }

    async fn webhooks(&self) -> anyhow::Result<()> {
        for object in objects::configurations(&self.endpoint, Some(&self.authorities.bundle_pem())) {
            self.apply(object).await?;
        }
        Ok(())
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.name)
    }

    async fn dry_run(&self, pod: &Value) -> Result<Pod, kube::Error> {
        let parameters = PostParams { dry_run: true, ..PostParams::default() };
        self.pods().create(&parameters, &serde_json::from_value(pod.clone()).unwrap()).await
    }

    /// A VMI through admission, as KubeVirt's controller makes one.
    async fn dry_run_vmi(&self, vmi: &Value) -> Result<DynamicObject, kube::Error> {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "VirtualMachineInstance"));
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &self.name, &resource);
        let parameters = PostParams { dry_run: true, ..PostParams::default() };
        api.create(&parameters, &serde_json::from_value(vmi.clone()).unwrap()).await
    }

    async fn end(self) -> anyhow::Result<()> {
        for kind in [
            "MutatingWebhookConfiguration",
            "ValidatingWebhookConfiguration",
            "ValidatingAdmissionPolicy",
            "ValidatingAdmissionPolicyBinding",
        ] {
            let plural = plural(&json!({ "kind": kind }));
            let gvk = GroupVersionKind::gvk("admissionregistration.k8s.io", "v1", kind);
            let resource = ApiResource::from_gvk_with_plural(&gvk, &plural);
            let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
            if api.get_opt(&self.name).await?.is_some() {
                api.delete(&self.name, &DeleteParams::default()).await?;
            }
        }
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        namespaces.delete(&self.name, &DeleteParams::default()).await?;
        Ok(())
    }
}

fn plural(object: &Value) -> String {
    let kind = object["kind"].as_str().unwrap().to_lowercase();
    match kind.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None => format!("{kind}s"),
    }
}

async fn until(what: &str, mut ask: impl AsyncFnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let begin = std::time::Instant::now();
    while !ask().await? {
        ensure!(begin.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain for {what}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

fn paired(name: &str) -> Value {
    let wiring = Wiring {
        pair_id: PAIR.to_owned(),
        disks: vec![WiredDisk { name: "root".to_owned(), mode: VolumeMode::Filesystem }],
    };
    json!({
        "name": name,
        "labels": { label::PAIR: PAIR, "kubevirt.io": "virt-launcher" },
        "annotations": { annotation::WIRING: wiring.to_annotation() },
    })
}

/// As KubeVirt renders it, as far as admission looks.
fn launcher_pod() -> Value {
    json!({
        "metadata": paired("virt-launcher-vm1"),
        "spec": {
            "restartPolicy": "Never",
            "containers": [
                { "name": "compute", "image": "launcher", "volumeMounts": [{ "name": "root", "mountPath": "/root-disk" }] },
                { "name": "hook-sidecar-0", "image": "x", "args": SidecarSettings::arguments() },
            ],
            "volumes": [{ "name": "root", "persistentVolumeClaim": { "claimName": "vm1-root" } }],
        },
    })
}

fn vmi() -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": paired("vm1"),
        "spec": {
            "domain": { "devices": {} },
            "volumes": [{ "name": "root", "persistentVolumeClaim": { "claimName": "vm1-root" } }],
        },
    })
}

/// Written for a site that is not here, so that no operator does anything about it.
fn replica() -> Value {
    json!({
        "apiVersion": "watari.io/v1alpha1", "kind": "SyncReplica", "metadata": { "name": "vm1" },
        "spec": {
            "pairId": PAIR, "pairName": "default/vm1", "vmName": "vm1", "homeSite": "tokyo", "site": "nowhere",
            "disks": [{
                "name": "root", "claim": "vm1-root", "sizeBytes": 4096, "claimBytes": 4096, "mode": "Block",
                "access": "ReadWriteOnce",
            }],
            "metadata": { "sizeBytes": 1 << 30, "access": "ReadWriteOnce" },
            "interval": "10s", "retention": { "count": 3 }, "homeAuthorities": "none",
        },
    })
}

fn plain_pod(name: &str, claim: &str) -> Value {
    json!({
        "metadata": { "name": name },
        "spec": {
            "containers": [{ "name": "c", "image": "i" }],
            "volumes": [{ "name": "v", "persistentVolumeClaim": { "claimName": claim } }],
        },
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_api_server_has_paired_vms_wired_and_asks_about_nothing_else() -> anyhow::Result<()> {
    let Some(mut stage) = Stage::set("wire").await? else { return Ok(()) };
    let result = wired_and_nothing_else(&mut stage).await;
    stage.end().await?;
    result
}

async fn wired_and_nothing_else(stage: &mut Stage) -> anyhow::Result<()> {
    stage.webhooks().await?;
    until("the webhook to be asked", async || {
        let pod = stage.dry_run(&launcher_pod()).await?;
        Ok(pod.spec.context("a Pod has a spec")?.init_containers.is_some_and(|containers| !containers.is_empty()))
    })
    .await?;
    let pod = serde_json::to_value(stage.dry_run(&launcher_pod()).await?)?;
    let sidecar = &pod["spec"]["initContainers"][0];
    ensure!(sidecar["name"] == "watari" && sidecar["restartPolicy"] == "Always", "{sidecar}");
    ensure!(pod["spec"]["containers"].as_array().unwrap().len() == 1, "{pod}");
    // Its own defaults show that the API server took every field of ours for what it is.
    ensure!(pod["status"]["qosClass"] == "BestEffort", "{}", pod["status"]);

    let vmi = serde_json::to_value(stage.dry_run_vmi(&vmi()).await?)?;
    ensure!(vmi["metadata"]["annotations"][annotation::WIRED] == "true", "{vmi}");
    ensure!(vmi["spec"]["volumes"][1]["name"] == "watari-local", "{vmi}");

    let elsewhere = Placement::Elsewhere {
        active_site: "osaka".to_owned(),
        role_here: "Replica".to_owned(),
        sync_pair: Some("default/vm1".to_owned()),
    };
    stage.placements.set(PAIR, elsewhere);
    let error = stage.dry_run_vmi(&self::vmi()).await.err().context("refused")?.to_string();
    ensure!(error.contains("active at site osaka") && error.contains("activeSite of default/vm1"), "{error}");
    stage.placements.set(PAIR, Placement::Here);
    stage.dry_run_vmi(&self::vmi()).await?;

    // Nobody answers any more: paired VMs do not start, with the webhook's name in the words, and others do.
    drop(stage.stop.take());
    let error = std::cell::RefCell::new(String::new());
    until("the webhook to be away", async || {
        let outcome = stage.dry_run(&launcher_pod()).await;
        *error.borrow_mut() = outcome.err().map(|error| error.to_string()).unwrap_or_default();
        Ok(!error.borrow().is_empty())
    })
    .await?;
    ensure!(error.borrow().contains("pods.mutate.watari.io"), "{}", error.borrow());
    ensure!(stage.dry_run_vmi(&self::vmi()).await.is_err());
    stage.dry_run(&plain_pod("other", "some-claim")).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_pods_are_kept_off_replica_claims_without_any_operator() -> anyhow::Result<()> {
    staged("claims", foreign_pods).await
}

async fn foreign_pods(stage: &Stage) -> anyhow::Result<()> {
    // Two policies and their bindings, of which this test has the SyncReplicas'.
    let [policy, binding, ..] = objects::claims_policies();
    for object in [policy, binding] {
        stage.apply(object).await?;
    }
    stage.dry_run(&plain_pod("early", "vm1-root")).await.context("there is no replica yet")?;
    let replicas: Api<SyncReplica> = Api::namespaced(stage.client.clone(), &stage.name);
    let replica = replicas.create(&PostParams::default(), &serde_json::from_value(replica())?).await?;
    stage
        .dry_run(&plain_pod("named", "vm1-root"))
        .await
        .context("the spec alone, which the peer writes, takes no claim")?;
    let made = json!({ "status": { "claims": { "vm1-root": "some-uid", "watari-metadata": "another-uid" } } });
    replicas.patch_status(&replica.name_any(), &PatchParams::default(), &Patch::Merge(made)).await?;
    let error = std::cell::RefCell::new(String::new());
    until("the policy to be in force", async || {
        let outcome = stage.dry_run(&plain_pod("foreign", "vm1-root")).await;
        *error.borrow_mut() = outcome.err().map(|error| error.to_string()).unwrap_or_default();
        Ok(!error.borrow().is_empty())
    })
    .await?;
    ensure!(
        error.borrow().contains("claim vm1-root belongs to the replica of VM vm1") && error.borrow().contains(PAIR),
        "{}",
        error.borrow()
    );
    ensure!(
        stage.dry_run(&plain_pod("curious", "watari-metadata")).await.is_err(),
        "the metadata claim is open to all"
    );
    stage.dry_run(&plain_pod("other", "another-claim")).await.context("other claims are nobody's business")?;
    let mut volumeless = plain_pod("none", "x");
    volumeless["spec"]["volumes"] = json!([]);
    stage.dry_run(&volumeless).await.context("a Pod without volumes")?;

    let with = |labels: Value| {
        let mut pod = plain_pod("ours", "vm1-root");
        pod["metadata"]["labels"] = labels;
        pod
    };
    stage.dry_run(&with(json!({ label::PAIR: PAIR, label::ROLE: role::REPLICA }))).await.context("the replica Pod")?;
    stage.dry_run(&with(json!({ label::PAIR: PAIR, "kubevirt.io": "virt-launcher" }))).await.context("the VM's Pod")?;
    let another = "11111111-2222-4333-8444-555555555555";
    for labels in [
        json!({ label::PAIR: another, label::ROLE: role::REPLICA }),
        json!({ label::PAIR: PAIR }),
        json!({ "kubevirt.io": "virt-launcher" }),
    ] {
        ensure!(stage.dry_run(&with(labels.clone())).await.is_err(), "{labels} was let in");
    }
    let mut doppelganger = with(json!({ label::PAIR: PAIR, "kubevirt.io": "virt-launcher" }));
    doppelganger["metadata"]["annotations"] = json!({ annotation::EPHEMERAL_PROVISIONING: "true" });
    stage.dry_run(&doppelganger).await.context("KubeVirt's Pod that has the VM's claims bound")?;
    replicas.delete(&replica.name_any(), &DeleteParams::default()).await?;
    until("the policy to let go", async || Ok(stage.dry_run(&plain_pod("late", "vm1-root")).await.is_ok())).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_pods_are_kept_off_the_claims_of_a_vm_that_is_at_the_peer() -> anyhow::Result<()> {
    staged("home", foreign_pods_at_home).await
}

async fn foreign_pods_at_home(stage: &Stage) -> anyhow::Result<()> {
    let [.., policy, binding] = objects::claims_policies();
    for object in [policy, binding] {
        stage.apply(object).await?;
    }
    let pairs: Api<SyncPair> = Api::namespaced(stage.client.clone(), &stage.name);
    let pair = json!({
        "apiVersion": "watari.io/v1alpha1", "kind": "SyncPair", "metadata": { "name": "vm1" },
        "spec": { "vmName": "vm1", "peer": "osaka" },
    });
    let pair = pairs.create(&PostParams::default(), &serde_json::from_value(pair)?).await?;
    let id = pair.uid().context("a UID")?;
    stage.dry_run(&plain_pod("home", "vm1-root")).await.context("the VM is at home: its claims are its own")?;
    let claims = |claims: Value| Patch::Merge(json!({ "status": { "claims": claims } }));
    pairs.patch_status("vm1", &PatchParams::default(), &claims(json!({ "vm1-root": "some-uid" }))).await?;
    until("the policy to be in force", async || {
        let outcome = stage.dry_run(&plain_pod("foreign", "vm1-root")).await;
        let words = outcome.err().map(|error| error.to_string()).unwrap_or_default();
        Ok(words.contains("belongs to the replica of VM vm1 (SyncPair vm1") && words.contains(&id))
    })
    .await?;
    let mut holder = plain_pod("ours", "vm1-root");
    holder["metadata"]["labels"] = json!({ label::PAIR: id, label::ROLE: role::REPLICA });
    stage.dry_run(&holder).await.context("our own Pod that holds the folder")?;
    pairs.patch_status("vm1", &PatchParams::default(), &claims(Value::Null)).await?;
    until("the policy to let go", async || Ok(stage.dry_run(&plain_pod("late", "vm1-root")).await.is_ok())).await
}
