use std::collections::BTreeMap;

use weft_core::{NamespacedName, Policy, SpiffeId, SubjectId, TrustDomain, policy::Action, workload::Owner};

use super::*;

fn policy(name: &str, action: Action) -> Resource {
    Resource::Policy(Arc::new(Policy { name: NamespacedName::new("shop", name), action, rules: vec![] }))
}

fn pod(node: &str) -> Resource {
    let domain = TrustDomain::new("cluster.local").unwrap();
    Resource::Workload(Arc::new(Workload {
        uid: "u".into(),
        name: NamespacedName::new("shop", "web"),
        service_account: "web".into(),
        identity: SpiffeId::service_account(&domain, "shop", "web"),
        subject: SubjectId(300),
        owner: Owner { kind: "Pod".into(), name: "web".into() },
        node: node.into(),
        zone: "".into(),
        labels: BTreeMap::new(),
        addresses: vec![],
        named_ports: BTreeMap::new(),
        mode: weft_core::workload::Mode::Strict,
        fail_mode: weft_core::workload::FailMode::Closed,
        policies: vec![],
        network_policy: false,
        netns: Some("/run/netns/web".into()),
        host_addresses: vec![],
    }))
}

fn state(resources: &[Resource]) -> BTreeMap<ResourceKey, Resource> {
    resources.iter().map(|r| (r.key(), r.clone())).collect()
}

#[test]
fn a_version_grows_only_when_something_differs() {
    let d = Distribution::new();
    let first = d.publish(state(&[policy("a", Action::Allow)]), Instant::now());
    assert_eq!(first.sequence, 1);
    assert_eq!(d.publish(state(&[policy("a", Action::Allow)]), Instant::now()), first);
    let second = d.publish(state(&[policy("a", Action::Deny)]), Instant::now());
    assert_eq!(second, Version { epoch: first.epoch, sequence: 2 });
}

#[test]
fn a_known_version_resumes_with_the_difference() {
    let d = Distribution::new();
    let v1 = d.publish(state(&[policy("a", Action::Allow), policy("b", Action::Allow)]), Instant::now());
    d.publish(state(&[policy("a", Action::Deny), policy("c", Action::Allow)]), Instant::now());
    let now = d.current().unwrap();
    let difference = now.since(v1);
    assert!(!difference.full);
    let upserted: Vec<_> = difference.upserted.iter().map(|p| p.resource.clone()).collect();
    assert_eq!(upserted, [policy("a", Action::Deny), policy("c", Action::Allow)]);
    assert_eq!(difference.removed, [&policy("b", Action::Allow).key()]);
    let nothing = now.since(now.version);
    assert!(!nothing.full && nothing.upserted.is_empty() && nothing.removed.is_empty());
}

#[test]
fn an_unknown_epoch_or_a_forgotten_version_gets_everything() {
    let d = Distribution::new();
    let v1 = d.publish(state(&[policy("a", Action::Allow)]), Instant::now());
    let full = |version| d.current().unwrap().since(version).full;
    assert!(full(Version { epoch: v1.epoch + 1, sequence: 1 }) && full(Version::default()));
    assert!(full(Version { epoch: v1.epoch, sequence: 2 }), "a version of the future");
    assert!(!full(v1));
    for i in 0..=HISTORY {
        let action = if i % 2 == 0 { Action::Deny } else { Action::Allow };
        d.publish(state(&[policy("a", action)]), Instant::now());
    }
    assert!(full(v1) && d.noticed(v1).is_none());
    assert_eq!(d.current().unwrap().since(v1).upserted.len(), 1);
}

#[test]
fn only_a_pods_own_node_learns_its_namespace() {
    let d = Distribution::new();
    d.publish(state(&[pod("n1")]), Instant::now());
    let netns = |node| {
        let json = d.current().unwrap().since(Version::default()).upserted[0].json(node).unwrap();
        match serde_json::from_slice(&json).unwrap() {
            Resource::Workload(w) => w.netns.clone(),
            _ => None,
        }
    };
    assert_eq!(netns("n1").as_deref(), Some("/run/netns/web"));
    assert_eq!(netns("n2"), None);
    assert_eq!(netns("n1").as_deref(), Some("/run/netns/web"), "the kept text is each node's own");
}

/// An agent of the version before has no default for them (ADR 1).
#[test]
fn what_earlier_agents_require_is_always_written() {
    let Resource::Workload(workload) = pod("n1") else { panic!("a Pod is a workload") };
    assert!(workload.policies.is_empty());
    assert!(serde_json::to_value(&workload).unwrap()["policies"].is_array());
    let endpoint = weft_core::service::Endpoint {
        address: [10, 0, 0, 1].into(),
        ports: BTreeMap::new(),
        packet_ports: Vec::new(),
        workload: None,
        ready: true,
        node: None,
    };
    assert_eq!(serde_json::to_value(&endpoint).unwrap()["ready"], true);
}

#[test]
fn its_own_nodes_message_says_more_than_the_others() {
    let d = Distribution::new();
    d.publish(state(&[pod("n1")]), Instant::now());
    let now = d.current().unwrap();
    let text = |node| {
        let message = now.message(Version::default(), node).unwrap();
        String::from_utf8_lossy(&message.pieces().concat()).into_owned()
    };
    for (node, told) in [("n2", false), ("n1", true), ("n3", false), ("n1", true)] {
        assert_eq!(text(node).contains("/run/netns/web"), told, "{node}");
    }
}

#[test]
fn a_backlog_is_more_than_a_tenth_of_the_connected_agents() {
    let d = Arc::new(Distribution::new());
    let version = d.publish(state(&[policy("a", Action::Allow)]), Instant::now());
    assert!(!d.backlog(), "nobody is connected");
    let mut streams: Vec<_> =
        (0..10).map(|n| nodes::Stream::open(&d, &format!("n{n}"), "1").unwrap()).collect();
    assert!(d.backlog());
    for stream in &streams[..9] {
        d.nodes.ack(stream.node(), version, vec![]);
    }
    assert!(!d.backlog(), "one of ten");
    streams.remove(0);
    assert!(d.backlog(), "one of nine");
    streams.pop();
    assert!(!d.backlog(), "who is gone is waited for no more");
}

#[test]
fn acks_of_another_epoch_do_not_count() {
    let d = Arc::new(Distribution::new());
    let epoch = d.epoch();
    assert!(!d.nodes.ack("n", Version { epoch, sequence: 1 }, vec![]), "no stream, no ack");
    let stream = nodes::Stream::open(&d, "n", "1").unwrap();
    assert!(!d.nodes.ack("n", Version { epoch: epoch + 1, sequence: 1 }, vec![]));
    assert!(d.nodes.ack("n", Version { epoch, sequence: 2 }, vec![("k".into(), "e\n".into())]));
    assert!(!d.nodes.ack("n", Version { epoch, sequence: 1 }, vec![]), "an ack does not go back");
    let states = d.nodes.states();
    assert_eq!(states["n"].acked, Some(Version { epoch, sequence: 2 }));
    assert_eq!(states["n"].rejected, [("k".to_owned(), "e".to_owned())]);
    drop(stream);
    assert_eq!(d.nodes.states()["n"].streams, 0);
}
