//! Which clusters there are, and every name, address and port that follows from it.
//!
//! Pure: a plan is a few small numbers, all else is arithmetic, so that any program that reads `plan.json` knows where everything is.
//!
//! ```text
//! cluster i (a = 1, b = 2, …)    nodes 10.90.i.0/24 (router .254)   Pods 10.(100+i).NODE.0/24   Services 10.(120+i).0.0/16
//! WAN link between i and j       10.91.(16 i + j).1 at i, .2 at j
//! API server of i, on this machine's loopback                       port 16440 + i
//! ```

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// More would not fit into the letters and addresses above; two is what the product is about.
pub const CLUSTERS_MAX: u8 = 6;
/// Nodes of one cluster: a drain needs two.
pub const NODES_MAX: u8 = 8;
/// The first port on loopback is one above this.
const API_PORT_BASE: u16 = 16440;
/// Begins every namespace and control group of ours. The reaper of `watari-e2e` looks for `watari-PID-…` and passes these by.
pub const PREFIX: &str = "watari-clusters";
/// Every image that is built here. A name that leads nowhere: nothing can be pulled by mistake.
pub const IMAGE_PREFIX: &str = "watari.internal";

/// What can be wrong with a wish.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("{0} clusters were asked for; between 2 and {CLUSTERS_MAX} are possible")]
    Clusters(u8),
    #[error("{0} nodes per cluster were asked for; between 1 and {NODES_MAX} are possible")]
    Nodes(u8),
    #[error("there is no cluster or node called {0}")]
    Unknown(String),
}

/// All clusters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub clusters: Vec<ClusterPlan>,
}

/// One cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterPlan {
    /// 1 for the first.
    pub index: u8,
    /// How many nodes; the first one carries the control plane.
    pub nodes: u8,
}

/// One node of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePlan {
    pub cluster: ClusterPlan,
    /// 1 for the first.
    pub number: u8,
}

impl Plan {
    /// `clusters` clusters of `nodes` nodes each.
    pub fn new(clusters: u8, nodes: u8) -> Result<Plan, Error> {
        if !(2..=CLUSTERS_MAX).contains(&clusters) {
            return Err(Error::Clusters(clusters));
        }
        if !(1..=NODES_MAX).contains(&nodes) {
            return Err(Error::Nodes(nodes));
        }
        Ok(Plan { clusters: (1..=clusters).map(|index| ClusterPlan { index, nodes }).collect() })
    }

    pub fn cluster(&self, name: &str) -> Result<&ClusterPlan, Error> {
        self.clusters.iter().find(|cluster| cluster.name() == name).ok_or_else(|| Error::Unknown(name.to_owned()))
    }

    pub fn node(&self, name: &str) -> Result<NodePlan, Error> {
        self.nodes().find(|node| node.name() == name).ok_or_else(|| Error::Unknown(name.to_owned()))
    }

    /// Control planes first, so that further nodes find an API server.
    pub fn nodes(&self) -> impl Iterator<Item = NodePlan> {
        let mut nodes: Vec<NodePlan> = self.clusters.iter().flat_map(ClusterPlan::node_plans).collect();
        nodes.sort_by_key(|node| node.number);
        nodes.into_iter()
    }

    /// Every pair of clusters, the earlier one first: between each there is a WAN link.
    pub fn links(&self) -> impl Iterator<Item = (&ClusterPlan, &ClusterPlan)> {
        self.clusters.iter().enumerate().flat_map(|(at, a)| self.clusters[at + 1..].iter().map(move |b| (a, b)))
    }

    /// Everything that either of the two has: what is up stays when less is asked for.
    pub fn union(mut self, other: &Plan) -> Plan {
        for theirs in &other.clusters {
            match self.clusters.iter_mut().find(|ours| ours.index == theirs.index) {
                Some(ours) => ours.nodes = ours.nodes.max(theirs.nodes),
                None => self.clusters.push(theirs.clone()),
            }
        }
        self.clusters.sort_by_key(|cluster| cluster.index);
        self
    }

    /// The clusters of these names (`c,d`), in the order of the plan; all of them if none is named.
    pub fn chosen(&self, names: &[String]) -> Result<Vec<&ClusterPlan>, Error> {
        for name in names {
            self.cluster(name)?;
        }
        Ok(self.clusters.iter().filter(|cluster| names.is_empty() || names.contains(&cluster.name())).collect())
    }
}

