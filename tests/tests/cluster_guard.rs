//! What is persistent on a node: while no agent runs there, after a reboot and at a cold start of the whole cluster, a
//! strict Pod does not start, everything else does, and all comes back by itself.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers fail and speak as their test does")]

use std::{thread, time::Instant};

use anyhow::{Context as _, Result, ensure};
use weft_cluster::{Node, Options, Program};
use weft_tests::{
    manifest::{Pod, namespace, server},
    mesh::Mesh,
};

/// Carried by the calls of strict Pods, and of Pods outside the mesh.
const CANARY: &str = "weft-canary-4d1e";
const PLAIN: &str = "plain-canary-4d1e";
const HELD: &str = "weft: the Pod is held: the namespace shop is strict in the mesh, and Weft's agent does not run on \
                    this node";

/// A Pod that calls the server of its namespace from its first moment on.
fn client(namespace: &str, canary: &str) -> String {
    let script = format!(
        "while true; do wget -T 2 -qO /dev/null --header \"x-canary: {canary}\" http://web.{namespace}.svc.cluster.local/; \
         sleep 0.2; done"
    );
    Pod::script(namespace, "client", "node1", &script).to_string()
}

fn call(mesh: &Mesh, namespace: &str, server: &str) -> Result<String> {
    let header = format!("x-canary: {}", if namespace == "shop" { CANARY } else { PLAIN });
    mesh.fetch(namespace, "client", &format!("http://{server}.svc.cluster.local/"), &[&header])
}

/// Waits until the node holds Pods by itself: plugin, chain, and the list with `shop` in it.
fn guarded(mesh: &Mesh, node: &Node<'_>) -> Result<()> {
    mesh.eventually("the guard on the node", || {
        let script = "test -x /opt/cni/bin/weft-cni && cat /etc/cni/net.d/00-weft.conflist /var/lib/weft/namespaces.json";
        let said = node.exec(&["sh", "-c", script])?;
        for part in ["\"type\": \"weft-cni\"", "\"type\": \"portmap\"", "\"shop\":{\"mode\":\"strict\""] {
            ensure!(said.contains(part), "no {part} in {said}");
        }
        Ok(())
    })
}

/// The Pod does not start, and `kubectl describe pod` says why; none of its processes has run since.
fn held(mesh: &Mesh, pod: &str, node: &Node<'_>) -> Result<()> {
    mesh.eventually("the event that says why", || {
        let of = format!("involvedObject.name={pod},type=Warning");
        let path = "jsonpath={.items[*].message}";
        let said =
            mesh.cluster.kubectl(&["-n", "shop", "get", "events", "--field-selector", &of, "-o", path])?;
        ensure!(said.contains(HELD) && said.contains("weft-agent -o wide"), "{said:?}");
        Ok(())
    })?;
    let label =
        format!("labels.\"io.kubernetes.pod.name\"=={pod},labels.\"io.kubernetes.pod.namespace\"==shop");
    let ctr = ["ctr", "-a", "/run/containerd/containerd.sock", "-n", "k8s.io"];
    let containers = node.exec(&[&ctr[..], &["containers", "ls", "-q", &label]].concat())?;
    let tasks = node.exec(&[&ctr[..], &["tasks", "ls"]].concat())?;
    let runs = containers
        .split_whitespace()
        .find(|id| tasks.lines().any(|line| line.starts_with(*id) && line.contains("RUNNING")));
    ensure!(runs.is_none(), "{runs:?} of {pod} runs:\n{tasks}");
    Ok(())
}

/// Tries to reach the server `late` of the strict namespace in plaintext, from a Pod outside the mesh and from the node,
/// until the file `/tmp/stop` is there; gives what was reached.
fn knock(mesh: &Mesh) -> Result<String> {
    let address = mesh.field("shop", "service/late", ".spec.clusterIP")?;
    let script = |wget: &str, stop: &str| {
        format!(
            "n=0; while [ ! -f {stop} ]; do {wget} -T 1 -qO- http://{address}/ && echo reached; n=$((n+1)); sleep 0.1; \
             done; echo tried $n"
        )
    };
    thread::scope(|scope| {
        let pod = scope.spawn(|| mesh.exec("outside", "client", &["sh", "-c", &script("wget", "/tmp/stop")]));
        let node = mesh.cluster.node(1);
        let own = node.exec(&["sh", "-c", &script("busybox wget", "/run/stop-knocking")]);
        let pod = pod.join().map_err(|_| anyhow::anyhow!("the knocking panicked"))?;
        Ok(format!("{}{}", own?, pod?))
    })
}

fn stop_knocking(mesh: &Mesh) -> Result<()> {
    mesh.exec("outside", "client", &["touch", "/tmp/stop"])?;
    mesh.cluster.node(1).exec(&["touch", "/run/stop-knocking"]).map(drop)
}

/// Both namespaces work as they should, and nothing readable of the strict one passes the wire.
fn all_is_well(mesh: &Mesh) -> Result<()> {
    mesh.enrolled("shop", &["web", "client", "late"], "strict")?;
    for namespace in ["shop", "outside"] {
        mesh.named(namespace, &["web", "late"])?;
    }
    mesh.eventually("a call through the mesh", || call(mesh, "shop", "web.shop"))?;
    mesh.eventually("a call outside the mesh", || call(mesh, "outside", "web.outside"))?;
    let capture = mesh.capture(1)?;
    for _ in 0..5 {
        call(mesh, "shop", "web.shop")?;
        call(mesh, "outside", "web.outside")?;
    }
    let trace = capture.finish()?;
    ensure!(trace.find(CANARY.as_bytes()) == 0, "plaintext of strict Pods on the wire");
    ensure!(trace.find(PLAIN.as_bytes()) >= 5, "the capture does not see what is readable");
    let refused = call(mesh, "outside", "late.shop");
    ensure!(refused.is_err(), "plaintext from outside was answered: {refused:?}");
    Ok(())
}

