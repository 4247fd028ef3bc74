//! What every controller holds: the client of its own cluster, its settings, clients of peers, and where pairs are active.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::runtime::events::{Recorder, Reporter};
use kube::{Api, Client};
use tokio::sync::Mutex;
use watari_crds::names;

use crate::apply::Applied;
use crate::metrics::Metrics;
use crate::settings::Settings;
use crate::webhooks::placement::Placements;

/// Shared by all controllers.
#[derive(Clone)]
pub struct Context {
    pub client: Client,
    pub settings: Arc<Settings>,
    /// Also on a replica that does not lead ([`crate::webhooks::follow`]); admission reads it.
    pub placements: Placements,
    pub recorder: Recorder,
    pub metrics: Metrics,
    pub applied: Applied,
    /// By PeerCluster, with the version of the Secret that it was made of.
    pub(crate) peers: Arc<Mutex<HashMap<String, (String, Client)>>>,
}

impl Context {
    pub fn new(client: Client, settings: Settings) -> Context {
        let reporter = Reporter { controller: names::FIELD_MANAGER.to_owned(), instance: None };
        Context {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            settings: Arc::new(settings),
            placements: Placements::default(),
            metrics: Metrics::default(),
            applied: Applied::default(),
            peers: Arc::default(),
        }
    }

    /// Secrets of the operator's own namespace.
    pub fn own_secrets(&self) -> Api<Secret> {
        Api::namespaced(self.client.clone(), &self.settings.namespace)
    }

    /// ConfigMaps of the operator's own namespace.
    pub fn own_config_maps(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &self.settings.namespace)
    }
}
