//! Random policies, the Pods they select, and flows towards one of them.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use proptest::prelude::*;
use weft_bpf_tests::tables::PEER;
use weft_core::{
    Delta, MeshConfig, MeshState, NamespacedName, Policy, Resource, SpiffeId, SubjectId, TrustDomain,
    Workload, WorkloadUid,
    config::{SameNode, Telemetry, UnknownPods},
    policy::{Action, HttpRule, PortRef, Protocol, Rule, Source},
    workload::{FailMode, Mode, Owner},
};

/// Who may call with an identity: Pods of this node, by service account and subject.
pub(crate) const CALLERS: [(&str, u32); 2] = [("a", 400), ("b", 401)];
/// The Pod that is called.
pub(crate) const SERVER: (&str, u32) = ("web", PEER);

/// Who calls.
#[derive(Debug, Clone, Copy)]
pub(crate) enum From {
    /// One of [`CALLERS`]; over IPv6 or not.
    Pod(usize, bool),
    /// An address outside the mesh.
    Outside(IpAddr),
}

/// One attempt to reach the server.
#[derive(Debug, Clone)]
pub(crate) struct Flow {
    pub(crate) from: From,
    pub(crate) port: u16,
    pub(crate) protocol: u8,
}

impl Flow {
    pub(crate) fn is_v6(&self) -> bool {
        match self.from {
            From::Pod(_, v6) => v6,
            From::Outside(ip) => ip.is_ipv6(),
        }
    }
}

/// A policy set, and flows under it.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) mode: Mode,
    pub(crate) selected: Vec<&'static str>,
    pub(crate) policies: Vec<Policy>,
    pub(crate) flows: Vec<Flow>,
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

fn policy(name: &'static str) -> impl Strategy<Value = Policy> {
    // ALLOW more often: a DENY without sources leaves little to disagree about.
    let action = prop::sample::select(vec![Action::Allow, Action::Allow, Action::Deny, Action::Audit]);
    (action, prop::collection::vec(rule(), 0..4)).prop_map(move |(action, rules)| Policy {
        name: NamespacedName::new("shop", name),
        action,
        rules,
    })
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
pub(crate) fn case(flows: usize) -> impl Strategy<Value = Case> {
    (
        prop::sample::select(vec![Mode::Strict, Mode::Permissive]),
        // One that nobody has described yet, and none at all.
        prop::sample::select(vec![vec!["p", "q"], vec!["p", "q"], vec!["p"], vec!["q", "gone"], vec![]]),
        policy("p"),
        policy("q"),
        prop::collection::vec(flow(), flows),
    )
        .prop_map(|(mode, selected, p, q, flows)| Case { mode, selected, policies: vec![p, q], flows })
}

fn workload((name, subject): (&str, u32), mode: Mode, policies: &[&str]) -> Workload {
    let domain = TrustDomain::new("cluster.local").unwrap();
    Workload {
        uid: WorkloadUid::from(name),
        name: NamespacedName::new("shop", name),
        service_account: name.into(),
        identity: SpiffeId::service_account(&domain, "shop", name),
        subject: SubjectId(subject),
        owner: Owner { kind: "Pod".into(), name: name.into() },
        node: "node-a".into(),
        zone: "".into(),
        labels: BTreeMap::new(),
        addresses: Vec::new(),
        named_ports: BTreeMap::from([("http".to_owned(), 8_080)]),
        mode,
        fail_mode: FailMode::Closed,
        policies: policies.iter().map(|name| NamespacedName::new("shop", name)).collect(),
        network_policy: false,
        netns: None,
    }
}

/// The mesh of a case: the server and its callers on one node.
pub(crate) fn mesh(case: &Case) -> MeshState {
    let config = MeshConfig {
        trust_domain: TrustDomain::new("cluster.local").unwrap(),
        svid_lifetime: Duration::from_secs(3_600),
        same_node: SameNode::Shortcut,
        unknown_pods: UnknownPods::RefuseMesh,
        ranges: Vec::new(),
        reveal_policy: false,
        telemetry: Telemetry::default(),
    };
    let callers = CALLERS.iter().map(|&caller| workload(caller, Mode::Permissive, &[]));
    let pods = callers.chain([workload(SERVER, case.mode, &case.selected)]);
    let upserted = std::iter::once(Resource::Config(Arc::new(config)))
        .chain(pods.map(|pod| Resource::Workload(pod.into())))
        .chain(case.policies.iter().map(|policy| Resource::Policy(policy.clone().into())))
        .collect();
    MeshState::default().apply(&Delta { full: true, upserted, ..Delta::default() })
}
