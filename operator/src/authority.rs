//! This cluster's authority in its Secret, and the certificates of pairs at this site. `pki` decides; this only reads and writes.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::PostParams;
use serde_json::json;
use watari_crds::names::{self, label, role};

use crate::apply::apply;
use crate::context::Context;
use crate::pki::{
    PkiError,
    authority::{Authority, Subject},
    bundle::Bundle,
    rotation::Authorities,
    secret::{self, Data},
};

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error(transparent)]
    Pki(#[from] PkiError),
}

/// A Secret's content as text; what is no text is left out, and then missed.
pub fn text(secret: &Secret) -> Data {
    let data = secret.data.iter().flatten();
    data.filter_map(|(key, value)| Some((key.clone(), String::from_utf8(value.0.clone()).ok()?))).collect()
}

/// The authorities of this cluster, made at the first call.
///
/// Created, not applied: of two operators that begin at once, one makes them and the other reads what it made.
pub async fn authorities(context: &Context) -> Result<Authorities, Error> {
    let api = context.own_secrets();
    if let Some(found) = api.get_opt(names::AUTHORITY_SECRET).await? {
        return Ok(secret::load_authorities(&text(&found))?);
    }
    let signing = Authority::create(&context.settings.site, Timestamp::now())?;
    let made = Authorities { signing, next: None, former: Vec::new() };
    let object = json!({
        "metadata": { "name": names::AUTHORITY_SECRET, "labels": { label::MANAGED: names::MANAGED_BY } },
        "stringData": secret::store_authorities(&made),
    });
    let object: Secret = serde_json::from_value(object).expect("the object above is a Secret");
    match api.create(&PostParams::default(), &object).await {
        Ok(_) => Ok(made),
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
            Ok(secret::load_authorities(&text(&api.get(names::AUTHORITY_SECRET).await?))?)
        }
        Err(error) => Err(error.into()),
    }
}

/// Brings the certificate Secret of a pair at this site up to date.
pub async fn certify(context: &Context, namespace: &str, pair_id: &str, peer_authorities: &str) -> Result<(), Error> {
    let authorities = authorities(context).await?;
    let peer = Bundle::parse("the peer's authorities", peer_authorities)?;
    let api: Api<Secret> = Api::namespaced(context.client.clone(), namespace);
    let name = names::certificate_secret(pair_id);
    let found = api.get_opt(&name).await?.map(|secret| text(&secret));
    let subject = Subject::Pair { pair_id: pair_id.to_owned(), site: context.settings.site.clone() };
    let leaf = secret::leaf(found.as_ref(), &subject, &authorities, &peer, Timestamp::now())?;
    if found.as_ref() == Some(&leaf.data) {
        return Ok(());
    }
    let labels = json!({ label::MANAGED: names::MANAGED_BY, label::PAIR: pair_id, label::ROLE: role::CERTIFICATE });
    let object = json!({
        "apiVersion": "v1", "kind": "Secret", "type": "Opaque",
        "metadata": { "name": name, "labels": labels },
        "stringData": leaf.data,
    });
    apply(&api, &object).await?;
    if let Some(why) = leaf.renewed {
        tracing::info!(namespace, pair_id, ?why, "issued a certificate");
    }
    Ok(())
}
