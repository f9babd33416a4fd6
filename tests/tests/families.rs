//! A Service called over IPv6, the whole way, beside IPv4.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use anyhow::Context as _;
use weft_tests::{Lab, capture::Capture, demo::calls, observe, wait};

#[test]
fn a_service_is_called_over_both_families_the_whole_way() {
    let lab = Lab::shop().unwrap_or_else(|error| panic!("{error:#}"));
    lab.apply_example("canary").unwrap();
    let wire = lab.node("node-a").unwrap().place.netns.clone();
    for v6 in [false, true] {
        let web = lab.vip("shop/web", 80, v6).unwrap();
        let word = format!("family-{v6}-{:08x}", std::process::id());
        let capture = Capture::start(&wire, "wire0", &lab.dir().join(format!("{v6}.pcap"))).unwrap();
        let header = format!("x-word: {word}");
        let args = ["--count", "100", "--header", &header, "--path", "/both"];
        let answer = calls::http(&lab, "client", &web, &args).unwrap();
        assert_eq!(calls::number(&answer, "/statuses/200"), 100, "{web}: {answer}");
        assert!(calls::number(&answer, "/bodies/web-v1") > 50, "the route counts, too: {}", answer["bodies"]);
        let client = lab.pod("client").unwrap().address(v6);
        assert_eq!(answer["peer"], web, "the socket shows what was dialled");
        let own: std::net::SocketAddr = answer["local"].as_str().unwrap().parse().unwrap();
        assert_eq!(own.ip(), client, "and the Pod's own address");

        let trace = capture.finish().unwrap();
        assert_eq!(trace.find(word.as_bytes()), 0, "{web}: nothing readable on the wire");
        assert!(trace.tls_bytes(15008).0 >= calls::number(&answer, "/payload_bytes"), "{web}: but TLS is");
        let mut log = lab.access_log("web-v1").unwrap();
        log.extend(lab.access_log("web-v2").unwrap());
        let shown = log.iter().filter(|line| line.starts_with(&format!("{client} "))).count();
        assert_eq!(shown, 100, "the servers see {client}: {log:?}");

        wait::until(Duration::from_secs(5), "the record of a request", || {
            let flows = observe::flows(&lab, &["--last", "100", "--http-status", "200"])?;
            let of = |flow: &&serde_json::Value| {
                flow["tls"]["mode"] == "mutual"
                    && flow["service"] == "shop/web:80"
                    && flow["source"]["address"] == client.to_string()
                    && flow["source"]["identity"] == "spiffe://cluster.local/ns/shop/sa/client"
                    && flow["destination"]["identity"] == "spiffe://cluster.local/ns/shop/sa/web"
            };
            flows.iter().find(of).map(|_| ()).with_context(|| format!("{:?}", flows.last()))
        })
        .unwrap();
    }

    lab.apply_example("policy").unwrap();
    for v6 in [false, true] {
        let web = lab.vip("shop/web", 80, v6).unwrap();
        let refused = calls::http(&lab, "intruder", &web, &[]).unwrap();
        assert_eq!(refused["errors"]["ConnectionRefused"], 1, "{web}: {refused}");
        let read = calls::http(&lab, "client", &web, &[]).unwrap();
        assert_eq!(calls::number(&read, "/statuses/200"), 1, "{web}: {read}");
        let write = calls::http(&lab, "client", &web, &["--method", "POST"]).unwrap();
        assert_eq!(calls::number(&write, "/statuses/403"), 1, "{web}: {write}");
    }
}
