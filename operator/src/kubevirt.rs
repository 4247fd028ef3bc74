//! KubeVirt's installation in this cluster.

use kube::api::ListParams;
use kube::{Api, Client};
use watari_crds::kubevirt::KubeVirt;

use crate::answers::none_if_missing;

/// `None`: KubeVirt's definitions are not installed, or there is no KubeVirt object.
pub async fn installation(client: Client) -> kube::Result<Option<KubeVirt>> {
    let list = none_if_missing(Api::<KubeVirt>::all(client).list(&ListParams::default()).await)?;
    Ok(list.and_then(|list| list.items.into_iter().next()))
}
