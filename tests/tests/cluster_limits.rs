//! A node with one Pod of the mesh more than its BPF maps hold: that Pod is named and closed, whether it comes now or runs
//! already, the others go on, and it comes up as soon as there is room. Needs root and the parts of a cluster.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers fail as their test does")]

use anyhow::{Context as _, Result, ensure};
use weft_cluster::Options;
use weft_tests::{
    failure::{Fate, cluster, watch::Watched as _},
    manifest::{Pod, namespace, server},
    mesh::Mesh,
};

/// Entries of `PODS`: the node's own, those of Kubernetes and Weft on it, and some for the test.
const ROOM: usize = 9;
const FULL: &str = "the map PODS is full (9 entries): give the agents a larger --map-size PODS=ENTRIES";

/// As installed, but for the size of one map.
fn install(mesh: &Mesh) -> Result<()> {
    let text = mesh.manifests()?;
    let (before, after) = text.split_once("- --ready-file=").context("the agents' arguments")?;
    let indent = before.rsplit('\n').next().unwrap_or_default();
    let small = format!("{before}- --map-size=PODS={ROOM}\n{indent}- --ready-file={after}");
    mesh.cluster.apply(&small)?;
    mesh.rolled_out().with_context(|| mesh.diagnose())
}

/// Entries of `PODS` on node 2.
fn used(mesh: &Mesh) -> Result<usize> {
    let metrics = cluster::metrics(&mesh.cluster.node(2))?;
    let line = metrics.lines().find_map(|l| l.strip_prefix("weft_map_entries{map=\"PODS\"} "));
    line.context("no entries are told")?.parse().context("the entries")
}

fn call(mesh: &Mesh, namespace: &str, ip: &str) -> Result<String> {
    mesh.fetch(namespace, "client", &format!("http://{ip}/"), &[])
}

/// Fills node 2 with Pods; their names.
fn fill(mesh: &Mesh) -> Result<Vec<String>> {
    let before = used(mesh)?;
    ensure!((3..ROOM - 1).contains(&before), "{before} of {ROOM} entries are taken before the test begins");
    let names: Vec<String> = (before..ROOM).map(|number| format!("fill{number}")).collect();
    let pods: Vec<String> =
        names.iter().map(|name| Pod::busybox("shop", name, "node2").to_string()).collect();
    mesh.cluster.apply(&pods.concat())?;
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    mesh.ready("shop", &all)?;
    mesh.enrolled("shop", &all, "strict")?;
    mesh.eventually("a full map", || {
        let used = used(mesh)?;
        ensure!(used == ROOM, "{used} of {ROOM} entries are taken");
        Ok(())
    })?;
    Ok(names)
}

