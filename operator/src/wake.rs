//! What wakes a controller besides its own period, and how it runs.
//!
//! Not its own status: figures of a running pair change each time that they are looked at, and a controller woken by what it wrote
//! would never sleep.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::controller::{Action, Controller};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{WatchStreamExt, predicates, reflector, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use watari_crds::names::label;

use crate::context::Context;

/// A controller that is woken by changes of the spec and by deletion.
pub fn controller<K>(api: Api<K>) -> Controller<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let (reader, writer) = reflector::store();
    let objects = watcher(api, watcher::Config::default()).default_backoff().reflect(writer).applied_objects();
    Controller::for_stream(objects.predicate_filter(predicates::generation, Default::default()), reader)
}

/// Also by the pair's Pods, ours and the VM's: whatever changes about one wakes the objects whose pair's id, by `id`, is in its label.
pub fn with_pods<K>(controller: Controller<K>, client: Client, id: fn(&K) -> Option<String>) -> Controller<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let objects = controller.store();
    let paired = watcher::Config::default().labels(label::PAIR);
    controller.watches(Api::<Pod>::all(client), paired, move |pod| {
        let whose = pod.labels().get(label::PAIR).cloned();
        let all = if whose.is_some() { objects.state() } else { Vec::new() };
        all.into_iter().filter(move |it| id(it) == whose).map(|it| ObjectRef::from_obj(&*it))
    })
}

/// Runs until the process ends. What fails is logged, counted, and tried again after `retry`.
pub async fn run<K, E, R>(
    controller: Controller<K>,
    context: Context,
    retry: Duration,
    reconcile: impl FnMut(Arc<K>, Arc<Context>) -> R,
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    E: std::error::Error + Send + 'static,
    R: Future<Output = Result<Action, E>> + Send + 'static,
{
    let failed = move |_: Arc<K>, _: &E, context: Arc<Context>| {
        context.metrics.failed(&K::kind(&()));
        Action::requeue(retry)
    };
    let results = controller.run(reconcile, failed, Arc::new(context));
    results
        .for_each(|result| async move {
            if let Err(error) = result {
                tracing::warn!(%error, "{}: trying again", K::kind(&()));
            }
        })
        .await;
}
