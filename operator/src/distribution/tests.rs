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
    let delta = delta(d.at(v1).as_deref(), &d.current().unwrap(), "n");
    assert!(!delta.full);
    assert_eq!(delta.upserted, [policy("a", Action::Deny), policy("c", Action::Allow)]);
    assert_eq!(delta.removed, [policy("b", Action::Allow).key()]);
}

#[test]
fn an_unknown_epoch_or_a_forgotten_version_gets_everything() {
    let d = Distribution::new();
    let v1 = d.publish(state(&[policy("a", Action::Allow)]), Instant::now());
    assert!(d.at(Version { epoch: v1.epoch + 1, sequence: 1 }).is_none());
    for i in 0..=HISTORY {
        let action = if i % 2 == 0 { Action::Deny } else { Action::Allow };
        d.publish(state(&[policy("a", action)]), Instant::now());
    }
    assert!(d.at(v1).is_none());
    let full = delta(None, &d.current().unwrap(), "n");
    assert!(full.full);
    assert_eq!(full.upserted.len(), 1);
}

#[test]
fn only_a_pods_own_node_learns_its_namespace() {
    let d = Distribution::new();
    d.publish(state(&[pod("n1")]), Instant::now());
    let netns = |node| match delta(None, &d.current().unwrap(), node).upserted.remove(0) {
        Resource::Workload(w) => w.netns.clone(),
        _ => None,
    };
    assert_eq!(netns("n1").as_deref(), Some("/run/netns/web"));
    assert_eq!(netns("n2"), None);
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
