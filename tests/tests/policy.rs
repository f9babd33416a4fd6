//! What policy changes do to what is already there.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use weft_tests::{Lab, demo::calls, lab::Process, wait};

const BANNER: u16 = 7001;

fn lab() -> Lab {
    let mut lab = Lab::shop().unwrap_or_else(|error| panic!("{error:#}"));
    lab.start_server("web-v1", "banner", BANNER).unwrap();
    lab
}

fn at(lab: &Lab, pod: &str, port: u16, v6: bool) -> String {
    SocketAddr::new(lab.pod(pod).unwrap().address(v6), port).to_string()
}

fn hold(lab: &Lab, name: &str, to: &str) -> Process {
    let mut held = lab
        .spawn_app("client", name, &["dial", "--to", to, "--hold", "--timeout-ms", "60000"])
        .unwrap_or_else(|error| panic!("{error:#}"));
    wait::until(Duration::from_secs(10), "a connection that stands", || {
        held.check()?;
        ensure!(held.output().contains("established"), "not yet: {}", held.output());
        Ok(())
    })
    .unwrap();
    held
}

const DENY_CLIENT: &str = "
apiVersion: weft.mesh/v1alpha1
kind: AuthorizationPolicy
metadata: {name: no-client, namespace: shop}
spec:
  targetRefs:
  - {group: \"\", kind: Pod, selector: {}}
  action: DENY
  rules:
  - sources:
    - {type: ServiceAccount, serviceAccount: {name: client}}
";

#[test]
fn a_policy_change_cuts_live_connections_within_a_second() {
    let lab = lab();
    let mut held = Vec::new();
    for v6 in [false, true] {
        held.push(("proxied", v6, hold(&lab, &format!("proxied-{v6}"), &at(&lab, "web-v1", BANNER, v6))));
        held.push(("kernel path", v6, hold(&lab, &format!("kernel-{v6}"), &at(&lab, "echo", 7000, v6))));
    }
    let start = Instant::now();
    lab.source().write("deny", DENY_CLIENT).unwrap();
    for (kind, v6, process) in &mut held {
        process.wait(Duration::from_secs(5)).unwrap();
        let took = start.elapsed();
        assert!(took < Duration::from_secs(1), "{kind}, v6 {v6}: cut after {took:?}");
    }
    // And what is new is refused.
    for (pod, port) in [("web-v1", BANNER), ("echo", 7000)] {
        let answer = lab.app("client", &["dial", "--to", &at(&lab, pod, port, false)]).unwrap();
        assert_eq!(answer["error"], "ConnectionRefused", "{pod}: {answer}");
    }
}

#[test]
fn an_address_that_is_used_again_has_no_rights_of_its_former_owner() {
    let mut lab = lab();
    lab.apply_example("policy").unwrap();
    let to = at(&lab, "web-v1", 8080, false);
    let answer = calls::http(&lab, "client", &to, &[]).unwrap();
    assert_eq!(calls::number(&answer, "/statuses/200"), 1, "{answer}");

    let mut object = lab.pod_object("intruder").unwrap().clone();
    let gone = lab.remove_pod("client").unwrap();
    object["metadata"]["name"] = "heir".into();
    lab.raise_pod(&mut object, gone.v4.octets()[3]).unwrap();
    lab.publish().unwrap();
    assert_eq!(lab.pod("heir").unwrap().v4, gone.v4, "the same address");
    wait::until(Duration::from_secs(10), "the heir's enrolment", || {
        let status = lab.status()?;
        let pods =
            status["agents"].as_array().into_iter().flatten().filter_map(|agent| agent["pods"].as_array());
        let heir = pods.flatten().find(|pod| pod["name"] == "shop/heir");
        ensure!(heir.is_some_and(|pod| pod["problem"] == ""), "{heir:?}");
        Ok(())
    })
    .unwrap();
    for v6 in [false, true] {
        let to = at(&lab, "web-v1", 8080, v6);
        let answer = calls::http(&lab, "heir", &to, &["--count", "5"]).unwrap();
        assert_eq!(calls::number(&answer, "/statuses/200"), 0, "v6 {v6}: {answer}");
        assert_eq!(calls::number(&answer, "/failed"), 5, "v6 {v6}: {answer}");
    }
    let flow =
        calls::flow(&lab, |flow| flow["verdict"] == "DENIED" && flow["source"]["pod"] == "heir").unwrap();
    assert_ne!(flow["source"]["identity"], "spiffe://cluster.local/ns/shop/sa/client", "{flow}");
}

#[test]
fn a_bad_object_is_reported_and_the_others_go_on() {
    let lab = lab();
    // A policy that was never good denies to the Pods that it selects: what it would allow is not known.
    let bad = DENY_CLIENT
        .replace("action: DENY", "action: REFUSE")
        .replace("no-client", "typo")
        .replace("selector: {}", "selector: {matchLabels: {app: echo}}");
    lab.source().write("typo", &bad).unwrap();
    wait::until(Duration::from_secs(5), "the report", || {
        let (accepted, message) = lab.condition("AuthorizationPolicy", "shop", "typo", "Accepted")?;
        ensure!(!accepted && message.contains("action"), "{accepted} {message}");
        Ok(())
    })
    .unwrap();
    let web = calls::vip(&lab, "shop/web", 80).unwrap();
    let answer = calls::http(&lab, "client", &web, &[]).unwrap();
    assert_eq!(calls::number(&answer, "/statuses/200"), 1, "{answer}");
    let echo = at(&lab, "echo", 7000, false);
    wait::until(Duration::from_secs(5), "the denial", || {
        let answer = lab.app("client", &["dial", "--to", &echo])?;
        ensure!(answer["error"] == "ConnectionRefused", "{answer}");
        Ok(())
    })
    .unwrap();
    lab.apply_example("canary").context("the next object is taken").unwrap();
}
