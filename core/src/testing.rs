//! What tests of several crates share: small meshes, and random ones. Never part of a program: it exists in tests and
//! with the feature `testing`, which only dev-dependencies switch on.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests are tests")]

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use crate::{
    Delta, MeshConfig, MeshState, NamespacedName, Policy, Resource, Service, SpiffeId, SubjectId,
    TrustDomain, Workload, WorkloadUid,
    config::{SameNode, Telemetry, UnknownPods},
    policy::{
        Action, PortRef, Protocol, Rule, Source,
        kernel::{KernelPolicy, Row, RowVerdict},
    },
    workload::{FailMode, Mode, Owner},
};

pub mod generate;

/// The node that everything runs on, where a test does not say otherwise.
pub const NODE: &str = "node-a";

/// Settings with nothing special in them.
pub fn config() -> MeshConfig {
    MeshConfig {
        trust_domain: TrustDomain::new("cluster.local").unwrap(),
        svid_lifetime: Duration::from_secs(3_600),
        issuer: Default::default(),
        before_enrolment: Default::default(),
        namespaces: BTreeMap::new(),
        same_node: SameNode::Shortcut,
        unknown_pods: UnknownPods::RefuseMesh,
        ranges: Vec::new(),
        reveal_policy: false,
        telemetry: Telemetry::default(),
    }
}

/// A Pod of namespace `shop` and of a service account named as itself.
pub fn workload(name: &str, subject: u32, mode: Mode, policies: &[&str]) -> Workload {
    let domain = TrustDomain::new("cluster.local").unwrap();
    Workload {
        uid: WorkloadUid::from(name),
        name: NamespacedName::new("shop", name),
        service_account: name.into(),
        identity: SpiffeId::service_account(&domain, "shop", name),
        subject: SubjectId(subject),
        owner: Owner { kind: "Pod".into(), name: name.into() },
        node: NODE.into(),
        zone: "".into(),
        labels: BTreeMap::new(),
        addresses: Vec::new(),
        named_ports: BTreeMap::from([("http".to_owned(), 8_080)]),
        mode,
        fail_mode: FailMode::Closed,
        policies: policies.iter().map(|name| NamespacedName::new("shop", name)).collect(),
        network_policy: false,
        netns: None,
        host_addresses: Vec::new(),
    }
}

/// A rule for these TCP ports; none means all.
pub fn rule(sources: Option<Vec<Source>>, ports: &[u16]) -> Rule {
    let ports = ports.iter().map(|port| PortRef::Number(*port)).collect();
    Rule { sources, ports, protocol: Protocol::Tcp, plaintext: false, http: Vec::new() }
}

/// A policy of namespace `shop`.
pub fn policy(name: &str, action: Action, rules: Vec<Rule>) -> Policy {
    Policy { name: NamespacedName::new("shop", name), action, rules }
}

/// A mesh of these.
pub fn state(workloads: Vec<Workload>, policies: Vec<Policy>) -> MeshState {
    state_with(workloads, policies, Vec::new())
}

/// A mesh of these, with Services.
pub fn state_with(workloads: Vec<Workload>, policies: Vec<Policy>, services: Vec<Service>) -> MeshState {
    let upserted = std::iter::once(Resource::Config(config().into()))
        .chain(workloads.into_iter().map(|workload| Resource::Workload(workload.into())))
        .chain(policies.into_iter().map(|policy| Resource::Policy(policy.into())))
        .chain(services.into_iter().map(|service| Resource::Service(service.into())))
        .collect();
    MeshState::default().apply(&Delta { full: true, upserted, ..Delta::default() })
}

/// What the rows say of a destination that has rows, looked up as the kernel does.
pub fn row_verdict(
    compiled: &KernelPolicy,
    source: SubjectId,
    destination: SubjectId,
    port: u16,
    protocol: u8,
) -> RowVerdict {
    let find = |port: u16, protocol: u8| {
        let pair = |row: &&Row| row.source == source && row.destination == destination;
        compiled.rows.iter().filter(pair).find(|row| (row.port, row.protocol) == (port, protocol))
    };
    let row = find(port, protocol).or_else(|| find(0, protocol)).or_else(|| find(0, 0));
    row.map_or(RowVerdict::Deny, |row| row.verdict)
}

/// The subject of a client of which only the address is known: the class with the longest match, or the world.
pub fn outside_subject(compiled: &KernelPolicy, address: IpAddr) -> SubjectId {
    let around = compiled.cidrs.iter().filter(|class| class.cidr.contains(address));
    around.max_by_key(|class| class.cidr.prefix).map_or(SubjectId::WORLD, |class| class.subject)
}
