//! Pods of a node's own network as callers, and Services at addresses that are not their own. Needs root and the parts
//! of a cluster.

#![forbid(unsafe_code)]

use anyhow::{Result, ensure};
use weft_cluster::Options;
use weft_tests::{
    manifest::{Pod, namespace, service},
    mesh::Mesh,
};

/// Carried by requests; never to be seen on the wire.
const CANARY: &str = "weft-canary-5d21";
const SHOP: &str = "shop";
const NAME: &str = "http://web.shop.svc.cluster.local/";

/// Strict servers on both nodes, a strict client on node 1, and a Pod of node 1's own network.
fn objects() -> String {
    let web = |node: u8| {
        let pod = Pod::nginx(SHOP, &format!("web{node}"), &format!("node{node}"));
        pod.labels(&format!("app: web, on: node{node}")).to_string()
    };
    let services = format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: near, namespace: {SHOP}}}
spec:
  internalTrafficPolicy: Local
  selector: {{app: web}}
  ports: [{{name: http, port: 80, appProtocol: http}}]
---
apiVersion: v1
kind: Service
metadata: {{name: far, namespace: {SHOP}}}
spec:
  internalTrafficPolicy: Local
  selector: {{app: web, on: node2}}
  ports: [{{name: http, port: 80, appProtocol: http}}]
"
    );
    [
        namespace(SHOP, Some("strict")),
        namespace("outside", None),
        web(1),
        web(2),
        Pod::busybox(SHOP, "client", "node1").to_string(),
        Pod::busybox("outside", "monitor", "node1").host_network().to_string(),
        service(SHOP, "web", "type: NodePort, ports: [{name: http, port: 80}]"),
        services,
    ]
    .concat()
}

fn policy(node: &str) -> String {
    format!(
        "
apiVersion: weft.mesh/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: from-node, namespace: {SHOP}}}
spec:
  targetRefs: [{{group: '', kind: Pod, selector: {{matchLabels: {{app: web}}}}}}]
  action: ALLOW
  rules:
  - sources: [{{type: SPIFFE, spiffe: 'spiffe://cluster.local/node/{node}'}}]
    networkAttributes: {{ports: [80]}}
"
    )
}

fn call(mesh: &Mesh, namespace: &str, pod: &str, url: &str) -> Result<String> {
    mesh.fetch(namespace, pod, url, &[&format!("x-canary: {CANARY}")])
}

/// Calls, and looks that nobody on the wire can read it.
fn unread(mesh: &Mesh, namespace: &str, pod: &str, urls: &[&str]) -> Result<()> {
    let capture = mesh.capture(1)?;
    for url in urls.iter().cycle().take(4 * urls.len()) {
        call(mesh, namespace, pod, url)?;
    }
    let trace = capture.finish()?;
    let (seen, tunnelled) = (trace.find(CANARY.as_bytes()), trace.tls_bytes(15_008));
    ensure!(seen == 0, "{pod} was read {seen} times");
    ensure!(tunnelled.0 > 0, "nothing of {pod} went through a tunnel: {tunnelled:?}");
    Ok(())
}

/// What a process of node 1 that is no Pod's gets from there.
fn daemon(mesh: &Mesh, address: &str, port: u16) -> Result<String> {
    let ask =
        format!("exec 3<>/dev/tcp/{address}/{port}; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; head -c 12 <&3");
    mesh.cluster.node(1).exec(&["timeout", "5", "bash", "-c", &ask])
}

