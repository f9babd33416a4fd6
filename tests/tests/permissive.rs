//! `permissive`: plaintext from outside the mesh is let in, known as such, and still policed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use weft_tests::{Lab, capture::Capture, demo::calls, observe, wait};

const WEB: u16 = 8080;

fn outsider(unauthenticated: bool) -> String {
    let more = "  - sources: [{type: Unauthenticated, cidrs: [\"10.77.0.0/16\", \"fd77::/32\"]}]\n    \
                networkAttributes: {ports: [8080]}\n    http: [{methods: [GET]}]\n";
    format!(
        "apiVersion: weft.mesh/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: web-callers, namespace: shop}}\n\
         spec:\n  targetRefs: [{{group: \"\", kind: Pod, selector: {{matchLabels: {{app: web}}}}}}]\n  action: ALLOW\n  \
         rules:\n  - sources: [{{type: ServiceAccount, serviceAccount: {{name: client}}}}]\n    \
         networkAttributes: {{ports: [8080]}}\n{}",
        if unauthenticated { more } else { "" }
    )
}

/// The newest record of a Pod's connections to web as web's node tells it.
fn seen(lab: &Lab, source: &str, fits: impl Fn(&Value) -> bool) -> Value {
    let address = [false, true].map(|v6| lab.pod(source).unwrap().address(v6).to_string());
    let (flow, _) = wait::until(Duration::from_secs(5), "a record of web's node", || {
        let flows = observe::flows(lab, &["--last", "100", "--port", "8080", "--reporter", "destination"])?;
        let of = |flow: &Value| {
            address.iter().any(|address| flow["source"]["address"] == address.as_str()) && fits(flow)
        };
        flows.into_iter().rev().find(of).with_context(|| format!("none from {source} yet"))
    })
    .unwrap();
    flow
}

#[test]
fn plaintext_from_outside_is_accepted_known_as_such_and_policed() {
    let lab = Lab::shop().unwrap_or_else(|error| panic!("{error:#}"));
    let ask = |from: &str, v6: bool, method: &str| {
        calls::http(&lab, from, &lab.at("web-v1", WEB, v6).unwrap(), &["--method", method]).unwrap()
    };
    for v6 in [false, true] {
        let answer = ask("stranger", v6, "GET");
        assert_eq!(answer["ok"], 0, "strict refuses plaintext, v6 {v6}: {answer}");
    }

    lab.set_mode("shop", "shop", "permissive").unwrap();
    for v6 in [false, true] {
        let answer = ask("stranger", v6, "GET");
        assert_eq!(calls::number(&answer, "/statuses/200"), 1, "v6 {v6}: {answer}");
        let flow = seen(&lab, "stranger", |flow| flow["verdict"] == "FORWARDED");
        assert_eq!(flow["source"]["identity"], Value::Null, "nothing was proven: {flow}");
        assert_eq!(flow["tls"]["mode"], "none", "{flow}");
        let log = lab.access_log("web-v1").unwrap();
        let address = lab.pod("stranger").unwrap().address(v6).to_string();
        assert!(log.iter().any(|line| line.starts_with(&format!("{address} "))), "{address}: {log:?}");
    }
    let node = lab.node("node-b").unwrap();
    let outside = [("reporter", "destination"), ("source_workload", "outside")];
    assert!(
        node.sample("weft_connections_opened_total", &outside).unwrap() >= 2.0,
        "counted as from outside"
    );

    // Pods of the mesh still speak mTLS with each other.
    let word = format!("permissive-{:08x}", std::process::id());
    let wire = lab.node("node-a").unwrap().place.netns.clone();
    let capture = Capture::start(&wire, "wire0", &lab.dir().join("permissive.pcap")).unwrap();
    let to = lab.at("web-v1", WEB, false).unwrap();
    let answer = calls::http(&lab, "client", &to, &["--header", &format!("x-word: {word}")]).unwrap();
    assert_eq!(calls::number(&answer, "/statuses/200"), 1, "{answer}");
    assert_eq!(
        capture.finish().unwrap().find(word.as_bytes()),
        0,
        "nothing readable between Pods of the mesh"
    );
    let flow = seen(&lab, "client", |flow| flow["verdict"] == "FORWARDED");
    assert_eq!(flow["tls"]["mode"], "mutual", "{flow}");

    // An ALLOW that does not name the outside refuses it, on connections that stand too.
    lab.apply("policy", &outsider(false)).unwrap();
    for v6 in [false, true] {
        let answer = ask("stranger", v6, "GET");
        assert_eq!(calls::number(&answer, "/failed"), 1, "v6 {v6}: {answer}");
        assert_eq!(calls::number(&ask("client", v6, "GET"), "/statuses/200"), 1);
    }
    let flow = seen(&lab, "stranger", |flow| flow["verdict"] == "DENIED");
    assert_eq!(flow["source"]["identity"], Value::Null, "{flow}");

    // One that names it lets it in, as far as it says.
    lab.apply("policy", &outsider(true)).unwrap();
    for v6 in [false, true] {
        let (get, post) = (ask("stranger", v6, "GET"), ask("stranger", v6, "POST"));
        assert_eq!(calls::number(&get, "/statuses/200"), 1, "v6 {v6}: {get}");
        assert_eq!(calls::number(&post, "/statuses/403"), 1, "v6 {v6}: {post}");
    }

    // And strict again: an explicit rule still counts, without it nothing does.
    lab.set_mode("shop", "shop", "strict").unwrap();
    assert_eq!(calls::number(&ask("stranger", false, "GET"), "/statuses/200"), 1);
    lab.delete("policy").unwrap();
    assert_eq!(ask("stranger", false, "GET")["ok"], 0);
}

#[test]
fn a_standing_plaintext_connection_ends_when_the_mode_becomes_strict() {
    let mut lab = Lab::shop().unwrap_or_else(|error| panic!("{error:#}"));
    lab.start_server("web-v1", "banner", 7001).unwrap();
    lab.set_mode("shop", "shop", "permissive").unwrap();
    let mut held = Vec::new();
    for v6 in [false, true] {
        let to = lab.at("web-v1", 7001, v6).unwrap();
        held.push((v6, lab.hold("stranger", &format!("held-{v6}"), &to).unwrap()));
    }
    let start = std::time::Instant::now();
    lab.set_mode("shop", "shop", "strict").unwrap();
    for (v6, process) in &mut held {
        process.wait(Duration::from_secs(5)).unwrap();
        assert!(start.elapsed() < Duration::from_secs(1), "v6 {v6}: cut after {:?}", start.elapsed());
    }
    wait::until(Duration::from_secs(5), "the refusal of a new one", || {
        let answer = lab.app("stranger", &["dial", "--to", &lab.at("web-v1", 7001, false)?])?;
        ensure!(answer["connected"] == false, "{answer}");
        Ok(())
    })
    .unwrap();
}
