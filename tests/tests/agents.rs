//! Agents come and go.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use weft_tests::{Lab, demo::calls, lab::Process, wait};

const BANNER: u16 = 7001;

fn lab() -> Lab {
    let mut lab = Lab::shop().unwrap_or_else(|error| panic!("{error:#}"));
    lab.start_server("web-v1", "banner", BANNER).unwrap();
    lab
}

fn works(lab: &Lab) {
    let web = calls::vip(lab, "shop/web", 80).unwrap();
    wait::until(Duration::from_secs(15), "a call to web", || {
        let answer = calls::http(lab, "client", &web, &["--timeout-ms", "2000"])?;
        (calls::number(&answer, "/statuses/200") == 1).then_some(()).with_context(|| answer.to_string())
    })
    .unwrap();
}

fn result(load: &mut Process) -> Value {
    load.wait(Duration::from_secs(120)).unwrap();
    let output = load.output();
    serde_json::from_str(output.lines().last().unwrap()).unwrap_or_else(|_| panic!("{output}"))
}

#[test]
fn an_agent_that_is_killed_fails_closed_and_comes_back() {
    let mut lab = lab();
    for node in ["node-a", "node-b"] {
        works(&lab);
        let mut agent = lab.node_mut(node).unwrap().agent.take().unwrap();
        agent.signal(Signal::SIGKILL).unwrap();
        agent.wait(Duration::from_secs(5)).unwrap();
        let web = calls::vip(&lab, "shop/web", 80).unwrap();
        let answer = calls::http(&lab, "client", &web, &["--count", "5", "--timeout-ms", "6000"]).unwrap();
        assert_eq!(calls::number(&answer, "/statuses/200"), 0, "{node} is dead: {answer}");
        lab.start_agent(node).unwrap();
        lab.node_mut(node).unwrap().wait_ready(Duration::from_secs(20)).unwrap();
        works(&lab);
    }
}

#[test]
fn an_agent_starts_and_serves_while_the_operator_is_down() {
    let mut lab = lab();
    lab.apply_example("policy").unwrap();
    works(&lab);
    lab.stop_operator();
    for node in ["node-a", "node-b"] {
        let mut agent = lab.node_mut(node).unwrap().agent.take().unwrap();
        agent.signal(Signal::SIGKILL).unwrap();
        agent.wait(Duration::from_secs(5)).unwrap();
        lab.start_agent(node).unwrap();
    }
    works(&lab);
    // Not only open: the policy it knew is still enforced.
    let web = calls::vip(&lab, "shop/web", 80).unwrap();
    let answer = calls::http(&lab, "intruder", &web, &[]).unwrap();
    assert_eq!(calls::number(&answer, "/statuses/200"), 0, "{answer}");
    let answer = calls::http(&lab, "client", &web, &["--method", "POST"]).unwrap();
    assert_eq!(calls::number(&answer, "/statuses/403"), 1, "{answer}");
    // And what changes after it came back arrives.
    lab.start_operator().unwrap();
    for node in ["node-a", "node-b"] {
        lab.node_mut(node).unwrap().wait_ready(Duration::from_secs(20)).unwrap();
    }
    lab.wait_settled(Duration::from_secs(20)).unwrap();
    lab.delete("policy").unwrap();
    let answer = calls::http(&lab, "client", &web, &["--method", "POST"]).unwrap();
    assert_eq!(calls::number(&answer, "/statuses/403"), 0, "{answer}");
}

#[test]
fn no_connection_fails_while_an_agent_is_replaced() {
    let mut lab = lab();
    for node in ["node-a", "node-b"] {
        let proxied = SocketAddr::new(lab.pod("web-v1").unwrap().v4.into(), BANNER).to_string();
        // Same node, no L7: judged in the kernel, never in the proxy.
        let kernel = SocketAddr::new(lab.pod("echo").unwrap().v4.into(), 7000).to_string();
        let many = |to: &str| {
            ["many", "--to", to, "--count", "2000", "--threads", "2", "--pace-ms", "3", "--progress"]
                .map(str::to_owned)
        };
        let start = |name: &str, to: &str| {
            let args = many(to);
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            lab.spawn_app("client", name, &args).unwrap()
        };
        let mut loads = [start("proxied", &proxied), start("kernel", &kernel)];
        let done = |load: &Process| load.output().lines().filter(|line| *line == "call").count();
        wait::until(Duration::from_secs(20), "both loads to run", || {
            ensure!(loads.iter().all(|load| done(load) >= 100), "few connects yet");
            Ok(())
        })
        .unwrap();
        let mut old = lab.start_agent(node).unwrap().unwrap();
        old.drained(Duration::from_secs(30)).unwrap();
        let at: Vec<usize> = loads.iter().map(done).collect();
        lab.node_mut(node).unwrap().wait_ready(Duration::from_secs(20)).unwrap();
        for load in &mut loads {
            let answer = result(load);
            assert_eq!(answer["ok"], 2000, "{node}: {answer}");
            assert_eq!(answer["failed"], 0, "{node}: {answer}");
        }
        println!("{node} was replaced; the loads were at {at:?} of 2,000 when the old agent had drained");
        // Seconds after it had nothing left to do: one that ends by itself is started again by the kubelet.
        let status = old.end_replaced(Duration::from_secs(30)).unwrap();
        assert!(status.success(), "{node}'s old agent ended with {status}:\n{}", old.tail(20));
        works(&lab);
    }
}
