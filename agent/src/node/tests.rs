use std::sync::Arc;

use weft_core::{
    MeshState, NamespacedName, Policy, Resource, Service,
    config::BeforeEnrolment,
    policy::{Action, PortRef, Protocol, Rule, Source},
    service::{Endpoint, PacketPort},
    workload::Mode,
};

use super::*;
use crate::{datapath::KernelConnection, testing};

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
        pod: Some(&uid),
        client: client.parse().unwrap(),
        server: "10.1.1.2:80".parse().unwrap(),
        protocol,
        earlier: false,
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

/// A flow of UDP that the client of node-a opened.
fn outgoing(state: &MeshState, server: &str) -> bool {
    let connection = KernelConnection {
        pod: None,
        client: "10.1.1.1:5000".parse().unwrap(),
        server: server.parse().unwrap(),
        protocol: 17,
        earlier: false,
    };
    denied(state, &connection)
}

#[test]
fn a_clients_flows_are_judged_by_who_is_called() {
    // What selects the client says what it takes, not whom it may call.
    let policed = |plaintext: bool| {
        move |workloads: &mut Vec<weft_core::Workload>, policies: &mut Vec<Policy>| {
            workloads[0].policies = vec![NamespacedName::new("shop", "none")];
            policies.push(Policy {
                name: NamespacedName::new("shop", "none"),
                ..allow("nobody", Protocol::Udp, true)
            });
            let rule = allow("client", Protocol::Udp, plaintext);
            workloads[2].policies = vec![rule.name.clone()];
            policies.push(rule);
        }
    };
    let open = state(policed(true));
    assert!(!outgoing(&open, "192.0.2.53:53"), "outside the mesh");
    assert!(!outgoing(&open, "10.1.9.9:53"), "of nobody");
    assert!(!outgoing(&open, "10.1.2.1:80"));
    assert!(outgoing(&open, "10.1.2.1:81"), "a port of no rule");
    assert!(outgoing(&state(policed(false)), "10.1.2.1:80"), "no right to go without a tunnel");
    let disabled = state(|workloads, _| workloads[2].mode = Mode::Disabled);
    assert!(!outgoing(&disabled, "10.1.2.1:80"));
}

#[test]
fn a_flow_to_a_services_address_ends_with_the_right_to_one_behind_it() {
    let service = |state: MeshState, endpoints: &[(&str, Option<&str>)]| {
        let endpoint = |(address, workload): &(&str, Option<&str>)| Endpoint {
            address: address.parse().unwrap(),
            ports: Default::default(),
            packet_ports: vec![PacketPort { protocol: 17, port: 53, target: 80 }],
            workload: workload.map(Into::into),
            ready: true,
            node: None,
        };
        let service = Service {
            name: NamespacedName::new("shop", "dns"),
            addresses: vec!["10.96.0.10".parse().unwrap()],
            ports: Vec::new(),
            endpoints: endpoints.iter().map(endpoint).collect(),
            fronts: Vec::new(),
            node_local: false,
        };
        let mut delta = state.to_delta();
        delta.upserted.push(Resource::Service(Arc::new(service)));
        MeshState::default().apply(&delta)
    };
    let remote = [("10.1.2.1", Some("uid-far"))];
    let rule = |plaintext: bool| {
        move |workloads: &mut Vec<weft_core::Workload>, policies: &mut Vec<Policy>| {
            let rule = allow("client", Protocol::Udp, plaintext);
            workloads[2].policies = vec![rule.name.clone()];
            policies.push(rule);
        }
    };
    assert!(!outgoing(&service(state(rule(true)), &remote), "10.96.0.10:53"));
    assert!(outgoing(&service(state(rule(false)), &remote), "10.96.0.10:53"));
    assert!(outgoing(&service(state(|_, _| {}), &remote), "10.96.0.10:53"));
    assert!(outgoing(&service(state(rule(true)), &remote), "10.96.0.10:54"), "a port of no endpoint");
    // Nothing is known of the Pod: it may be a strict one.
    assert!(outgoing(&service(state(|_, _| {}), &[("10.1.2.9", Some("uid-new"))]), "10.96.0.10:53"));
    // Endpoints of this node are judged where the packet arrives, those outside the mesh nowhere.
    assert!(!outgoing(&service(state(|_, _| {}), &[("10.1.1.2", Some("uid-web"))]), "10.96.0.10:53"));
    assert!(!outgoing(&service(state(|_, _| {}), &[("192.0.2.53", None)]), "10.96.0.10:53"));
    // Neither side is strict.
    let lenient = state(|workloads, _| workloads.iter_mut().for_each(|w| w.mode = Mode::Permissive));
    assert!(!outgoing(&service(lenient, &remote), "10.96.0.10:53"));
}