fn restarts(mesh: &Mesh, namespace: &str, pod: &str) -> Result<u32> {
    let count = mesh.field(namespace, &format!("pod/{pod}"), ".status.containerStatuses[0].restartCount")?;
    Ok(count.parse()?)
}

#[test]
fn no_strict_pod_starts_where_nobody_judges_it() -> Result<()> {
    let mesh = Mesh::up(Options::default())?;
    mesh.cluster.apply(&[namespace("shop", Some("strict")), namespace("outside", None)].concat())?;
    let documents = [
        server("shop", "web", "node2"),
        client("shop", CANARY),
        server("outside", "web", "node2"),
        client("outside", PLAIN),
    ];
    mesh.cluster.apply(&documents.concat())?;
    for namespace in ["shop", "outside"] {
        mesh.ready(namespace, &["web", "client"])?;
        mesh.named(namespace, &["web"])?;
    }
    mesh.enrolled("shop", &["web", "client"], "strict")?;
    mesh.eventually("a call through the mesh", || call(&mesh, "shop", "web.shop"))?;
    for node in mesh.cluster.nodes() {
        guarded(&mesh, &node)?;
    }

    thread::scope(|scope| -> Result<()> {
        mesh.run_agents(false)?;
        let capture = mesh.capture(1)?;
        mesh.cluster
            .apply(&[server("shop", "late", "node1"), server("outside", "late", "node1")].concat())?;
        for namespace in ["shop", "outside"] {
            mesh.named(namespace, &["late"])?;
        }
        let knocking = scope.spawn(|| knock(&mesh));
        let outcome = (|| {
            held(&mesh, "late", &mesh.cluster.node(1))?;
            mesh.ready("outside", &["late"]).context("a Pod outside the mesh, while no agent runs")?;
            mesh.eventually("a call to it", || call(&mesh, "outside", "late.outside"))?;
            reboot(&mesh)?;
            let away = Instant::now();
            mesh.run_agents(true)?;
            mesh.ready("shop", &["web", "late"]).context("after the agents' return")?;
            println!("{:.1} s from the agents' return to Ready strict Pods", away.elapsed().as_secs_f64());
            all_is_well(&mesh)
        })();
        stop_knocking(&mesh)?;
        let knocked = knocking.join().map_err(|_| anyhow::anyhow!("the knocking panicked"))??;
        outcome?;
        ensure!(!knocked.contains("reached"), "a strict Pod answered in plaintext: {knocked}");
        ensure!(knocked.matches("tried").count() == 2, "{knocked}");
        let trace = capture.finish()?;
        ensure!(trace.find(CANARY.as_bytes()) == 0, "plaintext of strict Pods while no agent ran");
        Ok(())
    })?;
    cold_start(&mesh)
}

/// A node loses its power, and comes back while no agent runs on it.
fn reboot(mesh: &Mesh) -> Result<()> {
    let node = mesh.cluster.node(2);
    let before = restarts(mesh, "outside", "web")?;
    node.stop()?;
    node.start()?;
    node.exec(&["test", "!", "-e", "/sys/fs/bpf/weft"]).context("pins survived a loss of power")?;
    mesh.eventually("the restart of the Pod outside the mesh", || {
        let now = restarts(mesh, "outside", "web")?;
        ensure!(now > before, "{now} restarts");
        Ok(())
    })?;
    mesh.ready("outside", &["web"])?;
    mesh.eventually("a call outside the mesh", || call(mesh, "outside", "web.outside"))?;
    held(mesh, "web", &node)
}

/// Every node and the control plane lose their power at once.
fn cold_start(mesh: &Mesh) -> Result<()> {
    let cluster = &mesh.cluster;
    for program in Program::ALL.into_iter().rev() {
        cluster.stop(program)?;
    }
    cluster.nodes().try_for_each(|node| node.stop())?;
    let began = Instant::now();
    cluster.nodes().try_for_each(|node| node.start())?;
    let capture = mesh.capture(1)?;
    cluster.start(Program::Etcd)?;
    cluster.start(Program::ApiServer)?;
    cluster.wait_api()?;
    cluster.start(Program::ControllerManager)?;
    cluster.start(Program::Scheduler)?;
    // What the API server says at first is from before: the new Pods are known by what works.
    mesh.eventually("the agents' new processes", || {
        mesh.cluster.nodes().try_for_each(|node| mesh.node_status(&node).map(drop))
    })?;
    mesh.enrolled("shop", &["web", "client", "late"], "strict")?;
    mesh.eventually("a call through the mesh", || call(mesh, "shop", "web.shop"))?;
    println!("{:.1} s from the cold start to a call through the mesh", began.elapsed().as_secs_f64());
    mesh.rolled_out().with_context(|| mesh.diagnose())?;
    for namespace in ["shop", "outside"] {
        mesh.ready(namespace, &["web", "client", "late"])?;
    }
    println!("{:.1} s to the readiness of everything", began.elapsed().as_secs_f64());
    let trace = capture.finish()?;
    ensure!(trace.find(CANARY.as_bytes()) == 0, "plaintext of strict Pods during the cold start");
    ensure!(trace.find(PLAIN.as_bytes()) > 0, "the capture does not see what is readable");
    all_is_well(mesh)
}
