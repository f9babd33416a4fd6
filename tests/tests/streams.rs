//! Byte streams through the mesh, between nodes: both families.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, net::SocketAddr, time::Duration};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use weft_tests::{Lab, wait};

const BANNER: u16 = 7001;
const SINK: u16 = 7002;
const SOURCE: u16 = 7003;
const FAREWELL: u16 = 7004;

fn lab() -> Lab {
    let mut lab = Lab::shop().unwrap_or_else(|error| panic!("{error:#}"));
    lab.start_server("web-v1", "banner", BANNER).unwrap();
    lab.start_server("web-v1", "sink", SINK).unwrap();
    lab.start_server("web-v1", "source", SOURCE).unwrap();
    lab.start_server("web-v1", "farewell", FAREWELL).unwrap();
    lab
}

fn at(lab: &Lab, port: u16, v6: bool) -> String {
    SocketAddr::new(lab.pod("web-v1").unwrap().address(v6), port).to_string()
}

fn mutual(lab: &Lab, port: u16) -> Value {
    let port = port.to_string();
    let (flow, _) = wait::until(Duration::from_secs(5), "a flow of that port", || {
        let flows = weft_tests::observe::flows(lab, &["--last", "100", "--port", &port])?;
        flows.into_iter().find(|flow| flow["tls"]["mode"] == "mutual").context("none with mTLS yet")
    })
    .unwrap();
    flow
}

#[test]
fn a_server_that_speaks_first_is_heard_at_once() {
    let lab = lab();
    for v6 in [false, true] {
        let answer = lab.app("client", &["dial", "--to", &at(&lab, BANNER, v6)]).unwrap();
        assert_eq!(answer["heard"], "220 echo ready\r\n", "v6 {v6}: {answer}");
        assert_eq!(answer["peer"], at(&lab, BANNER, v6), "the socket shows what it dialled");
        assert!(answer["held_ms"].as_u64().unwrap() < 2000, "nothing waits for a first byte: {answer}");
    }
    assert_eq!(mutual(&lab, BANNER)["verdict"], "FORWARDED");
}

#[test]
fn a_half_closed_connection_still_answers() {
    let lab = lab();
    for v6 in [false, true] {
        let answer =
            lab.app("client", &["stream", "--to", &at(&lab, SINK, v6), "--bytes", "1000003"]).unwrap();
        assert_eq!(answer["matches"], true, "v6 {v6}: {answer}");
    }
}

/// The other way round: the server has nothing more to say, and the client goes on.
#[test]
fn a_server_that_closed_its_side_still_hears() {
    let lab = lab();
    for v6 in [false, true] {
        let to = at(&lab, FAREWELL, v6);
        let args = ["stream", "--to", &to, "--bytes", "3000017", "--after-end"];
        let answer = lab.app("client", &args).unwrap();
        assert_eq!(answer["heard"], "farewell\n", "v6 {v6}: {answer}");
        let wanted = format!("got 3000017 {}", answer["checksum"].as_str().unwrap());
        let log = lab.pod("web-v1").unwrap().folder(lab.dir()).join("farewell.log");
        wait::until(Duration::from_secs(10), "the server to have heard it all", || {
            let text = fs::read_to_string(&log)?;
            ensure!(text.lines().filter(|line| **line == *wanted).count() == 1 + usize::from(v6), "{text}");
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn a_gibibyte_arrives_whole() {
    let lab = lab();
    let bytes = (1_u64 << 30).to_string();
    let args = ["stream", "--to", &at(&lab, SINK, false), "--bytes", &bytes, "--timeout-ms", "60000"];
    let answer = lab.app("client", &args).unwrap();
    assert_eq!(answer["matches"], true, "{answer}");
    println!("1 GiB in {} ms", answer["elapsed_ms"]);
}

#[test]
fn a_thousand_connections_stand_at_once() {
    let lab = lab();
    for v6 in [false, true] {
        let args =
            ["many", "--to", &at(&lab, BANNER, v6), "--count", "1000", "--together", "--threads", "32"];
        let answer = lab.app("client", &args).unwrap();
        assert_eq!(answer["ok"], 1000, "v6 {v6}: {answer}");
        assert_eq!(answer["alive"], 1000, "v6 {v6}: {answer}");
    }
}

#[test]
fn a_slow_reader_holds_back_its_sender_and_nobody_else() {
    let lab = lab();
    let leave = lab.dir().join("read-now");
    let leave_text = leave.display().to_string();
    let total = 256_u64 << 20;
    let to = at(&lab, SOURCE, false);
    let args =
        ["slow", "--to", &to, "--bytes", &total.to_string(), "--until", &leave_text, "--timeout-ms", "60000"];
    let mut slow = lab.spawn_app("client", "slow", &args).unwrap();
    wait::until(Duration::from_secs(10), "the slow reader's request", || {
        slow.check()?;
        ensure!(slow.output().contains("asked"), "not yet");
        Ok(())
    })
    .unwrap();
    // While it does not read, others do as always.
    let to = at(&lab, BANNER, false);
    let answer = lab.app("client", &["many", "--to", &to, "--count", "200", "--threads", "4"]).unwrap();
    assert_eq!(answer["ok"], 200, "{answer}");
    let sent = sent_by_source(&lab);
    assert!(sent < 64 << 20, "the sender was held back, {sent} bytes are on the way");
    fs::write(&leave, "").unwrap();
    slow.wait(Duration::from_secs(60)).unwrap();
    let output = slow.output();
    let answer: Value = serde_json::from_str(output.lines().last().unwrap()).unwrap();
    assert_eq!(answer["matches"], true, "{answer}");
}

/// The last progress that the source server printed, in bytes.
fn sent_by_source(lab: &Lab) -> u64 {
    let log = lab.pod("web-v1").unwrap().folder(lab.dir()).join("source.log");
    let text = fs::read_to_string(log).unwrap();
    let sent = text.lines().filter_map(|line| line.strip_prefix("sent "));
    sent.filter_map(|bytes| bytes.parse().ok()).next_back().unwrap_or(0)
}
