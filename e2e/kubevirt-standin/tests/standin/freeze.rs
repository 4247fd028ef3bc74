//! Freeze and thaw through the aggregated API, as a backup tool or our operator calls them.

use std::time::Duration;

use anyhow::ensure;
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::PostParams;
use kube::{Api, Client, Config};
use kubevirt_standin::objects::Kind;
use serde_json::json;
use watari_clusters::handle::ClaimKind;

use crate::stage::{Stage, play};

async fn put(client: &Client, stage: &Stage, verb: &str, body: &str) -> kube::Result<String> {
    let path = format!(
        "/apis/subresources.kubevirt.io/v1/namespaces/{}/virtualmachineinstances/vm/{verb}",
        stage.scene.namespace
    );
    let request = axum::http::Request::put(path).header("content-type", "application/json");
    client.request_text(request.body(body.as_bytes().to_vec()).expect("a plain request")).await
}

fn written(guest: &mut crate::stage::Guest) -> anyhow::Result<u64> {
    let stats = tokio::task::block_in_place(|| guest.control.stats())?;
    Ok(stats.streams.iter().map(|stream| stream.bytes).sum())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_guest_writes_nothing_until_it_is_thawed_or_the_time_is_over() -> anyhow::Result<()> {
    play("freeze", |stage| async move {
        let [a, _] = stage.clusters();
        let early = put(&a.client, &stage, "freeze", "").await;
        ensure!(matches!(&early, Err(kube::Error::Api(status)) if status.code == 404), "no VMI yet: {early:?}");
        stage.vm(a, "vm", "Always", ClaimKind { block: false, shared: false }, "start=1 rate=500000").await?;
        stage.until_printable(a, "vm", "Running").await?;
        // The line takes one client at a time, and the agent is one.
        stage.guest(a).await?.has_written(1 << 20)?;

        put(&a.client, &stage, "freeze", r#"{"unfreezeTimeout":"60s"}"#).await?;
        stage.until(a, Kind::Vmi, "vm", "frozen", |vmi| vmi["status"]["fsFreezeStatus"] == "frozen").await?;
        let mut guest = stage.guest(a).await?;
        let before = written(&mut guest)?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        ensure!(written(&mut guest)? == before, "it writes while it is frozen");
        drop(guest);
        put(&a.client, &stage, "unfreeze", "").await?;
        stage.until(a, Kind::Vmi, "vm", "thawed", |vmi| vmi["status"]["fsFreezeStatus"].is_null()).await?;
        stage.guest(a).await?.has_written(before + 1)?;

        put(&a.client, &stage, "freeze", r#"{"unfreezeTimeout":"3s"}"#).await?;
        stage.until(a, Kind::Vmi, "vm", "frozen", |vmi| vmi["status"]["fsFreezeStatus"] == "frozen").await?;
        stage.until(a, Kind::Vmi, "vm", "thawed by itself", |vmi| vmi["status"]["fsFreezeStatus"].is_null()).await?;
        a_stranger_may_not(&stage).await
    })
    .await
}

/// virt-api asks whether the caller may: an account without the right is told so.
async fn a_stranger_may_not(stage: &Stage) -> anyhow::Result<()> {
    let [a, _] = stage.clusters();
    let accounts: Api<ServiceAccount> = Api::namespaced(a.client.clone(), &stage.scene.namespace);
    let account = serde_json::from_value(json!({ "metadata": { "name": "stranger" } }))?;
    accounts.create(&PostParams::default(), &account).await?;
    let token = accounts.create_token_request("stranger", &PostParams::default(), &Default::default()).await?;
    let kubeconfig = kube::config::Kubeconfig::read_from(&a.kubeconfig)?;
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await?;
    config.auth_info = Default::default();
    config.auth_info.token = token.status.map(|status| status.token.into());
    let refused = put(&Client::try_from(config)?, stage, "freeze", "").await;
    ensure!(matches!(&refused, Err(kube::Error::Api(status)) if status.code == 403), "{refused:?}");
    Ok(())
}
