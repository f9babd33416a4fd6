//! A shop of five services that this project did not write (nginx, Python, redis, PostgreSQL) or speaks gRPC, installed
//! in strict mode on two nodes with both address families: every answer right, nothing of it readable on the wire, who
//! may call whom enforced, and nothing of it failing while the agents are replaced.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers fail as their test does")]

use std::thread;

use anyhow::{Context as _, Result, ensure};
use weft_cluster::Options;
use weft_tests::{
    capture::Trace,
    mesh::Mesh,
    shop::{self, SHOP, at},
};

/// In paths, answers, keys, values and SQL: the rest of each says which.
const ITEM: &str = "canary-5d0c";
const GRPC: &str = "canary-grpc-5d0c";
/// A text of each protocol that a capture shows where it is not encrypted.
const CANARIES: [&str; 5] = [
    "/api/order/canary-5d0c",
    "canary-5d0c is redis-canary-5d0c",
    "redis-canary-5d0c\r\n",
    "VALUES ('sql-canary-5d0c')",
    GRPC,
];

fn readable(trace: &Trace) -> Vec<(&'static str, usize)> {
    CANARIES.iter().map(|text| (*text, trace.find(text.as_bytes()))).collect()
}

fn denied(mesh: &Mesh) -> Result<()> {
    // Named by a policy: nobody but api and migrate.
    let psql = ["psql", "-h", "postgres.shop.svc.cluster.local", "-U", "postgres", "-c", "SELECT 4711"];
    let words = [&["env", "PGCONNECT_TIMEOUT=5"][..], &psql].concat();
    let answer = mesh.exec(SHOP, "analyst", &words);
    ensure!(answer.is_err(), "the analyst reads the database: {answer:?}");
    let said = format!("{:#}", answer.unwrap_err());
    ensure!(
        said.contains("connection to server") || said.contains("refused"),
        "psql ended otherwise: {said}"
    );
    for (service, port) in [("redis", 6379), ("postgres", 5432)] {
        let to = at(mesh, service, port, false)?;
        let answer =
            mesh.app(SHOP, "customer", &["dial", "--to", &to, "--send", "PING", "--timeout-ms", "4000"])?;
        ensure!(
            answer["heard"].as_str().unwrap_or_default().is_empty(),
            "{service} answers a customer: {answer}"
        );
    }
    let to = at(mesh, "api", 8000, false)?;
    let answer = mesh.app(SHOP, "customer", &["http", "--to", &to, "--path", "/api/order/x"])?;
    ensure!(
        answer["ok"] == 0 && answer["bodies"].to_string().len() < 3,
        "the customer went past the frontend: {answer}"
    );
    mesh.eventually("the denials as flows", || {
        let flows =
            mesh.weft(&["observe", "-n", SHOP, "--verdict", "denied", "--last", "100", "-o", "compact"])?;
        for part in ["shop/analyst", "shop/customer"] {
            ensure!(flows.contains(part), "no {part} in {flows}");
        }
        Ok(())
    })
}

/// New calls all the time while the agents are replaced; none fails.
fn replaced_under_load(mesh: &Mesh) -> Result<()> {
    thread::scope(|scope| {
        let orders = scope.spawn(|| shop::order(mesh, "roll-out", 600, 30, false));
        let quotes = scope.spawn(|| shop::quote(mesh, "roll-out", 20, 50, false));
        mesh.cluster.kubectl(&["-n", "weft-system", "rollout", "restart", "daemonset/weft-agent"])?;
        mesh.rolled_out()?;
        // New gRPC connections on the new agents; the calls above began on one from before.
        for n in 0..10 {
            shop::quote(mesh, &format!("after-{n}"), 1, 0, n % 2 == 1)?;
        }
        orders.join().unwrap().context("orders while the agents were replaced")?;
        quotes.join().unwrap().context("quotes while the agents were replaced")
    })
    .with_context(|| mesh.diagnose())
}

#[test]
fn a_shop_of_five_services_works_in_strict_and_cannot_be_read() -> Result<()> {
    let mesh = Mesh::up(Options { dual_stack: true, ..Options::default() })?;
    shop::load_images(&mesh)?;
    mesh.cluster.apply(&shop::manifest()?)?;
    shop::opened(&mesh)?;
    mesh.enrolled(SHOP, &["customer", "analyst"], "strict")?;

    let capture = mesh.capture(1)?;
    for v6 in [false, true] {
        shop::order(&mesh, ITEM, 25, 0, v6).with_context(|| mesh.diagnose())?;
        shop::quote(&mesh, GRPC, 25, 0, v6)?;
        for n in 0..10 {
            shop::order(&mesh, &format!("item-{n}"), 5, 0, v6)?;
        }
    }
    let trace = capture.finish()?;
    let seen = readable(&trace);
    ensure!(seen.iter().all(|(_, count)| *count == 0), "readable on the wire: {seen:?}");
    ensure!(trace.len() > 500, "only {} packets crossed the wire", trace.len());

    denied(&mesh)?;
    replaced_under_load(&mesh)?;

    // The other way round: without the mesh the same capture reads each of them.
    mesh.mode(SHOP, "disabled")?;
    mesh.eventually("every text on the wire without the mesh", || {
        let capture = mesh.capture(1)?;
        shop::order(&mesh, ITEM, 5, 0, false)?;
        shop::quote(&mesh, GRPC, 2, 0, false)?;
        let seen = readable(&capture.finish()?);
        ensure!(seen.iter().all(|(_, count)| *count > 0), "the capture is blind for some: {seen:?}");
        Ok(())
    })
}
