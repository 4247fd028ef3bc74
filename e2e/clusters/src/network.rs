//! Namespaces, cables and routes. Every step looks first, so it may be repeated, also after being interrupted anywhere.
//!
//! ```text
//!   node a-1 ─ uplink ─┐                                              ┌─ uplink ─ node b-1
//!     Pods: cni0       ├─ bridge nodes ─ router a ══ WAN ══ router b ─ bridge nodes ─┤
//!   node a-2 ─ uplink ─┘            (wan-b)   keeper   (wan-a)        └─ uplink ─ node b-2
//! ```
//! Nothing touches the machine's own namespace; the WAN itself is the keeper's ([`crate::keeper`]).

use std::path::{Path, PathBuf};

use watari_e2e::netns::{self, Error, ip};

use crate::plan::{ClusterPlan, NodePlan, PREFIX, Plan};

/// The bridge in a router to which its nodes are attached.
const BRIDGE: &str = "nodes";
/// A node's only cable.
const UPLINK: &str = "uplink";
/// Buffers large enough for 1 Gbit/s at 300 ms, as in the rest of the harness: the WAN shall be the limit, not the socket.
const TCP_BUFFERS: &str = "4096 262144 67108864";

/// The file that stands for a namespace.
pub fn path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// Makes what is missing.
pub fn ensure(plan: &Plan) -> Result<(), Error> {
    netns::require_root()?;
    for cluster in &plan.clusters {
        ensure_router(cluster)?;
    }
    for node in plan.nodes() {
        ensure_node(&node)?;
    }
    Ok(())
}

fn ensure_namespace(name: &str) -> Result<(), Error> {
    // A file without a mount on it is what an interrupted `ip netns add` leaves; entering it fails.
    if !path(name).exists() || netns::enter(&path(name), || ()).is_err() {
        let _ = std::fs::remove_file(path(name));
        ip(&["netns", "add", name])?;
    }
    ip(&["-n", name, "link", "set", "lo", "up"])?;
    netns::enter(&path(name), || {
        let set = |file: &str, value: &str| {
            // What an old kernel lacks costs speed or nothing.
            let _ = std::fs::write(Path::new("/proc/sys/net").join(file), value);
        };
        set("ipv4/ip_forward", "1");
        set("ipv6/conf/all/disable_ipv6", "1");
        set("ipv4/tcp_rmem", TCP_BUFFERS);
        set("ipv4/tcp_wmem", TCP_BUFFERS);
    })
}

fn has_device(namespace: &str, device: &str) -> bool {
    ip(&["-n", namespace, "link", "show", "dev", device]).is_ok()
}

fn ensure_router(cluster: &ClusterPlan) -> Result<(), Error> {
    let router = cluster.router_netns();
    ensure_namespace(&router)?;
    if !has_device(&router, BRIDGE) {
        ip(&["-n", &router, "link", "add", BRIDGE, "type", "bridge"])?;
    }
    let address = format!("{}/24", cluster.router_address());
    ip(&["-n", &router, "address", "replace", &address, "dev", BRIDGE])?;
    ip(&["-n", &router, "link", "set", BRIDGE, "up"])
}

fn ensure_node(node: &NodePlan) -> Result<(), Error> {
    let (name, router) = (node.netns(), node.cluster.router_netns());
    ensure_namespace(&name)?;
    let port = format!("n{}", node.number);
    if !has_device(&name, UPLINK) {
        ip(&["-n", &name, "link", "add", UPLINK, "type", "veth", "peer", "name", &port, "netns", &router])?;
    }
    ip(&["-n", &router, "link", "set", &port, "master", BRIDGE, "up"])?;
    let address = node.address().to_string();
    ip(&["-n", &name, "address", "replace", &format!("{address}/24"), "dev", UPLINK])?;
    ip(&["-n", &name, "link", "set", UPLINK, "up"])?;
    ip(&["-n", &name, "route", "replace", "default", "via", &node.cluster.router_address().to_string()])?;
    ip(&["-n", &router, "route", "replace", &node.pod_net(), "via", &address])?;
    for other in node.cluster.node_plans().filter(|other| other.number < node.number) {
        ip(&["-n", &name, "route", "replace", &other.pod_net(), "via", &other.address().to_string()])?;
        ip(&["-n", &other.netns(), "route", "replace", &node.pod_net(), "via", &address])?;
    }
    Ok(())
}

/// Gives a fresh WAN device its lasting name and routes the other cluster's nodes and Pods over it.
pub fn attach_wan(here: &ClusterPlan, there: &ClusterPlan) -> Result<(), Error> {
    let (router, device) = (here.router_netns(), here.wan_device(there));
    // A device is renamed while it is down; its address stays.
    ip(&["-n", &router, "link", "set", watari_e2e::wan::DEVICE, "down"])?;
    ip(&["-n", &router, "link", "set", watari_e2e::wan::DEVICE, "name", &device])?;
    ip(&["-n", &router, "link", "set", &device, "up"])?;
    let next = there.wan_address(here).to_string();
    for range in [there.node_range(), there.pod_range()] {
        ip(&["-n", &router, "route", "replace", &range, "via", &next, "dev", &device])?;
    }
    Ok(())
}

/// Every namespace of ours on this machine, whatever plan it came from.
pub fn found() -> Vec<String> {
    std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(&format!("{PREFIX}-")))
        .collect()
}

/// Removes them all. Devices in them go with them.
pub fn remove() -> Result<(), Error> {
    found().iter().try_for_each(|name| ip(&["netns", "delete", name]))
}

/// Removes those of one cluster, as far as they are there.
pub fn remove_cluster(cluster: &ClusterPlan) -> Result<(), Error> {
    let ours = cluster.node_plans().map(|node| node.netns()).chain([cluster.router_netns()]);
    ours.filter(|name| path(name).exists()).try_for_each(|name| ip(&["netns", "delete", &name]))
}
