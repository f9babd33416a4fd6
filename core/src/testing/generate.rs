//! Random policies, the Pods and Services they are about, and flows towards them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use proptest::prelude::*;

use super::{policy, state, state_with, workload};
use crate::{
    MeshState, NamespacedName, Policy, Service, Workload, WorkloadUid,
    policy::{Action, HttpRule, PortRef, Protocol, Rule, Source},
    service::{Endpoint, PacketPort},
    workload::Mode,
};

/// Who may call with an identity: Pods of this node, by service account and subject.
pub const CALLERS: [(&str, u32); 2] = [("a", 400), ("b", 401)];
/// The Pod that is called.
pub const SERVER: (&str, u32) = ("web", 301);
/// The Service of a [`Balanced`] mesh, at both its addresses.
pub const VIPS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 96, 0, 7)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 7))];

/// Who calls.
#[derive(Debug, Clone, Copy)]
pub enum From {
    /// One of [`CALLERS`]; over IPv6 or not.
    Pod(usize, bool),
    /// An address outside the mesh.
    Outside(IpAddr),
}

/// One attempt to reach the server.
#[derive(Debug, Clone)]
pub struct Flow {
    /// Who.
    pub from: From,
    /// The server's port; 0 where the protocol has none.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
}

impl Flow {
    /// Over IPv6.
    pub fn is_v6(&self) -> bool {
        match self.from {
            From::Pod(_, v6) => v6,
            From::Outside(ip) => ip.is_ipv6(),
        }
    }
}

/// A policy set, and flows under it.
#[derive(Debug, Clone)]
pub struct Case {
    /// The server's mode.
    pub mode: Mode,
    /// The policies that select it.
    pub selected: Vec<&'static str>,
    /// The policies that there are.
    pub policies: Vec<Policy>,
    /// The flows.
    pub flows: Vec<Flow>,
}

impl Case {
    /// Its mesh: the server and its callers on one node.
    pub fn mesh(&self) -> MeshState {
        let mut pods = callers(Mode::Permissive);
        pods.push(workload(SERVER.0, SERVER.1, self.mode, &self.selected));
        state(pods, self.policies.clone())
    }
}

/// The callers, in this mode and without policies.
pub fn callers(mode: Mode) -> Vec<Workload> {
    CALLERS.iter().map(|(name, subject)| workload(name, *subject, mode, &[])).collect()
}

fn source() -> impl Strategy<Value = Source> {
    prop_oneof![
        "[abc]".prop_map(|name| Source::ServiceAccount {
            namespace: "shop".into(),
            name: Some(name.as_str().into())
        }),
        Just(Source::ServiceAccount { namespace: "shop".into(), name: None }),
        Just(Source::Spiffe("spiffe://cluster.local/ns/*/sa/a".into())),
        prop::sample::select(vec!["10.0.0.0/8", "10.0.0.0/16", "10.1.0.0/16", "0.0.0.0/0", "fd00::/8"])
            .prop_map(|range| Source::Unauthenticated(vec![range.parse().unwrap()])),
        Just(Source::Unauthenticated(vec![])),
    ]
}

fn rule() -> impl Strategy<Value = Rule> {
    let port = prop_oneof![
        prop::sample::select(vec![80, 443, 53]).prop_map(PortRef::Number),
        Just(PortRef::Name("http".into()))
    ];
    let protocol = prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Icmp, Protocol::Any]);
    let get = HttpRule { methods: vec!["GET".into()], ..HttpRule::default() };
    let http = prop_oneof![3 => Just(vec![]), 1 => Just(vec![get])];
    let sources = prop::option::of(prop::collection::vec(source(), 0..3));
    (sources, prop::collection::vec(port, 0..3), protocol, any::<bool>(), http).prop_map(
        |(sources, ports, protocol, plaintext, http)| Rule { sources, ports, protocol, plaintext, http },
    )
}

fn any_policy(name: &'static str) -> impl Strategy<Value = Policy> {
    // ALLOW more often: a DENY without sources leaves little to disagree about.
    let action = prop::sample::select(vec![Action::Allow, Action::Allow, Action::Deny, Action::Audit]);
    (action, prop::collection::vec(rule(), 0..4)).prop_map(move |(action, rules)| policy(name, action, rules))
}

/// Policies that select a Pod: among them one that nobody has described yet, and none at all.
fn selected() -> impl Strategy<Value = Vec<&'static str>> {
    prop::sample::select(vec![vec!["p", "q"], vec!["p", "q"], vec!["p"], vec!["q", "gone"], vec![]])
}

