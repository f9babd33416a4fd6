use std::time::Duration;

use serde_json::{Value, json};
use weft_proto::{agent as wire, weft_relay::NodeStatus};

use super::{facts::Server, *};
use crate::{format, mesh::States};

fn of<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000)
}

fn state(node: &str, change: impl FnOnce(&mut NodeStatus)) -> (String, (String, NodeStatus)) {
    let stamp = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
    let agent = wire::StatusResponse {
        node: node.into(),
        agent_version: "0.1.0".into(),
        programs: vec![wire::Program { id: 7, name: "connect4".into(), healthy: true, ..Default::default() }],
        svids: vec![wire::Svid { identity: "a".into(), not_after: stamp(1_003_600), ..Default::default() }],
        ..Default::default()
    };
    let mut status =
        NodeStatus { agent: Some(agent), clock: stamp(1_000_000), mtu: 1500, ..Default::default() };
    change(&mut status);
    (node.into(), ("weft-operator-x".into(), status))
}

fn facts(states: impl IntoIterator<Item = (String, (String, NodeStatus))>) -> Facts {
    Facts {
        states: Ok(States { nodes: states.into_iter().collect(), problems: Vec::new() }),
        ..Facts::default()
    }
}

fn pod(namespace: &str, name: &str) -> k8s_openapi::api::core::v1::Pod {
    of(json!({
        "metadata": {"namespace": namespace, "name": name, "uid": format!("u-{name}"), "labels": {"app": name}},
        "spec": {"nodeName": "node-a", "containers": []},
        "status": {"phase": "Running"},
    }))
}

fn namespace(name: &str, labels: &Value) -> k8s_openapi::api::core::v1::Namespace {
    of(json!({"metadata": {"name": name, "labels": labels}}))
}

/// The level and whole text of the only finding that says this.
#[track_caller]
fn only<'a>(findings: &'a [Finding], words: &str) -> &'a Finding {
    let mut found = findings.iter().filter(|f| f.message.contains(words));
    let first = found.next().unwrap_or_else(|| panic!("nothing says {words:?}: {findings:#?}"));
    assert!(found.next().is_none(), "said twice: {words:?}");
    first
}

#[test]
fn a_glance_is_enough() {
    let findings = [
        Finding::ok("API server", "v1.37.2"),
        Finding::error("Agents", "1 of 2 ready", "see the log").with(vec!["node-b: waits for config".into()]),
        Finding::info("Agents", "MTU 1500"),
    ];
    let expected = "\
API server
  ok    v1.37.2

Agents
  ERROR 1 of 2 ready
          node-b: waits for config
          fix: see the log
  info  MTU 1500

1 error.
";
    assert_eq!(table(&findings, false), expected);
    assert!(table(&findings[..1], false).ends_with("Everything is fine.\n"));
    let many = [Finding::ok("A", "a").with((0..20).map(|n| n.to_string()).collect())];
    assert!(table(&many, false).contains("and 12 more (-o json has all)"));
    let parsed: Value = serde_json::from_str(&json(&findings)).unwrap();
    assert_eq!((&parsed["errors"], &parsed["findings"][1]["level"]), (&json!(1), &json!("error")));
}

#[test]
fn clocks_that_are_off_are_found() {
    assert_eq!(facts::seconds_ahead("Mon, 12 Jan 1970 13:46:50 GMT", now()), Some(10));
    let server =
        |ahead| Server { version: "v1.37.2".into(), number: Some((1, 37)), ahead, ..Server::default() };
    assert!(system::server(&server(Some(2))).iter().all(|f| f.level == Level::Ok));
    let findings = system::server(&server(Some(3600)));
    let found = only(&findings, "1h0m behind that of the API server");
    assert_eq!(found.level, Level::Error);
    assert!(found.remedy.contains("chronyd"));
    let old = Server { number: Some((1, 30)), ..server(Some(0)) };
    assert_eq!(only(&system::server(&old), "too old").level, Level::Error);
    // A node by itself, told by its agent.
    let facts =
        facts([state("node-a", |_| {}), state("node-b", |s| s.clock.as_mut().unwrap().seconds += 3600)]);
    let findings = agents::states(&facts, &server(Some(0)), now());
    assert_eq!(only(&findings, "the clock of node-b is 1h0m ahead").level, Level::Error);
}

