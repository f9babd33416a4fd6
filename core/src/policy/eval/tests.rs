use super::*;
use crate::{
    policy::HttpRule,
    route::PathMatch,
    testing::{policy, rule, state, workload},
};

fn account(name: &str) -> Source {
    Source::ServiceAccount { namespace: "shop".into(), name: Some(name.into()) }
}

fn id(text: &str) -> SpiffeId {
    text.parse().expect("a SPIFFE id")
}

fn ask(state: &MeshState, caller: Caller<'_>, port: u16, protocol: u8) -> (Outcome, Reason) {
    let web = state.workload(&"web".into()).expect("web");
    let decision = judge(state, &Access { caller, destination: web, port, protocol });
    (decision.outcome, decision.reason)
}

const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
const OTHER: &str = "spiffe://cluster.local/ns/shop/sa/other";

#[test]
fn without_policy_every_authenticated_peer_may_call() {
    let outside: IpAddr = [192, 0, 2, 1].into();
    for (mode, outsider) in [
        (Mode::Strict, (Outcome::Deny, Reason::PlaintextRefused)),
        (Mode::Permissive, (Outcome::Allow, Reason::None)),
        (Mode::Disabled, (Outcome::Allow, Reason::None)),
    ] {
        let state = state(vec![workload("web", 300, mode, &[])], vec![]);
        assert_eq!(ask(&state, Caller::Authenticated(&id(CLIENT)), 80, TCP), (Outcome::Allow, Reason::None));
        assert_eq!(ask(&state, Caller::Unauthenticated(outside), 80, TCP), outsider, "{mode:?}");
    }
}

#[test]
fn allow_denies_the_rest_on_every_port_and_protocol() {
    let policies = vec![policy("p", Action::Allow, vec![rule(Some(vec![account("client")]), &[8080])])];
    let state = state(vec![workload("web", 300, Mode::Strict, &["p"])], policies);
    let (client, other) = (id(CLIENT), id(OTHER));
    let denied = (Outcome::Deny, Reason::PolicyDenied);
    assert_eq!(ask(&state, Caller::Authenticated(&client), 8080, TCP).0, Outcome::Allow);
    assert_eq!(ask(&state, Caller::Authenticated(&client), 8081, TCP), denied);
    assert_eq!(ask(&state, Caller::Authenticated(&client), 8080, 17), denied);
    assert_eq!(ask(&state, Caller::Authenticated(&other), 8080, TCP), denied);
    let foreign = id("spiffe://else.where/ns/shop/sa/client");
    assert_eq!(ask(&state, Caller::Authenticated(&foreign), 8080, TCP), denied);
}

#[test]
fn deny_beats_allow_and_without_sources_means_everybody() {
    let policies = vec![
        policy("a", Action::Allow, vec![rule(None, &[])]),
        policy("d", Action::Deny, vec![rule(None, &[9090])]),
    ];
    let state = state(vec![workload("web", 300, Mode::Permissive, &["a", "d"])], policies);
    let client = id(CLIENT);
    assert_eq!(ask(&state, Caller::Authenticated(&client), 80, TCP).0, Outcome::Allow);
    assert_eq!(
        ask(&state, Caller::Authenticated(&client), 9090, TCP),
        (Outcome::Deny, Reason::PolicyDenyRule)
    );
    let outside = Caller::Unauthenticated([192, 0, 2, 1].into());
    assert_eq!(ask(&state, outside, 9090, TCP), (Outcome::Deny, Reason::PolicyDenyRule));
    assert_eq!(ask(&state, outside, 80, TCP), (Outcome::Deny, Reason::PolicyDenied));
}

#[test]
fn a_policy_that_is_named_but_missing_denies() {
    let state = state(vec![workload("web", 300, Mode::Strict, &["gone"])], vec![]);
    assert_eq!(ask(&state, Caller::Authenticated(&id(CLIENT)), 80, TCP).0, Outcome::Deny);
}

#[test]
fn unauthenticated_sources_open_a_strict_port() {
    let range = vec!["192.0.2.0/24".parse().expect("a range")];
    let policies =
        vec![policy("p", Action::Allow, vec![rule(Some(vec![Source::Unauthenticated(range)]), &[443])])];
    let state = state(vec![workload("web", 300, Mode::Strict, &["p"])], policies);
    let inside = Caller::Unauthenticated([192, 0, 2, 7].into());
    assert_eq!(ask(&state, inside, 443, TCP).0, Outcome::Allow);
    assert_eq!(ask(&state, inside, 80, TCP), (Outcome::Deny, Reason::PlaintextRefused));
    assert_eq!(ask(&state, Caller::Unauthenticated([198, 51, 100, 7].into()), 443, TCP).0, Outcome::Deny);
    assert_eq!(ask(&state, Caller::Authenticated(&id(CLIENT)), 443, TCP).0, Outcome::Deny);
}

