//! One base object of one kind on cluster a, and steps that are tried on it without being kept.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::runtime::wait::{await_condition, conditions::is_crd_established};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use watari_clusters::handle::Pair;
use watari_crds::{pair::SyncPair, peer::PeerCluster, replica::SyncReplica};

/// Something to try, as a merge patch of the base's spec.
pub struct Step {
    patch: Value,
    /// The base exists and is changed, instead of a new object that looks like it.
    transition: bool,
    /// Words of the refusal; `None`: it is accepted.
    refusal: Option<&'static str>,
}

impl Step {
    pub fn accepted(patch: Value) -> Step {
        Step { patch, transition: false, refusal: None }
    }
    pub fn refused(patch: Value, words: &'static str) -> Step {
        Step { patch, transition: false, refusal: Some(words) }
    }
    pub fn change_accepted(patch: Value) -> Step {
        Step { patch, transition: true, refusal: None }
    }
    pub fn change_refused(patch: Value, words: &'static str) -> Step {
        Step { patch, transition: true, refusal: Some(words) }
    }
}

pub struct Scene {
    api: Api<DynamicObject>,
    kind: String,
    name: String,
    base: Value,
}

const NAMESPACE: &str = "default";

async fn client() -> anyhow::Result<Client> {
    let client = Pair::open().await?.a.client;
    install(&client).await?;
    Ok(client)
}

fn api(client: Client, kind: &str) -> anyhow::Result<Api<DynamicObject>> {
    let namespaced = |resource: ApiResource| Api::namespaced_with(client.clone(), NAMESPACE, &resource);
    Ok(match kind {
        "PeerCluster" => Api::all_with(client.clone(), &ApiResource::erase::<PeerCluster>(&())),
        "SyncPair" => namespaced(ApiResource::erase::<SyncPair>(&())),
        "SyncReplica" => namespaced(ApiResource::erase::<SyncReplica>(&())),
        other => anyhow::bail!("there is no kind {other}"),
    })
}

fn dry() -> PostParams {
    PostParams { dry_run: true, field_manager: None }
}

/// What the API server would store.
pub async fn create_dry(object: Value) -> anyhow::Result<Value> {
    let kind = object["kind"].as_str().unwrap_or_default().to_owned();
    let stored = api(client().await?, &kind)?.create(&dry(), &serde_json::from_value(object)?).await?;
    Ok(serde_json::to_value(stored)?)
}

impl Scene {
    pub async fn begin(kind: &str, base: Value) -> anyhow::Result<Scene> {
        let api = api(client().await?, kind)?;
        let name = format!("rules-{}-{}", kind.to_lowercase(), std::process::id());
        let scene = Scene { api, kind: kind.to_owned(), name, base };
        scene.api.create(&PostParams::default(), &scene.object(&scene.name, scene.base.clone())?).await?;
        Ok(scene)
    }

    fn object(&self, name: &str, spec: Value) -> anyhow::Result<DynamicObject> {
        let metadata = json!({ "name": name });
        let object =
            json!({ "apiVersion": "watari.io/v1alpha1", "kind": self.kind, "metadata": metadata, "spec": spec });
        Ok(serde_json::from_value(object)?)
    }

    /// What is wrong with the API server's answer to a step.
    pub async fn wrong(&self, step: &Step) -> anyhow::Result<Option<String>> {
        let parameters = PatchParams { dry_run: true, ..PatchParams::default() };
        let answer = if step.transition {
            self.api.patch(&self.name, &parameters, &Patch::Merge(json!({ "spec": step.patch }))).await
        } else {
            let mut spec = self.base.clone();
            merge(&mut spec, &step.patch);
            self.api.create(&dry(), &self.object(&format!("{}-new", self.name), spec)?).await
        };
        let found = match answer {
            Ok(_) => None,
            Err(kube::Error::Api(status)) => Some(status.message.clone()),
            Err(other) => return Err(other.into()),
        };
        let right = match (&found, step.refusal) {
            (None, None) => true,
            (Some(text), Some(words)) => text.contains(words),
            (None, Some(_)) | (Some(_), None) => false,
        };
        let what = |text: Option<&str>| text.map_or("acceptance".to_owned(), |text| format!("a refusal with `{text}`"));
        let report = || format!("{}: found {}, expected {}", step.patch, what(found.as_deref()), what(step.refusal));
        Ok((!right).then(report))
    }

    pub async fn end(&self) -> anyhow::Result<()> {
        self.api.delete(&self.name, &DeleteParams::default()).await?;
        Ok(())
    }
}

/// RFC 7386, as far as these tests need it.
fn merge(target: &mut Value, patch: &Value) {
    let (Value::Object(fields), Value::Object(changes)) = (&mut *target, patch) else {
        *target = patch.clone();
        return;
    };
    for (key, value) in changes {
        if value.is_null() {
            fields.remove(key);
        } else {
            merge(fields.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

/// Installs the definitions, as the chart does, and waits until they are served.
async fn install(client: &Client) -> anyhow::Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in watari_crds::definitions() {
        let name = definition.name_any();
        api.patch(&name, &PatchParams::apply("watari-crds").force(), &Patch::Apply(&definition)).await?;
        let wait = await_condition(api.clone(), &name, is_crd_established());
        tokio::time::timeout(std::time::Duration::from_secs(30), wait).await??;
    }
    Ok(())
}
