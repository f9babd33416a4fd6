use proptest::prelude::*;

use super::*;
use crate::{
    Policy,
    policy::{
        Action, PortRef, Protocol, Source,
        eval::Outcome,
        kernel::{CIDR_SUBJECT, KernelPolicy, compile},
    },
    testing::{
        NODE,
        generate::{Balanced, CALLERS, VIPS, balanced},
        policy, rule, state_with, workload,
    },
};

fn name() -> NamespacedName {
    NamespacedName::new("shop", "dns")
}

/// A Pod of this node or of another one.
fn pod(name: &str, subject: u32, mode: Mode, node: &str, policies: &[&str]) -> Workload {
    let mut pod = workload(name, subject, mode, policies);
    pod.node = node.into();
    pod.addresses = vec![[10, 9, 0, subject as u8].into()];
    pod
}

/// A Service at UDP 53 with these Pods behind its port 5353.
fn service(pods: &[&Workload]) -> Service {
    let endpoint = |pod: &&Workload| Endpoint {
        address: pod.addresses[0],
        ports: BTreeMap::new(),
        packet_ports: vec![PacketPort { protocol: eval::UDP, port: 53, target: 5_353 }],
        workload: Some(pod.uid.clone()),
        ready: true,
        node: None,
    };
    Service {
        name: name(),
        addresses: VIPS.to_vec(),
        ports: Vec::new(),
        endpoints: pods.iter().map(endpoint).collect(),
        fronts: Vec::new(),
        node_local: false,
    }
}

/// ALLOW for service account `a` at UDP 5353.
fn plaintext(name: &str, allowed: bool) -> Policy {
    let account = Source::ServiceAccount { namespace: "shop".into(), name: Some("a".into()) };
    let mut rule = rule(Some(vec![account]), &[]);
    rule.ports = vec![PortRef::Number(5_353)];
    rule.protocol = Protocol::Udp;
    rule.plaintext = allowed;
    policy(name, Action::Allow, vec![rule])
}

fn compiled(pods: &[&Workload], policies: Vec<Policy>, callers: Mode) -> KernelPolicy {
    let all = CALLERS.iter().map(|(name, subject)| workload(name, *subject, callers, &[]));
    let all = all.chain(pods.iter().map(|pod| (*pod).clone())).collect();
    compile(&state_with(all, policies, vec![service(pods)]), NODE)
}

/// What the rows say to caller `a`, by the exact key, as the kernel asks; `None` where the Service is not guarded.
fn told(compiled: &KernelPolicy, protocol: u8, port: u16) -> Option<Option<RowVerdict>> {
    let guarded = compiled.services.get(&name())?;
    Some(row(compiled, SubjectId(CALLERS[0].1), guarded.subject, protocol, port))
}

fn row(
    compiled: &KernelPolicy,
    source: SubjectId,
    subject: SubjectId,
    protocol: u8,
    port: u16,
) -> Option<RowVerdict> {
    let key = |row: &&Row| {
        (row.source, row.destination, row.protocol, row.port) == (source, subject, protocol, port)
    };
    compiled.rows.iter().find(key).map(|row| row.verdict)
}

#[test]
fn a_service_without_the_mesh_behind_it_is_not_guarded() {
    let outside = pod("kube-dns", 600, Mode::Disabled, "node-b", &[]);
    let local = pod("here", 601, Mode::Strict, NODE, &[]);
    for pods in [&[][..], &[&outside], &[&local], &[&outside, &local]] {
        assert_eq!(told(&compiled(pods, vec![], Mode::Strict), eval::UDP, 53), None, "{pods:?}");
    }
}

#[test]
fn a_strict_pod_elsewhere_must_allow_plaintext_by_its_own_port() {
    let far = pod("far", 600, Mode::Strict, "node-b", &["p"]);
    let verdict = |policy| told(&compiled(&[&far], vec![policy], Mode::Strict), eval::UDP, 53);
    assert_eq!(verdict(plaintext("p", true)), Some(Some(RowVerdict::AllowPlaintext)));
    assert_eq!(verdict(plaintext("p", false)), Some(Some(RowVerdict::Allow)));
    assert_eq!(verdict(plaintext("other", true)), Some(Some(RowVerdict::Deny)), "a policy nobody described");
    let open = pod("far", 600, Mode::Strict, "node-b", &[]);
    let compiled = compiled(&[&open], vec![], Mode::Strict);
    assert_eq!(told(&compiled, eval::UDP, 53), Some(Some(RowVerdict::Allow)));
    assert_eq!(told(&compiled, eval::UDP, 54), Some(None), "a port that is none of the Service's has no row");
}

