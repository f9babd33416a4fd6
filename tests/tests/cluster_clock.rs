//! A node of a cluster whose clock is off: `weft check` says which and by how much, from some seconds on, and by an hour
//! that node is closed until the clock is set right. Needs root and the parts of a cluster.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers fail as their test does")]

use std::{env, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use weft_cluster::{Options, image::Image};
use weft_tests::{
    failure::{Fate, cluster, row, watch::Watched as _},
    manifest::{Pod, namespace},
    mesh::Mesh,
};

/// Agents in it run under a clock that a file moves.
const IMAGE: &str = "registry.test/clocked:1";
/// By how many seconds, on each node.
const OFFSET: &str = "/run/weft/clock";
const LIMIT: Duration = Duration::from_secs(120);

/// As installed, but for the agents' clock.
fn install(mesh: &Mesh) -> Result<()> {
    let programs = env::var_os("WEFT_BIN_DIR").context("WEFT_BIN_DIR is not set")?;
    let program = |name: &str| Path::new(&programs).join(name);
    let folder = tempfile::tempdir()?;
    let archive = folder.path().join("clocked.tar");
    let image = Image::new(IMAGE)
        .file(program("weft-agent"), "/weft-agent", 0o755)
        .file(program("weft-cni"), "/weft-cni", 0o755)
        .file(program("weft-lab-app"), "/app", 0o755);
    image.write_archive(&archive)?;
    for node in mesh.cluster.nodes() {
        let import =
            ["ctr", "--address", "/run/containerd/containerd.sock", "--namespace", "k8s.io", "images"];
        node.exec(&[&import[..], &["import", &archive.to_string_lossy()]].concat())?;
    }
    let text = mesh.manifests()?;
    let (before, after) =
        text.split_once("image: registry.test/weft/weft-agent:test").context("the image")?;
    let command = format!("command: [/app, clock, --offset, {OFFSET}, --, /weft-agent]");
    let indent = "        ";
    mesh.cluster.apply(&format!("{before}image: {IMAGE}\n{indent}{command}{after}"))?;
    mesh.rolled_out().with_context(|| mesh.diagnose())
}

/// Moves the clock of node 2's agent.
fn set(mesh: &Mesh, seconds: i64) -> Result<()> {
    // As a whole: it is read at each question for the time.
    let script = format!("echo {seconds} > {OFFSET}.new && mv {OFFSET}.new {OFFSET}");
    mesh.cluster.node(2).exec(&["sh", "-c", &script]).map(drop)
}

/// Waits until `weft check` speaks of clocks as `is` wants it.
fn check_says(mesh: &Mesh, is: impl Fn(&str) -> bool) -> Result<()> {
    mesh.eventually("what weft check finds of clocks", || {
        let text = mesh.weft_said(&["check"])?;
        let lines: Vec<&str> = text.lines().filter(|line| line.contains("clock")).collect();
        ensure!(lines.iter().any(|line| is(line)), "{lines:?}");
        Ok(())
    })
}

/// By how many seconds it says that node 2 is behind.
fn behind(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once("the clock of node2 is ")?;
    rest.split_once("s behind that of the API server")?.0.parse().ok()
}

#[test]
fn a_node_whose_clock_is_off_is_found_by_weft_check() -> Result<()> {
    let mesh = Mesh::bare(Options::default())?;
    install(&mesh)?;
    let pods = [Pod::lab("shop", "client", "node1", "serve, --tcp, '7000'")].into_iter().chain([Pod::lab(
        "shop",
        "web",
        "node2",
        "serve, --tcp, '7000'",
    )]);
    let pods: String = pods.map(|pod| pod.to_string()).collect();
    mesh.cluster.apply(&(namespace("shop", Some("strict")) + &pods))?;
    mesh.ready("shop", &["client", "web"])?;
    mesh.enrolled("shop", &["client", "web"], "strict")?;
    let agree = |line: &str| line.contains("the clocks of all nodes agree");
    check_says(&mesh, agree)?;

    let (logs, from) = (tempfile::tempdir()?, mesh.cluster.node(1));
    let to = format!("{}:7000", mesh.field("shop", "pod/web", ".status.podIP")?);
    let watch =
        |name, running| cluster::watch(&from, ("shop", "client"), (name, &to), running, logs.path(), true);
    let (new, running) = (watch("new", false)?, watch("running", true)?);

    // Too little to harm, and worth a word.
    set(&mesh, -25)?;
    // The answer travels meanwhile.
    check_says(&mesh, |line| behind(line).is_some_and(|seconds| (23..=28).contains(&seconds)))?;
    ensure!(new.after(new.mark()?, 10)?.fate()? == Fate::GoOn, "calls fail by 25 s");

    let told = row("clock-ahead")?;
    set(&mesh, 3630)?;
    check_says(&mesh, |line| line.contains("the clock of node2 is 1h0m ahead of that of the API server"))?;
    new.settled(told.new, 10, LIMIT)?;
    told.observed(Fate::Refused, running.still(10)?)?;
    let node = mesh.cluster.node(2);
    mesh.eventually(told.fault, || told.shown(|place| cluster::read(&mesh, &node, place)))?;

    set(&mesh, 0)?;
    new.settled(Fate::GoOn, 10, LIMIT).context("with the clock set right")?;
    check_says(&mesh, agree)
}