/// What `weft status` says of a Pod of node 2.
fn problem(mesh: &Mesh, pod: &str) -> Result<String> {
    let said: serde_json::Value = serde_json::from_str(&mesh.node_status(&mesh.cluster.node(2))?)?;
    let pods = said["agents"][0]["pods"].as_array().cloned().unwrap_or_default();
    let found = pods.iter().find(|p| p["name"] == pod).with_context(|| format!("no {pod} in {said}"))?;
    Ok(found["problem"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn one_pod_too_many_is_closed_and_named_and_comes_up_when_one_goes() -> Result<()> {
    let mesh = Mesh::bare(Options::default())?;
    install(&mesh)?;
    let objects = [
        namespace("shop", Some("strict")),
        namespace("outside", None),
        namespace("away", None),
        server("shop", "web", "node2"),
        Pod::busybox("shop", "client", "node1").to_string(),
        Pod::lab("shop", "watcher", "node1", "serve, --tcp, '7000'").to_string(),
        Pod::lab("shop", "echo", "node2", "serve, --tcp, '7000'").to_string(),
        Pod::busybox("away", "client", "node1").to_string(),
    ];
    mesh.cluster.apply(&objects.concat())?;
    mesh.ready("shop", &["web", "client", "watcher", "echo"])?;
    mesh.ready("away", &["client"])?;
    mesh.enrolled("shop", &["web", "client", "watcher", "echo"], "strict")?;
    let ip = |namespace: &str, pod: &str| mesh.field(namespace, &format!("pod/{pod}"), ".status.podIP");
    let web = ip("shop", "web")?;
    mesh.eventually("a call through the mesh", || call(&mesh, "shop", &web))?;
    let (logs, from) = (tempfile::tempdir()?, mesh.cluster.node(1));
    let to = format!("{}:7000", ip("shop", "echo")?);
    let watch =
        |name, running| cluster::watch(&from, ("shop", "watcher"), (name, &to), running, logs.path(), true);
    let others = [watch("new", false)?, watch("running", true)?];
    let fillers = fill(&mesh)?;

    // One that comes now does not start, and Kubernetes is told why.
    mesh.cluster.apply(&server("shop", "late", "node2"))?;
    mesh.eventually("the reason in the Pod's events", || {
        let said = mesh.cluster.kubectl(&["-n", "shop", "describe", "pod", "late"])?;
        ensure!(said.contains(FULL), "{said}");
        Ok(())
    })?;
    let phase = mesh.field("shop", "pod/late", ".status.phase")?;
    ensure!(phase == "Pending", "a strict Pod without room is {phase}");
    // Also between the runtime's tries, when there is no sandbox of it.
    mesh.eventually("the reason in weft status", || {
        let said = problem(&mesh, "shop/late")?;
        ensure!(said.contains(FULL), "{said:?}");
        Ok(())
    })?;
    mesh.eventually("a full map in weft status and the metrics", || {
        let said = mesh.weft_said(&["status"])?;
        let full = format!("map PODS is nearly full: {ROOM} of {ROOM}; make room with --map-size PODS=");
        ensure!(said.contains(&full), "{said}");
        let metrics = cluster::metrics(&mesh.cluster.node(2))?;
        let failures = metrics.lines().find_map(|l| l.strip_prefix("weft_enrolment_failures_total "));
        ensure!(failures.is_some_and(|count| count != "0"), "{failures:?} failures are counted");
        Ok(())
    })?;

    // One that runs outside the mesh, and whose namespace becomes strict: closed from then on, not open.
    mesh.cluster.apply(&server("outside", "stranger", "node2"))?;
    mesh.ready("outside", &["stranger"])?;
    let stranger = ip("outside", "stranger")?;
    mesh.eventually("a call outside the mesh", || call(&mesh, "away", &stranger))?;
    mesh.mode("outside", "strict")?;
    mesh.eventually("the reason of a Pod that runs", || {
        let said = problem(&mesh, "outside/stranger")?;
        ensure!(said.contains(FULL), "{said:?}");
        Ok(())
    })?;
    let answered = call(&mesh, "away", &stranger);
    ensure!(answered.is_err(), "plaintext reached a strict Pod that found no room: {answered:?}");
    let answered = call(&mesh, "shop", &stranger);
    ensure!(answered.is_err(), "nobody serves for it, and it answers: {answered:?}");
    for watch in &others {
        ensure!(watch.still(10)? == Fate::GoOn, "another Pod's connections fail");
    }
    call(&mesh, "shop", &web)?;

    // One goes, one comes; and again.
    let [first, second, ..] = fillers.as_slice() else { anyhow::bail!("{fillers:?} are too few") };
    let go = |name: &str| mesh.cluster.kubectl(&["-n", "shop", "delete", "pod", name]).map(drop);
    go(first)?;
    mesh.eventually("a Pod in the room that there is", || {
        let [late, stranger] = [problem(&mesh, "shop/late")?, problem(&mesh, "outside/stranger")?];
        ensure!(late.is_empty() || stranger.is_empty(), "{late:?}, {stranger:?}");
        Ok(())
    })?;
    go(second)?;
    mesh.ready("shop", &["late"])?;
    mesh.enrolled("shop", &["late"], "strict")?;
    mesh.enrolled("outside", &["stranger"], "strict")?;
    for pod in [ip("shop", "late")?, stranger] {
        mesh.eventually("a call through the mesh", || call(&mesh, "shop", &pod))?;
        let answered = call(&mesh, "away", &pod);
        ensure!(answered.is_err(), "plaintext reached {pod}: {answered:?}");
    }
    for watch in &others {
        ensure!(watch.still(10)? == Fate::GoOn, "another Pod's connections failed");
    }
    mesh.never_crashed()
}
