//! MTUs: a packet that fits the way there must fit the way back.

use std::{collections::BTreeMap, net::IpAddr};

use weft_core::policy::Cidr;
use weft_proto::weft_relay::{NodeStatus, Route};

use super::SECTION;
use crate::check::{Finding, facts::Facts, names};

/// Most pairs of nodes that are compared.
const MAX_PAIRS: usize = 20_000;
const REMEDY: &str = "give the nodes' interfaces one MTU, and Pods at most that: large packets between them may get lost otherwise";

type States = BTreeMap<String, (String, NodeStatus)>;

pub(super) fn all(facts: &Facts, states: &States) -> Vec<Finding> {
    ways(facts, states).unwrap_or_else(|| defaults(states))
}

/// By the routes to each other's Pods; `None` where no node has such a route (an overlay that routes elsewhere).
fn ways(facts: &Facts, states: &States) -> Option<Vec<Finding>> {
    let nodes: Vec<(&String, &[Route], Vec<IpAddr>)> = states
        .iter()
        .map(|(name, (_, status))| (name, status.routes.as_slice(), pods_of(facts, name)))
        .collect();
    let (mut known, mut differ) = (BTreeMap::new(), Vec::new());
    let pairs = nodes.iter().enumerate().flat_map(|(i, a)| nodes[i + 1..].iter().map(move |b| (a, b)));
    for ((a, a_routes, a_pods), (b, b_routes, b_pods)) in pairs.take(MAX_PAIRS) {
        for (to_b, to_a) in b_pods.iter().zip(a_pods) {
            let (Some(there), Some(back)) = (way(a_routes, *to_b), way(b_routes, *to_a)) else { continue };
            *known.entry(there.mtu).or_insert(0_usize) += 1;
            if there.mtu != back.mtu {
                differ.push(format!(
                    "{a} to {b} by {}: {}, back by {}: {}",
                    there.interface, there.mtu, back.interface, back.mtu
                ));
            }
        }
    }
    if known.is_empty() {
        return None;
    }
    if !differ.is_empty() {
        let message = "the nodes' MTUs differ on the ways between their Pods";
        return Some(vec![Finding::warning(SECTION, message, REMEDY).with(differ)]);
    }
    let all: Vec<_> = known.keys().map(u32::to_string).collect();
    Some(vec![Finding::ok(SECTION, format!("MTU {} on all ways between nodes", names(&all)))])
}

/// A first address of each of the node's Pod ranges.
fn pods_of(facts: &Facts, node: &str) -> Vec<IpAddr> {
    let mut all = facts.nodes.iter().flatten();
    let spec = all.find(|n| n.metadata.name.as_deref() == Some(node)).and_then(|n| n.spec.as_ref());
    let ranges = spec.and_then(|s| s.pod_cidrs.clone()).unwrap_or_default();
    ranges.iter().filter_map(|r| Some(r.parse::<Cidr>().ok()?.address)).collect()
}

/// The route of the longest prefix that holds an address.
fn way(routes: &[Route], to: IpAddr) -> Option<&Route> {
    let fits = routes.iter().filter_map(|route| {
        let range: Cidr = route.destination.parse().ok()?;
        range.contains(to).then_some((range.prefix, route))
    });
    fits.max_by_key(|(prefix, _)| *prefix).map(|(_, route)| route)
}

/// By the interfaces of the default routes.
fn defaults(states: &States) -> Vec<Finding> {
    let mut by_mtu: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for (node, (_, status)) in states {
        if status.mtu > 0 {
            by_mtu.entry(status.mtu).or_default().push(node.clone());
        }
    }
    if by_mtu.len() > 1 {
        let all = by_mtu.iter().map(|(mtu, nodes)| format!("{mtu}: {}", names(nodes))).collect();
        return vec![Finding::warning(SECTION, "the nodes' MTUs differ", REMEDY).with(all)];
    }
    by_mtu.keys().map(|mtu| Finding::ok(SECTION, format!("MTU {mtu} on all nodes"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, range: &str) -> k8s_openapi::api::core::v1::Node {
        serde_json::from_value(serde_json::json!({"metadata": {"name": name}, "spec": {"podCIDRs": [range]}}))
            .unwrap()
    }

    #[test]
    fn a_way_back_that_is_narrower_is_named() {
        let route = |destination: &str, interface: &str, mtu| Route {
            destination: destination.into(),
            interface: interface.into(),
            mtu,
        };
        let state =
            |routes: Vec<Route>| ("op".to_owned(), NodeStatus { mtu: 1500, routes, ..Default::default() });
        let facts =
            Facts { nodes: Ok(vec![node("a", "10.1.0.0/24"), node("b", "10.1.1.0/24")]), ..Facts::default() };
        let with = |back: u32| {
            let a = state(vec![route("10.1.0.0/16", "eth0", 9000), route("10.1.1.0/24", "vxlan", 1450)]);
            let b = state(vec![route("10.1.0.0/16", "vxlan", back)]);
            all(&facts, &BTreeMap::from([("a".to_owned(), a), ("b".to_owned(), b)]))
        };
        assert_eq!(with(1450)[0].message, "MTU 1450 on all ways between nodes");
        assert_eq!(with(1400)[0].details, ["a to b by vxlan: 1450, back by vxlan: 1400"]);
        let bare = BTreeMap::from([("a".to_owned(), state(Vec::new())), ("b".to_owned(), state(Vec::new()))]);
        assert_eq!(all(&facts, &bare)[0].message, "MTU 1500 on all nodes");
    }
}
