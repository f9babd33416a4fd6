use proptest::prelude::*;

use super::*;
use crate::{
    policy::{
        Action, HttpRule, Policy, Rule,
        eval::tests::{policy, state, workload},
    },
    workload::Mode,
};

/// The rows as the kernel reads them.
fn lookup(
    compiled: &KernelPolicy,
    source: SubjectId,
    destination: &Workload,
    port: u16,
    protocol: u8,
) -> RowVerdict {
    let find = |port, protocol| {
        compiled.rows.iter().find(|r| {
            r.source == source
                && r.destination == destination.subject
                && r.port == port
                && r.protocol == protocol
        })
    };
    find(port, protocol)
        .or_else(|| find(0, protocol))
        .or_else(|| find(0, 0))
        .map_or(RowVerdict::Deny, |r| r.verdict)
}

fn source() -> impl Strategy<Value = Source> {
    prop_oneof![
        "[abc]"
            .prop_map(|n| Source::ServiceAccount { namespace: "shop".into(), name: Some(n.as_str().into()) }),
        Just(Source::ServiceAccount { namespace: "shop".into(), name: None }),
        Just(Source::Spiffe("spiffe://cluster.local/ns/*/sa/a".into())),
        prop::sample::select(vec!["10.0.0.0/8", "10.0.0.0/16", "10.1.0.0/16", "0.0.0.0/0", "fd00::/8"])
            .prop_map(|c| Source::Unauthenticated(vec![c.parse().expect("a range")])),
        Just(Source::Unauthenticated(vec![])),
    ]
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let ports = prop::collection::vec(
        prop_oneof![
            prop::sample::select(vec![80, 443, 53]).prop_map(PortRef::Number),
            Just(PortRef::Name("http".into()))
        ],
        0..3,
    );
    let protocol = prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Icmp, Protocol::Any]);
    let http = prop_oneof![3 => Just(vec![]), 1 => Just(vec![HttpRule { methods: vec!["GET".into()], ..HttpRule::default() }])];
    (prop::option::of(prop::collection::vec(source(), 0..3)), ports, protocol, any::<bool>(), http).prop_map(
        |(sources, ports, protocol, plaintext, http)| Rule { sources, ports, protocol, plaintext, http },
    )
}

fn any_policy(name: &'static str) -> impl Strategy<Value = Policy> {
    let action = prop::sample::select(vec![Action::Allow, Action::Deny, Action::Audit]);
    (action, prop::collection::vec(any_rule(), 0..4))
        .prop_map(move |(action, rules)| policy(name, action, rules))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_500))]

    /// 2,500 policy sets, each with every pair of caller and port below: well over 10,000 flows.
    #[test]
    fn rows_say_what_the_interpreter_says(
        policies in (any_policy("p"), any_policy("q")),
        mode in prop::sample::select(vec![Mode::Strict, Mode::Permissive]),
        port in prop::sample::select(vec![80u16, 443, 53, 8080, 1]),
        protocol in prop::sample::select(vec![6u8, 17, 1, 58, 132]),
        address in prop::sample::select(vec!["10.0.0.1", "10.0.5.5", "10.1.2.3", "10.9.9.9", "192.0.2.1", "fd00::1", "2001:db8::1"]),
    ) {
        // ICMP and unknown protocols have no ports.
        let port = if matches!(protocol, 6 | 17) { port } else { 0 };
        let web = workload("web", 300, mode, &["p", "q"]);
        let callers = ["a", "b"].map(|n| workload(n, 400 + u32::from(n.as_bytes()[0]), Mode::Strict, &[]));
        let state = state([vec![web.clone()], callers.to_vec()].concat(), vec![policies.0, policies.1]);
        let compiled = compile(&state, "node-a");
        let expect = |caller| {
            row_verdict(&eval::judge(&state, &Access { caller, destination: &web, port, protocol }), protocol)
        };
        for caller in &callers {
            let got = lookup(&compiled, caller.subject, &web, port, protocol);
            prop_assert_eq!(got, expect(Caller::Authenticated(&caller.identity)));
        }
        let address: std::net::IpAddr = address.parse().expect("an address");
        let class = compiled.cidrs.iter().filter(|c| c.cidr.contains(address)).max_by_key(|c| c.cidr.prefix);
        let subject = class.map_or(SubjectId::WORLD, |c| c.subject);
        let got = lookup(&compiled, subject, &web, port, protocol);
        prop_assert_eq!(got, expect(Caller::Unauthenticated(address)));
    }
}

#[test]
fn two_pods_of_one_account_with_different_policies_have_rows_of_their_own() {
    let mut canary = workload("web", 301, Mode::Strict, &["p"]);
    canary.uid = "canary".into();
    let plain = workload("web", 300, Mode::Strict, &[]);
    let state = state(
        vec![plain, canary, workload("a", 400, Mode::Strict, &[])],
        vec![policy("p", Action::Deny, vec![])],
    );
    let compiled = compile(&state, "node-a");
    assert!(compiled.rows.iter().all(|r| r.destination == SubjectId(301)));
}

#[test]
fn a_remote_destination_has_rows_for_local_sources_only() {
    let mut far = workload("web", 300, Mode::Strict, &["p"]);
    far.node = "node-b".into();
    let mut stranger = workload("b", 401, Mode::Strict, &[]);
    stranger.node = "node-b".into();
    let state = state(
        vec![far, stranger, workload("a", 400, Mode::Strict, &[])],
        vec![policy("p", Action::Allow, vec![])],
    );
    let compiled = compile(&state, "node-a");
    assert!(!compiled.rows.is_empty() && compiled.rows.iter().all(|r| r.source == SubjectId(400)));
}
