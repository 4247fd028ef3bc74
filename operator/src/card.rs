//! Writes this site's card: what peers may know of it. See `watari_crds::card`.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use serde_json::json;
use watari_crds::card::{KubeVirtCard, SiteCard};
use watari_crds::kubevirt::KubeVirt;
use watari_crds::names::{self, label};

use crate::apply::apply;
use crate::authority;
use crate::context::Context;
use crate::kubevirt;

/// Between two cards. A card older than [`CARD_AGE_MAX_SECONDS`] counts as silence.
const PERIOD: Duration = Duration::from_secs(60);
/// Ten cards missed: longer than an upgrade of the operator takes.
pub const CARD_AGE_MAX_SECONDS: i64 = 600;
/// Marks the default storage class (Kubernetes, `pkg/apis/storage/util`).
const DEFAULT_CLASS: &str = "storageclass.kubernetes.io/is-default-class";

/// Looks at this cluster.
pub async fn observe(context: &Context) -> Result<SiteCard, authority::Error> {
    let all = ListParams::default();
    let client = || context.client.clone();
    let classes = Api::<StorageClass>::all(client()).list(&all).await?;
    let default = |class: &StorageClass| class.annotations().get(DEFAULT_CLASS).is_some_and(|value| value == "true");
    let nodes = Api::<Node>::all(client()).list_metadata(&all).await?;
    let bundle = authority::authorities(context).await?.bundle()?;
    Ok(SiteCard {
        site: context.settings.site.clone(),
        watari_version: env!("CARGO_PKG_VERSION").to_owned(),
        kubernetes_version: context.client.apiserver_version().await?.git_version,
        authorities: bundle.joined_with(&crate::pki::bundle::Bundle::default(), Timestamp::now()),
        gateway: context.settings.gateway.clone(),
        kubevirt: kubevirt::installation(client()).await?.map(kubevirt_card),
        storage_classes: classes.iter().map(|class| (class.name_any(), default(class))).collect(),
        nodes: nodes.iter().map(ResourceExt::name_any).collect(),
        written_unix_seconds: Timestamp::now().as_second(),
    })
}

fn kubevirt_card(object: KubeVirt) -> KubeVirtCard {
    KubeVirtCard {
        version: object.status.unwrap_or_default().observed_kube_virt_version,
        feature_gates: object.spec.configuration.developer_configuration.feature_gates,
    }
}

/// Writes the card again and again; an error is logged and tried again.
pub async fn keep(context: Context) {
    loop {
        if let Err(error) = write(&context).await {
            tracing::warn!(%error, "the site card could not be written; trying again");
        }
        tokio::time::sleep(PERIOD).await;
    }
}

async fn write(context: &Context) -> Result<(), authority::Error> {
    let card = observe(context).await?;
    let text = serde_json::to_string(&card).expect("a card has a JSON form");
    let object = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": names::SITE_CARD, "labels": { label::MANAGED: names::MANAGED_BY } },
        "data": BTreeMap::from([(names::SITE_CARD_KEY, text)]),
    });
    let api: Api<ConfigMap> = context.own_config_maps();
    apply(&api, &object).await?;
    Ok(())
}