#[test]
fn agents_say_what_is_wrong() {
    let server = Server { ahead: Some(0), ..Server::default() };
    let fine = facts([state("node-a", |_| {}), state("node-b", |_| {})]);
    let findings = agents::states(&fine, &server, now());
    assert!(findings.iter().all(|f| f.level == Level::Ok), "{findings:#?}");
    let broken = facts([
        state("node-a", |_| {}),
        state("node-b", |s| {
            s.mtu = 9000;
            let agent = s.agent.as_mut().unwrap();
            agent.not_ready = vec!["credentials".into()];
            agent.programs[0].healthy = false;
            agent.programs[0].problem = "detached".into();
            agent.svids[0].not_after = None;
            agent.agent_version = "0.2.0".into();
            agent.maps = vec![wire::Map { name: "pods".into(), entries: 95, capacity: 100 }];
        }),
    ]);
    let findings = agents::states(&broken, &server, now());
    for (words, detail, level) in [
        ("wait for something", "node-b: waits for credentials", Level::Error),
        ("programs are not attached", "node-b: connect4 at : detached", Level::Error),
        ("SVIDs are missing", "node-b: a: expired", Level::Error),
        ("several versions", "0.2.0: node-b", Level::Warning),
        ("MTUs differ", "9000: node-b", Level::Warning),
        ("nearly full", "node-b: pods holds 95 of 100", Level::Warning),
    ] {
        let found = only(&findings, words);
        assert_eq!(found.level, level, "{words}");
        assert!(found.details.iter().any(|d| d == detail), "{found:#?}");
        assert!(!found.remedy.is_empty());
    }
    let alone = Facts { states: Err("no operator".into()), ..Facts::default() };
    assert_eq!(only(&agents::states(&alone, &server, now()), "no operator").level, Level::Error);
}

#[test]
fn a_rollout_names_the_pods_that_wait() {
    let set = |ready: i32| {
        Ok(Some(of(json!({"metadata": {}, "status": {
            "numberReady": ready, "desiredNumberScheduled": 2, "currentNumberScheduled": 2, "numberMisscheduled": 0,
            "updatedNumberScheduled": 2}}))))
    };
    let mut facts = Facts { agents: set(1), ..Facts::default() };
    let waiting: k8s_openapi::api::core::v1::Pod = of(json!({
        "metadata": {"namespace": "weft-system", "name": "weft-agent-b", "labels": {"app.kubernetes.io/name": "weft-agent"}},
        "spec": {"nodeName": "node-b", "containers": []},
        "status": {"containerStatuses": [{"name": "a", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}]},
    }));
    facts.pods = Ok(vec![waiting]);
    let findings = agents::rollout(&facts);
    assert_eq!(findings[0].details, ["node-b (weft-agent-b): ImagePullBackOff no such image"]);
    facts.missing.insert("weft-agent-b".into(), "not ready, waiting for: config".into());
    assert_eq!(agents::rollout(&facts)[0].details, ["node-b (weft-agent-b): not ready, waiting for: config"]);
    facts.agents = set(2);
    assert_eq!(agents::rollout(&facts)[0].level, Level::Ok);
    facts.agents = Ok(None);
    assert!(agents::rollout(&facts)[0].remedy.contains("weft install"));
}

#[test]
fn kinds_and_operator() {
    let findings = system::kinds(&Facts::default());
    assert!(only(&findings, "are missing").remedy.contains("kubectl apply"));
    assert_eq!(only(&findings, "Gateway API is not installed").level, Level::Info);
    let deployment = |available: i32| Facts {
        operator: Ok(Some(of(
            json!({"metadata": {}, "spec": {"replicas": 2, "selector": {}, "template": {}},
                                    "status": {"availableReplicas": available}}),
        ))),
        ..Facts::default()
    };
    let mut scaled = deployment(0);
    scaled.operator.as_mut().unwrap().as_mut().unwrap().spec.as_mut().unwrap().replicas = Some(0);
    assert!(only(&system::operator(&scaled), "scaled to 0").remedy.contains("--replicas=2"));
    let level = |available| system::operator(&deployment(available))[0].level;
    assert_eq!([level(0), level(1), level(2)], [Level::Error, Level::Warning, Level::Ok]);
}

