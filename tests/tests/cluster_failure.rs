//! What goes on, and what does not, while no agent runs: the programs stay and judge, Pods outside the mesh come up and
//! work, the operator is not locked out, and what is strict stays closed until the agents are back.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers fail as their test does")]

use anyhow::{Context as _, Result, ensure};
use weft_cluster::Options;
use weft_tests::{
    failure::{Fate, cluster, row, watch::Watched as _},
    manifest::{Pod, namespace, server},
    mesh::Mesh,
};

const CANARY: &str = "weft-canary-91be";

/// A Pod that watches from node 1, and one on node 2 that answers it line by line.
fn watched(name: &str, node: &str) -> String {
    Pod::lab("shop", name, node, "serve, --tcp, '7000'").to_string()
}

fn client(namespace: &str, name: &str) -> String {
    Pod::busybox(namespace, name, "node1").to_string()
}

fn call(mesh: &Mesh, namespace: &str, client: &str, server: &str) -> Result<String> {
    let header = format!("x-canary: {CANARY}");
    mesh.fetch(namespace, client, &format!("http://web.{server}.svc.cluster.local/"), &[&header])
}

#[test]
fn without_agents_strict_stays_closed_and_the_rest_works() -> Result<()> {
    let mesh = Mesh::up(Options::default())?;
    mesh.cluster.apply(&[namespace("shop", Some("strict")), namespace("outside", None)].concat())?;
    let documents = [
        server("shop", "web", "node2"),
        client("shop", "client"),
        server("outside", "web", "node2"),
        client("outside", "client"),
        watched("watcher", "node1"),
        watched("echo", "node2"),
    ];
    mesh.cluster.apply(&documents.concat())?;
    mesh.ready("shop", &["web", "client", "watcher", "echo"])?;
    mesh.ready("outside", &["web", "client"])?;
    for namespace in ["shop", "outside"] {
        mesh.named(namespace, &["web"])?;
    }
    mesh.enrolled("shop", &["web", "client", "watcher", "echo"], "strict")?;
    mesh.eventually("a call through the mesh", || call(&mesh, "shop", "client", "shop"))?;
    mesh.eventually("a call outside", || call(&mesh, "outside", "client", "outside"))?;

    let told = row("agent")?;
    let (logs, from) = (tempfile::tempdir()?, mesh.cluster.node(1));
    let to = format!("{}:7000", mesh.field("shop", "pod/echo", ".status.podIP")?);
    let watch =
        |name, running| cluster::watch(&from, ("shop", "watcher"), (name, &to), running, logs.path(), true);
    let (new, running) = (watch("new", false)?, watch("running", true)?);

    mesh.run_agents(false)?;
    told.shown(|place| cluster::read(&mesh, &from, place))?;
    told.observed(new.after(new.mark()?, 10)?.fate()?, running.still(10)?)?;
    ensure!(
        told.new == Fate::Refused && told.running == Fate::End,
        "the rest of this test is about these fates"
    );
    let capture = mesh.capture(1)?;
    for _ in 0..5 {
        let refused = call(&mesh, "shop", "client", "shop");
        ensure!(refused.is_err(), "answered without a proxy: {refused:?}");
    }
    let trace = capture.finish()?;
    ensure!(trace.find(CANARY.as_bytes()) == 0, "plaintext left the node while no agent ran");

    // Pods that come up now: outside the mesh everything works, names and Services included.
    mesh.cluster.apply(&[client("outside", "late"), client("shop", "late")].concat())?;
    mesh.ready("outside", &["late"])?;
    mesh.eventually("a late Pod outside the mesh", || call(&mesh, "outside", "late", "outside"))?;
    // A strict one is held meanwhile: tests/cluster_guard.rs.
    let capture = mesh.capture(1)?;
    let refused = call(&mesh, "outside", "late", "shop");
    ensure!(refused.is_err(), "a Pod that nobody knows reached a strict one: {refused:?}");
    let trace = capture.finish()?;
    ensure!(trace.find(CANARY.as_bytes()) == 0, "plaintext towards a strict Pod");

    // Operators that start now are new Pods too.
    mesh.cluster.kubectl(&["-n", "weft-system", "rollout", "restart", "deployment/weft-operator"])?;
    mesh.cluster
        .kubectl(&["-n", "weft-system", "rollout", "status", "deployment/weft-operator", "--timeout=240s"])
        .context("an operator cannot start while no agent runs")
        .with_context(|| mesh.diagnose())?;

    mesh.run_agents(true)?;
    mesh.enrolled("shop", &["web", "client", "late"], "strict")?;
    new.settled(Fate::GoOn, 10, std::time::Duration::from_secs(60))?;
    for name in ["client", "late"] {
        mesh.eventually("calls after the agents' return", || call(&mesh, "shop", name, "shop"))?;
    }
    let refused = call(&mesh, "outside", "late", "shop");
    ensure!(refused.is_err(), "plaintext from outside was answered: {refused:?}");
    call(&mesh, "outside", "late", "outside")?;
    mesh.never_crashed()
}
