//! The soak in short: half a minute of every load and every kind of kill between two nodes, and what stays after it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, process::Command};

use serde_json::Value;

#[test]
fn what_is_left_alone_is_answered_and_what_is_over_leaves_nothing() {
    let out = tempfile::tempdir().unwrap();
    let mut soak = Command::new(env!("CARGO_BIN_EXE_weft-bench"));
    let status = soak.args(["soak", "--minutes", "0.4", "--out"]).arg(out.path()).status().unwrap();
    assert!(status.success(), "{status}: the table above says which row is short, and for which seed");

    let results: Value = serde_json::from_slice(&fs::read(out.path().join("results.json")).unwrap()).unwrap();
    let rows = results["rows"].as_array().unwrap();
    assert!(!rows.is_empty() && rows.iter().all(|row| row["verdict"] == "PASS"), "{rows:?}");
    for load in ["HTTP/1.1", "HTTP/2, L7", "downloads", "idle connections"] {
        assert!(results["loads"][load]["answered"].as_u64().unwrap() > 0, "{load}");
    }
    assert!(results["kills"]["back"]["answered"].as_u64().unwrap() > 0, "a tunnel was cut");
    assert!(fs::read_to_string(out.path().join("table.md")).unwrap().contains("VERDICT: PASS"));
}
