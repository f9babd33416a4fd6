//! Two Pods of one node: the shortcut and, where the mesh's settings say so, mTLS all the same.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;
use weft_tests::{
    Lab,
    capture::{Capture, Trace},
    observe, wait,
};

const BANNER: &str = "220 echo ready\r\n";

/// The newest record of a connection with that local port, once it has ended.
fn record(lab: &Lab, answer: &Value) -> Value {
    let local = answer["local"].as_str().unwrap_or_default();
    let port = local.rsplit_once(':').and_then(|(_, port)| port.parse::<u64>().ok());
    let (flow, _) = wait::until(Duration::from_secs(5), "the record of a connection", || {
        let flows = observe::flows(lab, &["--last", "50", "--from-pod", "shop/client"])?;
        let of = |flow: &Value| flow["source"]["port"].as_u64() == port && flow["protocol"] == "tcp";
        flows.into_iter().rev().find(of).with_context(|| format!("none from {local} yet"))
    })
    .unwrap();
    flow
}

/// What crosses echo's interface while client dials it, and the client's answer.
fn dial(lab: &Lab, to: &str, name: &str) -> (Value, Trace) {
    let node = lab.node("node-a").unwrap().place.netns.clone();
    let path = lab.dir().join(format!("{name}.pcap"));
    let capture = Capture::start(&node, &lab.pod("echo").unwrap().veth, &path).unwrap();
    let answer = lab.app("client", &["dial", "--to", to]).unwrap();
    assert_eq!(answer["heard"], BANNER, "{name}: {answer}");
    assert_eq!(answer["peer"], to, "{name}: {answer}");
    (answer, capture.finish().unwrap())
}

#[test]
fn mtls_on_one_node_is_switched_on_and_off_while_the_mesh_runs() {
    let lab = Lab::shop().unwrap_or_else(|error| panic!("{error:#}"));
    for (round, mode) in ["Shortcut", "MTLS", "Shortcut"].into_iter().enumerate() {
        if round > 0 {
            lab.settings(&format!("{{sameNode: {mode}}}")).unwrap();
        }
        for v6 in [false, true] {
            let name = format!("{round}-{mode}-{v6}");
            // Through the Service, which only the proxy can resolve.
            let (answer, trace) =
                dial(&lab, &lab.vip("shop/echo", 7000, v6).unwrap(), &format!("vip-{name}"));
            let flow = record(&lab, &answer);
            let wanted = if mode == "MTLS" { "mutual" } else { "local" };
            assert_eq!(flow["tls"]["mode"], wanted, "{name}: {flow}");
            assert_eq!(flow["verdict"], "FORWARDED", "{name}: {flow}");
            if mode == "MTLS" {
                assert_eq!(flow["tls"]["key_exchange"], "X25519MLKEM768", "{name}: {flow}");
            }
            assert_eq!(trace.find(BANNER.as_bytes()), 0, "{name}: the proxy's way is not readable");

            // The Pod itself: beside the proxy with the shortcut, which the interface shows, and else not.
            let (answer, trace) = dial(&lab, &lab.at("echo", 7000, v6).unwrap(), &format!("pod-{name}"));
            let readable = trace.find(BANNER.as_bytes());
            if mode == "MTLS" {
                assert_eq!(readable, 0, "{name}: nothing is readable");
                assert!(trace.tls_bytes(15008).0 > 0, "{name}: TLS crosses the interface");
                let flow = record(&lab, &answer);
                assert_eq!(flow["tls"]["mode"], "mutual", "{name}: {flow}");
            } else {
                assert!(readable > 0, "{name}: the kernel's way crosses the interface");
            }
        }
    }
}
