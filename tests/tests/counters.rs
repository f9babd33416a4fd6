//! Records may be lost where nobody reads them, counters never.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{process::Command, time::Duration};

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use weft_tests::{
    Lab,
    demo::calls,
    lab::{Node, Process},
    wait,
};

fn follow(lab: &Lab, node: &Node, more: &[&str]) -> Process {
    let mut command = Command::new(lab.bins().path("weft"));
    command.args(["observe", "--follow", "-o", "json", "--server", &node.server()]).args(more);
    Process::spawn(command, "a reader of flows", &lab.dir().join("log/reader.log")).unwrap()
}

/// Flows and lost flows that a reader has printed.
fn read(reader: &Process) -> (u64, u64) {
    let (mut flows, mut lost) = (0, 0);
    for line in reader.output().lines() {
        // The last line may be half written.
        let Ok(value) = serde_json::from_str::<Value>(line) else { continue };
        match value["note"].as_str() {
            Some(note) => {
                lost += note.split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
            }
            None => flows += 1,
        }
    }
    (flows, lost)
}

fn calm(node: &Node) -> f64 {
    let mut last = -1.0;
    let (total, _) = wait::until_every(Duration::from_millis(300), Duration::from_secs(15), "quiet", || {
        let now = node.sample("weft_flows_total", &[])?;
        let quiet = now == last;
        last = now;
        quiet.then_some(now).context("flows still come")
    })
    .unwrap();
    total
}

#[test]
fn counters_are_exact_when_a_reader_of_flows_stalls() {
    const CALLS: u64 = 4000;
    let lab = Lab::shop().unwrap_or_else(|error| panic!("{error:#}"));
    lab.settings("{telemetry: {flows: {capacity: 256}}}").unwrap();
    let node = lab.node("node-a").unwrap();
    let web = calls::vip(&lab, "shop/web", 80).unwrap();
    let warm = calls::http(&lab, "client", &web, &["--count", "20"]).unwrap();
    assert_eq!(calls::number(&warm, "/statuses/200"), 20, "{warm}");

    let pair = [("reporter", "source"), ("source_workload", "client")];
    let kernel = [("direction", "outbound"), ("source_workload", "client"), ("verdict", "redirected")];
    let count = |name: &str, labels: &[(&str, &str)]| node.sample(name, labels).unwrap();
    let flows_before = calm(node);
    let before = (
        count("weft_requests_total", &pair),
        count("weft_connections_opened_total", &pair),
        count("weft_connections_closed_total", &pair),
        count("weft_kernel_verdicts_total", &kernel),
        count("weft_flow_ring_lost_total", &[]),
    );
    let mut reader = follow(&lab, node, &["--last", "1"]);
    wait::until(Duration::from_secs(5), "the reader's first flow", || {
        reader.check()?;
        ensure!(read(&reader).0 == 1, "none yet");
        Ok(())
    })
    .unwrap();
    reader.signal(Signal::SIGSTOP).unwrap();
    let count_arg = CALLS.to_string();
    let answer = calls::http(&lab, "client", &web, &["--count", &count_arg, "--concurrency", "4"]).unwrap();
    assert_eq!(calls::number(&answer, "/statuses/200"), CALLS, "{}", answer["errors"]);
    wait::until(Duration::from_secs(10), "every connection to be counted", || {
        let closed = node.sample("weft_connections_closed_total", &pair)? - before.2;
        ensure!(closed >= CALLS as f64, "{closed}");
        Ok(())
    })
    .unwrap();
    assert_eq!(count("weft_requests_total", &pair) - before.0, CALLS as f64, "requests");
    assert_eq!(count("weft_connections_opened_total", &pair) - before.1, CALLS as f64, "connections opened");
    assert_eq!(count("weft_connections_closed_total", &pair) - before.2, CALLS as f64, "connections closed");
    assert_eq!(
        count("weft_kernel_verdicts_total", &kernel) - before.3,
        CALLS as f64,
        "the kernel's verdicts"
    );

    // It reads on, is told what it missed, and the two make up what there was.
    let flows_after = calm(node);
    reader.signal(Signal::SIGCONT).unwrap();
    let made = (flows_after - flows_before) as u64;
    let ((flows, lost), _) = wait::until(Duration::from_secs(10), "the reader to come to the end", || {
        reader.check()?;
        let (flows, lost) = read(&reader);
        ensure!(flows + lost > made, "{flows} flows and {lost} lost of {made}");
        Ok((flows, lost))
    })
    .unwrap();
    println!("{CALLS} calls, {made} flows: the stalled reader saw {flows} and was told of {lost} lost");
    assert!(lost > 0, "the reader fell behind");
    assert_eq!(flows + lost, made + 1, "the flows of the calls, and the one before");
    assert_eq!(count("weft_flow_ring_lost_total", &[]) - before.4, lost as f64);
}

#[test]
fn counters_are_exact_when_the_agent_does_not_read_the_kernels_ring() {
    const CALLS: u64 = 15_000;
    let mut lab = Lab::shop().unwrap_or_else(|error| panic!("{error:#}"));
    let echo = lab.at("echo", 7000, false).unwrap();
    let warm = lab.app("client", &["many", "--to", &echo, "--count", "10"]).unwrap();
    assert_eq!(warm["ok"], 10, "{warm}");
    let node = lab.node_mut("node-a").unwrap();
    calm(node);
    let pair = [
        ("direction", "outbound"),
        ("source_workload", "client"),
        ("destination_workload", "echo"),
        ("verdict", "forwarded"),
    ];
    let before = node.sample("weft_kernel_verdicts_total", &pair).unwrap();
    let lost_before = lost_in_ring(node).unwrap();
    let agent = node.agent.as_ref().unwrap();
    agent.signal(Signal::SIGSTOP).unwrap();
    // The kernel's own way needs no agent.
    let count = CALLS.to_string();
    let answer = lab.app("client", &["many", "--to", &echo, "--count", &count, "--threads", "8"]);
    lab.node("node-a").unwrap().agent.as_ref().unwrap().signal(Signal::SIGCONT).unwrap();
    let answer = answer.unwrap();
    assert_eq!(answer["ok"], CALLS, "{answer}");
    let node = lab.node("node-a").unwrap();
    let (lost, _) = wait::until(Duration::from_secs(10), "the loss to be noticed", || {
        let lost = lost_in_ring(node)? - lost_before;
        (lost > 0.0).then_some(lost).context("none yet")
    })
    .unwrap();
    let counted = node.sample("weft_kernel_verdicts_total", &pair).unwrap() - before;
    println!("{CALLS} connects while the agent stood still: {lost} events lost, {counted} verdicts counted");
    assert_eq!(counted, CALLS as f64);
    // The record says so where the flows are missing, and so does the status.
    wait::until(Duration::from_secs(10), "the record of the loss", || {
        let text = lab.weft(&["observe", "-o", "json", "--last", "8192"])?;
        let notes = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let told = notes.filter_map(|value| Some(value["note"].as_str()?.to_owned())).collect::<Vec<_>>();
        ensure!(told.iter().any(|note| note.contains("the kernel's ring was full")), "{told:?}");
        Ok(())
    })
    .unwrap();
    let status = lab.status().unwrap();
    let lines = status["agents"].as_array().into_iter().flatten();
    let told: u64 = lines.filter_map(|agent| agent["flows"]["lost"].as_u64()).sum();
    assert!(told > 0, "{status}");
}

fn lost_in_ring(node: &Node) -> anyhow::Result<f64> {
    node.sample("weft_kernel_events_lost_total", &[])
}
