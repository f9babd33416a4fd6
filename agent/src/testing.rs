//! A small mesh for the tests.

use std::{net::IpAddr, sync::Arc, time::Duration};

use weft_core::{
    Delta, MeshConfig, MeshState, NamespacedName, Resource, SpiffeId, SubjectId, TrustDomain, Version,
    Workload,
    config::{SameNode, Telemetry, UnknownPods},
    workload::{FailMode, Mode, Owner},
};

pub(crate) fn workload(name: &str, node: &str, address: &str, subject: u32) -> Workload {
    let address: IpAddr = address.parse().unwrap();
    let domain = TrustDomain::new("cluster.local").unwrap();
    Workload {
        uid: format!("uid-{name}").as_str().into(),
        name: NamespacedName::new("shop", &format!("{name}-abc")),
        service_account: name.into(),
        identity: SpiffeId::service_account(&domain, "shop", name),
        subject: SubjectId(subject),
        owner: Owner { kind: "Deployment".into(), name: name.into() },
        node: node.into(),
        zone: "".into(),
        labels: [("app".to_owned(), name.to_owned())].into(),
        addresses: vec![address],
        named_ports: Default::default(),
        mode: Mode::Strict,
        fail_mode: FailMode::Closed,
        policies: Vec::new(),
        network_policy: false,
        host_addresses: Vec::new(),
        netns: Some(format!("/run/netns/{name}")),
    }
}

pub(crate) fn delta(workloads: impl IntoIterator<Item = Workload>) -> Delta {
    let config = MeshConfig {
        trust_domain: TrustDomain::new("cluster.local").unwrap(),
        svid_lifetime: Duration::from_secs(3600),
        issuer: Default::default(),
        before_enrolment: Default::default(),
        namespaces: std::collections::BTreeMap::new(),
        same_node: SameNode::Shortcut,
        unknown_pods: UnknownPods::RefuseMesh,
        ranges: vec!["10.1.0.0/16".parse().unwrap()],
        reveal_policy: false,
        telemetry: Telemetry::default(),
    };
    let workloads = workloads.into_iter().map(|w| Resource::Workload(Arc::new(w)));
    Delta {
        version: Version { epoch: 7, sequence: 3 },
        full: true,
        upserted: std::iter::once(Resource::Config(Arc::new(config))).chain(workloads).collect(),
        removed: Vec::new(),
    }
}

pub(crate) fn state() -> MeshState {
    MeshState::default().apply(&delta([
        workload("client", "node-a", "10.1.1.1", 300),
        workload("web", "node-b", "10.1.2.1", 301),
    ]))
}