fn node(name: &str, kernel: &str) -> k8s_openapi::api::core::v1::Node {
    of(json!({"metadata": {"name": name}, "status": {"conditions": [{"type": "Ready", "status": "True"}],
            "nodeInfo": {"architecture": "amd64", "bootID": "", "containerRuntimeVersion": "", "kernelVersion": kernel,
                "kubeProxyVersion": "", "kubeletVersion": "", "machineID": "", "operatingSystem": "linux", "osImage": "",
                "systemUUID": ""}}}))
}

#[test]
fn nodes_with_old_kernels() {
    let mut facts =
        Facts { nodes: Ok(vec![node("a", "6.8.0-45-generic"), node("b", "5.15.0")]), ..Facts::default() };
    let server = Server::default();
    assert!(system::nodes(&facts, &server).iter().all(|f| f.level == Level::Ok));
    facts.nodes.as_mut().unwrap().push(node("c", "5.4.0-1"));
    let findings = system::nodes(&facts, &server);
    assert_eq!(only(&findings, "1 of 3 nodes").details, ["c: Linux 5.4.0-1"]);
}

#[test]
fn nodes_without_an_agent_and_versions_that_differ() {
    let set = |image: &str| {
        Ok(Some(of(
            json!({"metadata": {}, "spec": {"selector": {}, "template": {"spec": {"containers": [{"name": "a", "image": image}]}}},
            "status": {"numberReady": 1, "desiredNumberScheduled": 1, "currentNumberScheduled": 1, "numberMisscheduled": 0,
                "updatedNumberScheduled": 1}}),
        )))
    };
    let operator: k8s_openapi::api::apps::v1::Deployment =
        of(json!({"metadata": {}, "spec": {"selector": {},
        "template": {"spec": {"containers": [{"name": "o", "image": "r:5000/weft-operator:v0.1.0"}]}}}}));
    let mut agent = pod("weft-system", "weft-agent-x");
    agent.metadata.labels = Some([("app.kubernetes.io/name".to_owned(), "weft-agent".to_owned())].into());
    agent.status = Some(of(json!({"conditions": [{"type": "Ready", "status": "True"}]})));
    let mut facts = Facts {
        nodes: Ok(vec![node("node-a", "6.8.0"), node("node-b", "6.8.0")]),
        pods: Ok(vec![agent]),
        agents: set("r:5000/weft-agent:v0.2.0"),
        operator: Ok(Some(operator)),
        ..Facts::default()
    };
    assert_eq!(only(&agents::rollout(&facts), "no agent on node-b").level, Level::Error);
    assert_eq!(
        only(&system::skew(&facts), "the operator's image is v0.1.0, the agents' is v0.2.0").level,
        Level::Warning
    );
    facts.agents = set("r:5000/weft-agent:v0.1.0");
    facts.nodes.as_mut().unwrap().pop();
    assert!(agents::rollout(&facts).iter().chain(&system::skew(&facts)).all(|f| f.level == Level::Ok));
}

#[test]
fn labels_of_pods_that_do_nothing() {
    let mut facts = shop();
    let labelled = |mode: &str| {
        let mut pod = pod("shop", mode);
        pod.metadata.labels.as_mut().unwrap().insert("weft.mesh/mode".into(), mode.into());
        pod
    };
    facts.pods =
        Ok(vec![labelled("disabled"), labelled("strict"), labelled("permissive"), labelled("stirct")]);
    let findings = namespaces::all(&facts, None);
    let found = only(&findings, "labels of Pods are ignored");
    assert_eq!(found.details.len(), 2, "{found:#?}");
    assert!(found.details[0].contains("would loosen") && found.details[1].contains("means nothing"));
}

