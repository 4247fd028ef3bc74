//! Every CEL rule and every bound of the schemas on a real API server: something that it accepts, something that it refuses, and by
//! which words. Nothing is kept: all but one base object per kind is a dry run.

mod scene;

use serde_json::{Value, json};

use scene::{Scene, Step};

fn replica() -> Value {
    json!({
        "pairId": "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10", "pairName": "shop/ledger", "vmName": "ledger",
        "homeSite": "tokyo", "site": "osaka",
        "disks": [disk("root", 4096 << 10, "Block")],
        "metadata": { "sizeBytes": 1 << 30, "access": "ReadWriteOnce" },
        "interval": "10s", "retention": { "count": 3 }, "homeAuthorities": "PEM",
    })
}

fn disk(name: &str, size: i64, mode: &str) -> Value {
    json!({ "name": name, "claim": name, "sizeBytes": size, "claimBytes": size, "mode": mode, "access": "ReadWriteOnce" })
}

/// Plays steps on one kind and says all that went otherwise than told.
async fn play(kind: &str, base: Value, steps: Vec<Step>) -> anyhow::Result<()> {
    let scene = Scene::begin(kind, base).await?;
    let mut wrong = Vec::new();
    for step in steps {
        wrong.extend(scene.wrong(&step).await?);
    }
    scene.end().await?;
    anyhow::ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[tokio::test]
async fn a_peer_clusters_rules_accept_and_refuse() -> anyhow::Result<()> {
    let base = json!({ "site": "osaka", "kubeconfigSecret": "osaka" });
    play(
        "PeerCluster",
        base,
        vec![
            Step::accepted(json!({ "gateways": ["gateway.osaka.example:7443", "[2001:db8::1]:7443", "192.0.2.1:1"] })),
            Step::refused(json!({ "gateways": ["gateway.osaka.example"] }), "each gateway is host:port"),
            Step::refused(json!({ "gateways": ["https://gateway.osaka.example:7443"] }), "each gateway is host:port"),
            Step::refused(json!({ "site": "Osaka" }), "spec.site"),
            Step::refused(json!({ "site": null }), "spec.site"),
            Step::change_accepted(json!({ "kubeconfigSecret": "other" })),
            Step::change_refused(json!({ "site": "kobe" }), "a PeerCluster keeps its site"),
        ],
    )
    .await
}

#[tokio::test]
async fn a_pairs_rules_accept_and_refuse() -> anyhow::Result<()> {
    play(
        "SyncPair",
        json!({ "vmName": "shop", "peer": "osaka" }),
        vec![
            Step::accepted(json!({ "interval": "1s", "retention": { "age": "1m" } })),
            Step::refused(json!({ "interval": "999ms" }), "interval is a duration"),
            Step::refused(json!({ "interval": "169h" }), "interval is a duration"),
            Step::refused(json!({ "interval": "often" }), "spec.interval"),
            Step::accepted(json!({ "bandwidth": "64k" })),
            Step::refused(json!({ "bandwidth": "63k" }), "bandwidth is a quantity"),
            Step::refused(json!({ "bandwidth": "fast" }), "bandwidth is a quantity"),
            Step::accepted(json!({ "retention": { "count": 10_000, "age": "8784h" } })),
            Step::refused(json!({ "retention": { "count": 0 } }), "spec.retention.count"),
            Step::refused(json!({ "retention": { "age": "59s" } }), "retention.age is a duration"),
            Step::accepted(json!({ "metadata": { "size": "1Gi" } })),
            Step::refused(json!({ "metadata": { "size": "1023Mi" } }), "metadata.size is a quantity"),
            Step::accepted(json!({ "disks": [{ "name": "a" }, { "name": "b" }] })),
            Step::refused(json!({ "disks": [{ "name": "a" }, { "name": "a" }] }), "Duplicate value"),
            Step::accepted(json!({ "activeSite": "Peer", "atMove": 3 })),
            Step::refused(json!({ "activeSite": "Osaka" }), "spec.activeSite"),
            Step::refused(json!({ "atMove": -1 }), "spec.atMove"),
            Step::accepted(json!({ "cutover": { "policy": "At", "at": "2030-01-01T00:00:00Z" } })),
            Step::refused(json!({ "cutover": { "policy": "At" } }), "cutover.at is the time"),
            Step::refused(json!({ "cutover": { "at": "2030-01-01T00:00:00Z" } }), "cutover.at is the time"),
            Step::refused(json!({ "cutover": { "policy": "At", "at": "tomorrow" } }), "spec.cutover.at"),
            Step::accepted(json!({ "cutover": { "policy": "WhenReady", "maxBytes": "64Mi" } })),
            Step::accepted(json!({ "cutover": { "policy": "WhenReady", "maxSeconds": 1 } })),
            Step::refused(json!({ "cutover": { "policy": "WhenReady" } }), "the policy WhenReady"),
            Step::refused(json!({ "cutover": { "maxSeconds": 10 } }), "the policy WhenReady"),
            Step::refused(json!({ "cutover": { "policy": "WhenReady", "maxBytes": "1Ki" } }), "cutover.maxBytes"),
            Step::refused(json!({ "cutover": { "policy": "WhenReady", "maxSeconds": 0 } }), "spec.cutover.maxSeconds"),
            Step::accepted(json!({ "overwriteDiverged": { "atMove": 0 } })),
            Step::refused(json!({ "overwriteDiverged": {} }), "spec.overwriteDiverged.atMove"),
            Step::refused(json!({ "overwriteDiverged": { "atMove": -1 } }), "spec.overwriteDiverged.atMove"),
            Step::change_accepted(json!({ "interval": "1m", "paused": true })),
            Step::change_refused(json!({ "vmName": "other" }), "a pair keeps its VM"),
            Step::change_refused(json!({ "peer": "other" }), "a pair keeps its peer"),
            Step::change_refused(json!({ "targetNamespace": "other" }), "a pair keeps its namespace"),
        ],
    )
    .await
}

#[tokio::test]
async fn a_replicas_rules_accept_and_refuse() -> anyhow::Result<()> {
    play(
        "SyncReplica",
        replica(),
        vec![
            Step::accepted(json!({ "bandwidthBitsPerSecond": 64_000 })),
            Step::refused(json!({ "bandwidthBitsPerSecond": 63_999 }), "bandwidthBitsPerSecond"),
            Step::refused(json!({ "site": "tokyo" }), "two sites"),
            Step::refused(json!({ "pairId": "6F1C1E0A-8A52-4C0E-9D55-0C9A3B7E4F10" }), "spec.pairId"),
            Step::refused(json!({ "disks": [] }), "spec.disks"),
            Step::refused(json!({ "metadata": { "access": "ReadWriteOncePod" } }), "spec.metadata.access"),
            Step::accepted(
                json!({ "vm": { "metadata": { "name": "ledger" }, "spec": { "anything": [1, { "b": null }] } } }),
            ),
            Step::refused(json!({ "vm": "ledger" }), "spec.vm"),
            Step::accepted(json!({ "crossing": { "id": "watari-1", "to": "Peer" } })),
            Step::refused(json!({ "crossing": { "id": "watari-1", "to": "osaka" } }), "spec.crossing.to"),
            Step::refused(json!({ "crossing": { "to": "Peer" } }), "spec.crossing.id"),
            Step::accepted(json!({ "moves": 3, "crossing": { "id": "watari-1", "to": "Peer", "atMove": 3 } })),
            Step::refused(json!({ "moves": -1 }), "spec.moves"),
            Step::refused(
                json!({ "crossing": { "id": "watari-1", "to": "Peer", "atMove": -1 } }),
                "spec.crossing.atMove",
            ),
            Step::accepted(json!({ "promote": { "atMove": 0 } })),
            Step::accepted(json!({ "promote": { "atMove": 3, "generation": "1.42" } })),
            Step::refused(json!({ "promote": {} }), "spec.promote.atMove"),
            Step::refused(json!({ "promote": { "atMove": -1 } }), "spec.promote.atMove"),
            Step::refused(
                json!({ "promote": { "atMove": 0, "generation": "newest" } }),
                "promote.generation is epoch.number",
            ),
            Step::change_accepted(json!({ "promote": { "atMove": 1 } })),
            Step::change_accepted(json!({ "disks": [disk("root", 8192 << 10, "Block")] })),
            Step::change_refused(json!({ "disks": [disk("root", 4096, "Block")] }), "never shrink"),
            Step::change_refused(json!({ "disks": [disk("root", 4096 << 10, "Filesystem")] }), "keeps its disks"),
            Step::change_refused(json!({ "disks": [disk("data", 4096 << 10, "Block")] }), "keeps its disks"),
            Step::change_refused(json!({ "pairId": "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f11" }), "keeps its pair"),
            Step::change_refused(json!({ "homeSite": "kobe" }), "keeps its sites"),
        ],
    )
    .await
}

#[tokio::test]
async fn every_sample_is_accepted_and_given_its_defaults() -> anyhow::Result<()> {
    let mut defaults = 0;
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/samples"))? {
        let path = entry?.path();
        let object: Value = serde_saphyr::from_str(&std::fs::read_to_string(&path)?)?;
        let stored = scene::create_dry(object).await.map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
        if path.ends_with("syncpair.yaml") {
            anyhow::ensure!(stored["spec"]["interval"] == "10s", "{stored}");
            anyhow::ensure!(stored["spec"]["retention"]["count"] == 3, "{stored}");
            anyhow::ensure!(stored["spec"]["metadata"]["size"] == "4Gi", "{stored}");
            defaults += 1;
        }
    }
    anyhow::ensure!(defaults == 1, "the least sample is there");
    Ok(())
}