/// Whether a TCP connection from before the enrolment ends: towards `web` of node-a, or from `client` of node-a.
fn ends(state: &MeshState, client: &str, server: &str) -> bool {
    let web = "uid-web".into();
    let connection = KernelConnection {
        pod: server.starts_with("10.1.1.2:").then_some(&web),
        client: client.parse().unwrap(),
        server: server.parse().unwrap(),
        protocol: 6,
        earlier: true,
    };
    denied(state, &connection)
}

#[test]
fn of_connections_from_before_those_end_that_strict_would_not_let_through() {
    const WEB: &str = "10.1.1.2:80";
    let strict = state(|_, _| {});
    assert!(ends(&strict, "192.0.2.1:5000", WEB), "plaintext from outside");
    assert!(ends(&strict, "10.1.2.1:5000", WEB), "plaintext of a Pod of another node");
    assert!(!ends(&strict, "10.1.1.1:5000", WEB), "what the kernel would let pass beside the proxy");
    assert!(ends(&strict, "10.1.1.1:5000", "10.1.2.1:80"), "plaintext to another node");
    assert!(!ends(&strict, "10.1.1.1:5000", "192.0.2.1:443"), "out of the mesh");
    assert!(!ends(&state(|w, _| w[2].mode = Mode::Disabled), "10.1.1.1:5000", "10.1.2.1:80"));
    let open = |w: &mut Vec<weft_core::Workload>, p: &mut Vec<Policy>| {
        let mut policy = allow("x", Protocol::Tcp, false);
        policy.rules[0].sources = Some(vec![Source::Unauthenticated(vec!["192.0.2.0/24".parse().unwrap()])]);
        w[1].policies = vec![policy.name.clone()];
        p.push(policy);
    };
    assert!(!ends(&state(open), "192.0.2.1:5000", WEB), "plaintext that a policy allows");

    let permissive = |more: fn(&mut Vec<weft_core::Workload>, &mut Vec<Policy>)| {
        state(move |w, p| {
            w.iter_mut().for_each(|w| w.mode = Mode::Permissive);
            more(w, p);
        })
    };
    for (client, server) in [
        ("192.0.2.1:5000", WEB),
        ("10.1.2.1:5000", WEB),
        ("10.1.1.1:5000", "10.1.2.1:80"),
        ("10.1.1.1:5000", WEB),
    ] {
        assert!(!ends(&permissive(|_, _| {}), client, server), "{client} to {server} in permissive mode");
    }
    let policed = permissive(|w, p| {
        w[1].policies = vec![NamespacedName::new("shop", "p")];
        p.push(allow("other", Protocol::Tcp, false));
    });
    assert!(ends(&policed, "10.1.1.1:5000", WEB), "what policy refuses ends in every mode");

    let mut keep = (**strict.config().unwrap()).clone();
    keep.before_enrolment = BeforeEnrolment::Keep;
    let mut delta = strict.to_delta();
    delta.upserted.push(Resource::Config(Arc::new(keep)));
    let kept = MeshState::default().apply(&delta);
    assert!(!ends(&kept, "192.0.2.1:5000", WEB) && !ends(&kept, "10.1.1.1:5000", "10.1.2.1:80"));
}

#[test]
fn a_services_address_ends_with_a_pod_of_another_node_behind_it() {
    let service = |address: &str, workload: Option<&str>| {
        let service = Service {
            name: NamespacedName::new("shop", "web"),
            addresses: vec!["10.96.0.10".parse().unwrap()],
            ports: Vec::new(),
            endpoints: vec![Endpoint {
                address: address.parse().unwrap(),
                ports: Default::default(),
                packet_ports: Vec::new(),
                workload: workload.map(Into::into),
                ready: true,
                node: None,
            }],
            fronts: Vec::new(),
            node_local: false,
        };
        let mut delta = state(|_, _| {}).to_delta();
        delta.upserted.push(Resource::Service(Arc::new(service)));
        MeshState::default().apply(&delta)
    };
    assert!(ends(&service("10.1.2.1", Some("uid-far")), "10.1.1.1:5000", "10.96.0.10:80"));
    assert!(
        !ends(&service("10.1.1.2", Some("uid-web")), "10.1.1.1:5000", "10.96.0.10:80"),
        "looked at there"
    );
    assert!(!ends(&service("192.0.2.9", None), "10.1.1.1:5000", "10.96.0.10:80"), "nobody of the mesh");
}