#[test]
fn conditions_that_failed_are_told() {
    let object = |kind: &str, status: Value| json!({"kind": kind, "metadata": {"namespace": "shop", "name": "p"}, "status": status});
    let failed =
        json!([{"type": "Accepted", "status": "False", "message": "the path is no regular expression"}]);
    let mut facts = Facts {
        objects: Ok(vec![object("AuthorizationPolicy", json!({"conditions": failed}))]),
        ..Facts::default()
    };
    let findings = objects::all(&facts);
    let found =
        only(&findings, "AuthorizationPolicy shop/p: not Accepted: the path is no regular expression");
    assert_eq!(found.remedy, "correct it: kubectl -n shop edit authorizationpolicy p");
    // Another controller's word about a route is not ours.
    let parent = |who: &str| json!({"parents": [{"controllerName": who, "conditions": failed}]});
    facts.objects = Ok(vec![object("HTTPRoute", parent("example.com/other"))]);
    assert!(objects::all(&facts).iter().all(|f| f.level <= Level::Info));
    facts.objects = Ok(vec![object("HTTPRoute", parent("weft.mesh/operator"))]);
    assert_eq!(only(&objects::all(&facts), "HTTPRoute shop/p: not Accepted").level, Level::Error);
    facts.objects = Ok(vec![object("TrafficPolicy", json!({}))]);
    assert_eq!(only(&objects::all(&facts), "no status yet").level, Level::Warning);
}

#[test]
fn contradicting_labels() {
    let strict_open = json!({"weft.mesh/mode": "strict", "weft.mesh/fail-mode": "open"});
    let facts = Facts {
        namespaces: Ok(vec![namespace("a", &strict_open), namespace("b", &json!({"weft.mesh/mode": "on"}))]),
        ..Facts::default()
    };
    let findings = namespaces::all(&facts, None);
    assert!(only(&findings, "a: strict and").remedy.contains("weft.mesh/fail-mode-"));
    assert_eq!(only(&findings, "b: weft.mesh/mode=on means nothing").level, Level::Error);
    let other = namespaces::all(&facts, Some("nowhere"));
    assert_eq!(only(&other, "no namespace nowhere").level, Level::Error);
}

fn shop() -> Facts {
    let enrolled = |name: &str, problem: &str| wire::Pod {
        namespace: "shop".into(),
        name: name.into(),
        uid: format!("u-{name}"),
        problem: problem.into(),
        ..Default::default()
    };
    let pods = vec![enrolled("web", ""), enrolled("vm", "its runtime (kata) has no namespace to capture")];
    let mut facts = facts([state("node-a", |s| s.agent.as_mut().unwrap().pods = pods)]);
    facts.namespaces = Ok(vec![namespace("shop", &json!({"weft.mesh/mode": "permissive"}))]);
    facts.pods = Ok(vec![pod("shop", "web"), pod("shop", "vm"), pod("shop", "new"), pod("else", "x")]);
    facts
}

#[test]
fn pods_that_are_not_captured_are_named_with_the_reason() {
    let findings = namespaces::all(&shop(), None);
    let found = only(&findings, "2 of 3 Pods are not captured");
    assert_eq!(
        found.details,
        [
            "shop/vm on node-a: its runtime (kata) has no namespace to capture",
            "shop/new: the agent of node-a does not know it"
        ]
    );
}

#[test]
fn network_policies_that_block_the_tunnel() {
    let policy =
        |name: &str, spec: Value| of(json!({"metadata": {"namespace": "shop", "name": name}, "spec": spec}));
    let http = policy(
        "http",
        json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"ports": [{"port": 80}]}]}),
    );
    let mut facts = shop();
    facts.policies = Ok(vec![http]);
    let findings = namespaces::all(&facts, None);
    let found = only(&findings, "NetworkPolicy shop/http lets no Ingress to TCP 15008 pass: 1 Pods");
    assert_eq!(found.level, Level::Error);
    // Policies add up: another one lets it pass.
    let range = json!({"podSelector": {}, "ingress": [{"ports": [{"port": 15000, "endPort": 16000}]}]});
    facts.policies.as_mut().unwrap().push(policy("range", range));
    assert_eq!(only(&namespaces::all(&facts, None), "blocks the tunnel").level, Level::Ok);
    let egress = json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": []});
    facts.policies = Ok(vec![policy("out", egress)]);
    assert_eq!(only(&namespaces::all(&facts, None), "lets no Egress").level, Level::Error);
}

