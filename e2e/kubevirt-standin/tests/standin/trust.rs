//! The authority's inbox, and the peer that an old authority forgets.

use std::time::{Duration, Instant};

use anyhow::ensure;
use kubevirt_standin::objects::Kind;
use serde_json::json;

use crate::stage::{PATIENCE, bundle, play};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_put_into_the_inbox_is_trusted_and_forgotten_when_the_own_authority_is_old() -> anyhow::Result<()> {
    play("trust", |stage| async move {
        stage.exchange_trust().await?;
        let [a, b] = stage.clusters();
        let ours = bundle(a).await?;
        ensure!(ours.matches("BEGIN CERTIFICATE").count() >= 2, "{ours}");
        let kubevirt = Kind::KubeVirt.api(&b.client, "kubevirt");
        let strategy = |value| json!({ "spec": { "certificateRotateStrategy": value } });
        let patch = async |value| {
            let patch = kube::api::Patch::Merge(strategy(value));
            kubevirt.patch("kubevirt", &Default::default(), &patch).await
        };
        let before = bundle(b).await?;
        // An authority that is old after a second.
        patch(json!({ "selfSigned": { "ca": { "duration": "24h", "renewBefore": "1s" } } })).await?;
        let begin = Instant::now();
        let outcome = loop {
            let now = bundle(b).await?;
            if now != before && now.matches("BEGIN CERTIFICATE").count() == 1 {
                break Ok(());
            }
            if begin.elapsed() > PATIENCE {
                break Err(anyhow::anyhow!("the peer is still there: {now}"));
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        };
        patch(serde_json::Value::Null).await?;
        outcome
    })
    .await
}