#[test]
fn http_rules_make_the_port_http_and_each_request_counts() {
    let mut reads = rule(Some(vec![account("client")]), &[8080]);
    reads.http = vec![HttpRule {
        methods: vec!["GET".into()],
        paths: vec![PathMatch::PathPrefix("/".into())],
        ..HttpRule::default()
    }];
    let mut admin = rule(None, &[]);
    admin.http =
        vec![HttpRule { paths: vec![PathMatch::PathPrefix("/admin".into())], ..HttpRule::default() }];
    let policies = vec![policy("a", Action::Allow, vec![reads]), policy("d", Action::Deny, vec![admin])];
    let state = state(vec![workload("web", 300, Mode::Strict, &["a", "d"])], policies);
    let (client, other) = (id(CLIENT), id(OTHER));
    assert_eq!(ask(&state, Caller::Authenticated(&client), 8080, TCP).0, Outcome::JudgeHttp);
    assert_eq!(ask(&state, Caller::Authenticated(&other), 8080, TCP).0, Outcome::Deny);
    let web = state.workload(&"web".into()).expect("web");
    let header = |_: &str| None;
    let http = |method, path| {
        let request = HttpRequest { method, path, query: "", host: "web", header: &header };
        let access =
            Access { caller: Caller::Authenticated(&client), destination: web, port: 8080, protocol: TCP };
        judge_http(&state, &access, &request).outcome
    };
    assert_eq!(http("GET", "/x"), Outcome::Allow);
    assert_eq!(http("POST", "/x"), Outcome::Deny);
    assert_eq!(http("GET", "/admin/y"), Outcome::Deny);
}

#[test]
fn named_ports_and_audit() {
    let mut named = rule(None, &[]);
    named.ports = vec![PortRef::Name("http".into())];
    let policies =
        vec![policy("a", Action::Allow, vec![named]), policy("w", Action::Audit, vec![rule(None, &[])])];
    let state = state(vec![workload("web", 300, Mode::Strict, &["a", "w"])], policies);
    let client = id(CLIENT);
    assert_eq!(ask(&state, Caller::Authenticated(&client), 8080, TCP).0, Outcome::Allow);
    assert_eq!(ask(&state, Caller::Authenticated(&client), 8081, TCP).0, Outcome::Deny);
    let web = state.workload(&"web".into()).expect("web");
    let access =
        Access { caller: Caller::Authenticated(&client), destination: web, port: 8080, protocol: TCP };
    assert_eq!(judge(&state, &access).audited, vec![NamespacedName::new("shop", "w")]);
}

#[test]
fn spiffe_patterns() {
    for (pattern, matches) in [
        ("spiffe://cluster.local/ns/shop/sa/client", true),
        ("spiffe://cluster.local/ns/*/sa/client", true),
        ("spiffe://cluster.local/ns/shop/*", true),
        ("spiffe://cluster.local/*", true),
        ("spiffe://cluster.local/ns/shop/sa/client/*", false),
        ("spiffe://cluster.local/ns/*", true),
        ("spiffe://cluster.local/ns/shop/sa/cl*", false),
        ("spiffe://*/ns/shop/sa/client", false),
        ("spiffe://cluster.local/*/sa/client", false),
    ] {
        assert_eq!(spiffe_matches(pattern, CLIENT), matches, "{pattern}");
    }
}

#[test]
fn an_http_rule_speaks_of_tcp_only() {
    for protocol in [Protocol::Udp, Protocol::Icmp, Protocol::Any] {
        let mut gets = rule(None, &[]);
        gets.protocol = protocol;
        gets.plaintext = true;
        gets.http = vec![HttpRule { methods: vec!["GET".into()], ..HttpRule::default() }];
        let allow = policy("a", Action::Allow, vec![gets.clone()]);
        let state = state(vec![workload("web", 300, Mode::Strict, &["a"])], vec![allow]);
        let client = id(CLIENT);
        for number in [UDP, 1, 58, 132] {
            let answer = ask(&state, Caller::Authenticated(&client), 0, number);
            assert_eq!(answer, (Outcome::Deny, Reason::PolicyDenied), "{protocol:?}, {number}");
        }
        let tcp = ask(&state, Caller::Authenticated(&client), 80, TCP).0;
        let want = if protocol == Protocol::Any { Outcome::JudgeHttp } else { Outcome::Deny };
        assert_eq!(tcp, want, "{protocol:?}");
    }
}
