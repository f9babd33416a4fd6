//! What goes on, and what does not, while no agent runs: the programs stay and judge, Pods outside the mesh come up and
//! work, the operator is not locked out, and what is strict stays closed until the agents are back.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers fail as their test does")]

use anyhow::{Context as _, Result, ensure};
use weft_cluster::Options;
use weft_tests::{
    failure::{Fate, cluster, row, watch::Watched as _},
    mesh::{LAB, Mesh, NGINX},
};

const CANARY: &str = "weft-canary-91be";

fn server(namespace: &str, node: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: web, namespace: {namespace}, labels: {{app: web}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers: [{{name: nginx, image: {NGINX}, imagePullPolicy: IfNotPresent, ports: [{{containerPort: 80}}]}}]
---
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: {namespace}}}
spec: {{selector: {{app: web}}, ports: [{{port: 80, appProtocol: http}}]}}
"
    )
}

fn client(namespace: &str, name: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 0
  containers: [{{name: c, image: 'busybox:1', command: [sleep, infinity]}}]
"
    )
}

/// A Pod that watches from node 1, and one on node 2 that answers it line by line.
fn watched(name: &str, node: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers: [{{name: c, image: '{LAB}', args: [serve, --tcp, '7000']}}]
"
    )
}

fn call(mesh: &Mesh, namespace: &str, client: &str, server: &str) -> Result<String> {
    let header = format!("x-canary: {CANARY}");
    mesh.fetch(namespace, client, &format!("http://web.{server}.svc.cluster.local/"), &[&header])
}

/// Lets the agents run on no node, or on every node again.
fn agents(mesh: &Mesh, run: bool) -> Result<()> {
    let selector = if run { "null" } else { "{\"weft.mesh/nowhere\":\"true\"}" };
    let patch = format!("{{\"spec\":{{\"template\":{{\"spec\":{{\"nodeSelector\":{selector}}}}}}}}}");
    let words = ["-n", "weft-system", "patch", "daemonset", "weft-agent", "--type=merge", "-p", &patch];
    mesh.cluster.kubectl(&words)?;
    if run {
        return mesh.rolled_out();
    }
    mesh.eventually("the end of the agents", || {
        let left = mesh.agents()?;
        ensure!(left.is_empty(), "{left:?} run");
        Ok(())
    })
}

#[test]
fn without_agents_strict_stays_closed_and_the_rest_works() -> Result<()> {
    let mesh = Mesh::up(Options::default())?;
    let namespaces = "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {weft.mesh/mode: strict}}}\n---\n\
        {apiVersion: v1, kind: Namespace, metadata: {name: outside}}\n";
    mesh.cluster.apply(namespaces)?;
    let documents = [
        server("shop", "node2"),
        client("shop", "client"),
        server("outside", "node2"),
        client("outside", "client"),
        watched("watcher", "node1"),
        watched("echo", "node2"),
    ];
    mesh.cluster.apply(&documents.join("---\n"))?;
    mesh.ready("shop", &["web", "client", "watcher", "echo"])?;
    mesh.ready("outside", &["web", "client"])?;
    mesh.enrolled("shop", &["web", "client", "watcher", "echo"], "strict")?;
    mesh.eventually("a call through the mesh", || call(&mesh, "shop", "client", "shop"))?;
    mesh.eventually("a call outside", || call(&mesh, "outside", "client", "outside"))?;

    let told = row("agent")?;
    let (logs, from) = (tempfile::tempdir()?, mesh.cluster.node(1));
    let to = format!("{}:7000", mesh.field("shop", "pod/echo", ".status.podIP")?);
    let watch =
        |name, running| cluster::watch(&from, ("shop", "watcher"), (name, &to), running, logs.path(), true);
    let (new, running) = (watch("new", false)?, watch("running", true)?);

    agents(&mesh, false)?;
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
    mesh.cluster.apply(&[client("outside", "late"), client("shop", "late")].join("---\n"))?;
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

    agents(&mesh, true)?;
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