#[test]
fn a_pod_of_the_nodes_network_speaks_for_the_node() -> Result<()> {
    let mesh = Mesh::up(Options::default())?;
    mesh.cluster.apply(&objects())?;
    mesh.ready(SHOP, &["web1", "web2", "client"])?;
    mesh.ready("outside", &["monitor"])?;
    mesh.named(SHOP, &["web", "near", "far"])?;
    mesh.enrolled(SHOP, &["web1", "web2", "client"], "strict")?;
    let ip = |pod: &str| mesh.field(SHOP, &format!("pod/{pod}"), ".status.podIP");
    let (near, far) = (ip("web1")?, ip("web2")?);
    let urls = [format!("http://{near}/"), format!("http://{far}/"), NAME.to_owned()];

    // A Pod of this node, one of the other, and a Service: all of them strict.
    for url in &urls {
        mesh.eventually("a call of the node's network", || call(&mesh, "outside", "monitor", url))?;
    }
    let node = mesh.cluster.node(1).addresses();
    let said = call(&mesh, "outside", "monitor", &urls[0])?;
    ensure!(node.iter().any(|ip| said.contains(&format!("saw {ip} "))), "{said:?} names none of {node:?}");
    unread(&mesh, "outside", "monitor", &[&urls[1]])?;

    // Nobody else of the node's network is taken in.
    for ip in [&near, &far] {
        ensure!(daemon(&mesh, ip, 80).is_err(), "a daemon reached the strict Pod at {ip}");
    }
    let api = mesh.field("default", "service/kubernetes", ".spec.clusterIP")?;
    let answer = daemon(&mesh, &api, 443)?;
    ensure!(answer.starts_with("HTTP/1.0 400"), "the API server says to a daemon: {answer:?}");

    // The kernel refuses at once, and flows say in whose name.
    mesh.cluster.apply(&policy("node2"))?;
    mesh.programmed(SHOP, "from-node")?;
    for url in &urls {
        mesh.eventually("a refusal", || {
            ensure!(call(&mesh, "outside", "monitor", url).is_err(), "{url} answers node1");
            Ok(())
        })?;
    }
    mesh.cluster.apply(&policy("node1"))?;
    mesh.programmed(SHOP, "from-node")?;
    for url in &urls {
        mesh.eventually("an answer", || call(&mesh, "outside", "monitor", url))?;
    }
    ensure!(call(&mesh, SHOP, "client", NAME).is_err(), "the policy is for the node alone");
    mesh.eventually("the flows", || {
        let flows = mesh.weft(&["observe", "-n", SHOP, "--last", "200", "-o", "compact"])?;
        for part in ["spiffe://cluster.local/node/node1", "proxy-source", "proxy-destination", "mtls("] {
            ensure!(flows.contains(part), "no {part} in {flows}");
        }
        Ok(())
    })?;
    // The other node names it too, to which it is but an identity: it has no address of its own there.
    mesh.eventually("a flow of the other node that names this one", || {
        let flows = mesh.weft(&["observe", "-n", SHOP, "--last", "200", "-o", "json"])?;
        let named = |line: &str| {
            serde_json::from_str::<serde_json::Value>(line).is_ok_and(|flow| {
                let there = flow["node"] == "node2" && flow["reporter"] == "proxy-destination";
                there && flow["source"]["workload"] == "node1"
            })
        };
        ensure!(flows.lines().any(named), "none in {flows}");
        Ok(())
    })?;
    mesh.cluster.kubectl(&["-n", SHOP, "delete", "wap", "from-node"])?;

    // A port of a node is the Service's, for Pods of the mesh and for those of the node's network.
    let port = mesh.field(SHOP, "service/web", ".spec.ports[0].nodePort")?;
    let of_nodes: Vec<String> =
        [1, 2].iter().map(|n| format!("http://{}:{port}/", mesh.cluster.node(*n).addresses()[0])).collect();
    for (namespace, pod) in [(SHOP, "client"), ("outside", "monitor")] {
        for url in &of_nodes {
            mesh.eventually("a call to a port of a node", || call(&mesh, namespace, pod, url))?;
        }
        // Either Pod may answer: enough calls for both.
        let urls: Vec<&str> = of_nodes.iter().map(String::as_str).cycle().take(6).collect();
        unread(&mesh, namespace, pod, &urls)?;
    }

    // Local stays local.
    for _ in 0..12 {
        let said = mesh.eventually("a near answer", || call(&mesh, SHOP, "client", "http://near.shop/"))?;
        ensure!(said.starts_with("web1 "), "from another node: {said:?}");
    }
    let refused = call(&mesh, SHOP, "client", "http://far.shop/").err().map(|e| format!("{e:#}"));
    ensure!(refused.as_ref().is_some_and(|why| why.contains("503")), "{refused:?}");
    Ok(())
}
