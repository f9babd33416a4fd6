//! The lab itself, without a mesh: what the other tests stand on.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use weft_tests::{Lab, LabOptions, capture::Capture, lab::Record};

#[test]
fn a_cluster_without_a_mesh_carries_plaintext_and_leaves_nothing() {
    let mut lab = Lab::bare(LabOptions::default()).unwrap();
    lab.start_nginx("web-v1").unwrap();
    lab.start_server("echo", "banner", 7000).unwrap();

    let wire = lab.node("node-a").unwrap().place.netns.clone();
    let capture = Capture::start(&wire, "wire0", &lab.dir().join("plain.pcap")).unwrap();
    for v6 in [false, true] {
        let to = std::net::SocketAddr::new(lab.pod("web-v1").unwrap().address(v6), 8080).to_string();
        let answer = lab.app("client", &["http", "--to", &to, "--path", "/needle-in-the-hay"]).unwrap();
        assert_eq!(answer["bodies"]["web-v1"], 1, "{answer}");
        let to = std::net::SocketAddr::new(lab.pod("echo").unwrap().address(v6), 7000).to_string();
        let answer = lab.app("client", &["dial", "--to", &to]).unwrap();
        assert_eq!(answer["heard"], "220 echo ready\r\n", "{answer}");
    }
    let trace = capture.finish().unwrap();
    assert!(trace.find(b"needle-in-the-hay") >= 2, "the capture sees plaintext");
    assert_eq!(trace.find(b"220 echo"), 0, "traffic of one node does not cross the wire");
    assert_eq!(trace.tls_bytes(8080).0, 0);
    let log = lab.access_log("web-v1").unwrap();
    let client = lab.pod("client").unwrap().v4.to_string();
    assert!(log.iter().any(|line| line.starts_with(&client)), "{log:?}");

    let record: Record = lab.record().clone();
    lab.remove_pod("intruder").unwrap();
    assert!(lab.app("intruder", &["dial", "--to", "10.77.2.10:8080"]).is_err());
    lab.down().unwrap();
    assert_eq!(record.leftovers(), Vec::<String>::new());
    assert!(!Record::all().iter().any(|other| other.name == record.name));
}

#[test]
fn a_lab_that_is_dropped_in_the_middle_leaves_nothing() {
    let mut lab = Lab::bare(LabOptions::default()).unwrap();
    lab.start_server("web-v1", "sink", 9000).unwrap();
    let to = std::net::SocketAddr::new(lab.pod("web-v1").unwrap().v4.into(), 9000).to_string();
    let mut hanging =
        lab.spawn_app("client", "hanging", &["dial", "--to", &to, "--timeout-ms", "60000"]).unwrap();
    hanging.check().unwrap();
    let record = lab.record().clone();
    drop(lab);
    hanging.wait(Duration::from_secs(5)).unwrap();
    assert_eq!(record.leftovers(), Vec::<String>::new());
}