#[test]
fn callers_that_strict_would_break() {
    let mut facts = shop();
    let view = |change: fn(&mut format::View)| {
        let mut view = format::View::of(&weft_proto::flow::Flow::default());
        view.at = now();
        view.verdict = "FORWARDED";
        view.protocol = "tcp";
        view.reporter = "kernel-destination".into();
        view.tls.mode = "none";
        (view.destination.namespace, view.destination.pod, view.destination.port) =
            ("shop".into(), "web".into(), 8080);
        (view.source.namespace, view.source.workload) = ("legacy".into(), "cron".into());
        change(&mut view);
        view
    };
    facts.flows = Ok(vec![
        view(|_| {}),
        view(|_| {}),
        view(|v| v.source.reserved = "host"),
        view(|v| v.tls.mode = "mutual"),
        // The end of the connection of which the first is the opening.
        view(|v| v.connection = 9),
        view(|v| v.connection = 9),
        view(|v| v.destination.port = 15008),
    ]);
    let findings = traffic::all(&facts, "shop", None);
    let found = only(&findings, "strict would break 1 callers of shop");
    assert_eq!(found.level, Level::Warning);
    assert!(found.details[0].starts_with("legacy/cron -> web:8080 (tcp): 3 times"), "{found:#?}");
    assert!(only(&findings, "web is captured: 1 connections with mTLS").message.contains("in plaintext"));
    assert_eq!(only(&findings, "vm is not captured").level, Level::Error);
    assert_eq!(only(&traffic::all(&facts, "shop", Some("gone")), "no Pod gone").level, Level::Error);
    // The record of a connection whose requests were judged one by one is nobody's plaintext.
    facts.flows.as_mut().unwrap().push(view(|v| {
        v.reporter = "proxy-source".into();
        v.service = "shop/web:80".into();
        v.source.namespace = "shop".into();
        v.source.pod = "web".into();
        v.destination.pod.clear();
    }));
    let findings = traffic::all(&facts, "shop", None);
    assert!(only(&findings, "web is captured: 1 connections with mTLS").message.contains(", 4 in plaintext"));
    // A caller whose namespace has come into the mesh since is none any more.
    facts.namespaces.as_mut().unwrap().push(namespace("legacy", &json!({"weft.mesh/mode": "permissive"})));
    assert_eq!(only(&traffic::all(&facts, "shop", None), "strict would break none").level, Level::Ok);
    // Where nothing was seen, nothing is promised.
    facts.flows = Ok(Vec::new());
    assert_eq!(only(&traffic::all(&facts, "shop", None), "nothing is known of callers").level, Level::Info);
    assert!(traffic::all(&facts, "else", None).is_empty());
}

#[test]
fn a_ca_that_ends_is_told() {
    let broken = Facts { bundle: Ok(Some("no PEM".into())), ..Facts::default() };
    assert_eq!(only(&system::trust(&broken, now()), "holds no certificate").level, Level::Error);
    assert_eq!(only(&system::trust(&Facts::default(), now()), "no trust bundle").level, Level::Error);
    let pem = include_str!("tests/root.pem");
    let at = |days: u64| {
        let facts = Facts { bundle: Ok(Some(pem.into())), ..Facts::default() };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(days * 86_400);
        system::trust(&facts, now)[0].clone()
    };
    // It is good for ten years from 2026-11-23.
    let issued = 20_780;
    assert_eq!(at(issued + 1).level, Level::Ok);
    assert_eq!(at(issued + 3640).level, Level::Warning);
    assert_eq!(at(issued + 3660).level, Level::Error);
    // A root that signs no more may end, as long as another one does not.
    let own = |retiring: &[&str]| Facts {
        bundle: Ok(Some(pem.into())),
        retiring: retiring.iter().map(|name| (*name).to_owned()).collect(),
        ..Facts::default()
    };
    assert_eq!(system::trust(&own(&["00"]), now())[0].level, Level::Ok);
}
