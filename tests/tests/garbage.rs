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

#[test]
fn garbage_on_every_port_of_the_proxy_is_closed_and_hurts_nobody() {
    let lab = Lab::shop().unwrap_or_else(|error| panic!("{error:#}"));
    // `client` runs no server: every listener in its namespace is the proxy's.
    let own = listeners(&lab, "client");
    assert!(own.len() >= 3, "outbound, inbound and tunnel: {own:?}");
    let tunnel = calls::pod(&lab, "web-v1", 15008).unwrap();
    let mut targets: Vec<(&str, String)> = own.iter().map(|to| ("client", to.clone())).collect();
    targets.push(("stranger", tunnel));
    for (from, to) in &targets {
        for (shape, count, timeout) in
            [("noise", "20", "15000"), ("preface", "20", "15000"), ("half-tls", "2", "40000")]
        {
            let args = ["garbage", "--to", to, "--shape", shape, "--count", count, "--timeout-ms", timeout];
            let answer = lab.app(from, &args).unwrap();
            assert_eq!(answer["open"], 0, "{from} -> {to}, {shape}: {answer}");
        }
    }
    let web = calls::vip(&lab, "shop/web", 80).unwrap();
    wait::until(Duration::from_secs(5), "calls as always", || {
        let answer = calls::http(&lab, "client", &web, &["--count", "50"])?;
        (calls::number(&answer, "/statuses/200") == 50).then_some(()).with_context(|| answer.to_string())
    })
    .unwrap();
    for node in lab.nodes() {
        node.admin("/readyz").unwrap();
        let page = node.admin("/metrics").unwrap();
        let panics =
            weft_tests::metrics::sum(&weft_tests::metrics::parse(&page), "weft_task_panics_total", &[]);
        assert_eq!(panics, 0.0, "no task of {} panicked", node.name);
    }
}
