//! What policy changes do to what is already there.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
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
    lab.hold("client", name, to).unwrap_or_else(|error| panic!("{error:#}"))
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

/// While no agent runs nobody ends what policy came to deny; the next one does.
#[test]
fn what_stands_and_is_denied_ends_with_the_next_agent() {
    let mut lab = lab();
    let mut held = hold(&lab, "kernel", &at(&lab, "echo", 7000, false));
    let mut agent = lab.node_mut("node-a").unwrap().agent.take().unwrap();
    agent.signal(Signal::SIGKILL).unwrap();
    agent.wait(Duration::from_secs(5)).unwrap();
    lab.source().write("deny", DENY_CLIENT).unwrap();
    held.check().expect("nobody is there to end it");
    lab.start_agent("node-a").unwrap();
    held.wait(Duration::from_secs(20)).unwrap();
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
    told_everywhere(&lab, &["typo.yaml", "AuthorizationPolicy shop/typo", "spec.action", "ALLOW", "DENY"]);
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
    // Mended, it is taken, and nobody speaks of it any more.
    lab.apply("typo", &bad.replace("REFUSE", "AUDIT")).unwrap();
    let (code, text) = lab.told_status().unwrap();
    assert_eq!(code, 0, "{text}");
    let answer = lab.app("client", &["dial", "--to", &echo]).unwrap();
    assert_eq!(answer["connected"], true, "{answer}");
}

/// A good policy becomes bad: its last good form goes on. A file that is no YAML at all is named with its line. A
/// field of the wrong kind of one document does not touch the others of its file.
#[test]
fn what_was_good_goes_on_when_it_becomes_bad() {
    let lab = lab();
    let to = at(&lab, "web-v1", 8080, false);
    let blocked = |wanted: bool| {
        let answer = calls::http(&lab, "intruder", &to, &[]).unwrap();
        assert_eq!(calls::number(&answer, "/statuses/200"), u64::from(!wanted), "{answer}");
    };
    lab.apply_example("policy").unwrap();
    blocked(true);
    let policy = lab.source().path().join("policy.yaml");
    let good = fs::read_to_string(&policy).unwrap();
    // The second document of the file is good, and is taken.
    let second = DENY_CLIENT.replace("selector: {}", "selector: {matchLabels: {app: echo}}");
    let bad = good.replace("ports: [8080]", "ports: [808080]");
    lab.source().write("policy", &format!("{bad}---{second}")).unwrap();
    wait::until(Duration::from_secs(5), "the report", || {
        let (accepted, message) = lab.condition("AuthorizationPolicy", "shop", "web-callers", "Accepted")?;
        ensure!(!accepted, "{message}");
        Ok(())
    })
    .unwrap();
    told_everywhere(
        &lab,
        &["policy.yaml", "AuthorizationPolicy shop/web-callers", "networkAttributes.ports[0]"],
    );
    wait::until(Duration::from_secs(5), "the good document of the same file", || {
        let answer = lab.app("client", &["dial", "--to", &at(&lab, "echo", 7000, false)])?;
        ensure!(answer["error"] == "ConnectionRefused", "{answer}");
        Ok(())
    })
    .unwrap();
    blocked(true);
    let answer = calls::http(&lab, "client", &to, &[]).unwrap();
    assert_eq!(calls::number(&answer, "/statuses/200"), 1, "the last good form: {answer}");

    lab.source().write("policy", "kind: [unclosed\n").unwrap();
    wait::until(Duration::from_secs(5), "the report of the file", || {
        let (code, text) = lab.told_status()?;
        ensure!(code == 1 && text.contains("policy.yaml") && text.contains("line"), "{code} {text}");
        Ok(())
    })
    .unwrap();
    blocked(true);
    lab.apply("policy", &good).unwrap();
    blocked(true);
    let (code, text) = lab.told_status().unwrap();
    assert_eq!(code, 0, "{text}");
}

/// The operator's log, `weft status` and the status folder each say all of `parts`, the first two in one line.
fn told_everywhere(lab: &Lab, parts: &[&str]) {
    let one_line = |text: &str| text.lines().any(|line| parts.iter().all(|part| line.contains(part)));
    wait::until(Duration::from_secs(5), "the report in log, status and folder", || {
        let log = lab.operator_log()?;
        let last: Vec<&str> = log.lines().rev().take(3).collect();
        ensure!(one_line(&log), "the log does not say {parts:?}: {last:?}");
        let (code, text) = lab.told_status()?;
        ensure!(code == 1 && one_line(&text), "weft status ({code}) does not say {parts:?}: {text}");
        let summary = lab.summary()?.to_string();
        ensure!(
            parts.iter().all(|part| { part.split(['/', ' ']).all(|word| summary.contains(word)) }),
            "the summary does not say {parts:?}"
        );
        Ok(())
    })
    .unwrap();
}
