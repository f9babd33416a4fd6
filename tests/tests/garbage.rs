//! Bytes that are no protocol, on every port of the proxy.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, net::Ipv4Addr, time::Duration};

use anyhow::Context as _;
use weft_tests::{Lab, demo::calls, lab::net, wait};

/// IPv4 listeners in a Pod's network namespace, as `address:port`.
fn listeners(lab: &Lab, pod: &str) -> Vec<String> {
    let netns = lab.pod(pod).unwrap().place.netns.clone();
    net::within(&netns, || {
        let text = fs::read_to_string("/proc/thread-self/net/tcp")?;
        let mut out = Vec::new();
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if fields.get(3) != Some(&"0A") {
                continue;
            }
            let (address, port) = fields[1].split_once(':').context("a line without a port")?;
            let address = Ipv4Addr::from(u32::from_str_radix(address, 16)?.swap_bytes());
            out.push(format!("{address}:{}", u16::from_str_radix(port, 16)?));
        }
        Ok(out)
    })
    .unwrap()
}

const SHAPES: [(&str, &str, &str); 4] = [
    ("noise", "20", "15000"),
    ("preface", "20", "15000"),
    ("half-tls", "2", "40000"),
    ("silence", "1", "40000"),
];

/// Bytes that nobody asked for, and then calls as always.
fn pelt(lab: &Lab, targets: &[(&str, String)], shapes: &[(&str, &str, &str)]) {
    for (from, to) in targets {
        for (shape, count, timeout) in shapes {
            let args = ["garbage", "--to", to, "--shape", shape, "--count", count, "--timeout-ms", timeout];
            let answer = lab.app(from, &args).unwrap();
            assert_eq!(answer["open"], 0, "{from} -> {to}, {shape}: {answer}");
        }
    }
}

fn nobody_was_hurt(lab: &Lab) {
    let web = calls::vip(lab, "shop/web", 80).unwrap();
    wait::until(Duration::from_secs(5), "calls as always", || {
        let answer = calls::http(lab, "client", &web, &["--count", "50"])?;
        (calls::number(&answer, "/statuses/200") == 50).then_some(()).with_context(|| answer.to_string())
    })
    .unwrap();
    for node in lab.nodes() {
        node.admin("/readyz").unwrap();
        let panics = node.sample("weft_task_panics_total", &[]).unwrap();
        assert_eq!(panics, 0.0, "no task of {} panicked", node.name);
    }
}

#[test]
fn garbage_on_every_port_of_the_proxy_is_closed_and_hurts_nobody() {
    let lab = Lab::shop().unwrap_or_else(|error| panic!("{error:#}"));
    // `client` runs no server: every listener in its namespace is the proxy's.
    let own = listeners(&lab, "client");
    assert!(own.len() >= 3, "outbound, inbound and tunnel: {own:?}");
    let mut targets: Vec<(&str, String)> = own.iter().map(|to| ("client", to.clone())).collect();
    targets.push(("stranger", calls::pod(&lab, "web-v1", 15008).unwrap()));
    pelt(&lab, &targets, &SHAPES[..3]);
    nobody_was_hurt(&lab);
}

/// Where plaintext is let in, strangers reach the inbound listener with it: on a port that passes bytes unseen, and
/// on one whose requests are judged.
#[test]
fn garbage_in_permissive_mode_is_closed_and_hurts_nobody() {
    let mut lab = Lab::shop().unwrap_or_else(|error| panic!("{error:#}"));
    lab.start_server("web-v1", "sink", 7002).unwrap();
    lab.set_mode("shop", "shop", "permissive").unwrap();
    lab.apply("policy", JUDGED).unwrap();
    let answer = calls::http(&lab, "stranger", &lab.at("web-v1", 8080, false).unwrap(), &[]).unwrap();
    assert_eq!(calls::number(&answer, "/statuses/200"), 1, "the stranger gets in: {answer}");
    let mut targets = Vec::new();
    for v6 in [false, true] {
        targets.push(("stranger", lab.at("web-v1", 8080, v6).unwrap()));
        targets.push(("stranger", lab.at("web-v1", 15008, v6).unwrap()));
    }
    let before = lab.access_log("web-v1").unwrap().len();
    pelt(&lab, &targets, &SHAPES);
    let after = lab.access_log("web-v1").unwrap().len();
    assert_eq!(after, before, "none of it reached the application of a port that is judged");

    // A port without a judge hands everything on, byte for byte, and only its application may object.
    let to = lab.at("web-v1", 7002, false).unwrap();
    let answer = lab.app("stranger", &["stream", "--to", &to, "--bytes", "100003"]).unwrap();
    assert_eq!(answer["matches"], true, "{answer}");
    nobody_was_hurt(&lab);
}

const JUDGED: &str = "
apiVersion: weft.mesh/v1alpha1
kind: AuthorizationPolicy
metadata: {name: judged, namespace: shop}
spec:
  targetRefs:
  - {group: \"\", kind: Pod, selector: {matchLabels: {app: web}}}
  action: ALLOW
  rules:
  - sources: [{type: Unauthenticated, cidrs: [\"0.0.0.0/0\", \"::/0\"]}]
    networkAttributes: {ports: [8080]}
    http: [{methods: [GET]}]
  - sources: [{type: ServiceAccount, serviceAccount: {name: \"*\"}}]
    networkAttributes: {ports: [8080]}
    http: [{methods: [GET]}]
  - sources: [{type: Unauthenticated, cidrs: [\"0.0.0.0/0\", \"::/0\"]}]
    networkAttributes: {ports: [7002]}
";
