//! Weft beside somebody else's eBPF at the node's root cgroup: programs that turn Service addresses into Pod addresses
//! at the connect, as CNIs without kube-proxy do. On one node they are attached before Weft's, on the other after.
//! Needs root and the parts of a cluster.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers fail as their test does")]

use anyhow::{Context as _, Result, ensure};
use weft_cluster::{Options, Service};
use weft_tests::{
    manifest::{Pod, catalog, namespace, service},
    mesh::Mesh,
};

const CANARY: &str = "weft-canary-c0de";
/// Addresses of Services that kube-proxy never hears of: only the foreign programs, or Weft, lead to their Pods.
const WEB: &str = "10.96.77.1";
const OUT: &str = "10.96.77.2";

fn server(namespace: &str, address: &str) -> String {
    let spec = format!("clusterIP: {address}, ports: [{{port: 80, appProtocol: http}}]");
    format!("{}{}", Pod::nginx(namespace, "web", "node2"), service(namespace, "web", &spec))
}

fn call(mesh: &Mesh, namespace: &str, node: &str, host: &str, path: &str) -> Result<String> {
    mesh.fetch(namespace, node, &format!("http://{host}/{path}"), &[&format!("x-canary: {CANARY}")])
}

#[test]
fn beside_a_foreign_load_balancer_at_the_cgroup_root() -> Result<()> {
    let mesh = Mesh::bare(Options::default())?;
    for node in mesh.cluster.nodes() {
        node.stop_service(Service::KubeProxy)?;
    }
    let mut documents: Vec<String> = Vec::new();
    for (name, address) in [("shop", WEB), ("outside", OUT)] {
        documents.push(namespace(name, None));
        documents.push(server(name, address));
        documents.extend(["node1", "node2"].map(|node| Pod::busybox(name, node, node).to_string()));
    }
    mesh.cluster.apply(&documents.concat())?;
    for namespace in ["shop", "outside"] {
        mesh.ready(namespace, &["web", "node1", "node2"])?;
    }
    let mut pairs = Vec::new();
    for (namespace, address) in [("shop", WEB), ("outside", OUT)] {
        pairs.push(format!("{address}:80={}:80", mesh.field(namespace, "pod/web", ".status.podIP")?));
    }
    let foreign = |node| mesh.foreign_load_balancer(node, &pairs);
    ensure!(call(&mesh, "shop", "node1", WEB, "").is_err(), "{WEB} leads somewhere without anybody's help");
    foreign(1)?;
    mesh.eventually("the foreign program's work", || call(&mesh, "shop", "node1", WEB, ""))?;
    // Weft's own Services, installed now, need kube-proxy.
    for node in mesh.cluster.nodes() {
        node.start_service(Service::KubeProxy)?;
    }
    mesh.install()?;
    foreign(2)?;
    mesh.named("shop", &["web"])?;

    mesh.mode("shop", "strict")?;
    mesh.enrolled("shop", &["web", "node1", "node2"], "strict")?;
    mesh.cluster.apply(&catalog("default"))?;
    mesh.programmed("shop", "web-callers")?;
    let web = mesh.field("shop", "pod/web", ".status.podIP")?;
    let hosts = [WEB.to_owned(), web, "web.shop.svc.cluster.local".to_owned()];
    let capture = mesh.capture(1)?;
    for node in ["node1", "node2"] {
        for host in &hosts {
            mesh.eventually(&format!("a call from {node} to {host}"), || {
                call(&mesh, "shop", node, host, "catalog/shoes")
            })?;
            let denied = call(&mesh, "shop", node, host, "admin").unwrap_err();
            ensure!(format!("{denied:#}").contains("403"), "{node} to {host}: {denied:#}");
            let answer = call(&mesh, "outside", node, host, "catalog/shoes");
            ensure!(answer.is_err(), "{host} answered a caller outside the mesh on {node}");
        }
    }
    let trace = capture.finish()?;
    // The refused callers outside speak plaintext, but never get a connection to say anything.
    ensure!(trace.find(CANARY.as_bytes()) == 0, "plaintext between the nodes");
    for node in ["node1", "node2"] {
        // Out of the mesh, from strict Pods and from others.
        mesh.eventually("a call out of the mesh", || call(&mesh, "shop", node, OUT, ""))?;
        mesh.eventually("a call beside the mesh", || call(&mesh, "outside", node, OUT, ""))?;
    }
    mesh.ready("shop", &["web"]).context("the kubelet's probes reach strict Pods")?;
    let said = mesh.weft_said(&["check"])?;
    ensure!(!said.contains("error"), "{said}");
    Ok(())
}