fn flow() -> impl Strategy<Value = Flow> {
    let outside = vec!["10.0.0.1", "10.0.5.5", "10.1.2.3", "10.8.9.9", "192.0.2.1", "fd00::1", "2001:db8::1"];
    let from = prop_oneof![
        2 => (0..CALLERS.len(), any::<bool>()).prop_map(|(pod, v6)| From::Pod(pod, v6)),
        1 => prop::sample::select(outside).prop_map(|ip| From::Outside(ip.parse().unwrap())),
    ];
    let port = prop::sample::select(vec![80, 443, 53, 8_080, 1]);
    (from, port, prop::sample::select(vec![6, 6, 17, 17, 1, 132])).prop_map(|(from, port, protocol)| {
        let mut flow = Flow { from, port, protocol };
        if protocol == 1 && flow.is_v6() {
            flow.protocol = 58;
        }
        if !matches!(protocol, 6 | 17) {
            flow.port = 0;
        }
        flow
    })
}

/// A policy set with so many flows.
pub fn case(flows: usize) -> impl Strategy<Value = Case> {
    let mode = prop::sample::select(vec![Mode::Strict, Mode::Permissive]);
    (mode, selected(), any_policy("p"), any_policy("q"), prop::collection::vec(flow(), flows))
        .prop_map(|(mode, selected, p, q, flows)| Case { mode, selected, policies: vec![p, q], flows })
}

/// A Service with random Pods behind it.
#[derive(Debug, Clone)]
pub struct Balanced {
    /// The callers' mode.
    pub callers: Mode,
    /// The Pods, some on this node and some on another one.
    pub pods: Vec<Workload>,
    /// The policies that there are.
    pub policies: Vec<Policy>,
    /// (protocol, port at the Service) of each packet to try; some ports are none of the Service's.
    pub packets: Vec<(u8, u16)>,
}

impl Balanced {
    /// (protocol, port at the Service, port at the endpoint).
    pub const PORTS: [(u8, u16, u16); 3] = [(17, 53, 53), (17, 5_353, 80), (132, 80, 80)];

    /// Its mesh. Every Pod is an endpoint of every port.
    pub fn mesh(&self) -> MeshState {
        let packet_ports =
            Self::PORTS.map(|(protocol, port, target)| PacketPort { protocol, port, target }).to_vec();
        let endpoint = |pod: &Workload| Endpoint {
            address: pod.addresses[0],
            ports: BTreeMap::new(),
            packet_ports: packet_ports.clone(),
            workload: Some(pod.uid.clone()),
            ready: pod.subject.0.is_multiple_of(2),
            node: None,
        };
        let service = Service {
            name: NamespacedName::new("shop", "balanced"),
            addresses: VIPS.to_vec(),
            ports: Vec::new(),
            endpoints: self.pods.iter().map(endpoint).collect(),
            fronts: Vec::new(),
            node_local: false,
        };
        let pods = callers(self.callers).into_iter().chain(self.pods.iter().cloned()).collect();
        state_with(pods, self.policies.clone(), vec![service])
    }
}

/// A Service with up to three Pods behind it, and so many packets towards it.
pub fn balanced(packets: usize) -> impl Strategy<Value = Balanced> {
    let mode = || prop::sample::select(vec![Mode::Strict, Mode::Strict, Mode::Permissive, Mode::Disabled]);
    let node = prop::sample::select(vec![super::NODE, "node-b", "node-b"]);
    let pods = prop::collection::vec((mode(), selected(), node), 0..4).prop_map(|pods| {
        let mut number = 0;
        let pod = |(mode, selected, node): (Mode, Vec<&str>, &str)| {
            number += 1;
            let mut pod = workload(&format!("pod-{number}"), 500 + u32::from(number), mode, &selected);
            pod.uid = WorkloadUid::from(format!("uid-{number}").as_str());
            pod.node = node.into();
            pod.addresses = vec![IpAddr::from([10, 9, 1, number])];
            pod
        };
        pods.into_iter().map(pod).collect()
    });
    let packet = (prop::sample::select(vec![17, 17, 132]), prop::sample::select(vec![53, 5_353, 80, 1]));
    let callers = prop::sample::select(vec![Mode::Strict, Mode::Permissive]);
    let policies = (any_policy("p"), any_policy("q")).prop_map(|(p, q)| vec![p, q]);
    (callers, pods, policies, prop::collection::vec(packet, packets))
        .prop_map(|(callers, pods, policies, packets)| Balanced { callers, pods, policies, packets })
}