#[test]
fn every_pod_elsewhere_must_agree_and_the_others_do_not_count() {
    let agrees = pod("agrees", 600, Mode::Strict, "node-b", &["p"]);
    let refuses = pod("refuses", 601, Mode::Strict, "node-c", &["q"]);
    let outside = pod("outside", 602, Mode::Disabled, "node-b", &[]);
    let local = pod("local", 603, Mode::Strict, NODE, &["q"]);
    let policies = || vec![plaintext("p", true), plaintext("q", false)];
    let verdict = |pods: &[&Workload]| told(&compiled(pods, policies(), Mode::Strict), eval::UDP, 53);
    assert_eq!(verdict(&[&agrees, &outside, &local]), Some(Some(RowVerdict::AllowPlaintext)));
    assert_eq!(verdict(&[&agrees, &refuses]), Some(Some(RowVerdict::Allow)));
    assert_eq!(verdict(&[&refuses, &outside]), Some(Some(RowVerdict::Allow)));
}

#[test]
fn permissive_on_both_sides_needs_no_row() {
    let relaxed = pod("relaxed", 600, Mode::Permissive, "node-b", &[]);
    let strict = pod("strict", 601, Mode::Strict, "node-b", &[]);
    let both = compiled(&[&relaxed], vec![], Mode::Permissive);
    assert!(!both.services[&name()].strict && both.rows.is_empty());
    let mixed = compiled(&[&relaxed, &strict], vec![], Mode::Permissive);
    assert!(mixed.services[&name()].strict);
    assert_eq!(told(&mixed, eval::UDP, 53), Some(Some(RowVerdict::Allow)));
    let caller = compiled(&[&relaxed], vec![], Mode::Strict);
    assert_eq!(told(&caller, eval::UDP, 53), Some(Some(RowVerdict::Allow)), "the caller is strict");
}

#[test]
fn an_endpoint_that_is_not_ready_counts_and_one_nobody_described_refuses() {
    let far = pod("far", 600, Mode::Strict, "node-b", &[]);
    let callers = || vec![workload("a", CALLERS[0].1, Mode::Strict, &[])];
    let mut unready = service(&[&far]);
    unready.endpoints[0].ready = false;
    let state = state_with([callers(), vec![far.clone()]].concat(), vec![], vec![unready]);
    assert_eq!(told(&compile(&state, NODE), eval::UDP, 53), Some(Some(RowVerdict::Allow)));
    let state = state_with(callers(), vec![], vec![service(&[&far])]);
    assert_eq!(told(&compile(&state, NODE), eval::UDP, 53), Some(Some(RowVerdict::Deny)));
    // Somebody's own slice that names no Pod, but whose address is one's.
    let mut foreign = service(&[&far]);
    foreign.endpoints[0].workload = None;
    let state = state_with([callers(), vec![far]].concat(), vec![], vec![foreign]);
    assert_eq!(told(&compile(&state, NODE), eval::UDP, 53), Some(Some(RowVerdict::Allow)));
}

#[test]
fn subjects_of_services_are_a_class_of_their_own() {
    let far = pod("far", 600, Mode::Strict, "node-b", &[]);
    let range = vec!["192.0.2.0/24".parse().expect("a range")];
    let world = policy("w", Action::Allow, vec![rule(Some(vec![Source::Unauthenticated(range)]), &[])]);
    let compiled = compiled(&[&far], vec![world], Mode::Strict);
    assert!(compiled.services[&name()].subject.0 >= SERVICE_SUBJECT);
    assert!((CIDR_SUBJECT..SERVICE_SUBJECT).contains(&compiled.cidrs[0].subject.0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// A packet passes towards a Service exactly where it would pass towards each of its endpoints of other nodes.
    #[test]
    fn a_service_takes_what_each_of_its_endpoints_elsewhere_takes(case in balanced(4)) {
        let state = case.mesh();
        let compiled = compile(&state, NODE);
        let guarded = compiled.services.get(&NamespacedName::new("shop", "balanced"));
        let elsewhere = || case.pods.iter().filter(|pod| pod.mode.enrolled() && &*pod.node != NODE);
        prop_assert_eq!(guarded.is_some(), elsewhere().next().is_some());
        let strict = |pod: &Workload| pod.mode == Mode::Strict || case.callers == Mode::Strict;
        for &(protocol, port) in &case.packets {
            let target = Balanced::PORTS.iter().find(|at| (at.0, at.1) == (protocol, port)).map(|at| at.2);
            for (caller, subject) in CALLERS {
                let caller = state.workload(&caller.into()).expect("the caller");
                let takes = |pod: &Workload| {
                    let Some(target) = target else { return false };
                    let port = if protocol == eval::UDP { target } else { 0 };
                    let caller = Caller::Authenticated(&caller.identity);
                    let decision = eval::judge(&state, &Access { caller, destination: pod, port, protocol });
                    decision.outcome == Outcome::Allow && decision.plaintext
                };
                let want = elsewhere().filter(|pod| strict(pod)).all(takes);
                let got = guarded.is_none_or(|guarded| {
                    let judged = guarded.strict || case.callers == Mode::Strict;
                    let row = row(&compiled, SubjectId(subject), guarded.subject, protocol, port);
                    !judged || row == Some(RowVerdict::AllowPlaintext)
                });
                prop_assert_eq!(got, want, "{} to {}/{} of {:?}", caller.name, protocol, port, case);
            }
        }
    }
}
