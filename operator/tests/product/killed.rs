//! The operator is killed with `kill -9` before and after each call that it makes in a move, at both sites: in the end the VM runs once, at the
//! place that was asked for, with all its data, and nothing is left over.
//!
//! `KILLS=all` walks through every call of both directions (hours); otherwise a sample of `KILLS` of them, by `KILL_SEED`.

use std::collections::BTreeSet;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Secret, Service};
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams};
use kube::{Api, Client, ResourceExt as _};
use watari_clusters::handle::Cluster;
use watari_crds::crossing::Site;

use crate::gate::{Gate, Moment, Strike};
use crate::play::Play;
use crate::scene::until;

/// Where nothing else is asked for: both moments, both directions.
const SAMPLE: usize = 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_that_is_killed_at_any_call_of_a_move_leaves_one_vm_and_nothing_else() -> anyhow::Result<()> {
    Play::play("killed", story).await
}

/// One direction of the way, as it was gone undisturbed.
struct Way {
    to: Site,
    calls: Vec<String>,
    /// What was there afterwards.
    left: BTreeSet<String>,
}

async fn story(play: &Play) -> anyhow::Result<()> {
    // Both sites with one operator: killed, there is none until another has the Lease.
    for site in &play.scene.sites {
        site.install(&play.scene.system, &["operator.replicas=1"]).await?;
    }
    play.synchronised().await?;
    let gate = Gate::set(&play.scene).await?;
    let walked = walk(play, &gate).await;
    gate.remove().await?;
    walked
}

async fn walk(play: &Play, gate: &Gate) -> anyhow::Result<()> {
    let mut ways = Vec::new();
    for (moves, to) in [Site::Peer, Site::Source].into_iter().enumerate() {
        gate.arm(None);
        goes(play, to, moves).await?;
        ways.push(Way { to, calls: gate.calls(), left: objects(play).await? });
        let way = &ways[moves];
        eprintln!(
            "to {:?}: {} calls\n  {}\nafterwards: {:?}",
            way.to,
            way.calls.len(),
            way.calls.join("\n  "),
            way.left
        );
        ensure!(!way.calls.is_empty(), "nothing was asked: the gate stands in no way");
    }
    let [there, back] = [strikes(&ways[0]), strikes(&ways[1])];
    let (mut moves, mut struck) = (ways.len(), 0);
    for (there, back) in there.into_iter().zip(back) {
        for (way, strike) in [(&ways[0], there), (&ways[1], back)] {
            gate.arm(Some(strike.clone()));
            goes(play, way.to, moves).await.with_context(|| format!("to {:?} with {strike:?}", way.to))?;
            moves += 1;
            if gate.has_struck() {
                struck += 1;
            } else {
                eprintln!("not made this time: {strike:?}");
            }
            until("nothing to be left over", async || {
                let now = objects(play).await?;
                if now != way.left {
                    let (new, gone): (Vec<_>, Vec<_>) =
                        (now.difference(&way.left).collect(), way.left.difference(&now).collect());
                    eprintln!("left over {new:?}, missing {gone:?}");
                }
                Ok((now == way.left).then_some(()))
            })
            .await?;
        }
    }
    eprintln!("an operator was killed in {struck} of {} moves", moves - ways.len());
    ensure!(struck * 2 >= moves - ways.len(), "most calls were not made again");
    Ok(())
}

/// Which kills are tried on a way; as many on each.
fn strikes(way: &Way) -> Vec<Strike> {
    let both = |call: &String| [Moment::Before, Moment::After].map(|moment| Strike { call: call.clone(), moment });
    let mut all: Vec<Strike> = way.calls.iter().flat_map(both).collect();
    let variable = |name| std::env::var(name).ok();
    let wanted = variable("KILLS").unwrap_or_default();
    if wanted == "all" {
        return all;
    }
    let seed: usize = variable("KILL_SEED").and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let wanted = wanted.parse().unwrap_or(SAMPLE) / 2;
    // Far from each other, and with another seed others.
    let step = all.len() / wanted.max(1) + 1;
    let from = seed.wrapping_mul(7) % step;
    all.drain(..).skip(from).step_by(step).take(wanted).collect()
}

/// The move, and what must be true after it whatever happened meanwhile.
async fn goes(play: &Play, to: Site, moves: usize) -> anyhow::Result<()> {
    let (a, b) = (&play.scene.pair.a, &play.scene.pair.b);
    let (here, there) = match to {
        Site::Peer => (a, b),
        Site::Source => (b, a),
    };
    let at_move = i64::try_from(moves)?;
    play.change(serde_json::json!({ "activeSite": to, "atMove": at_move })).await?;
    let status = play.until_moved(at_move + 1).await?;
    ensure!(status.active_site == to, "{status:?}");
    play.until_printable(there, "Running").await?;
    until("one launcher", async || {
        Ok((running(play, here).await? == 0 && running(play, there).await? == 1).then_some(()))
    })
    .await?;
    let mut guest = play.guest(there).await?;
    guest.is_clean()?;
    guest.resume()?;
    drop(guest);
    play.until_protected("the other side to be the replica").await
}

/// How many launchers of the VM run on a cluster.
async fn running(play: &Play, cluster: &Cluster) -> anyhow::Result<usize> {
    let pods: Api<Pod> = play.scene.api(&cluster.client);
    let list = pods.list(&ListParams::default().labels("kubevirt.io=virt-launcher")).await?;
    Ok(list.items.iter().filter(|pod| is_alive(pod)).count())
}

fn is_alive(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    !matches!(phase, Some("Succeeded" | "Failed"))
}

/// What there is at both sites. Names that are made anew each time (launchers, migrations) stand as how many there are.
async fn objects(play: &Play) -> anyhow::Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for (cluster, site) in play.scene.pair.both().into_iter().zip(&play.scene.sites) {
        let client = &cluster.client;
        let everything = ListParams::default();
        let mut add = |kind: &str, name: String| all.insert(format!("{}: {kind} {name}", site.name));
        for (kind, names) in [
            ("claim", play.scene.names::<PersistentVolumeClaim>(client, &everything).await?),
            ("Secret", play.scene.names::<Secret>(client, &everything).await?),
            ("ConfigMap", play.scene.names::<ConfigMap>(client, &everything).await?),
            ("Service", play.scene.names::<Service>(client, &everything).await?),
        ] {
            for name in names {
                add(kind, name);
            }
        }
        for vm in play.scene.vms(client).list_metadata(&ListParams::default()).await? {
            add("VM", vm.name_any());
        }
        let pods = play.scene.api::<Pod>(client).list(&ListParams::default()).await?;
        for pod in pods.items.iter().filter(|pod| is_alive(pod) && !pod.labels().contains_key("kubevirt.io")) {
            add("Pod", pod.name_any());
        }
        add("launchers", running(play, cluster).await?.to_string());
        for kind in ["VirtualMachineInstance", "VirtualMachineInstanceMigration"] {
            add(
                kind,
                kubevirt(play, client, kind).list_metadata(&ListParams::default()).await?.items.len().to_string(),
            );
        }
    }
    Ok(all)
}

fn kubevirt(play: &Play, client: &Client, kind: &str) -> Api<DynamicObject> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", kind));
    Api::namespaced_with(client.clone(), &play.scene.namespace, &resource)
}
