use std::sync::Arc;

use weft_core::{
    MeshState, NamespacedName, Policy, Resource,
    policy::{Action, PortRef, Protocol, Rule, Source},
    workload::Mode,
};

use super::*;
use crate::testing;

fn state(change: impl FnOnce(&mut Vec<weft_core::Workload>, &mut Vec<Policy>)) -> MeshState {
    let mut workloads = vec![
        testing::workload("client", "node-a", "10.1.1.1", 300),
        testing::workload("web", "node-a", "10.1.1.2", 301),
        testing::workload("far", "node-b", "10.1.2.1", 302),
    ];
    let mut policies = Vec::new();
    change(&mut workloads, &mut policies);
    let mut delta = testing::delta(workloads);
    delta.upserted.extend(policies.into_iter().map(|p| Resource::Policy(Arc::new(p))));
    MeshState::default().apply(&delta)
}

fn allow(account: &str, protocol: Protocol, plaintext: bool) -> Policy {
    Policy {
        name: NamespacedName::new("shop", "p"),
        action: Action::Allow,
        rules: vec![Rule {
            sources: Some(vec![Source::ServiceAccount {
                namespace: "shop".into(),
                name: Some(account.into()),
            }]),
            ports: vec![PortRef::Number(80)],
            protocol,
            plaintext,
            http: Vec::new(),
        }],
    }
}

fn verdict(state: &MeshState, client: &str, protocol: u8) -> bool {
    let uid = "uid-web".into();
    let connection = KernelConnection {
        pod: &uid,
        client: client.parse().unwrap(),
        server: "10.1.1.2:80".parse().unwrap(),
        protocol,
    };
    denied(state, &connection)
}

#[test]
fn connections_beside_the_proxy_follow_policy() {
    let selected = |p: Policy| {
        state(|workloads, policies| {
            workloads[1].policies = vec![p.name.clone()];
            policies.push(p);
        })
    };
    assert!(!verdict(&state(|_, _| {}), "10.1.1.1:5000", 6));
    assert!(!verdict(&selected(allow("client", Protocol::Tcp, false)), "10.1.1.1:5000", 6));
    assert!(verdict(&selected(allow("other", Protocol::Tcp, false)), "10.1.1.1:5000", 6));
    // The shortcut is gone.
    assert!(verdict(&state(|w, _| w[1].network_policy = true), "10.1.1.1:5000", 6));
    // Not the mesh's business any more.
    assert!(!verdict(&state(|w, _| w[1].mode = Mode::Disabled), "10.1.1.1:5000", 6));
    // A stranger towards a strict Pod.
    assert!(verdict(&state(|_, _| {}), "192.0.2.1:5000", 6));
    // UDP between nodes in strict.
    assert!(verdict(&state(|_, _| {}), "10.1.2.1:5000", 17));
    assert!(!verdict(&selected(allow("far", Protocol::Udp, true)), "10.1.2.1:5000", 17));
    assert!(verdict(&selected(allow("far", Protocol::Udp, false)), "10.1.2.1:5000", 17));
}
