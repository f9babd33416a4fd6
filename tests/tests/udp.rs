//! Datagrams between two nodes: never in the clear unless a rule says so, and no longer than it does.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, SystemTime};

use anyhow::ensure;
use serde_json::Value;
use weft_tests::{
    Lab,
    capture::{Capture, Trace},
    lab::{Process, net},
    observe, wait,
};

const ECHO: u16 = 9053;
const POUR: u16 = 9054;
const WORD: &str = "datagram-in-the-clear";

const ALLOW: &str = "
apiVersion: weft.mesh/v1alpha1
kind: AuthorizationPolicy
metadata: {name: datagrams, namespace: shop}
spec:
  targetRefs:
  - {group: \"\", kind: Pod, selector: {matchLabels: {app: web}}}
  action: ALLOW
  rules:
  - sources: [{type: ServiceAccount, serviceAccount: {name: client}}]
    networkAttributes: {ports: [9053, 9054], protocol: UDP, plaintext: Allowed}
";

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: clock, namespace: shop}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: web, version: v1}
  ports: [{name: clock, port: 53, targetPort: 9053, protocol: UDP}]
";

fn lab() -> Lab {
    let mut lab = Lab::shop().unwrap_or_else(|error| panic!("{error:#}"));
    lab.start_server("web-v1", "udp-echo", ECHO).unwrap();
    lab.start_server("web-v1", "udp-pour", POUR).unwrap();
    lab
}

fn captured<T>(lab: &Lab, name: &str, work: impl FnOnce() -> T) -> (T, Trace) {
    let wire = lab.node("node-a").unwrap().place.netns.clone();
    let capture = Capture::start(&wire, "wire0", &lab.dir().join(format!("{name}.pcap"))).unwrap();
    let out = work();
    (out, capture.finish().unwrap())
}

fn ask(lab: &Lab, from: &str, to: &str) -> Value {
    lab.app(from, &["udp", "--to", to, "--word", WORD, "--timeout-ms", "400"]).unwrap()
}

/// A conversation that is answered.
fn talk(lab: &Lab, name: &str, to: &str, once: bool) -> Process {
    let mut args = vec!["udp", "--to", to, "--word", WORD, "--until-silent-ms", "3000"];
    if once {
        args.push("--once");
    }
    let mut talk = lab.spawn_app("client", name, &args).unwrap();
    wait::until(Duration::from_secs(5), "a first answer", || {
        talk.check()?;
        ensure!(talk.output().contains("answered"), "not yet");
        Ok(())
    })
    .unwrap();
    talk
}

#[test]
fn datagrams_between_nodes_need_a_rule_and_end_with_it() {
    let lab = lab();
    for v6 in [false, true] {
        let to = lab.at("web-v1", ECHO, v6).unwrap();
        let (answer, trace) = captured(&lab, &format!("strict-{v6}"), || ask(&lab, "client", &to));
        assert_eq!(answer["answered"], false, "strict, v6 {v6}: {answer}");
        assert_eq!(trace.find(WORD.as_bytes()), 0, "strict, v6 {v6}: nothing left the node");
    }
    let refused =
        observe::flows(&lab, &["--last", "20", "--protocol", "udp", "--verdict", "denied"]).unwrap();
    assert!(
        refused.iter().any(|flow| flow["source"]["pod"] == "client" && flow["reason"] == "plaintext-refused"),
        "{refused:?}"
    );

    lab.apply("datagrams", ALLOW).unwrap();
    let mut talks = Vec::new();
    for v6 in [false, true] {
        let to = lab.at("web-v1", ECHO, v6).unwrap();
        let (answer, trace) = captured(&lab, &format!("allowed-{v6}"), || ask(&lab, "client", &to));
        assert_eq!(answer["heard"], WORD, "allowed, v6 {v6}: {answer}");
        assert_eq!(trace.find(WORD.as_bytes()), 2, "v6 {v6}: there and back, so the capture can see it");
        let (answer, trace) = captured(&lab, &format!("other-{v6}"), || ask(&lab, "intruder", &to));
        assert_eq!(answer["answered"], false, "intruder, v6 {v6}: {answer}");
        assert_eq!(trace.find(WORD.as_bytes()), 0, "intruder, v6 {v6}");
    }
    for v6 in [false, true] {
        let to = lab.at("web-v1", ECHO, v6).unwrap();
        talks.push((format!("echo, v6 {v6}"), talk(&lab, &format!("echo-{v6}"), &to, false)));
    }
    // A server that goes on by itself: replies, too, end with the rule that let the flow in.
    let to = lab.at("web-v1", POUR, false).unwrap();
    talks.push(("replies alone".into(), talk(&lab, "pour", &to, true)));

    let revoked = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    lab.delete("datagrams").unwrap();
    for (name, talk) in &mut talks {
        talk.wait(Duration::from_secs(15)).unwrap();
        let output = talk.output();
        let answer: Value = serde_json::from_str(output.lines().last().unwrap()).unwrap();
        let last = answer["last_answer_unix_ms"].as_u64().unwrap();
        let after = last.saturating_sub(revoked.as_millis() as u64);
        println!("{name}: the last answer {after} ms after the rule went, {}", answer["answers"]);
        assert!(answer["answers"].as_u64() > Some(1), "{name}: {answer}");
        assert!(after < 1000, "{name}: still answered {after} ms after the rule went");
    }
    let to = lab.at("web-v1", ECHO, false).unwrap();
    let (answer, trace) = captured(&lab, "revoked", || ask(&lab, "client", &to));
    assert_eq!(answer["answered"], false, "{answer}");
    assert_eq!(trace.find(WORD.as_bytes()), 0);
}

/// The proxy carries TCP only, and what translates a Service's address for datagrams sits behind Weft's hook: such
/// a datagram would cross the wire in the clear unless it is judged by its endpoints before.
#[test]
fn datagrams_to_a_service_do_not_leave_a_strict_node_in_the_clear() {
    let mut lab = lab();
    lab.take_in("clock", SERVICE).unwrap();
    // Service addresses lead over the wire, as they do once they are translated: so the capture can see them.
    let node = &lab.node("node-a").unwrap().netns_name;
    let routes = "route add 10.96.0.0/16 via 172.30.0.2\nroute add fd96::/112 via fd77:0:f::2\n";
    net::ip_batch(Some(node), routes).unwrap();
    for v6 in [false, true] {
        let to = lab.vip("shop/clock", 53, v6).unwrap();
        let (answer, trace) = captured(&lab, &format!("vip-strict-{v6}"), || ask(&lab, "client", &to));
        assert_eq!(answer["answered"], false, "v6 {v6}: {answer}");
        assert_eq!(
            trace.find(WORD.as_bytes()),
            0,
            "v6 {v6}: a datagram to {to} crossed the wire in the clear"
        );
    }
    lab.set_mode("shop", "shop", "disabled").unwrap();
    for v6 in [false, true] {
        let to = lab.vip("shop/clock", 53, v6).unwrap();
        let (_, trace) = captured(&lab, &format!("vip-disabled-{v6}"), || ask(&lab, "client", &to));
        assert!(trace.find(WORD.as_bytes()) > 0, "v6 {v6}: without the mesh the capture sees it");
    }
}