impl ClusterPlan {
    /// "a", "b", …
    pub fn name(&self) -> String {
        char::from(b'a' + self.index - 1).to_string()
    }
    pub fn node_plans(&self) -> impl Iterator<Item = NodePlan> {
        let cluster = self.clone();
        (1..=self.nodes).map(move |number| NodePlan { cluster: cluster.clone(), number })
    }
    /// The node that carries the control plane.
    pub fn control_plane(&self) -> NodePlan {
        NodePlan { cluster: self.clone(), number: 1 }
    }
    /// The namespace of the cluster's router, to which nodes and WAN links are attached.
    pub fn router_netns(&self) -> String {
        format!("{PREFIX}-{}", self.name())
    }
    pub fn router_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 90, self.index, 254)
    }
    pub fn node_range(&self) -> String {
        format!("10.90.{}.0/24", self.index)
    }
    /// All Pod networks of the cluster.
    pub fn pod_range(&self) -> String {
        format!("10.{}.0.0/16", 100 + self.index)
    }
    pub fn service_range(&self) -> String {
        format!("10.{}.0.0/16", 120 + self.index)
    }
    /// The Service `kubernetes`: the first address of the range.
    pub fn kubernetes_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 120 + self.index, 0, 1)
    }
    /// Where Pods ask for names.
    pub fn dns_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 120 + self.index, 0, 10)
    }
    /// Where the API server answers on this machine's loopback.
    pub fn api_port(&self) -> u16 {
        API_PORT_BASE + u16::from(self.index)
    }
    /// What the WAN device towards `other` is called here.
    pub fn wan_device(&self, other: &ClusterPlan) -> String {
        format!("wan-{}", other.name())
    }
    /// This cluster's own address on the link to `other`.
    pub fn wan_address(&self, other: &ClusterPlan) -> Ipv4Addr {
        let (low, high) = (self.index.min(other.index), self.index.max(other.index));
        Ipv4Addr::new(10, 91, 16 * low + high, if self.index == low { 1 } else { 2 })
    }
}

impl NodePlan {
    /// "a-1": the host name, unlike every other cluster's (KubeVirt does not migrate between nodes of one name).
    pub fn name(&self) -> String {
        format!("{}-{}", self.cluster.name(), self.number)
    }
    pub fn is_control_plane(&self) -> bool {
        self.number == 1
    }
    pub fn netns(&self) -> String {
        format!("{PREFIX}-{}", self.name())
    }
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 90, self.cluster.index, self.number)
    }
    pub fn pod_net(&self) -> String {
        format!("10.{}.{}.0/24", 100 + self.cluster.index, self.number)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_things_share_a_name_an_address_or_a_port() {
        let plan = Plan::new(CLUSTERS_MAX, NODES_MAX).unwrap();
        let mut seen = BTreeSet::new();
        let mut once = |text: String| assert!(seen.insert(text.clone()), "{text} twice");
        for cluster in &plan.clusters {
            once(cluster.router_netns());
            once(cluster.node_range());
            once(cluster.pod_range());
            once(cluster.service_range());
            once(cluster.api_port().to_string());
        }
        for node in plan.nodes() {
            once(node.netns());
            once(node.address().to_string());
            once(node.pod_net());
        }
        for (a, b) in plan.links() {
            once(a.wan_address(b).to_string());
            once(b.wan_address(a).to_string());
        }
    }

    #[test]
    fn the_reaper_of_the_harness_does_not_take_our_namespaces_for_its_own() {
        for node in Plan::new(2, 2).unwrap().nodes() {
            let label = node.netns().strip_prefix("watari-").unwrap().split('-').next().unwrap().to_owned();
            assert!(label.parse::<u32>().is_err(), "{label} would be read as a process id");
        }
    }

    #[test]
    fn what_is_up_stays_when_less_is_asked_for() {
        let (wide, deep) = (Plan::new(4, 1).unwrap(), Plan::new(2, 2).unwrap());
        let both = wide.clone().union(&deep);
        assert_eq!(both, deep.union(&wide));
        let nodes: Vec<(String, u8)> = both.clusters.iter().map(|cluster| (cluster.name(), cluster.nodes)).collect();
        assert_eq!(nodes, [("a".into(), 2), ("b".into(), 2), ("c".into(), 1), ("d".into(), 1)]);
    }

    #[test]
    fn clusters_are_chosen_by_name_and_all_of_them_without_one() {
        let plan = Plan::new(4, 1).unwrap();
        let names = |wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
            plan.chosen(&wanted).map(|chosen| chosen.iter().map(|cluster| cluster.name()).collect::<String>())
        };
        assert_eq!(names(&["d", "c"]), Ok("cd".to_owned()));
        assert_eq!(names(&[]), Ok("abcd".to_owned()));
        assert_eq!(names(&["x"]), Err(Error::Unknown("x".to_owned())));
    }

    #[test]
    fn wishes_beyond_the_address_plan_are_refused() {
        assert_eq!(Plan::new(1, 1), Err(Error::Clusters(1)));
        assert_eq!(Plan::new(2, 0), Err(Error::Nodes(0)));
        assert_eq!(Plan::new(2, 9), Err(Error::Nodes(9)));
    }
}
